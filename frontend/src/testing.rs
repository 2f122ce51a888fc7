//! Helpers for this crate's own tests: scratch folders and small files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// A folder that is removed when the test is done with it.
pub(crate) struct Folder(PathBuf);

impl std::ops::Deref for Folder {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An empty folder for one test, under the system's folder for temporary files.
pub(crate) fn folder(name: &str) -> Folder {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let unique = format!("pleach-{name}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(unique);
    std::fs::create_dir_all(&dir).unwrap();
    Folder(dir)
}

/// Values in -1..1 of a linear congruential sequence that depends on `index`; `tests/reference.py` makes the same.
pub(crate) fn values(index: u32, count: u64) -> Vec<f32> {
    let mut state = index.wrapping_mul(2654435761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        ((f64::from(state >> 8)) / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(|_| next()).collect()
}

/// Writes f32 tensors; tensor `k` of the list holds the values of index `first + k`.
pub(crate) fn write_tensors(path: &Path, tensors: &[(String, Vec<u64>)], first: u32) {
    let declared: Vec<_> = tensors.iter().map(|(n, s)| (n.clone(), Dtype::F32, s.clone())).collect();
    let mut writer = Writer::create(path, &declared).unwrap();
    for (index, (_, shape)) in tensors.iter().enumerate() {
        writer.write_f32(&values(first + index as u32, shape.iter().product())).unwrap();
    }
    writer.finish().unwrap();
}

/// Configuration of a llama with two layers, width 16, 4 heads over 2 key heads, 40 ids and an untied head.
pub(crate) fn tiny_llama() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 2
    })
}

/// Configuration of a BERT with two layers, width 16, 4 heads and 40 ids.
pub(crate) fn tiny_bert() -> serde_json::Value {
    serde_json::json!({
        "model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 32, "type_vocab_size": 2,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12
    })
}
