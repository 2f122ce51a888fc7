//! Weights in blocks: what an import keeps of a GGUF file, what inference makes of it, and that nothing is taken for what it is
//! no longer.

use crate::kit::{Folder, Pleach, relative, tensors};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const HIDDEN: u64 = 64;
const INNER: u64 = 96;
const WORDS: u64 = 61;

/// ggml's types.
#[derive(Clone, Copy)]
enum Kind {
    F32,
    Q4_0,
    Q4_1,
    Q8_0,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn list(kind: u32, items: Vec<Vec<u8>>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()[..], &items.concat()[..]].concat()
}

/// A sequence that looks random.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 56) as u8
    }

    /// A matrix with values of about ±0.4; every block has another scale.
    fn matrix(&mut self, kind: Kind, values: u64) -> Vec<u8> {
        let mut out = vec![];
        for _ in 0..values / 32 {
            // Scales of 0.047 to 0.06 for 4 bits, of 0.0029 to 0.0037 for 8; a minimum of -0.375 to -0.5.
            let half = |n: &mut Noise, high: u8| [n.next(), high | n.next() & 1];
            match kind {
                Kind::F32 => {
                    (0..32).for_each(|_| out.extend((f32::from(self.next() as i8) / 300.0).to_le_bytes()));
                    continue;
                }
                Kind::Q4_0 => out.extend(half(self, 0x2a)),
                Kind::Q4_1 => {
                    out.extend(half(self, 0x2a));
                    out.extend(half(self, 0xb6));
                }
                Kind::Q8_0 => out.extend(half(self, 0x1a)),
            }
            let codes = if matches!(kind, Kind::Q8_0) { 32 } else { 16 };
            out.extend((0..codes).map(|_| self.next()));
        }
        out
    }
}

