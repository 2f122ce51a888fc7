//! The plan file: round trip, same bytes, damage, hostile manifests, what validation refuses.

use pleach_plan::*;
use proptest::prelude::*;
use serde_json::Value;

fn k(n: u64) -> Expr {
    Expr::Const(n)
}

/// A plan with one of everything: `y = x W`, W packed by `prepare(base)`, and another matrix from blocks into coded panels, a slot,
/// a cache updated in place.
fn sample() -> Plan {
    let mut p = Plan { symbols: Symbol::list(["T", "S1", "C"]), ..Plan::default() };
    p.target = Target { arch: "x86_64".into(), features: vec!["avx2".into(), "fma".into()] };
    p.meta = Meta { kind: "decoder".into(), vocab: 10, eos: vec![1, 2], ..Meta::default() };
    p.meta.extra.insert("zebra".into(), Value::from(1));
    p.meta.extra.insert("apple".into(), Value::from("x"));
    p.blobs.push(Blob { name: "host".into(), kind: BlobKind::HostObject, bytes: (0..=255).collect() });
    p.blobs.push(Blob { name: "row.ptx".into(), kind: BlobKind::Ptx, bytes: b"// ptx".to_vec() });
    let (t, c) = (p.sym("T").unwrap(), p.sym("C").unwrap());
    let param =
        |name: &str, shape: Vec<Expr>, layout, role, source| Param::new(name, DType::F32, shape, layout, role, source);
    let panels = Layout::Panels { nr: 16, transposed: true };
    let q4_1 = BlockFormat::Q4_1;
    let coded = Layout::CodedPanels { nr: 16, format: q4_1 };
    p.params = vec![
        param("w", vec![k(20), k(8)], Layout::RowMajor, Role::Frozen, Source::Checkpoint("model.w".into())),
        param("w.packed", vec![k(20), k(8)], panels, Role::Frozen, Source::Derived),
        param(
            "slot0.a",
            vec![k(4), k(8)],
            Layout::RowMajor,
            Role::Frozen,
            Source::Adapter { slot: 0, key: "a".into() },
        ),
        param("cache.0.k", vec![c.clone(), k(8)], Layout::RowMajor, Role::State, Source::Zeros),
        param("v", vec![k(20), k(64)], Layout::Blocks(q4_1), Role::Frozen, Source::Checkpoint("model.v".into())),
        param("v.packed", vec![k(20), k(64)], coded, Role::Frozen, Source::Derived),
    ];
    let kernel = |symbol: &str, tasks: Expr, operands: Vec<Expr>, results: Vec<Expr>, alias: Option<u32>| Kernel {
        symbol: symbol.into(),
        blob: 0,
        class: "row".into(),
        tasks,
        scratch_bytes: k(128),
        aliases: results.iter().map(|_| alias).collect(),
        operands,
        results,
        flops: k(1),
        bytes: k(1),
        launches: vec![],
        library: None,
    };
    let (x, y, packed, cache) = (t.clone().mul(32), t.clone().mul(80), k(32 * 8 * 4), c.mul(32));
    p.kernels = vec![
        kernel("pack", k(2), vec![k(640)], vec![packed.clone()], None),
        kernel("product", t.clone().ceil_div(8), vec![x.clone(), packed.clone()], vec![y.clone()], None),
        kernel("scatter", t.clone(), vec![cache.clone(), x.clone(), t.clone().mul(4)], vec![cache.clone()], Some(0)),
        kernel("code", k(2), vec![k(20 * 2 * 20)], vec![k(32 * 2 * 20)], None),
    ];
    let buffer = |kind, bytes: &Expr| Buffer { kind, bytes: bytes.clone(), name: "b".into() };
    let step = |kernel, buffers: &[u32]| Step { kernel, buffers: buffers.to_vec(), origin: "layer.0".into() };
    p.entries = vec![
        Entry {
            name: "prepare(base)".into(),
            buffers: vec![
                buffer(BufferKind::Param(0), &k(640)),
                buffer(BufferKind::Param(1), &packed),
                buffer(BufferKind::Param(4), &k(800)),
                buffer(BufferKind::Param(5), &k(1280)),
            ],
            steps: vec![step(0, &[0, 1]), step(3, &[2, 3])],
            ..Entry::default()
        },
        Entry {
            name: "generate".into(),
            inputs: vec![
                Input { name: "x".into(), dtype: DType::F32, shape: vec![t.clone(), k(8)], checks: vec![] },
                Input {
                    name: "slots".into(),
                    dtype: DType::I32,
                    shape: vec![t.clone()],
                    checks: p.standard_checks("generate", "slots"),
                },
            ],
            outputs: vec![Output { name: "y".into(), buffer: 4, dtype: DType::F32, shape: vec![t.clone(), k(20)] }],
            buffers: vec![
                buffer(BufferKind::Input(0), &x),
                buffer(BufferKind::Input(1), &t.mul(4)),
                buffer(BufferKind::Param(1), &packed),
                buffer(BufferKind::Param(3), &cache),
                buffer(BufferKind::Output, &y),
            ],
            steps: vec![step(2, &[3, 0, 1, 3]), step(1, &[0, 2, 4])],
            loops: vec![Loop {
                first: 1,
                last: 2,
                symbol: p.symbol("T").unwrap(),
                chunk: 16,
                windows: vec![Window { buffer: 0, row_bytes: k(32) }, Window { buffer: 4, row_bytes: k(80) }],
            }],
        },
    ];
    p.settle_residency();
    p
}

