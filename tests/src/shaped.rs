//! Models that are shapes only: a `config.json`, and a checkpoint whose tensors are holes in a file.
//!
//! Weight values never influence compilation, so a large model is compiled without having one.

use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Checkpoint, Import, ModelConfig, ModuleTable};
use pleach_ir::Graph;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;

/// A decoder of the Llama family by its sizes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Name of the folder.
    pub name: &'static str,
    /// Width, and width of the MLP.
    pub hidden: u64,
    /// Width of the MLP.
    pub inner: u64,
    /// Heads of queries, and of keys and values.
    pub heads: u64,
    /// Heads of keys and values.
    pub kv_heads: u64,
    /// Tokens of the vocabulary.
    pub vocab: u64,
    /// The output head is the embedding.
    pub tied: bool,
}

/// Llama-3-8B.
pub const LLAMA_3_8B: Shape =
    Shape { name: "llama-3-8b", hidden: 4096, inner: 14336, heads: 32, kv_heads: 8, vocab: 128_256, tied: false };
/// SmolLM2-135M.
pub const SMOLLM2: Shape =
    Shape { name: "smollm2", hidden: 576, inner: 1536, heads: 9, kv_heads: 3, vocab: 49152, tied: true };

/// A layer whose sizes are whole tiles, small enough to be executed as a whole.
pub const WHOLE_TILES: Shape =
    Shape { name: "whole-tiles", hidden: 256, inner: 512, heads: 4, kv_heads: 2, vocab: 512, tied: false };

/// An opened folder, removed when dropped.
#[derive(Debug)]
pub struct Shaped {
    dir: PathBuf,
    /// The model.
    pub checkpoint: Checkpoint,
}

impl Drop for Shaped {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Shape {
    /// The model with so many layers.
    ///
    /// # Errors
    /// Files that cannot be written, in words.
    pub fn open(&self, layers: u64) -> Result<Shaped, String> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "mlp_bias": false,
            "hidden_act": "silu", "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "num_hidden_layers": layers,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "vocab_size": self.vocab, "rope_theta": 500_000.0,
            "tie_word_embeddings": self.tied, "bos_token_id": 1, "eos_token_id": 2,
        });
        write(&format!("{}-{layers}", self.name), &config)
    }
}

/// all-MiniLM-L6-v2, an encoder.
///
/// # Errors
/// As [`Shape::open`].
pub fn minilm() -> Result<Shaped, String> {
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 384,
        "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6, "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12, "type_vocab_size": 2, "vocab_size": 30522, "pad_token_id": 0,
        "position_embedding_type": "absolute",
    });
    write("minilm", &config)
}

fn write(name: &str, config: &Value) -> Result<Shaped, String> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("pleach-shaped-{}-{n}-{name}", std::process::id()));
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", dir.display());
    std::fs::create_dir_all(&dir).map_err(|e| text(&e))?;
    std::fs::write(dir.join("config.json"), config.to_string()).map_err(|e| text(&e))?;
    let read = ModelConfig::read(&dir).map_err(|e| text(&e))?;
    let (mut header, mut at) = (Map::new(), 0);
    let modules = ModuleTable::new(&read);
    let tied = config["tie_word_embeddings"].as_bool() == Some(true);
    for m in modules.iter().filter(|m| !(tied && m.output_head)) {
        for p in m.parameters() {
            let bytes = 2 * p.shape.iter().product::<u64>();
            header.insert(p.path, json!({"dtype": "BF16", "shape": p.shape, "data_offsets": [at, at + bytes]}));
            at += bytes;
        }
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let file = || -> std::io::Result<()> {
        let mut f = std::fs::File::create(dir.join("model.safetensors"))?;
        f.write_all(&(header.len() as u64).to_le_bytes())?;
        f.write_all(header.as_bytes())?;
        f.set_len(8 + header.len() as u64 + at)
    };
    file().map_err(|e| text(&e))?;
    let checkpoint = Checkpoint::open(&dir).map_err(|e| text(&e))?;
    Ok(Shaped { dir, checkpoint })
}

impl Shaped {
    /// The training graph of a new adapter of a method, of this rank, on every linear layer; of the method's own rank, if it has one, for 0.
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn training(&self, method: &str, rank: u64) -> Result<Graph, String> {
        let adapters = [self.adapter(method, rank)?];
        let import = Import::new(&self.checkpoint).adapters(&adapters).entries(&["train"]).train(0);
        import.graph().map_err(|e| e.to_string())
    }

    /// The graph of some entries with a new LoRA that is not merged; no adapter for rank 0.
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn inference(&self, entries: &[&str], rank: u64) -> Result<Graph, String> {
        self.inference_with(entries, if rank > 0 { Some("lora") } else { None }, rank)
    }

    /// The graph of some entries with a new adapter of a method, not merged, if it is to have one; rank as in [`Shaped::training`].
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn inference_with(&self, entries: &[&str], method: Option<&str>, rank: u64) -> Result<Graph, String> {
        let adapters = method.into_iter().map(|m| self.adapter(m, rank)).collect::<Result<Vec<_>, _>>()?;
        pleach_frontend::import(&self.checkpoint, &adapters, entries).map_err(|e| e.to_string())
    }

    fn adapter(&self, method: &str, rank: u64) -> Result<Adapter, String> {
        let keys = match rank {
            0 => json!({"target_modules": "all-linear"}),
            _ => json!({"target_modules": "all-linear", "r": rank}),
        };
        let config = MethodConfig::named(method, keys.as_object().unwrap_or(&Map::new())).map_err(|e| e.to_string())?;
        Adapter::fresh(&config, &self.checkpoint.modules).map_err(|e| e.to_string())
    }
}