/// A llama of two layers, 4 heads of 16 over 2 key heads and a tied head, its matrices of these types in turn.
fn gguf(kinds: &[Kind]) -> Vec<u8> {
    let mut keys: Vec<(&str, u32, Vec<u8>)> = vec![
        ("general.architecture", 8, text("llama")),
        ("llama.rope.freq_base", 6, 10000f32.to_le_bytes().to_vec()),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec()),
        ("tokenizer.ggml.model", 8, text("gpt2")),
        ("tokenizer.ggml.pre", 8, text("smollm")),
        ("tokenizer.ggml.merges", 9, list(8, vec![])),
    ];
    // Nothing ends a text: there is no end token.
    let numbers = [
        ("llama.block_count", 2),
        ("llama.context_length", 128),
        ("llama.embedding_length", HIDDEN as u32),
        ("llama.feed_forward_length", INNER as u32),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 16),
    ];
    keys.extend(numbers.map(|(k, n)| (k, 4, n.to_le_bytes().to_vec())));
    let word = |i: u64| if i == 0 { "<|end|>".to_string() } else { char::from(b'A' + i as u8 - 1).to_string() };
    keys.push(("tokenizer.ggml.tokens", 9, list(8, (0..WORDS).map(|i| text(&word(i))).collect())));
    let types = (0..WORDS).map(|i| if i == 0 { 3i32 } else { 1 }.to_le_bytes().to_vec());
    keys.push(("tokenizer.ggml.token_type", 9, list(5, types.collect())));
    let mut noise = Noise(7);
    let mut tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)> = vec![];
    let mut norm = |name: String| tensors.push((name, vec![HIDDEN], 0, 1f32.to_le_bytes().repeat(HIDDEN as usize)));
    norm("output_norm.weight".into());
    for layer in 0..2 {
        norm(format!("blk.{layer}.attn_norm.weight"));
        norm(format!("blk.{layer}.ffn_norm.weight"));
    }
    let mut kind = kinds.iter().cycle();
    let mut matrix = |name: String, rows: u64, columns: u64| {
        let kind = *kind.next().unwrap();
        let code = match kind {
            Kind::F32 => 0,
            Kind::Q4_0 => 2,
            Kind::Q4_1 => 3,
            Kind::Q8_0 => 8,
        };
        tensors.push((name, vec![rows, columns], code, noise.matrix(kind, rows * columns)));
    };
    matrix("token_embd.weight".into(), WORDS, HIDDEN);
    for layer in 0..2 {
        for (name, rows, columns) in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN / 2, HIDDEN),
            ("attn_v", HIDDEN / 2, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ] {
            matrix(format!("blk.{layer}.{name}.weight"), rows, columns);
        }
    }
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, kind, value) in keys {
        out.extend([&text(key)[..], &kind.to_le_bytes()[..], &value].concat());
    }
    let mut data: Vec<u8> = vec![];
    for (name, shape, code, bytes) in &tensors {
        data.resize(data.len().next_multiple_of(32), 0);
        out.extend(text(name));
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(code.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    [out, data].concat()
}

struct Setup {
    folder: Folder,
    pleach: Pleach,
    model: PathBuf,
}

impl Setup {
    /// A model folder that was imported from a GGUF file with matrices of these types.
    fn new(name: &str, kinds: &[Kind]) -> Setup {
        let folder = Folder::new(name);
        let pleach = Pleach::new(&folder);
        fs::write(folder.join("m.gguf"), gguf(kinds)).unwrap();
        let model = folder.join("model");
        let s = Setup { folder, pleach, model };
        s.import(&[]);
        s
    }

    fn import(&self, more: &[&str]) -> String {
        let (file, out) = (self.folder.join("m.gguf").display().to_string(), self.text());
        self.pleach.ok(&[&["import", &file, "--out", &out], more].concat())
    }

    fn text(&self) -> String {
        self.model.display().to_string()
    }

    fn blocks(&self) -> PathBuf {
        self.model.join("blocks/model.safetensors")
    }

    /// Logits of a run over this many ids, as bits; and what was said on stderr.
    fn logits(&self, model: &str, tokens: usize, more: &[&str]) -> (Vec<u64>, String) {
        let out = self.folder.join("out.safetensors");
        let ids: Vec<String> = (0..tokens).map(|i| (i * 17 % WORDS as usize).to_string()).collect();
        let (ids, path) = (ids.join(","), out.display().to_string());
        let said = self.pleach.call(&[&["run", model, "--ids", &ids, "--out", &path], more].concat());
        assert_eq!(said.code, Some(0), "{more:?}: {}", said.err);
        let values = tensors(&out).remove("logits").unwrap().1;
        assert!(values.iter().all(|x| x.is_finite()) && values.iter().any(|x| x.abs() > 0.5));
        (values.iter().map(|x| x.to_bits()).collect(), said.err)
    }

    fn layouts(&self, more: &[&str]) -> String {
        let model = self.text();
        self.pleach.ok(&[&["inspect", &model, "--ir", "--stage", "schedule"], more].concat())
    }

    /// Flips the last bit of the first f32 weight, which is of the embedding.
    fn change_a_weight(&self) {
        let path = self.model.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header] ^= 1;
        fs::write(&path, bytes).unwrap();
    }

    /// Answers of comparisons that the cache's folder keeps.
    fn answers(&self) -> Vec<PathBuf> {
        let all = fs::read_dir(self.folder.join("cache")).unwrap().map(|e| e.unwrap().path());
        all.filter(|p| p.extension().is_some_and(|e| e == "blocks")).collect()
    }
}

/// Long enough for the times of files to count.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(300));
}

