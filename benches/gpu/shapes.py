#!/usr/bin/env python3
"""Makes a model folder that has shapes and no values: a configuration, and a weights file of the right length that is one hole.

    shapes.py CONFIG.json LAYERS OUT [--blocks]

Enough to compile a plan, which never reads values. With blocks the folder has the matrices as codes too, all of them zeros, and weights in f32,
as an import writes them. Needs no package.
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


# Bytes of a block of 32 values.
BLOCK = {"q8_0": 34, "q4_1": 20}


def block_format(name, shape):
    """How a weight is stored where weights are in blocks: both formats in one model, and norms as numbers."""
    if len(shape) < 2 or shape[1] % 32:
        return None
    return "q4_1" if ".mlp." in name else "q8_0"


def write(path, tensors, metadata=None):
    """A file of tensors (name -> type, bytes of an element, shape) whose values are one hole."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, size, shape) in sorted(tensors.items()):
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def make(config, layers, out, blocks=False):
    c = json.loads(Path(config).read_text())
    layers = layers or c["num_hidden_layers"]
    c["num_hidden_layers"] = layers
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    all_of_it = tensors(c, layers)
    write(out / "model.safetensors", {n: ("F32", 4, s) if blocks else ("BF16", 2, s) for n, s in all_of_it.items()})
    if blocks:
        formats = {n: block_format(n, s) for n, s in all_of_it.items() if block_format(n, s)}
        coded = {n: ("U8", 1, [all_of_it[n][0], all_of_it[n][1] // 32 * BLOCK[f]]) for n, f in formats.items()}
        write(out / "blocks/model.safetensors", coded, formats)


if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2]), sys.argv[3], "--blocks" in sys.argv)
