#!/usr/bin/env python3
"""Makes the training fixtures in `tests/fixtures/train/`: tiny sharp models, data that can be learned, and what twenty optimizer
steps of PEFT make of them (of a small PyTorch module of our own for PaCA, which PEFT 0.21 does not have).

Needs torch, transformers, peft and safetensors; no network. Every case is run in float64, which is what is written, and in float32,
which must agree to half of the tolerance. Every case is also run without the feature it is for, which must change the losses by a
hundred times the tolerance: a fixture that cannot fail is no fixture.

    python scripts/make_train_fixtures.py [--out tests/fixtures/train] [--only CASE]
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from methods import Hooks
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

STEPS = 20
LOSS_TOLERANCE = 1e-5  # relative
CHANGE_TOLERANCE = 1e-2  # |ours - reference| / |reference - start|
VOCAB = 61
ALL_LINEAR = "all-linear"

SIZES = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    bos_token_id=1,
    eos_token_id=2,
)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=False))


def mistral():
    # A window shorter than the rows.
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=9, tie_word_embeddings=False))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


MODELS = {"llama": (llama, 31), "mistral": (mistral, 32), "qwen2": (qwen2, 33)}


def randomise(model, seed):
    """Sharp weights: standard deviation 0.2 and more, so that a wrong feature shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=g)
            p.copy_(1.0 + 0.3 * r if "norm" in name else 0.25 * r)


def make_data(path):
    """Rows that follow one fixed successor of each token, now and then another: learnable, and not at once."""
    g = torch.Generator().manual_seed(7)
    successor = torch.randperm(VOCAB - 3, generator=g) + 3
    rows = []
    for k in range(12):
        length = int(torch.randint(5, 18, (1,), generator=g))
        ids = [int(torch.randint(3, VOCAB, (1,), generator=g))]
        while len(ids) < length:
            stray = torch.rand(1, generator=g) < 0.1
            ids.append(int(torch.randint(3, VOCAB, (1,), generator=g)) if stray else int(successor[ids[-1] - 3]))
        # Every third row masks its first half, as a prompt is.
        masked = length // 2 if k % 3 == 0 else 0
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


# ---- PaCA, on its own ---------------------------------------------------------------------------------------------


class Paca(torch.nn.Module):
    """A linear layer of which `indices` columns get `scale * delta` added; nothing else is trained."""

    def __init__(self, base, indices, delta, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("paca_indices", indices)
        self.paca_delta = torch.nn.Parameter(delta)

    def forward(self, x):
        columns = self.base.weight[:, self.paca_indices] + self.scale * self.paca_delta
        return F.linear(x, self.base.weight.index_copy(1, self.paca_indices, columns), self.base.bias)


def with_paca(model, config, tensors, scale=None):
    """The model with PaCA layers at all linear layers but the head; values from `tensors`, or new ones."""
    g = torch.Generator().manual_seed(5)
    scale = config["paca_alpha"] / config["r"] if scale is None else scale
    for p in model.parameters():
        p.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        key = f"base_model.model.{name}."
        if tensors is None:
            indices = torch.randperm(module.in_features, generator=g)[: config["r"]].sort().values
            delta = torch.zeros(module.out_features, config["r"])
        else:
            indices, delta = tensors[key + "paca_indices"], tensors[key + "paca_delta"]
        parent, _, leaf = name.rpartition(".")
        layer = Paca(module, indices, delta.to(module.weight.dtype), scale)
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def paca_state(model):
    found = {n: m for n, m in model.named_modules() if isinstance(m, Paca)}
    state = {f"base_model.model.{n}.paca_delta": m.paca_delta.detach() for n, m in found.items()}
    return state | {f"base_model.model.{n}.paca_indices": m.paca_indices for n, m in found.items()}


# ---- training -----------------------------------------------------------------------------------------------------


def train(model, rows, run, hooks=None, looked=None):
    """Steps of AdamW; the loss of a step is the mean over all counted tokens of its micro-batches. `hooks` (scripts/methods) change
    what happens between steps, `looked(step)` sees every step's gradients."""
    hooks = hooks or Hooks()
    steps = run.get("steps", STEPS)
    optimizer = hooks.optimizer(hooks.groups(model, run["lr"], run["weight_decay"]), lr=run["lr"])
    trained = [p for p in model.parameters() if p.requires_grad]
    scheduler = transformers.get_scheduler(
        run["schedule"], optimizer, num_warmup_steps=run["warmup"], num_training_steps=steps
    )
    at, log = 0, {"losses": [], "grad_norms": [], "lrs": [], "tokens": []}
    for i in range(steps):
        hooks.before_step(model, i)
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
        more = hooks.loss(model)
        if more is not None:
            more.backward()
            total += more.item()
        if looked:
            looked(i)
        hooks.after_backward(model, i)
        limit = run["max_grad_norm"] or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        log["losses"].append(total)
        log["grad_norms"].append(norm.item())
        # The first group's; others follow by a constant factor.
        log["lrs"].append(scheduler.get_last_lr()[0])
        log["tokens"].append(sum(len(r["input_ids"]) for r in step))
        optimizer.step()
        hooks.after_step(model, i, scheduler.get_last_lr()[0])
        scheduler.step()
        optimizer.zero_grad()
    return log


DEFAULTS = dict(batch=2, accum=1, lr=5e-3, schedule="constant", warmup=0, weight_decay=0.0, max_grad_norm=None)
ODD = dict(accum=3, schedule="cosine", warmup=4, weight_decay=0.1, max_grad_norm=0.5)


def lora(**keys):
    return dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=ALL_LINEAR) | keys


