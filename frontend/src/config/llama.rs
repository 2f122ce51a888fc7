//! The Llama family: llama itself, and mistral and qwen2 where they are llama with other defaults.

use super::rope::{self, Rope};
use super::{MAX_LAYERS, MAX_SIZE};
use crate::error::Result;
use crate::json::{Fields, brief};

/// Which `model_type` a configuration came from; decides defaults and module names, not the mathematics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlamaFamily {
    Llama,
    Mistral,
    Qwen2,
}

/// Everything that the forward pass of a llama-like decoder needs.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Where it came from.
    pub family: LlamaFamily,
    /// Vocabulary size, V.
    pub vocab: u64,
    /// Model width, d.
    pub hidden: u64,
    /// Width of the gated MLP.
    pub intermediate: u64,
    /// Number of blocks.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u64,
    /// Width of one head; even.
    pub head_dim: u64,
    /// Longest sequence that the model was made for.
    pub max_positions: u64,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// A query sees at most this many keys, its own included.
    pub window: Option<u64>,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub out_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the output head shares the token embedding.
    pub tied_head: bool,
    /// Ids that end a sequence, as the configuration gives them (`generation_config.json` may say otherwise).
    pub eos: Vec<u32>,
}

pub(super) fn read(fields: &mut Fields, family: LlamaFamily) -> Result<LlamaConfig> {
    let hidden = fields.required_count("hidden_size", MAX_SIZE)?;
    let heads = fields.required_count("num_attention_heads", 1 << 16)?;
    let kv_heads = match (fields.count("num_key_value_heads", 1 << 16)?, family) {
        (Some(n), _) => n,
        (None, LlamaFamily::Llama) => heads,
        // The classes' own defaults (8 and 32) are those of one model size: guessing would be silent.
        (None, _) => return Err(fields.fault("num_key_value_heads", "is missing")),
    };
    if heads % kv_heads != 0 {
        return Err(
            fields.fault("num_key_value_heads", format!("{kv_heads} does not divide num_attention_heads {heads}"))
        );
    }
    let head_dim = match fields.count("head_dim", 1 << 16)? {
        Some(n) => n,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(fields.fault("num_attention_heads", format!("{heads} does not divide hidden_size {hidden}")));
        }
    };
    if head_dim % 2 != 0 {
        return Err(fields.fault("head_dim", format!("is {head_dim}; RoPE needs an even width")));
    }
    let act = fields.text("hidden_act")?.unwrap_or("silu");
    if !matches!(act, "silu" | "swish") {
        return Err(fields.fault("hidden_act", format!("is `{act}`; this model type is supported with silu only")));
    }
    let max_positions = fields.count("max_position_embeddings", 1 << 40)?.unwrap_or(match family {
        LlamaFamily::Llama => 2048,
        LlamaFamily::Mistral => 4096 * 32,
        LlamaFamily::Qwen2 => 32768,
    });
    let window = window(fields, family)?;
    fields.must_be_off("attention_sinks", "attention sinks are not supported")?;
    match fields.count("pretraining_tp", 1 << 16)? {
        None | Some(1) => {}
        Some(n) => return Err(fields.fault("pretraining_tp", format!("is {n}; only 1 is supported"))),
    }
    let (qkv_bias, out_bias, mlp_bias) = match family {
        LlamaFamily::Llama => {
            let attention = fields.flag("attention_bias")?.unwrap_or(false);
            (attention, attention, fields.flag("mlp_bias")?.unwrap_or(false))
        }
        LlamaFamily::Mistral => (false, false, false),
        LlamaFamily::Qwen2 => (true, false, false),
    };
    Ok(LlamaConfig {
        family,
        vocab: fields.required_count("vocab_size", MAX_SIZE)?,
        hidden,
        intermediate: fields.required_count("intermediate_size", MAX_SIZE)?,
        layers: fields.required_count("num_hidden_layers", MAX_LAYERS)?,
        heads,
        kv_heads,
        head_dim,
        max_positions,
        norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
        rope: rope::read(fields, max_positions)?,
        window,
        qkv_bias,
        out_bias,
        mlp_bias,
        tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        eos: fields.ids("eos_token_id")?.unwrap_or_default(),
    })
}

