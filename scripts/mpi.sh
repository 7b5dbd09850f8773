#!/bin/sh
# Installs OpenMPI on Debian and Ubuntu when no MPI is installed, and libclang, which the bindings to it are made with.
set -eu
missing=""
command -v mpicc >/dev/null 2>&1 && command -v mpirun >/dev/null 2>&1 || missing="openmpi-bin libopenmpi-dev"
clang=""
for place in "${LIBCLANG_PATH:-/nonexistent}" /usr/lib/llvm*/lib /usr/lib/*-linux-gnu /usr/lib64 /usr/local/lib /opt/homebrew/opt/llvm/lib; do
  for file in "$place"/libclang.so* "$place"/libclang-[0-9]*.so* "$place"/libclang.dylib; do
    if [ -e "$file" ]; then
      clang="$file"
    fi
  done
done
[ -n "$clang" ] || missing="$missing libclang-dev"
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "missing for the feature mpi: $missing (an MPI with mpicc and mpirun, and libclang); install them" >&2
  exit 1
fi
run=""
[ "$(id -u)" = 0 ] || run="sudo"
echo "installing $missing"
$run apt-get update -qq
# shellcheck disable=SC2086
$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing
