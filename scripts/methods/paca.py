"""PaCA (Woo et al. 2025): r input columns of a weight are trained. Form of PEFT 0.22; PEFT 0.21 does not have it."""

import torch

from . import Reference, generator

CASES = {
    "paca": dict(
        config=dict(peft_type="PACA", r=4, paca_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
        matters=[("scale", {"paca_alpha": 7}, {})],
    )
}


class Paca(Reference):
    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        chosen = torch.randperm(base.in_features, generator=generator(name, config))[: self.rank]
        self.register_buffer("paca_indices", chosen.sort().values)
        self.paca_delta = torch.nn.Parameter(torch.zeros(base.out_features, self.rank))
        self.scale = config["paca_alpha"] / self.rank

    def weight(self):
        w = self.base.weight
        return w.index_copy(1, self.paca_indices, w[:, self.paca_indices] + self.scale * self.paca_delta)


LAYERS = {"PACA": Paca}
