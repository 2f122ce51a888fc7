"""Writes runtime/tests/fixtures/schedules.json: learning rates by step as transformers' get_scheduler gives them.

Needs torch and transformers; the versions are those of scripts/make_fixtures.py.
"""

import json
from pathlib import Path

import torch
from transformers import get_scheduler

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def rates(schedule, warmup, steps, lr):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    out = []
    for _ in range(steps):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


def main():
    cases = []
    for schedule in NAMES:
        for warmup, steps, lr in [(0, 10, 2e-4), (3, 20, 1e-3), (5, 5, 3e-4), (1, 37, 5e-5), (25, 20, 2e-4)]:
            case = {"schedule": schedule, "warmup": warmup, "steps": steps, "lr": lr}
            cases.append({**case, "rates": rates(schedule, warmup, steps, lr)})
    path = Path(__file__).parent.parent / "runtime/tests/fixtures/schedules.json"
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
