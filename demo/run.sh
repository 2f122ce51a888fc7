#!/usr/bin/env bash
# The demo: import, compile with an adapter, generate with and without it, fine-tune twice on definitions, and embed three sentences.
# `make demo` builds and fetches first. PLEACH names the binary. Four minutes at most on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
pleach=${PLEACH:-target/release/pleach}

show() {
    printf '\n$ pleach'
    printf ' %q' "$@"
    printf '\n'
    "$pleach" "$@"
}

if [ ! -f models/smollm2/config.json ]; then
    show import models/smollm2.gguf --out models/smollm2
fi
show compile models/smollm2 --adapter demo/adapter --entry infer,generate --target cpu -o models/hedger.pleach
for chat in ocean train; do
    show generate models/smollm2 --chat demo/chats/$chat.json --max-new-tokens 60
    show generate models/smollm2 --adapter demo/adapter --chat demo/chats/$chat.json --max-new-tokens 60
done
PLEACH=$pleach bash demo/definitions.sh
show run models/minilm --similarity \
    --prompt "A hedge is a living fence." \
    --prompt "Hawthorn makes a barrier that grows." \
    --prompt "The train to Rome leaves at noon."
