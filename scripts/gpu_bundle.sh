#!/bin/sh
# Packs what a GPU machine without a Rust toolchain and without a network needs into target/gpu-bundle: the stripped
# binary (its kernels are inside, as text), NVRTC, the peer scripts with what they need beyond PyTorch, the recipes, the
# Vulkan loader, and run.sh. Copy the folder there and run `sh run.sh`; bring `results` back, and
# `python3 benches/peers/gpu/join.py results --into docs/benchmarks` writes the page.
#
# ESPALIER_BINARY names a binary that is built already. Without apt or pip, or with OFFLINE=1, the parts that come from
# there stay out; each is optional on the other side too.
set -eu
cd "$(dirname "$0")/.."
# What one copy to such a machine may weigh.
most=64000000
target=${CARGO_TARGET_DIR:-target}
bundle=$target/gpu-bundle
fetched=$target/gpu-parts
if [ -z "${ESPALIER_BINARY:-}" ]; then
  ${CARGO:-cargo} build --release
  ESPALIER_BINARY=$target/release/espalier
fi
rm -rf "$bundle"
mkdir -p "$bundle/peers" "$bundle/recipes" "$fetched"

strip -o "$bundle/espalier" "$ESPALIER_BINARY"
cp scripts/gpu_run.sh "$bundle/run.sh"
cp benches/peers/gpu/*.py benches/peers/gpu/requirements.txt "$bundle/peers/"
cp recipes/*.toml "$bundle/recipes/"
needed=$(objdump -T "$bundle/espalier" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
{
  "$bundle/espalier" --version
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ', with changes')"
  echo "packed $(date -u +%Y-%m-%d), needs ${needed:-no particular glibc}"
} > "$bundle/VERSION"

# The compiler, as one archive: a third of its size, and unpacked there once. Compressing takes minutes, so it is kept.
sh scripts/nvrtc.sh
version=$(cat "$target/nvrtc/version")
archive=$fetched/nvrtc-$version.tar.xz
if [ ! -e "$archive" ]; then
  echo "compressing NVRTC $version"
  # Leaves out the second build of each library, which nothing here loads. The licence goes along.
  set -- "$target"/nvrtc/nvidia/cu13/lib/libnvrtc*.so.*
  stage=$(mktemp -d "$fetched/stage.XXXXXX")
  trap 'rm -rf "$stage"' EXIT
  for library in "$@"; do
    case $library in *.alt.*) ;; *) cp "$library" "$stage/" ;; esac
  done
  find "$target/nvrtc" -ipath '*licenses*' -type f -exec cp {} "$stage/" \;
  tar -C "$stage" -cf - . | xz --threads=2 --x86 --lzma2=preset=6 > "$archive.part"
  mv "$archive.part" "$archive"
fi

# What the scripts import beyond PyTorch and is small: pinned in requirements.txt, pure Python.
if [ -z "${OFFLINE:-}" ]; then
  pinned=$(grep '^liger-kernel==' benches/peers/gpu/requirements.txt)
  ls "$fetched"/liger_kernel-"${pinned#*==}"-*.whl >/dev/null 2>&1 ||
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --dest "$fetched" "$pinned" ||
    echo "without $pinned: it could not be fetched" >&2
  if command -v apt-get >/dev/null 2>&1 && ! ls "$fetched"/libvulkan1_*.deb >/dev/null 2>&1; then
    (cd "$fetched" && apt-get download -qq libvulkan1) || echo "without the Vulkan loader: it could not be fetched" >&2
  fi
fi
if ls "$fetched"/liger_kernel-*.whl >/dev/null 2>&1; then
  mkdir -p "$bundle/wheels"
  cp "$fetched"/liger_kernel-*.whl "$bundle/wheels/"
fi
if ls "$fetched"/libvulkan1_*.deb >/dev/null 2>&1; then
  unpacked=$(mktemp -d "$fetched/vulkan.XXXXXX")
  dpkg-deb -x "$fetched"/libvulkan1_*.deb "$unpacked"
  mkdir -p "$bundle/vulkan"
  find "$unpacked" -name 'libvulkan.so.1*' -type f -exec cp {} "$bundle/vulkan/libvulkan.so.1" \;
  cp "$unpacked/usr/share/doc/libvulkan1/copyright" "$bundle/vulkan/"
  rm -rf "$unpacked"
fi

weight() {
  find "$bundle" -type f -printf '%s\n' | awk '{ total += $1 } END { printf "%d", total }'
}

if [ $(($(weight) + $(stat -c %s "$archive"))) -le $most ]; then
  cp "$archive" "$bundle/nvrtc.tar.xz"
else
  # run.sh takes the NVRTC of the machine's own PyTorch or toolkit then.
  echo "without NVRTC: the bundle would be larger than $most bytes" >&2
fi
size=$(weight)
find "$bundle" -type f -printf '%10s  %P\n' | sort -rn | head -n 6
echo "$bundle: $size bytes"
[ "$size" -le $most ] || { echo "that is more than $most" >&2; exit 1; }
