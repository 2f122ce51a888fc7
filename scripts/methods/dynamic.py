"""Methods whose ranks come and go while they train, and methods with penalties, thresholds or draws. References from the authors' code,
which is named at each."""

import copy
import math
import tempfile

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, PeftModel, get_peft_model

from . import Hooks, Reference, generator, layers, wrap

TARGETS = ["q_proj", "v_proj", "down_proj"]


def of(kind, **keys):
    return dict(peft_type=kind, target_modules=TARGETS) | keys


class LowRank(Reference):
    """W + scale · B · diag(m) · A."""

    FILES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        g, r, n, m = generator(name, config), self.rank, base.in_features, base.out_features
        self.lora_A = torch.nn.Parameter(torch.randn(r, n, generator=g) / n**0.5)
        self.lora_B = torch.nn.Parameter(torch.randn(m, r, generator=g) / r**0.5)
        self.scale = config.get("lora_alpha", r) / r

    def middle(self):
        return 1.0

    def weight(self):
        return self.base.weight + self.scale * (self.lora_B * self.middle()) @ self.lora_A


class Gated(LowRank):
    """SoRA (repository TsinghuaC3I/SoRA, src/lora.py) and CoDyRA (Artificer-AI-Lab/CoDyRA, loralib/codyra.py)."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        self.lora_gate = torch.nn.Parameter(torch.randn(self.rank, generator=generator(name + "gate", config)))

    def middle(self):
        return self.lora_gate


class GatedHooks(Hooks):
    def __init__(self, config, settings):
        sora, self.steps = config["peft_type"] == "SORA", settings["steps"]
        self.penalty = config.get("sparse_lambda", 10.0) if sora else 0.0
        self.dense = 0 if sora else math.ceil(config.get("dense_iters", 0.5) * self.steps)
        first = config.get("sparse_lambda_2", 3e-4) if sora else 0.0
        last = config.get("max_lambda", first) if sora else config.get("max_kappa", 7e-4)
        parts = config["lambda_num"] if not sora or config.get("lambda_schedule") == "linear" else 1
        self.thresholds = [first + (last - first) * i / max(parts - 1, 1) for i in range(parts)]

    def groups(self, model, lr, decay):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        gates = [p for n, p in named if n.endswith("lora_gate")]
        others = [p for n, p in named if not n.endswith("lora_gate")]
        return [dict(params=others, lr=lr, weight_decay=decay), dict(params=gates, lr=lr, weight_decay=0.0)]

    def loss(self, model):
        gates = [m.lora_gate for m in layers(model).values()]
        return self.penalty * sum(g.abs().sum() for g in gates) / sum(g.numel() for g in gates) if self.penalty else None

    def after_step(self, model, step, lr):
        if step < self.dense:
            return
        part = min((step - self.dense) * len(self.thresholds) // (self.steps - self.dense), len(self.thresholds) - 1)
        with torch.no_grad():
            for m in layers(model).values():
                m.lora_gate.copy_(F.softshrink(m.lora_gate, self.thresholds[part]))


class AdaLora(Hooks):
    """PEFT's own penalty and allocation, as its documentation has them called."""

    def __init__(self, config, settings):
        self.penalty = config.get("orth_reg_weight", 0.5)

    def loss(self, model):
        off = []
        for n, p in model.named_parameters():
            if "lora_A" in n or "lora_B" in n:
                gram = p @ p.T if "lora_A" in n else p.T @ p
                off.append(torch.norm(gram - torch.eye(len(gram), dtype=p.dtype), p="fro"))
        return self.penalty * sum(off) / len(off)

    def after_step(self, model, step, lr):
        model.base_model.update_and_allocate(step)


