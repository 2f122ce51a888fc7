//! Weights in blocks: what a plan reads of them, from memory and from files, and what is refused.

mod common;

use pleach_plan::{Output, *};
use pleach_runtime::{
    Files, InMemory, Options, Result, Session, TensorSource, expand, first_difference, random_weights,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Enough rows for the blocks to be read where they lie.
const N: u64 = 1000;
const K: u64 = 64;
/// Bytes of a row of two Q8_0 blocks.
const ROW: u64 = 68;

/// `values` shows what `prepare(base)` unpacked of the matrix `w` in blocks; `direct`, if it is there, unpacks it in every run.
fn plan(direct: bool) -> Plan {
    let k = Expr::Const;
    let shape = || vec![k(N), k(K)];
    let mut p = Plan { target: Target { arch: std::env::consts::ARCH.into(), features: vec![] }, ..Plan::default() };
    p.blobs.push(Blob { name: "toy".into(), kind: BlobKind::HostObject, bytes: common::object() });
    let blocks = Layout::Blocks(BlockFormat::Q8_0);
    p.params = vec![
        Param::new("w.q8_0", DType::F32, shape(), blocks, Role::Frozen, Source::Checkpoint("w".into())),
        Param::new("w.values", DType::F32, shape(), Layout::RowMajor, Role::Frozen, Source::Derived),
    ];
    let kernel = |symbol: &str, from: u64| Kernel {
        symbol: symbol.into(),
        blob: 0,
        class: "row".into(),
        tasks: k(N),
        scratch_bytes: k(0),
        operands: vec![k(from)],
        results: vec![k(N * K * 4)],
        aliases: vec![None],
        flops: k(0),
        bytes: k(0),
        launches: vec![],
        library: None,
    };
    p.kernels = vec![kernel("unpack", N * ROW), kernel("copy", N * K * 4)];
    let buffer = |kind, bytes| Buffer { kind, bytes: k(bytes), name: "b".into() };
    let entry = |name: &str, kernel, buffers: Vec<Buffer>| Entry {
        name: name.into(),
        outputs: match name {
            "prepare(base)" => vec![],
            _ => vec![Output { name: "y".into(), buffer: 1, dtype: DType::F32, shape: shape() }],
        },
        buffers,
        steps: vec![Step { kernel, buffers: vec![0, 1], origin: String::new() }],
        ..Entry::default()
    };
    let (coded, values) = (buffer(BufferKind::Param(0), N * ROW), buffer(BufferKind::Param(1), N * K * 4));
    let output = buffer(BufferKind::Output, N * K * 4);
    p.entries = vec![
        entry("prepare(base)", 0, vec![coded.clone(), values.clone()]),
        entry("values", 1, vec![values, output.clone()]),
    ];
    if direct {
        p.entries.push(entry("direct", 0, vec![coded, output]));
    }
    p.settle_residency();
    p
}

/// Blocks with scales near one and codes that look random.
fn blocks(rows: u64, row: u64) -> Vec<u8> {
    let noise = common::noise((rows * row) as usize, 5);
    let byte = |(i, x): (usize, &f32)| match i % 34 {
        1 => 0x3b | (u8::from(*x > 0.0) << 7),
        _ => (x * 127.0) as i8 as u8,
    };
    noise.iter().enumerate().map(byte).collect()
}

fn expanded(bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![];
    let mut values = [0.0; 32];
    for b in bytes.chunks_exact(34) {
        expand(BlockFormat::Q8_0, b, &mut values);
        out.extend(values);
    }
    out
}

fn in_memory() -> InMemory {
    let mut w = InMemory::new();
    w.insert_blocks("w", BlockFormat::Q8_0, N, blocks(N, ROW));
    w
}

fn open(plan: Plan, w: impl TensorSource + 'static) -> Result<Session> {
    Session::open(Arc::new(plan), Arc::new(w), &Options::default().threads(2))
}

fn refused(plan: Plan, w: impl TensorSource + 'static) -> String {
    open(plan, w).map(|_| ()).unwrap_err().to_string()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn values(s: &mut Session, entry: &str) -> Vec<u32> {
    bits(s.run(entry, &[]).unwrap().f32("y").unwrap())
}

/// A safetensors file with these tensors one after another, and metadata.
fn file(metadata: &str, tensors: &[(&str, &str, [u64; 2], &[u8])]) -> Vec<u8> {
    let mut header = format!(r#"{{"__metadata__":{metadata}"#);
    let mut data = vec![];
    for (name, dtype, [n, k], bytes) in tensors {
        let (a, b) = (data.len(), data.len() + bytes.len());
        header += &format!(r#","{name}":{{"dtype":"{dtype}","shape":[{n},{k}],"data_offsets":[{a},{b}]}}"#);
        data.extend_from_slice(bytes);
    }
    header.push('}');
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A model folder with `w`; in its blocks, `first` bytes of another tensor lie before those of `w`.
fn folder(name: &str, first: u64) -> PathBuf {
    let d = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("blocks-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&d);
    fs::create_dir_all(d.join("blocks")).unwrap();
    let coded = blocks(N, ROW);
    let elements = bytes_of(&expanded(&coded));
    fs::write(d.join("model.safetensors"), file("{}", &[("w", "F32", [N, K], &elements)])).unwrap();
    let other = vec![0; first as usize];
    let tensors: [(&str, &str, [u64; 2], &[u8]); 2] =
        [("a", "U8", [first / 34, 34], &other), ("w", "U8", [N, ROW], &coded)];
    write_blocks(&d, r#"{"a":"q8_0","w":"q8_0"}"#, &tensors[usize::from(first == 0)..]);
    d
}

fn write_blocks(model: &Path, metadata: &str, tensors: &[(&str, &str, [u64; 2], &[u8])]) {
    fs::write(model.join("blocks/model.safetensors"), file(metadata, tensors)).unwrap();
}

#[test]
fn a_plan_reads_blocks_where_it_asks_for_them() {
    let want = bits(&expanded(&blocks(N, ROW)));
    let mut s = open(plan(false), in_memory()).unwrap();
    assert_eq!(values(&mut s, "values"), want);
    assert_eq!(s.memory().prepare_only, N * ROW);
    assert_eq!((s.memory().mapped, s.address_of("w.q8_0")), (0, None));
    // Read by runs, they stay: in place, and only as many bytes as they have.
    let mut s = open(plan(true), in_memory()).unwrap();
    assert_eq!((values(&mut s, "values"), values(&mut s, "direct")), (want.clone(), want.clone()));
    assert_eq!((s.memory().mapped, s.memory().prepare_only), (N * ROW, 0));
    assert!(s.read_param("w.q8_0").is_err() && s.write_param("w.q8_0", DType::F32, &[0; (N * ROW) as usize]).is_err());
    // From a file, in place, wherever they begin.
    for first in [0, 34] {
        for direct in [false, true] {
            let d = folder(&format!("good-{first}-{direct}"), first);
            for path in [d.clone(), d.join("model.safetensors")] {
                let mut s = open(plan(direct), Files::open(&path).unwrap()).unwrap();
                assert_eq!(values(&mut s, "values"), want);
                if direct {
                    assert_eq!(values(&mut s, "direct"), want);
                    assert_eq!(s.memory().mapped, N * ROW);
                }
            }
        }
    }
}

#[test]
fn what_is_missing_or_of_another_kind_is_named_with_a_way_out() {
    let why = |w: &Path| refused(plan(false), Files::open(w).unwrap());
    let d = folder("missing", 0);
    let coded = blocks(N, ROW);
    let mut cases = vec![];
    let q8 = |name: &'static str, shape, n: usize| (name, "U8", shape, &coded[..n]);
    write_blocks(&d, r#"{"v":"q8_0"}"#, &[q8("v", [N, ROW], (N * ROW) as usize)]);
    cases.push((why(&d), "has no tensor `w`"));
    write_blocks(&d, r#"{"w":"q8_0"}"#, &[q8("w", [4, ROW], 272)]);
    cases.push((why(&d), "are q8_0 [4, 64], the plan expects q8_0 [1000, 64]"));
    write_blocks(&d, r#"{"w":"q4_0"}"#, &[q8("w", [N, 54], (N * 54) as usize)]);
    cases.push((why(&d), "are q4_0 [1000, 96], the plan expects q8_0 [1000, 64]"));
    write_blocks(&d, r#"{"w":"q4_1"}"#, &[q8("w", [N, ROW], (N * ROW) as usize)]);
    cases.push((why(&d), "`w` is no matrix in blocks"));
    write_blocks(&d, "{}", &[q8("w", [N, ROW], (N * ROW) as usize)]);
    cases.push((why(&d), "`w` is no matrix in blocks"));
    write_blocks(&d, r#"{"w":"q8_0"}"#, &[("w", "I8", [N, ROW], &coded)]);
    cases.push((why(&d), "`w` is no matrix in blocks"));
    fs::remove_dir_all(d.join("blocks")).unwrap();
    cases.push((why(&d), "there is no "));
    cases.push((
        refused(plan(false), InMemory::new().f32("w", &[N, K], &[0.0; (N * K) as usize])),
        "`w` is in memory as numbers alone",
    ));
    // A file that is missing is said once, whatever the number of tensors.
    let mut two = plan(false);
    two.params.push(Param { name: "w2".into(), ..two.params[0].clone() });
    assert_eq!(refused(two, Files::open(&d).unwrap()).matches("there is no ").count(), 1);
    for (message, expected) in cases {
        assert!(message.contains(expected) && message.contains("--no-blocks"), "{expected}: {message}");
    }
}

#[test]
fn every_cut_of_the_file_is_refused() {
    let d = folder("cut", 34);
    let path = d.join("blocks/model.safetensors");
    let whole = fs::read(&path).unwrap();
    // Every cut of the header, and some of what follows.
    for n in (0..400).chain((400..whole.len()).step_by(2003)) {
        fs::write(&path, &whole[..n]).unwrap();
        let w = Files::open(&d).unwrap();
        assert!(w.blocks("w").is_err() && w.tensor("w").is_some(), "cut at {n}");
    }
    fs::write(&path, &whole).unwrap();
    let w = Files::open(&d).unwrap();
    let before = w.blocks("w").unwrap().bytes.to_vec();
    w.release_blocks("w");
    assert_eq!(w.blocks("w").unwrap().bytes, before);
}

#[test]
fn every_change_of_a_weight_is_found_and_refused() {
    let coded = blocks(N, ROW);
    let elements = expanded(&coded);
    let with = |change: &dyn Fn(&mut Vec<f32>)| {
        let mut all = elements.clone();
        change(&mut all);
        let mut w = in_memory();
        w.insert("w", DType::F32, &[N, K], bytes_of(&all));
        w
    };
    let differs = |w: &InMemory| first_difference(w, &["w"], 2, 1);
    assert_eq!(differs(&with(&|_| {})), None);
    for i in 0..elements.len() {
        let w = with(&|x| x[i] = f32::from_bits(x[i].to_bits() ^ 1));
        assert_eq!(differs(&w).as_deref(), Some("w"), "value {i}");
    }
    // Equal as numbers is not enough.
    let zero = elements.iter().position(|x| *x == 0.0).unwrap();
    assert!(differs(&with(&|x| x[zero] = -x[zero])).is_some());
    let mut w = in_memory();
    w.insert("w", DType::F32, &[K, N], bytes_of(&elements));
    assert!(differs(&w).is_some(), "another shape");
    w.insert("w", DType::BF16, &[N, K], vec![0; (N * K * 2) as usize]);
    assert!(differs(&w).is_some(), "another type");
    // The first by name, whatever their sizes, for any number of threads.
    let mut many = InMemory::new();
    for (name, rows) in [("c", 4), ("a", 1), ("d", 2), ("b", 8)] {
        many.insert_blocks(name, BlockFormat::Q8_0, rows, blocks(rows, ROW));
    }
    for threads in [0, 1, 2, 3, 9] {
        assert_eq!(first_difference(&many, &["d", "c", "b", "a"], threads, 1), None);
    }
    for name in ["b", "c"] {
        let rows = if name == "b" { 8 } else { 4 };
        many.insert(name, DType::F32, &[rows, K], vec![0; (rows * K * 4) as usize]);
        for threads in [1, 2, 3, 9] {
            assert_eq!(first_difference(&many, &["d", "c", "b", "a"], threads, 1).as_deref(), Some("b"));
        }
        many.insert("b", DType::F32, &[8, K], vec![0; 2048]);
    }
    let changed = || with(&|x| x[319] += 1.0);
    let e = refused(plan(false), changed());
    assert!(e.contains("blocks of tensor `w`") && e.contains("import the model again"), "{e}");
    // Whoever says that he has compared them is believed.
    let o = Options { blocks_compared: true, ..Options::default() };
    let mut s = Session::open(Arc::new(plan(false)), Arc::new(changed()), &o).unwrap();
    assert_eq!(values(&mut s, "values"), bits(&elements));
}

#[test]
fn random_weights_are_what_their_blocks_stand_for() {
    for format in BlockFormat::ALL {
        let mut p = plan(false);
        let shape = vec![Expr::Const(64), Expr::Const(512)];
        let blocks = Layout::Blocks(format);
        let source = || Source::Checkpoint("w".into());
        p.params[0] = Param::new("w.coded", DType::F32, shape.clone(), blocks, Role::Frozen, source());
        p.params.push(Param::new("w", DType::F32, shape, Layout::RowMajor, Role::Frozen, source()));
        let w = random_weights(&p, 3).unwrap();
        assert_eq!(first_difference(&*w, &["w"], 1, 1), None);
        let again = random_weights(&p, 3).unwrap();
        assert_eq!(w.blocks("w").unwrap(), again.blocks("w").unwrap());
        let x: Vec<f32> = w.tensor("w").unwrap().bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let variance = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        // The codes of Q4_0 go from -8 to 7: half a code off.
        assert!(mean.abs() < 0.006 && (0.9..1.1).contains(&(variance * 512.0)), "{format:?}: {mean} {variance}");
    }
}
