"""Prints the numbers that src/lower/tests.rs compares with: transformers and PEFT on tiny models.

Run with a Python that has torch, transformers and peft. Weights come from a linear congruential sequence per tensor,
so that the Rust test makes the same ones; each row of the result is reduced to its product with a fixed vector.
"""

import warnings

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")


def values(index, shape):
    state, out = (index * 2654435761 + 12345) & 0xFFFFFFFF, []
    for _ in range(int(np.prod(shape))):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append((state >> 8) / 2**23 - 1.0)
    return torch.tensor(np.array(out, dtype=np.float32).reshape(shape))


def fill(named, first):
    with torch.no_grad():
        for k, (_, p) in enumerate(named):
            p.copy_(values(first + k, p.shape))


def reduce(rows):
    v = values(777, (rows.shape[-1],)).double()
    return [round(float(x), 5) for x in rows.double() @ v]


SEQUENCES = [[3, 17, 39, 0, 8], [21, 5, 5]]
TYPES = [[0, 0, 1, 1, 1], [1, 0, 0]]


def adapt(model, configs):
    for slot, config in enumerate(configs):
        name = f"a{slot}"
        model = get_peft_model(model, config, adapter_name=name) if slot == 0 else model
        if slot:
            model.add_adapter(name, config)
        named = [(n, p) for n, p in model.named_parameters() if f".{name}." in f"{n}."]
        fill(sorted(named, key=lambda x: x[0].replace(f".{name}", "")), 1000 * (slot + 1))
    if configs:
        model.base_model.set_adapter([f"a{slot}" for slot in range(len(configs))])
    return model.eval()


def llama(configs=(), **extra):
    c = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    vocab_size=40, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, **extra)
    m = LlamaForCausalLM(c).float()
    fill(m.named_parameters(), 0)
    m = adapt(m, configs)
    with torch.no_grad():
        return [x for s in SEQUENCES for x in reduce(m(torch.tensor([s])).logits[0])]


def bert(configs=(), **extra):
    c = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
                   max_position_embeddings=32, type_vocab_size=2, **extra)
    m = BertModel(c).float()
    fill(m.named_parameters(), 0)
    m = adapt(m, configs)
    with torch.no_grad():
        run = lambda s, t: m(torch.tensor([s]), token_type_ids=torch.tensor([t])).last_hidden_state[0]
        return [x for s, t in zip(SEQUENCES, TYPES) for x in reduce(run(s, t))]


ROPE3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
A = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 5})
B = LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear", alpha_pattern={"0.mlp.up_proj": 1})
print("LLAMA", llama(rope_parameters=PLAIN))
print("LLAMA_WIDE", llama(rope_parameters=ROPE3, attention_bias=True, mlp_bias=True, head_dim=6))
print("LLAMA_ONE", llama([A], rope_parameters=PLAIN))
print("LLAMA_TWO", llama([A, B], rope_parameters=PLAIN))
ENDS = LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head", "k_proj"])
print("LLAMA_ENDS", llama([ENDS], rope_parameters=PLAIN))
print("BERT", bert())
print("BERT_TANH", bert(hidden_act="gelu_new"))
print("BERT_RELU_ADAPTED", bert([LoraConfig(r=2, lora_alpha=3, target_modules=["query", "dense"])], hidden_act="relu"))