# name: (model, configuration, run, [what must matter: (name, changed configuration, changed run)])
NO_ACCUM, NO_WARMUP, NO_CLIP, NO_DECAY = ("accum", {}, {"accum": 1}), ("warmup", {}, {"warmup": 0}), (
    "clipping",
    {},
    {"max_grad_norm": None},
), ("weight decay", {}, {"weight_decay": 0.0})
CASES = {
    "llama-lora": ("llama", lora(), {}, [("alpha", {"lora_alpha": 9}, {})]),
    "llama-lora-odd": ("llama", lora(), ODD, [NO_ACCUM, NO_WARMUP, NO_CLIP, NO_DECAY]),
    "llama-rslora": ("llama", lora(use_rslora=True), {}, [("rsLoRA", {"use_rslora": False}, {})]),
    "llama-dora": (
        "llama",
        lora(use_dora=True, init_lora_weights=False),
        {},
        [("DoRA", {"use_dora": False}, {})],
    ),
    "llama-save": (
        "llama",
        lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "model.norm"]),
        {},
        [("modules_to_save", {"modules_to_save": None}, {})],
    ),
    "llama-ends": (
        "llama",
        lora(target_modules=["embed_tokens", "lm_head", "down_proj"], init_lora_weights=False),
        {},
        [("the embedding", {"target_modules": ["lm_head", "down_proj"]}, {})],
    ),
    "llama-full": (
        "llama",
        dict(
            peft_type="LORA",
            target_modules="dummy-target-modules",
            modules_to_save=["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.input_layernorm"],
        ),
        dict(lr=2e-3),
        [("a module", {"modules_to_save": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"]}, {})],
    ),
    "mistral-lora": (
        "mistral",
        lora(rank_pattern={"down_proj": 6}, alpha_pattern={"q_proj": 3}),
        dict(schedule="linear", warmup=3),
        [("alpha_pattern", {"alpha_pattern": {}}, {}), NO_WARMUP],
    ),
    "mistral-dora": (
        "mistral",
        lora(use_dora=True, use_rslora=True),
        dict(max_grad_norm=0.4),
        [("DoRA", {"use_dora": False}, {}), NO_CLIP],
    ),
    "qwen2-lora": ("qwen2", lora(), ODD, [NO_ACCUM, NO_WARMUP, NO_CLIP, NO_DECAY]),
    "qwen2-bias": (
        "qwen2",
        lora(target_modules=["q_proj", "down_proj"], bias="all"),
        {},
        [("bias", {"bias": "none"}, {})],
    ),
    "qwen2-bias-targets": (
        "qwen2",
        lora(target_modules=["v_proj", "o_proj"], bias="lora_only"),
        {},
        [("bias", {"bias": "none"}, {})],
    ),
    "qwen2-save": (
        "qwen2",
        lora(target_modules=["v_proj"], modules_to_save=["lm_head"]),
        dict(weight_decay=0.1),
        [("modules_to_save", {"modules_to_save": None}, {})],
    ),
    "qwen2-dora": (
        "qwen2",
        lora(use_dora=True, target_modules=["q_proj", "k_proj", "up_proj"], init_lora_weights=False),
        {},
        [("DoRA", {"use_dora": False}, {})],
    ),
}
PACA = dict(peft_type="PACA", r=4, paca_alpha=6, target_modules=ALL_LINEAR)
for family, run in (("llama", {}), ("mistral", dict(max_grad_norm=0.3)), ("qwen2", ODD)):
    odd = run is ODD
    run = run | {"weight_decay": 0.3} if odd else run
    checks = [NO_ACCUM, NO_WARMUP, NO_CLIP, NO_DECAY] if odd else [NO_CLIP] * bool(run)
    CASES[f"{family}-paca"] = (family, PACA, run, [("scale", {"paca_alpha": 7}, {}), *checks])


def base(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def start(folder, config, out):
    """A new adapter, written as PEFT writes it."""
    torch.manual_seed(3)
    model = base(folder, torch.float32)
    out.mkdir(parents=True)
    if config["peft_type"] == "PACA":
        # Not from zero: the first step would show nothing of the columns.
        state = paca_state(with_paca(model, config, None))
        g = torch.Generator().manual_seed(6)
        state = {k: 0.1 * torch.randn(v.shape, generator=g) if "delta" in k else v for k, v in state.items()}
        save_file({k: v.contiguous() for k, v in state.items()}, out / "adapter_model.safetensors", {"format": "pt"})
        fields = dict(task_type="CAUSAL_LM", init_weights=True, inference_mode=False) | config
        (out / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        return
    keys = {k: v for k, v in config.items() if k != "peft_type"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    fields = json.loads(path.read_text())
    # Given as it was, and without the folder of this run.
    fields |= {"target_modules": config["target_modules"], "base_model_name_or_path": None}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def adapted(folder, source, config, dtype):
    """The base with the adapter of `source` and, where `config` differs, with that difference."""
    model = base(folder, torch.float32)
    tensors = load_file(source / "adapter_model.safetensors")
    if config["peft_type"] == "PACA":
        return with_paca(model.to(dtype), config, tensors)
    torch.manual_seed(3)
    keys = {k: v for k, v in config.items() if k != "peft_type"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
    own = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if k in own})
    return model.to(dtype)


def state(model):
    found = paca_state(model) if any(isinstance(m, Paca) for m in model.modules()) else get_peft_model_state_dict(model)
    return {k: v.detach().clone() for k, v in found.items()}


def difference(a, b, key="losses"):
    return max(abs(x - y) / abs(y) for x, y in zip(a[key], b[key]))


def norm(a, b):
    """The distance of two adapters, over all floats of both."""
    keys = [k for k in a if a[k].is_floating_point()]
    return sum(((a[k].double() - b[k].double()) ** 2).sum() for k in keys).sqrt().item()


def make(name, models, rows, out):
    family, config, run, matters = CASES[name]
    run = DEFAULTS | run
    folder, here = models / family, out / name
    shutil.rmtree(here, ignore_errors=True)
    start(folder, config, here / "start")
    results = {}
    for dtype in (torch.float64, torch.float32):
        model = adapted(folder, here / "start", config, dtype)
        before = state(model)
        results[dtype] = (train(model, rows, run), state(model))
    (log, after), (log32, after32) = results[torch.float64], results[torch.float32]
    changed = norm(after, before)
    loss32, change32 = difference(log32, log), norm(after32, after) / changed
    ok = loss32 < LOSS_TOLERANCE / 2 and change32 < CHANGE_TOLERANCE / 2 and log["losses"][-1] < log["losses"][0]
    notes = []
    for what, other_config, other_run in matters:
        other = train(adapted(folder, here / "start", config | other_config, torch.float64), rows, run | other_run)
        effect = difference(other, log) / LOSS_TOLERANCE
        notes.append(f"{what} {effect:.0f}x")
        ok &= effect >= 100
    print(
        f"{name:20} loss {log['losses'][0]:.3f} -> {log['losses'][-1]:.3f}  f32 against f64: loss {loss32:.1e}, "
        f"change {change32:.1e}  without {', '.join(notes)}{'' if ok else '   FAILS'}"
    )
    trained = {k: v.float().contiguous() if v.is_floating_point() else v for k, v in after.items()}
    # What did not move is the start's.
    trained = {k: v for k, v in trained.items() if v.is_floating_point() and not torch.equal(v, before[k].float())}
    save_file(trained, here / "final.safetensors", {"format": "pt"})
    case = dict(model=family, steps=STEPS, **run, **{k: v for k, v in log.items()})
    (here / "case.json").write_text(json.dumps(case) + "\n")
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests/fixtures/train")
    parser.add_argument("--only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = make_data(args.out / "rows.jsonl")
    models = args.out / "models"
    for name, (build, seed) in MODELS.items():
        torch.manual_seed(seed)
        model = build()
        randomise(model, seed)
        model.save_pretrained(models / name)
        (models / name / "generation_config.json").unlink(missing_ok=True)
    ok = [make(name, models, rows, args.out) for name in CASES if args.only in (None, name)]
    if not all(ok):
        raise SystemExit("a case fails")


if __name__ == "__main__":
    main()
