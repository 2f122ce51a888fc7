//! Import of a small GGUF file that is made here, and damaged in many ways.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::testing::{Folder, folder};

/// Writes GGUF files byte by byte.
#[derive(Clone, Default)]
struct Builder {
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn list(kind: u32, items: Vec<Vec<u8>>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()[..], &items.concat()[..]].concat()
}

impl Builder {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend([&text(key)[..], &kind.to_le_bytes()[..], value].concat());
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, shape, kind, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        self.keys.retain(|k| k.0 != key);
        self.keys.push((key.into(), kind, value));
    }
}

/// One layer, width 32, 2 heads of 16 over 1 key head, 5 tokens, tied head, f32 weights (the embedding is Q8_0).
fn tiny() -> Builder {
    let mut b = Builder::default();
    let u32s = [
        ("llama.block_count", 1u32),
        ("llama.context_length", 64),
        ("llama.embedding_length", 32),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 2),
        ("llama.attention.head_count_kv", 1),
        ("llama.rope.dimension_count", 16),
        ("tokenizer.ggml.eos_token_id", 0),
    ];
    b.set("general.architecture", 8, text("llama"));
    u32s.iter().for_each(|(key, n)| b.set(key, 4, n.to_le_bytes().to_vec()));
    b.set("llama.rope.freq_base", 6, 10000f32.to_le_bytes().to_vec());
    b.set("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
    b.set("tokenizer.ggml.model", 8, text("gpt2"));
    b.set("tokenizer.ggml.pre", 8, text("smollm"));
    let tokens = ["<|end|>", "a", "b", "ab", "Ġ"];
    b.set("tokenizer.ggml.tokens", 9, list(8, tokens.iter().map(|t| text(t)).collect()));
    b.set(
        "tokenizer.ggml.token_type",
        9,
        list(5, [3i32, 1, 1, 1, 1].iter().map(|t| t.to_le_bytes().to_vec()).collect()),
    );
    b.set("tokenizer.ggml.merges", 9, list(8, vec![text("a b")]));
    let mut f32s = |name: &str, shape: &[u64]| {
        let count: u64 = shape.iter().product();
        let bytes = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
        b.tensors.push((name.into(), shape.to_vec(), 0, bytes));
    };
    f32s("output_norm.weight", &[32]);
    for (name, shape) in [
        ("attn_norm", &[32u64][..]),
        ("ffn_norm", &[32]),
        ("attn_q", &[32, 32]),
        ("attn_k", &[16, 32]),
        ("attn_v", &[16, 32]),
        ("attn_output", &[32, 32]),
        ("ffn_gate", &[64, 32]),
        ("ffn_up", &[64, 32]),
        ("ffn_down", &[32, 64]),
    ] {
        f32s(&format!("blk.0.{name}.weight"), shape);
    }
    let row = [&[0x00u8, 0x38][..], &[2u8; 32][..]].concat();
    b.tensors.push(("token_embd.weight".into(), vec![5, 32], 8, row.repeat(5)));
    b
}

fn import(bytes: &[u8]) -> (Result<ImportReport>, Folder) {
    let dir = folder("gguf");
    let path = dir.join("m.gguf");
    fs::write(&path, bytes).unwrap();
    (import_gguf(&path, &dir.join("out"), false), dir)
}

fn fault(bytes: &[u8]) -> String {
    import(bytes).0.unwrap_err().to_string()
}

#[test]
fn the_folder_opens_as_a_checkpoint() {
    let (report, dir) = import(&tiny().bytes());
    let out = dir.join("out");
    let report = report.unwrap();
    assert_eq!((report.tensors, report.tokens), (11, 5));
    assert_eq!(report.types, [("F32".to_owned(), 10), ("Q8_0".to_owned(), 1)]);
    let checkpoint = Checkpoint::open(&out).unwrap();
    let ModelConfig::Llama(config) = &checkpoint.config else { panic!() };
    assert_eq!((config.norm_eps, config.tied_head, config.eos.as_slice()), (1e-5, true, &[0][..]));
    assert_eq!(checkpoint.param("lm_head.weight").unwrap().read_f32().unwrap(), [1.0; 160]);
    // Row 1 of a head was stored as row 2, row 8 (the first of the second half) as row 1.
    let q = checkpoint.param("model.layers.0.self_attn.q_proj.weight").unwrap().read_f32().unwrap();
    assert_eq!((q[0], q[32], q[8 * 32], q[17 * 32]), (0.0, 64.0, 32.0, 18.0 * 32.0));
    let v = checkpoint.param("model.layers.0.self_attn.v_proj.weight").unwrap().read_f32().unwrap();
    assert_eq!((v[32], v[15 * 32 + 31]), (32.0, 511.0));
}

#[test]
fn folders_are_not_overwritten_unasked() {
    let dir = folder("gguf-overwrite");
    let (path, out) = (dir.join("m.gguf"), dir.join("out"));
    fs::write(&path, tiny().bytes()).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(import_gguf(&path, &out, false).unwrap_err().to_string().contains("--overwrite"));
    import_gguf(&path, &out, true).unwrap();
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert!(Checkpoint::open(&out).is_ok());
    assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2, "nothing temporary is left");
}

#[test]
fn what_is_not_supported_is_named() {
    type Edit = fn(&mut Builder);
    let cases: [(Edit, &str); 13] = [
        (|b| b.set("general.architecture", 8, text("qwen3")), "`qwen3`"),
        (|b| b.set("tokenizer.ggml.model", 8, text("llama")), "tokenizer of the kind `llama`"),
        (|b| b.set("tokenizer.ggml.pre", 8, text("tekken")), "`tekken`"),
        (|b| b.set("llama.expert_count", 4, 8u32.to_le_bytes().to_vec()), "llama.expert_count"),
        (|b| b.set("llama.rope.scaling.type", 8, text("yarn")), "yarn"),
        (|b| b.set("llama.rope.dimension_count", 4, 8u32.to_le_bytes().to_vec()), "dimension_count"),
        (|b| b.set("llama.block_count", 4, 2u32.to_le_bytes().to_vec()), "blk.1."),
        (|b| b.set("llama.feed_forward_length", 4, 65u32.to_le_bytes().to_vec()), "ffn_gate"),
        (|b| b.set("tokenizer.ggml.merges", 9, list(8, vec![text("a x")])), "merge `a x`"),
        (|b| b.set("tokenizer.ggml.eos_token_id", 4, 5u32.to_le_bytes().to_vec()), "eos_token_id"),
        (|b| b.tensors[0].2 = 12, "type Q4_K"),
        (|b| b.tensors.push(("blk.0.extra".into(), vec![1], 0, vec![0; 4])), "blk.0.extra"),
        (|b| b.tensors[1].0 = "output_norm.weight".into(), "occurs twice"),
    ];
    for (edit, expected) in cases {
        let mut builder = tiny();
        edit(&mut builder);
        let message = fault(&builder.bytes());
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn damaged_files_are_errors_not_crashes() {
    let whole = tiny().bytes();
    for cut in (0..whole.len()).step_by(37) {
        assert!(import(&whole[..cut]).0.is_err(), "cut at {cut}");
    }
    let header = whole.len() - 32 * 1024;
    let mut state = 1u64;
    let dir = folder("gguf-damaged");
    let path = dir.join("m.gguf");
    for _ in 0..400 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let at = (state >> 33) as usize % header.min(1500);
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (state >> 61);
        fs::write(&path, &damaged).unwrap();
        // Any answer will do, as long as there is one.
        let _ = Gguf::open(&path).map(|g| (read_config(&g), tokenizer::rebuild(&g, 64).map(|t| t.tokens)));
    }
}
