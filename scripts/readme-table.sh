#!/bin/sh
# Puts the table of docs/support.md between README.md's markers.
set -eu
awk '
  /<!-- support table -->/ { print; while ((getline line < "docs/support.md") > 0) if (line ~ /^\|/) print line; skip = 1; next }
  /<!-- end of support table -->/ { skip = 0 }
  !skip { print }
' README.md > README.md.new
mv README.md.new README.md
