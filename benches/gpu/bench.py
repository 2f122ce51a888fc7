#!/usr/bin/env python3
"""Checks and measures pleach on a GPU beside PyTorch, in one run; writes one JSON.

    bench.py [--bundle DIR] [--out FILE] [--seconds 520] [--only checks,kernels,steps,forms] [--device cuda|cpu]

First what is right: every kernel kind against PyTorch on random values with a poisoned arena, then loss and gradients of a step against
PyTorch in f32. Only what is right is timed: products against cuBLAS, attention against SDPA, optimizer steps against PEFT (its
default with f32 adapters, and all in bf16), a PaCA in PyTorch, weights in blocks beside the same weights as numbers, and after all of
these torch.compile, and Liger or Unsloth where they can be imported. Rows are random, weights are made here. What does not fit into
the time is left out and said so; the file is written after every part, so that a run that is stopped leaves what it had.
"""

import time

# The time of everything counts, that of loading packages too.
START = time.monotonic()

import argparse
import datetime
import gc
import gzip
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import cases
import reference
from blocks import Blocks
from checks import Checks

# Rivals that replace parts of the library when they are loaded: package -> name.
PATCHING = {"liger_kernel": "liger", "unsloth": "unsloth"}
# Rivals that run in a process of their own: they change the library, or nobody knows how long they take.
APART = ("compile", *PATCHING.values())
# Plans whose kernels `plans/forms.*` has in every form.
FORMS_OF = ("llama3-8b-1-lora-r16", "tiny-2-lora-r4")
# Seconds at most of such a one.
LONGEST = 150
# Seconds at most of one call of `measure`, and of one with many layers: a kernel that hangs must not take the time of all others.
CALL, LONG_CALL = 45, 120
# Milliseconds of work before anything is timed: clocks rise under load.
WARM = 200
# What the library's models and PEFT's adapters need; without them pleach is timed all the same, only not beside them.
NEEDED = ("transformers", "peft")
# How numbers of the file are to be read.
NOTES = {
    "gap_share": "part of a replay's time, by events around it, beyond the sum of its launches' times, each the mean of several in a row",
    "kernels_ms": "launches one by one with events around each, which take time themselves: more than a replay takes",
    "compile": "torch.compile takes seconds a layer: it is timed at up to 4 layers, and at 32 in the time that is left at the end",
}


