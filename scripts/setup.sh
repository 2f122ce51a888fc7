#!/usr/bin/env bash
# Installs what building pleach needs and is missing: LLVM and MLIR 22 and a C compiler, from Debian's packages.
# Says nothing and changes nothing when everything is there. LLVM elsewhere: set MLIR_SYS_220_PREFIX to its prefix.
set -euo pipefail

packages=(
    build-essential python3-venv zlib1g-dev libzstd-dev
    llvm-22 llvm-22-dev libmlir-22-dev mlir-22-tools libpolly-22-dev libclang-22-dev
)

stop() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

command -v cargo >/dev/null ||
    stop "cargo was not found. pleach needs Rust 1.95 or newer: https://rustup.rs"

if [ -n "${MLIR_SYS_220_PREFIX:-}" ] && [ -x "$MLIR_SYS_220_PREFIX/bin/llvm-config" ]; then
    exit 0
fi

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    [ -x /usr/lib/llvm-22/bin/llvm-config ] && exit 0
    stop "this system has no apt. Install LLVM and MLIR 22 with headers (and python3, a C compiler, zlib, zstd)" \
        "and set MLIR_SYS_220_PREFIX and TABLEGEN_220_PREFIX to the prefix that has bin/llvm-config."
fi

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || stop "missing packages, and neither root nor sudo. Run as root: apt-get install ${missing[*]}"
    as_root=(sudo)
fi

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get -qq update || stop "apt-get update failed: is the package mirror reachable?"
"${as_root[@]}" apt-get -qq install --yes --no-install-recommends "${missing[@]}" ||
    stop "apt-get could not install: ${missing[*]}" \
        "LLVM 22 is in the archives of Debian 12 (security) and newer; elsewhere use the archive of the LLVM project."
