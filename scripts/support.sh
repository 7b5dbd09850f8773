#!/bin/sh
# Renews docs/support.md from the kernel records, and the same table between README.md's markers.
set -eu
${CARGO:-cargo} run -q -- kernels list --format markdown > docs/support.md.new
mv docs/support.md.new docs/support.md
sh scripts/readme-table.sh