def pruned(model, config, rows):
    """An adapter of which PEFT saved some ranks only."""
    keys = {k: v for k, v in config.items() if k != "peft_type"}
    make = lambda: AdaLoraConfig(task_type="CAUSAL_LM", **keys)
    whole = get_peft_model(copy.deepcopy(model), make())
    names = [n for n, _ in whole.named_parameters() if "lora_E" in n]
    flags = [[(i + j) % 3 != 0 for j in range(config["init_r"])] for i in range(len(names))]
    flags[1] = [False] * config["init_r"]
    names = [n.removeprefix("base_model.model.").replace(".default", "") for n in names]
    whole.peft_config["default"].rank_pattern = dict(zip(names, flags))
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def draw(name, seed, at):
    """A number in [0, 1) that depends on these alone: FNV-1a and the finalizer of splitmix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    x = 0xCBF29CE484222325
    for byte in name.encode():
        x = (x ^ byte) * 0x100000001B3 & mask
    for word in (seed, at):
        x = (x ^ word) + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return (x >> 11) / (1 << 53)


class DyLora(LowRank):
    """Repository huawei-noah/KD-NLP: both factors cut to b ranks and multiplied by √(r / b)."""

    drawn = None

    def weight(self):
        b, a, up = self.drawn or self.rank, self.lora_A, self.lora_B
        if self.drawn and self.config.get("dylora_frozen"):
            a = torch.cat([a[: b - 1].detach(), a[b - 1 :]])
            up = torch.cat([up[:, : b - 1].detach(), up[:, b - 1 :]], dim=1)
        more = (self.rank / b) ** 0.5
        return self.base.weight + self.scale * (more * up[:, :b]) @ (more * a[:b])


class DyLoraHooks(Hooks):
    def __init__(self, config, settings):
        self.least, self.most = config.get("dylora_min_r", 1), config["r"]

    def before_step(self, model, step):
        drawn = self.least + int(draw("rank", 0, step) * (self.most + 1 - self.least))
        for m in layers(model).values():
            m.drawn = drawn


class S2Lora(LowRank):
    """From the paper's abstract: factors in common, factors of ranks per layer, an L1 penalty."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        self.s2_lora_s = torch.nn.Parameter(torch.ones(self.rank))
        self.shape = f"{base.out_features}x{base.in_features}"
        self.SHARED = (f"{self.shape}.s2_lora_A", f"{self.shape}.s2_lora_B")

    @classmethod
    def tie(cls, layers):
        first = {}
        for m in layers:
            one = first.setdefault(m.shape, m)
            m.lora_A, m.lora_B = one.lora_A, one.lora_B

    def tensors(self):
        return dict(zip(self.SHARED, (self.lora_A, self.lora_B))) | {"s2_lora_s": self.s2_lora_s}

    def middle(self):
        return self.s2_lora_s


class S2LoraHooks(Hooks):
    def __init__(self, config, settings):
        self.penalty = config.get("l1_weight", 1e-4)

    def loss(self, model):
        return self.penalty * sum(m.s2_lora_s.abs().sum() for m in layers(model).values())


