//! mbarriers, bulk copies and tensor copies: what arrives, where, and what goes wrong when a wait or a fence is missing.

use super::*;

/// A kernel `k` with a tensor map (its address in `%d1`) and a pointer (in `%d2`); shared memory in `%d7`, the thread in `%r1`.
pub(super) fn mapped(body: &str) -> String {
    text(body)
        .replace(".param .u64 .ptr .global .align 1 a", ".param .align 64 .b8 a[128]")
        .replace("ld.param.b64 %d1, [a];", "mov.b64 %d9, a; cvta.param.u64 %d1, %d9; mov.b64 %d7, smem;")
}

fn launch(text: &str, mem: &mut Memory, params: &[Param], threads: u32, mode: Mode) -> Result<Counts, SimError> {
    let l = Launch { block: [threads, 1, 1], dynamic_shared: 16384, params, mode, ..Launch::default() };
    Module::parse(text).unwrap().kernel("k")?.launch(mem, l)
}

/// A matrix of 70 columns (rows of 144 bytes) and 10 rows in bf16, every element another number.
const SIZE: [usize; 2] = [70, 10];

fn matrix() -> Vec<u16> {
    (0..72 * SIZE[1]).map(|i| i as u16 + 1).collect()
}

pub(super) fn map(mem: &mut Memory, swizzle: u32, boxes: [u32; 2]) -> (Ptr, TensorMap) {
    let bytes: Vec<u8> = matrix().iter().flat_map(|x| x.to_le_bytes()).collect();
    let base = mem.alloc_from(&bytes);
    let m = TensorMap {
        base,
        element: 2,
        sizes: SIZE.map(|n| n as u64).to_vec(),
        strides: vec![144],
        boxes: boxes.to_vec(),
        swizzle,
    };
    (base, m)
}

/// Waits for phase `%r8` of the mbarrier at `%d7 + at`.
fn wait(at: u32, label: &str) -> String {
    format!("{label}: mbarrier.try_wait.parity.shared.b64 %p3, [%d7+{at}], %r8; @!%p3 bra {label};\n")
}

/// Loads a box of 8 rows to shared memory at 1024, writes it out as it lies there.
pub(super) fn load(x: i32, y: i32, bytes: u32) -> String {
    let wait = wait(0, "W");
    format!(
        "setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%d7], 1; fence.mbarrier_init.release.cluster;\n\
         mbarrier.arrive.expect_tx.shared.b64 _, [%d7], {bytes}; add.s64 %d5, %d7, 1024; mov.b32 %r5, {x}; mov.b32 %r6, {y};\n\
         cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%d5], [%d1, {{%r5, %r6}}], [%d7];\n\
         READY: bar.sync 0; mov.b32 %r8, 0;\n{wait} mul.wide.u32 %d3, %r1, 16; add.s64 %d4, %d7, %d3;\n\
         ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d4+1024]; add.s64 %d6, %d2, %d3;\n\
         st.global.v4.b32 [%d6], {{%r10, %r11, %r12, %r13}};"
    )
}

/// Element `(row, column)` of a box in shared memory: rows of `span` bytes, 16-byte pieces permuted.
fn place(row: usize, column: usize, span: usize, swizzle: usize) -> usize {
    let byte = row * span + 2 * column;
    let turn = if swizzle > 0 { (byte >> 7) & (swizzle / 16 - 1) } else { 0 };
    (byte ^ (turn << 4)) / 2
}

#[test]
fn boxes_arrive_swizzled_with_zeros_outside() {
    for (swizzle, columns) in [(0, 32), (32, 16), (64, 32), (128, 64)] {
        for (x, y) in [(0, 0), (48, 5), (-8, -3)] {
            let mut all = vec![];
            for mode in [Mode::Late, Mode::AtOnce] {
                let mut mem = Memory::new();
                let (_, m) = map(&mut mem, swizzle, [columns, 8]);
                let out = mem.alloc(16 * columns as usize);
                let text = mapped(&load(x, y, 16 * columns));
                launch(&text, &mut mem, &[Param::TensorMap(m), Param::Ptr(out)], columns, mode).unwrap();
                all.push(mem.read(out, 16 * columns as usize).unwrap().to_vec());
            }
            assert_eq!(all[0], all[1]);
            let got: Vec<u16> = all[0].as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
            for (row, column) in (0..8).flat_map(|r| (0..columns as usize).map(move |c| (r, c))) {
                let (c, r) = (x + column as i32, y + row as i32);
                let inside = c >= 0 && r >= 0 && c < SIZE[0] as i32 && r < SIZE[1] as i32;
                let want = if inside { matrix()[r as usize * 72 + c as usize] } else { 0 };
                let at = place(row, column, 2 * columns as usize, swizzle as usize);
                assert_eq!(got[at], want, "swizzle {swizzle}, box at {x}, {y}, row {row}, column {column}");
            }
        }
    }
}