#[test]
fn round_trip_and_same_bytes() {
    let p = sample();
    let bytes = p.to_bytes().unwrap();
    assert_eq!(bytes, sample().to_bytes().unwrap());
    let q = Plan::from_bytes(&bytes).unwrap();
    assert_eq!(p, q);
    assert_eq!(q.to_bytes().unwrap(), bytes);
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("sample.pleach");
    p.write(&path).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), p);
    let left: Vec<_> = std::fs::read_dir(env!("CARGO_TARGET_TMPDIR")).unwrap().filter_map(|e| e.ok()).collect();
    assert!(left.iter().all(|e| !e.file_name().to_string_lossy().ends_with(".tmp")));
    let e = Plan::read(std::path::Path::new("/nowhere/x.pleach")).unwrap_err().to_string();
    assert!(e.starts_with("/nowhere/x.pleach: "), "{e}");
    assert!(p.write(std::path::Path::new("/nowhere/x.pleach")).is_err());
}

/// The sample with a kernel of a GPU, which has one of every parameter and products by a library.
fn with_launches() -> Plan {
    let mut p = sample();
    let t = p.sym("T").unwrap();
    let map = TensorMap {
        buffer: 0,
        dtype: DType::BF16,
        sizes: vec![k(64), t.clone()],
        strides: vec![k(128)],
        boxes: vec![64, 8],
        swizzle: 128,
    };
    let launch = |function: &str, params, above, most| Launch {
        function: function.into(),
        grid: [t.clone().ceil_div(8), k(1), k(1)],
        block: 128,
        shared_bytes: 1024,
        params,
        when: Some(When { count: t.clone(), above, most }),
    };
    let all = vec![
        LaunchParam::Buffer(0),
        LaunchParam::Table(vec![0, 1, 2]),
        LaunchParam::Scratch,
        LaunchParam::Dims,
        LaunchParam::TensorMap(map),
    ];
    let product = Product {
        rows: t.clone(),
        columns: 8,
        depth: 64,
        left: Matrix { buffer: 0, offset: 0, stride: 64, across: false },
        right: Matrix { buffer: 1, offset: 16, stride: 8, across: true },
        scale: Some(2),
        adds: true,
        to: ProductTarget { buffer: Some(3), dtype: DType::F32, offset: 0, stride: 8 },
        when: Some(When { count: t.clone(), above: 8, most: Some(1 << 20) }),
    };
    p.kernels.push(Kernel {
        symbol: "wide".into(),
        blob: 1,
        class: "contraction".into(),
        tasks: k(1),
        scratch_bytes: t.clone().mul(256),
        operands: vec![t.clone().mul(128), k(1040), k(4)],
        results: vec![t.clone().mul(32)],
        aliases: vec![None],
        flops: t.clone().mul(1024),
        bytes: t.clone().mul(160),
        launches: vec![launch("wide_few", all.clone(), 0, Some(8)), launch("wide_many", all, 8, None)],
        library: Some(ByLibrary {
            products: vec![product],
            launches: vec![launch("wide_rest", vec![LaunchParam::Buffer(3)], 8, None)],
        }),
    });
    p
}

