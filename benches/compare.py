#!/usr/bin/env python3
"""Compares pleach with PyTorch + transformers + PEFT on SmolLM2-135M (f32, bf16) and MiniLM (f32), CPU, in one run.

Correctness comes first: a time is printed only beside outputs that agree. Times are taken in interleaved rounds (rival,
pleach, rival, ...), so that a busy machine slows both; the table shows the median over the rounds and the best. Writes
everything, with versions, commit, processor and shapes, as JSON.

    benches/run.sh [--rounds 3] [--tokens 512] [--threads 2] [--rival-only] [--json bench-out/bench.json]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rival

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench-out"
TOLERANCE = 2e-4
TEXTS = (
    "A hedge is a fence that is alive. You plant it thin and lay it young,",
    "The",
    "In late winter the hedger cuts each stem almost through, bends it down and weaves it between stakes. The strip of bark that is left "
    "keeps the stem growing, and in spring new wood rises from every cut. After a few years the hedge is",
)
# name -> (N, K) of one layer's linears, and of the head
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536), "head": (49152, 576)}


class Pleach:
    """The binary, called as a user calls it."""

    def __init__(self, binary, threads):
        self.binary, self.threads = binary, threads

    def call(self, *arguments, env=None):
        command = [self.binary, *map(str, arguments), "--quiet", "--threads", str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
        return done.stdout

    def json(self, *arguments):
        return json.loads(self.call(*arguments, "--json"))

    def output(self, model, ids, segments, *options):
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
            save_file({"input_ids": ids, "segments": segments}, given)
            self.call("run", model, *options, "--input", given, "--out", made)
            (tensor,) = load_file(made).values()
        return tensor

    def greedy(self, model, ids, tokens, *options):
        text = self.call("generate", model, *options, "--ids", ",".join(map(str, ids.tolist())), "--max-new-tokens", tokens, "--print-ids")
        return [int(t) for t in text.strip().split(",")]


class Table:
    """Rows of (what, pleach, rival, ratio, bar, met); a row that could not be measured says why."""

    def __init__(self):
        self.rows = []

    def add(self, what, ours, theirs, ratio=None, bar=None, met=None, **more):
        self.rows.append(dict(what=what, pleach=ours, rival=theirs, ratio=ratio, bar=bar, met=met, **more))

    def show(self):
        def cell(value):
            if value is None:
                return ""
            if isinstance(value, bool):
                return "yes" if value else "NO"
            return f"{value:.3g}" if isinstance(value, float) and value < 1e3 else f"{value:.0f}" if isinstance(value, float) else str(value)

        head = ["what", "pleach", "rival", "ratio", "bar", "met"]
        cells = [head] + [[cell(row[key]) for key in head] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        for line in cells:
            print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def pack(rows):
    ids = torch.cat([torch.tensor(row) for row in rows])
    return ids, torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()])


def model_variants(adapter):
    """name -> (options of pleach, arguments of the rival)."""
    return {
        "base": ([], {}),
        "LoRA r16 unmerged": (["--adapter", adapter], dict(adapter=adapter)),
        "LoRA r16 merged": (["--adapter", adapter, "--merge"], dict(adapter=adapter, merge=True)),
        "base bf16": (["--dtype", "bf16"], dict(dtype=torch.bfloat16)),
        "LoRA r16 unmerged bf16": (["--adapter", adapter, "--dtype", "bf16"], dict(adapter=adapter, dtype=torch.bfloat16)),
    }


def is_bf16(name):
    return name.endswith("bf16")


def correctness(table, pleach, folder, minilm, variants, decoders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids, segments = pack([tokenizer(text).input_ids for text in TEXTS])
    wants = {name: decoders[name].logits(ids, segments) for name in variants}
    for name, (options, _) in variants.items():
        want = wants[name]
        if pleach and is_bf16(name):
            exact = wants[name.removesuffix(" bf16")].double()
            ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (pleach.output(folder, ids, segments, *options), want))
            table.add(f"logits' distance to f32, {name}", ours.item(), theirs.item(), (ours / theirs).item(), "<= 1.25", bool(ours <= 1.25 * theirs))
        elif pleach:
            error = relative(pleach.output(folder, ids, segments, *options), want)
            table.add(f"logits, {name}", error, None, None, f"<= {TOLERANCE:g}", error <= TOLERANCE)
    moved = relative(wants["LoRA r16 unmerged"], wants["base"])
    assert moved > 100 * TOLERANCE, f"the adapter moves the logits by {moved:.1e} only"
    prompt = ids[segments[2] :]
    for name, (options, _) in variants.items():
        if is_bf16(name):
            continue  # one rounding changes a choice, and with it all that follow
        want = decoders[name].greedy(prompt, 64).tolist()
        if pleach:
            got = pleach.greedy(folder, prompt, 64, *options)
            want = want[:-1] if len(got) == len(want) - 1 and want[-1] in (0, 2) else want
            same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            table.add(f"greedy ids equal, {name}", same, len(want), None, "all", got == want)
    if pleach:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
        ids, segments = pack([tokenizer(text).input_ids for text in TEXTS])
        error = relative(pleach.output(minilm, ids, segments), rival.Encoder(minilm).hidden(ids, segments))
        table.add("MiniLM hidden states", error, None, None, f"<= {TOLERANCE:g}", error <= TOLERANCE)


# Decoded from weights in blocks (see `pleach import`), and once more from the f32 weights.
FROM_F32 = ("base", "LoRA r16 unmerged")


def measure(options, pleach, folder, variants, decoders):
    """Rounds of times: {(what, name): {"rival": [ms], "pleach": [ms], "report": last JSON}}. Every other round goes backwards, so
    that what drifts over a round favours none of the variants that are compared with each other."""
    times = {}
    for number in range(options.rounds):
        for what in ("prefill", "decode"):
            for name, (flags, _) in list(variants.items())[:: 1 - 2 * (number % 2)]:
                print(f"round {number + 1}: {what}, {name}", file=sys.stderr)
                slot = times.setdefault((what, name), {"rival": [], "pleach": [], "report": None})
                if what == "prefill":
                    slot["rival"] += decoders[name].prefill_ms(options.tokens, 3)
                else:
                    slot["rival"] += decoders[name].decode_ms(64, 1)
                if pleach:
                    time.sleep(0.3)  # the rival's threads stop spinning
                    kind, count = ("run", options.tokens) if what == "prefill" else ("generate", 64)
                    report = slot["report"] = pleach.json("bench", kind, folder, *flags, "--tokens", count)
                    slot["pleach"].append(report["step_ms"]["median"] if what == "prefill" else 1e3 / report["tokens_per_s"])
                    if what == "decode" and name in FROM_F32:
                        # The same with the weights read as f32, as the rival reads them.
                        plain = times.setdefault((what, f"{name}, f32 weights"), {"rival": slot["rival"], "pleach": [], "report": None})
                        report = plain["report"] = pleach.json("bench", kind, folder, *flags, "--no-blocks", "--tokens", count)
                        plain["pleach"].append(1e3 / report["tokens_per_s"])
    return times


def middle(values):
    return statistics.median(values) if values else None


def timing_rows(table, options, times):
    bars = {("prefill", "LoRA r16 unmerged"): 1.7, ("decode", "base"): 4.0, ("decode", "LoRA r16 unmerged"): 4.0, ("prefill", "LoRA r16 unmerged bf16"): 2.5, ("decode", "base bf16"): 6.0}
    for (what, name), slot in times.items():
        ours, theirs = middle(slot["pleach"]), middle(slot["rival"])
        ratio = theirs / ours if ours else None
        bar = bars.get((what, name))
        met = ratio >= bar if ratio and bar else None
        label = f"prefill T={options.tokens}, {name}, ms" if what == "prefill" else f"decode 64, {name}, ms/token"
        best = {side: min(slot[side], default=None) for side in ("pleach", "rival")}
        table.add(label, ours, theirs, ratio, f">= {bar}x" if bar else None, met, best=best, report=slot["report"])
        share = (slot["report"] or {}).get("bandwidth_share")
        if share is not None:
            table.add(f"decode 64, {name}, of read bandwidth", share, None, None, ">= 0.8", share >= 0.8)
        arena, live = ((slot["report"] or {}).get(key) for key in ("arena_bytes", "live_peak_bytes"))
        if arena and live:
            table.add(f"{what}, {name}, arena / live bytes", arena / live, None, None, "<= 1.02", arena / live <= 1.02)
    for what in ("prefill", "decode"):
        for side in ("pleach", "rival"):
            a, b = (middle(times[what, f"LoRA r16 {kind}"][side]) for kind in ("unmerged", "merged"))
            if a and b:
                ours = side == "pleach"
                table.add(f"{what}, unmerged / merged", a / b if ours else None, None if ours else a / b, None, "<= 1.06" if ours else None, a / b <= 1.06 if ours else None)


def kernel_rows(table, options, pleach):
    """The matmul kernels at the model's shapes, against torch in the same run."""
    ours = {}
    if pleach:
        try:
            for row in pleach.json("bench", "kernels"):
                ours[tuple(row["shape"])] = row
        except (RuntimeError, ValueError) as error:
            print(f"bench kernels: {str(error).splitlines()[-1]}", file=sys.stderr)
    names = {}
    for name, shape in SHAPES.items():
        names[shape] = f"{names[shape]},{name}" if shape in names else name
    for m in (options.tokens, 1):
        for (n, k), name in names.items():
            theirs = middle(rival.linear_ms(m, n, k, 5 if m * n < 1 << 24 else 3))
            row = ours.get((m, n, k))
            ratio = theirs / row["ms"] if row else None
            bar = ">= 0.98x" if m > 1 else None
            table.add(f"matmul {name} {m}x{n}x{k}, ms", row and row["ms"], theirs, ratio, bar, ratio and ratio >= 0.98 if bar else None)
            if row and row.get("peak_share") is not None and m > 1:
                table.add(f"matmul {name} {m}x{n}x{k}, of peak", row["peak_share"], None, None, ">= 0.92", row["peak_share"] >= 0.92)


