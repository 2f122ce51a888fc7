//! Sessions on the stand-in driver: one graph serves every count of its range, windows past the end are empty, an adapter is
//! exchanged without another graph, and single launches give the bits of graphs. Needs LLVM, and no GPU.
//!
//! Each test runs in a process of its own, because the driver is found once per process: the test starts itself again with the
//! variables that name it.
#![allow(clippy::print_stderr, reason = "what a process said is shown when it fails")]

use pleach_codegen::compile::{compile_gpu, supported_gpu};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_frontend::adapter::SlotData;
use pleach_ir::{Graph, Sym};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, Target, chunk, manager};
use pleach_plan::{Meta, Plan};
use pleach_runtime::{InMemory, Session, open_weights};
use pleach_tests::compare::{Results, Start, run_graph, same};
use pleach_tests::compiled::{run, session};
use pleach_tests::values::symbols;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const LOG: &str = "PLEACH_TEST_LOG";

/// Runs `body` in a process that has the driver, and the stand-in for cuBLASLt; gives what it leaves to that process.
pub(crate) fn with_driver(test: &str, properties: &[&str], body: impl Fn(&Path)) {
    if let Some(log) = std::env::var_os(LOG) {
        return body(Path::new(&log));
    }
    let library = pleach_fake_cuda::library();
    assert!(library.is_file(), "{} is missing; build the whole workspace", library.display());
    for p in properties {
        let log = std::env::temp_dir().join(format!("pleach-{}-{}.log", std::process::id(), test.replace("::", "-")));
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(pleach_runtime::cuda::LIBRARY, &library)
            .env(pleach_runtime::cuda::CUBLASLT, &library)
            .env(pleach_fake_cuda::VARIABLE, format!("{p},log={}", log.display()))
            .env(LOG, &log)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        let _ = std::fs::remove_file(&log);
        assert!(out.status.success() && said.contains("1 passed"), "{p}: {said}");
    }
}

/// How many graphs were made, replayed, and set anew since the last call; and products by the library.
pub(crate) fn did(log: &Path) -> [usize; 4] {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let _ = std::fs::remove_file(log);
    ["graph", "replay", "set", "product"].map(|k| text.lines().filter(|l| l.starts_with(k)).count())
}

/// The head of the golden, forward and backward, without the weight's gradient: three times as many classes, so that a loop pays in
/// the kernels of a GPU too.
fn head() -> Graph {
    let text = include_str!("../../golden/passes/chunk/fires-head.ir");
    let (above, _) = text.split_once("\n---\n").unwrap();
    let of_gradient = |l: &&str| ["%25 =", "%26 =", "assign"].iter().any(|w| l.trim().starts_with(w));
    let graph: Vec<&str> = above.lines().filter(|l| !l.starts_with("//") && !of_gradient(l)).collect();
    pleach_ir::text::parse(&(graph.join("\n") + "\n").replace("40", "120")).unwrap()
}

#[test]
fn a_graph_serves_every_count_of_its_range() {
    with_driver("cuda::a_graph_serves_every_count_of_its_range", &["sm=8.0", "sm=8.0,order=at-once"], |log| {
        let g = head();
        let mut s = fuse_kernels::cut(
            &g,
            &CutOptions { supported: &supported_gpu, panels: &[], blocks: Default::default(), picks: None },
        )
        .unwrap();
        let loops = chunk::run_with(&mut s, &|_| 16, 256, 4).unwrap();
        assert_eq!(loops, 1, "{}", pleach_ir::text::print_schedule(&s));
        fuse_kernels::order(&mut s).unwrap();
        let (plan, _) = compile_gpu(&s, GpuChip::Sm80, 2, Meta { vocab: 3, ..Meta::default() }).unwrap();
        let plan = Arc::new(Plan::from_bytes(&plan.to_bytes().unwrap()).unwrap());
        let mut open: Option<Session> = None;
        // Ranges: 9 and 10; 33 to 40, ten windows of four rows of which the tenth is empty at 33 to 36.
        for (tokens, graphs) in [(9, 1), (10, 0), (9, 0), (33, 1), (40, 0), (34, 0), (1, 1), (37, 0), (9, 0)] {
            let mut counts = symbols();
            counts.insert(Sym::T, tokens);
            let start = Start::seeded(&g, counts, 7);
            let want = run_graph(&g, &start).unwrap();
            let options = pleach_runtime::Options::default().capacity("T", 64);
            let s = open.get_or_insert_with(|| session(plan.clone(), &g, &start, &options).unwrap());
            // What an earlier run left is no help.
            s.poison().unwrap();
            let got = run(s, "accumulate", &start).unwrap();
            assert_eq!(want.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>());
            same(&got, &want, &|_| 1e-4).unwrap_or_else(|e| panic!("T={tokens}: {e}"));
            assert_eq!(did(log)[..2], [graphs, 1], "T={tokens}");
            // Kernel by kernel, with a clock around each: the same bits.
            s.set_profile(true);
            let single = run(s, "accumulate", &start).unwrap();
            assert!(s.profile().iter().map(|k| k.calls).sum::<u64>() > 2);
            s.set_profile(false);
            assert_eq!(bits(&single), bits(&got), "T={tokens}");
            assert_eq!(did(log)[..2], [0, 0]);
        }
    });
}