#[test]
fn a_manifest_that_is_spelled_otherwise_has_another_version() {
    let plan = with_launches();
    assert_eq!(Plan::from_bytes(&plan.to_bytes().unwrap()).unwrap(), plan);
    let text = serde_json::to_string_pretty(&plan).unwrap() + "\n";
    let name = format!("tests/manifests/v{FORMAT_VERSION}.json");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
    // What a version once was is never written again.
    if !path.exists() && std::env::var_os("PLEACH_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let old = std::fs::read_to_string(&path).unwrap_or_else(|_| panic!("{name} is missing; PLEACH_BLESS=1 writes it"));
    assert!(text == old, "manifests are no longer spelled as in {name}: count FORMAT_VERSION up, then PLEACH_BLESS=1");
}

#[test]
fn layouts_are_spelled_the_same_for_good() {
    let manifest = sample().to_bytes().unwrap();
    let text = String::from_utf8_lossy(&manifest);
    for spelling in [r#"{"blocks":"q4_1"}"#, r#"{"coded_panels":{"nr":16,"format":"q4_1"}}"#] {
        assert!(text.contains(spelling), "{spelling}");
    }
    for f in BlockFormat::ALL {
        assert_eq!(BlockFormat::from_name(f.name()), Some(f));
        let bytes = |l: Layout| l.bytes(DType::BF16, &[k(20), k(64)]).unwrap().eval(&[]).unwrap();
        assert_eq!(bytes(Layout::Blocks(f)), 40 * f.bytes());
        assert_eq!(bytes(Layout::CodedPanels { nr: 48, format: f }), 96 * f.bytes());
    }
    assert_eq!(BlockFormat::from_name("q5_0"), None);
}

#[test]
fn every_damaged_byte_and_every_cut_is_found() {
    let bytes = sample().to_bytes().unwrap();
    for i in 0..bytes.len() {
        let mut b = bytes.clone();
        b[i] ^= 1 << (i % 8);
        assert!(Plan::from_bytes(&b).is_err(), "byte {i}");
        assert!(Plan::from_bytes(&bytes[..i]).is_err(), "cut at {i}");
    }
    let longer = [bytes.clone(), vec![0]].concat();
    assert!(Plan::from_bytes(&longer).unwrap_err().to_string().contains("bytes follow"));
    let mut newer = bytes;
    newer[8] = 9;
    assert!(matches!(Plan::from_bytes(&newer), Err(PlanError::Version { found: 9, expected: FORMAT_VERSION })));
    assert!(Plan::from_bytes(b"GGUF").unwrap_err().to_string().contains("cut off"));
}

#[test]
fn residency_and_lifetimes_follow_use() {
    let p = sample();
    let r: Vec<Residency> = p.params.iter().map(|p| p.residency).collect();
    let (prepare, owned) = (Residency::PrepareOnly, Residency::Owned);
    assert_eq!(r, [prepare, owned, owned, owned, prepare, owned]);
    assert_eq!(p.slots(), [0]);
    assert_eq!(lifetimes(p.entry("generate").unwrap(), &p.kernels), [(4, 1, 2)]);
    let env = p.env(&|s| Some(if s == "T" { 5 } else { 7 })).unwrap();
    // T, S (put in before S1), C, S1.
    assert_eq!(p.symbols.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["T", "C", "S", "S1"]);
    assert_eq!(env, [5, 7, 7, 8]);
    let a = arena(p.entry("generate").unwrap(), &p.kernels, &env).unwrap();
    assert_eq!((a.total, a.lower_bound), (448, 448));
    assert_eq!(a.offsets, [None, None, None, None, Some(0)]);
    assert_eq!(
        p.entry("nothing").unwrap_err().to_string(),
        "the plan has no entry `nothing`; it has: prepare(base), generate"
    );
    assert_eq!(p.entries[0].prepares(), Some(None));
    let e = |name: &str| Entry { name: name.into(), ..Entry::default() }.prepares();
    assert_eq!((e("prepare(slot12)"), e("prepare(x)"), e("infer")), (Some(Some(12)), None, None));
}

#[test]
fn validation_refuses_by_name() {
    type Break = fn(&mut Plan);
    let cases: Vec<(Break, &str)> = vec![
        (|p| p.symbols[1].name = "T".into(), "symbol 1 has no name of its own"),
        (|p| p.symbols[3].value = Some(Expr::Sym(3).add(1)), "symbol S1 is not an earlier free symbol"),
        (|p| p.params[1].name = "w".into(), "parameter `w` occurs twice"),
        (|p| p.params[0].bytes = k(639), "parameter `w` does not have the size of its shape"),
        (|p| p.params[1].layout = Layout::Panels { nr: 0, transposed: false }, "cannot lie in panels of 0"),
        (|p| p.params[0].shape[0] = Expr::Sym(0), "must be row-major (or in blocks, of the base) and of known shape"),
        (|p| p.params[4].shape[1] = k(40), "parameter `v` cannot lie in blocks of 32 values"),
        (|p| p.params[4].shape.truncate(1), "parameter `v` cannot lie in blocks of 32 values"),
        (
            |p| p.params[4].layout = Layout::Blocks(BlockFormat::Q8_0),
            "parameter `v` does not have the size of its shape",
        ),
        (|p| p.params[4].source = Source::Adapter { slot: 0, key: "v".into() }, "must be row-major (or in blocks"),
        (|p| p.params[5].shape[1] = Expr::Sym(0), "parameter `v.packed` cannot lie in blocks of 32 values"),
        (
            |p| p.params[5].layout = Layout::CodedPanels { nr: 0, format: BlockFormat::Q4_1 },
            "parameter `v.packed` cannot lie in panels of 0",
        ),
        (|p| p.params[5].source = Source::Checkpoint("v".into()), "must be row-major (or in blocks"),
        (|p| p.params[3].residency = Residency::Mapped, "comes from no file and must be owned"),
        (|p| p.entries[1].buffers.extend_from_within(3..4), "buffer 5 (b) names the same as another"),
        (|p| p.kernels[0].symbol = "a b".into(), "`a b` is no name of a kernel"),
        (|p| p.kernels[0].blob = 7, "names blob 7"),
        (|p| p.kernels[0].tasks = Expr::Sym(40), "an expression has no value"),
        (|p| p.kernels[0].tasks = Expr::Min(vec![]), "an expression has no value"),
        (|p| p.kernels[1].aliases = vec![Some(0)], "cannot be in place of operand 0"),
        (|p| p.kernels[1].aliases = vec![], "does not say which results are in place"),
        (|p| p.kernels[2].aliases = vec![], "does not say which results are in place"),
        (|p| p.entries[1].name = "prepare(base)".into(), "occurs twice"),
        (|p| p.entries[0].name = "prepare(slot4)".into(), "no parameter belongs to that slot"),
        (|p| p.entries[1].buffers[0].kind = BufferKind::Input(9), "does not have the size of what it names"),
        (|p| p.entries[1].buffers[2].bytes = k(4), "does not have the size of what it names"),
        (|p| p.entries[1].steps[0].kernel = 9, "names kernel 9"),
        (|p| p.entries[1].steps[0].buffers[1] = 99, "names buffer 99"),
        (|p| p.entries[1].steps[0].buffers.truncate(2), "gives 2 buffers to scatter, which takes 4"),
        (|p| p.entries[1].steps[1].buffers[0] = 1, "is smaller than product needs"),
        (|p| p.entries[1].steps[1].buffers[2] = 0, "which is read-only"),
        (|p| p.entries[1].buffers[0].kind = BufferKind::Arena, "reads buffer 0 (b) before it is written"),
        (|p| p.kernels[2].aliases = vec![None], "overwrites buffer 3 (b) while it is in use"),
        (|p| p.entries[0].steps[0].buffers[1] = 0, "is smaller than pack needs"),
        (|p| p.params[0].residency = Residency::Owned, ""),
        (|p| p.entries[0].name = "infer".into(), "which only preparations have"),
        (|p| p.entries[1].outputs[0].buffer = 0, "output `y` is no buffer"),
        (|p| p.entries[1].outputs[0].shape = vec![k(3)], "output `y` is no buffer"),
        (|p| p.entries[1].steps.truncate(1), "output `y` is no buffer"),
        (|p| p.entries[1].inputs[1].checks = vec![Check::Distinct], "a check of input `slots` makes no sense"),
        (|p| p.entries[1].inputs[0].checks = vec![Check::Range(k(1))], "input `x` is not i32"),
        (
            |p| p.entries[1].inputs[1].checks = vec![Check::Covers("x".into())],
            "a check of input `slots` makes no sense",
        ),
    ];
    for (i, (change, why)) in cases.into_iter().enumerate() {
        let mut p = sample();
        change(&mut p);
        match validate(&p) {
            Ok(()) => assert!(why.is_empty(), "case {i} ({why}) is accepted"),
            Err(e) => assert!(!why.is_empty() && e.to_string().contains(why), "case {i} ({why}): {e}"),
        }
    }
    // All faults are told together.
    let mut p = sample();
    p.params[0].bytes = k(1);
    p.kernels[0].blob = 7;
    let e = validate(&p).unwrap_err().to_string();
    assert!(e.contains("parameter `w`") && e.contains("names blob 7"), "{e}");
    assert!(p.to_bytes().is_err());
}

#[test]
fn nesting_is_bounded() {
    let manifest = serde_json::to_string(&sample()).unwrap();
    let bomb = format!("{}{}{}", "{\"add\":[".repeat(50_000), "{\"const\":1}", "]}".repeat(50_000));
    let text = manifest.replacen("\"tasks\":{\"const\":2}", &format!("\"tasks\":{bomb}"), 1);
    assert_ne!(text, manifest);
    assert!(Plan::from_manifest(text.as_bytes(), vec![vec![], vec![]]).is_err());
    let arrays = "[".repeat(100_000);
    assert!(Plan::from_manifest(arrays.as_bytes(), vec![]).is_err());
}

/// Paths to all values in a document.
fn paths(v: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_string());
    match v {
        Value::Array(a) => a.iter().enumerate().for_each(|(i, x)| paths(x, &format!("{at}/{i}"), out)),
        Value::Object(o) => o.iter().for_each(|(i, x)| paths(x, &format!("{at}/{i}"), out)),
        _ => {}
    }
}

fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<u64>().prop_map(Value::from),
        (0u64..50).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<i16>().prop_map(|x| Value::from(f64::from(x) / 8.0)),
        Just(Value::from(u64::MAX)),
        ".{0,5}".prop_map(Value::from),
        Just(serde_json::json!([])),
        Just(serde_json::json!({"sym": 4294967295u64})),
        Just(serde_json::json!({"const": u64::MAX})),
        Just(serde_json::json!({"ceil_div": [{"const": 1}, 0]})),
        Just(serde_json::json!({"mul": [{"sym": 0}, {"const": u64::MAX}, {"sym": 1}]})),
        Just(serde_json::json!({"max": []})),
        Just(serde_json::json!({"param": 77})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_manifest_is_an_error_or_harmless(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), hostile(), any::<prop::sample::Index>(), 0u8..3), 1..4)
    ) {
        let mut v = serde_json::to_value(sample()).unwrap();
        for (at, new, from, how) in changes {
            let mut all = vec![];
            paths(&v, "", &mut all);
            let new = match how {
                // A value from elsewhere in the document, or one removed, or a hostile one.
                0 => v.pointer(from.get(&all).as_str()).cloned().unwrap_or_default(),
                _ => new,
            };
            if let Some(x) = v.pointer_mut(at.get(&all).as_str()) {
                *x = new;
            }
        }
        let text = serde_json::to_vec(&v).unwrap();
        if let Ok(p) = Plan::from_manifest(&text, vec![vec![], vec![]]) {
            // What is accepted can be asked everything.
            for t in [1, 7, 1 << 40, u64::MAX] {
                if let Ok(env) = p.env(&|_| Some(t)) {
                    for e in &p.entries {
                        if let Ok(a) = arena(e, &p.kernels, &env) {
                            let r: Vec<_> = a.requests.iter().map(|r| r.1).collect();
                            let o: Vec<_> = a.requests.iter().filter_map(|r| a.offsets[r.0 as usize]).collect();
                            prop_assert!(memory::check(&r, &o).is_ok_and(|total| total <= a.total));
                        }
                    }
                    for k in &p.kernels {
                        let _ = (k.tasks.eval(&env), k.tasks.display(&p.symbols).to_string());
                    }
                }
            }
            let mut q = p.clone();
            q.settle_residency();
            prop_assert_eq!(Plan::from_bytes(&p.to_bytes().unwrap()).unwrap(), p);
        }
    }

    #[test]
    fn random_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Plan::from_bytes(&bytes).is_err());
        prop_assert!(Plan::from_bytes(&[MAGIC.as_slice(), &FORMAT_VERSION.to_le_bytes(), &bytes].concat()).is_err());
        prop_assert!(Plan::from_manifest(&bytes, vec![]).is_err());
    }
}
