#!/usr/bin/env python3
"""Kernels one kind at a time: graphs as text, and what PyTorch computes for them.

    cases.py OUT [--tiny]      writes OUT/NAME.ir for every case (needs no package)

A case has parameters and inputs of given shapes, entries, and a reference in f32. Parameters are read from a weights file in
bf16 or f32; inputs are f32 or i32 with a symbol `T` in their shape, so that edges are ragged. Those with `time` are timed at their
full size beside PyTorch's own.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable


@dataclass
class Case:
    name: str
    text: str
    params: dict = field(default_factory=dict)  # name -> (dtype, shape)
    inputs: dict = field(default_factory=dict)  # name -> shape; "T" is the number of tokens; i32 ones are in `integers`
    integers: dict = field(default_factory=dict)  # name -> function of (torch, case): values
    reference: Callable[..., Any] = None  # (torch, tensors in f32) -> {"entry/output": tensor}
    tokens: int = 0  # value of T
    capacity: dict = field(default_factory=dict)
    tolerance: float = 1e-2  # of the largest value: bf16 operands, f32 sums
    time: bool = False
    flops: float = 0.0
    derive: Callable[..., Any] = None  # (torch, tensors in f32) -> parameters that follow from others
    rival: Callable[..., Any] = None  # (torch, tensors in bf16) -> {"entry": function to time}


def product(form, m, n, k, dtype="bf16"):
    """x·Wᵀ (nt), dy·W (nn) and xᵀ·dy (tn) of bf16 values; the result is rounded to bf16 but for tn, which is summed in f32. Of f32 values
    everything is f32, and only checked."""
    a, b = {"nt": ([m, k], [n, k]), "nn": ([m, k], [k, n]), "tn": ([k, m], [k, n])}[form]
    flags = {"nt": " {tb}", "nn": "", "tn": " {ta}"}[form]
    text = f"""graph core
