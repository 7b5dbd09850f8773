#!/bin/sh
# Runs everything that needs a GPU, from a bundle that scripts/gpu_bundle.sh packed, and writes each result as it comes:
# a step that fails or runs out of time takes no other with it, and a run that is cut short keeps what it has.
#
#   sh run.sh [-o RESULTS] [STEP...]
#
# Steps, in the order in which they run without any named:
#   environment  driver, clocks, libraries, `espalier doctor`, register table of every kernel
#   ceilings     what this GPU reaches on copies and on multiply-adds, and what a launch costs
#   verify       every kernel against its f64 reference
#   gradients    every gradient
#   wgpu         both on the WGSL kernels, where a Vulkan loader and driver are found
#   sanitizer    memcheck and racecheck on small shapes, where compute-sanitizer is found
#   quick        the quick recipe, whole, with captured steps and without
#   table        the table's sizes, timed
#   rounds       ROUNDS times (3): large sizes timed (bench), then the same with PyTorch and what is built on it (peers)
#   report       report.md: both sides, ratios
# `bench` and `peers` may be named alone: one round each.
#
# ESPALIER_NVRTC names a folder with NVRTC's libraries where neither the bundle's nor PyTorch's own is wanted. LIMIT is
# the most seconds for any one step (600). OPS limits bench and peers to ops that fit the pattern (*). DEVICE=cpu, without
# a GPU, goes through the motions.
set -u
here=$(cd "$(dirname "$0")" && pwd)
results=$here/results
if [ "${1:-}" = -o ]; then
  mkdir -p "$2" || exit 1
  results=$(cd "$2" && pwd)
  shift 2
fi
limit=${LIMIT:-600}
rounds=${ROUNDS:-3}
ops=${OPS:-*}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
peer_device=cpu
[ "$device" != cuda ] || peer_device=cuda
work=${WORK:-$here/work}
# Without these nothing below can be written or run.
mkdir -p "$results" "$work" || exit 1
cd "$here" || exit 1
export ESPALIER_CACHE="$work/cache"
[ -x ./espalier ] || chmod +x ./espalier || exit 1

note() {
  echo "$(date -u +%H:%M:%S) $*" | tee -a "$results/steps.log" >&2
}

# run FILE COMMAND...: standard output to FILE, errors beside it; its exit status is noted, and returned.
run() {
  output=$1
  shift
  begin=$(date +%s)
  timeout -k 10 "$limit" "$@" > "$results/$output" 2> "$results/$output.err"
  status=$?
  [ -s "$results/$output.err" ] || rm -f "$results/$output.err"
  case $status in
    0) note "$output: done in $(($(date +%s) - begin)) s" ;;
    124 | 137) note "$output: stopped after $(($(date +%s) - begin)) s" ;;
    *) note "$output: exit status $status after $(($(date +%s) - begin)) s" ;;
  esac
  return $status
}

# Folders that may hold NVRTC: the one that was asked for, the bundle's, those of Python's NVIDIA packages, the toolkit's.
candidates() {
  [ -z "${ESPALIER_NVRTC:-}" ] || echo "$ESPALIER_NVRTC"
  if [ -e nvrtc.tar.xz ] && [ ! -d "$work/nvrtc-bundle" ]; then
    mkdir -p "$work/nvrtc.part"
    if tar -xJf nvrtc.tar.xz -C "$work/nvrtc.part" 2>/dev/null ||
      "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' nvrtc.tar.xz "$work/nvrtc.part"; then
      mv "$work/nvrtc.part" "$work/nvrtc-bundle"
    else
      echo "nvrtc.tar.xz could not be unpacked" >&2
    fi
  fi
  [ ! -d "$work/nvrtc-bundle" ] || echo "$work/nvrtc-bundle"
  "$python" - <<'PYTHON'
import glob, os, sys
for folder in sys.path:
    for found in sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libnvrtc.so.*"))):
        print(os.path.dirname(found))
PYTHON
  compiler=$(command -v nvcc 2>/dev/null) && echo "$(dirname "$(readlink -f "$compiler")")/../lib64"
}

# Sets ESPALIER_NVRTC to the first folder with which the GPU opens. The libraries alone are linked into a folder of
# their own: a toolkit's holds static ones under like names, which cannot be loaded.
find_nvrtc() {
  # Without a GPU it is enough that the compiler answers.
  wanted='"id":"cuda:'
  [ "$device" = cuda ] || wanted='"nvrtc":{"Ok"'
  candidates 2>> "$results/nvrtc.log" > "$work/candidates"
  number=0
  while IFS= read -r folder; do
    number=$((number + 1))
    linked=$work/nvrtc.$number
    rm -rf "$linked"
    mkdir -p "$linked"
    for library in "$folder"/libnvrtc.so.* "$folder"/libnvrtc-builtins.so.*; do
      case $library in *.alt.*) continue ;; esac
      [ ! -e "$library" ] || ln -sf "$library" "$linked/"
    done
    if ESPALIER_NVRTC=$linked timeout 120 ./espalier doctor --format json 2>> "$results/nvrtc.log" |
      tee "$work/doctor.json" | grep -q "$wanted"; then
      export ESPALIER_NVRTC="$linked"
      echo "$folder" > "$results/nvrtc"
      note "NVRTC of $folder"
      return 0
    fi
    echo "$folder does not open the GPU: $(grep -o '"unavailable":\[[^]]*\]' "$work/doctor.json")" >> "$results/nvrtc.log"
  done < "$work/candidates"
  note "no NVRTC opens the GPU; see nvrtc.log"
  return 1
}

