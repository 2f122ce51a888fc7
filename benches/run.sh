#!/usr/bin/env bash
# Benchmark against PyTorch + transformers + PEFT; `make bench` builds and fetches first. PLEACH names the binary.
# RIVAL_PYTHON names a python that has benches/requirements.txt; without it they are installed once into .venv/rival
# (about 3 GB). BENCH names another script of this folder than compare.py; arguments go to it.
set -euo pipefail
cd "$(dirname "$0")/.."
pleach=${PLEACH:-target/release/pleach}
python=${RIVAL_PYTHON:-.venv/rival/bin/python}

if ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
    if [ -n "${RIVAL_PYTHON:-}" ]; then
        echo "bench: $RIVAL_PYTHON lacks the packages of benches/requirements.txt" >&2
        exit 1
    fi
    echo "bench: installing PyTorch, transformers and PEFT into .venv/rival" >&2
    python3 -m venv .venv/rival
    "$python" -m pip --disable-pip-version-check --quiet install -r benches/requirements.txt
fi
case " $* " in
*" --rival-only "* | *" --model "*) ;;
*) [ -f models/smollm2/blocks/model.safetensors ] || "$pleach" import models/smollm2.gguf --out models/smollm2 --overwrite ;;
esac
exec "$python" "benches/${BENCH:-compare.py}" --pleach "$pleach" "$@"
