#!/usr/bin/env python3
"""Makes the fixtures of methods that differ from LoRA in how they are trained, beside those of `make_train_fixtures.py` and in the
same form: a start that is a PEFT folder (with the keys that say how it is trained), twenty steps, the end.

The optimizers are PEFT 0.21.2's where it has them (LoRA+, LoRA-FA) and those of the packages galore-torch 1.0 and fira 1.0.2; the others
are written from the papers' and the authors' formulas.

    python scripts/make_dynamics_fixtures.py [--out tests/fixtures/train] [--only CASE]
"""

import argparse
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import make_train_fixtures as base
import peft.optimizers.lorafa as lorafa
import torch
import torch.nn.functional as F
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from safetensors.torch import load_file, save_file

# PEFT rounds LoRA-FA's products to bf16 wherever the processor can; the formula has no rounding.
lorafa.is_bf16_available = lambda: False


class Plain:
    """AdamW, and what a method does before and after it."""

    def __init__(self, model, run, keys):
        self.model, self.keys = model, keys
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.make(run)

    def make(self, run):
        return torch.optim.AdamW(self.trained, lr=run["lr"], weight_decay=run["weight_decay"])

    def before(self, step):
        pass

    def step(self, step):
        self.optimizer.step()


class LoraPlus(Plain):
    def make(self, run):
        return create_loraplus_optimizer(
            self.model,
            torch.optim.AdamW,
            lr=run["lr"],
            loraplus_lr_ratio=self.keys.get("loraplus_lr_ratio", 16.0),
            loraplus_weight_decay=run["weight_decay"],
        )


class LoraFa(Plain):
    def make(self, run):
        c = self.model.peft_config["default"]
        optimizer = create_lorafa_optimizer(
            self.model, r=c.r, lora_alpha=c.lora_alpha, lr=run["lr"], weight_decay=run["weight_decay"]
        )
        # A is frozen only now.
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        return optimizer


class Allora(Plain):
    def step(self, step):
        eta = self.keys.get("allora_eta", 2.0)
        for p in self.trained:
            p.grad = p.grad / torch.sqrt(p.detach().norm(dim=1, keepdim=True) + eta**-2)
        self.optimizer.step()


class Projected(Plain):
    """The optimizers of galore-torch and fira, with the signs of singular vectors fixed: moments outlive a basis, so signs matter, and
    libraries differ in them."""

    def make(self, run):
        # The 8-bit optimizer wants a library for GPUs.
        sys.modules.setdefault("galore_torch.adamw8bit", types.SimpleNamespace(AdamW8bit=None))
        import fira.fira_adamw
        import fira.gradient_projection
        import galore_torch.adamw
        import galore_torch.galore_projector

        galore = self.keys["training"] == "galore"
        found = galore_torch.galore_projector.GaLoreProjector if galore else fira.gradient_projection.GradientProjector
        if not hasattr(found, "unsigned"):
            found.unsigned = found.get_orthogonal_matrix
        found.get_orthogonal_matrix = signed
        group = dict(rank=self.keys["r"], update_proj_gap=self.keys.get("update_proj_gap", 200))
        group["proj_type"] = self.keys.get("proj_type", "std")
        group["scale" if galore else "alpha"] = self.keys.get("proj_scale", 0.25 if galore else 1.0)
        matrices = [p for p in self.trained if p.ndim == 2]
        groups = [{"params": [p for p in self.trained if p.ndim == 1]}, {"params": matrices} | group]
        adamw = galore_torch.adamw.AdamW if galore else fira.fira_adamw.AdamW
        return adamw(groups, lr=run["lr"], weight_decay=run["weight_decay"], no_deprecation_warning=True)


def signed(self, weights, rank, type):
    found = self.unsigned(weights, rank, type)
    if type == "full":
        return [sign(found[0].T).T, sign(found[1])]
    return sign(found) if type == "right" else sign(found.T).T


def sign(rows):
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


METHODS = {None: Plain, "lora-plus": LoraPlus, "lora-fa": LoraFa, "allora": Allora, "galore": Projected, "fira": Projected}
OURS = ["training", "loraplus_lr_ratio", "allora_eta", "update_proj_gap", "proj_scale", "proj_type"]


def train(model, rows, run, keys):
    """`make_train_fixtures.train` with a method's own step."""
    method = METHODS[keys.get("training")](model, run, keys)
    scheduler = base.transformers.get_scheduler(
        run["schedule"], method.optimizer, num_warmup_steps=run["warmup"], num_training_steps=base.STEPS
    )
    at, log = 0, {"losses": [], "grad_norms": [], "lrs": [], "tokens": []}
    for index in range(base.STEPS):
        method.before(index)
        step = []
        for _ in range(run["batch"] * run["accum"]):
            step.append(rows[at % len(rows)])
            at += 1
        counted = sum(sum(label != -100 for label in r["labels"][1:]) for r in step)
        total = 0.0
        for r in step:
            logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1]
            loss = F.cross_entropy(logits, torch.tensor(r["labels"][1:]), reduction="sum") / counted
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(method.trained, run["max_grad_norm"] or float("inf"))
        log["losses"].append(total)
        log["grad_norms"].append(norm.item())
        log["lrs"].append(scheduler.get_last_lr()[0])
        log["tokens"].append(sum(len(r["input_ids"]) for r in step))
        method.step(index)
        scheduler.step()
        model.zero_grad()
    return log