#[test]
fn runs_are_timed_as_a_whole_and_launches_in_a_row() {
    with_driver("cuda::runs_are_timed_as_a_whole_and_launches_in_a_row", &["sm=8.0,time=k:100"], |_| {
        let g = head();
        let cut = CutOptions { supported: &supported_gpu, panels: &[], blocks: Default::default(), picks: None };
        let mut s = fuse_kernels::cut(&g, &cut).unwrap();
        fuse_kernels::order(&mut s).unwrap();
        let (plan, _) = compile_gpu(&s, GpuChip::Sm80, 2, Meta { vocab: 3, ..Meta::default() }).unwrap();
        let plan = Arc::new(Plan::from_bytes(&plan.to_bytes().unwrap()).unwrap());
        let mut counts = symbols();
        counts.insert(Sym::T, 9);
        let start = Start::seeded(&g, counts, 7);
        let options = pleach_runtime::Options::default().capacity("T", 9);
        let mut s = session(plan, &g, &start, &options).unwrap();
        run(&mut s, "accumulate", &start).unwrap();
        assert_eq!(s.run_time().unwrap(), None);
        s.set_timed(true);
        run(&mut s, "accumulate", &start).unwrap();
        // Every launch takes 100 microseconds, by a graph and alone, and nothing is between them.
        let whole = s.run_time().unwrap().unwrap();
        s.set_timed(false);
        let mut sum = |times: u32| {
            s.set_profile_in_a_row(times);
            run(&mut s, "accumulate", &start).unwrap();
            std::time::Duration::from_nanos(s.profile().iter().map(|k| k.ns).sum())
        };
        let near = |a: std::time::Duration, b: std::time::Duration| a.abs_diff(b).as_micros() < 5;
        assert!(whole.as_micros() >= 200, "{whole:?}");
        for times in [1, 3] {
            let launches = sum(times);
            assert!(near(launches, whole), "{times} in a row: {launches:?}, {whole:?} as a whole");
        }
    });
}

pub(crate) fn bits(r: &Results) -> Vec<(String, Vec<u8>)> {
    r.iter().map(|(n, t)| (n.clone(), t.to_bytes())).collect()
}

fn fixture(path: &str) -> PathBuf {
    pleach_tests::root().join("tests/fixtures").join(path)
}

/// The tensors of an adapter under the keys of a slot.
fn adapter(folder: &str, checkpoint: &pleach_frontend::Checkpoint, scale: f32) -> InMemory {
    let a = pleach_frontend::Adapter::open(&fixture(folder), None, &checkpoint.modules).unwrap();
    let mut out = InMemory::new();
    for (key, value) in pleach_frontend::adapter::slot_values(&a) {
        let t = value.read(checkpoint).unwrap();
        let SlotData::F32(values) = t.data else { panic!("{key} holds integers") };
        out = out.f32(key, &t.shape, &values.iter().map(|x| x * scale).collect::<Vec<_>>());
    }
    out
}