/// Sliding windows in their several spellings. Mistral has one window for all layers, by its class 4096; windows of some
/// layers only are refused.
fn window(fields: &mut Fields, family: LlamaFamily) -> Result<Option<u64>> {
    let why = "sliding-window attention is not supported for this model type";
    let off_by_switch = fields.flag("use_sliding_window")? == Some(false)
        || (family == LlamaFamily::Qwen2 && fields.raw("use_sliding_window").is_none());
    fields.must_be_off("use_sliding_window", why)?;
    let absent = !fields.has("sliding_window");
    let window = fields.raw("sliding_window");
    let given = fields.count("sliding_window", 1 << 30)?;
    let window_of_all = match family {
        LlamaFamily::Mistral if absent => Some(4096),
        LlamaFamily::Mistral => given,
        _ => None,
    };
    let off = family == LlamaFamily::Mistral || (off_by_switch && family == LlamaFamily::Qwen2);
    if let Some(value) = window.filter(|_| !off) {
        return Err(fields.fault("sliding_window", format!("is {}: {why}", brief(value))));
    }
    if family == LlamaFamily::Qwen2 {
        fields.raw("max_window_layers");
    }
    if let Some(value) = fields.raw("layer_types") {
        let full = |v: &serde_json::Value| v.as_str() == Some("full_attention");
        if !value.as_array().is_some_and(|list| list.iter().all(full)) {
            return Err(fields.fault("layer_types", format!("is {}: only full_attention is supported", brief(value))));
        }
    }
    Ok(window_of_all)
}

#[cfg(test)]
mod tests {
    use super::super::ModelConfig;
    use super::super::tests::{parse, with};
    use super::*;
    use serde_json::{Value, json};

    fn smol() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
            "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
            "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
            "use_cache": true, "vocab_size": 49152
        })
    }

    fn llama(value: Value) -> LlamaConfig {
        match parse(value).unwrap() {
            ModelConfig::Llama(config) => config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_real_configuration_is_read() {
        let config = llama(smol());
        assert_eq!((config.head_dim, config.kv_heads, config.layers, config.vocab), (64, 3, 30, 49152));
        assert!(config.tied_head && !config.qkv_bias);
        assert_eq!((config.norm_eps, config.rope.theta, config.eos), (1e-5, 1e5, vec![2]));
        assert_eq!(llama(with(&smol(), "eos_token_id", json!([2, 0]))).eos, [2, 0]);
        assert_eq!(llama(with(&smol(), "num_key_value_heads", json!(null))).kv_heads, 9);
    }

    #[test]
    fn relatives_are_read_where_they_are_exact() {
        let mistral = with(&with(&smol(), "model_type", json!("mistral")), "sliding_window", json!(null));
        assert_eq!(llama(mistral.clone()).family, LlamaFamily::Mistral);
        assert_eq!(llama(mistral.clone()).window, None);
        assert_eq!(llama(with(&mistral, "sliding_window", json!(3))).window, Some(3));
        assert!(parse(with(&mistral, "sliding_window", json!(-1))).is_err());
        // What the class sets where the file says nothing.
        assert_eq!(llama(with(&smol(), "model_type", json!("mistral"))).window, Some(4096));
        assert!(parse(with(&smol(), "sliding_window", json!(4096))).is_err());
        let mut qwen = with(&with(&smol(), "model_type", json!("qwen2")), "use_sliding_window", json!(false));
        qwen = with(&with(&qwen, "sliding_window", json!(131072)), "max_window_layers", json!(28));
        let config = llama(qwen.clone());
        assert!(config.qkv_bias && !config.out_bias);
        assert!(parse(with(&qwen, "use_sliding_window", json!(true))).is_err());
        assert!(parse(with(&qwen, "layer_types", json!(["full_attention", "sliding_attention"]))).is_err());
    }

    #[test]
    fn what_changes_the_mathematics_is_refused_by_name() {
        let cases = [
            ("hidden_act", json!("gelu")),
            ("sliding_window", json!(1024)),
            ("pretraining_tp", json!(2)),
            ("attn_logit_softcapping", json!(50.0)),
            ("final_logit_softcapping", json!(30.0)),
            ("embedding_multiplier", json!(12.0)),
            ("residual_multiplier", json!(0.22)),
            ("logits_scaling", json!(8.0)),
            ("num_local_experts", json!(8)),
            ("partial_rotary_factor", json!(0.5)),
            ("qk_norm", json!(true)),
            ("head_dim", json!(63)),
            ("num_key_value_heads", json!(2)),
            ("num_hidden_layers", json!(1_000_000_000_000u64)),
            ("vocab_size", json!(-1)),
            ("rms_norm_eps", json!("1e-5")),
        ];
        for (key, value) in cases {
            let message = parse(with(&smol(), key, value)).unwrap_err().to_string();
            assert!(message.contains(&format!("`{key}`")), "{key}: {message}");
        }
        for key in ["attn_logit_softcapping", "qk_norm_eps"] {
            assert!(parse(with(&smol(), key, json!(null))).is_ok());
        }
    }
}