environment() {
  run environment.txt sh -c '
    date -u; cat VERSION; uname -a; ldd --version | head -n 1; ldd ./espalier
    nvidia-smi; nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,MEMORY,ECC
    nproc; free -g; nvcc --version; compute-sanitizer --version'
  run gpu.csv nvidia-smi --format=csv \
    --query-gpu=name,driver_version,vbios_version,compute_cap,memory.total,power.limit,clocks.max.sm,clocks.max.memory
  run libraries.json "$python" - <<'PYTHON'
import importlib.metadata, json, platform, sys
names = ["torch", "triton", "liger_kernel", "numpy", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-cuda-nvrtc"]
found = {"python": sys.version.split()[0], "system": platform.platform()}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
PYTHON
  run doctor.json ./espalier doctor --format json
  run cuda-check.json ./espalier kernels cuda-check --arch "$(architecture)" --format json
}

# Compute capability times 10.
architecture() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | grep . || echo 90
}

ceilings() {
  for op in multiply_add_chain scale accumulate_scaled; do
    run "ceiling-$op.jsonl" ./espalier kernels bench --device "$device" --sizes gpu --op "$op" --quiet --format json
  done
  run overhead.json ./espalier kernels bench --device "$device" --overhead --format json
}

# verified NAME DEVICE [--grad]: in one go; where a kernel takes the device down with it, op by op, each in a process of
# its own, so that the others are seen.
verified() {
  name=$1 on=$2
  shift 2
  run "$name.json" ./espalier kernels verify --device "$on" --quiet --format json "$@" && return
  if grep -q 'context is dead\|E-DEVICE-LOST\|device was lost' "$results/$name.json" "$results/$name.json.err" 2>/dev/null; then
    note "$name: again, op by op"
    begin=$(date +%s)
    : > "$results/$name-by-op.jsonl"
    ./espalier kernels list --format json | tr '{' '\n' | sed -n 's/.*"op":"\([a-z0-9_]*\)".*/\1/p' |
      while IFS= read -r op; do
        [ $(($(date +%s) - begin)) -lt "$limit" ] || break
        timeout -k 10 120 ./espalier kernels verify --device "$on" --op "$op" --quiet --format json "$@" \
          >> "$results/$name-by-op.jsonl" 2>> "$results/$name-by-op.err" </dev/null
        status=$?
        # 2 says that the op has no such case.
        [ $status -le 2 ] || echo "{\"op\":\"$op\",\"exit\":$status}" >> "$results/$name-by-op.jsonl"
      done
  fi
}

wgpu() {
  if ! ldconfig -p 2>/dev/null | grep -q libvulkan.so.1; then
    # The loader that the bundle brings; it finds the driver by the files below.
    if [ -e vulkan/libvulkan.so.1 ]; then
      export LD_LIBRARY_PATH="$here/vulkan${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    else
      note "wgpu: no Vulkan loader"
      return
    fi
  fi
  if [ -z "${VK_DRIVER_FILES:-}" ]; then
    found=$(find /usr /etc -name 'nvidia_icd*.json' -path '*vulkan*' 2>/dev/null | head -n 1)
    [ -z "$found" ] || export VK_DRIVER_FILES="$found"
  fi
  verified verify-wgpu wgpu
  verified gradients-wgpu wgpu --grad
}

sanitizer() {
  tool=$(command -v compute-sanitizer || ls "$(dirname "$(readlink -f "$(command -v nvcc)")")/compute-sanitizer" 2>/dev/null)
  if [ -z "$tool" ]; then
    note "sanitizer: compute-sanitizer is not here"
    return
  fi
  # One process for each family: the first error may end it.
  for kind in memcheck racecheck; do
    begin=$(date +%s)
    for pattern in 'matmul*' 'grouped*' 'moe*' 'ffn*' 'attention*' '*norm*' '*softmax*' 'cross*' 'linear*' 'hidden*' 'kl*' \
      'cosine*' '*24*' '*int4' '*quant*' 'adamw' 'sgd' 'embed*' 'rope*' 'permute' 'gather*' 'scatter*' 'sum*' 'argmax'; do
      [ $(($(date +%s) - begin)) -lt "$limit" ] || break
      echo "== $kind $pattern" >> "$results/sanitizer-$kind.txt"
      timeout -k 10 90 "$tool" --tool "$kind" --error-exitcode 9 --print-limit 5 \
        ./espalier kernels verify --device "$device" --op "$pattern" --largest 5000 --jobs 4 --quiet --format json \
        >> "$results/sanitizer-$kind.txt" 2>&1 </dev/null
      echo "== exit status $?" >> "$results/sanitizer-$kind.txt"
    done
    note "sanitizer-$kind.txt: $(grep -c '== exit status 0' "$results/sanitizer-$kind.txt") of $(grep -c "== $kind" "$results/sanitizer-$kind.txt") without a finding"
  done
}

