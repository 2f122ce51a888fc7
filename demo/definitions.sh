#!/usr/bin/env bash
# A real fine-tune: SmolLM2-135M learns to define words, in bf16, once with PaCA and once with LoRA at as many trained values (2.5
# million), 40 steps of 16 rows each. Prints losses, the loss on 200 words that were held out, time and memory of both, and one
# definition before and after. PLEACH names the binary; models/smollm2 must be there.
set -euo pipefail
cd "$(dirname "$0")/.."
pleach=${PLEACH:-target/release/pleach}
data=models/definitions
out=models/definitions/runs
python=${PYTHON:-python3}

"$python" scripts/make_definitions.py
prompt=$(head -n 1 $data/heldout.jsonl | "$python" -c 'import json, sys; print(json.loads(sys.stdin.readline())["prompt"])')
truth=$(head -n 1 $data/heldout.jsonl | "$python" -c 'import json, sys; print(json.loads(sys.stdin.readline())["completion"])')

train() {
    local name=$1
    shift
    local command=(train models/smollm2 "$@" --target-modules all-linear --data $data/train.jsonl --eval $data/heldout.jsonl
        --max-steps 40 --batch 16 --max-length 48 --dtype bf16 --schedule cosine --warmup 4 --max-grad-norm 1 --out $out/"$name" --overwrite)
    printf '\n$ pleach'
    printf ' %q' "${command[@]}"
    printf '\n'
    "$pleach" "${command[@]}"
}

train paca --method paca --r 16 --paca-alpha 32 --lr 1e-3
train lora --method lora --r 8 --lora-alpha 16 --lr 1e-3

"$python" demo/summary.py $out/paca $out/lora

say() {
    "$pleach" generate models/smollm2 --prompt "$prompt" --max-new-tokens 24 --quiet "$@" | tr '\n' ' '
    printf '\n'
}
printf '\n%s\n' "$prompt"
printf '  WordNet        %s\n' "$truth"
printf '  before         ' && say
printf '  after, PaCA    ' && say --adapter $out/paca
printf '  after, LoRA    ' && say --adapter $out/lora
