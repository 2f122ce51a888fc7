//! Small hand-written kernels against plain Rust, and kernels with one deliberate error each.

mod collectives;
mod copies;
mod costs;
mod limits;
mod products;

use pleach_ptx_sim::{Checks, Counts, Fault, Launch, Memory, Mode, Module, Param, Ptr, SimError, TensorMap};

const DECL: &str = ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .b64 %d<32>;\n";

/// A module of one kernel `k` with pointer parameters `a` and `b` (in `%d1`, `%d2`) and the thread in `%r1`.
fn text(body: &str) -> String {
    format!(
        ".version 8.3\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n\
         .visible .entry k(.param .u64 .ptr .global .align 1 a, .param .u64 b) .maxntid 1024, 1, 1\n{{\n{DECL}\
         ld.param.b64 %d1, [a]; ld.param.b64 %d2, [b]; mov.u32 %r1, %tid.x;\n{body}\nret;\n}}\n"
    )
}

fn run(body: &str, mem: &mut Memory, a: Ptr, b: Ptr, threads: u32, mode: Mode) -> Result<Counts, SimError> {
    let m = Module::parse(&text(body)).unwrap();
    let params = [Param::Ptr(a), Param::Ptr(b)];
    let l = Launch { block: [threads, 1, 1], dynamic_shared: 8192, params: &params, mode, ..Launch::default() };
    m.kernel("k")?.launch(mem, l)
}

