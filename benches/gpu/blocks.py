"""Weights in blocks of codes against the same weights as numbers: a training step, a prompt and a token behind it.

A part of `bench.Bench`. A model folder is made with random blocks, in two formats, and what they stand for in f32; two plans of one graph
read the one or the other. Their sums are made in another order, so results are compared with a tolerance.
"""

import statistics

import torch
from safetensors.torch import load_file, save_file

import reference
import shapes

# Of the norm of all values: products of the same bf16 weights, summed in another order.
TOLERANCE = 2e-2


def random(shape, form, g):
    """Random blocks of a matrix as [N, bytes of a row] u8, and the f32 values that they stand for, as ggml defines both."""
    n, k = shape
    count, spread = k // 32, 0.5 * k**-0.5
    factor = torch.rand(n, count, 1, generator=g) + 0.5
    raw = lambda x: x.half().view(torch.uint8)
    if form == "q8_0":
        d = (factor * spread / 73).half()
        codes = torch.randint(-127, 128, (n, count, 32), generator=g, dtype=torch.int8)
        return torch.cat([raw(d), codes.view(torch.uint8)], 2).reshape(n, -1), (codes.float() * d.float()).reshape(n, k)
    d = (factor * spread / 4.6).half()
    m = (-7.5 * d.float()).half()
    packed = torch.randint(0, 256, (n, count, 16), generator=g, dtype=torch.uint8)
    codes = torch.cat([packed & 15, packed >> 4], 2).float()
    return torch.cat([raw(d), raw(m), packed], 2).reshape(n, -1), (codes * d.float() + m.float()).reshape(n, k)


class Blocks:
    def folder(self, plan):
        """The model of a plan: weights as numbers, and the same in blocks."""
        out = self.file(f"blocks-{plan['family']}")
        if not (out / "blocks/model.safetensors").is_file():
            (out / "blocks").mkdir(parents=True, exist_ok=True)
            g, config = torch.Generator().manual_seed(7), plan["config"]
            numbers, coded, formats = {}, {}, {}
            for name, shape in sorted(shapes.tensors(config, config["num_hidden_layers"]).items()):
                form = shapes.block_format(name, shape)
                if form:
                    formats[name] = form
                    coded[name], numbers[name] = random(shape, form, g)
                else:
                    numbers[name] = torch.rand(shape, generator=g) * 0.2 + 0.9
            save_file(numbers, out / "model.safetensors")
            save_file(coded, out / "blocks/model.safetensors", metadata=formats)
        return out

    def blocks(self, plan, check, timed):
        """Both plans on the same inputs: what differs, and how long each takes."""
        config, rows, trains = plan["config"], plan["batch"], plan["method"] is not None
        weights, slot = self.folder(plan), []
        if trains:
            slot = ["--slot", f"0={self.save('slot.safetensors', reference.flat(reference.adapter(config, plan['method'], plan['rank'])))}"]

        def given(length):
            """Entries to compare, with their inputs and capacities; entries to time."""
            ids = reference.batch(config, rows, length)
            t = rows * length
            if trains:
                inputs = ["--inputs", self.save("inputs.safetensors", reference.inputs(ids))]
                return "accumulate", "accumulate,update", inputs, inputs, f"T={t},L={t},S={rows},P={length},C=1"
            packed, cached, step = (self.save(f"{n}.safetensors", x) for n, x in zip("pcs", reference.generation(ids)))
            all_of_it = ["--inputs", packed, "--inputs", cached, "--inputs", step]
            return "infer,generate,generate", "generate", all_of_it, ["--inputs", step], f"T={t},S={rows},C={t}"

        def run(what, entries, inputs, capacity, *more):
            base = [plan["files"][what], "--entry", entries, "--weights", weights, *slot, *inputs, "--capacity", capacity]
            return self.measure(*base, *more, limit=self.call(plan))

        name = plan["name"]
        if check:
            entries, _, inputs, _, capacity = given(min(plan["length"], 128))
            got, same = {}, []
            for what in plan["files"]:
                out = self.file("blocks-out.safetensors")
                said = run(what, entries, inputs, capacity, "--poison", "--same", 1, "--out", out, "--params", "grad.")
                got[what] = {n: x.float() for n, x in load_file(out).items()}
                same.append(said["same_bits"])
            ours, want = got["blocks"], got["numbers"]
            # Each output by itself; gradients of all parameters together.
            kinds = {}
            for n in want:
                kinds.setdefault("gradients" if n.startswith("grad.") else n, []).append(n)
            total = lambda values: sum(v.pow(2).sum().item() for v in values) ** 0.5
            errors = {
                kind: total(ours[n] - want[n] for n in names) / max(total(want[n] for n in names), 1e-30) for kind, names in kinds.items()
            }
            ok = all(e <= TOLERANCE for e in errors.values()) and all(same) and bool(errors)
            self.results["checks"].append({
                "what": name, "target": plan["target"], "ok": ok, "same_bits": all(same), "errors": errors, "tolerance": TOLERANCE,
                "device": said["device"],
            })
            self.say(f"{'ok    ' if ok else 'WRONG '} {name}: blocks beside numbers: " + ", ".join(f"{k} {e:.1e}" for k, e in errors.items()))
            if not ok:
                return
        if timed:
            _, entries, _, inputs, capacity = given(plan["length"])
            row = {"what": name, "entries": entries}
            for what in plan["files"]:
                said = run(what, entries, inputs, capacity, "--warm", self.warm(), "--repeat", self.a.repeat)
                row |= {
                    f"{what}_ms": statistics.median(said["times_ms"]), f"{what}_weights_bytes": said["weights_bytes"],
                    f"{what}_driver_bytes": said["driver_bytes"],
                }
            row["speedup"] = row["numbers_ms"] / row["blocks_ms"]
            self.results["blocks"].append(row)
            self.say(f"       {name}: blocks {row['blocks_ms']:.2f} ms, numbers {row['numbers_ms']:.2f} ms")
