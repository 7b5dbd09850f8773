#!/bin/sh
# Times espalier and other libraries on this CPU, and on the wgpu adapter where there is one, in turn, and writes
# docs/benchmarks.md. What cannot be built or installed is left out, and said. A run that was cut short goes on where it was,
# and times again what was void by noise or lacks a peer that is here now; FRESH=1 forgets what it has.
#
#   sh scripts/peers.sh [OPTION...]    options of benches/peers/cpu/compare.py, such as --op 'matmul*' or --rounds 3
#
# PYTHON names an interpreter that has PyTorch already; without it one is set up below target/. THREADS=2 adds two threads'
# wall times, which are void while others work. TARGET is where things are built (target). BURN=1 builds burn, which takes
# minutes; what is built already is asked.
set -u
cd "$(dirname "$0")/.." || exit 1
cargo=${CARGO:-cargo}
target=${TARGET:-target}
work=$target/peers
mkdir -p "$work" || exit 1
# Nothing and 0 are no.
[ "${FRESH:-0}" = 0 ] && FRESH= || FRESH=--fresh
[ "${BURN:-0}" = 0 ] && BURN=
[ "${THREADS:-0}" = 0 ] && THREADS=
case $THREADS in *[!0-9]*) echo "THREADS=$THREADS is no number" >&2; exit 2 ;; esac
if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" >/dev/null 2>&1; then
  echo "PYTHON=$PYTHON is no program" >&2
  exit 2
fi

CARGO_TARGET_DIR=$target "$cargo" build --release --bin espalier || exit 1

python=${PYTHON:-$work/venv/bin/python}
# The stamp is written last, so that what was cut short is begun again; other requirements are other stamps.
requirements=benches/peers/cpu/requirements.txt
if [ -z "${PYTHON:-}" ] && ! cmp -s "$requirements" "$work/venv/done"; then
  [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear "$work/venv" || exit 1
  # One by one: a machine that lacks one library still compares with the others, and is asked again the next time.
  whole=1
  while read -r package; do
    case $package in "#"* | "") continue ;; esac
    "$python" -m pip install --quiet --disable-pip-version-check "$package" </dev/null || { echo "left out: $package" >&2; whole=; }
  done <"$requirements"
  [ -z "$whole" ] || cp "$requirements" "$work/venv/done"
fi
"$python" -c 'import numpy' || { echo "the judge needs numpy" >&2; exit 1; }

set -- --espalier "$target/release/espalier" --out "$work/results.jsonl" "$@"
for project in rust candle burn; do
  if [ $project = burn ] && [ -z "$BURN" ] && [ ! -x "$work/burn/release/peers-burn" ]; then
    echo "left out: benches/peers/burn, which takes minutes to build (BURN=1)" >&2
  elif CARGO_TARGET_DIR=$work/$project "$cargo" build --release --locked --manifest-path "benches/peers/$project/Cargo.toml"; then
    set -- "$@" --rust "$work/$project/release/peers-$project"
  else
    echo "left out: benches/peers/$project does not build here" >&2
  fi
done
for module in torch onnxruntime; do
  script=benches/peers/cpu/$(echo $module | sed 's/onnxruntime/onnx/')_peer.py
  if [ -e "$script" ] && "$python" -c "import $module" 2>/dev/null; then
    set -- "$@" --python "$script"
  else
    echo "left out: $module is not installed" >&2
  fi
done
"$python" benches/peers/cpu/compare.py $FRESH "$@" || exit 1
[ -z "$THREADS" ] || "$python" benches/peers/cpu/compare.py "$@" --threads "$THREADS" || exit 1
# A law that does not hold is said on the page.
"$target/release/espalier" kernels bench --growth --device cpu:1 --quiet --format json >"$work/growth.jsonl"
exec "$python" benches/peers/cpu/compare.py "$@" --device wgpu --growth "$work/growth.jsonl" --page docs/benchmarks.md
