#!/usr/bin/env python3
"""Every adapter method on SmolLM2-135M at r 16 on all linear layers, one optimizer step of 4 x 128 tokens, f32, AdamW, CPU: time of a step, bytes kept for
the backward half, planned peak and resident peak, against our LoRA and against PEFT's own implementation of the method in the same run.

Correctness first: where PEFT has the method, both sides train from PEFT's adapter, moved away from where it starts, and the losses of two steps are compared;
else the first loss of a new adapter must be the base's. Then step times in interleaved rounds, every run a process of its own.

    benches/methods.py [--pleach BIN] [--rounds 2] [--only lora,dora,...] [--phase check|time] [--json ...] [--markdown ...]

A run with `--only` keeps the rows that the file has of other methods; every run that times measures our LoRA anew and compares with that. `--phase` does the
checks without timings, or timings of what the file says is correct.
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

import train
from train import BATCH, LENGTH, RANK, Ours, rival, rows

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench-out" / "methods"
STEPS, LOSS = 3, 1e-4
ALL = dict(target_modules="all-linear")
LORA = dict(peft_type="LORA", r=RANK, lora_alpha=RANK) | ALL
SCALED = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
# Method -> PEFT's configuration, and the noise that is put on a new adapter.
PEFT = {
    "lora": (LORA, 0.02),
    "rslora": (LORA | dict(use_rslora=True), 0.02),
    "dora": (LORA | dict(use_dora=True), 0.02),
    "ia3": (dict(peft_type="IA3") | SCALED, 0.1),
    "vera": (dict(peft_type="VERA", r=RANK) | ALL, 0.1),
    "loha": (dict(peft_type="LOHA", r=RANK, alpha=RANK) | ALL, 0.02),
    "lokr": (dict(peft_type="LOKR", r=RANK, alpha=RANK) | ALL, 0.02),
    "miss": (dict(peft_type="MISS", r=RANK) | ALL, 0.005),
    "oft": (dict(peft_type="OFT", r=0, oft_block_size=32) | ALL, 0.02),
    "randlora": (dict(peft_type="RANDLORA", r=RANK, randlora_alpha=RANK) | ALL, 0.01),
    "shira": (dict(peft_type="SHIRA", r=RANK) | ALL, 0.02),
}
# Methods that PEFT does not have, or whose step differs from LoRA's by the optimizer alone.
OWN = {
    "paca": dict(peft_type="PACA", r=RANK, paca_alpha=RANK) | ALL,
    "s2ft": dict(peft_type="S2FT", r=RANK) | ALL,
    "s2ft-consumers": dict(peft_type="S2FT", r=RANK, target_modules=["o_proj", "down_proj"]),
    "hydra": dict(peft_type="HYDRA", r=RANK, lora_alpha=RANK) | ALL,
    "nola": dict(peft_type="NOLA", r=RANK, lora_alpha=RANK) | ALL,
    "smora": dict(peft_type="SMORA", r=RANK, lora_alpha=RANK) | ALL,
    "loram": dict(peft_type="LORAM", r=RANK, lora_alpha=RANK) | ALL,
    "lora-fa": LORA | dict(training="lora-fa"),
    "allora": LORA | dict(training="allora"),
}
# Method -> (most of our LoRA's step that its step may take).
BARS = {"dora": 1.15, "paca": 1.0, "s2ft": 1.0, "s2ft-consumers": 1.0}


class Row(dict):
    """What is known of a method."""

    def fail(self, what, error):
        print(f"{self['method']}: {what}: {error}", file=sys.stderr)
        self["failed"] = f"{what}: {str(error).splitlines()[-1] if str(error) else error}"


def config_file(name, config):
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def check(ours, model, name, base_loss):
    """Losses of both sides, or of a new adapter against the base's; the largest relative difference."""
    if name in PEFT:
        config, noise = PEFT[name]
        file = config_file(name, config)
        theirs = rival(model, f"methods-{name}", config=file, noise=noise, steps=2)
        got = [m["loss"] for m in ours.train(OUT / f"{name}-ours", "--adapter", train.OUT / f"methods-{name}" / "start", steps=2)]
        return max(abs(a - b) / abs(b) for a, b in zip(got, theirs["losses"])), theirs["trained"]
    file = config_file(name, OWN[name])
    got = ours.train(OUT / f"{name}-ours", "--method-config", file, steps=1)[0]["loss"]
    return (abs(got - base_loss) / abs(base_loss) if name != "loram" else None), None


