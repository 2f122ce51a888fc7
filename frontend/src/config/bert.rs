//! BERT-type encoders: `model_type` bert with absolute positions, as classic checkpoints and sentence encoders use it.

use super::{MAX_LAYERS, MAX_SIZE};
use crate::error::Result;
use crate::json::Fields;

/// Activation of the feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · Φ(x), through erf.
    Gelu,
    /// The tanh approximation of GELU (`gelu_new`).
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x · σ(x).
    Silu,
}

/// Everything that the forward pass of a BERT encoder needs.
#[derive(Debug, Clone, PartialEq)]
pub struct BertConfig {
    /// Vocabulary size.
    pub vocab: u64,
    /// Model width, d.
    pub hidden: u64,
    /// Width of the feed-forward part.
    pub intermediate: u64,
    /// Number of blocks.
    pub layers: u64,
    /// Attention heads; divides `hidden`.
    pub heads: u64,
    /// Rows of the position table: the longest sequence.
    pub max_positions: u64,
    /// Rows of the token type table.
    pub type_vocab: u64,
    /// Added to the variance in LayerNorm.
    pub norm_eps: f64,
    /// Activation of the feed-forward part.
    pub activation: Activation,
}

impl BertConfig {
    /// Width of one head.
    pub fn head_dim(&self) -> u64 {
        self.hidden / self.heads
    }
}

pub(super) fn read(fields: &mut Fields) -> Result<BertConfig> {
    let hidden = fields.required_count("hidden_size", MAX_SIZE)?;
    let heads = fields.required_count("num_attention_heads", 1 << 16)?;
    if hidden % heads != 0 {
        return Err(fields.fault("num_attention_heads", format!("{heads} does not divide hidden_size {hidden}")));
    }
    let activation = match fields.text("hidden_act")?.unwrap_or("gelu") {
        "gelu" | "gelu_python" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => {
            let what =
                format!("is `{other}`; supported are gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu and silu");
            return Err(fields.fault("hidden_act", what));
        }
    };
    match fields.text("position_embedding_type")?.unwrap_or("absolute") {
        "absolute" => {}
        other => {
            let what = format!("is `{other}`; only absolute positions are supported");
            return Err(fields.fault("position_embedding_type", what));
        }
    }
    fields.must_be_off("is_decoder", "a causal BERT is not supported")?;
    fields.must_be_off("add_cross_attention", "cross-attention is not supported")?;
    // Concerns the masked-language head only, which is not computed.
    fields.raw("tie_word_embeddings");
    for pooler in [
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "directionality",
    ] {
        fields.raw(pooler);
    }
    Ok(BertConfig {
        vocab: fields.required_count("vocab_size", MAX_SIZE)?,
        hidden,
        intermediate: fields.required_count("intermediate_size", MAX_SIZE)?,
        layers: fields.required_count("num_hidden_layers", MAX_LAYERS)?,
        heads,
        max_positions: fields.count("max_position_embeddings", MAX_SIZE)?.unwrap_or(512),
        type_vocab: fields.count("type_vocab_size", MAX_SIZE)?.unwrap_or(2),
        norm_eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-12),
        activation,
    })
}

#[cfg(test)]
mod tests {
    use super::super::ModelConfig;
    use super::super::tests::{parse, with};
    use super::*;
    use serde_json::{Value, json};

    fn mini_lm() -> Value {
        json!({
            "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false, "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536,
            "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
            "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute",
            "transformers_version": "4.8.2", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522
        })
    }

    #[test]
    fn a_real_configuration_is_read() {
        let ModelConfig::Bert(config) = parse(mini_lm()).unwrap() else { panic!("not an encoder") };
        assert_eq!((config.head_dim(), config.layers, config.norm_eps), (32, 6, 1e-12));
        assert_eq!(config.activation, Activation::Gelu);
        let ModelConfig::Bert(tanh) = parse(with(&mini_lm(), "hidden_act", json!("gelu_new"))).unwrap() else {
            panic!()
        };
        assert_eq!(tanh.activation, Activation::GeluTanh);
    }

    #[test]
    fn what_changes_the_mathematics_is_refused_by_name() {
        let cases = [
            ("hidden_act", json!("quick_gelu")),
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("add_cross_attention", json!(true)),
            ("embedding_size", json!(128)),
            ("rotary_dim", json!(32)),
            ("layer_norm_eps", json!(0)),
            ("num_attention_heads", json!(7)),
        ];
        for (key, value) in cases {
            let message = parse(with(&mini_lm(), key, value)).unwrap_err().to_string();
            assert!(message.contains(&format!("`{key}`")), "{key}: {message}");
        }
    }
}