#[test]
fn an_adapter_is_exchanged_without_another_graph() {
    with_driver("cuda::an_adapter_is_exchanged_without_another_graph", &["sm=8.0"], |log| {
        let model = fixture("llama-tiny");
        let checkpoint = pleach_frontend::Checkpoint::open(&model).unwrap();
        let first = pleach_frontend::Adapter::open(&fixture("adapters/lora-r4"), None, &checkpoint.modules).unwrap();
        let graph = pleach_frontend::import(&checkpoint, &[first], &["infer"]).unwrap();
        // Folded in, so that an exchange has something to prepare.
        for merge in [false, true] {
            let options = Options { target: Target::GPU, merge, ..Options::default() };
            let after = manager::run(&graph, &Pipeline::default(), &options).unwrap().graph;
            let mut s = fuse_kernels::cut(
                &after,
                &CutOptions { supported: &supported_gpu, panels: &[], blocks: Default::default(), picks: None },
            )
            .unwrap();
            fuse_kernels::order(&mut s).unwrap();
            let meta = Meta { vocab: 128, max_positions: 64, ..Meta::default() };
            let plan = Arc::new(compile_gpu(&s, GpuChip::Sm80, 2, meta).unwrap().0);
            assert!(!merge || plan.entries.iter().any(|e| e.name == "prepare(slot0)"));
            let options = pleach_runtime::Options::default().capacity("T", 16).capacity("S", 2).capacity("P", 64);
            let mut s = Session::open(plan, open_weights(&model).unwrap(), &options).unwrap();
            let ids: [&[i32]; 1] = [&[5, 6, 7, 8, 9]];
            let logits = |s: &mut Session| s.infer(&ids, None).unwrap().f32("logits").unwrap().to_vec();
            let places: Vec<_> = s.plan().params.iter().map(|p| s.address_of(&p.name)).collect();
            let base = logits(&mut s);
            let (one, two) =
                (adapter("adapters/lora-r4", &checkpoint, 1.0), adapter("adapters/lora-r4", &checkpoint, 0.5));
            s.load_slot(0, &one).unwrap();
            let with_one = logits(&mut s);
            assert_eq!(did(log)[..2], [1, 2], "merge {merge}");
            s.load_slot(0, &two).unwrap();
            let with_two = logits(&mut s);
            s.load_slot(0, &one).unwrap();
            assert_eq!(logits(&mut s), with_one, "not the same bits again");
            s.clear_slot(0).unwrap();
            assert_eq!(logits(&mut s), base);
            assert!(with_one != base && with_two != base && with_one != with_two);
            assert_eq!(did(log)[..2], [0, 3], "an exchange made a graph");
            assert_eq!(places, s.plan().params.iter().map(|p| s.address_of(&p.name)).collect::<Vec<_>>());
            // A misfit is refused by name, and what was there stays.
            s.load_slot(0, &one).unwrap();
            let e = s.load_slot(0, &InMemory::new().f32("x", &[1], &[0.0])).unwrap_err().to_string();
            assert!(e.contains("`x` is not one of this slot"), "{e}");
            assert_eq!(logits(&mut s), with_one);
            assert_eq!(did(log)[..2], [0, 1]);
        }
    });
}

/// Copies tiles of eight rows by a tensor map: rows past the end of the tensor are zeros.
const TILE: &str = ".version 8.3\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];
.visible .entry tile(.param .align 64 .b8 map[128], .param .u64 out) .maxntid 32, 1, 1
{
    .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %d<16>;
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.b64 %d1, smem; mov.b64 %d2, map; ld.param.b64 %d3, [out];
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra FILLED;
    mbarrier.init.shared.b64 [%d1+512], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%d1+512], 512;
    shl.b32 %r3, %r2, 3; mov.b32 %r4, 0;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%d1], [%d2, {%r4, %r3}], [%d1+512];
FILLED:
    bar.sync 0;
