#!/usr/bin/env python3
"""Makes `tests/fixtures/models/`: what PEFT computes for the two fetched models, small enough to keep.

Needs torch, transformers, peft and gguf, and `models/` (scripts/fetch_models.py). About half a minute.

For SmolLM2 the logits are kept at `columns` only; `logits_peak` is the largest magnitude over all columns, the divisor of
the relative error. The questions are those of `demo/chats`, in the form the chat template gives them.

    python scripts/make_model_expectations.py
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "demo"))
from fit_adapter import HELD_OUT, chat, load  # noqa: E402

GREEDY = 64
COLUMNS = 512
SENTENCES = ("A hedge is a living fence.", "Hawthorn makes a barrier that grows.", "The train to Rome leaves at noon.")


def pack(rows):
    ids = torch.cat([torch.tensor(r) for r in rows])
    return ids, torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])


def each(model, ids, segments):
    for a, b in zip(segments, segments[1:]):
        yield model(input_ids=ids[None, a:b])


def continuation(model, ids):
    """Greedy ids, up to GREEDY of them and up to the first eos, which is kept."""
    out = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=GREEDY, do_sample=False, pad_token_id=2)
    return out[0, len(ids) :].clone()


@torch.no_grad()
def smollm2(out, adapter):
    model, tokenizer = load()
    model.generation_config.eos_token_id = 2
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    rows = [tokenizer(chat(q)).input_ids for q in HELD_OUT[:2]] + [[504]]
    ids, segments = pack(rows)
    logits = torch.cat([o.logits[0] for o in each(model, ids, segments)])
    columns = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(3))[:COLUMNS].sort().values
    tensors = {
        "input_ids": ids,
        "segments": segments,
        "columns": columns,
        "logits": logits[:, columns].contiguous(),
        "logits_peak": logits.abs().max()[None],
        "argmax": logits.argmax(1),
    }
    for i, row in enumerate(rows[:2]):
        tensors[f"greedy_ids.{i}"] = continuation(model, torch.tensor(row))
    save_file(tensors, out / f"smollm2-{'adapter' if adapter else 'base'}.safetensors")


@torch.no_grad()
def minilm(out):
    model = AutoModel.from_pretrained(ROOT / "models" / "minilm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "minilm")
    ids, segments = pack([tokenizer(s).input_ids for s in SENTENCES])
    hidden = torch.cat([o.last_hidden_state[0] for o in each(model, ids, segments)])
    means = torch.stack([hidden[a:b].mean(0) for a, b in zip(segments, segments[1:])])
    means = torch.nn.functional.normalize(means)
    cosine = means @ means.T
    print("cosines", [[round(v, 4) for v in row] for row in cosine.tolist()])
    save_file({"input_ids": ids, "segments": segments, "last_hidden_state": hidden, "cosine": cosine}, out / "minilm.safetensors")


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    out = ROOT / "tests" / "fixtures" / "models"
    out.mkdir(parents=True, exist_ok=True)
    smollm2(out, None)
    smollm2(out, ROOT / "demo" / "adapter")
    minilm(out)
    print(f"{sum(p.stat().st_size for p in out.iterdir()) / 1e3:.0f} kB in {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
