#!/usr/bin/env python3
"""Makes the small models, adapters and expected outputs in `tests/fixtures/`.

Needs torch, transformers, peft, tokenizers and safetensors; no network. Same versions, same bytes.

The models are *sharp*: weights have a standard deviation of at least 0.2, norm weights and biases are random, epsilons
are large, so that leaving out any one feature moves the result by at least 100 times the tolerance. `probe` asserts
that for each feature listed at `sharpness_*`. Expected outputs are PEFT's, in float32, each sequence run alone.

    python scripts/make_fixtures.py [--out tests/fixtures]
"""

import argparse
import copy
import json
import shutil
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

TOLERANCE = 2e-5  # largest difference over largest magnitude
LENGTHS = (13, 1, 24)  # tokens of the three sequences of every case
ADAPTER_STD = 0.12  # of A and of B
GREEDY = 24  # tokens of the greedy continuation

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def relative(a, b):
    """Largest difference over the largest magnitude of `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def randomise(model, seed, std, embedding_std):
    """Fills every parameter from one seeded stream, in the order of the names."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=g)
            if "norm" in name.lower() and name.endswith("weight"):
                p.copy_(1.0 + 0.3 * r)
            elif "embed" in name:
                p.copy_(embedding_std * r)
            else:
                p.copy_(std * r)


def packed(vocab, seed):
    """Packed ids `[T]` and segments `[S+1]`; ids 0..2 are left to the special tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (sum(LENGTHS),), generator=g)
    segments = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return ids, segments


def output(model, ids):
    """One sequence alone: logits `[T, V]` of a decoder, last hidden state `[T, d]` of an encoder."""
    out = model(input_ids=ids[None])
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0].float()


@torch.no_grad()
def forward(model, ids, segments):
    return torch.cat([output(model, ids[a:b]) for a, b in zip(segments, segments[1:])])


@torch.no_grad()
def greedy(model, ids, segments):
    """Greedy continuations `[S, GREEDY]` without a cache; None if a choice is close to a tie."""
    rows = []
    for a, b in zip(segments, segments[1:]):
        seq = ids[a:b]
        for _ in range(GREEDY):
            top = output(model, seq)[-1].topk(2)
            if top.values[0] - top.values[1] < 20 * TOLERANCE * top.values[0].abs():
                return None
            seq = torch.cat([seq, top.indices[:1]])
        rows.append(seq[b - a :])
    return torch.stack(rows)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---- models ------------------------------------------------------------------------------------------------------


def llama_config(**changes):
    base = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=256,
        rms_norm_eps=2e-3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaConfig(**(base | changes))


def make_llama_tiny(out):
    """Grouped heads, tied head, default RoPE; f32 in one file, config as transformers 5 writes it."""
    model = LlamaForCausalLM(llama_config()).eval()
    randomise(model, 11, 0.2, 0.2)
    model.save_pretrained(out)
    byte_tokenizer(out)
    return model


def make_llama_tiny_v4(out, source):
    """The weights of llama-tiny with biases, a head of its own and llama3 RoPE; bf16 in shards, a transformers 4 config."""
    rope = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    config = llama_config(
        tie_word_embeddings=False,
        attention_bias=True,
        eos_token_id=[2, 0],
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **rope},
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model, 12, 0.2, 0.2)
    model.load_state_dict({k: v for k, v in source.state_dict().items() if k != "lm_head.weight"}, strict=False)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="80KB")
    old = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 2e-3,
        "rope_scaling": {**rope, "rope_type": "llama3"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "vocab_size": 128,
    }
    write_json(out / "config.json", old)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0], "transformers_version": "4.46.3"})
    shards = sorted(p.name for p in out.glob("model-*.safetensors"))
    assert 2 <= len(shards) <= 4, shards
    return shards


def make_llama_odd(out):
    """Sizes that are multiples of nothing: one kv head, head_dim 22, mlp biases, other theta; f16."""
    config = llama_config(
        hidden_size=60,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=22,
        vocab_size=131,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model, 13, 0.2, 0.2)
    model.to(torch.float16).save_pretrained(out)


def make_bert_tiny(out):
    """Encoder with exact gelu; as `BertModel` saves it, with a pooler that the last hidden state does not need."""
    config = BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        vocab_size=128,
        max_position_embeddings=64,
        hidden_act="gelu",
        layer_norm_eps=2e-2,
    )
    model = BertModel(config).eval()
    randomise(model, 14, 0.2, 0.4)
    model.save_pretrained(out)


def byte_tokenizer(out):
    """A byte-level tokenizer of 128 tokens: 3 special ones, printable ASCII, newline and the bytes of a few letters."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = "".join(chr(c) for c in range(32, 127)) + "\näöüßéèñçœ€→"
    units = []
    for byte in text.encode():
        unit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0] if byte < 128 else None
        units.append(unit if unit else next(u for u in sorted(alphabet) if byte_of(u) == byte))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for unit in units:
        vocab.setdefault(unit, len(vocab))
    for i in range(len(vocab), 128):
        vocab[f"<extra_{i}>"] = i
    assert len(vocab) == 128, len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    assert tokenizer.decode(tokenizer.encode("Grün → 1€").ids) == "Grün → 1€"
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def byte_of(unit):
    """The byte a character of the byte-level alphabet stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    code = ord(unit)
    return code if code in plain else [b for b in range(256) if b not in plain][code - 256]


# ---- adapters ----------------------------------------------------------------------------------------------------

# name -> (model it is made on, LoraConfig)
ADAPTERS = {
    "lora-r4": ("llama-tiny", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "lora-all": ("llama-tiny", dict(r=5, lora_alpha=7, use_rslora=True, target_modules="all-linear")),
    "lora-pattern": (
        "llama-tiny",
        dict(
            r=4,
            lora_alpha=6,
            target_modules=r"model\.layers\.\d+\.(self_attn\.(q|o)_proj|mlp\.(gate|down)_proj)",
            exclude_modules=r".*layers\.0\.mlp\.gate_proj",
            rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7, r"^model\.layers\.0\.self_attn\.o_proj": 1},
            alpha_pattern={"o_proj": 11, r"layers\.0\.mlp\.down_proj": 3},
        ),
    ),
    "lora-layers": (
        "llama-tiny",
        dict(r=6, lora_alpha=6, target_modules=["k_proj", "v_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    ),
    "lora-exclude": (
        "llama-tiny",
        dict(r=2, lora_alpha=5, target_modules=["q_proj", "k_proj", "o_proj"], exclude_modules=["model.layers.1.self_attn.k_proj", "o_proj"]),
    ),
    "lora-odd": (
        "llama-odd",
        dict(r=17, lora_alpha=9, use_rslora=True, target_modules="all-linear", rank_pattern={"down_proj": 33}, alpha_pattern={"v_proj": 4}),
    ),
    "bert-qv": ("bert-tiny", dict(r=4, lora_alpha=8, target_modules=["query", "value"])),
    "bert-all": ("bert-tiny", dict(r=3, lora_alpha=5, target_modules="all-linear")),
    "dora": ("llama-tiny-v4", dict(r=3, lora_alpha=4, use_dora=True, target_modules="all-linear")),
    "bias": ("llama-tiny-v4", dict(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], bias="all")),
    "save": ("llama-tiny", dict(r=2, lora_alpha=3, target_modules=["v_proj"], modules_to_save=["lm_head", "model.norm"])),
    "paca": ("llama-tiny", dict(peft_type="PACA", r=6, paca_alpha=9, target_modules="all-linear")),
    "bert-ia3": ("bert-tiny", dict(peft_type="IA3", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])),
}

# model -> lists of adapters active together
CASES = {
    "llama-tiny": [[], ["lora-r4"], ["lora-all"], ["lora-pattern"], ["lora-layers"], ["lora-exclude"], ["lora-r4", "lora-all"], ["lora-pattern", "lora-layers"], ["save"], ["paca"]],
    "llama-tiny-v4": [[], ["lora-r4"], ["lora-all"], ["lora-pattern"], ["lora-r4", "lora-pattern"], ["dora"], ["bias"], ["paca"]],
    "llama-odd": [[], ["lora-odd"]],
    "bert-tiny": [[], ["bert-qv"], ["bert-all"], ["bert-qv", "bert-all"], ["bert-ia3"]],
}


def load(out, name):
    auto = AutoModel if name.startswith("bert") else AutoModelForCausalLM
    return auto.from_pretrained(out / name, dtype=torch.float32).eval()


def make_paca(out, index, name, model_name, options):
    """A folder as PEFT 0.22 writes it: PEFT 0.21 has no PaCA."""
    g = torch.Generator().manual_seed(100 + index)
    tensors, r = {}, options["r"]
    for key, m in load(out, model_name).named_modules():
        if isinstance(m, torch.nn.Linear) and key != "lm_head":
            prefix = f"base_model.model.{key}."
            tensors[prefix + "paca_delta"] = 2 * ADAPTER_STD * torch.randn(m.out_features, r, generator=g)
            tensors[prefix + "paca_indices"] = torch.randperm(m.in_features, generator=g)[:r].sort().values
    folder = out / "adapters" / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", options | {"base_model_name_or_path": model_name, "task_type": None})


def make_adapter(out, index, name, model_name, options):
    if options.get("peft_type") == "PACA":
        return make_paca(out, index, name, model_name, options)
    kind = IA3Config if options.get("peft_type") == "IA3" else LoraConfig
    model = get_peft_model(load(out, model_name), kind(**options))
    g = torch.Generator().manual_seed(100 + index)
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if "magnitude" in key or (p.requires_grad and "lora_" not in key):
                p.add_(ADAPTER_STD * torch.randn(p.shape, generator=g))
            elif "lora_" in key:  # B too: an adapter with B = 0 tests nothing
                p.copy_(ADAPTER_STD * torch.randn(p.shape, generator=g))
    folder = out / "adapters" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):  # sets: their order is the hash seed's
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    config["base_model_name_or_path"] = model_name
    write_json(folder / "adapter_config.json", config)


def attach(base, out, names):
    if not names:
        return base
    config = json.loads((out / "adapters" / names[0] / "adapter_config.json").read_text())
    if config["peft_type"] == "PACA":
        # The definition itself: the chosen columns plus the scaled differences.
        scale = config["paca_alpha"] / config["r"]
        tensors = load_file(out / "adapters" / names[0] / "adapter_model.safetensors")
        with torch.no_grad():
            for key, delta in tensors.items():
                if key.endswith(".paca_delta"):
                    weight = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".paca_delta")).weight
                    weight[:, tensors[key.replace("paca_delta", "paca_indices")]] += scale * delta
        return base
    model = PeftModel.from_pretrained(base, out / "adapters" / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(out / "adapters" / name, adapter_name=name)
    model.base_model.set_adapter(list(names))
    return model.eval()


# ---- expected outputs --------------------------------------------------------------------------------------------


def expect(out, name, adapters):
    """Writes one case; takes the first ids for which no greedy choice is close to a tie."""
    key = "last_hidden_state" if name.startswith("bert") else "logits"
    model = attach(load(out, name), out, adapters)
    eos = torch.tensor(model.config.eos_token_id if key == "logits" else [])
    for seed in range(7, 50):
        ids, segments = packed(model.config.vocab_size, seed)
        tensors = {"input_ids": ids, "segments": segments, key: forward(model, ids, segments)}
        if key != "logits":
            break
        tensors["greedy_ids"] = greedy(model, ids, segments)
        if tensors["greedy_ids"] is None or torch.isin(tensors["greedy_ids"], eos).any():
            continue
        assert len(tensors["greedy_ids"].unique()) >= 4, f"{name} {adapters}: the continuation is dull"
        break
    else:
        raise AssertionError(f"{name} {adapters}: no clear continuation")
    exact = forward(copy.deepcopy(model).double(), ids, segments)
    noise = relative(tensors[key], exact)
    print(f"  {name:14} {'+'.join(adapters) or 'base':28} seed {seed}, f32 against f64 {noise:.1e}")
    assert noise < TOLERANCE / 4, f"{name} {adapters}: too little room for another order of sums"
    if adapters:
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        tensors[f"merged_{key}"] = forward(merged, ids, segments)
        assert relative(tensors[f"merged_{key}"], tensors[key]) < TOLERANCE / 2
    file = out / "expected" / name / ("+".join(adapters) or "base")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{file}.safetensors")
    entry = {"model": name, "adapters": [f"adapters/{a}" for a in adapters], "expected": f"expected/{name}/{file.name}.safetensors"}
    return entry | {"output": key, "tolerance": TOLERANCE}, tensors


# ---- sharpness ---------------------------------------------------------------------------------------------------


def probe(out, name, features, adapters=(), times=100):
    """Each feature is an edit of a fresh model that leaves it out; the output must move by `times` tolerances."""
    ids, segments = packed(load(out, name).config.vocab_size, 7)
    with torch.no_grad():
        want = forward(attach(load(out, name), out, adapters), ids, segments)
        for feature, edit in features.items():
            model = attach(load(out, name), out, adapters)
            edit(model)
            moved = relative(forward(model, ids, segments), want)
            print(f"  {name:14} without {feature:28} moves the output by {moved:.1e}")
            assert moved > times * TOLERANCE, f"{name}: leaving out {feature} would go unseen"


def every(model, ending, act):
    hits = [m for n, m in model.named_modules() if n.endswith(ending)]
    assert hits, ending
    for m in hits:
        act(m)


def zero_bias(*endings):
    return lambda model: [every(model, e, lambda m: m.bias.data.zero_()) for e in endings]


def no_rope(model):
    every(model, "rotary_emb", lambda m: m.inv_freq.zero_())


def wrong_groups(model):
    """Query head h reads kv head h mod G instead of h div (H/G): the kv heads change places."""

    def swap(m):
        groups = model.config.num_key_value_heads
        m.weight.data.copy_(m.weight.data.view(groups, -1, m.in_features).flip(0).reshape_as(m.weight))

    every(model, "k_proj", swap)
    every(model, "v_proj", swap)


def set_all(ending, **values):
    return lambda model: every(model, ending, lambda m: [setattr(m, k, v) for k, v in values.items()])


def unit_weight(ending):
    return lambda model: every(model, ending, lambda m: m.weight.data.fill_(1.0))


def scale_is(change):
    """Replaces the LoRA scale `s` of each site by `change(s, rank)`."""

    def edit(model):
        for m in model.modules():
            if hasattr(m, "lora_A"):
                m.scaling.update({key: change(s, m.r[key]) for key, s in m.scaling.items()})

    return edit


def sharpness_llama(out):
    common = {
        "RoPE": no_rope,
        "norm weights": unit_weight("layernorm"),
        "the last norm's weight": unit_weight("model.norm"),
        "the config's epsilon": set_all("layernorm", variance_epsilon=1e-6),
        "silu": set_all("act_fn", forward=torch.nn.functional.gelu),
    }
    probe(out, "llama-tiny", common | {"grouped heads": wrong_groups})
    llama3 = lambda m: every(m, "rotary_emb", lambda r: r.inv_freq.copy_(1e4 ** (-torch.arange(0, 16, 2) / 16)))
    probe(out, "llama-tiny-v4", common | {"llama3 scaling": llama3, "qkv biases": zero_bias("q_proj", "v_proj"), "the o bias": zero_bias("o_proj")})
    theta = lambda m: every(m, "rotary_emb", lambda r: r.inv_freq.copy_(1e4 ** (-torch.arange(0, 22, 2) / 22)))
    probe(out, "llama-odd", common | {"theta 500": theta, "mlp biases": zero_bias("gate_proj", "up_proj", "down_proj")})
    probe(out, "llama-tiny", {"the adapter": lambda m: m.disable_adapter_layers(), "alpha / rank": scale_is(lambda s, r: 1.0)}, ["lora-r4"])
    probe(out, "llama-tiny", {"the root of rslora": scale_is(lambda s, r: s / r**0.5)}, ["lora-all"])
    probe(out, "llama-tiny", {"alpha_pattern": scale_is(lambda s, r: 6 / r), "the rank in the scale": scale_is(lambda s, r: s * r / 4)}, ["lora-pattern"])
    second = lambda m: m.base_model.set_adapter(["lora-r4"])
    probe(out, "llama-tiny", {"the second adapter": second}, ["lora-r4", "lora-all"])


def sharpness_bert(out):
    zero = lambda e: lambda model: every(model, e, lambda m: m.weight.data.zero_())
    features = {
        "token types": zero("token_type_embeddings"),
        "positions": zero("position_embeddings"),
        "norm weights": unit_weight("LayerNorm"),
        "norm biases": zero_bias("LayerNorm"),
        "the config's epsilon": set_all("LayerNorm", eps=1e-12),
        "biases": zero_bias("query", "value", "output.dense", "intermediate.dense"),
        "gelu": set_all("intermediate_act_fn", forward=torch.nn.functional.silu),
    }
    probe(out, "bert-tiny", features)
    # The two gelus differ by less than 5e-4 everywhere: no model can show more of it.
    tanh = set_all("intermediate_act_fn", forward=lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    probe(out, "bert-tiny", {"the erf in gelu": tanh}, times=10)
    probe(out, "bert-tiny", {"the adapter": lambda m: m.disable_adapter_layers()}, ["bert-qv"])


def sharpness_packing(out):
    """Sequences are apart: one after the other as a single sequence gives something else."""
    for name in CASES:
        model = load(out, name)
        ids, segments = packed(model.config.vocab_size, 7)
        with torch.no_grad():
            assert relative(output(model, ids), forward(model, ids, segments)) > 100 * TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "fixtures")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in (*CASES, "adapters", "expected"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    make_llama_tiny_v4(out / "llama-tiny-v4", make_llama_tiny(out / "llama-tiny"))
    make_llama_odd(out / "llama-odd")
    make_bert_tiny(out / "bert-tiny")
    for index, (name, (model, options)) in enumerate(ADAPTERS.items()):
        make_adapter(out, index, name, model, options)
    cases, greedy_ids = [], {}
    for name, lists in CASES.items():
        for adapters in lists:
            entry, tensors = expect(out, name, adapters)
            cases.append(entry)
            if "greedy_ids" in tensors:
                ids = tuple(tensors["greedy_ids"].flatten().tolist())
                assert ids not in greedy_ids.values(), f"{name} {adapters}: same continuation as another case"
                greedy_ids[entry["expected"]] = ids
    sharpness_llama(out)
    sharpness_bert(out)
    sharpness_packing(out)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    write_json(out / "cases.json", {"made_with": versions, "cases": cases})
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{len(cases)} cases, {size / 1e6:.1f} MB in {out}")
    assert size < 6_000_000


if __name__ == "__main__":
    main()
