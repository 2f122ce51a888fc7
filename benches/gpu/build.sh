#!/usr/bin/env bash
# Builds the folder that is carried to a GPU machine: the runtime, plans, scripts. `make gpu-bundle` builds the binaries first.
#
#   build.sh OUT [--tiny]     PLEACH and MEASURE name the binaries; --tiny makes plans of a toy, for testing run.sh without a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 tiny=${2:-} python=${PYTHON:-python3}
pleach=${PLEACH:-target/release/pleach} measure=${MEASURE:-target/release/examples/measure}
limit=50000000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$out/plans/kernels"
cp "$measure" "$out/measure"
strip "$out/measure" 2>/dev/null || true
cp benches/gpu/{run.sh,bench.py,blocks.py,cases.py,checks.py,reference.py,shapes.py} "$out/"

targets="sm_80 sm_90a"
for name in $("$python" benches/gpu/cases.py "$work/kernels" $tiny); do
    for target in $targets; do
        "$pleach" compile "$work/kernels/$name.ir" --target "$target" -o "$out/plans/kernels/$name.$target.pleach" --quiet
    done
done

index=$work/index
: >"$index"
# Adapters of the first layer's attention alone: gradients flow through the whole model, and next to nothing is trained. What a step takes
# more with adapters everywhere is what they cost.
frozen='model\.layers\.0\.self_attn\.[qkv]_proj'
# family, configuration, layers, method or "frozen", rank, batch, length, target, check, time, seconds, order
plan() {
    local family=$1 config=$2 layers=$3 kind=$4 rank=$5 batch=$6 length=$7 target=$8 check=$9 timed=${10} seconds=${11} order=${12}
    local name=$family-$layers-$kind-r$rank file=$family-$layers-$kind-r$rank.$target.pleach model=$work/$family-$layers
    [ -d "$model" ] || "$python" benches/gpu/shapes.py "benches/gpu/configs/$config.json" "$layers" "$model"
    local alpha=$((2 * rank)) dtype=bf16 method=$kind modules=all-linear
    [ "$kind" = frozen ] && method=lora modules=$frozen
    "$pleach" compile "$model" --method "$method" --r "$rank" --alpha "$alpha" --target-modules "$modules" --entry train \
        --batch "$batch" --max-length "$length" --dtype "$dtype" --target "$target" -o "$out/plans/$file" --quiet --no-cache
    "$python" - "$model/config.json" >>"$index" <<END
import json, sys
print(json.dumps({
    "name": "$name", "file": "$file", "family": "$family-$method", "target": "$target", "method": "$method", "rank": $rank,
    "frozen": "$kind" == "frozen", "modules": r"$modules",
    "batch": $batch, "length": $length, "dtype": "$dtype", "check": $check, "time": $timed, "seconds": $seconds, "order": $order,
    "config": json.load(open(sys.argv[1])),
}))
END
}

inferring=$work/inferring
: >"$inferring"
# The model without adapters: prompts, and tokens one by one.
infer() {
    local family=$1 config=$2 layers=$3 length=$4 target=$5
    local name=$family-$layers-infer file=$family-$layers-infer.$target.pleach model=$work/$family-$layers
    "$pleach" compile "$model" --entry infer,generate --dtype bf16 --target "$target" -o "$out/plans/$file" --quiet --no-cache
    "$python" - "$model/config.json" >>"$inferring" <<END
import json, sys
print(json.dumps({
    "name": "$name", "file": "$file", "target": "$target", "length": $length, "dtype": "bf16", "config": json.load(open(sys.argv[1])),
}))
END
}

