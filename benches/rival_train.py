#!/usr/bin/env python3
"""One training run of PyTorch + PEFT on the CPU in a process of its own, so that its peak memory is its own.

    rival_train.py MODEL --rows rows.json --out OUT [--method lora|dora|rslora|full | --config FILE] [--dtype f32|bf16] [--compile] [--start DIR]
                   [--noise STD] [--steps N]

`--config` names a JSON file with `peft_type` and keys of PEFT's configuration of that type; `--noise` moves what is trained away from where it
starts, so that the first loss says something about the adapter.

Rows are lists of ids, all of one length; every optimizer step takes the next `--batch` of them, AdamW as PyTorch has it. Prints one
JSON object: losses, step times in milliseconds, peak resident bytes. Writes the start (`OUT/start`) unless given, and the
trained adapter (`OUT/end`).
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--rows", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--method", default="lora")
    p.add_argument("--config", type=Path)
    p.add_argument("--noise", type=float, default=0.0)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--dtype", default="f32")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--start", type=Path)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
    if a.method == "full":
        for name, w in model.named_parameters():
            w.requires_grad_(name.endswith("_proj.weight"))
    elif a.start:
        model = PeftModel.from_pretrained(model, a.start, is_trainable=True)
    else:
        if a.config:
            keys = json.loads(a.config.read_text())
            config = PEFT_TYPE_TO_CONFIG_MAPPING[keys.pop("peft_type")](task_type="CAUSAL_LM", **keys)
        else:
            config = LoraConfig(
                r=a.rank, lora_alpha=a.rank, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0,
                use_dora=a.method == "dora", use_rslora=a.method == "rslora",
            )
        model = get_peft_model(model, config)
        with torch.no_grad():
            for w in (w for w in model.parameters() if w.requires_grad and a.noise):
                w.add_(a.noise * torch.randn_like(w))
        model.save_pretrained(a.out / "start")
    model.train()
    run = torch.compile(model) if a.compile else model
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=0.0)
    rows = torch.tensor(json.loads(a.rows.read_text()))
    losses, times = [], []
    for step in range(a.steps):
        at = torch.arange(step * a.batch, (step + 1) * a.batch) % len(rows)
        start = time.perf_counter()
        ids = rows[at]
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append((time.perf_counter() - start) * 1e3)
    if a.method != "full":
        model.save_pretrained(a.out / "end")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(losses=losses, step_ms=times, peak_rss_bytes=peak, trained=sum(w.numel() for w in trained))))


if __name__ == "__main__":
    main()