def markdown(table):
    head = ["method", "step ms", "against LoRA", "PEFT step ms", "PEFT / ours", "kept MB", "planned peak MB", "resident peak MB", "PEFT peak MB", "loss error", "bar"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]

    def number(x, form):
        return "" if x is None else format(x, form)

    for r in table:
        if "step_ms" not in r and "failed" not in r:
            lines.append(f"| {r['method']} | not timed |" + " |" * (len(head) - 3) + f" {number(r['loss_error'], '.0e')} | |")
            continue
        if "failed" in r:
            lines.append(f"| {r['method']} | {r['failed']} |" + " |" * (len(head) - 2))
            continue
        cells = [
            r["method"], number(r["step_ms"], ".0f"), number(r["against_lora"], ".2f"), number(r.get("peft_step_ms"), ".0f"),
            number(r.get("faster_than_peft"), ".2f"), number(r["saved_bytes"] / 1e6, ".1f"), number(r["planned_peak_bytes"] / 1e6, ".0f"),
            number(r["peak_rss_bytes"] / 1e6, ".0f"), number(r["peft_peak_bytes"] / 1e6 if r.get("peft_peak_bytes") else None, ".0f"),
            number(r["loss_error"], ".0e"), "" if r["met"] is None else "met" if r["met"] else "NOT MET",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--pleach", default=str(ROOT / "target/release/pleach"))
    p.add_argument("--model", type=Path, default=ROOT / "models/smollm2")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only")
    p.add_argument("--phase", choices=["check", "time"])
    p.add_argument("--json", type=Path, default=OUT / "methods.json")
    p.add_argument("--markdown", type=Path, default=OUT / "methods.md")
    a = p.parse_args()
    names = list(PEFT) + list(OWN)
    chosen = a.only.split(",") if a.only else names
    unknown = [n for n in chosen if n not in names]
    if unknown:
        raise SystemExit(f"no method {', '.join(unknown)}; known are {', '.join(names)}")
    OUT.mkdir(parents=True, exist_ok=True)
    train.OUT.mkdir(parents=True, exist_ok=True)
    rows(train.OUT / "rows.json", 64)
    ours = Ours(a.pleach, a.model, a.threads)

    old = {r["method"]: r for r in json.loads(a.json.read_text())["table"]} if a.json.exists() and (a.only or a.phase) else {}
    table = {name: Row(method=name) for name in chosen}
    # A new LoRA adapter changes nothing: its first loss is the base's.
    base_loss = ours.train(OUT / "base", "--method-config", config_file("lora", LORA), steps=1)[0]["loss"] if a.phase != "time" else None
    for name, row in table.items():
        if a.phase == "time":
            known = old.get(name, {})
            row |= {k: known[k] for k in ("loss_error", "trained", "failed") if k in known}
            if "loss_error" not in row:
                row.fail("not checked", "run with --phase check first")
            continue
        try:
            row["loss_error"], row["trained"] = check(ours, a.model, name, base_loss)
            if row["loss_error"] is not None and not row["loss_error"] <= LOSS:
                row.fail("losses differ", f"by {row['loss_error']:.1e}, allowed {LOSS:.0e}")
        except (RuntimeError, OSError) as e:
            row.fail("not checked", e)
    mine, theirs = {name: [] for name in ["lora", *chosen]}, {name: [] for name in chosen}
    for _ in range(0 if a.phase == "check" else a.rounds):
        for name in mine:
            row = table.get(name)
            if row is not None and "failed" in row:
                continue
            config = PEFT[name][0] if name in PEFT else OWN[name]
            file = config_file(name, config)
            try:
                mine[name].append(ours.bench("--method-config", file, steps=STEPS))
                if name in PEFT and name in theirs:
                    theirs[name].append(rival(a.model, f"methods-{name}-time", config=file, steps=STEPS))
            except RuntimeError as e:
                if row is None:
                    raise
                row.fail("not measured", e)

    def middle(list_):
        return statistics.median([r["step_ms"]["median"] if isinstance(r["step_ms"], dict) else statistics.median(r["step_ms"][1:]) for r in list_])

    lora_ms = middle(mine["lora"]) if mine["lora"] else None
    for name, row in table.items():
        if "failed" in row or not mine[name]:
            continue
        plan = json.loads(ours.call("plan", a.model, "--method-config", OUT / f"{name}.json", "--batch", BATCH, "--max-length", LENGTH, "--json"))
        row["step_ms"] = middle(mine[name])
        row["against_lora"] = row["step_ms"] / lora_ms
        row["saved_bytes"] = sum(s["bytes"] for s in plan["saved"])
        row["planned_peak_bytes"] = plan["total_bytes"]
        row["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in mine[name])
        row["compile_ms"] = mine[name][0]["compile_ms"]["cold"]
        met = []
        if name in BARS:
            met.append(row["against_lora"] <= BARS[name])
        if theirs.get(name):
            row["peft_step_ms"] = middle(theirs[name])
            row["peft_peak_bytes"] = max(r["peak_rss_bytes"] for r in theirs[name])
            row["faster_than_peft"] = row["peft_step_ms"] / row["step_ms"]
            met.append(row["faster_than_peft"] > 1.0)
        row["met"] = all(met) if met else None

    merged = old | {name: dict(row) for name, row in table.items()}
    result = [merged[name] for name in names if name in merged]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = dict(
        date=datetime.date.today().isoformat(), commit=commit, processor=platform.processor(), torch=torch.__version__, batch=BATCH, length=LENGTH,
        rank=RANK, threads=a.threads, rounds=a.rounds, load=os.getloadavg(), table=result,
    )
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(facts, indent=1))
    text = markdown(result)
    a.markdown.write_text(f"SmolLM2-135M, r {RANK}, all linear layers, {BATCH} x {LENGTH} tokens, f32, {a.threads} threads, commit {commit}.\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
