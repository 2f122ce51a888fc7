#!/usr/bin/env python3
"""Makes the fixtures of the adapter methods in `tests/fixtures/methods/`: per method one folder with an adapter (`start/`), what
it makes of the tiny Llama of `tests/fixtures/train/models/llama` and of five optimizer steps.

    case.json            settings, loss, rate and norm of every step
    final.safetensors    what was trained, after the steps
    dumps.safetensors    logits [tokens, vocab] of the first two rows, one after another; grad.<tensor> of the first step;
                         merged.<module> of the first block; for prepared methods base.<module> and delta.<module> of a new adapter, what
                         it makes of the rows (start), and T' T of tensors whose directions alone mean anything (span.<buffer>)

By PEFT where PEFT has the method, else by the reference in `scripts/methods/<name>.py`, where the cases are too. Everything is
computed in float64, and again in float32, which must agree to half of the tolerances. An adapter that moves the logits by less than
a hundred tolerances is refused, and so is a case whose feature does not matter: a fixture that cannot fail is no fixture.

Needs torch, transformers, peft and safetensors; no network.

    python scripts/make_method_fixtures.py [--only NAME ...]
"""

import argparse
import copy
import importlib
import json
import pkgutil
import shutil
import warnings
from pathlib import Path

import make_train_fixtures as training
import methods
import torch
from make_train_fixtures import CHANGE_TOLERANCE, DEFAULTS, LOSS_TOLERANCE, base, difference, norm
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

TOLERANCE = 1e-4  # of logits, gradients and merged weights, relative to the largest
STEPS = 5
PREFIX = "base_model.model."
ROOT = Path(__file__).resolve().parent.parent / "tests/fixtures"
CASES, LAYERS = {}, {}
for found in pkgutil.iter_modules(methods.__path__):
    module = importlib.import_module(f"methods.{found.name}")
    CASES |= getattr(module, "CASES", {})
    LAYERS |= getattr(module, "LAYERS", {})


def build(case, config, rows):
    torch.manual_seed(3)
    model = base(ROOT / "train/models/llama", torch.float32)
    if "build" in case:
        return case["build"](model, config, rows)
    if config["peft_type"] in LAYERS:
        return methods.wrap(model, config, LAYERS[config["peft_type"]])
    keys = {k: v for k, v in config.items() if k != "peft_type"}
    return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](task_type="CAUSAL_LM", **keys))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def state(model, values=None):
    """Name in the file -> tensor; of `values` (by parameter) where they are given."""
    if isinstance(model, PeftModel):
        # What is shared must be there for PEFT to find the rest, and nothing may be left out.
        of = model.peft_config["default"]
        kept, of.rank_pattern = getattr(of, "rank_pattern", None), None
        found = get_peft_model_state_dict(model, state_dict=dict(model.state_dict()) | (values or {}))
        if values is not None:
            own = {id(t) for t in values.values()}
            found = {k: t for k, t in found.items() if id(t) in own}
        of.rank_pattern = kept
    else:
        found, of = {}, {id(p): n for n, p in model.named_parameters()}
        for name, layer in methods.layers(model).items():
            for ending, t in layer.tensors().items():
                if values is None or of.get(id(t)) in values:
                    at = "base_model" if ending in layer.SHARED else f"{PREFIX}{name}"
                    found[f"{at}.{ending}"] = t if values is None else values[of[id(t)]]
    return {k: v.detach().clone().contiguous() for k, v in found.items()}


def merged(model, case):
    """Module -> weight that takes the place of base and adapter, of the first block's targets."""
    if not case.get("merges", True):
        return {}
    if not isinstance(model, PeftModel):
        found = {name: layer.weight().detach() for name, layer in methods.layers(model).items()}
    else:
        names = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "base_layer")]
        plain = copy.deepcopy(model).merge_and_unload()
        found = {n: plain.get_submodule(n).weight.detach() for n in names}
    return {k: v for k, v in found.items() if ".layers.0." in k}


def prepared(model):
    """What a new adapter does to the base and adds to it, of the first block's targets."""
    found = {}
    if isinstance(model, PeftModel):
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                found[name] = (layer.base_layer.weight, layer.get_delta_weight("default"))
    else:
        found = {name: layer.initial() for name, layer in methods.layers(model).items()}
    found = {k: v for k, v in found.items() if ".layers.0." in k}
    return {f"{kind}.{k}": v[i].detach().float().contiguous() for k, v in found.items() for i, kind in enumerate(("base", "delta"))}


def spans(model, case):
    """T' T (T T' of a tall T) of tensors of a new adapter of which only the directions mean anything, of the first block."""
    ends = case.get("spans", {})
    found = {f"{k.removeprefix(PREFIX).removesuffix(end)}{part}": v for k, v in state(model).items() for end, part in ends.items() if k.endswith(end)}
    wide = {k: v.double() if v.shape[0] <= v.shape[1] else v.double().T for k, v in found.items() if ".layers.0." in k}
    return {f"span.{k}": v.T @ v for k, v in wide.items()}


