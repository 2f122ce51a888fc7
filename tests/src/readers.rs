//! Every reader of foreign files as a function of bytes: what fuzz targets and the replay of their corpora call.
//!
//! A reader may refuse (that is the `Err`, the message a user would see) or accept; it must not panic, hang or take
//! memory out of proportion. Where it accepts, what can be checked is checked: a graph survives its text form, a plan
//! its encoding.

use pleach_frontend::gguf::Gguf;
use pleach_frontend::peft::{MethodConfig, match_modules};
use pleach_frontend::{Checkpoint, ModelConfig, ModuleTable, TensorTable};
use pleach_ir::{text, verify};
use pleach_plan::Plan;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A reader: bytes in, a refusal or nothing out.
pub type Reader = fn(&[u8]) -> Result<(), String>;

/// Every reader with the name of its fuzz target and corpus folder.
pub const READERS: [(&str, Reader); 8] = [
    ("ir_text", ir_text),
    ("plan", plan),
    ("plan_manifest", plan_manifest),
    ("safetensors", safetensors),
    ("safetensors_index", safetensors_index),
    ("gguf", gguf),
    ("model_config", model_config),
    ("adapter_config", adapter_config),
];

/// The text form of graphs.
///
/// # Errors
/// The reader's or verifier's message.
pub fn ir_text(data: &[u8]) -> Result<(), String> {
    let source = std::str::from_utf8(data).map_err(|e| e.to_string())?;
    let g = text::parse(source).map_err(|e| e.to_string())?;
    let printed = text::print(&g);
    let again = text::parse(&printed).map_err(|e| format!("the printed form does not parse: {e}"));
    assert_eq!(again.as_ref(), Ok(&g), "{printed}");
    verify::verify(&g).map_err(|e| e.to_string())
}

/// A plan file, digests included.
///
/// # Errors
/// The reader's message.
pub fn plan(data: &[u8]) -> Result<(), String> {
    let p = Plan::from_bytes(data).map_err(|e| e.to_string())?;
    assert_eq!(p.to_bytes().as_deref().ok(), Some(data), "a plan that reads writes the same bytes");
    Ok(())
}

/// What lies behind the digests: a manifest beside up to two blobs.
///
/// # Errors
/// The reader's message.
pub fn plan_manifest(data: &[u8]) -> Result<(), String> {
    let mut last = String::new();
    for blobs in [vec![], vec![vec![0; 64]], vec![vec![0; 64], b"// ptx".to_vec()]] {
        match Plan::from_manifest(data, blobs) {
            Err(e) => last = e.to_string(),
            Ok(p) => {
                let bytes = p.to_bytes().map_err(|e| format!("a plan that reads does not write: {e}"))?;
                assert!(Plan::from_bytes(&bytes).is_ok());
                // Sizes at a capacity may be refused, too.
                for e in &p.entries {
                    let _ = p.env(&|_| Some(512)).map(|env| pleach_plan::arena(e, &p.kernels, &env).map(|a| a.total));
                }
                return Ok(());
            }
        }
    }
    Err(last)
}

/// A folder of its own that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("pleach-readers-{}-{n}", std::process::id()));
        // A folder that cannot be made shows as a refusal of the reader.
        let _ = fs::create_dir_all(&dir);
        Scratch(dir)
    }

    fn put(&self, name: &str, data: &[u8]) -> PathBuf {
        let p = self.0.join(name);
        let _ = fs::write(&p, data);
        p
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn fixture(name: &str) -> PathBuf {
    crate::root().join("tests/fixtures").join(name)
}

/// One safetensors file.
///
/// # Errors
/// The reader's message.
pub fn safetensors(data: &[u8]) -> Result<(), String> {
    let s = Scratch::new();
    let p = s.put("model.safetensors", data);
    pleach_frontend::safetensors::read_header(&p).map(|_| ()).map_err(|e| e.to_string())
}

/// The index of a checkpoint in two shards.
///
/// # Errors
/// The reader's message.
pub fn safetensors_index(data: &[u8]) -> Result<(), String> {
    let s = Scratch::new();
    s.put("model.safetensors.index.json", data);
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        fs::copy(fixture("llama-tiny-v4").join(shard), s.0.join(shard)).map_err(|e| e.to_string())?;
    }
    TensorTable::open_folder(&s.0).map(|_| ()).map_err(|e| e.to_string())
}

/// The header of a GGUF file.
///
/// # Errors
/// The reader's message.
pub fn gguf(data: &[u8]) -> Result<(), String> {
    let s = Scratch::new();
    let p = s.put("model.gguf", data);
    let g = Gguf::open(&p).map_err(|e| e.to_string())?;
    for t in &g.tensors {
        g.read(t, 0, &mut vec![0; t.bytes as usize]).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// A model's `config.json` beside a small checkpoint.
///
/// # Errors
/// The reader's message.
pub fn model_config(data: &[u8]) -> Result<(), String> {
    let s = Scratch::new();
    s.put("config.json", data);
    ModelConfig::read(&s.0).map_err(|e| e.to_string())?;
    let weights = "model.safetensors";
    fs::copy(fixture("llama-tiny").join(weights), s.0.join(weights)).map_err(|e| e.to_string())?;
    let model = Checkpoint::open(&s.0).map_err(|e| e.to_string())?;
    let g = pleach_frontend::import(&model, &[], &["infer"]).map_err(|e| e.to_string())?;
    verify::verify(&g).map_err(|e| format!("what was imported does not verify: {e}"))
}

/// An adapter's `adapter_config.json`, matched against a small model.
///
/// # Errors
/// The reader's message.
pub fn adapter_config(data: &[u8]) -> Result<(), String> {
    let s = Scratch::new();
    s.put("adapter_config.json", data);
    let config = MethodConfig::read(&s.0).map_err(|e| e.to_string())?;
    let modules = ModuleTable::new(&model(&fixture("llama-tiny"))?);
    match_modules(&config, &modules).map(|_| ()).map_err(|e| e.to_string())
}

fn model(dir: &Path) -> Result<ModelConfig, String> {
    ModelConfig::read(dir).map_err(|e| e.to_string())
}
