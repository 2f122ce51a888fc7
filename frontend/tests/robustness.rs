//! Every reader survives hostile files: the stored corpus and thousands of damaged copies of it.
//!
//! `tests/corpus/<reader>/` holds one file per case; names starting with "good" or a model type must be accepted, the
//! rest only has to be answered. Damage is deterministic: flipped bits, cuts, repeated pieces and extreme numbers. The
//! only thing that can fail here is a crash.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use pleach_frontend::gguf::{Gguf, ImportOptions, import_gguf};
use pleach_frontend::peft::{MethodConfig, match_modules};
use pleach_frontend::{ChatInput, ChatTemplate, Checkpoint, ModelConfig, ModuleTable, TensorTable, TextTokenizer};

/// Damaged copies of each file of the corpus.
const ROUNDS: u64 = 60;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("pleach-robustness-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n.max(1)
    }
}

fn damage(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(out.len());
        match random.below(6) {
            0 if !out.is_empty() => out[at] ^= 1 << random.below(8),
            1 => out.truncate(at),
            2 => {
                let end = (at + random.below(40)).min(out.len());
                let piece = out[at..end].to_vec();
                out.splice(at..at, piece);
            }
            3 => {
                let end = (at + random.below(8)).min(out.len());
                out.drain(at..end);
            }
            4 => {
                let numbers =
                    ["-1", "0", "1e308", "18446744073709551615", "9223372036854775808", "null", "[]", "\"\"", "{"];
                let number = numbers[random.below(numbers.len())];
                let end = (at + random.below(4)).min(out.len());
                out.splice(at..end, number.bytes());
            }
            _ => {
                let end = (at + 8).min(out.len());
                out[at..end].fill([0, 0xff, 0x7f][random.below(3)]);
            }
        }
    }
    out
}

/// Runs `accepts` over the corpus of one reader and over damaged copies.
fn replay(reader: &str, accepts: impl Fn(&Path, &[u8]) -> bool) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(reader);
    let mut files: Vec<PathBuf> = fs::read_dir(corpus).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let scratch = Scratch::new(reader);
    let mut random = Random(7);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let good = ["good", "llama", "bert"].iter().any(|start| name.starts_with(start));
        assert!(accepts(&scratch.0, &bytes) || !good, "{reader}/{name} was refused");
        for _ in 0..ROUNDS {
            accepts(&scratch.0, &damage(&bytes, &mut random));
        }
    }
}

#[test]
fn safetensors() {
    replay("safetensors", |dir, bytes| {
        let path = dir.join("model.safetensors");
        fs::write(&path, bytes).unwrap();
        let table = TensorTable::open_folder(dir);
        // Whatever is accepted can be read.
        table.iter().flat_map(|t| t.iter()).all(|t| t.read_bytes().unwrap().len() as u64 == t.bytes) && table.is_ok()
    });
}

#[test]
fn indexes() {
    let good = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/safetensors/good")).unwrap();
    replay("index", |dir, bytes| {
        fs::write(dir.join("model.safetensors.index.json"), bytes).unwrap();
        let shard = dir.join("shards");
        fs::create_dir_all(&shard).unwrap();
        // Under its usual name the file would be taken before the index is looked at.
        let renamed = String::from_utf8_lossy(bytes).replace("model.safetensors", "one.safetensors");
        fs::write(shard.join("model.safetensors.index.json"), renamed).unwrap();
        fs::write(shard.join("one.safetensors"), &good).unwrap();
        TensorTable::open_folder(&shard).is_ok()
    });
}

#[test]
fn configurations() {
    replay("config", |dir, bytes| {
        fs::write(dir.join("config.json"), bytes).unwrap();
        ModelConfig::read(dir).map(|c| ModuleTable::new(&c).iter().count()).is_ok()
    });
}

#[test]
fn adapter_configurations() {
    let config = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/config/llama5")).unwrap();
    let map = serde_json::from_slice(&config).unwrap();
    let modules = ModuleTable::new(&ModelConfig::parse(Path::new("config.json"), &map).unwrap());
    replay("adapter", |dir, bytes| {
        fs::write(dir.join("adapter_config.json"), bytes).unwrap();
        MethodConfig::read(dir).and_then(|c| match_modules(&c, &modules)).is_ok()
    });
}

#[test]
fn gguf_files() {
    replay("gguf", |dir, bytes| {
        let path = dir.join("m.gguf");
        fs::write(&path, bytes).unwrap();
        let options = ImportOptions { overwrite: true, ..ImportOptions::default() };
        let _ = import_gguf(&path, &dir.join("out"), &options);
        Gguf::open(&path).is_ok()
    });
}

#[test]
fn blocks() {
    let model = Scratch::new("blocks-model");
    for file in ["config.json", "model.safetensors"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-tiny").join(file);
        fs::copy(from, model.0.join(file)).unwrap();
    }
    fs::create_dir_all(model.0.join(pleach_frontend::blocks::FOLDER)).unwrap();
    let checkpoint = Checkpoint::open(&model.0).unwrap();
    replay("blocks", |_, bytes| {
        fs::write(pleach_frontend::blocks::file(&model.0), bytes).unwrap();
        pleach_frontend::blocks::formats(&checkpoint).is_ok_and(|f| f.len() == 1)
    });
}

#[test]
fn tokenizers() {
    replay("tokenizer", |dir, bytes| {
        fs::write(dir.join("tokenizer.json"), bytes).unwrap();
        TextTokenizer::open(dir).and_then(|t| t.encode("ab a<e>", true).and_then(|ids| t.decode(&ids, true))).is_ok()
    });
}

#[test]
fn templates() {
    replay("template", |dir, bytes| {
        fs::write(dir.join("chat_template.jinja"), bytes).unwrap();
        let messages = serde_json::json!([{"role": "user", "content": " x "}]);
        let input = ChatInput { messages, now: Some(UNIX_EPOCH), ..ChatInput::default() };
        ChatTemplate::open(dir).is_ok_and(|t| t.is_some_and(|t| t.render(&input).is_ok()))
    });
}