def keep_initial(model, folder):
    """The new adapter as PEFT's users keep it to convert the trained one."""
    config = model.peft_config["default"]
    name = config.init_lora_weights
    config.init_lora_weights = True
    model.save_pretrained(folder)
    config.init_lora_weights = name
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text()) | dict(base_model_name_or_path=None)
    saved["target_modules"] = sorted(saved["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([r["input_ids"]])).logits[0] for r in rows[:2]])


def run(model, rows, case, settings, config):
    """Logits, gradients of the first step, the log of all steps, the adapter after them, merged weights before."""
    hooks = case.get("hooks", lambda config, settings: methods.Hooks())(config, settings)
    model = copy.deepcopy(model)
    out = {"logits": logits(model, rows), "merged": merged(model, case)}
    if case.get("only_run"):
        return out
    grads = {}

    def first(step):
        if step == 0:
            grads.update({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained(model).items()})

    out["log"] = training.train(model, rows, settings, hooks, first)
    out["grads"] = state(model, grads)
    out["after"] = state(model)
    return out


def largest(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make(name, rows, out):
    case = CASES[name]
    config, settings = case["config"], DEFAULTS | dict(steps=STEPS) | case.get("run", {})
    here = out / name
    shutil.rmtree(here, ignore_errors=True)
    (here / "start").mkdir(parents=True)
    model = build(case, config, rows)
    dumps = {}
    if case.get("initial") == "prepared":
        dumps = {} if case.get("spans_alone") else prepared(model)
        dumps |= {"start": logits(copy.deepcopy(model).double(), rows)} | spans(model, case)
        if case.get("keeps_initial"):
            keep_initial(model, here / "start/initial_adapter")
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_((0.0 if case.get("fresh") else case.get("noise", 0.1)) * torch.randn(p.shape, generator=g))
    start = state(model)
    if not case.get("fresh"):
        save_file(start, here / "start/adapter_model.safetensors", {"format": "pt"})
    fields = dict(task_type="CAUSAL_LM", inference_mode=False) | case.get("saved", config)
    if isinstance(model, PeftModel):
        model.save_pretrained(here / "start")
        (here / "start/README.md").unlink(missing_ok=True)
        saved = json.loads((here / "start/adapter_config.json").read_text())
        fields = saved | dict(target_modules=config["target_modules"], base_model_name_or_path=None)
    fields |= case.get("own_keys", {})
    (here / "start/adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    want, again = (run(model.to(dtype), rows, case, settings, config) for dtype in (torch.float64, torch.float32))
    plain = logits(base(ROOT / "train/models/llama", torch.float64), rows)
    effect = largest(plain, want["logits"]) / TOLERANCE
    ok = effect >= 100 or case.get("fresh", False)
    errors = {"logits": largest(again["logits"].double(), want["logits"])}
    notes = [f"adapter {effect:.0f}x"]
    dumps["logits"] = want["logits"]
    dumps |= {f"merged.{k}": v for k, v in want["merged"].items()}
    written = dict(model="llama", initial=case.get("initial", "same"), merges=case.get("merges", True), **settings)
    written |= {"leaves_out": True} if case.get("leaves_out") else {}
    if not case.get("only_run"):
        log, after = want["log"], want["after"]
        changed = norm(after, start)
        errors["loss"] = difference(again["log"], log) / LOSS_TOLERANCE * TOLERANCE
        errors["change"] = norm(again["after"], after) / changed / CHANGE_TOLERANCE * TOLERANCE
        errors["grads"] = max(largest(again["grads"][k].double(), v) for k, v in want["grads"].items() if v.any())
        for what, other_config, other_run in case.get("matters", []):
            torch.manual_seed(3)
            other = build(case, config | other_config, rows)
            load(other, start)
            other = run(other.double(), rows, case, settings | other_run, config | other_config)
            times = difference(other["log"], log) / LOSS_TOLERANCE
            notes.append(f"{what} {times:.0f}x")
            ok &= times >= 100
        dumps |= {f"grad.{k}": v for k, v in want["grads"].items()}
        final = {k: v.float().contiguous() for k, v in after.items() if v.is_floating_point()}
        final = {k: v for k, v in final.items() if not torch.equal(v, start[k].float())}
        save_file(final, here / "final.safetensors", {"format": "pt"})
        written |= log
    ok &= all(e < TOLERANCE / 2 for e in errors.values())
    save_file({k: v.float().contiguous().clone() for k, v in dumps.items()}, here / "dumps.safetensors", {"format": "pt"})
    (here / "case.json").write_text(json.dumps(written) + "\n")
    size = sum(f.stat().st_size for f in here.rglob("*") if f.is_file())
    told = "  ".join(f"{k} {v:.1e}" for k, v in errors.items())
    print(f"{name:16} {size // 1000:3} KB  f32: {told}  {', '.join(notes)}{'' if ok else '   FAILS'}", flush=True)
    return ok


def load(model, tensors):
    """Gives a model the tensors of a fixture that it has."""
    with torch.no_grad():
        if isinstance(model, PeftModel):
            from peft import set_peft_model_state_dict

            own = get_peft_model_state_dict(model)
            set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if k in own})
            return
        for name, layer in methods.layers(model).items():
            for ending, t in layer.tensors().items():
                at = "base_model" if ending in layer.SHARED else f"{PREFIX}{name}"
                t.copy_(tensors[f"{at}.{ending}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "methods")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (ROOT / "train/rows.jsonl").read_text().splitlines()]
    ok = [make(name, rows, args.out) for name in CASES if not args.only or name in args.only]
    if not all(ok):
        raise SystemExit("a case fails")


if __name__ == "__main__":
    main()