#[test]
fn training_from_blocks_gives_the_same_bits() {
    use Kind::{F32, Q4_0, Q4_1, Q8_0};
    let s = Setup::new("blocks-train", &[Q8_0, Q4_1, Q4_1, Q8_0, Q4_0, Q4_1, Q4_1, Q8_0, F32]);
    let model = s.text();
    let rows = s.folder.join("rows.jsonl");
    let row = |i: usize| {
        let ids: Vec<String> = (0..9 + i).map(|j| ((i * 29 + j * 17) % WORDS as usize).to_string()).collect();
        format!("{{\"input_ids\": [{}]}}\n", ids.join(", "))
    };
    fs::write(&rows, (0..6).map(row).collect::<String>()).unwrap();
    let rows = rows.display().to_string();
    let call = |command: &str, words: &str, more: &[&str]| {
        let method = "--target-modules all-linear --r 4 --batch 2";
        let words = method.split(' ').chain(words.split(' ')).chain(more.iter().copied());
        s.pleach.ok(&[command, &model].into_iter().chain(words).collect::<Vec<_>>())
    };
    let train = |name: &str, more: &[&str]| {
        let out = s.folder.join(name).display().to_string();
        let files = ["--data", &rows, "--out", &out];
        call("train", "--max-steps 3 --lr 1e-3 --quiet --overwrite", &[&files, more].concat());
        fs::read(s.folder.join(name).join("adapter_model.safetensors")).unwrap()
    };
    let plan = |more: &[&str]| -> u64 {
        let v: serde_json::Value = serde_json::from_str(&call("plan", "--max-length 16 --json", more)).unwrap();
        v["total_bytes"].as_u64().unwrap()
    };
    let mut least = BTreeMap::new();
    for (method, dtype) in [("lora", "bf16"), ("paca", "f32"), ("paca", "bf16")] {
        let of = ["--method", method, "--dtype", dtype];
        let without = [&of[..], &["--no-blocks"]].concat();
        let (coded, plain) = (train("coded", &of), train("plain", &without));
        assert!(coded == plain, "{method} {dtype}: not the same bits");
        let (small, large) = (plan(&of), plan(&without));
        assert!(small < large, "{method} {dtype}: {small} bytes are planned, {large} without blocks");
        least.insert((method, dtype), small);
        // What was trained is then read beside the codes as well: as one value, or as what it changes.
        let adapter = s.folder.join("coded").display().to_string();
        let with = |more: &[&str]| {
            let (bits, _) = s.logits(&model, 7, &[&["--adapter", &adapter, "--dtype", dtype], more].concat());
            bits.into_iter().map(f64::from_bits).collect::<Vec<f64>>()
        };
        let most = if dtype == "f32" { 1e-5 } else { 2e-2 };
        assert!(relative(&with(&[]), &with(&["--no-blocks"])) <= most, "{method} {dtype}");
        let layouts = s.layouts(&["--adapter", &adapter, "--dtype", dtype]);
        assert!(layouts.contains("t, q8_0)") && layouts.contains("t, q4_1)"), "{method} {dtype}: {layouts}");
    }
    // On a GPU, too: both orders of a weight, and the embedding's rows.
    let gpu = on_gpu(&s.pleach, "sm=8.0");
    let step = |method: &str, name: &str, more: &[&str]| {
        let (model, out) = (s.text(), s.folder.join(name).display().to_string());
        let words =
            "--target-modules all-linear --r 4 --batch 2 --max-steps 1 --lr 1e-3 --quiet --overwrite --target cuda";
        let all =
            ["train", &model, "--method", method, "--data", &rows, "--out", &out].into_iter().chain(words.split(' '));
        gpu.ok(&all.chain(more.iter().copied()).collect::<Vec<_>>());
        fs::read(s.folder.join(name).join("adapter_model.safetensors")).unwrap()
    };
    for method in ["lora", "paca"] {
        let (coded, plain) = (step(method, "gpu-coded", &[]), step(method, "gpu-plain", &["--no-blocks"]));
        assert!(coded == plain, "{method} on a GPU: not the same bits");
    }
    // Trained columns lie over the codes.
    let (lora, paca) = (least[&("lora", "bf16")], least[&("paca", "bf16")]);
    assert!(paca < lora, "{paca} bytes are planned for columns, {lora} for branches");
}

/// The binary with the stand-in driver, which has these properties.
fn on_gpu(pleach: &Pleach, properties: &str) -> Pleach {
    let library = pleach_fake_cuda::library();
    assert!(library.is_file(), "{} is missing; build the whole workspace", library.display());
    pleach.with_env(&[
        ("PLEACH_CUDA_LIBRARY", &library.display().to_string()),
        ("PLEACH_CUBLASLT_LIBRARY", "/nonexistent/libcublasLt.so"),
        (pleach_fake_cuda::VARIABLE, properties),
    ])
}