def lora(training, **keys):
    return base.lora(training=training, init_lora_weights=False) | keys


WHOLE = dict(
    peft_type="LORA",
    r=4,
    target_modules="dummy-target-modules",
    modules_to_save=["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.input_layernorm"],
)


def whole(training, **keys):
    return WHOLE | dict(training=training, update_proj_gap=6) | keys


# name: (model, configuration, run, [what must matter: (name, changed configuration, changed run)])
CASES = {
    "llama-lora-plus": (
        "llama",
        lora("lora-plus", loraplus_lr_ratio=8.0),
        dict(lr=5e-4, weight_decay=0.1),
        [("the ratio", {"loraplus_lr_ratio": 7.0}, {}), base.NO_DECAY],
    ),
    "qwen2-lora-fa": (
        "qwen2",
        lora("lora-fa"),
        base.ODD | dict(lr=2e-2),
        [("the method", {"training": None}, {}), base.NO_CLIP, base.NO_DECAY],
    ),
    "llama-allora": (
        "llama",
        lora("allora", lora_alpha=4, allora_eta=4.0, init_lora_weights=True),
        dict(lr=2e-2, max_grad_norm=1.0),
        [("the norms", {"training": None}, {}), ("eta", {"allora_eta": 1.0}, {})],
    ),
    "llama-galore": (
        "llama",
        whole("galore"),
        base.ODD | dict(lr=4e-2),
        [
            ("the projection", {"training": None}, {}),
            ("new bases", {"update_proj_gap": 200}, {}),
            ("the scale", {"proj_scale": 0.3}, {}),
            ("the sides", {"proj_type": "reverse_std"}, {}),
        ],
    ),
    "llama-galore-reverse": ("llama", whole("galore", proj_type="reverse_std"), dict(lr=1e-2), [("the sides", {"proj_type": "std"}, {})]),
    "llama-galore-full": ("llama", whole("galore", proj_type="full"), dict(lr=1e-2), [("the sides", {"proj_type": "std"}, {})]),
    "llama-fira": (
        "llama",
        whole("fira"),
        base.ODD | dict(lr=1e-2),
        [
            ("the residual", {"training": "galore", "proj_scale": 1.0}, {}),
            ("new bases", {"update_proj_gap": 200}, {}),
            ("the sides", {"proj_type": "reverse_std"}, {}),
        ],
    ),
}


def plain(config):
    return {k: v for k, v in config.items() if k not in OURS}


def make(name, rows, out):
    family, config, run, matters = CASES[name]
    run = base.DEFAULTS | run
    folder, here = out / "models" / family, out / name
    shutil.rmtree(here, ignore_errors=True)
    base.start(folder, plain(config), here / "start")
    path = here / "start/adapter_config.json"
    fields = json.loads(path.read_text()) | {k: v for k, v in config.items() if k in OURS}
    if config["target_modules"] == "dummy-target-modules":
        fields["peft_type"] = "FULL"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    results = {}
    for dtype in (torch.float64, torch.float32):
        model = base.adapted(folder, here / "start", plain(config), dtype)
        before = base.state(model)
        results[dtype] = (train(model, rows, run, config), base.state(model))
    (log, after), (log32, after32) = results[torch.float64], results[torch.float32]
    changed = base.norm(after, before)
    loss32, change32 = base.difference(log32, log), base.norm(after32, after) / changed
    ok = loss32 < base.LOSS_TOLERANCE / 2 and change32 < base.CHANGE_TOLERANCE / 2
    ok &= log["losses"][-1] < log["losses"][0]
    notes = []
    for what, other_config, other_run in matters:
        other_config = config | other_config
        model = base.adapted(folder, here / "start", plain(other_config), torch.float64)
        other = train(model, rows, run | other_run, other_config)
        effect = base.difference(other, log) / base.LOSS_TOLERANCE
        notes.append(f"{what} {effect:.0f}x")
        ok &= effect >= 100
    print(
        f"{name:20} loss {log['losses'][0]:.3f} -> {log['losses'][-1]:.3f}  f32 against f64: loss {loss32:.1e}, "
        f"change {change32:.1e}  without {', '.join(notes)}{'' if ok else '   FAILS'}"
    )
    trained = {k: v.float().contiguous() for k, v in after.items() if v.is_floating_point()}
    trained = {k: v for k, v in trained.items() if not torch.equal(v, before[k].float())}
    save_file(trained, here / "final.safetensors", {"format": "pt"})
    case = dict(model=family, steps=base.STEPS, **run, **log)
    (here / "case.json").write_text(json.dumps(case) + "\n")
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/fixtures/train")
    parser.add_argument("--only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (args.out / "rows.jsonl").read_text().splitlines()]
    ok = [make(name, rows, args.out) for name in CASES if args.only in (None, name)]
    if not all(ok):
        raise SystemExit("a case fails")


if __name__ == "__main__":
    main()