/// Runs a body over `n` words of input in both modes; both have to agree.
fn words(body: &str, input: &[u32], threads: u32, out: usize) -> Result<Vec<u32>, SimError> {
    let mut all = vec![];
    for mode in [Mode::Late, Mode::AtOnce] {
        let mut mem = Memory::new();
        let a = mem.alloc_from(&input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        let b = mem.alloc(4 * out);
        run(body, &mut mem, a, b, threads, mode)?;
        all.push(mem.read_i32(b)?.into_iter().map(|x| x as u32).collect::<Vec<u32>>());
    }
    assert_eq!(all[0], all[1], "the modes differ");
    Ok(all.remove(0))
}

/// Loads word `tid` to `%r2`, its shared address is in `%d5`, the output's in `%d4`.
const HEAD: &str = "mul.wide.u32 %d3, %r1, 4; add.s64 %d6, %d1, %d3; add.s64 %d4, %d2, %d3;\n\
    mov.b64 %d7, smem; add.s64 %d5, %d7, %d3; ld.global.b32 %r2, [%d6];\n";

fn fault(body: &str) -> Fault {
    let e = words(body, &(0..64).collect::<Vec<u32>>(), 64, 64).unwrap_err();
    e.fault().unwrap_or_else(|| panic!("no fault: {e}")).clone()
}

#[test]
fn straight_line_integers_follow_rust() {
    type Case = (&'static str, fn(u32, u32) -> u32);
    let cases: [Case; 16] = [
        ("add.s32 %r4, %r2, %r3", |a, b| a.wrapping_add(b)),
        ("sub.s32 %r4, %r2, %r3", |a, b| a.wrapping_sub(b)),
        ("mul.lo.s32 %r4, %r2, %r3", |a, b| a.wrapping_mul(b)),
        ("mul.hi.u32 %r4, %r2, %r3", |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        ("mul.hi.s32 %r4, %r2, %r3", |a, b| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32),
        ("and.b32 %r4, %r2, %r3", |a, b| a & b),
        ("xor.b32 %r4, %r2, %r3", |a, b| a ^ b),
        ("shr.s32 %r4, %r2, 7", |a, _| ((a as i32) >> 7) as u32),
        ("shr.u32 %r4, %r2, 33", |_, _| 0),
        ("min.s32 %r4, %r2, %r3", |a, b| (a as i32).min(b as i32) as u32),
        ("max.u32 %r4, %r2, %r3", |a, b| a.max(b)),
        ("bfe.u32 %r4, %r2, 4, 9", |a, _| a >> 4 & 0x1ff),
        ("popc.b32 %r4, %r2", |a, _| a.count_ones()),
        ("clz.b32 %r4, %r2", |a, _| a.leading_zeros()),
        ("prmt.b32 %r4, %r2, %r3, 0x5410", |a, b| (a & 0xffff) | b << 16),
        ("shf.l.wrap.b32 %r4, %r2, %r3, 5", |a, b| b << 5 | a >> 27),
    ];
    let mut s = 1u64;
    let input: Vec<u32> = (0..128)
        .map(|_| {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 29) as u32
        })
        .collect();
    for (op, want) in cases {
        let body = format!("{HEAD} ld.global.b32 %r3, [%d6+256]; {op}; st.global.b32 [%d4], %r4;");
        let got = words(&body, &input, 64, 64).unwrap();
        let want: Vec<u32> = (0..64).map(|i| want(input[i], input[i + 64])).collect();
        assert_eq!(got, want, "{op}");
    }
}

#[test]
fn floats_are_rounded_as_named() {
    let input: Vec<f32> = (0..64).map(|i| (i as f32 - 31.5) * 1.37e-3).collect();
    let bits: Vec<u32> = input.iter().map(|x| x.to_bits()).collect();
    let body =
        format!("{HEAD} fma.rn.f32 %r3, %r2, %r2, 0f3F800000; div.rn.f32 %r3, %r3, %r2; st.global.b32 [%d4], %r3;");
    let got = words(&body, &bits, 64, 64).unwrap();
    for (x, got) in input.iter().zip(got) {
        assert_eq!(f32::from_bits(got), x.mul_add(*x, 1.0) / x);
    }
    let body = format!("{HEAD} cvt.rn.bf16x2.f32 %r3, %r2, 0f3F800000; st.global.b32 [%d4], %r3;");
    for (x, got) in input.iter().zip(words(&body, &bits, 64, 64).unwrap()) {
        assert_eq!(got, u32::from(pleach_ptx_sim::f32_to_bf16(*x)) << 16 | 0x3f80);
    }
}

#[test]
fn diverged_lanes_meet_at_a_shuffle() {
    // Odd lanes add 100 in a branch of their own; then each lane adds its neighbour's number.
    let body = format!(
        "{HEAD} and.b32 %r3, %r1, 1; setp.eq.b32 %p1, %r3, 0; @%p1 bra EVEN; add.s32 %r2, %r2, 100;\n\
         EVEN: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; add.s32 %r4, %r4, %r2; st.global.b32 [%d4], %r4;"
    );
    let got = words(&body, &(0..64).collect::<Vec<u32>>(), 64, 64).unwrap();
    assert_eq!(got, (0..64).map(|i| 2 * (i / 2 * 2) + 101).collect::<Vec<u32>>());
}

#[test]
fn a_block_turns_its_words_around() {
    let sync = format!(
        "{HEAD} st.shared.b32 [%d5], %r2; bar.sync 0; sub.s32 %r3, 63, %r1; mul.wide.s32 %d8, %r3, 4;\n\
         add.s64 %d8, %d7, %d8; ld.shared.b32 %r4, [%d8]; st.global.b32 [%d4], %r4;"
    );
    let got = words(&sync, &(0..64).collect::<Vec<u32>>(), 64, 64).unwrap();
    assert_eq!(got, (0..64).rev().collect::<Vec<u32>>());
    // Without the barrier the first warp reads what nobody has written, or another warp's write unordered.
    let f = fault(&sync.replace("bar.sync 0;", ""));
    assert!(matches!(f, Fault::Race { .. } | Fault::Uninitialised { .. }), "{f}");
    // A second barrier is missing when the words are overwritten at once.
    let f = fault(&format!("{sync} st.shared.b32 [%d5], %r4;"));
    assert!(matches!(f, Fault::Race { .. }), "{f}");
}

#[test]
fn copies_need_their_wait() {
    let copy = format!(
        "{HEAD} cp.async.ca.shared.global [%d5], [%d6], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;\n\
         xor.b32 %r3, %r1, 63; mul.wide.s32 %d8, %r3, 4; add.s64 %d8, %d7, %d8; ld.shared.b32 %r4, [%d8];\n\
         st.global.b32 [%d4], %r4;"
    );
    let got = words(&copy, &(0..64).collect::<Vec<u32>>(), 64, 64).unwrap();
    assert_eq!(got, (0..64).rev().collect::<Vec<u32>>());
    let f = fault(&copy.replace("wait_group 0", "wait_group 1"));
    assert!(matches!(f, Fault::Uninitialised { .. } | Fault::Race { .. }), "{f}");
}

#[test]
fn wrong_accesses_are_found() {
    let f = fault(&format!("{HEAD} ld.global.b32 %r3, [%d6+4]; st.global.b32 [%d4], %r3;"));
    assert!(matches!(f, Fault::OutOfBounds { space: "global", .. }), "{f}");
    let f = fault(&format!("{HEAD} ld.global.b32 %r3, [%d4]; st.global.b32 [%d4], %r3;"));
    assert!(matches!(f, Fault::Uninitialised { space: "global", .. }), "{f}");
    let f = fault(&format!("{HEAD} ld.global.b64 %d8, [%d1+4]; st.global.b32 [%d4], %r2;"));
    assert!(matches!(f, Fault::Misaligned { space: "global", .. }), "{f}");
    let f = fault(&format!("{HEAD} st.shared.b32 [%d5+8000], %r2;"));
    assert!(matches!(f, Fault::OutOfBounds { space: "shared", .. }), "{f}");
    let f = fault(&format!("{HEAD} st.shared.b32 [smem], %r1;"));
    assert!(matches!(f, Fault::Race { .. }), "{f}");
}

#[test]
fn barriers_that_not_all_reach_are_reported() {
    let body = format!("{HEAD} setp.lt.u32 %p1, %r1, 32; @%p1 bra OUT; bar.sync 0; OUT: st.global.b32 [%d4], %r2;");
    let e = words(&body, &[0; 64], 64, 64).unwrap_err();
    assert!(matches!(&e, SimError::Deadlock { report, .. } if report.contains("barrier 0: 32 of 64 threads")), "{e}");
    let body = format!("{HEAD} setp.lt.u32 %p1, %r1, 40; @%p1 bar.sync 0;");
    assert!(matches!(fault(&body), Fault::Divergence(_)));
}

#[test]
fn blocks_must_not_share_bytes() {
    let m = Module::parse(&text("st.global.b32 [%d1], %r1;")).unwrap();
    let mut mem = Memory::new();
    let a = mem.alloc(4);
    let params = [Param::Ptr(a), Param::Ptr(a)];
    let l = Launch { grid: [2, 1, 1], block: [1, 1, 1], params: &params, ..Launch::default() };
    let e = m.kernel("k").unwrap().launch(&mut mem, l.clone()).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::BlockRace { other: 0, mine: 1, .. })), "{e}");
    let off = Checks { races: false, uninitialised: true };
    m.kernel("k").unwrap().launch(&mut mem, Launch { checks: off, ..l }).unwrap();
}