class Bench(Blocks, Checks):
    def __init__(self, a):
        self.a, self.device, self.start = a, a.device, START
        self.bundle = a.bundle
        self.index = json.loads((a.bundle / "plans/index.json").read_text())
        self.scratch = tempfile.TemporaryDirectory(prefix="pleach-gpu-")
        self.results = {"limits": {}, "checks": [], "products": [], "attention": [], "steps": [], "blocks": [], "skipped": [], "notes": NOTES}
        self.machine = None
        self.lacks = [n for n in NEEDED if not importlib.util.find_spec(n)]

    # Running pleach

    def left(self):
        return self.a.seconds - (time.monotonic() - self.start)

    def say(self, text):
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def file(self, name):
        return Path(self.scratch.name) / name

    def save(self, name, tensors):
        path = self.file(name)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        return path

    def plan(self, name):
        """The file of a plan, unpacked."""
        path = self.file(name.replace("/", "-"))
        if not path.is_file():
            path.write_bytes(gzip.decompress((self.bundle / "plans" / f"{name}.gz").read_bytes()))
        return path

    def call(self, plan):
        """Seconds that one call may take with a plan."""
        return max(LONG_CALL, self.a.limit) if plan["config"]["num_hidden_layers"] > 4 else self.a.limit

    def measure(self, plan, *arguments, limit=None, **environment):
        command = [str(self.bundle / "measure"), str(self.plan(plan)), *map(str, arguments)]
        limit, environment = max(min(self.left(), limit or self.a.limit), 5), os.environ | environment
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(command)}: took longer than {limit:.0f} s and was ended") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return json.loads(done.stdout)

    def target(self):
        """The plans for this GPU."""
        if self.a.target:
            return self.a.target
        if self.device == "cpu":
            return "sm_80"
        return "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"

    def left_out(self, what, why):
        note = {"what": what, "why": why}
        if note not in self.results["skipped"]:
            self.results["skipped"].append(note)

    def packages(self, what, *names):
        """Whether packages are there that a part needs; if not, it is left out."""
        missing = [n for n in names if n in self.lacks]
        if missing:
            self.left_out(what, f"there is no package {' and '.join(missing)}")
        return not missing

    def attempt(self, what, least, run, where="skipped"):
        """Runs a part if there is time for it; a part that fails is recorded and does not end the others."""
        if self.left() < least:
            self.results["skipped"].append({"what": what, "why": f"{self.left():.0f} s are left, it needs about {least}"})
            return None
        try:
            return run()
        except Exception as e:
            self.results[where].append({"what": what, "error": f"{type(e).__name__}: {e}"[:2000]})
            self.say(f"FAILED {what}: {str(e)[:1500]}")
            return None
        finally:
            self.free()
            self.write()

    def free(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def warm(self):
        """Milliseconds of work before anything is timed."""
        return WARM if self.device == "cuda" else 0

    def limits(self):
        """What the machine reaches in this run: a large product by its library, and a copy; bytes read and written."""
        n = 8192 if self.device == "cuda" else 256
        a = torch.randn(n, n, device=self.device).bfloat16()
        ms = self.event_ms(lambda: a @ a)
        self.results["limits"] = {"product": n, "product_tflops": 2 * n**3 / ms * 1e-9}
        x = torch.empty(2**31 if self.device == "cuda" else 2**20, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        ms = self.event_ms(lambda: y.copy_(x))
        self.results["limits"] |= {"copy_bytes": x.numel(), "copy_tb_per_s": 2 * x.numel() / ms * 1e-9}
        self.say(f"       this machine: {self.results['limits']}")

    # Times

    def event_ms(self, run, repeat=10):
        """Median milliseconds of a call on the device."""
        clock = time.perf_counter()
        for i in range(10000):
            run()
            if i >= 2:
                self.sync()
                if self.device != "cuda" or (time.perf_counter() - clock) * 1e3 >= WARM:
                    break
        times = []
        for _ in range(repeat):
            if self.device == "cuda":
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record(), run(), b.record()
                torch.cuda.synchronize()
                times.append(a.elapsed_time(b))
            else:
                clock = time.perf_counter()
                run()
                times.append((time.perf_counter() - clock) * 1e3)
        return statistics.median(times)

    def kernel(self, c):
        x, base, ok = self.check_kernel(c, self.target())
        if not (ok and c.time) or "kernels" not in self.a.only:
            return
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()}
        rivals = c.rival(torch, half)
        where = "attention" if c.name.startswith("attention") else "products"
        plan, rest = base[0], base[1:]
        at = rest.index("--entry") + 1
        for entry, run in rivals.items():
            words = [*rest[:at], entry, *rest[at + 1:]]
            said = self.measure(plan, *words, "--warm", self.warm(), "--repeat", 5, "--profile")
            # Both with events around the whole of it.
            profile, ours = said["profile"], statistics.median(said["replay_ms"])
            rival = self.event_ms(run)
            flops = c.flops * (2.5 if entry == "backward" else 1.0)
            row = {
                "what": c.name, "entry": entry, "pleach_ms": ours, "torch_ms": rival, "ratio": rival / ours,
                "pleach_tflops": flops / ours * 1e-9, "torch_tflops": flops / rival * 1e-9, "kernels": profile,
                "in_a_row_ms": said["in_a_row_ms"],
            }
            self.results[where].append(row)
            self.say(f"       {c.name} {entry}: {ours:.3f} ms, PyTorch {rival:.3f} ms ({row['ratio']:.2f} of its speed)")

    def time_ours(self, plan, checked):
        rows, length, config = plan["batch"], plan["length"], plan["config"]
        inputs = self.save("inputs.safetensors", reference.inputs(reference.batch(config, rows, length)))
        values = reference.adapter(config, plan["method"], plan["rank"])
        if plan["frozen"]:
            values = {site: v for site, v in values.items() if re.fullmatch(plan["modules"], site)}
        slot = self.save("slot.safetensors", reference.flat(values))
        t = rows * length
        said = self.measure(
            plan["file"], "--entry", "accumulate,update", "--shared-weights", "--slot", f"0={slot}", "--inputs", inputs,
            "--capacity", f"T={t},L={t},S={rows},P={length},C=1", "--warm", self.warm(),
            "--repeat", self.a.repeat, "--profile", limit=self.call(plan),
        )
        replay = statistics.median(said["replay_ms"])
        row = {
            "plan": plan["name"], "who": "pleach", "step_ms": statistics.median(said["times_ms"]), "min_ms": min(said["times_ms"]),
            "tokens_per_s": t / statistics.median(said["times_ms"]) * 1e3, "planned_bytes": said["planned_bytes"],
            "driver_bytes": said["driver_bytes"], "ready_ms": said["ready_ms"], "first_ms": said["first_ms"],
            "profile": said["profile"],
            "kernels_ms": sum(k["ms"] for k in said["profile"]) / said["profile_runs"], "profile_runs": said["profile_runs"],
        }
        row |= {"replay_ms": replay, "in_a_row_ms": said["in_a_row_ms"], "gap_share": 1 - said["in_a_row_ms"] / replay}
        row["checked"] = checked
        self.results["steps"].append(row)
        self.say(f"       {plan['name']} pleach: {row['step_ms']:.2f} ms, {(said['driver_bytes'] or 0) / 2**30:.2f} GiB")

    def forms(self, plan):
        """Times of every form of every kernel; `pleach tune --times` makes a plan of the fastest ones."""
        rows, length, config = plan["batch"], plan["length"], plan["config"]
        # At rate 0 the adapter stays as it is, so every run must give the same.
        given = reference.inputs(reference.batch(config, rows, length)) | {"lr": torch.zeros(1)}
        inputs = self.save("inputs.safetensors", given)
        slot = self.save("slot.safetensors", reference.flat(reference.adapter(config, "lora", plan["rank"])))
        t = rows * length
        said = self.measure(
            f"forms.{self.target()}.pleach", "--entry", "accumulate,update", "--shared-weights", "--slot", f"0={slot}", "--inputs",
            inputs, "--capacity", f"T={t},L={t},S={rows},P={length},C=1", "--warm", self.warm(),
            "--repeat", 3, "--forms", limit=max(LONG_CALL, self.a.limit),
        )
        self.results["forms"] = said["forms"]
        wrong = [f for f in said["forms"] if f["wrong"]]
        self.say(f"       {len(said['forms'])} forms of kernels timed, {len(wrong)} give other results")
        if wrong:
            raise RuntimeError(f"other results in these forms: {sorted({f['form'] for f in wrong})}")

    def time_rival(self, plan, who):
        """Optimizer steps of a rival at the same shapes; its peak by PyTorch's allocator and what the driver gave it."""
        config, rank, rows, length = plan["config"], plan["rank"], plan["batch"], plan["length"]
        ids = reference.batch(config, rows, length).to(self.device)
        if who == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            free = torch.cuda.mem_get_info()[0]
        if who == "unsloth":
            m = self.unsloth(config, rank)
        else:
            m = reference.model(config, torch.bfloat16, self.device)
            values = reference.adapter(config, "paca" if who == "paca" else "lora", rank)
            if who == "paca":
                m = reference.with_paca(m, values)
            else:
                m = reference.with_lora(m, values, rank, torch.bfloat16 if who == "peft-bf16" else None)
        m.train()
        run = torch.compile(m) if who == "compile" else m
        trained = [w for w in m.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=self.device == "cuda")
        times, first, begun, i = [], None, time.perf_counter(), 0
        while len(times) < self.a.repeat:
            clock = time.perf_counter()
            warm = i >= 3 and (self.device != "cuda" or (clock - begun) * 1e3 - first >= WARM)
            value = reference.loss(run, ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.sync()
            ms = (time.perf_counter() - clock) * 1e3
            if i == 0:
                first = ms
            if warm:
                times.append(ms)
            i += 1
        row = {
            "plan": plan["name"], "who": who, "step_ms": statistics.median(times), "min_ms": min(times), "first_ms": first,
            "tokens_per_s": rows * length / statistics.median(times) * 1e3, "loss": value.item(),
        }
        if self.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["driver_bytes"] = free - torch.cuda.mem_get_info()[0]
        self.results["steps"].append(row)
        self.say(f"       {plan['name']} {who}: {row['step_ms']:.2f} ms, {row.get('peak_bytes', 0) / 2**30:.2f} GiB")

    def rivals(self, plan):
        if plan["frozen"]:
            return []
        if plan["method"] == "paca":
            return ["paca"] if self.packages("paca", "transformers") else []
        if not self.packages("peft, peft-bf16, compile", *NEEDED):
            return []
        out = ["peft", "peft-bf16"]
        if self.device == "cuda" and not plan["family"].startswith("smollm2"):
            out.append("compile")
        for package, who in PATCHING.items():
            if importlib.util.find_spec(package):
                out.append(who)
            else:
                self.left_out(who, f"there is no package {package}")
        return out

    def apart(self, plan, who):
        """A rival in a process of its own."""
        command = [sys.executable, __file__, "--bundle", self.bundle, "--device", self.device, "--repeat", self.a.repeat]
        command = [str(x) for x in [*command, "--rival", who, "--plan", plan["name"], "--target", self.target()]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(min(self.left(), LONGEST), 5))
        if done.returncode:
            raise RuntimeError(f"ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        self.results["steps"].append(row)
        self.say(f"       {plan['name']} {who}: {row['step_ms']:.2f} ms, {row.get('peak_bytes', 0) / 2**30:.2f} GiB")

    def unsloth(self, config, rank):
        """Its own model class, loaded from a folder with the weights that everybody else has."""
        from unsloth import FastLanguageModel

        folder = self.file("unsloth")
        if not folder.is_dir():
            reference.model(config, torch.bfloat16, self.device).save_pretrained(folder)
        m, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.bfloat16, load_in_4bit=False)
        return FastLanguageModel.get_peft_model(
            m, r=rank, lora_alpha=2 * rank, target_modules=list(reference.LINEARS), lora_dropout=0.0, use_gradient_checkpointing=False,
        )

    def run(self):
        only = self.a.only
        plans = [p for p in self.index["plans"] if p["target"] == self.target()]
        if not plans:
            raise SystemExit(f"there are no plans for {self.target()} in {self.bundle / 'plans'}")
        # What an earlier run wrote is not taken for this one's.
        self.a.out.unlink(missing_ok=True)
        self.attempt("limits", 10, self.limits, "steps")
        right = set()
        if "checks" in only or "kernels" in only:
            for c in cases.cases(self.index.get("tiny", False)):
                self.attempt(c.name, 20, lambda: self.kernel(c), "checks")
        unchecked = set()
        if "checks" in only:
            self.check_plans(self.target(), right, unchecked)
        later = []
        for p in sorted((p for p in plans if p.get("time")), key=lambda p: p["order"]) if "steps" in only else []:
            if "checks" in only and p["family"] not in right | unchecked:
                self.left_out(p["name"], "a step of this model and method is not right, or not checked")
                continue
            self.attempt(p["name"], p["seconds"], lambda: self.time_ours(p, p["family"] in right), "steps")
            for who in self.rivals(p):
                if who in APART:
                    later.append((p, who))
                else:
                    self.attempt(f"{p['name']} {who}", p["seconds"], lambda: self.time_rival(p, who), "steps")
        for p in [p for p in self.index.get("blocks", []) if p["target"] == self.target()]:
            check, timed = "checks" in only, p["time"] and "steps" in only
            if check or timed:
                self.attempt(p["name"], 30, lambda: self.blocks(p, check, timed), "checks" if check else "blocks")
        # A newer GPU runs the older target's code too: it is checked, and not timed.
        for older in self.targets()[:-1] if "checks" in only else []:
            for c in cases.cases(self.index.get("tiny", False)):
                self.attempt(f"{c.name} {older}", 20, lambda: self.check_kernel(c, older), "checks")
            self.check_plans(older, set(), set())
        first = next((p for p in plans if p["name"] in FORMS_OF), None)
        if "forms" in only and first and (self.bundle / "plans" / f"forms.{self.target()}.pleach.gz").is_file():
            self.attempt("forms", 30, lambda: self.forms(first), "steps")
        # What takes longest comes last.
        long = lambda p, who: who == "compile" and p["config"]["num_hidden_layers"] > 4
        for p, who in sorted(later, key=lambda x: long(*x)):
            least = LONGEST if long(p, who) else p["seconds"]
            self.attempt(f"{p['name']} {who}", least, lambda: self.apart(p, who), "steps")
        good = self.write()
        bad = [c for c in self.results["checks"] if not c.get("ok")]
        failed = [r for k in ("products", "attention", "steps", "blocks") for r in self.results[k] if "error" in r]
        self.say(f"{self.a.out}: {len(self.results['checks']) - len(bad)} checks right, {len(bad)} wrong, {len(failed)} failed, "
                 f"{len(self.results['skipped'])} left out")
        return good

    def summary(self):
        """Ratios of what has been measured so far: ours to the rivals', and adapters to the frozen base."""
        steps = [r for r in self.results["steps"] if "step_ms" in r]
        ours = {r["plan"]: r for r in steps if r["who"] == "pleach"}
        for r in steps:
            own = ours.get(r["plan"])
            if own and r is not own:
                r["speedup"] = r["step_ms"] / own["step_ms"]
                for key, name in (("driver_bytes", "memory_ratio"), ("peak_bytes", "memory_ratio_to_allocated")):
                    if r.get(key) and own.get("driver_bytes"):
                        r[name] = own["driver_bytes"] / r[key]
        out = []
        for p in self.index["plans"]:
            base = ours.get(re.sub("-(lora|paca)-", "-frozen-", p["name"]))
            if p["target"] == self.target() and not p["frozen"] and base and p["name"] in ours:
                over = ours[p["name"]]["step_ms"] / base["step_ms"] - 1
                out.append({"plan": p["name"], "frozen_ms": base["step_ms"], "overhead": over})
        self.results["adapter_overhead"] = out

    def facts(self):
        """Versions and the device, asked once."""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        for name in ("peft", "transformers", "liger_kernel", "triton"):
            try:
                versions[name] = getattr(__import__(name), "__version__", "?")
            except Exception:
                versions[name] = None
        device = {"name": "cpu", "note": "no GPU: the numbers test the script, they measure nothing"}
        if self.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            device = {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory, "processors": p.multi_processor_count}
            ask = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
            try:
                device["driver"] = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip()
            except (OSError, subprocess.SubprocessError) as e:
                device["driver"] = f"not known: {e}"
        return {"device": device, "versions": versions}

    def write(self):
        """Writes everything there is so far under a temporary name that is renamed."""
        self.machine = self.machine or self.facts()
        self.summary()
        out = {
            "format": 2, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": self.index["commit"],
            "target": self.target(), **self.machine, "dtype": "bf16", "seconds": time.monotonic() - self.start,
            "plans": self.index["plans"], **self.results,
        }
        if self.a.rival:
            return True
        self.a.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.a.out.with_name(self.a.out.name + ".part")
        part.write_text(json.dumps(out, indent=1) + "\n")
        part.replace(self.a.out)
        failed = any("error" in r for k in ("products", "attention", "steps", "blocks") for r in self.results[k])
        return all(c.get("ok") for c in self.results["checks"]) and not failed


def main():
    here = Path(__file__).resolve().parent
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", type=Path, default=here, help="folder with `measure` and `plans/` (default: where this script is)")
    p.add_argument("--out", type=Path, default=Path("gpu-bench.json"))
    p.add_argument("--seconds", type=float, default=520.0, help="time for everything")
    p.add_argument("--repeat", type=int, default=5, help="timed steps")
    p.add_argument("--limit", type=float, default=CALL, help="seconds at most of one call of `measure`; many layers may take longer")
    p.add_argument("--only", default="checks,kernels,steps,forms", type=lambda s: s.split(","))
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where PyTorch computes; cpu tests this script")
    p.add_argument("--target", help="which plans; asked of the GPU when not given")
    p.add_argument("--rival", help=argparse.SUPPRESS)
    p.add_argument("--plan", help=argparse.SUPPRESS)
    a = p.parse_args()
    unknown = set(a.only) - {"checks", "kernels", "steps", "forms"}
    if unknown:
        p.error(f"--only knows checks, kernels, steps and forms, not {', '.join(sorted(unknown))}")
    if not (a.bundle / "plans/index.json").is_file():
        p.error(f"{a.bundle}/plans/index.json is missing; `make gpu-bundle` builds the folder")
    if a.device == "cuda" and not torch.cuda.is_available():
        p.error("PyTorch finds no GPU; --device cpu tests the script without one")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PyTorch brings cuBLASLt, which is one of the forms that are timed.
    at = Path(torch.__file__).parent
    found = [f for folder in (at / "lib", at.parent / "nvidia") for f in sorted(folder.glob("**/libcublasLt.so*"))]
    if found:
        os.environ.setdefault("PLEACH_CUBLASLT_LIBRARY", str(found[0]))
    # Whoever stops the run gets what it had: every part was written, and the scratch folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    b = Bench(a)
    if a.rival:
        plan = next(p for p in b.index["plans"] if p["name"] == a.plan and p["target"] == b.target())
        b.time_rival(plan, a.rival)
        print(json.dumps(b.results["steps"][0]))
        return
    sys.exit(0 if b.run() else 1)


if __name__ == "__main__":
    main()
