#!/bin/sh
# Fetches NVIDIA's runtime compiler (no driver, no GPU needed) from the Python registry into target/nvrtc, at a pinned
# version: `espalier kernels cuda-check` and the tests compile every CUDA kernel with it. Nothing of it is committed.
set -eu
version=13.0.88
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-target}/nvrtc"
if [ -e "$target/nvidia/cu13/lib/libnvrtc.so.13" ] && [ "$(cat "$target/version" 2>/dev/null)" = "$version" ]; then
  exit 0
fi
if ! command -v python3 >/dev/null 2>&1; then
  echo "python3 with pip is needed to fetch NVRTC" >&2
  exit 1
fi
# A folder of its own until it is whole.
mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$(dirname "$target")/nvrtc.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "fetching NVRTC $version"
python3 -m pip download --quiet --no-deps --disable-pip-version-check --dest "$work" "nvidia-cuda-nvrtc==$version"
python3 -m zipfile -e "$work"/*.whl "$work/whole"
echo "$version" > "$work/whole/version"
rm -rf "$target"
mv "$work/whole" "$target"