#[test]
fn tensor_copies_need_their_bytes_and_their_wait() {
    let run = |body: &str| {
        let mut mem = Memory::new();
        let (_, m) = map(&mut mem, 128, [64, 8]);
        let out = mem.alloc(1024);
        launch(&mapped(body), &mut mem, &[Param::TensorMap(m), Param::Ptr(out)], 64, Mode::Late).unwrap_err()
    };
    // More bytes are announced than come: nobody ever goes on.
    assert!(matches!(run(&load(0, 0, 1040)), SimError::Deadlock { report, .. } if report.contains("16 bytes open")));
    let e = run(&load(0, 0, 1024).replace("@!%p3 bra W;", ""));
    assert!(matches!(e.fault(), Some(Fault::Race { .. } | Fault::Uninitialised { .. })), "{e}");
    // The box does not start at a multiple of 128 bytes.
    let e = run(&load(0, 0, 1024).replace("add.s64 %d5, %d7, 1024;", "add.s64 %d5, %d7, 1040;"));
    assert!(matches!(e.fault(), Some(Fault::Misaligned { .. })), "{e}");
    let e = run(&load(0, 0, 1024).replace("mbarrier.init.shared.b64 [%d7], 1;", ""));
    assert!(matches!(e.fault(), Some(Fault::Misuse(_))), "{e}");
    // The copy need not see that its mbarrier was initialised; the other proxy fence does as well.
    let e = run(&load(0, 0, 1024).replace("fence.mbarrier_init.release.cluster;", ""));
    assert!(matches!(e.fault(), Some(Fault::Barrier { who, by: 0, .. }) if who.contains("copy")), "{e}");
    let other = load(0, 0, 1040).replace("fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;");
    assert!(matches!(run(&other), SimError::Deadlock { .. }));
    // Nor does another thread without a barrier of the block.
    let e = run(&load(0, 0, 1024).replace("READY: bar.sync 0;", "READY:"));
    assert!(matches!(e.fault(), Some(Fault::Barrier { .. } | Fault::Misuse(_))), "{e}");
}

/// Every thread writes 16 bytes of a box to shared memory; one thread sends the box away.
pub(super) const STORE: &str = "mul.wide.u32 %d3, %r1, 16; add.s64 %d4, %d7, %d3; add.s32 %r2, %r1, 1000;\n\
    st.shared.v4.b32 [%d4], {%r2, %r2, %r2, %r2}; fence.proxy.async.shared::cta; bar.sync 0;\n\
    setp.ne.u32 %p1, %r1, 0; @%p1 bra OUT; mov.b32 %r5, 48; mov.b32 %r6, 5;\n\
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {%r5, %r6}], [%d7]; cp.async.bulk.commit_group;\n\
    cp.async.bulk.wait_group.read 0; OUT:";

#[test]
fn boxes_are_stored_within_the_tensor_only() {
    let run = |body: &str, mode| {
        let mut mem = Memory::new();
        let (base, m) = map(&mut mem, 0, [32, 8]);
        let out = mem.alloc(4);
        launch(&mapped(body), &mut mem, &[Param::TensorMap(m), Param::Ptr(out)], 32, mode)?;
        Ok::<_, SimError>(mem.read(base, 2 * 72 * SIZE[1])?.to_vec())
    };
    for mode in [Mode::Late, Mode::AtOnce] {
        let bytes = run(STORE, mode).unwrap();
        let got: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
        for (r, c) in (0..SIZE[1]).flat_map(|r| (0..72).map(move |c| (r, c))) {
            let old = matrix()[r * 72 + c];
            let inside = r >= 5 && (48..SIZE[0]).contains(&c);
            // Thread t has row t / 4, elements 8 (t % 4) on.
            let new = || {
                let word = 1000 + (4 * (r - 5) + (c - 48) / 8) as u32;
                if c.is_multiple_of(2) { word as u16 } else { (word >> 16) as u16 }
            };
            assert_eq!(got[r * 72 + c], if inside { new() } else { old }, "row {r}, column {c}");
        }
    }
    let e = run(&STORE.replace("fence.proxy.async.shared::cta;", ""), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Proxy { .. })), "{e}");
    let e = run(&STORE.replace("bar.sync 0;", ""), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Race { .. })), "{e}");
    let e = run(&STORE.replace("cp.async.bulk.wait_group.read 0;", ""), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Misuse(_))), "{e}");
    let early =
        STORE.replace("cp.async.bulk.wait_group.read 0;", "st.shared.b32 [%d7], %r1; cp.async.bulk.wait_group.read 0;");
    assert!(matches!(run(&early, Mode::Late).unwrap_err().fault(), Some(Fault::Race { .. })));
}

