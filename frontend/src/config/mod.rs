//! `config.json` → [`ModelConfig`].
//!
//! A key that changes the mathematics and is not understood is refused by name. The rule for everything else: a key is
//! accepted when its reader consumed it, when it is on the list of keys known to be harmless, or when its value
//! switches nothing on (null, false, empty). Configurations of transformers 4 and 5 are both read; where a key is
//! absent, the default is the one of the transformers class of that `model_type`.

mod bert;
mod llama;
mod rope;

use std::path::Path;

use serde_json::{Map, Value};

pub use bert::{Activation, BertConfig};
pub use llama::{LlamaConfig, LlamaFamily};
pub use rope::{Llama3Scaling, Rope};

use crate::error::{Error, Result};
use crate::json::{Fields, brief, is_off, read_object};

/// Bound on widths and vocabulary sizes; keeps every product of two of them within u64.
pub(crate) const MAX_SIZE: u64 = 1 << 28;
/// Bound on layer counts: a hostile file must not make us list billions of names.
pub(crate) const MAX_LAYERS: u64 = 4096;

/// A model family with everything that its mathematics needs.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// Decoder with RMSNorm, RoPE, grouped-query attention and a gated MLP: llama, mistral, qwen2.
    Llama(LlamaConfig),
    /// Post-norm encoder with absolute positions: bert.
    Bert(BertConfig),
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// A missing or malformed file, an unknown `model_type`, a key that is out of range or not supported.
    pub fn read(dir: &Path) -> Result<ModelConfig> {
        let path = dir.join("config.json");
        ModelConfig::parse(&path, &read_object(&path)?)
    }

    /// Reads an already parsed configuration; `path` only serves messages.
    pub fn parse(path: &Path, map: &Map<String, Value>) -> Result<ModelConfig> {
        let mut fields = Fields::new(path, "", map);
        let model_type = fields.text("model_type")?.ok_or_else(|| fields.fault("model_type", "is missing"))?;
        fields.must_be_off(
            "quantization_config",
            "quantised checkpoints are not supported; use the f32, f16 or bf16 one",
        )?;
        let config = match model_type {
            "llama" => ModelConfig::Llama(llama::read(&mut fields, LlamaFamily::Llama)?),
            "mistral" => ModelConfig::Llama(llama::read(&mut fields, LlamaFamily::Mistral)?),
            "qwen2" => ModelConfig::Llama(llama::read(&mut fields, LlamaFamily::Qwen2)?),
            "bert" => ModelConfig::Bert(bert::read(&mut fields)?),
            other => {
                let what = format!("is `{other}`; supported are llama, mistral, qwen2 and bert");
                return Err(Error::key(path, "model_type", what));
            }
        };
        refuse_unknown(&fields)?;
        Ok(config)
    }

    /// The number of token ids, V.
    pub fn vocab(&self) -> u64 {
        match self {
            ModelConfig::Llama(c) => c.vocab,
            ModelConfig::Bert(c) => c.vocab,
        }
    }

    /// The number of layers.
    pub fn layers(&self) -> u64 {
        match self {
            ModelConfig::Llama(c) => c.layers,
            ModelConfig::Bert(c) => c.layers,
        }
    }

    /// The longest sequence that the model was made for.
    pub fn max_positions(&self) -> u64 {
        match self {
            ModelConfig::Llama(c) => c.max_positions,
            ModelConfig::Bert(c) => c.max_positions,
        }
    }

    /// Whether the model continues text (has a KV cache and logits) rather than encodes it.
    pub fn is_decoder(&self) -> bool {
        matches!(self, ModelConfig::Llama(_))
    }
}

/// Refuses the first key that no reader consumed, that is not known to be harmless and that is switched on.
fn refuse_unknown(fields: &Fields) -> Result<()> {
    for (key, value) in fields.unread() {
        if HARMLESS.contains(&key.as_str())
            || key.starts_with('_')
            || key.starts_with("transformers.js")
            || is_off(value)
        {
            continue;
        }
        let what = format!(
            "is {}: not known for this model type, so it may change the results; remove the key if it has no effect",
            brief(value)
        );
        return Err(fields.fault(key, what));
    }
    Ok(())
}

/// Keys that describe, initialise, train or decode, and never change what a forward pass computes.
const HARMLESS: &[&str] = &[
    // description
    "architectures",
    "auto_map",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "language",
    "model_type",
    "name_or_path",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "is_llama_config",
    "unsloth_fixed",
    "unsloth_version",
    // token ids
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "mask_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    // training
    "attention_dropout",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "classifier_dropout_prob",
    "dropout",
    "embd_pdrop",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "initializer_factor",
    "initializer_range",
    "mlp_dropout",
    "resid_pdrop",
    // running
    "attn_implementation",
    "chunk_size_feed_forward",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    // defaults of generation in old configurations
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn parse(value: Value) -> Result<ModelConfig> {
        ModelConfig::parse(Path::new("config.json"), value.as_object().unwrap())
    }

    pub(crate) fn with(base: &Value, key: &str, value: Value) -> Value {
        let mut changed = base.clone();
        changed.as_object_mut().unwrap().insert(key.into(), value);
        changed
    }

    #[test]
    fn unknown_types_and_quantised_models_are_refused() {
        let message = parse(serde_json::json!({"model_type": "mamba"})).unwrap_err().to_string();
        assert!(message.contains("`model_type` is `mamba`"), "{message}");
        let quantised = serde_json::json!({"model_type": "llama", "quantization_config": {"bits": 4}});
        assert!(parse(quantised).unwrap_err().to_string().contains("quantization_config"));
        assert!(parse(serde_json::json!({})).unwrap_err().to_string().contains("is missing"));
    }
}