#[test]
fn a_gpu_reads_blocks() {
    use Kind::{F32, Q4_0, Q4_1, Q8_0};
    for (name, kinds) in [("one", &[Q4_0][..]), ("mixed", &[Q8_0, Q4_1, Q4_1, Q4_1, Q4_0, Q8_0, Q8_0, F32])] {
        let mut s = Setup::new(&format!("blocks-gpu-{name}"), kinds);
        let model = s.text();
        // Weights that are put together stay in blocks.
        let text = s.layouts(&["--target", "sm_90a", "--dtype", "bf16"]);
        assert!(text.contains("blocks(q4_0)") || text.contains("blocks(q4_1)"), "{text}");
        assert!(text.contains("results blocks("), "{text}");
        let cpu = s.logits(&model, 9, &[]).0;
        let values = |bits: &[u64]| bits.iter().map(|b| f64::from_bits(*b)).collect::<Vec<_>>();
        let plain = s.pleach.with_env(&[]);
        for (properties, dtype) in [("sm=8.0", "f32"), ("sm=8.0", "bf16"), ("sm=9.0,order=at-once", "bf16")] {
            s.pleach = on_gpu(&plain, properties);
            let args = ["--target", "cuda", "--dtype", dtype];
            for tokens in [1, 9] {
                let coded = s.logits(&model, tokens, &args).0;
                let numbers = s.logits(&model, tokens, &[&args[..], &["--no-blocks"]].concat()).0;
                if dtype == "f32" {
                    assert_eq!(coded, numbers, "{name}, {tokens} tokens: not the same bits");
                }
                let off = relative(&values(&coded), &values(&numbers));
                assert!(off < 0.02, "{name} {properties} {dtype}, {tokens} tokens: {off}");
                if tokens == 9 && dtype == "f32" {
                    let off = relative(&values(&coded), &values(&cpu));
                    assert!(off < 2e-5, "{name}: {off} off the processor");
                }
            }
        }
    }
}

#[test]
fn inference_from_blocks_gives_the_same_bits() {
    use Kind::{F32, Q4_0, Q4_1, Q8_0};
    for (name, kinds) in [
        ("q4-0", &[Q4_0][..]),
        ("q4-1", &[Q4_1]),
        ("q8-0", &[Q8_0]),
        // The embedding, q, k, v, … of the first layer; those of the second begin elsewhere.
        ("mixed", &[Q8_0, Q4_1, Q4_1, Q8_0, Q4_0, Q4_1, Q4_1, Q8_0, F32]),
    ] {
        let s = Setup::new(&format!("blocks-{name}"), kinds);
        let model = s.text();
        let format = name.replace('-', "_");
        if name != "mixed" {
            // Products read codes, and nothing else.
            let text = s.layouts(&[]);
            assert!(text.contains(&format!("blocks({format})")) && text.contains(&format!(", t, {format})")), "{text}");
            assert!(!text.contains(", t)"), "{text}");
        }
        let plain = s.layouts(&["--no-blocks"]);
        assert!(!plain.contains("blocks(") && plain.contains(", t)"), "{plain}");
        for tokens in [1, 2, 7, 40] {
            let (coded, said) = s.logits(&model, tokens, &[]);
            assert!(!said.contains("blocks are"), "{said}");
            assert_eq!(coded, s.logits(&model, tokens, &["--no-blocks"]).0, "{name}, {tokens} tokens");
        }
        // Another processor class, and another type of the computation.
        for more in [["--target", "avx2"], ["--dtype", "bf16"]] {
            let coded = s.logits(&model, 5, &more).0;
            assert_eq!(coded, s.logits(&model, 5, &[&more[..], &["--no-blocks"]].concat()).0, "{name}, {more:?}");
        }
        let generate = |more: &[&str]| {
            let all = ["generate", &model, "--ids", "3,1,4,1,5", "--max-new-tokens", "24", "--print-ids", "--quiet"];
            s.pleach.ok(&[&all[..], more].concat())
        };
        let ids = generate(&[]);
        assert_eq!(ids, generate(&["--no-blocks"]), "{name}");
        assert!(ids.split(',').collect::<std::collections::BTreeSet<_>>().len() > 3, "{name}: {ids}");
    }
}

