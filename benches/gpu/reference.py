"""Models in PyTorch: random weights, LoRA by PEFT, PaCA written from its formula, one training step of each.

The weights are those that pleach gets; loss and gradients of a step in f32 are what both are measured against.
"""

import math

import torch
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(config):
    """A Llama of this configuration without values, and its configuration for the library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keep = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    theta = keep.pop("rope_theta", None)
    c = LlamaConfig(**keep)
    if theta is not None:
        # Both generations of the library read one of the two.
        c.rope_theta = theta
        c.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    c._attn_implementation = "sdpa"
    with torch.device("meta"):
        return LlamaForCausalLM(c), c


def model(config, dtype, device, seed=0):
    """The same with random weights, equal in every dtype up to rounding."""
    m, c = shapes(config)
    m = m.to(dtype).to_empty(device=device)
    m.tie_weights()
    # What is computed from the configuration and not stored was lost with the meta device.
    for module in m.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=c).to(device)
            for name in ("inv_freq", "original_inv_freq"):
                if hasattr(module, name):
                    setattr(module, name, getattr(fresh, name))
    g = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, w in sorted(m.named_parameters()):
            spread = torch.empty(w.shape, dtype=torch.float32, device=device)
            if w.dim() < 2:
                spread.uniform_(0.9, 1.1, generator=g)
            else:
                spread.normal_(0.0, 0.5 / math.sqrt(w.shape[1]), generator=g)
            # bf16 values in every dtype.
            w.copy_(spread.bfloat16())
    m.requires_grad_(False)
    m.config.use_cache = False
    return m


def linears(m):
    """The trained sites by name, in the order of the model."""
    return [(n, x) for n, x in m.named_modules() if n.split(".")[-1] in LINEARS and isinstance(x, nn.Linear)]


def sites(config):
    """The same sites with their outputs and inputs, by the configuration alone: needs no library."""
    d, ff = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
    }
    return [(f"model.layers.{i}.{n}", s) for i in range(config["num_hidden_layers"]) for n, s in shapes.items()]


def adapter(config, method, rank, seed=1):
    """Values of an adapter: {site: {part: tensor}}, f32 and i32. LoRA's B is not zero, so that every gradient counts."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, (o, i) in sites(config):
        normal = lambda shape, std: torch.randn(shape, generator=g) * std
        scale = torch.tensor(2.0)
        if method == "lora":
            out[name] = {"lora_A": normal((rank, i), 1 / math.sqrt(i)), "lora_B": normal((o, rank), 0.02), "scale": scale}
        else:
            places = torch.randperm(i, generator=g)[:rank].sort().values.to(torch.int32)
            out[name] = {"paca_indices": places, "paca_delta": normal((o, rank), 0.005), "scale": scale}
    return out


def flat(values):
    """The adapter under the keys of a plan's slot: `site.part`."""
    return {f"{site}.{part}": t.contiguous() for site, parts in values.items() for part, t in parts.items()}


def with_lora(m, values, rank, adapter_dtype):
    """PEFT's LoRA on all linears with these values; `adapter_dtype` None is PEFT's default (f32)."""
    from peft import LoraConfig, get_peft_model

    c = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), lora_dropout=0.0, task_type="CAUSAL_LM")
    p = get_peft_model(m, c, autocast_adapter_dtype=adapter_dtype is None)
    with torch.no_grad():
        for name, x in p.named_modules():
            site = name.removeprefix("base_model.model.")
            if site in values and hasattr(x, "lora_A"):
                x.lora_A["default"].weight.copy_(values[site]["lora_A"])
                x.lora_B["default"].weight.copy_(values[site]["lora_B"])
                if adapter_dtype is not None:
                    x.lora_A.to(adapter_dtype), x.lora_B.to(adapter_dtype)
    return p


class Columns(torch.autograd.Function):
    """y = x·Wᵀ where some columns of W are trained; only the inputs of those are kept."""

    @staticmethod
    def forward(ctx, x, weight, columns, places):
        ctx.save_for_backward(x[..., places], weight, places)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        kept, weight, places = ctx.saved_tensors
        dx = dy @ weight
        dw = dy.reshape(-1, dy.shape[-1]).T @ kept.reshape(-1, kept.shape[-1])
        return dx, None, dw, None


