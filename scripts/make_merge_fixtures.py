#!/usr/bin/env python3
"""Makes `tests/fixtures/merge/`: two LoRA adapters of the tiny Llama of `tests/fixtures/train`, and what PEFT's
`add_weighted_adapter` makes of them: the factors, or their product where only that is determined (svd). LEGO (Zhao et al. 2024), which
PEFT does not have, is the reference below.

    python scripts/make_merge_fixtures.py
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent / "tests/fixtures"
OUT = ROOT / "merge"
WEIGHTS, DENSITY = [0.7, -0.4], 0.45
ADAPTERS = {"a": dict(lora_alpha=8, target_modules=["q_proj", "v_proj"]), "b": dict(lora_alpha=3, target_modules=["q_proj", "down_proj"])}


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "train/models/llama", dtype=torch.float32)


def lego(parts, k, reweight):
    """The product of k groups of ranks: k-means from centres that lie far apart. `parts`: A, B, factor of each adapter."""
    units = []
    for a, b, factor in parts:
        root = abs(factor) ** 0.5
        sign = -1 if factor < 0 else 1
        units += [torch.cat([root * sign * a[i], root * b[:, i]]) for i in range(len(a))]
    units = torch.stack(units).double()
    k, inner = min(k, len(units)), parts[0][0].shape[1]
    chosen = [units.norm(dim=1).argmax()]
    while len(chosen) < k:
        chosen.append(torch.cdist(units, units[torch.stack(chosen)]).min(1).values.argmax())
    centres, group = units[torch.stack(chosen)], None
    while True:
        nearest = torch.cdist(units, centres).argmin(1)
        if group is not None and torch.equal(nearest, group):
            break
        group = nearest
        centres = torch.stack([units[group == g].mean(0) for g in range(k)])
    if reweight:
        # Means as long as their units are; the whole as large as one adapter's output.
        lengths = torch.stack([units[group == g].norm(dim=1).mean() for g in range(k)])
        centres = centres * (lengths / centres.norm(dim=1)).unsqueeze(1) * (len(units) / len(parts) / k) ** 0.25
    return (centres[:, inner:].T @ centres[:, :inner]).float()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, keys) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **keys))
        model.save_pretrained(OUT / name)
        (OUT / name / "README.md").unlink()
        path = OUT / name / "adapter_config.json"
        fields = json.loads(path.read_text()) | {"base_model_name_or_path": None, "target_modules": keys["target_modules"]}
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    model = PeftModel.from_pretrained(base(), OUT / "a", adapter_name="a")
    model.load_adapter(OUT / "b", adapter_name="b")
    expected = {}
    for kind in ("linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear", "dare_ties"):
        # What dare drops is drawn from torch's generator: with nothing dropped the rest of it is compared.
        density = 1.0 if kind.startswith("dare") else DENSITY
        model.add_weighted_adapter(["a", "b"], WEIGHTS, kind, combination_type=kind, density=density)
        for name, m in model.named_modules():
            if getattr(m, "lora_A", None) is None or kind not in m.lora_A:
                continue
            name = name.removeprefix("base_model.model.")
            a, b = m.lora_A[kind].weight.detach(), m.lora_B[kind].weight.detach()
            if kind.endswith("svd"):
                expected[f"{kind}.{name}"] = b @ a
            else:
                expected[f"{kind}.{name}.lora_A"], expected[f"{kind}.{name}.lora_B"] = a, b
    for name, m in model.named_modules():
        of = [x for x in ("a", "b") if getattr(m, "lora_A", None) is not None and x in m.lora_A]
        if not of:
            continue
        factor = {x: WEIGHTS["ab".index(x)] * m.scaling[x] for x in of}
        parts = [(m.lora_A[x].weight.detach(), m.lora_B[x].weight.detach(), factor[x]) for x in of]
        for kind in ("lego", "lego_plain"):
            expected[f"{kind}.{name.removeprefix('base_model.model.')}"] = lego(parts, 4, kind == "lego")
    save_file({k: v.contiguous() for k, v in expected.items()}, OUT / "expected.safetensors")
    (OUT / "case.json").write_text(json.dumps({"weights": WEIGHTS, "density": DENSITY}) + "\n")


if __name__ == "__main__":
    main()
