"""Methods that look at layers which hang together: S2FT (Yang et al. 2024; form of the authors' training module) and LoRAM (Zhang et al. 2025;
recovery as in the authors' code, zeros in place of what was left out)."""

import torch
import torch.nn.functional as F

from . import Reference, generator

HEADS, KV_HEADS, HEAD_DIM, CHANNELS = 4, 2, 8, 56
S2FT = dict(peft_type="S2FT", r=5, target_modules=["v_proj", "o_proj", "up_proj", "down_proj"])
LORAM = dict(peft_type="LORAM", r=4, lora_alpha=8, target_modules="all-linear", pruning_ratio=0.4)
CASES = {
    "s2ft": dict(config=S2FT),
    "s2ft-decay": dict(
        config=S2FT | dict(target_modules=["o_proj", "down_proj"]),
        run=dict(weight_decay=6.0),
        matters=[("weight decay", {}, {"weight_decay": 0.0})],
    ),
    "loram": dict(config=LORAM | dict(pruning_ratio=0.5), matters=[("alpha", {"lora_alpha": 9}, {})]),
    "loram-layers": dict(config=LORAM | dict(pruned_layers=[1, 2]), matters=[("alpha", {"lora_alpha": 9}, {})]),
}


class Coupled(Reference):
    """Knows the units of its coupling: channels of the feedforward block, or key/value heads."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        block, _, leaf = name.rpartition(".")
        attention = leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
        self.consumes = leaf in ("o_proj", "down_proj")
        self.consumer = f"{block}.{'o_proj' if attention else 'down_proj'}"
        self.units, self.narrowest = (KV_HEADS, HEAD_DIM) if attention else (CHANNELS, 1)
        self.width = self.narrowest * (HEADS // KV_HEADS if leaf in ("q_proj", "o_proj") else 1)

    def drawn(self, count):
        """`count` units, the same for all layers of the coupling."""
        return torch.randperm(self.units, generator=generator(self.consumer, self.config))[:count].sort().values

    def places(self, units):
        return (units[:, None] * self.width + torch.arange(self.width)).reshape(-1)


class S2ft(Coupled):
    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        chosen = self.drawn(min(max(-(-self.rank // self.narrowest), 1), self.units))
        rest = [u for u in range(self.units) if u not in chosen.tolist()]
        if self.consumes:
            self.register_buffer("s2ft_order", torch.cat([chosen, torch.tensor(rest, dtype=torch.long)]))
        self.index = self.places(chosen)
        n = len(self.index)
        self.s2ft_delta = torch.nn.Parameter(torch.zeros((base.out_features, n) if self.consumes else (n, base.in_features)))

    def weight(self):
        return self.base.weight.index_add(int(self.consumes), self.index, self.s2ft_delta)


class Loram(Coupled):
    """Without gradients the layer is the whole one."""

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        layers = config.get("pruned_layers")
        pruned = layers is None or int(name.split(".")[2]) in range(*layers)
        kept = self.units - int(config["pruning_ratio"] * self.units if pruned else 0)
        units = self.drawn(kept)
        if self.consumes and kept < self.units:
            self.register_buffer("loram_units", units)
        self.index = self.places(units)
        n, m = base.in_features, base.out_features
        n, m = (len(self.index), m) if self.consumes else (n, len(self.index))
        self.lora_A = torch.nn.Parameter(torch.randn(self.rank, n, generator=generator(name, config)) / n**0.5)
        self.lora_B = torch.nn.Parameter(torch.zeros(m, self.rank))
        self.scale = config["lora_alpha"] / self.rank

    FILES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def weight(self):
        a, b, w = self.lora_A, self.lora_B, self.base.weight
        if self.consumes:
            a = a.new_zeros(self.rank, w.shape[1]).index_copy(1, self.index, a)
        else:
            b = b.new_zeros(w.shape[0], self.rank).index_copy(0, self.index, b)
        return w + self.scale * b @ a

    def forward(self, x):
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight(), self.base.bias)
        w = self.base.weight.index_select(int(self.consumes), self.index)
        return F.linear(x, w, self.base.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


LAYERS = {"S2FT": S2ft, "LORAM": Loram}
