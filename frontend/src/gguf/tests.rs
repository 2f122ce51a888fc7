//! Import of a small GGUF file that is made here, and damaged in many ways.

use super::super::quants::GgmlType;
use super::*;
use crate::checkpoint::Checkpoint;
use crate::safetensors::read_header;
use crate::tensors::TensorRef;
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
    (import_gguf(&path, &dir.join("out"), &ImportOptions::default()), dir)
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
    assert!(import_gguf(&path, &out, &ImportOptions::default()).unwrap_err().to_string().contains("--overwrite"));
    let again = ImportOptions { overwrite: true, ..ImportOptions::default() };
    import_gguf(&path, &out, &again).unwrap();
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert!(Checkpoint::open(&out).is_ok());
    assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2, "nothing temporary is left");
}

/// `rows` rows of `blocks` blocks of a type, with scales near one and codes that look random.
fn coded(kind: GgmlType, rows: u64, blocks: u64, salt: u32) -> Vec<u8> {
    let mut state = salt;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 24) as u8
    };
    let halves = if kind == GgmlType::Q4_1 { 2 } else { 1 };
    let mut out = vec![];
    for _ in 0..rows * blocks {
        (0..halves).for_each(|i| out.extend([next(), [0x38 | next() & 3, 0xb4 | next() & 3][i]]));
        out.extend((halves as u64 * 2..kind.block_bytes()).map(|_| next()));
    }
    out
}

/// The tiny model with q and k in Q4_1, v in Q8_0, down in Q4_0, the rest f32 as before; and a norm in Q8_0.
fn tiny_in_blocks() -> Builder {
    let mut b = tiny();
    for (i, t) in b.tensors.iter_mut().enumerate() {
        let kind = match t.0.as_str() {
            "blk.0.attn_q.weight" | "blk.0.attn_k.weight" => GgmlType::Q4_1,
            "blk.0.ffn_down.weight" => GgmlType::Q4_0,
            "blk.0.attn_v.weight" | "output_norm.weight" => GgmlType::Q8_0,
            _ => continue,
        };
        t.2 = [(GgmlType::Q4_0, 2), (GgmlType::Q4_1, 3), (GgmlType::Q8_0, 8)].iter().find(|k| k.0 == kind).unwrap().1;
        let rows = if t.1.len() == 1 { 1 } else { t.1[0] };
        t.3 = coded(kind, rows, t.1.last().unwrap() / 32, i as u32);
    }
    b
}

/// Bytes of every tensor of the blocks of a folder, by name, with its format.
fn kept(out: &Path) -> Vec<(String, GgmlType, Vec<u8>)> {
    let formats = blocks::formats(&Checkpoint::open(out).unwrap()).unwrap();
    let (tensors, _) = read_header(&blocks::file(out)).unwrap();
    let kinds = [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q8_0];
    let kind = |t: &TensorRef| *kinds.iter().find(|k| k.block_format() == formats.get(&t.name).copied()).unwrap();
    tensors.iter().map(|t| (t.name.clone(), kind(t), t.read_bytes().unwrap())).collect()
}

#[test]
fn matrices_in_blocks_are_kept_as_such() {
    let source = tiny_in_blocks();
    let (report, dir) = import(&source.bytes());
    let (report, out) = (report.unwrap(), dir.join("out"));
    assert!(report.files.contains(&"blocks/model.safetensors".to_owned()), "{:?}", report.files);
    let checkpoint = Checkpoint::open(&out).unwrap();
    let list = kept(&out);
    let names: Vec<&str> = list.iter().map(|t| t.0.trim_start_matches("model.layers.0.")).collect();
    // Not the norm, which is no matrix, and not what is f32 in the source.
    assert_eq!(
        names,
        [
            "model.embed_tokens.weight",
            "mlp.down_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.q_proj.weight",
            "self_attn.v_proj.weight"
        ]
    );
    assert_eq!((report.blocks, report.block_bytes), (5, list.iter().map(|t| t.2.len() as u64).sum()));
    for (name, kind, bytes) in &list {
        let mut values = vec![];
        kind.dequantize(bytes, &mut values);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&checkpoint.param(name).unwrap().read_f32().unwrap()), "{name}");
    }
    // Rows of q move as their expansion does: row 1 of a head was stored as row 2, row 8 as row 1.
    let q = &list.iter().find(|t| t.0.ends_with("q_proj.weight")).unwrap().2;
    let stored = &source.tensors.iter().find(|t| t.0 == "blk.0.attn_q.weight").unwrap().3;
    let row = |bytes: &[u8], i: usize| bytes[i * 20..][..20].to_vec();
    assert_eq!((row(q, 1), row(q, 8), row(q, 17)), (row(stored, 2), row(stored, 1), row(stored, 18)));
    assert_ne!(row(q, 1), row(stored, 1));
}

#[test]
fn blocks_are_left_out_on_request_and_never_outlive_their_weights() {
    let dir = folder("gguf-no-blocks");
    let (path, out) = (dir.join("m.gguf"), dir.join("out"));
    fs::write(&path, tiny_in_blocks().bytes()).unwrap();
    let without = ImportOptions { overwrite: true, blocks: false };
    let report = import_gguf(&path, &out, &without).unwrap();
    assert_eq!((report.blocks, report.block_bytes, out.join("blocks").exists()), (0, 0, false));
    let again = ImportOptions { overwrite: true, ..ImportOptions::default() };
    import_gguf(&path, &out, &again).unwrap();
    let first = kept(&out);
    // Other weights, other blocks.
    let mut other = tiny_in_blocks();
    other.tensors.iter_mut().for_each(|t| t.3[0] ^= 1);
    fs::write(&path, other.bytes()).unwrap();
    import_gguf(&path, &out, &again).unwrap();
    assert_ne!(kept(&out), first);
    import_gguf(&path, &out, &without).unwrap();
    assert!(!blocks::file(&out).exists() && Checkpoint::open(&out).is_ok());
    assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2, "nothing temporary is left");
    // No blocks in the source.
    let mut plain = tiny();
    plain.tensors.retain(|t| t.0 != "token_embd.weight");
    let row = 1f32.to_le_bytes().repeat(32);
    plain.tensors.push(("token_embd.weight".into(), vec![5, 32], 0, row.repeat(5)));
    fs::write(&path, plain.bytes()).unwrap();
    let report = import_gguf(&path, &out, &again).unwrap();
    assert_eq!((report.blocks, blocks::file(&out).exists()), (0, false));
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
