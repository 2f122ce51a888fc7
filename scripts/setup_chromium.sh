#!/usr/bin/env bash
# Installs Debian's Chromium where no browser is found, for the tests of the page that `pleach inspect --html` writes. They drive
# it through its DevTools protocol, and skip visibly without it. PLEACH_CHROMIUM names another browser.
set -euo pipefail

for program in "${PLEACH_CHROMIUM:-}" chromium chromium-browser google-chrome; do
    [ -n "$program" ] && command -v "$program" >/dev/null && exit 0
done
command -v apt-get >/dev/null || { echo "setup: no Chromium, and no apt to install it with" >&2; exit 1; }
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: no Chromium; run as root: apt-get install chromium" >&2; exit 1; }
    as_root=(sudo)
fi
echo "setup: installing chromium"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" apt-get -qq install --yes --no-install-recommends chromium
