#!/usr/bin/env python3
"""One line per training run: losses, held-out loss, time and memory, from the files that `pleach train` writes.

    python demo/summary.py RUN...
"""

import json
import statistics
import sys
from pathlib import Path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    print(f"\n{'run':8} {'loss, first and last 5':>24} {'held out, before and after':>28} {'ms a step':>10} {'in all':>8} {'planned':>9} {'peak RSS':>9}")
    for run in map(Path, sys.argv[1:]):
        steps, evals = lines(run / "metrics.jsonl"), lines(run / "eval.jsonl")
        first, last = (statistics.mean(s["loss"] for s in part) for part in (steps[:5], steps[-5:]))
        before, after = evals[0]["eval_loss"], evals[-1]["eval_loss"]
        ms = [s["step_ms"] for s in steps]
        planned, rss = (max(s[key] for s in steps) / 1e6 for key in ("planned_peak_bytes", "peak_rss_bytes"))
        print(
            f"{run.name:8} {f'{first:.3f} -> {last:.3f}':>24} {f'{before:.3f} -> {after:.3f}':>28} "
            f"{statistics.median(ms):10.0f} {sum(ms) / 1e3:6.1f} s {planned:6.0f} MB {rss:6.0f} MB"
        )


if __name__ == "__main__":
    main()
