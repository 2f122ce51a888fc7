//! What accesses of memory cost beyond the bytes they move.

use super::*;
use pleach_ptx_sim::Unit;

/// Wavefronts, and the fewest, of loads or stores of shared memory by 32 threads: byte offset of a thread's word is `shift` and `mask`ed.
fn wavefronts(access: &str, offset: &str) -> (u64, u64) {
    let body = format!("mov.u32 %r9, 0;\nmov.u32 %r2, own;\n{offset}\nadd.u32 %r2, %r2, %r3;\n{access}");
    let t = text(&body).replace(".visible", ".shared .align 128 .b8 own[8192];\n.visible");
    let mut mem = Memory::new();
    let (a, b) = (mem.alloc_i32(&[0; 64]), mem.alloc(4096));
    let checks = Checks { uninitialised: false, races: false };
    let l = Launch { params: &[Param::Ptr(a), Param::Ptr(b)], checks, ..Launch::default() };
    let c = Module::parse(&t).unwrap().kernel("k").unwrap().launch(&mut mem, l).unwrap();
    let t = c.traffic();
    assert_eq!(c.cycles(Unit::Shared), t.wavefronts as f64);
    (t.wavefronts, t.least_wavefronts)
}

#[test]
fn banks_serve_one_word_at_a_time() {
    let word = "st.shared.u32 [%r2], %r9;";
    let by = |n: u32| format!("mul.lo.u32 %r3, %r1, {n};");
    assert_eq!(wavefronts(word, &by(4)), (1, 1));
    assert_eq!(wavefronts(word, &by(8)), (2, 1));
    assert_eq!(wavefronts(word, &by(128)), (32, 1));
    assert_eq!(wavefronts(word, &by(132)), (1, 1));
    // Equal words are one.
    assert_eq!(wavefronts("ld.shared.u32 %r4, [%r2];", &by(0)), (1, 1));
    assert_eq!(wavefronts("ld.shared.u16 %h1, [%r2];", &by(2)), (1, 1));
    // Half and quarter warps.
    let (two, four) = ("st.shared.v2.u32 [%r2], {%r9, %r9};", "st.shared.v4.u32 [%r2], {%r9, %r9, %r9, %r9};");
    assert_eq!(wavefronts(two, &by(8)), (2, 2));
    assert_eq!(wavefronts(two, &by(16)), (4, 2));
    assert_eq!(wavefronts(four, &by(16)), (4, 4));
    assert_eq!(wavefronts(four, &by(64)), (16, 4));
    assert_eq!(wavefronts(four, &by(128)), (32, 4));
    assert_eq!(wavefronts(four, &by(144)), (4, 4));
    // Rows of matrices: 64 bytes apart every other one meets the banks of another, 80 bytes apart none.
    let matrices = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];";
    assert_eq!(wavefronts(matrices, &by(64)), (16, 4));
    assert_eq!(wavefronts(matrices, &by(80)), (4, 4));
    // Updates of one word follow each other.
    assert_eq!(wavefronts("red.shared.add.u32 [%r2], %r9;", &by(4)), (1, 1));
    assert_eq!(wavefronts("red.shared.add.u32 [%r2], %r9;", &by(0)), (32, 1));
}

#[test]
fn memory_moves_whole_sectors() {
    let sectors = |stride: u32, access: &str| {
        let body = format!(
            "mul.wide.u32 %d3, %r1, {stride};\nld.param.u64 %d4, [b];\nadd.u64 %d4, %d4, %d3;\n\
             mov.u32 %r9, 0;\n{access}"
        );
        let mut mem = Memory::new();
        let (a, b) = (mem.alloc_i32(&[0; 64]), mem.alloc(8192));
        let checks = Checks { uninitialised: false, races: false };
        let l = Launch { params: &[Param::Ptr(a), Param::Ptr(b)], checks, ..Launch::default() };
        let c = Module::parse(&text(&body)).unwrap().kernel("k").unwrap().launch(&mut mem, l).unwrap();
        let (_, site) = c.sites.iter().next().unwrap();
        (site.traffic.sectors, site.traffic.least_sectors)
    };
    let word = "st.global.u32 [%d4], %r9;";
    assert_eq!(sectors(4, word), (4, 4));
    assert_eq!(sectors(0, word), (1, 1));
    assert_eq!(sectors(32, word), (32, 4));
    assert_eq!(sectors(16, "st.global.v4.u32 [%d4], {%r9, %r9, %r9, %r9};"), (16, 16));
    assert_eq!(sectors(4, &word.replace("[%d4]", "[%d4+4]")), (5, 4));
}

#[test]
fn units_take_their_rates() {
    let cycles = |line: &str, chip: &str, unit| {
        let mut mem = Memory::new();
        let (a, b) = (mem.alloc_i32(&[0; 64]), mem.alloc(64));
        let l = Launch { params: &[Param::Ptr(a), Param::Ptr(b)], ..Launch::default() };
        let k = Module::parse(
            &text(&format!("mov.b32 %r11, 0f3F800000;\nmov.u32 %r1, 1;\n{line}")).replace("sm_90a", chip),
        );
        k.unwrap().kernel("k").unwrap().launch(&mut mem, l).unwrap().cycles(unit)
    };
    let (old, new) = ("sm_80", "sm_90a");
    assert_eq!(cycles("fma.rn.f32 %r12, %r11, %r11, %r11;", old, Unit::Float), 0.5);
    assert_eq!(cycles("fma.rn.f32 %r12, %r11, %r11, %r11;", new, Unit::Float), 0.25);
    assert_eq!(cycles("ex2.approx.f32 %r12, %r11;", new, Unit::Special), 2.0);
    assert_eq!(cycles("cvt.rn.bf16x2.f32 %r2, %r11, %r11;", new, Unit::Integer), 0.5);
    assert_eq!(cycles("cvt.rn.f32.u32 %r12, %r1;", new, Unit::Special), 2.0);
    assert_eq!(cycles("add.u32 %r2, %r1, %r1;", old, Unit::Integer), 0.5);
    // Two more read the thread's number and end it.
    assert_eq!(cycles("add.u32 %r2, %r1, %r1;\nadd.u32 %r3, %r1, %r1;", old, Unit::Issue), 1.0);
}
