#!/usr/bin/env python3
"""What training steps of large shapes take at least on GPUs that are not at hand: estimates, no measurements. Writes OUT.json,
and with DIR executed.json and units.json beside it.

    estimate.py OUT.json [--counts DIR] [--layers 1,32]

PLEACH names the binary, PLEACH_PTXAS the assembler (optional: registers and spills). For every plan: bounds by `pleach inspect --estimate`
(operations and bytes of every kernel against what a machine reaches), planned memory at capacity, and what the assembler says. DIR has the
simulator's counts: `PLEACH_GPU_ESTIMATE=DIR cargo test --workspace --features pleach-tests/llvm --test trials -- gpu_sim/counts`, then the
same with `gpu_sim/executed`. units.json has what bounds each kernel. Needs no package.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import shapes

HERE = Path(__file__).resolve().parent
# Adapters of the first layer's attention alone: next to nothing is trained, and gradients flow through the whole model.
FROZEN = r"model\.layers\.0\.self_attn\.[qkv]_proj"
MACHINES = {"sm_90a": ("h200", "h100"), "sm_80": ("a100",)}
BATCH, LENGTH, RANK = 4, 2048, 16
# Bytes of activations that PEFT keeps for a layer of Llama-3-8B at these shapes, eager, with copies of norms in f32; derived from
# the library's modules, for LoRA on all linear layers: four rows of 2048 tokens.
PEFT_LAYER = 1650 << 20
# Copies of the logits in f32 that a loss in PyTorch holds at its peak, at least.
PEFT_LOGITS = 2


def run(pleach, *arguments):
    done = subprocess.run([pleach, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{pleach} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


TRIALS = "PLEACH_GPU_ESTIMATE=DIR cargo test --workspace --features pleach-tests/llvm --test trials -- "
OWN = "python3 benches/gpu/estimate.py benches/gpu/estimates/llama-3-8b.json --counts DIR"
UNITS = {
    "what": "ESTIMATE of what bounds each kernel of a training step of one layer at Llama-3-8B's sizes; nothing here was measured on a GPU. Two "
            "blocks of every launch stand for the others: causal attention's times are off, its ratios are not",
    "command": f"{TRIALS}gpu_sim/counts; {OWN}",
}
EXECUTED = {
    "what": "executed in the simulator, all blocks of every launch of a training step, and held against the formulas that the estimates rest "
            "on; nothing here was measured on a GPU",
    "command": f"{TRIALS}gpu_sim/executed; {OWN}",
}
KERNELS = ("ESTIMATE, kernels of at least {} of the sum: ms of each unit (tensor, float, integer, special, issue, shared) of all processors of an A100 "
           "or H200, and of memory, each alone at its data sheet's rate; bound is the longest; wavefronts of shared memory and sectors of global "
           "memory over the fewest possible (0: no access), with the two worst instructions")


def peft_bytes(config, layers, tokens):
    """What PEFT takes eagerly, by formula."""
    weights = sum(2 * n for n in map(product, shapes.tensors(config, layers).values()))
    linears = layers * linear_widths(config)
    logits = PEFT_LOGITS * 4 * tokens * config["vocab_size"]
    # Adapter, gradient and two moments in f32.
    return {"weights": weights, "activations": layers * PEFT_LAYER, "logits": logits, "adapter": 16 * RANK * linears}


def linear_widths(c):
    """Inputs and outputs of all linear sites of a layer: what an adapter's rank is multiplied with."""
    d, ff = c["hidden_size"], c["intermediate_size"]
    kv = c["num_key_value_heads"] * d // c["num_attention_heads"]
    return 2 * (d + d) + 2 * (d + kv) + 3 * (d + ff)


def product(shape):
    n = 1
    for s in shape:
        n *= s
    return n


def planned(memory):
    """Bytes of a session by its plan: parameters that stay, and the largest arena."""
    stay = sum(p["bytes"] for p in memory["parameters"] if p["residency"] != "read by prepare only")
    return {"parameters": stay, "arena": max(a["arena_bytes"] for a in memory["arenas"])}


def resources(kernels):
    """The assembler's table in short; nothing where there was no assembler."""
    launches = [l for k in kernels for l in k["gpu"]]
    if not all("registers" in l for l in launches):
        return None
    return {
        "launches": len(launches), "spilled_bytes": sum(l["spilled_bytes"] for l in launches),
        "most_registers": max(l["registers"] for l in launches),
        "most_shared_bytes": max(l["dynamic_shared_bytes"] + l["static_shared_bytes"] for l in launches),
    }


def rounded(x):
    return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else float(f"{x:.3g}") if isinstance(x, float) else x


