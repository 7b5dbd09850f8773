#!/bin/sh
# Installs Mesa's software Vulkan driver on Debian and Ubuntu when no Vulkan driver is installed.
set -eu
for folder in /usr/share/vulkan/icd.d /etc/vulkan/icd.d "${XDG_DATA_HOME:-$HOME/.local/share}/vulkan/icd.d"; do
  if ls "$folder"/*.json >/dev/null 2>&1; then
    exit 0
  fi
done
if [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "no Vulkan driver found; install one (for a software driver: Mesa's lavapipe)" >&2
  exit 1
fi
run=""
[ "$(id -u)" = 0 ] || run="sudo"
echo "installing the software Vulkan driver (mesa-vulkan-drivers, libvulkan1)"
$run apt-get update -qq
$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers libvulkan1