class PacaLinear(nn.Module):
    """A linear layer with trained columns: `delta` is added, times the scale, to the columns as they were."""

    def __init__(self, base, delta, places, scale):
        super().__init__()
        w = base.weight
        self.register_buffer("places", places.to(w.device).long())
        self.scale = scale
        self.register_buffer("weight", w.detach())
        self.register_buffer("columns", w.detach()[:, self.places].float())
        self.delta = nn.Parameter(delta.to(device=w.device, dtype=torch.float32))

    def forward(self, x):
        trained = (self.columns + self.scale * self.delta).to(self.weight.dtype)
        with torch.no_grad():
            self.weight[:, self.places] = trained
        return Columns.apply(x, self.weight, trained, self.places)


def with_paca(m, values):
    for name, x in linears(m):
        v = values[name]
        parent = m.get_submodule(name.rsplit(".", 1)[0])
        setattr(parent, name.rsplit(".", 1)[1], PacaLinear(x, v["paca_delta"], v["paca_indices"], float(v["scale"])))
    return m


def gradients(m, method):
    """Gradients after a backward pass under the names of pleach's parameters."""
    out = {}
    for name, w in m.named_parameters():
        if w.grad is None:
            continue
        site = name.removeprefix("base_model.model.")
        if method == "lora":
            site = site.replace(".default.weight", "")
        else:
            site = site.replace(".delta", ".paca_delta")
        out[f"grad.slot0.{site}"] = w.grad.detach().float().cpu()
    return out


def batch(config, rows, length, seed=2):
    """Rows of random ids, all of one length: [rows, length] i64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, config["vocab_size"], (rows, length), generator=g)


def inputs(ids):
    """The same rows as pleach takes them: packed, with the targets listed, and the numbers of AdamW's first step."""
    rows, length = ids.shape
    i32 = lambda v: torch.tensor(v, dtype=torch.int32)
    f32 = lambda v: torch.tensor([v], dtype=torch.float32)
    starts = [r * length for r in range(rows)]
    counted = [r * length + i for r in range(rows) for i in range(length - 1)]
    flat = ids.reshape(-1).to(torch.int32)
    out = {
        "input_ids": flat, "positions": i32(list(range(length)) * rows), "q_segments": i32([*starts, rows * length]),
        "kv_start": i32(starts), "kv_len": i32([length] * rows), "rows": i32(counted),
        "labels": flat[torch.tensor(counted) + 1].contiguous(), "loss_scale": f32(1.0 / len(counted)),
    }
    numbers = {
        "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "correction1": 0.1, "correction2": 0.001,
        "max_grad_norm": math.inf,
    }
    return out | {k: f32(v) for k, v in numbers.items()}


def generation(ids):
    """The rows without their last token as a prompt, then these tokens: what `infer` and `generate` take for each of the two, and counts."""
    rows, length = ids.shape
    n = length - 1
    i32 = lambda v: torch.as_tensor(v, dtype=torch.int32)
    base = [r * length for r in range(rows)]
    places = [b + i for b in base for i in range(n)]
    prompt = {
        "input_ids": ids[:, :n].reshape(-1).to(torch.int32), "positions": i32(list(range(n)) * rows), "slots": i32(places),
        "q_segments": i32([r * n for r in range(rows + 1)]), "last": i32([r * n + n - 1 for r in range(rows)]),
    }
    step = {
        "input_ids": ids[:, n].to(torch.int32), "positions": i32([n] * rows), "slots": i32([b + n for b in base]),
        "q_segments": i32(list(range(rows + 1))), "kv_start": i32(base), "kv_len": i32([length] * rows), "last": i32(list(range(rows))),
    }
    # `infer` has keys where the tokens are, `generate` in the cache.
    packed = prompt | {"kv_start": i32([r * n for r in range(rows)]), "kv_len": i32([n] * rows)}
    cached = prompt | {"kv_start": i32(base), "kv_len": i32([n] * rows)}
    return packed, cached, step


def updated(values, grads, numbers):
    """AdamW's first step with the norm clipped, by PyTorch: values, and both averages."""
    params = {}
    for n, v in values.items():
        params[n] = nn.Parameter(v.clone())
        params[n].grad = grads[n].clone()
    norm = nn.utils.clip_grad_norm_(params.values(), numbers["max_grad_norm"])
    betas = (numbers["beta1"], numbers["beta2"])
    o = torch.optim.AdamW(params.values(), lr=numbers["lr"], betas=betas, eps=numbers["eps"], weight_decay=numbers["weight_decay"])
    o.step()
    out = {"update/grad_norm": norm.detach()}
    for n, p in params.items():
        out |= {n: p.detach(), f"adam.m.{n}": o.state[p]["exp_avg"], f"adam.v.{n}": o.state[p]["exp_avg_sq"]}
    return out


def loss(m, ids):
    """Mean loss over all counted targets, as Hugging Face computes it."""
    return m(input_ids=ids, labels=ids, use_cache=False).loss