blocks=$work/blocks
: >"$blocks"
# The same graph over weights in blocks and over the same weights as numbers; method "none": prompts and tokens without adapters.
coded() {
    local family=$1 config=$2 layers=$3 method=$4 rank=$5 batch=$6 length=$7 target=$8 timed=$9
    local model=$work/$family-$layers-blocks name=$family-$layers-blocks-$method
    [ -d "$model" ] || "$python" benches/gpu/shapes.py "benches/gpu/configs/$config.json" "$layers" "$model" --blocks
    local asked=(--entry infer,generate)
    [ "$method" = none ] || asked=(--method "$method" --r "$rank" --alpha $((2 * rank)) --target-modules all-linear --entry train --batch "$batch" --max-length "$length")
    for kind in blocks numbers; do
        local flags=()
        [ $kind = blocks ] || flags=(--no-blocks)
        "$pleach" compile "$model" "${asked[@]}" "${flags[@]}" --dtype bf16 --target "$target" -o "$out/plans/$name-$kind.$target.pleach" --quiet --no-cache
    done
    "$python" - "$model/config.json" >>"$blocks" <<END
import json, sys
print(json.dumps({
    "name": "$name", "family": "$family-$layers", "target": "$target", "method": None if "$method" == "none" else "$method", "rank": $rank, "batch": $batch,
    "length": $length, "time": $timed, "files": {k: f"$name-{k}.$target.pleach" for k in ("blocks", "numbers")}, "config": json.load(open(sys.argv[1])),
}))
END
}

if [ -n "$tiny" ]; then
    for target in $targets; do
        coded tiny tiny 2 lora 4 2 12 $target True
        coded tiny tiny 2 none 0 2 12 $target True
        plan tiny tiny 2 lora 4 2 12 $target True True 5 1
        plan tiny tiny 2 paca 4 2 12 $target True True 5 2
        plan tiny tiny 2 frozen 4 2 12 $target False True 5 3
        infer tiny tiny 2 12 $target
    done
else
    for target in $targets; do
        order=1
        for kind in lora paca; do
            plan smollm2 smollm2-135m 2 $kind 16 4 512 $target True False 30 0
            plan llama3-8b llama-3-8b 1 $kind 16 4 2048 $target True True 25 $((order++))
        done
        # What matters most first: the time may end before the list does.
        for kind in lora frozen paca; do
            plan llama3-8b llama-3-8b 32 $kind 16 4 2048 $target False True 60 $((order++))
        done
        for kind in lora frozen paca; do
            plan llama3-8b llama-3-8b 4 $kind 16 4 2048 $target False True 30 $((order++))
        done
        for kind in lora paca; do
            plan smollm2 smollm2-135m 30 $kind 16 4 512 $target False True 30 $((order++))
        done
        infer smollm2 smollm2-135m 2 512 $target
        coded smollm2 smollm2-135m 30 lora 16 4 512 $target True
        coded smollm2 smollm2-135m 30 none 0 4 512 $target True
    done
fi

# A plan with every form of every kernel: what is fastest on the machine goes back into a plan by `pleach tune --times`.
forms() {
    local name=$1 config=$2 layers=$3 rank=$4 batch=$5 length=$6 target=$7
    local model=$work/$name-$layers
    [ -d "$model" ] || "$python" benches/gpu/shapes.py "benches/gpu/configs/$config.json" "$layers" "$model"
    "$pleach" tune "$model" --method lora --r "$rank" --alpha $((2 * rank)) --target-modules all-linear --entry train --batch "$batch" \
        --max-length "$length" --dtype bf16 --target "$target" --forms-only -o "$out/plans/forms.$target.pleach" --quiet
}
if [ -n "$tiny" ]; then for target in $targets; do forms tiny tiny 2 4 2 12 $target; done; else forms llama3-8b llama-3-8b 1 16 4 2048 sm_90a; fi

# Plans are text for the most part.
find "$out/plans" -name '*.pleach' -exec gzip -9 -n {} +

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
"$python" - "$index" "$inferring" "$blocks" "$out/plans/index.json" "$commit" "$tiny" <<'END'
import json, sys
plans, infer, blocks = ([json.loads(line) for line in open(p)] for p in sys.argv[1:4])
facts = {"commit": sys.argv[5], "tiny": bool(sys.argv[6]), "plans": plans, "infer": infer, "blocks": blocks}
json.dump(facts, open(sys.argv[4], "w"), indent=1)
END
bytes=$(du -sb "$out" | cut -f1)
echo "$out: $bytes bytes, $(ls "$out"/plans/*.pleach.gz | wc -l) plans, $(ls "$out"/plans/kernels | wc -l) kernel plans"
[ "$bytes" -le $limit ] || { echo "the bundle may have $limit bytes at most" >&2; exit 1; }
