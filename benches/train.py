#!/usr/bin/env python3
"""Training, pleach against PyTorch + PEFT, SmolLM2-135M, one optimizer step of 4 x 128 tokens, AdamW, CPU, in one run.

Correctness first: both sides train the same rows from the same adapter; losses, and how far the trained adapters are apart, are
printed beside the bars. Then step times in interleaved rounds (every run a process of its own, so peak memory is its own).

    benches/train.py [--pleach BIN] [--rounds 3] [--only lora,paca,bf16,...] [--json bench-out/train.json]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from compare import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench-out" / "train"
BATCH, LENGTH, RANK = 4, 128, 16


def rows(path, count):
    """Rows of ids that can be learned: counting sequences with a stride, in the tokens that are words."""
    g = torch.Generator().manual_seed(11)
    start = torch.randint(1000, 20000, (count, 1), generator=g)
    stride = torch.randint(1, 7, (count, 1), generator=g)
    ids = start + stride * torch.arange(LENGTH)
    path.write_text(json.dumps(ids.tolist()))
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in ids.tolist()))


def rival(model, name, **options):
    command = [sys.executable, str(ROOT / "benches/rival_train.py"), str(model), "--rows", str(OUT / "rows.json"), "--out", str(OUT / name)]
    for key, value in options.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


class Ours:
    def __init__(self, binary, model, threads):
        self.binary, self.model, self.threads = binary, model, threads

    def call(self, *arguments):
        command = [self.binary, *map(str, arguments), "--threads", str(self.threads), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
        return done.stdout

    def train(self, out, *options, steps=4):
        self.call("train", self.model, "--data", OUT / "rows.jsonl", "--out", out, "--overwrite", "--no-shuffle", "--batch", BATCH, "--max-length", LENGTH,
                  "--max-steps", steps, "--lr", 2e-4, "--schedule", "constant", *options)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def bench(self, *options, steps=4):
        return json.loads(self.call("bench", "train", self.model, "--batch", BATCH, "--max-length", LENGTH, "--steps", steps, "--json", *options))


def adapter(folder):
    return {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}


def change(end, start, reference):
    """|ours - reference| / |reference - start|, over all tensors."""
    top = sum(((end[k] - reference[k]) ** 2).sum() for k in reference)
    low = sum(((reference[k] - start[k]) ** 2).sum() for k in reference)
    return float((top / low).sqrt())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--pleach", default=str(ROOT / "target/release/pleach"))
    p.add_argument("--model", type=Path, default=ROOT / "models/smollm2")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only", default="correct,lora,compile,bf16,paca,dora,full,budget")
    p.add_argument("--json", type=Path, default=OUT / "train.json")
    a = p.parse_args()
    only = set(a.only.split(","))
    OUT.mkdir(parents=True, exist_ok=True)
    rows(OUT / "rows.json", 64)
    ours = Ours(a.pleach, a.model, a.threads)
    linear = ["--r", RANK, "--target-modules", "all-linear"]
    table = Table()

    # the adapter everybody starts from
    reference = rival(a.model, "f32", steps=4)
    start, end = OUT / "f32/start", adapter(OUT / "f32/end")
    if "correct" in only:
        got = ours.train(OUT / "ours-f32", "--adapter", start)
        error = max(abs(g["loss"] - w) / abs(w) for g, w in zip(got, reference["losses"]))
        table.add("LoRA f32, losses of 4 steps", error, None, None, "<= 1e-4", error <= 1e-4)
        moved = change(adapter(OUT / "ours-f32"), adapter(start), end)
        table.add("LoRA f32, adapter change", moved, None, None, "<= 1e-2", moved <= 1e-2)
        low = rival(a.model, "bf16-start", start=start, dtype="bf16", steps=4)
        theirs = change(adapter(OUT / "bf16-start/end"), adapter(start), end)
        got = ours.train(OUT / "ours-bf16", "--adapter", start, "--dtype", "bf16")
        mine = change(adapter(OUT / "ours-bf16"), adapter(start), end)
        table.add("LoRA bf16, adapter change against f32", mine, theirs, mine / theirs, "<= 1.25", mine <= 1.25 * theirs)
        mine = statistics.mean(abs(g["loss"] - w) / abs(w) for g, w in zip(got, reference["losses"]))
        theirs = statistics.mean(abs(g - w) / abs(w) for g, w in zip(low["losses"], reference["losses"]))
        table.add("LoRA bf16, mean loss error against f32", mine, theirs, mine / theirs, "<= 1.25", mine <= 1.25 * theirs)
        table.show()

    runs = {}  # name -> (ours?, call)
    if "lora" in only:
        runs["PEFT LoRA f32"] = lambda: rival(a.model, "t", start=start, steps=4)
        runs["LoRA f32"] = lambda: ours.bench("--method", "lora", *linear)
    if "compile" in only:
        runs["PEFT LoRA f32, torch.compile"] = lambda: rival(a.model, "t", start=start, steps=5, compile=True)
    if "bf16" in only:
        runs["PEFT LoRA bf16"] = lambda: rival(a.model, "t", start=start, steps=4, dtype="bf16")
        runs["LoRA bf16"] = lambda: ours.bench("--method", "lora", *linear, "--dtype", "bf16")
    if "paca" in only:
        runs["PaCA f32"] = lambda: ours.bench("--method", "paca", *linear)
        if "bf16" in only:
            runs["PaCA bf16"] = lambda: ours.bench("--method", "paca", *linear, "--dtype", "bf16")
    if "dora" in only:
        runs["PEFT DoRA f32"] = lambda: rival(a.model, "t", method="dora", steps=3)
        runs["DoRA f32"] = lambda: ours.bench("--method", "dora", *linear)
    if "full" in only:
        runs["full f32, eager"] = lambda: rival(a.model, "t", method="full", steps=3)
        runs["full f32"] = lambda: ours.bench("--method", "full", "--target-modules", "all-linear")
    seen = {name: [] for name in runs}
    for _ in range(a.rounds):
        for name, run in runs.items():
            try:
                seen[name].append(run())
            except RuntimeError as e:
                print(f"{name}: {e}", file=sys.stderr)
    step, peak = {}, {}
    for name, list_ in seen.items():
        if not list_:
            continue
        times = [t for r in list_ for t in ([r["step_ms"]["median"]] if isinstance(r["step_ms"], dict) else r["step_ms"][1:])]
        step[name], peak[name] = statistics.median(times), max(r["peak_rss_bytes"] for r in list_)

    def versus(what, mine, theirs, bar):
        if mine in step and theirs in step:
            ratio = step[theirs] / step[mine]
            table.add(what, step[mine], step[theirs], ratio, f">= {bar}", ratio >= bar)

    versus("LoRA step f32, ms", "LoRA f32", "PEFT LoRA f32", 1.5)
    versus("LoRA step f32 against torch.compile, ms", "LoRA f32", "PEFT LoRA f32, torch.compile", 1.4)
    versus("LoRA step bf16, ms", "LoRA bf16", "PEFT LoRA bf16", 2.0)
    versus("PaCA step f32 against our LoRA, ms", "PaCA f32", "LoRA f32", 1.0)
    versus("PaCA step bf16 against our LoRA, ms", "PaCA bf16", "LoRA bf16", 1.0)
    versus("DoRA step f32, ms", "DoRA f32", "PEFT DoRA f32", 1.0)
    versus("full step f32, ms", "full f32", "full f32, eager", 1.0)
    for mine, theirs in (("LoRA f32", "PEFT LoRA f32"), ("LoRA bf16", "PEFT LoRA bf16"), ("DoRA f32", "PEFT DoRA f32"), ("full f32", "full f32, eager")):
        if mine in peak and theirs in peak:
            ratio = peak[mine] / peak[theirs]
            table.add(f"{mine}: peak RSS, MB", peak[mine] / 1e6, peak[theirs] / 1e6, ratio, "<= 0.5", ratio <= 0.5)
    if "budget" in only and "PEFT LoRA bf16" in peak:
        budget = int(0.385 * peak["PEFT LoRA bf16"])
        small = ours.bench("--method", "lora", *linear, "--dtype", "bf16", "--budget", f"{budget}B")
        ratio = small["peak_rss_bytes"] / peak["PEFT LoRA bf16"]
        table.add("LoRA bf16 with a budget: peak RSS, MB", small["peak_rss_bytes"] / 1e6, peak["PEFT LoRA bf16"] / 1e6, ratio, "<= 0.4", ratio <= 0.4)
        slower = small["step_ms"]["median"] / step["LoRA bf16"]
        table.add("LoRA bf16 with a budget: step, ms", small["step_ms"]["median"], step["LoRA bf16"], slower, "<= 1.2", slower <= 1.2)
    if seen.get("LoRA f32"):
        c = seen["LoRA f32"][-1]["compile_ms"]
        table.add("compile, cold / cached, ms", c["cold"], c["cached"], None, "<= 4000 / 150", c["cold"] <= 4000 and c["cached"] <= 150)
    table.show()
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = dict(
        date=datetime.date.today().isoformat(), commit=commit, processor=platform.processor(), torch=torch.__version__, batch=BATCH, length=LENGTH, rank=RANK,
        load=os.getloadavg(), table=table.rows, step_ms=step, peak_rss_bytes=peak, runs=seen,
    )
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
