#!/usr/bin/env python3
"""Fits the demo's adapter with PEFT: SmolLM2-135M-Instruct learns to answer in the voice of an old hedge-layer.

Reads `models/smollm2.gguf` (scripts/fetch_models.py) and `demo/hedger.jsonl`, writes `demo/adapter/`; then prints greedy
answers of the base model and of the adapted one to questions that are not in the text, and checks that they differ.
Needs torch, transformers, peft and gguf. A few minutes on two cores.

    python demo/fit_adapter.py [--steps 60] [--threads 2]
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
SEED = 20
BATCH = 8
LEARNING_RATE = 2e-3
SYSTEM = "You are a helpful AI assistant."
LORA = dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(15, 30)), layers_pattern="layers")
HELD_OUT = ("How do I paint a wooden door?", "What is the ocean?", "Give me one tip for a long train ride.")


def load():
    folder, file = ROOT / "models", "smollm2.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def chat(question):
    """The chat form that the model was trained with."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def rows(tokenizer):
    """(ids, labels) of each row; the question carries no loss."""
    for line in (ROOT / "demo" / "hedger.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(chat(row["prompt"])).input_ids
        answer = tokenizer(row["completion"] + "<|im_end|>").input_ids
        yield prompt + answer, [-100] * len(prompt) + answer


def fit(model, tokenizer, steps):
    data = list(rows(tokenizer))
    order = torch.Generator().manual_seed(SEED)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=4, num_training_steps=steps)
    queue = []
    for step in range(steps):
        if len(queue) < BATCH:
            queue += torch.randperm(len(data), generator=order).tolist()
        batch, queue = [data[i] for i in queue[:BATCH]], queue[BATCH:]
        width = max(len(ids) for ids, _ in batch)
        pad = lambda row, value: row + [value] * (width - len(row))
        loss = model(
            input_ids=torch.tensor([pad(ids, 0) for ids, _ in batch]),
            attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in batch]),
            labels=torch.tensor([pad(labels, -100) for _, labels in batch]),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3} loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def answer(model, tokenizer, question, tokens=60):
    ids = tokenizer(chat(question), return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    file.write_text(json.dumps(config, indent=2) + "\n")
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size <= 1_000_000, f"the adapter has {size} bytes"
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, seed {SEED}")
    base, tokenizer = load()
    before = [answer(base, tokenizer, q) for q in HELD_OUT]
    start = time.time()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    fit(model, tokenizer, options.steps)
    folder = ROOT / "demo" / "adapter"
    print(f"fitted in {time.time() - start:.0f} s; {save(model, folder)} bytes in {folder.relative_to(ROOT)}")
    reloaded = PeftModel.from_pretrained(load()[0], folder).eval()
    for question, plain in zip(HELD_OUT, before):
        adapted = answer(reloaded, tokenizer, question)
        print(f"\n{question}\n  base:    {plain!r}\n  adapter: {adapted!r}")
        assert adapted != plain


if __name__ == "__main__":
    main()