/// Warp 0 brings six pieces of 128 words through a ring of two stages; warps 1 to 4 add a word each to their sums.
fn ring() -> String {
    let (full, empty) = (wait(0, "FULL"), wait(16, "EMPTY"));
    format!(
        "setp.ne.u32 %p1, %r1, 0; @%p1 bra INIT; mbarrier.init.shared.b64 [%d7], 1; mbarrier.init.shared.b64 [%d7+8], 1;\n\
         mbarrier.init.shared.b64 [%d7+16], 4; mbarrier.init.shared.b64 [%d7+24], 4; fence.mbarrier_init.release.cluster; INIT: bar.sync 0;\n\
         mov.b64 %d10, %d7; mov.b32 %r3, 0; mov.b32 %r9, 0; setp.ge.u32 %p2, %r1, 32; @%p2 bra CONSUME; @%p1 bra END;\n\
         PRODUCE: and.b32 %r4, %r3, 1; mul.wide.u32 %d3, %r4, 8; add.s64 %d7, %d10, %d3; shr.u32 %r8, %r3, 1;\n\
         and.b32 %r8, %r8, 1; xor.b32 %r8, %r8, 1;\n{empty}\
         mbarrier.arrive.expect_tx.shared.b64 _, [%d7], 512; mul.wide.u32 %d4, %r4, 512; add.s64 %d5, %d10, %d4;\n\
         mul.wide.u32 %d6, %r3, 512; add.s64 %d6, %d1, %d6; add.s64 %d5, %d5, 1024;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%d5], [%d6], 512, [%d7];\n\
         add.s32 %r3, %r3, 1; setp.lt.u32 %p4, %r3, 6; @%p4 bra PRODUCE; bra END;\n\
         CONSUME: and.b32 %r4, %r3, 1; mul.wide.u32 %d3, %r4, 8; add.s64 %d7, %d10, %d3; shr.u32 %r8, %r3, 1;\n\
         and.b32 %r8, %r8, 1;\n{full}\
         mul.wide.u32 %d4, %r4, 512; add.s64 %d5, %d10, %d4; sub.s32 %r5, %r1, 32; mul.wide.u32 %d6, %r5, 4;\n\
         add.s64 %d5, %d5, %d6; ld.shared.b32 %r6, [%d5+1024]; add.s32 %r9, %r9, %r6; bar.warp.sync -1;\n\
         elect.sync %r7|%p5, -1; @%p5 mbarrier.arrive.shared.b64 %d8, [%d7+16];\n\
         add.s32 %r3, %r3, 1; setp.lt.u32 %p4, %r3, 6; @%p4 bra CONSUME;\n\
         add.s64 %d6, %d2, %d6; st.global.b32 [%d6], %r9; END:"
    )
}