param @0 "a" {dtype}[{a[0]},{a[1]}] frozen checkpoint("a")
param @1 "b" {dtype}[{b[0]},{b[1]}] frozen checkpoint("b")
entry "main" {{
  %0 = param @0 : {dtype}[{a[0]},{a[1]}]
  %1 = param @1 : {dtype}[{b[0]},{b[1]}]
  %2 = matmul(%0, %1){flags} : f32[{m},{n}]
"""
    text += "  output \"y\" %2\n}\n" if form == "tn" or dtype == "f32" else f"  %3 = cast(%2) : bf16[{m},{n}]\n  output \"y\" %3\n}}\n"

    def multiply(x):
        a, b = x["a"], x["b"]
        return {"nt": lambda: a @ b.T, "nn": lambda: a @ b, "tn": lambda: a.T @ b}[form]()

    return Case(
        name=f"matmul-{form}-{m}x{n}x{k}" + ("-f32" if dtype == "f32" else ""), text=text, params={"a": (dtype, a), "b": (dtype, b)},
        reference=lambda torch, x: {"main/y": multiply(x)}, time=dtype == "bf16", tolerance=1e-2 if dtype == "bf16" else 1e-5, flops=2.0 * m * n * k,
        rival=lambda torch, x: {"main": lambda: multiply(x)},
    )


def lora(n, k, r, tokens):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ for any number of tokens: for a few of them by another kernel."""
    text = f"""graph core
param @0 "w" bf16[{n},{k}] frozen checkpoint("w")
param @1 "a" bf16[{r},{k}] frozen checkpoint("a")
param @2 "b" bf16[{n},{r}] frozen checkpoint("b")
entry "main" {{
  %0 = input "x" : f32[T,{k}]
  %1 = cast(%0) : bf16[T,{k}]
  %2 = param @0 : bf16[{n},{k}]
  %3 = param @1 : bf16[{r},{k}]
  %4 = param @2 : bf16[{n},{r}]
  %5 = matmul(%1, %2) {{tb}} : f32[T,{n}]
  %6 = matmul(%1, %3) {{tb}} : f32[T,{r}]
  %7 = cast(%6) : bf16[T,{r}]
  %8 = matmul(%7, %4) {{tb}} : f32[T,{n}]
  %9 = const 2.0 : f32[]
  %10 = mul(%8, %9) : f32[T,{n}]
  %11 = add(%5, %10) : f32[T,{n}]
  output "y" %11
}}
"""
    return Case(
        name="lora" if tokens > 16 else f"lora-{tokens}", text=text, params={"w": ("bf16", [n, k]), "a": ("bf16", [r, k]), "b": ("bf16", [n, r])},
        inputs={"x": ["T", k]}, tokens=tokens,
        reference=lambda torch, x: {"main/y": x["x"] @ x["w"].T + 2.0 * (x["x"] @ x["a"].T) @ x["b"].T},
    )


def picks(n, k, r, tokens):
    """Products that read what indices pick: x·Wᵀ + x[:, i]·Cᵀ, and rows of a table by a matrix of few columns."""
    few = min(n, 256)
    text = f"""graph core
param @0 "w" bf16[{n},{k}] frozen checkpoint("w")
param @1 "c" bf16[{n},{r}] frozen checkpoint("c")
param @2 "v" bf16[{few},{k}] frozen checkpoint("v")
entry "columns" {{
  %0 = input "x" : f32[T,{k}]
  %1 = cast(%0) : bf16[T,{k}]
  %2 = input "i" : i32[{r}]
  %3 = param @0 : bf16[{n},{k}]
  %4 = param @1 : bf16[{n},{r}]
  %5 = matmul(%1, %3) {{tb}} : f32[T,{n}]
  %6 = gather(%1, %2) {{axis = 1}} : bf16[T,{r}]
  %7 = matmul(%6, %4) {{tb}} : f32[T,{n}]
  %8 = add(%5, %7) : f32[T,{n}]
  output "y" %8
}}
entry "rows" {{
  %0 = input "ids" : i32[T]
  %1 = param @0 : bf16[{n},{k}]
  %2 = gather(%1, %0) {{axis = 0}} : bf16[T,{k}]
  %3 = param @2 : bf16[{few},{k}]
  %4 = matmul(%2, %3) {{tb}} : f32[T,{few}]
  output "y" %4
}}
"""

    def reference(torch, x):
        columns = x["x"] @ x["w"].T + x["x"][:, x["i"].long()] @ x["c"].T
        return {"columns/y": columns, "rows/y": x["w"][x["ids"].long()] @ x["v"].T}

    return Case(
        name="picks", text=text, params={"w": ("bf16", [n, k]), "c": ("bf16", [n, r]), "v": ("bf16", [few, k])},
        inputs={"x": ["T", k]}, tokens=tokens,
        integers={
            "i": lambda torch, c: torch.randperm(k)[:r],
            "ids": lambda torch, c: torch.randperm(n)[: c.tokens],
        },
        reference=reference,
    )


def rows(d, tokens):
    """RMSNorm, SwiGLU, and softmax with its sum: kernels of rows, in f32."""
    text = f"""graph core
param @0 "w" f32[{d}] frozen checkpoint("w")
entry "norm" {{
  %0 = input "x" : f32[T,{d}]
  %1 = param @0 : f32[{d}]
  %2 = mul(%0, %0) : f32[T,{d}]
  %3 = reduce_sum(%2) {{axis = 1}} : f32[T]
  %4 = const {1.0 / d!r} : f32[]
  %5 = mul(%3, %4) : f32[T]
  %6 = const 1e-5 : f32[]
  %7 = add(%5, %6) : f32[T]
  %8 = rsqrt(%7) : f32[T]
  %9 = broadcast(%8) {{axes = [0]}} : f32[T,{d}]
  %10 = broadcast(%1) {{axes = [1]}} : f32[T,{d}]
  %11 = mul(%0, %9) : f32[T,{d}]
  %12 = mul(%11, %10) : f32[T,{d}]
  output "y" %12
}}
entry "swiglu" {{
  %0 = input "x" : f32[T,{d}]
  %1 = input "u" : f32[T,{d}]
  %2 = sigmoid(%0) : f32[T,{d}]
  %3 = mul(%0, %2) : f32[T,{d}]
  %4 = mul(%3, %1) : f32[T,{d}]
  output "y" %4
}}
entry "softmax" {{
  %0 = input "x" : f32[T,{d}]
  %1 = reduce_max(%0) {{axis = 1}} : f32[T]
  %2 = broadcast(%1) {{axes = [0]}} : f32[T,{d}]
  %3 = sub(%0, %2) : f32[T,{d}]
  %4 = exp(%3) : f32[T,{d}]
  %5 = reduce_sum(%4) {{axis = 1}} : f32[T]
  %6 = broadcast(%5) {{axes = [0]}} : f32[T,{d}]
  %7 = div(%4, %6) : f32[T,{d}]
  output "y" %7
  output "sum" %5
}}
"""

    def reference(torch, x):
        v = x["x"]
        shifted = (v - v.amax(1, keepdim=True)).exp()
        return {
            "norm/y": v * torch.rsqrt(v.pow(2).mean(1, keepdim=True) + 1e-5) * x["w"],
            "swiglu/y": torch.nn.functional.silu(v) * x["u"],
            "softmax/y": torch.softmax(v, 1), "softmax/sum": shifted.sum(1),
        }

    return Case(
        name="rows", text=text, params={"w": ("f32", [d])}, inputs={"x": ["T", d], "u": ["T", d]}, tokens=tokens,
        reference=reference, tolerance=1e-5,
    )


def moves(d, vocab, tokens):
    """A gather of rows, and rows set at places that are given."""
    text = f"""graph core
param @0 "table" f32[{vocab},{d}] frozen checkpoint("table")
param @1 "cache" f32[{vocab},{d}] state zeros
entry "main" {{
  %0 = input "ids" : i32[T]
  %1 = param @0 : f32[{vocab},{d}]
  %2 = gather(%1, %0) {{axis = 0}} : f32[T,{d}]
  output "y" %2
}}
entry "store" {{
  %0 = input "ids" : i32[T]
  %1 = input "x" : f32[T,{d}]
  %2 = param @1 : f32[{vocab},{d}]
  %3 = scatter_set(%2, %0, %1) {{axis = 0}} : f32[{vocab},{d}]
  assign @1 %3
}}
"""

    def reference(torch, x):
        cache = torch.zeros_like(x["table"])
        cache[x["ids"].long()] = x["x"]
        return {"main/y": x["table"][x["ids"].long()], "cache": cache}

    return Case(
        name="moves", text=text, params={"table": ("f32", [vocab, d])}, inputs={"x": ["T", d]}, tokens=tokens,
        integers={"ids": lambda torch, c: torch.randperm(vocab)[: c.tokens]}, reference=reference, tolerance=0.0,
    )


def attention(lengths, heads, kv_heads, d, time=False):
    """Causal attention of packed sequences with grouped heads: forward, sums of exponentials, and the three gradients from given values."""
    t, s, q, kv = sum(lengths), len(lengths), heads * d, kv_heads * d
    a = f"{{heads = {heads}, kv_heads = {kv_heads}, head_dim = {d}, scale = {d ** -0.5!r}, causal}}"
    names = [("q", q), ("k", kv), ("v", kv), ("dy", q), ("o", q)]
    params = "".join(f'param @{i} "{n}" bf16[{t},{w}] frozen checkpoint("{n}")\n' for i, (n, w) in enumerate(names))
    params += f'param @5 "lse" f32[{t},{heads}] frozen checkpoint("lse")\n'
    head = f"""  %0 = input "segments" : i32[S1]
  %1 = input "start" : i32[S]
  %2 = input "length" : i32[S]
  %3 = param @0 : bf16[{t},{q}]
  %4 = param @1 : bf16[{t},{kv}]
  %5 = param @2 : bf16[{t},{kv}]
"""
    text = f"""graph core
{params}entry "forward" {{
{head}  %6 = attention(%3, %4, %5, %0, %1, %2) {a} : bf16[{t},{q}]
  output "o" %6
}}
entry "sums" {{
{head.replace(f"  %5 = param @2 : bf16[{t},{kv}]", "").rstrip()}
  %5 = attention_lse(%3, %4, %0, %1, %2) {a} : f32[{t},{heads}]
  output "lse" %5
}}
entry "backward" {{
{head}  %6 = param @3 : bf16[{t},{q}]
  %7 = param @4 : bf16[{t},{q}]
  %8 = param @5 : f32[{t},{heads}]
  %9 = attention_grad_q(%3, %4, %5, %7, %8, %6, %0, %1, %2) {a} : bf16[{t},{q}]
  %10 = attention_grad_k(%3, %4, %5, %7, %8, %6, %0, %1, %2) {a} : bf16[{t},{kv}]
  %11 = attention_grad_v(%3, %4, %5, %7, %8, %6, %0, %1, %2) {a} : bf16[{t},{kv}]
  output "dq" %9
  output "dk" %10
  output "dv" %11
}}
"""
    starts = [sum(lengths[:i]) for i in range(s + 1)]

    def each(torch, x, make):
        """make(q, k, v, span) of every sequence, as [1, heads, length, d]."""
        out = []
        for i in range(s):
            span = slice(starts[i], starts[i + 1])
            cut = lambda n, h: x[n][span].view(1, -1, h, d).transpose(1, 2)
            out.append(make(cut("q", heads), cut("k", kv_heads), cut("v", kv_heads), span))
        return out

    def sdpa(torch, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def flat(torch, parts):
        return torch.cat([p.transpose(1, 2).reshape(p.shape[2], -1) for p in parts])

    def sums(torch, x):
        def one(q, k, v, span):
            n = q.shape[2]
            hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            # One head after another: scores of all are large.
            head = lambda h: (q[0, h] @ k[0, h * kv_heads // heads].T * d**-0.5).masked_fill(hidden, -torch.inf).logsumexp(1)
            return torch.stack([head(h) for h in range(heads)], 1)

        return torch.cat(each(torch, x, one))

    def reference(torch, x):
        def one(q, k, v, span):
            q, k, v = (z.detach().clone().requires_grad_() for z in (q, k, v))
            o = sdpa(torch, q, k, v)
            dy = x["dy"][span].view(1, -1, heads, d).transpose(1, 2)
            return (o.detach(), *torch.autograd.grad(o, (q, k, v), dy))

        o, dq, dk, dv = zip(*each(torch, x, one))
        names = {"forward/o": o, "backward/dq": dq, "backward/dk": dk, "backward/dv": dv}
        return {n: flat(torch, p) for n, p in names.items()} | {"sums/lse": sums(torch, x)}

    def rival(torch, x):
        if len(set(lengths)) > 1:
            return {}
        cut = lambda n, h: x[n].view(s, -1, h, d).transpose(1, 2).contiguous().requires_grad_()
        q, k, v, dy = cut("q", heads), cut("k", kv_heads), cut("v", kv_heads), cut("dy", heads)
        o = sdpa(torch, q, k, v)
        return {
            "forward": lambda: sdpa(torch, q, k, v),
            "backward": lambda: torch.autograd.grad(o, (q, k, v), dy, retain_graph=True),
        }

    ints = lambda v: lambda torch, c: torch.tensor(v)
    return Case(
        name=(f"attention-{s}x{t // s}" if len(set(lengths)) == 1 else f"attention-ragged-{t}") + f"-d{d}", text=text,
        params={n: ("bf16", [t, w]) for n, w in names} | {"lse": ("f32", [t, heads])},
        integers={"segments": ints(starts), "start": ints(starts[:-1]), "length": ints(list(lengths))},
        reference=reference, capacity={"S": s}, tolerance=3e-2, time=time,
        flops=sum(4.0 * heads * d * n * n / 2 for n in lengths), rival=rival,
        derive=lambda torch, x: {"o": reference(torch, x)["forward/o"], "lse": sums(torch, x)},
    )


def cached(lengths, heads, kv_heads, d):
    """Attention of one token behind each sequence, whose keys and values lie in a cache with room between them: what generation runs."""
    s, q, kv, room = len(lengths), heads * d, kv_heads * d, max(lengths) + 3
    a = f"{{heads = {heads}, kv_heads = {kv_heads}, head_dim = {d}, scale = {d ** -0.5!r}, causal}}"
    params = "".join(
        f'param @{i} "{n}" bf16[{rows},{w}] frozen checkpoint("{n}")\n' for i, (n, rows, w) in
        enumerate([("q", s, q), ("k", s * room, kv), ("v", s * room, kv)])
    )
    text = f"""graph core
{params}entry "main" {{
  %0 = input "segments" : i32[S1]
  %1 = input "start" : i32[S]
  %2 = input "length" : i32[S]
  %3 = param @0 : bf16[{s},{q}]
  %4 = param @1 : bf16[{s * room},{kv}]
  %5 = param @2 : bf16[{s * room},{kv}]
  %6 = attention(%3, %4, %5, %0, %1, %2) {a} : bf16[{s},{q}]
  output "o" %6
}}
"""

    def reference(torch, x):
        out = []
        for i, n in enumerate(lengths):
            cut = lambda name: x[name][i * room : i * room + n].view(1, n, kv_heads, d).transpose(1, 2)
            y = x["q"][i].view(1, heads, 1, d)
            out.append(torch.nn.functional.scaled_dot_product_attention(y, cut("k"), cut("v"), enable_gqa=True).reshape(1, q))
        return {"main/o": torch.cat(out)}

    ints = lambda v: lambda torch, c: torch.tensor(v)
    return Case(
        name=f"decode-{d}", text=text,
        params={"q": ("bf16", [s, q]), "k": ("bf16", [s * room, kv]), "v": ("bf16", [s * room, kv])},
        integers={"segments": ints(list(range(s + 1))), "start": ints([i * room for i in range(s)]), "length": ints(list(lengths))},
        reference=reference, capacity={"S": s}, tolerance=3e-2,
    )


def cases(tiny):
    if tiny:
        return [
            product("nt", 40, 48, 64), product("nn", 40, 64, 48), product("tn", 64, 48, 40), lora(48, 64, 8, 37),
            picks(48, 64, 8, 37), rows(96, 11), moves(32, 40, 13), attention([5, 11], 4, 2, 16), attention([8, 8], 2, 2, 16, time=True),
            lora(48, 64, 8, 3), product("nt", 40, 48, 64, "f32"), cached([5, 1, 9], 4, 2, 16), attention([70, 63], 2, 1, 80),
        ]
    shapes = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336)]
    return [
        *(product(form, m, n, k) for m, n, k in shapes for form in ("nt", "nn")),
        product("tn", 4096, 4096, 8192), product("tn", 16, 4096, 8192), product("nt", 8192, 16, 4096),
        lora(4096, 4096, 16, 1000), picks(4096, 4096, 16, 1000), rows(4096, 777), moves(4096, 5000, 777),
        attention([300, 1, 517, 64], 32, 8, 128), attention([100, 157], 9, 3, 64),
        # Heads whose rows are no whole number of swizzled pieces.
        attention([300, 1, 517], 8, 2, 80), attention([300, 1, 517], 8, 8, 96), attention([130, 259], 4, 2, 256),
        lora(4096, 4096, 16, 1), lora(4096, 14336, 16, 4), cached([2048, 1, 700, 33], 32, 8, 128), cached([300, 5], 9, 3, 64),
        product("nt", 777, 1024, 512, "f32"), product("nn", 1000, 512, 777, "f32"), product("tn", 512, 640, 1000, "f32"),
        attention([2048] * 4, 32, 8, 128, time=True),
    ]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for c in cases("--tiny" in sys.argv):
        (out / f"{c.name}.ir").write_text(c.text)
        print(c.name)
