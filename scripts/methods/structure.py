"""Methods with a structure of their own. PEFT has most; Hydra (Kim et al. 2023) and NOLA (Koohpayegani et al. 2023) are from their papers."""

import torch
import torch.nn.functional as F

from . import Reference, generator

TARGETS = ["q_proj", "v_proj", "down_proj"]


def of(kind, **keys):
    return dict(peft_type=kind, target_modules=TARGETS) | keys


LOKR = of("LOKR", r=2, alpha=4, decompose_both=True)
CASES = {
    "ia3": dict(
        config=of("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        noise=0.3,
    ),
    "vera": dict(config=of("VERA", r=8, projection_prng_key=3), noise=0.3),
    "vera-seed": dict(config=of("VERA", r=8, projection_prng_key=5, save_projection=False), noise=0.3),
    "loha": dict(config=of("LOHA", r=2, alpha=4), matters=[("alpha", {"alpha": 5}, {})]),
    "lokr": dict(config=LOKR, matters=[("alpha", {"alpha": 5}, {})]),
    "lokr-factor": dict(config=of("LOKR", r=8, alpha=4, decompose_factor=4), noise=0.05),
    "miss": dict(config=of("MISS", r=6), noise=0.05),
    "miss-bat": dict(config=of("MISS", r=4, init_weights="bat", target_modules=["q_proj", "v_proj", "up_proj"]), noise=0.05),
    "miss-mini": dict(config=of("MISS", r=8, init_weights="mini", mini_r=4), noise=0.05),
    "oft": dict(config=of("OFT", r=0, oft_block_size=8), matters=[("terms", {"num_cayley_neumann_terms": 4}, {})]),
    "oft-exact": dict(config=of("OFT", r=4, oft_block_size=0, use_cayley_neumann=False)),
    "oft-share": dict(config=of("OFT", r=0, oft_block_size=8, block_share=True)),
    "randlora": dict(config=of("RANDLORA", r=6, randlora_alpha=6), noise=0.03),
    "shira": dict(config=of("SHIRA", r=2, random_seed=4), noise=0.2),
    "hydra": dict(config=of("HYDRA", r=4, lora_alpha=8), matters=[("alpha", {"lora_alpha": 9}, {})]),
    "hydra-shift": dict(config=of("HYDRA", r=4, lora_alpha=8, parallel_bias=True), merges=False),
    "nola": dict(
        config=of("NOLA", r=4, lora_alpha=8, num_basis=6, save_projection=True), matters=[("alpha", {"lora_alpha": 9}, {})]
    ),
}


class Hydra(Reference):
    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        g, r, n, m = generator(name, config), self.rank, base.in_features, base.out_features
        self.parallel_A = torch.nn.Parameter(torch.randn(r, n, generator=g) / n**0.5)
        self.parallel_B = torch.nn.Parameter(torch.zeros(m, r))
        self.sequential_A = torch.nn.Parameter(torch.randn(r, m, generator=g) / m**0.5)
        self.sequential_B = torch.nn.Parameter(torch.zeros(m, r))
        if config.get("parallel_bias"):
            self.parallel_bias = torch.nn.Parameter(torch.zeros(r))
        self.scale = config["lora_alpha"] / r

    def forward(self, x):
        y = self.base(x)
        beside = F.linear(x, self.parallel_A, getattr(self, "parallel_bias", None))
        behind = F.linear(y, self.sequential_A)
        return y + self.scale * (F.linear(beside, self.parallel_B) + F.linear(behind, self.sequential_B))

    def weight(self):
        w = self.base.weight
        return w + self.scale * (self.parallel_B @ self.parallel_A + self.sequential_B @ self.sequential_A @ w)


class Nola(Reference):
    SHARED = ("nola_basis_A", "nola_basis_B")
    WIDEST = (56, 32)

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        k, r, (n, m) = config["num_basis"], self.rank, self.WIDEST
        g = generator("basis", config)
        self.register_buffer("nola_basis_A", (torch.rand(k, r, n, generator=g) * 2 - 1) / n**0.5)
        self.register_buffer("nola_basis_B", (torch.rand(k, m, r, generator=g) * 2 - 1) / r**0.5)
        self.nola_alpha = torch.nn.Parameter(torch.randn(k, generator=generator(name, config)) / k**0.5)
        self.nola_beta = torch.nn.Parameter(torch.zeros(k))
        self.scale = config["lora_alpha"] / r

    def weight(self):
        a = torch.einsum("k,kri->ri", self.nola_alpha, self.nola_basis_A[:, :, : self.base.in_features])
        b = torch.einsum("k,kor->or", self.nola_beta, self.nola_basis_B[:, : self.base.out_features])
        return self.base.weight + self.scale * b @ a


LAYERS = {"HYDRA": Hydra, "NOLA": Nola}
