"""Methods that prepare their first values from weights or data. PEFT has most; LoLDU (Shi et al. 2024) and LoRA-SB (Ponkshe et al. 2024) are
written from their papers and their authors' code.

Calibration looks at the first two batches of two rows, `own_keys` says so."""

import dataclasses
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F

from . import Hooks, Reference

if importlib.util.find_spec("attr") is None:
    # PEFT's CorDA takes its dataclass from there, and nothing else.
    sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)

TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCHES, ROWS = 2, 2


def of(**keys):
    return dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=TARGETS) | keys


def peft_config(config):
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in config.items() if k != "peft_type"})


def forward(model, row):
    return model(input_ids=torch.tensor([row["input_ids"]])).logits[0]


def calibrated(rows):
    return rows[: BATCHES * ROWS]


def corda(model, config, rows):
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    lora = peft_config(config | dict(corda_config=CordaConfig(**config["corda_config"])))
    if config["init_lora_weights"] == "corda":
        preprocess_corda(model, lora, run_model=lambda: [forward(model, r) for r in calibrated(rows)])
    return get_peft_model(model, lora)


def gradients(model, modules, rows):
    """Mean over the batches of the gradient of the batch's mean loss."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.removesuffix(".weight") in modules)
    for at in range(0, BATCHES * ROWS, ROWS):
        batch = rows[at : at + ROWS]
        counted = sum(sum(label != -100 for label in r["labels"][1:]) for r in batch)
        for r in batch:
            loss = F.cross_entropy(forward(model, r)[:-1], torch.tensor(r["labels"][1:]), reduction="sum")
            (loss / counted / BATCHES).backward()
    found = {m: model.get_submodule(m).weight.grad.clone() for m in modules}
    model.zero_grad()
    return found


def targets(model, config):
    linear = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return [n for n in linear if n.split(".")[-1] in config["target_modules"]]


def lora_ga(model, config, rows):
    from peft import get_peft_model
    from peft.tuners.lora.config import LoraGAConfig

    if config["init_lora_weights"] == "lora_ga":
        for name, g in gradients(model, targets(model, config), rows).items():
            # Where preprocess_loraga puts its own, which counts batches as calls of every module.
            model.get_submodule(name)._peft_loraga_grad = g
    return get_peft_model(model, peft_config(config | dict(lora_ga_config=LoraGAConfig(**config["lora_ga_config"]))))


def eva(model, config, rows):
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    lora = peft_config(config | dict(eva_config=EvaConfig(**config["eva_config"])))
    model = get_peft_model(model, lora)
    rows = calibrated(rows)
    longest = max(len(r["input_ids"]) for r in rows)
    pad = lambda key, value: torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])
    batch = dict(
        input_ids=pad("input_ids", 0),
        labels=pad("labels", -100),
        attention_mask=torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]),
    )
    if config["init_lora_weights"] == "eva":
        initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model


class KasaLoss(Hooks):
    def loss(self, model):
        loss = model.base_model._get_kasa_loss()
        return loss if torch.is_tensor(loss) else None


PLAIN = ("changed base", {"init_lora_weights": True}, {})
# Which of two signs a pair of singular vectors has is anyone's choice, and here they come from different pairs.
SPANS = {".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B"}
GA = dict(direction="ArB2r", scale="stable", stable_gamma=16)
CASES = {
    "pissa": dict(config=of(init_lora_weights="pissa"), matters=[PLAIN], initial="prepared"),
    "pissa-niter": dict(config=of(init_lora_weights="pissa_niter_800"), matters=[PLAIN], initial="prepared"),
    "pissa-rslora": dict(config=of(init_lora_weights="pissa", use_rslora=True), matters=[PLAIN], initial="prepared"),
    "olora": dict(config=of(init_lora_weights="olora"), matters=[PLAIN], initial="prepared"),
    "corda": dict(
        config=of(init_lora_weights="corda", corda_config=dict(corda_method="ipm")),
        build=corda,
        matters=[PLAIN],
        initial="prepared",
        keeps_initial=True,
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "corda-kpm": dict(
        config=of(init_lora_weights="corda", corda_config=dict(corda_method="kpm")),
        build=corda,
        initial="prepared",
        keeps_initial=True,
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "lora-ga": dict(
        config=of(init_lora_weights="lora_ga", r=8, lora_ga_config=GA),
        build=lora_ga,
        spans=SPANS,
        spans_alone=True,
        matters=[PLAIN],
        initial="prepared",
        keeps_initial=True,
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "lora-ga-unit": dict(
        config=of(init_lora_weights="lora_ga", r=8, lora_ga_config=GA | dict(direction="ArBr", scale="unit")),
        build=lora_ga,
        spans=SPANS,
        spans_alone=True,
        initial="prepared",
        keeps_initial=True,
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "lora-ga-gd": dict(
        config=of(init_lora_weights="lora_ga", r=8, lora_ga_config=GA | dict(direction="A2rBr", scale="gd_scale")),
        build=lora_ga,
        spans=SPANS,
        spans_alone=True,
        initial="prepared",
        keeps_initial=True,
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "eva": dict(
        config=of(init_lora_weights="eva", r=16, target_modules=["q_proj", "v_proj"], eva_config=dict(rho=1.0)),
        build=eva,
        initial="prepared",
        spans={".lora_A.weight": ".lora_A"},
        own_keys=dict(calibration_batches=BATCHES),
    ),
    "kasa": dict(
        config=of(kasa_config=dict(beta=0.01, gamma=0.02)),
        hooks=KasaLoss(),
        matters=[("beta", {"kasa_config": dict(beta=0.02, gamma=0.02)}, {}), ("gamma", {"kasa_config": dict(beta=0.01, gamma=0.0)}, {})],
        initial="prepared",
    ),
    "loldu": dict(config=dict(peft_type="LOLDU", r=4, lora_alpha=4, target_modules=TARGETS), initial="prepared"),
    "loldu-scale": dict(config=dict(peft_type="LOLDU", r=6, lora_alpha=9, target_modules=TARGETS), initial="prepared"),
}


class Loldu(Reference):
    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        p, l, u = torch.linalg.lu(base.weight.detach())
        d, r = torch.diagonal(u), self.rank
        self.first = config["lora_alpha"] / r, d[:r].clone()
        self.factors = (p @ l)[:, :r], (u[: d.numel()] / d[:, None])[:r]
        self.vector_z = torch.nn.Parameter(d[:r].clone())
        self.scaling_factor = torch.nn.Parameter(torch.tensor(self.first[0]))

    def branch(self, scale, z):
        left, right = (t.to(z.dtype) for t in self.factors)
        return scale * left @ torch.diag(z) @ right

    def initial(self):
        lost = self.branch(self.first[0], self.first[1])
        return self.base.weight, torch.zeros_like(lost)

    def weight(self):
        z = self.first[1].to(self.vector_z.dtype)
        return self.base.weight - self.branch(self.first[0], z) + self.branch(self.scaling_factor, self.vector_z)


class LoraSb(Reference):
    FILES = {"a": "lora_A.weight", "b": "lora_B.weight"}

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        r, self.scale = self.rank, config["lora_alpha"] / self.rank
        u, s, vh = torch.linalg.svd(-config["initial_step"] * torch.sign(config["gradients"][name]), full_matrices=False)
        self.register_buffer("a", vh[:r].contiguous())
        self.register_buffer("b", u[:, :r].contiguous())
        self.lora_R = torch.nn.Parameter(torch.diag(s[:r]) / self.scale)

    def initial(self):
        return self.base.weight, self.scale * self.b @ self.lora_R @ self.a

    def weight(self):
        return self.base.weight + self.scale * self.b @ self.lora_R @ self.a


def lora_sb(model, config, rows):
    from make_method_fixtures import wrap

    found = gradients(model, targets(model, config), rows)
    return wrap(model, config | dict(gradients=found))


CASES["lora-sb"] = dict(
    config=dict(peft_type="LORA_SB", r=4, lora_alpha=8, initial_step=0.05, target_modules=TARGETS),
    build=lora_sb,
    initial="prepared",
    own_keys=dict(calibration_batches=BATCHES),
)
LAYERS = {"LOLDU": Loldu, "LORA_SB": LoraSb}