#[test]
fn unknown_text_is_an_error_with_its_line() {
    for (body, part) in [
        ("frob.b32 %r1, %r2;", "instruction `frob.b32` is not known"),
        ("add.strange.s32 %r1, %r2, %r3;", "modifier `.strange`"),
        ("add.s31 %r1, %r2, %r3;", "type `.s31`"),
        ("mov.b32 %r1, %q1;", "`%q1` is not declared"),
        ("bra NOWHERE;", "label `NOWHERE`"),
    ] {
        let e = Module::parse(&text(body)).unwrap_err().to_string();
        assert!(e.contains(part) && e.starts_with("line 9:"), "{e}");
    }
}

#[test]
fn a_warp_multiplies_matrices() {
    // A [16][16] and B [8][16] in bf16, row by row, copied to shared memory and read by ldmatrix.
    let a: Vec<f32> = (0..256).map(|i| ((i * 7 % 23) as f32 - 11.0) / 8.0).collect();
    let b: Vec<f32> = (0..128).map(|i| ((i * 5 % 19) as f32 - 9.0) / 4.0).collect();
    let body = "mov.b64 %d7, smem; mul.wide.u32 %d3, %r1, 16; add.s64 %d5, %d1, %d3; add.s64 %d6, %d7, %d3;\n\
        cp.async.cg.shared.global [%d6], [%d5], 16; setp.lt.u32 %p1, %r1, 16;\n\
        @%p1 cp.async.cg.shared.global [%d6+512], [%d5+512], 16; cp.async.wait_all; bar.warp.sync -1;\n\
        and.b32 %r2, %r1, 15; shl.b32 %r2, %r2, 5; and.b32 %r3, %r1, 16; or.b32 %r2, %r2, %r3;\n\
        cvt.u64.u32 %d8, %r2; add.s64 %d8, %d7, %d8;\n\
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%d8];\n\
        and.b32 %r2, %r1, 7; shl.b32 %r2, %r2, 5; and.b32 %r3, %r1, 8; shl.b32 %r3, %r3, 1; or.b32 %r2, %r2, %r3;\n\
        cvt.u64.u32 %d8, %r2; add.s64 %d8, %d7, %d8;\n\
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r8, %r9}, [%d8+512]; mov.b32 %r10, 0f00000000;\n\
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r11, %r12, %r13, %r14}, {%r4, %r5, %r6, %r7}, \
        {%r8, %r9}, {%r10, %r10, %r10, %r10};\n\
        mul.wide.u32 %d3, %r1, 8; add.s64 %d4, %d2, %d3; st.global.v2.b32 [%d4], {%r11, %r12};\n\
        st.global.v2.b32 [%d4+256], {%r13, %r14};";
    let product = |body: &str| -> Result<Vec<f32>, SimError> {
        let mut mem = Memory::new();
        let input = mem.alloc_bf16(&[a.clone(), b.clone()].concat());
        let out = mem.alloc(512);
        let c = run(body, &mut mem, input, out, 32, Mode::Late)?;
        assert_eq!((c.mma_flops, c.of("mma.sync"), c.global_read), (4096, 1, 768));
        mem.read_f32(out)
    };
    let want: Vec<f32> = (0..128).map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * b[i % 8 * 16 + k]).sum()).collect();
    assert_eq!(product(body).unwrap(), want);
    assert_ne!(product(&body.replace("x4.shared", "x4.trans.shared")).unwrap(), want, "a wrong ldmatrix shows");
    let e = product(&body.replace("bar.warp.sync -1;", "")).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Race { .. })), "{e}");
}
