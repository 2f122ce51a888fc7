#!/usr/bin/env bash
# Checks and measures everything on this machine's GPU; writes gpu-bench.json into the current folder. PYTHON names a python with torch,
# peft and transformers; arguments go to bench.py (`--help` lists them).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# Nothing is fetched.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3}" "$here/bench.py" --bundle "$here" "$@"
