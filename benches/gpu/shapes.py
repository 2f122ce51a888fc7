#!/usr/bin/env python3
"""Makes a model folder that has shapes and no values: a configuration, and a weights file of the right length that is one hole.

    shapes.py CONFIG.json LAYERS OUT

Enough to compile a plan, which never reads values. Needs no package.
"""

import json
import sys
from pathlib import Path


def tensors(c, layers):
    """Names and shapes of a Llama checkpoint."""
    d, ff, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim") or d // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    out = {"model.embed_tokens.weight": [v, d], "model.norm.weight": [d]}
    if not c.get("tie_word_embeddings"):
        out["lm_head.weight"] = [v, d]
    for i in range(layers):
        p = f"model.layers.{i}"
        out |= {f"{p}.{n}.weight": [d] for n in ("input_layernorm", "post_attention_layernorm")}
        out |= {f"{p}.self_attn.{n}_proj.weight": [o, d] for n, o in (("q", q), ("k", kv), ("v", kv))}
        out |= {f"{p}.self_attn.o_proj.weight": [d, q], f"{p}.mlp.down_proj.weight": [d, ff]}
        out |= {f"{p}.mlp.{n}_proj.weight": [ff, d] for n in ("gate", "up")}
    return out


def make(config, layers, out):
    c = json.loads(Path(config).read_text())
    layers = layers or c["num_hidden_layers"]
    c["num_hidden_layers"] = layers
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    header, end = {}, 0
    for name, shape in sorted(tensors(c, layers).items()):
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2]), sys.argv[3])