#[test]
fn import_says_what_it_keeps_and_keeps_nothing_on_request() {
    let s = Setup::new("blocks-import", &[Kind::Q4_1]);
    let again = s.import(&["--overwrite"]);
    assert!(again.contains("15 matrices in blocks too") && again.contains("blocks/model.safetensors"), "{again}");
    assert!(s.blocks().is_file());
    // The readers of the folder see one set of weights.
    let top: Vec<_> = fs::read_dir(&s.model).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(top.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")).count(), 1, "{top:?}");
    let v: serde_json::Value = serde_json::from_str(&s.import(&["--overwrite", "--no-blocks", "--json"])).unwrap();
    assert_eq!((v["blocks"].as_u64(), v["tensors"].as_u64()), (Some(0), Some(20)));
    assert!(!s.blocks().exists());
    assert!(!s.layouts(&[]).contains("blocks("));
}

#[test]
fn weights_that_have_changed_are_used_and_their_blocks_are_not() {
    let s = Setup::new("blocks-changed", &[Kind::Q8_0]);
    let model = s.text();
    let plan = s.folder.join("m.pleach").display().to_string();
    s.pleach.ok(&["compile", &model, "-o", &plan, "--quiet"]);
    let with_plan = |more: &[&str]| s.logits(&plan, 3, &[&["--weights", &model], more].concat());
    let first = s.logits(&model, 3, &[]).0;
    assert_eq!(with_plan(&[]).0, first);
    let e = s.pleach.fails(2, &["run", &plan, "--weights", &model, "--ids", "1", "--no-blocks"]);
    assert!(e.contains("compile it with --no-blocks"), "{e}");
    settle();
    // The answer is kept, and asked for by what the file system says.
    s.logits(&model, 3, &[]);
    let answers = s.answers();
    assert_eq!(answers.len(), 1);
    assert_eq!(fs::read_to_string(&answers[0]).unwrap(), "same\n");
    fs::write(&answers[0], "differs a.weight\n").unwrap();
    assert!(s.logits(&model, 3, &[]).1.contains("`a.weight`"));
    // … but not by who keeps nothing, and a damaged one is no answer.
    assert!(!s.logits(&model, 3, &["--no-cache"]).1.contains("`a.weight`"));
    fs::write(&answers[0], "sam").unwrap();
    assert!(!s.logits(&model, 3, &[]).1.contains("blocks are"));
    assert_eq!(fs::read_to_string(&answers[0]).unwrap(), "same\n");

    s.change_a_weight();
    for _ in 0..2 {
        let (changed, said) = s.logits(&model, 3, &[]);
        assert!(said.contains("have changed since they were imported") && said.contains("delete "), "{said}");
        assert_eq!(said.matches("blocks are not used").count(), 1, "{said}");
        assert_eq!(changed, s.logits(&model, 3, &["--no-blocks"]).0);
        assert_ne!(changed, first);
        settle();
    }
    assert_eq!(s.answers().len(), 2);
    let e = s.pleach.fails(1, &["run", &plan, "--weights", &model, "--ids", "1"]);
    assert!(e.contains("do not stand for the weights") && e.contains("--no-blocks"), "{e}");
    // Deleting the blocks is one way out, importing again the other.
    fs::remove_dir_all(s.model.join("blocks")).unwrap();
    assert!(!s.logits(&model, 3, &[]).1.contains("blocks are"));
    let e = s.pleach.fails(1, &["run", &plan, "--weights", &model, "--ids", "1"]);
    assert!(e.contains("compiled for weights in blocks") && e.contains("--no-blocks"), "{e}");
    s.import(&["--overwrite"]);
    assert_eq!(s.logits(&model, 3, &[]).0, first);
    assert_eq!(with_plan(&[]).0, first);
}

#[test]
fn damaged_blocks_are_named_and_can_be_left_unused() {
    let s = Setup::new("blocks-damaged", &[Kind::Q4_0]);
    let model = s.text();
    let want = s.logits(&model, 2, &["--no-blocks"]).0;
    let whole = fs::read(s.blocks()).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let damaged = |bytes: &[u8]| {
        fs::write(s.blocks(), bytes).unwrap();
        s.pleach.fails(1, &["run", &model, "--ids", "1,2"])
    };
    let renamed = String::from_utf8_lossy(&whole[8..8 + header]).replace("q4_0", "q4_7");
    for bytes in [&whole[..whole.len() / 2], &[], &[&whole[..8], renamed.as_bytes(), &whole[8 + header..]].concat()] {
        let e = damaged(bytes);
        assert!(e.contains("blocks/model.safetensors") && e.contains("delete the folder `blocks`"), "{e}");
        assert_eq!(s.logits(&model, 2, &["--no-blocks"]).0, want);
    }
    // One bit of a code or scale: other values, so they are not used.
    for at in [8 + header, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(s.blocks(), bytes).unwrap();
        let (logits, said) = s.logits(&model, 2, &[]);
        assert!(said.contains("blocks are not used"), "{said}");
        assert_eq!(logits, want);
    }
    fs::write(s.blocks(), &whole).unwrap();
    assert!(!s.logits(&model, 2, &[]).1.contains("blocks are"));
    assert!(Path::new(&model).join("config.json").is_file());
}