def compile_rows(table, pleach, folder):
    """Wall time of `pleach compile`, cold and cached, on all layers and on three of them, each with a cache of its own."""
    walls = {}
    with tempfile.TemporaryDirectory() as scratch:
        short = shorten(folder, Path(scratch, "three"))
        for name, model in (("all", folder), ("three", short)):
            cache = {"XDG_CACHE_HOME": str(Path(scratch, name)), "PLEACH_CACHE_DIR": str(Path(scratch, name))}
            for state in ("cold", "cached"):
                start = time.perf_counter()
                pleach.call("compile", model, "--entry", "infer,generate", "--target", "cpu", "-o", Path(scratch, f"{name}-{state}.pleach"), env=cache)
                walls[name, state] = (time.perf_counter() - start) * 1e3
    table.add("compile infer + generate, cold, ms", walls["all", "cold"], None, None, "<= 3000", walls["all", "cold"] <= 3000)
    table.add("compile infer + generate, cached, ms", walls["all", "cached"], None, None, "<= 100", walls["all", "cached"] <= 100)
    ratio = walls["all", "cold"] / walls["three", "cold"]
    table.add("compile, 30 layers / 3", ratio, None, None, "<= 1.5", ratio <= 1.5)


def shorten(folder, out):
    """The same model with its first three layers."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (out / "config.json").write_text(json.dumps(config))
    short = lambda name: not (layer := name.partition("layers.")[2].partition(".")[0]) or int(layer) < 3
    keep = {}
    for file in sorted(folder.glob("*.safetensors")):
        keep |= {name: tensor for name, tensor in load_file(file).items() if short(name)}
    blocks = folder / "blocks" / "model.safetensors"
    if blocks.exists():
        (out / "blocks").mkdir()
        with safe_open(blocks, "pt") as file:
            formats = {name: value for name, value in file.metadata().items() if short(name)}
        save_file({name: tensor for name, tensor in load_file(blocks).items() if short(name)}, out / "blocks" / "model.safetensors", metadata=formats)
    save_file(keep, out / "model.safetensors", metadata={"format": "pt"})
    return out


def facts(options):
    def said(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "vector": [f for f in ("avx2", "fma", "avx512f", "avx512bw") if f in flags],
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "model": "SmolLM2-135M-Instruct",
        "tokens": options.tokens,
        "adapter": "LoRA r16, all-linear",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pleach", default=os.environ.get("PLEACH", "target/release/pleach"))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--encoder", type=Path, default=ROOT / "models" / "minilm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--rival-only", action="store_true")
    parser.add_argument("--json", type=Path, default=OUT / "bench.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    OUT.mkdir(exist_ok=True)
    head = facts(options)
    pleach = None if options.rival_only else Pleach(options.pleach, options.threads)
    adapter = OUT / "lora-r16"
    rival.make_adapter(options.model, adapter)
    variants = model_variants(adapter)
    decoders = {name: rival.Decoder(options.model, **arguments) for name, (_, arguments) in variants.items()}
    table = Table()
    correctness(table, pleach, options.model, options.encoder, variants, decoders)
    if any(row["met"] is False for row in table.rows):
        table.show()
        sys.exit("the outputs differ: no times are taken")
    timing_rows(table, options, measure(options, pleach, options.model, variants, decoders))
    kernel_rows(table, options, pleach)
    if pleach:
        compile_rows(table, pleach, options.model)
    print(f"{head['cpu']}, {head['cores']} cores, {options.threads} threads, commit {head['commit']}{' + changes' if head['changed'] else ''}")
    print(f"rival: torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}; f32 unless named; median of {options.rounds} interleaved rounds\n")
    table.show()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(head | {"rows": table.rows}, indent=1) + "\n")
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