class AgedAdamW(torch.optim.AdamW):
    """AdamW whose bias corrections count the steps since an element came into use, as of parameters that an optimizer is given later;
    `p.age` holds them, 0 for elements that are not in use."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                s = self.state[p]
                s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * p.grad
                s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * p.grad**2
                age = p.age.clamp(min=1).to(p.dtype)
                p.mul_(1 - lr * group["weight_decay"] * (p.age > 0))
                p.sub_(lr * s["m"] / (1 - b1**age) / ((s["v"] / (1 - b2**age)).sqrt() + group["eps"]))


class TriAdapt(Reference):
    """File triadaptlora.py of the authors' copy of PEFT, with room for all ranks and a mask in place of lists of blocks."""

    FILES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        g, r, n, m = generator(name, config), self.rank, base.in_features, base.out_features
        self.first, self.block = config.get("init_rank", 1), config["incre_rank_num"]
        self.lora_A = torch.nn.Parameter(0.02 * torch.randn(r, n, generator=g))
        self.lora_B = torch.nn.Parameter(torch.zeros(m, r))
        self.lora_C_row = torch.nn.Parameter(0.02 * torch.randn(r, r, generator=g))
        self.lora_C_col = torch.nn.Parameter(torch.zeros(r, r))
        self.register_buffer("rank_used", (torch.arange(r) < self.first).float())
        self.alpha = config["lora_alpha"]

    def blocks(self):
        return [0 if i < self.first else 1 + (i - self.first) // self.block for i in range(self.rank)]

    def middle(self):
        b = torch.tensor(self.blocks())
        lower, upper = b[:, None] >= b[None, :], b[:, None] <= b[None, :]
        return (self.lora_C_row * lower + self.lora_C_col * upper) * torch.outer(self.rank_used, self.rank_used)

    def norm(self):
        return self.middle().norm().item() / (self.blocks()[int(self.rank_used.sum()) - 1] + 1)

    def weight(self):
        return self.base.weight + self.alpha / (self.rank_used.sum() + 1e-5) * self.lora_B @ self.middle() @ self.lora_A


class TriAdaptHooks(Hooks):
    def __init__(self, config, settings):
        self.config, self.total, self.ages, self.before = config, config.get("total_step", settings["steps"]), {}, {}

    def optimizer(self, groups, **keys):
        return AgedAdamW(groups, **keys)

    def loss(self, model):
        off = []
        for m in layers(model).values():
            a, b, eye = m.lora_A * m.rank_used[:, None], m.lora_B * m.rank_used, torch.diag(m.rank_used)
            off += [(a @ a.T - eye).norm(), (b.T @ b - eye).norm()]
        return self.config.get("orth_reg_weight", 0.5) * sum(off) / len(off)

    def before_step(self, model, step):
        for name, m in layers(model).items():
            self.ages[name] = self.ages.get(name, 0) + m.rank_used
            self.before.setdefault(name, 0.0)
            m.lora_A.age = m.lora_C_row.age = self.ages[name][:, None]
            m.lora_B.age = m.lora_C_col.age = self.ages[name][None, :]

    def after_step(self, model, step, lr):
        found = layers(model)
        missing = self.config["reference_rank"] * len(found) - int(sum(m.rank_used.sum() for m in found.values()))
        if missing <= 0 or step == 0 or step % self.config["incre_interval"]:
            return
        way = step / self.total
        count = missing * way if self.config.get("rank_growth_model") != "non-linear" else math.exp(way * math.log(missing))
        norms = {n: m.norm() for n, m in found.items()}
        scores = {n: norms[n] - self.before[n] for n in found}
        limit = sorted(scores.values(), reverse=True)[min(max(int(count), 1), len(found)) - 1]
        self.before = norms
        for n, m in found.items():
            if scores[n] >= limit:
                m.rank_used[: int(m.rank_used.sum()) + m.block] = 1


class IncreLora(LowRank):
    """Repository FeiyuZhang98/IncreLoRA, loralib/loralib/increlora.py, with room for all ranks and masks in place of lists."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        self.lora_E = torch.nn.Parameter(torch.zeros(self.rank))
        self.register_buffer("rank_used", (torch.arange(self.rank) < config.get("init_rank", 1)).float())
        self.ready, self.deltas = torch.zeros(self.rank), []
        self.alpha = config["lora_alpha"]

    def weight(self):
        middle = self.lora_E * self.rank_used + 1e-5 * self.ready
        delta = self.alpha / (self.rank_used.sum() + 1e-5) * (self.lora_B * middle) @ self.lora_A
        if delta.requires_grad:
            delta.retain_grad()
            self.deltas.append(delta)
        return self.base.weight + delta


class IncreLoraHooks(Hooks):
    def __init__(self, config, settings):
        self.config = config

    def optimizer(self, groups, **keys):
        return AgedAdamW(groups, **keys)

    def loss(self, model):
        off = []
        for m in layers(model).values():
            mask = (m.rank_used + m.ready).to(m.lora_A.dtype)
            a, b, eye = m.lora_A * mask[:, None], m.lora_B * mask, torch.diag(mask)
            off += [(a @ a.T - eye).norm(), (b.T @ b - eye).norm()]
        return self.config.get("orth_reg_weight", 0.1) * sum(off) / len(off)

    def before_step(self, model, step):
        for m in layers(model).values():
            m.deltas = []
            m.age = getattr(m, "age", 0) + m.rank_used
            m.factor_age = getattr(m, "factor_age", 0) + m.rank_used + m.ready
            m.lora_A.age, m.lora_B.age, m.lora_E.age = m.factor_age[:, None], m.factor_age[None, :], m.age

    def after_backward(self, model, step):
        beta1, beta2 = self.config.get("beta1", 0.85), self.config.get("beta2", 0.85)
        for m in layers(model).values():
            score = (m.deltas[0].detach() * sum(d.grad for d in m.deltas)).abs().sum() / m.base.weight.numel() ** 0.5
            m.importance = beta1 * getattr(m, "importance", 0) + (1 - beta1) * score
            m.uncertainty = beta2 * getattr(m, "uncertainty", 0) + (1 - beta2) * (score - m.importance).abs()

    def after_step(self, model, step, lr):
        found, more = list(layers(model).values()), self.config["incre_rank_num"]
        wanted, total = self.config["target_rank"] * len(found), int(sum(m.rank_used.sum() for m in found))
        grows = total < wanted and step > 0 and step % self.config["incre_interval"] == 0
        if not grows and step > 0:
            return
        if grows:
            scores = [(m.importance * m.uncertainty).item() for m in found]
            limit = sorted(scores, reverse=True)[min(self.config["top_h"], wanted - total) - 1]
            for m, score in zip(found, scores):
                if score >= limit:
                    n = int(m.rank_used.sum())
                    m.rank_used[n : n + more] = 1
                    m.lora_E.data[n : n + more] = 1e-5
        done = sum(m.rank_used.sum() for m in found) >= wanted
        for m in found:
            n = int(m.rank_used.sum())
            m.ready = torch.zeros(m.rank)
            m.ready[n : n if done else n + more] = 1


class LtSft(Reference):
    """W + D, of which a mask says what is trained."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        self.sft_values = torch.nn.Parameter(torch.zeros_like(base.weight))
        self.cells = torch.ones(())

    def weight(self):
        return self.base.weight + self.cells * self.sft_values


class LtSftHooks(Hooks):
    """Repository cambridgeltl/composable-sft, src/sft/lt_sft.py."""

    def __init__(self, config, settings):
        self.full = config.get("full_ft_steps", settings["steps"] // 2)
        self.part = config.get("ft_params_proportion", 0.02)

    def optimizer(self, groups, **keys):
        self.of = super().optimizer(groups, **keys)
        return self.of

    def before_step(self, model, step):
        if step != self.full:
            return
        found = list(layers(model).values())
        moved = torch.cat([m.sft_values.detach().abs().flatten() for m in found])
        limit = moved.sort(descending=True).values[int(self.part * len(moved)) - 1]
        with torch.no_grad():
            for m in found:
                m.cells = (m.sft_values.abs() >= limit).to(m.sft_values.dtype)
                m.sft_values.zero_()
        self.of.state.clear()


class LtSftChosen(Reference):
    """The same at cells that are known."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        n = config["rank_pattern"][name.split(".")[-1]]
        cells = torch.randperm(base.weight.numel(), generator=generator(name, config))[:n].sort().values
        self.register_buffer("sft_indices", torch.stack([cells // base.in_features, cells % base.in_features]))
        self.sft_values = torch.nn.Parameter(torch.zeros(n))

    def weight(self):
        return self.base.weight.index_put(tuple(self.sft_indices), self.sft_values, accumulate=True)


ADALORA = of("ADALORA", init_r=4, target_r=2, lora_alpha=8, tinit=1, tfinal=2, deltaT=1, total_step=7)
DYLORA = of("LORA", training="dylora", r=6, lora_alpha=8)
SORA = of("SORA", r=6, lora_alpha=8, sparse_lambda=2.0, sparse_lambda_2=0.02)
CASES = {
    "adalora": dict(
        config=ADALORA,
        run=dict(steps=7, lr=2e-2, max_grad_norm=5.0),
        hooks=AdaLora,
        matters=[
            ("penalty", {"orth_reg_weight": 0.45}, {}),
            ("budget", {"target_r": 3}, {}),
            ("warm-up", {"tinit": 2}, {}),
            ("interval", {"deltaT": 2}, {}),
            ("end", {"tfinal": 1}, {}),
        ],
        noise=0.2,
        leaves_out=True,
    ),
    "adalora-pruned": dict(config=ADALORA, build=pruned, only_run=True, noise=0.3),
    "dylora": dict(
        config=DYLORA,
        build=lambda model, config, rows: wrap(model, config, DyLora),
        hooks=DyLoraHooks,
        run=dict(lr=2e-2),
        matters=[("draw", {"dylora_min_r": 4}, {})],
    ),
    "dylora-frozen": dict(
        config=DYLORA | dict(dylora_frozen=True, dylora_min_r=2),
        build=lambda model, config, rows: wrap(model, config, DyLora),
        hooks=DyLoraHooks,
        run=dict(lr=2e-2, weight_decay=0.1),
        matters=[("frozen", {"dylora_frozen": False}, {})],
    ),
    "triadaptlora": dict(
        config=of(
            "TRIADAPTLORA", r=6, lora_alpha=8, init_rank=2, incre_rank_num=2, reference_rank=4, incre_interval=2, orth_reg_weight=0.2
        ),
        hooks=TriAdaptHooks,
        run=dict(steps=6, lr=1e-2, weight_decay=0.1, max_grad_norm=2.0),
        matters=[
            ("penalty", {"orth_reg_weight": 0.15}, {}),
            ("growth", {"reference_rank": 3}, {}),
            ("interval", {"incre_interval": 3}, {}),
            ("pace", {"rank_growth_model": "non-linear"}, {}),
        ],
        noise=0.2,
        leaves_out=True,
    ),
    "increlora": dict(
        config=of(
            "INCRELORA", r=6, lora_alpha=8, init_rank=2, incre_rank_num=1, target_rank=3, incre_interval=2, top_h=3, orth_reg_weight=0.2
        ),
        hooks=IncreLoraHooks,
        run=dict(steps=7, lr=1e-2, weight_decay=0.1, max_grad_norm=2.0),
        matters=[
            ("penalty", {"orth_reg_weight": 0.15}, {}),
            ("sites", {"top_h": 2}, {}),
            ("interval", {"incre_interval": 3}, {}),
        ],
        noise=0.2,
        leaves_out=True,
    ),
    "lt-sft": dict(
        config=of("LT_SFT", full_ft_steps=3, ft_params_proportion=0.02),
        fresh=True,
        hooks=LtSftHooks,
        run=dict(steps=8, lr=5e-3, max_grad_norm=1.0),
        matters=[("cells", {"ft_params_proportion": 0.03}, {}), ("start", {"full_ft_steps": 2}, {})],
    ),
    "lt-sft-chosen": dict(
        config=of("LT_SFT", rank_pattern=dict(q_proj=60, v_proj=30, down_proj=90)),
        build=lambda model, config, rows: wrap(model, config, LtSftChosen),
        run=dict(lr=5e-3),
        noise=0.5,
    ),
    "s2-lora": dict(
        config=of("S2_LORA", r=4, lora_alpha=8, l1_weight=0.5),
        hooks=S2LoraHooks,
        run=dict(lr=1e-2),
        matters=[("penalty", {"l1_weight": 0.4}, {}), ("alpha", {"lora_alpha": 9}, {})],
    ),
    "sora": dict(
        config=SORA,
        run=dict(lr=2e-2, weight_decay=0.1),
        hooks=GatedHooks,
        matters=[("threshold", {"sparse_lambda_2": 0.0}, {}), ("penalty", {"sparse_lambda": 1.5}, {})],
        noise=0.3,
        leaves_out=True,
    ),
    "sora-rising": dict(
        config=SORA | dict(lambda_schedule="linear", max_lambda=0.3, lambda_num=3),
        run=dict(lr=2e-2, max_grad_norm=1.0),
        hooks=GatedHooks,
        matters=[("rise", {"max_lambda": 0.2}, {})],
        noise=0.3,
        leaves_out=True,
    ),
    "codyra": dict(
        config=of("CODYRA", r=6, max_kappa=0.4, lambda_num=3, dense_iters=0.4),
        run=dict(lr=2e-2, steps=6),
        hooks=GatedHooks,
        matters=[("threshold", {"max_kappa": 0.3}, {}), ("start", {"dense_iters": 0.0}, {})],
        noise=0.3,
        leaves_out=True,
    ),
}
LAYERS = {"SORA": Gated, "CODYRA": Gated, "S2_LORA": S2Lora, "LT_SFT": LtSft, "TRIADAPTLORA": TriAdapt, "INCRELORA": IncreLora}