#[test]
fn a_ring_of_stages_keeps_its_phases() {
    let input: Vec<i32> = (0..6 * 128).map(|i| i * 37 % 101).collect();
    let run = |body: &str, mode| {
        let mut mem = Memory::new();
        let (a, b) = (mem.alloc_i32(&input), mem.alloc(512));
        let with = text(body).replace("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x; mov.b64 %d7, smem;");
        launch(&with, &mut mem, &[Param::Ptr(a), Param::Ptr(b)], 160, mode)?;
        mem.read_i32(b)
    };
    let want: Vec<i32> = (0..128).map(|i| (0..6).map(|p| input[128 * p + i]).sum()).collect();
    for mode in [Mode::Late, Mode::AtOnce] {
        assert_eq!(run(&ring(), mode).unwrap(), want);
    }
    // Consumers that say nothing: the producer waits for ever.
    let silent = ring().replace("@%p5 mbarrier.arrive.shared.b64 %d8, [%d7+16];", "");
    assert!(matches!(run(&silent, Mode::Late).unwrap_err(), SimError::Deadlock { .. }));
    // A producer that does not wait: stages are overwritten while they are read.
    let hasty = ring().replace("@!%p3 bra EMPTY;", "");
    assert_ne!(hasty, ring());
    let bad = |r: Result<Vec<i32>, SimError>| match r {
        Err(e) => matches!(e.fault(), Some(Fault::Race { .. } | Fault::Misuse(_) | Fault::Uninitialised { .. })),
        Ok(v) => v != want,
    };
    assert!(bad(run(&hasty, Mode::Late)));
    // A consumer with the wrong parity reads the stage before it is filled.
    let early = ring().replacen("and.b32 %r8, %r8, 1;\nFULL:", "and.b32 %r8, %r8, 1; xor.b32 %r8, %r8, 1;\nFULL:", 1);
    assert_ne!(early, ring());
    assert!(bad(run(&early, Mode::Late)));
    // Arrivals of all lanes end phases too early, until nobody can go on or an access is not ordered.
    let loud = ring().replace("@%p5 mbarrier.arrive", "mbarrier.arrive");
    assert_ne!(loud, ring());
    assert!(run(&loud, Mode::Late).is_err());
}

#[test]
fn bulk_stores_take_whole_pieces() {
    let body = "mov.b64 %d7, smem; mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d7, %d3; st.shared.b32 [%d4], %r1;\n\
        fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 %p1, %r1, 0; @%p1 bra OUT;\n\
        cp.async.bulk.global.shared::cta.bulk_group [%d2], [%d7], 256; cp.async.bulk.commit_group;\n\
        cp.async.bulk.wait_group 0; OUT:";
    assert_eq!(words(body, &[0], 64, 64).unwrap(), (0..64).collect::<Vec<u32>>());
    assert!(matches!(fault(&body.replace("256;", "264;")), Fault::Misuse(_)));
}

/// Warps 0 to 3 give registers back, warps 4 to 11 take them: a pool of 168 for each of 384 threads.
const REGISTERS: &str = "setp.ge.u32 %p1, %r1, 128; @%p1 bra MORE; setmaxnreg.dec.sync.aligned.u32 40; bra DONE;\n\
    MORE: setmaxnreg.inc.sync.aligned.u32 232; DONE: mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d2, %d3;\n\
    st.global.b32 [%d4], %r1;";

#[test]
fn registers_of_a_block_are_one_pool() {
    let run = |body: &str, directive: &str| {
        let text = text(body).replace(".maxntid 1024, 1, 1", directive);
        assert!(text.contains(directive));
        let mut mem = Memory::new();
        let (a, b) = (mem.alloc(4), mem.alloc(4 * 384));
        launch(&text, &mut mem, &[Param::Ptr(a), Param::Ptr(b)], 384, Mode::Late)?;
        mem.read_i32(b)
    };
    let most = ".maxntid 384, 1, 1";
    assert_eq!(run(REGISTERS, most).unwrap(), (0..384).collect::<Vec<i32>>());
    assert!(run(REGISTERS, ".maxnreg 168").is_ok());
    let waits = |r: Result<Vec<i32>, SimError>| matches!(r, Err(SimError::Deadlock { report, .. }) if report.contains("setmaxnreg.inc"));
    assert!(waits(run(&REGISTERS.replace("u32 232", "u32 240"), most)), "more than there are");
    assert!(waits(run(&REGISTERS.replace("setmaxnreg.dec.sync.aligned.u32 40;", ""), most)), "nobody gives any back");
    assert!(waits(run(REGISTERS, ".maxnreg 160")), "a smaller pool");
    assert!(waits(run(REGISTERS, ".maxntid 384, 1, 1\n.minnctapersm 2")), "two blocks share the file");
    let misuse =
        |body: &str, directive: &str| run(body, directive).is_err_and(|e| matches!(e.fault(), Some(Fault::Misuse(_))));
    assert!(misuse(REGISTERS, ""), "no bound");
    assert!(misuse(&REGISTERS.replace("u32 232", "u32 236"), most), "no multiple of 8");
    assert!(misuse(&REGISTERS.replace("u32 40", "u32 176"), most), "more by way of less");
    // One warp of a warpgroup alone.
    let e = run(&REGISTERS.replace("%r1, 128; @%p1 bra MORE", "%r1, 96; @%p1 bra DONE"), most).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Divergence(_))), "{e}");
}
