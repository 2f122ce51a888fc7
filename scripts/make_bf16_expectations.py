#!/usr/bin/env python3
"""Measures how far PEFT in bf16 (weights and activations bf16, adapters f32) is from the reference of the training fixtures, and
writes it to `tests/fixtures/train/bf16.json`: what our own bf16 is held against.

One run is one draw of roundings: AdamW's first step moves an element by the whole rate whatever the size of its gradient, so one that
is nearly 0 goes up or down by chance, and the losses of later steps with it. So cases are run from several starts, steep ones from more:
every element of the adapter moves by a part in 10,000, up or down by a hash of its place and the number of the start
(`tests/src/training/near.rs` does the same), and each start has a reference of its own, PEFT in f64. The gradients of the first step
depend on no such chance.

Only cases whose trained tensors PEFT keeps in f32 are measured: low-rank adapters, and PaCA by the module of our own.

    python scripts/make_bf16_expectations.py
"""

import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import make_train_fixtures as fixtures
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

STARTS, STEEP = 7, {"qwen2-dora": 23}  # starts beside a case's own
NEAR = 1e-4
ROOT = Path(__file__).resolve().parent.parent / "tests/fixtures/train"


class Floats(torch.nn.Module):
    """The model with logits in f32, as a trainer takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits.float()
        return out


class Paca(fixtures.Paca):
    """Columns are summed in f32 and rounded once, as the weight is stored."""

    def forward(self, x):
        w = self.base.weight
        columns = w[:, self.paca_indices].float() + self.scale * self.paca_delta
        return torch.nn.functional.linear(x, w.index_copy(1, self.paca_indices, columns.to(w.dtype)), self.base.bias)


def adapted(folder, source, config):
    model = fixtures.base(folder, torch.bfloat16)
    tensors = load_file(source / "adapter_model.safetensors")
    if config["peft_type"] == "PACA":
        fixtures.with_paca(model, config, tensors)
        for m in [m for m in model.modules() if isinstance(m, fixtures.Paca)]:
            m.__class__ = Paca
            m.paca_delta.data = m.paca_delta.data.float()
        return model
    keys = {k: v for k, v in config.items() if k != "peft_type"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
    set_peft_model_state_dict(model, tensors)
    return model


def nearby(tensor, k):
    """The tensor of start number k; indices stay."""
    if not tensor.is_floating_point():
        return tensor
    x = (torch.arange(tensor.numel()) * 2654435761 + k * 2246822519) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 3266489917) & 0xFFFFFFFF
    up = ((x ^ (x >> 13)) & 1) * 2 - 1
    return (tensor.double() * (1 + NEAR * up.double()).view(tensor.shape)).float()


def distance(got, want, end, before, after):
    """Root mean square of the losses' relative differences, and how far the adapter ends from the reference, as a part of its change."""
    rms = math.sqrt(sum(((a - b) / b) ** 2 for a, b in zip(got, want)) / len(want))
    off = sum(((end[k].double() - after[k].double()) ** 2).sum() for k in after).sqrt().item()
    moved = sum(((before[k].double() - after[k].double()) ** 2).sum() for k in after).sqrt().item()
    return {"losses": rms, "change": off / moved}


def gradients_off(folder, source, config, run, rows):
    """How far the gradients of the first step are from those in f64, as a part of their norm."""
    found = []
    for model in [fixtures.adapted(folder, source, config, torch.float64), adapted(folder, source, config)]:
        looked = {}

        def look(_, model=model, looked=looked):
            looked.update({n: p.grad.double().clone() for n, p in model.named_parameters() if p.requires_grad})

        fixtures.train(model if model.dtype == torch.float64 else Floats(model), rows, run | {"steps": 1}, looked=look)
        found.append(looked)
    want, got = found
    assert want.keys() == got.keys()
    off = sum(((got[k] - want[k]) ** 2).sum() for k in want).sqrt()
    return (off / sum((want[k] ** 2).sum() for k in want).sqrt()).item()


def from_near(folder, source, config, run, rows, k):
    """The same from start number k."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        shutil.copy(source / "adapter_config.json", place)
        before = {key: nearby(t, k) for key, t in load_file(source / "adapter_model.safetensors").items()}
        save_file(before, place / "adapter_model.safetensors", {"format": "pt"})
        exact = fixtures.adapted(folder, place, config, torch.float64)
        want = fixtures.train(exact, rows, run)["losses"]
        low = adapted(folder, place, config)
        got = fixtures.train(Floats(low), rows, run)["losses"]
    return distance(got, want, fixtures.state(low), before, fixtures.state(exact))


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (ROOT / "rows.jsonl").read_text().splitlines()]
    found = {}
    for name, (family, config, run, _) in fixtures.CASES.items():
        if config.get("modules_to_save") or config.get("bias", "none") != "none":
            continue
        source = ROOT / name / "start"
        model = adapted(ROOT / "models" / family, source, config)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), name
        log = fixtures.train(Floats(model), rows, fixtures.DEFAULTS | run)
        want = json.loads((ROOT / name / "case.json").read_text())["losses"]
        before, after = load_file(source / "adapter_model.safetensors"), load_file(ROOT / name / "final.safetensors")
        found[name] = {"first": abs(log["losses"][0] / want[0] - 1)} | distance(log["losses"], want, fixtures.state(model), before, after)
        found[name]["gradients"] = gradients_off(ROOT / "models" / family, source, config, fixtures.DEFAULTS | run, rows)
        print(f"{name:20} gradients {found[name]['gradients']:.1e}, losses {found[name]['losses']:.1e}, change {found[name]['change']:.1e}")
        for k in range(1, STEEP.get(name, STARTS) + 1):
            near = from_near(ROOT / "models" / family, source, config, fixtures.DEFAULTS | run, rows, k)
            found[name].setdefault("starts", []).append(near)
            print(f"  start {k:2}: losses {near['losses']:.1e}, change {near['change']:.1e}")
    (ROOT / "bf16.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