quick() {
  run quick.json ./espalier run recipes/quick.toml --device "$device" --out "$work/quick" --overwrite --quiet --format json
  for file in report.md report.json; do
    [ ! -e "$work/quick/$file" ] || cp "$work/quick/$file" "$results/quick-$file"
  done
  # Once more with every step queued launch by launch: the same bits, and in the metrics what replaying saves.
  run queued.json env ESPALIER_GRAPHS=0 ./espalier run recipes/quick.toml --device "$device" --out "$work/queued" \
    --overwrite --quiet --format json
  cmp -s "$work/quick/model/model.safetensors" "$work/queued/model/model.safetensors" &&
    note "quick: replayed steps and queued ones give the same model" ||
    note "quick: replayed steps and queued ones DIFFER"
}

# Clocks and power while timing, once a second.
watched() {
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader -l 1 \
    >> "$results/clocks.csv" 2>/dev/null &
  watcher=$!
  "$@"
  watched_status=$?
  kill "$watcher" 2>/dev/null
  return $watched_status
}

table() {
  watched run "table-$device.jsonl" ./espalier kernels bench --device "$device" --rungs --seconds 0.2 --quiet --format json
}

# The number of the next round of a kind.
next() {
  number=1
  while [ -e "$results/$1.$number.jsonl" ]; do
    number=$((number + 1))
  done
  echo "$number"
}

bench() {
  file=bench-$device.$(next "bench-$device").jsonl
  begin=$(date +%s)
  : > "$results/$file"
  # A kernel that takes the device down ends the process: the next one goes on behind its case.
  for attempt in 1 2 3 4 5 6 7 8; do
    left=$((limit - $(date +%s) + begin))
    [ "$left" -gt 5 ] || break
    watched timeout -k 10 "$left" ./espalier kernels bench --device "$device" --sizes gpu --op "$ops" --seconds 0.3 --quiet \
      --format json --skip "$(wc -l < "$results/$file")" >> "$results/$file" 2>> "$results/$file.err"
    grep -q 'E-DEVICE-LOST' "$results/$file.err" || break
    note "$file: attempt $attempt lost the device after $(wc -l < "$results/$file") cases"
    mv "$results/$file.err" "$results/$file.$attempt.err"
  done
  note "$file: $(wc -l < "$results/$file") cases in $(($(date +%s) - begin)) s"
}

# Packages that the machine lacks come from the bundle; what it has stays as it is.
packages() {
  [ -d wheels ] || return
  [ -d "$work/site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" wheels/*.whl \
    2>> "$results/packages.err" || rm -rf "$work/site"
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
}

peers() {
  packages
  [ -s "$results/cases.jsonl" ] || run cases.jsonl ./espalier kernels bench --sizes gpu --list --format json
  round_number=$(next peers)
  file=peers.$round_number.jsonl
  export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
  begin=$(date +%s)
  # The program itself takes no new case shortly before it would be stopped; each round begins elsewhere in the list.
  start=$(awk "BEGIN { print ($round_number - 1) % $rounds / $rounds }")
  watched timeout -k 10 "$limit" "$python" peers/run.py --cases "$results/cases.jsonl" --out "$results/$file" \
    --device "$peer_device" --op "$ops" --start "$start" --limit-seconds "$((limit - 30))" 2> "$results/$file.err"
  note "$file: $(wc -l < "$results/$file") records in $(($(date +%s) - begin)) s"
}

in_rounds() {
  round=0
  while [ "$round" -lt "$rounds" ]; do
    round=$((round + 1))
    bench
    peers
  done
}

report() {
  [ -s "$results/cases.jsonl" ] || run cases.jsonl ./espalier kernels bench --sizes gpu --list --format json
  run report.md "$python" peers/join.py "$results"
}

[ $# -gt 0 ] || set -- environment ceilings verify gradients wgpu sanitizer quick table rounds report
find_nvrtc
for step in "$@"; do
  note "step $step"
  case $step in
    environment | ceilings | wgpu | sanitizer | quick | table | bench | peers | report) "$step" ;;
    verify) verified "verify-$device" "$device" ;;
    gradients) verified "gradients-$device" "$device" --grad ;;
    rounds) in_rounds ;;
    *) note "$step is no step" ;;
  esac
done
tar -cJf "$here/results.tar.xz" -C "$(dirname "$results")" "$(basename "$results")" 2>/dev/null && note "results.tar.xz"
exit 0
