"""Methods whose tokens choose: SMoRA (Zhao et al. 2025), every rank an expert, loads balanced by a bias without gradient."""

import torch
import torch.nn.functional as F

from . import Hooks, Reference, generator, layers


class Smora(Reference):
    FILES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        g, r, n, m = generator(name, config), self.rank, base.in_features, base.out_features
        self.lora_A = torch.nn.Parameter(torch.randn(r, n, generator=g) / n**0.5)
        self.lora_B = torch.nn.Parameter(torch.zeros(m, r))
        self.smora_router = torch.nn.Parameter(torch.randn(r, n, generator=g) / n**0.5)
        self.register_buffer("smora_bias", torch.zeros(r))
        self.scale, self.load = config["lora_alpha"] / r, 0

    def forward(self, x):
        share = F.linear(x, self.smora_router).softmax(-1)
        best = (share.detach() + self.smora_bias).topk(self.config["top_k"], -1).indices
        used = torch.zeros_like(share).scatter(-1, best, 1.0)
        if torch.is_grad_enabled():
            self.load = self.load + used.reshape(-1, self.rank).sum(0)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A) * share * used, self.lora_B)


class Balance(Hooks):
    def after_step(self, model, step, lr):
        for layer in layers(model).values():
            missing = layer.load.mean() - layer.load
            layer.smora_bias += layer.config["bias_update_rate"] * missing.sign()
            layer.load = 0


CONFIG = dict(peft_type="SMORA", r=6, lora_alpha=12, top_k=2, bias_update_rate=0.02, target_modules=["q_proj", "v_proj", "down_proj"])
CASES = {
    "smora": dict(
        config=CONFIG,
        merges=False,
        noise=0.2,
        hooks=Balance(),
        matters=[("top_k", {"top_k": 3}, {}), ("balance", {"bias_update_rate": 0.0}, {})],
    )
}
LAYERS = {"SMORA": Smora}
