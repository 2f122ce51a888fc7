"""What is right: kernels one kind at a time, steps of training, and logits, each against PyTorch.

A part of `bench.Bench`, which runs pleach and keeps results.
"""

import torch
from safetensors.torch import load_file

import cases
import reference

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
# Of the largest value of its kind: one step of AdamW on the same gradients in f32.
UPDATE = 1e-4


class Checks:
    def values(self, c):
        """Random parameters and inputs of a case, on the device in f32, holding values of their own types."""
        g = torch.Generator().manual_seed(len(c.name))
        out = {}
        for name, (dtype, shape) in c.params.items():
            spread = 1.0 if len(shape) < 2 or name in ("a", "x", "q", "k", "v", "dy") else shape[1] ** -0.5
            out[name] = (torch.randn(shape, generator=g) * spread).to(DTYPES[dtype]).float()
        for name, shape in c.inputs.items():
            x = torch.randn([c.tokens if n == "T" else n for n in shape], generator=g)
            # Kernels that take bf16 round their inputs; so do these values, so that both see the same.
            out[name] = x.bfloat16().float() if any(d == "bf16" for d, _ in c.params.values()) else x
        for name, make in c.integers.items():
            out[name] = make(torch, c).to(torch.int32)
        out = {k: v.to(self.device) for k, v in out.items()}
        if c.derive:
            out |= {k: v.to(DTYPES[c.params[k][0]]).float() for k, v in c.derive(torch, out).items()}
        return out

    def targets(self):
        """All targets whose kernels this GPU runs: the older one's are checked too, and not timed."""
        built = {p["target"] for p in self.index["plans"]}
        return [t for t in ("sm_80", "sm_90a") if t == self.target() or (t == "sm_80" and t in built)]

    def check_kernel(self, c, target):
        x = self.values(c)
        want = c.reference(torch, x)
        entries = list(dict.fromkeys(k.split("/")[0] for k in want if "/" in k))
        entries += [e for e in ("store",) if f'entry "{e}"' in c.text]
        weights = self.save("w.safetensors", {n: x[n].to(DTYPES[d]) for n, (d, _) in c.params.items()})
        given = {n: x[n] for n in [*c.inputs, *c.integers]}
        inputs = ["--inputs", self.save("x.safetensors", given)] if given else []
        capacity = {k: v for k, v in {"T": c.tokens}.items() if v} | c.capacity
        places = ["--capacity", ",".join(f"{k}={v}" for k, v in capacity.items())] if capacity else []
        out = self.file("y.safetensors")
        base = [f"kernels/{c.name}.{target}.pleach", "--entry", ",".join(entries), "--weights", weights, *inputs, *places]
        said = self.measure(*base, "--poison", "--same", 1, "--out", out, "--params", "cache")
        got = load_file(out)
        worst = 0.0
        for name, w in want.items():
            y, w = got[name].float(), w.float().cpu()
            if y.shape != w.shape or not torch.isfinite(y).all():
                raise RuntimeError(f"{name}: {tuple(y.shape)} instead of {tuple(w.shape)}, or no numbers")
            worst = max(worst, ((y - w).abs().max() / w.abs().max().clamp_min(1e-30)).item())
        ok = worst <= c.tolerance and said["same_bits"] is True
        row = {"what": c.name, "target": target, "error": worst, "tolerance": c.tolerance, "same_bits": said["same_bits"], "ok": ok}
        self.results["checks"].append(row | {"device": said["device"]})
        other = "" if said["same_bits"] else ", a second run gives other bits"
        self.say(f"{'ok    ' if ok else 'WRONG '} {c.name} {target}: {worst:.1e} (allowed {c.tolerance:.0e}){other}")
        return x, base, ok

    def check_step(self, plan):
        """Loss and gradients of one step, against f32 and against PyTorch's own bf16."""
        config, method, rank = plan["config"], plan["method"], plan["rank"]
        length = min(plan["length"], 256)
        ids = reference.batch(config, 2, length)
        # The f32 model first: what is right.
        m = reference.model(config, torch.float32, self.device)
        values = reference.adapter(config, method, rank)
        tensors = {n: w.bfloat16() for n, w in m.state_dict().items()}
        if config.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        weights = self.save("weights.safetensors", tensors)
        del tensors

        def gradients(m, adapter_dtype):
            m = reference.with_lora(m, values, rank, adapter_dtype) if method == "lora" else reference.with_paca(m, values)
            value = reference.loss(m, ids.to(self.device))
            value.backward()
            return value.item(), reference.gradients(m, method)

        torch.backends.cuda.matmul.allow_tf32 = False
        exact, want = gradients(m, None)
        del m
        self.free()
        half, rough = gradients(reference.model(config, torch.bfloat16, self.device), None)
        self.free()
        slot = self.save("slot.safetensors", reference.flat(values))
        inputs = self.save("inputs.safetensors", reference.inputs(ids))
        out = self.file("grads.safetensors")
        tokens = ids.numel()

        def run(entries, prefix, given=inputs, **environment):
            words = [plan["file"], "--entry", entries, "--weights", weights, "--slot", f"0={slot}", "--inputs", given]
            words += ["--capacity", f"T={tokens},L={tokens},S=2,P={length},C=1", "--poison", "--out", out, "--params", prefix]
            said = self.measure(*words, limit=self.call(plan), **environment)
            return said, load_file(out)

        said, got = run("accumulate", "grad.")
        # Once more by a graph, and launch by launch: all bits are the same.
        same = {}
        for name, environment in (("graph", {}), ("launches", {"PLEACH_CUDA_GRAPHS": "0"})):
            again = run("accumulate", "grad.", **environment)[1]
            same[name] = got.keys() == again.keys() and all(torch.equal(got[n], again[n]) for n in got)
        loss = got["accumulate/loss"].float().item()

        def distance(a):
            up = sum((a[n].float() - w).pow(2).sum().item() for n, w in want.items())
            return (up / sum(w.pow(2).sum().item() for w in want.values())) ** 0.5

        missing = [n for n in want if n not in got]
        if missing:
            raise RuntimeError(f"no gradient {missing[0]} among {sorted(got)[:3]}")
        ours, theirs = distance(got), distance(rough)
        off, rival = abs(loss - exact) / abs(exact), abs(half - exact) / abs(exact)
        # In f32 both are as good as exact; in bf16 at most a quarter worse than PyTorch's own.
        ok = ours <= max(1.25 * theirs, 1e-4) and off <= max(1.25 * rival, 2e-3) and all(same.values())
        # The optimizer on these gradients: a step with decay and a clipped norm, beside PyTorch's.
        numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        grads = {n.removeprefix("grad."): g.float() for n, g in got.items() if n.startswith("grad.")}
        numbers["max_grad_norm"] = 0.5 * sum(g.pow(2).sum().item() for g in grads.values()) ** 0.5
        before = {f"slot0.{n}": v for n, v in reference.flat(values).items() if f"slot0.{n}" in grads}
        if before.keys() != grads.keys():
            raise RuntimeError(f"gradients of {len(grads)} tensors, {len(before)} are trained")
        given = self.save("update.safetensors", reference.inputs(ids) | {k: torch.tensor([v]) for k, v in numbers.items()})
        after = run("accumulate,update", "slot0.,adam.", given)[1]
        worst = {"moved": 0.0, "adam.m": 0.0, "adam.v": 0.0, "norm": 0.0}
        for n, w in reference.updated(before, grads, numbers).items():
            y, w = after[n].float().reshape(w.shape), w.float()
            kind = n[:6] if n.startswith("adam.") else "norm" if "/" in n else "moved"
            if kind == "moved":
                y, w = y - before[n], w - before[n]
            worst[kind] = max(worst[kind], ((y - w).abs().max() / w.abs().max().clamp_min(1e-30)).item())
        ok = ok and max(worst.values()) <= UPDATE
        row = {
            "what": f"step {plan['name']}", "target": plan["target"], "ok": ok, "same_bits": same, "update_error": worst, "loss": loss, "loss_f32": exact, "loss_torch_bf16": half,
            "gradient_error": ours, "gradient_error_torch_bf16": theirs, "device": said["device"], "tokens": tokens,
        }
        self.results["checks"].append(row)
        word = "ok    " if ok else "WRONG "
        self.say(f"{word} {row['what']}: loss {loss:.5f} ({exact:.5f} in f32), gradients off by {ours:.1e} (PyTorch's bf16: {theirs:.1e}), "
                 f"update by {max(worst.values()):.1e}, same bits: {same}")
        return ok

    def check_infer(self, plan):
        """Logits of a prompt by `infer`, and of a token behind a prompt in the cache by `generate`, against f32 and PyTorch's bf16."""
        config, rows, length = plan["config"], 2, min(plan["length"], 200)
        ids = reference.batch(config, rows, length)
        m = reference.model(config, torch.float32, self.device)
        tensors = {n: w.bfloat16() for n, w in m.state_dict().items()}
        if config.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        weights = self.save("weights.safetensors", tensors)

        def logits(m):
            with torch.no_grad():
                y = m(input_ids=ids.to(self.device), use_cache=False).logits.float().cpu()
            return {"infer/logits": y[:, :-1].reshape(-1, y.shape[-1]), "generate/logits": y[:, -1]}

        want = logits(m)
        del m, tensors
        self.free()
        rough = logits(reference.model(config, torch.bfloat16, self.device))
        self.free()
        out, given = self.file("logits.safetensors"), []
        for name, x in zip(("packed", "cached", "next"), reference.generation(ids)):
            given += ["--inputs", self.save(f"{name}.safetensors", x)]
        said = self.measure(
            plan["file"], "--entry", "infer,generate,generate", "--weights", weights, *given, "--capacity",
            f"T={rows * length},S={rows},C={rows * length}", "--poison", "--out", out, limit=self.call(plan),
        )
        got = load_file(out)
        off = lambda a, n: ((a[n].float().reshape(want[n].shape) - want[n]).norm() / want[n].norm()).item()
        errors = {n: {"error": off(got, n), "error_torch_bf16": off(rough, n)} for n in want}
        ok = all(e["error"] <= max(1.25 * e["error_torch_bf16"], 1e-4) for e in errors.values())
        self.results["checks"].append({"what": plan["name"], "target": plan["target"], "ok": ok, "device": said["device"]} | errors)
        words = ", ".join(f"{n} off by {e['error']:.1e} (PyTorch's bf16: {e['error_torch_bf16']:.1e})" for n, e in errors.items())
        self.say(f"{'ok    ' if ok else 'WRONG '} {plan['name']}: {words}")
        return ok

    def check_plans(self, target, right, unchecked):
        """Steps and logits of the plans for a target; of an older one those of small models. Gives families that are right, or unchecked."""
        for p in [p for p in self.index["plans"] if p["target"] == target and p.get("check")]:
            if target != self.target() and p["family"].startswith("llama3"):
                continue
            what = f"step {p['name']} {target}"
            if not self.packages(what, "transformers", *(["peft"] if p["method"] == "lora" else [])):
                unchecked.add(p["family"])
            elif self.attempt(what, 30, lambda: self.check_step(p), "checks"):
                right.add(p["family"])
        for p in [p for p in self.index["infer"] if p["target"] == target]:
            if self.packages(f"{p['name']} {target}", "transformers"):
                self.attempt(f"{p['name']} {target}", 20, lambda: self.check_infer(p), "checks")