def write_runs(path, facts, runs, least):
    """Runs with their kernels, a line each: those that take at least so much of the sum, longest first."""
    lines = []
    for r in runs:
        own = {k["kernel"]: max(k["ms"].values()) for k in r["kernels"]}
        kept = sorted((k for k in r["kernels"] if own[k["kernel"]] >= least * sum(own.values())), key=lambda k: -own[k["kernel"]])
        head = json.dumps({k: v for k, v in r.items() if k != "kernels"}, indent=1)[:-2]
        rows = [json.dumps({**rounded({k: v for k, v in x.items() if k != "sites"}), "sites": x["sites"][:2]}) for x in kept]
        lines.append(head + ',\n "kernels": [\n  ' + ",\n  ".join(rows) + "\n ]\n}")
    text = json.dumps(facts, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    json.loads(text)
    path.write_text(text)


def step(estimate):
    """Accumulation and update together."""
    entries = [e for e in estimate["entries"] if e["name"] in ("accumulate", "update", "step")]
    sum_of = lambda k: sum(e[k] for e in entries)
    classes = {}
    for e in entries:
        for c in e["classes"]:
            key = (c["name"], c["units"])
            own = classes.setdefault(key, {k: 0 for k in ("launches", "flops", "bytes", "products_ms", "memory_ms", "bound_ms")})
            for k in own:
                own[k] += c[k]
    rows = [{"class": c, "units": u, **v} for (c, u), v in sorted(classes.items())]
    return {"bound_ms": sum_of("bound_ms"), "gaps_ms": sum_of("gaps_ms"), "launches": sum_of("launches"), "classes": rows}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--counts", type=Path, help="folder with the simulator's counts")
    p.add_argument("--layers", default="1,32", type=lambda s: [int(n) for n in s.split(",")])
    a = p.parse_args()
    pleach = os.environ.get("PLEACH", "target/release/pleach")
    config = json.loads((HERE / "configs/llama-3-8b.json").read_text())
    tokens = BATCH * LENGTH
    capacity = f"T={tokens},S={BATCH},L={tokens - BATCH},P={LENGTH},C=1"
    rows, memory, overhead, limits = [], [], [], {}
    with tempfile.TemporaryDirectory(prefix="pleach-estimate-") as work:
        work = Path(work)
        for layers in a.layers:
            shapes.make(HERE / "configs/llama-3-8b.json", layers, work / f"m{layers}")
            for target, machines in MACHINES.items():
                bounds = {}
                for kind in ("frozen", "lora", "paca"):
                    method, modules = ("lora", FROZEN) if kind == "frozen" else (kind, "all-linear")
                    plan = work / "plan.pleach"
                    run(pleach, "compile", work / f"m{layers}", "--method", method, "--r", RANK, "--alpha", 2 * RANK, "--target-modules",
                        modules, "--entry", "train", "--batch", BATCH, "--max-length", LENGTH, "--dtype", "bf16", "--target", target,
                        "-o", plan, "--quiet", "--no-cache")
                    for machine in machines:
                        said = json.loads(run(pleach, "inspect", plan, "--estimate", machine, "--json", "--capacity", capacity))
                        limits[machine] = said["estimate"]["machine"]
                        row = {"layers": layers, "what": kind, "target": target, "machine": machine, **step(said["estimate"])}
                        rows.append({**row, "assembler": resources(said["kernels"])})
                        bounds[machine, kind] = row["bound_ms"] + row["gaps_ms"]
                    if kind != "frozen":
                        own, peft = planned(said["memory"]), peft_bytes(config, layers, tokens)
                        ratio = sum(own.values()) / sum(peft.values())
                        memory.append({"layers": layers, "what": kind, "target": target, "planned_bytes": own, "peft_formula_bytes": peft,
                                       "ratio": ratio})
                for machine in machines:
                    for kind in ("lora", "paca"):
                        over = bounds[machine, kind] / bounds[machine, "frozen"] - 1
                        overhead.append({"layers": layers, "what": kind, "machine": machine, "over_frozen": over})
    read = lambda kind: [json.loads(f.read_text()) for f in sorted(a.counts.glob(f"{kind}-*.json"))] if a.counts else []
    counts, executed = read("counts"), read("executed")
    # Kernels one by one are in files of their own.
    without = lambda runs: [{k: v for k, v in r.items() if k != "kernels"} for r in runs]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    out = {
        "what": "ESTIMATE from counts and limits of machines; nothing here was measured on a GPU",
        "model": "llama-3-8b shapes", "batch": BATCH, "length": LENGTH, "tokens": tokens, "rank": RANK, "dtype": "bf16",
        "commit": commit or None, "version": run(pleach, "--version").strip(),
        "machines": limits,
        "assumptions": [
            "bound_ms: launch after launch, each the longer of its operations and its bytes (operands and results once) at the machine's limit",
            "gaps_ms: between two launches of a graph",
            "over_frozen: bounds and gaps against a model whose first layer's attention alone is trained; it lies above what adapters cost "
            "where a kernel is not at its bound",
            "peft_formula_bytes: activations of eager modules, two f32 copies of the logits, f32 adapter with gradient and moments",
            "counts: blocks that the simulator ran, scaled; one sequence of 2048 tokens; bytes are those that blocks ask for, before any cache",
            "executed: all blocks of a step of a small layer of whole tiles, where the operations of products and the bytes of different sectors "
            "(sector_bytes) are held against the formulas that the bounds rest on",
        ],
        "command": f"{TRIALS}gpu_sim/counts; the same with gpu_sim/executed; {OWN}",
        "steps": rows, "adapter_overhead": overhead, "memory": memory, "simulated_counts": without(counts),
        "executed_in_the_simulator": without(executed),
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(out, indent=1) + "\n")
    for name, runs, least, what in (("units", counts, 0.0003, UNITS), ("executed", executed, 0.01, EXECUTED)):
        if runs:
            write_runs(a.out.with_name(f"{name}.json"), {**what, "kernels": KERNELS.format(least)}, runs, least)
    for r in rows:
        print(f"{r['layers']:3} layers  {r['what']:6}  {r['machine']}  at least {r['bound_ms']:8.2f} ms + {r['gaps_ms']:.2f} ms")


if __name__ == "__main__":
    main()