AGAIN:
    mbarrier.try_wait.parity.shared.b64 %p2, [%d1+512], 0;
    @!%p2 bra AGAIN;
    mul.wide.u32 %d4, %r1, 16; add.s64 %d5, %d1, %d4; ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%d5];
    mul.wide.u32 %d6, %r2, 512; add.s64 %d7, %d3, %d6; add.s64 %d7, %d7, %d4;
    st.global.v4.b32 [%d7], {%r5, %r6, %r7, %r8};
    ret;
}
";

/// A plan of that kernel alone: `y` is `x` with zeros up to a multiple of eight rows.
fn tiles() -> Plan {
    use pleach_plan::{
        Blob, BlobKind, Buffer, BufferKind, DType, Entry, Expr, Input, Kernel, Launch, LaunchParam, Output, Step,
        Symbol, Target, TensorMap,
    };
    let t = Expr::Sym(0);
    let count = t.clone().ceil_div(8);
    let (given, gives) = (t.clone().mul(64), count.clone().mul(512));
    let map = TensorMap {
        buffer: 0,
        dtype: DType::F32,
        sizes: vec![16.into(), t.clone()],
        strides: vec![64.into()],
        boxes: vec![16, 8],
        swizzle: 0,
    };
    let launch = Launch {
        function: "tile".into(),
        grid: [count.clone(), 1.into(), 1.into()],
        block: 32,
        shared_bytes: 1024,
        params: vec![LaunchParam::TensorMap(map), LaunchParam::Buffer(1)],
        when: None,
    };
    let kernel = Kernel {
        symbol: "tile".into(),
        blob: 0,
        class: "row".into(),
        tasks: count.clone(),
        scratch_bytes: 0.into(),
        operands: vec![given.clone()],
        results: vec![gives.clone()],
        aliases: vec![None],
        flops: 0.into(),
        bytes: gives.clone(),
        launches: vec![launch],
        library: None,
    };
    let buffer = |kind, bytes: &Expr| Buffer { kind, bytes: bytes.clone(), name: String::new() };
    let entry = Entry {
        name: "main".into(),
        inputs: vec![Input { name: "x".into(), dtype: DType::F32, shape: vec![t, 16.into()], checks: vec![] }],
        outputs: vec![Output { name: "y".into(), buffer: 1, dtype: DType::F32, shape: vec![count.mul(8), 16.into()] }],
        buffers: vec![buffer(BufferKind::Input(0), &given), buffer(BufferKind::Output, &gives)],
        steps: vec![Step { kernel: 0, buffers: vec![0, 1], origin: String::new() }],
        loops: vec![],
    };
    Plan {
        target: Target { arch: "sm_90a".into(), features: vec![] },
        symbols: Symbol::list(["T"]),
        kernels: vec![kernel],
        entries: vec![entry],
        blobs: vec![Blob { name: "tile".into(), kind: BlobKind::Ptx, bytes: TILE.into() }],
        ..Plan::default()
    }
}

#[test]
fn tensor_maps_follow_the_counts_of_a_replay() {
    with_driver("cuda::tensor_maps_follow_the_counts_of_a_replay", &["sm=9.0", "sm=9.0,order=at-once"], |log| {
        let options = pleach_runtime::Options::default().capacity("T", 64);
        let mut s = Session::open(Arc::new(tiles()), Arc::new(InMemory::new()), &options).unwrap();
        // 9 and 10 share a graph, whose map is set anew when the count changes; so do 33 and 40.
        for (i, (rows, did_now)) in
            [(10, [1, 1, 0]), (10, [0, 1, 0]), (9, [0, 1, 1]), (9, [0, 1, 0]), (33, [1, 1, 1]), (40, [0, 1, 1])]
                .iter()
                .enumerate()
        {
            let x: Vec<f32> = (0..rows * 16).map(|j| (1 + i * 1000 + j) as f32).collect();
            let out = s.run("main", &[("x", x.as_slice().into())]).unwrap();
            let y = out.f32("y").unwrap();
            assert_eq!(y.len(), rows.next_multiple_of(8) * 16);
            assert_eq!(y[..x.len()], x);
            assert!(y[x.len()..].iter().all(|v| *v == 0.0), "{rows} rows: {:?}", &y[x.len()..]);
            assert_eq!(did(log)[..3], *did_now, "{rows} rows");
        }
    });
}
