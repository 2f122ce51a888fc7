"""The rival's side of the benchmark: PyTorch + transformers + PEFT in float32 on the CPU.

Gives outputs (to compare) and times in milliseconds (to beat). Knows nothing of pleach.
"""

import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

PROMPT = 16  # tokens before a decode


def clock(run, repeats):
    """Milliseconds of each of `repeats` runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def make_adapter(model_folder: Path, out: Path, rank: int = 16):
    """A LoRA on all linear layers whose branch is about a fifth of the layer's output: A of std 1/sqrt(in), B of std 0.05."""
    if (out / "adapter_model.safetensors").exists():
        return
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * (p.shape[1] ** -0.5 if "lora_A" in name else 0.05))
    model.save_pretrained(out)


class Decoder:
    """A causal language model, plain or with an adapter, unmerged or merged. In bf16, adapters stay f32, as PEFT loads them."""

    def __init__(self, folder: Path, adapter: Path | None = None, merge: bool = False, dtype: torch.dtype = torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
            if merge:
                model = model.merge_and_unload()
        self.model = model.eval()

    @torch.inference_mode()
    def logits(self, ids, segments):
        """[T, V], each sequence run alone."""
        rows = [self.model(input_ids=ids[None, a:b], use_cache=False).logits[0] for a, b in zip(segments, segments[1:])]
        return torch.cat(rows)

    @torch.inference_mode()
    def greedy(self, ids, tokens, through_eos=False):
        """The new ids; with `through_eos` exactly `tokens` of them, whatever they are."""
        least = dict(min_new_tokens=tokens) if through_eos else {}
        out = self.model.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=tokens, do_sample=False, pad_token_id=2, **least
        )
        return out[0, len(ids) :].clone()

    @torch.inference_mode()
    def prefill_ms(self, tokens, repeats):
        """Forward of one sequence of random ids, logits at every position."""
        ids = torch.randint(3, self.model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
        return clock(lambda: self.model(input_ids=ids, use_cache=False).logits, repeats)

    def decode_ms(self, tokens, repeats):
        """Per new token: a generation of `tokens` after a short prompt, less the time to the first token."""
        ids = torch.randint(3, self.model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(2))
        first = min(clock(lambda: self.greedy(ids, 1, True), 2))
        return [(ms - first) / (tokens - 1) for ms in clock(lambda: self.greedy(ids, tokens, True), repeats)]


class Encoder:
    def __init__(self, folder: Path):
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def hidden(self, ids, segments):
        return torch.cat([self.model(input_ids=ids[None, a:b]).last_hidden_state[0] for a, b in zip(segments, segments[1:])])


def linear_ms(m, n, k, repeats):
    """x [m, k] times the transpose of w [n, k], as a linear layer computes it. Small ones rotate through enough weights to leave
    the caches, as a model's decode does."""
    copies = 1 if m > 1 else max(1, 256_000_000 // (4 * n * k))
    g = torch.Generator().manual_seed(4)
    x = torch.randn(m, k, generator=g)
    weights = [torch.randn(n, k, generator=g) for _ in range(copies)]

    @torch.inference_mode()
    def run():
        for w in weights:
            torch.nn.functional.linear(x, w)

    return [ms / copies for ms in clock(run, repeats)]
