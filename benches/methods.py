#!/usr/bin/env python3
"""Every adapter method on SmolLM2-135M at r 16 on all linear layers, one optimizer step of 4 x 128 tokens, f32, AdamW, CPU: time of a step, bytes kept for
the backward half, planned peak and resident peak, against our LoRA and against PEFT's own implementation of the method in the same run.

Correctness first: where PEFT has the method, both sides train from PEFT's adapter, moved away from where it starts, and the losses of two steps are compared;
else the first loss of a new adapter must be the base's. Then step times in interleaved rounds, every run a process of its own.

    benches/methods.py [--pleach BIN] [--rounds 2] [--only lora,dora,...] [--phase check|time|prepare] [--json ...] [--markdown ...]

A run with `--only` keeps the rows that the file has of other methods; every run that times measures our LoRA anew and compares with that. `--phase` does the
checks alone, the steps' times of what the file says is correct, or the times that first values take which are prepared from weights or data.
"""

import argparse
import datetime
import json
import os
import platform
import re
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
    # Ranks are given away from step 100 on: not in what is timed, on both sides.
    "adalora": (dict(peft_type="ADALORA", init_r=RANK, target_r=RANK // 2, lora_alpha=RANK, tinit=100, tfinal=100, total_step=1000) | ALL, 0.02),
}
# Methods that PEFT does not have, whose step is LoRA's with other first values, or whose step differs by the optimizer alone.
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
    "lora-plus": LORA | dict(training="lora-plus"),
    "dylora": LORA | dict(training="dylora"),
    "galore": dict(peft_type="FULL", training="galore", r=RANK) | ALL,
    "fira": dict(peft_type="FULL", training="fira", r=RANK) | ALL,
    "lt-sft": dict(peft_type="LT_SFT", ft_params_proportion=0.02, full_ft_steps=2) | ALL,
    "sora": dict(peft_type="SORA", r=RANK, lora_alpha=RANK) | ALL,
    "codyra": dict(peft_type="CODYRA", r=RANK) | ALL,
    "s2-lora": dict(peft_type="S2_LORA", r=RANK, lora_alpha=RANK) | ALL,
    "increlora": dict(peft_type="INCRELORA", r=RANK, lora_alpha=RANK) | ALL,
    "triadaptlora": dict(peft_type="TRIADAPTLORA", r=RANK, lora_alpha=RANK) | ALL,
    "kasa": LORA | dict(kasa_config={}),
    "pissa": LORA | dict(init_lora_weights="pissa"),
    "olora": LORA | dict(init_lora_weights="olora"),
    "loldu": dict(peft_type="LOLDU", r=RANK, lora_alpha=RANK) | ALL,
    "eva": LORA | dict(init_lora_weights="eva"),
    "corda": LORA | dict(init_lora_weights="corda"),
    "lora-ga": LORA | dict(init_lora_weights="lora_ga"),
    "lora-sb": dict(peft_type="LORA_SB", r=RANK, lora_alpha=RANK) | ALL,
}
# Method -> seconds that its first values may take. Those that look at data take their peak memory from the training that follows, and may exceed it by a layer.
PREPARED = {"pissa": 10, "olora": None, "loldu": None, "kasa": None, "eva": None, "corda": 60, "lora-ga": 60, "lora-sb": None}
# What PEFT prepares from the weights alone, and is timed beside it.
PEFT_PREPARES = ["pissa", "olora"]
# A pruned base computes something else, a first step may be part of the first values, and some add a penalty to the loss.
OTHER_FIRST_LOSS = ["loram", "lora-sb", "kasa", "sora", "s2-lora", "increlora", "triadaptlora"]
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
    return (abs(got - base_loss) / abs(base_loss) if name not in OTHER_FIRST_LOSS else None), None


PREPARING = re.compile(r"prepared in ([0-9.]+) s(?:, ([0-9.]+) ([KMG]iB|B) of memory at most)?")
BYTES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def prepare(ours, model, name):
    """Seconds and peak memory of the preparation of first values, and of the training that follows; PEFT's seconds where it has the method."""
    file = config_file(name, OWN[name])
    command = [ours.binary, "train", model, "--method-config", file, "--data", train.OUT / "rows.jsonl", "--out", OUT / f"{name}-prepared", "--overwrite",
               "--batch", BATCH, "--max-length", LENGTH, "--max-steps", 2, "--threads", ours.threads]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = PREPARING.search(done.stderr)
    if done.returncode or said is None:
        raise RuntimeError(done.stderr[-500:])
    peak = max(json.loads(line)["peak_rss_bytes"] for line in (OUT / f"{name}-prepared/metrics.jsonl").read_text().splitlines())
    row = dict(prepare_s=float(said[1]), prepare_peak_bytes=float(said[2]) * BYTES[said[3]] if said[2] else None, prepared_train_peak_bytes=peak)
    if name in PEFT_PREPARES:
        script = PREPARE.format(model=str(model), config={k: v for k, v in OWN[name].items() if k != "peft_type"}, threads=ours.threads)
        row["peft_prepare_s"] = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return row


PREPARE = """
import time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32)
clock = time.perf_counter()
get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{config!r}))
print(time.perf_counter() - clock)
"""


def preparations(table):
    lines = ["| method | prepared in s | allowed | PEFT s | peak while preparing MB | peak of the training MB |", "| --- |" + " ---: |" * 5]
    for r in table:
        if "prepare_s" in r:
            mb = [f"{r[k] / 1e6:.0f}" if r.get(k) else "" for k in ("prepare_peak_bytes", "prepared_train_peak_bytes")]
            peft = f"{r['peft_prepare_s']:.1f}" if "peft_prepare_s" in r else ""
            lines.append(f"| {r['method']} | {r['prepare_s']:.1f} | {PREPARED[r['method']] or ''} | {peft} | {mb[0]} | {mb[1]} |")
    return "\n".join(lines) + "\n"


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
    p.add_argument("--phase", choices=["check", "time", "prepare"])
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
    base_loss = ours.train(OUT / "base", "--method-config", config_file("lora", LORA), steps=1)[0]["loss"] if a.phase in (None, "check") else None
    for name, row in table.items():
        if a.phase in ("time", "prepare"):
            known = old.get(name, {})
            row |= known if a.phase == "prepare" else {k: v for k, v in known.items() if k in ("loss_error", "trained", "failed") or "prepare" in k}
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
    for _ in range(a.rounds if a.phase in (None, "time") else 0):
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

    for name in PREPARED if a.phase in (None, "prepare") else ():
        if name in table and "failed" not in table[name]:
            try:
                table[name] |= prepare(ours, a.model, name)
            except RuntimeError as e:
                table[name].fail("not prepared", e)

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
    text = f"{markdown(result)}\n{preparations(result)}"
    a.markdown.write_text(f"SmolLM2-135M, r {RANK}, all linear layers, {BATCH} x {LENGTH} tokens, f32, {a.threads} threads, commit {commit}.\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
