//! Elections, reductions, matches and atomics; named barriers; register hints.

use super::*;

fn count(n: u32) -> Vec<u32> {
    (0..n).collect()
}

#[test]
fn one_lane_is_elected() {
    let body = format!("{HEAD} elect.sync %r3|%p1, -1; selp.b32 %r4, 1, 0, %p1; st.global.b32 [%d4], %r4;");
    let got = words(&body, &count(64), 64, 64).unwrap();
    assert_eq!((got[..32].iter().sum::<u32>(), got[32..].iter().sum::<u32>()), (1, 1));
    // A mask that names lanes which are elsewhere.
    let body = format!(
        "{HEAD} setp.lt.u32 %p2, %r1, 8; @%p2 bra OUT; elect.sync %r3|%p1, 0xff; OUT: st.global.b32 [%d4], %r2;"
    );
    assert!(matches!(fault(&body), Fault::Divergence(_)));
}

#[test]
fn warps_reduce_integers() {
    type Fold = fn(u32, u32) -> u32;
    let cases: [(&str, Fold); 7] = [
        ("add.s32", |a, b| a.wrapping_add(b)),
        ("min.s32", |a, b| (a as i32).min(b as i32) as u32),
        ("max.s32", |a, b| (a as i32).max(b as i32) as u32),
        ("max.u32", |a, b| a.max(b)),
        ("and.b32", |a, b| a & b),
        ("or.b32", |a, b| a | b),
        ("xor.b32", |a, b| a ^ b),
    ];
    let input: Vec<u32> = (0..64u32).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 0x8000_0000).collect();
    for (op, f) in cases {
        let body = format!("{HEAD} redux.sync.{op} %r4, %r2, -1; st.global.b32 [%d4], %r4;");
        let got = words(&body, &input, 64, 64).unwrap();
        for (warp, part) in input.chunks(32).enumerate() {
            let want = part[1..].iter().fold(part[0], |a, b| f(a, *b));
            assert!(got[32 * warp..][..32].iter().all(|x| *x == want), "{op}");
        }
    }
}

#[test]
fn lanes_vote_and_match() {
    let input: Vec<u32> = (0..64).map(|i| i % 5).collect();
    let body = format!("{HEAD} match.any.sync.b32 %r4, %r2, -1; st.global.b32 [%d4], %r4;");
    let got = words(&body, &input, 64, 64).unwrap();
    let same = |warp: usize, x: u32| (0..32).filter(|l| input[32 * warp + l] == x).fold(0u32, |m, l| m | 1 << l);
    assert_eq!(got, (0..64).map(|i| same(i / 32, input[i])).collect::<Vec<u32>>());
    let body = format!("{HEAD} setp.eq.b32 %p1, %r2, 3; vote.sync.ballot.b32 %r4, %p1, -1; st.global.b32 [%d4], %r4;");
    let got = words(&body, &input, 64, 64).unwrap();
    assert_eq!(got, (0..64).map(|i| same(i / 32, 3)).collect::<Vec<u32>>());
    let body = format!("{HEAD} setp.lt.u32 %p1, %r2, 9; bar.red.popc.u32 %r4, 0, %p1; st.global.b32 [%d4], %r4;");
    assert_eq!(words(&body, &count(64), 64, 64).unwrap(), [9; 64]);
}

#[test]
fn atomics_of_blocks_add_up() {
    // Four blocks of 64 threads; words of the result: a sum in f32, an exclusive count, a maximum, an exchange by
    // comparison, and pairs of bf16.
    let body = "cvt.rn.f32.u32 %r3, %r1; red.global.add.f32 [%d2], %r3; atom.global.add.u32 %r4, [%d2+4], 1;\n\
        red.global.max.s32 [%d2+8], %r1; atom.global.cas.b32 %r5, [%d2+12], 7, 9;\n\
        mov.b32 %r6, 0x3f803f80; red.global.add.noftz.bf16x2 [%d2+16], %r6; mov.u32 %r7, %ctaid.x;\n\
        mad.lo.u32 %r8, %r7, 64, %r1; mul.wide.u32 %d3, %r4, 4; add.s64 %d4, %d1, %d3; st.global.b32 [%d4], %r8;";
    let m = Module::parse(&text(body)).unwrap();
    let mut mem = Memory::new();
    let (a, b) = (mem.alloc(4 * 256), mem.alloc_i32(&[0, 0, -5, 7, 0]));
    let params = [Param::Ptr(a), Param::Ptr(b)];
    let l = Launch { grid: [4, 1, 1], block: [64, 1, 1], params: &params, ..Launch::default() };
    m.kernel("k").unwrap().launch(&mut mem, l).unwrap();
    let got = mem.read_i32(b).unwrap();
    assert_eq!(f32::from_bits(got[0] as u32), 4.0 * (63 * 64 / 2) as f32);
    // 256 ones in bf16.
    assert_eq!(got[1..], [256, 63, 9, 0x4380_4380]);
    let mut tickets = mem.read_i32(a).unwrap();
    tickets.sort_unstable();
    assert_eq!(tickets, (0..256).collect::<Vec<i32>>(), "every thread drew a number of its own");
}

#[test]
fn vectors_are_added_by_one_instruction() {
    let body = "mul.wide.u32 %d3, %r1, 16; add.s64 %d4, %d2, %d3; mov.b32 %r3, 0f3F800000;\n\
        red.global.add.v4.f32 [%d4], {%r3, %r3, %r3, %r3};\n\
        mov.b64 %d7, smem; setp.eq.u32 %p1, %r1, 0; mov.b32 %r4, 0; @%p1 st.shared.b32 [%d7], %r4; bar.sync 0;\n\
        atom.shared.add.u32 %r5, [%d7], %r1; bar.sync 0; ld.shared.b32 %r6, [%d7]; mul.wide.u32 %d5, %r1, 4;\n\
        add.s64 %d6, %d1, %d5; st.global.b32 [%d6], %r6;";
    let mut mem = Memory::new();
    let (a, b) = (mem.alloc(4 * 64), mem.alloc_f32(&[0.5; 256]));
    run(body, &mut mem, a, b, 64, Mode::Late).unwrap();
    assert_eq!(mem.read_f32(b).unwrap(), [1.5; 256]);
    assert_eq!(mem.read_i32(a).unwrap(), [63 * 64 / 2; 64]);
}

#[test]
fn named_barriers_join_some_warps() {
    // Warps 0 and 1 hand words over through barrier 3; warp 0 does not wait. Warps 2 and 3 use barrier 4.
    let body = format!(
        "{HEAD} setp.ge.u32 %p1, %r1, 64; @%p1 bra OTHERS; setp.ge.u32 %p2, %r1, 32; @%p2 bra TAKE;\n\
         st.shared.b32 [%d5], %r2; bar.arrive 3, 64; bra OUT; TAKE: bar.sync 3, 64; ld.shared.b32 %r2, [%d5+-128];\n\
         bra OUT; OTHERS: st.shared.b32 [%d5], %r2; bar.sync 4, 64; xor.b32 %r3, %r1, 32; mul.wide.u32 %d8, %r3, 4;\n\
         add.s64 %d8, %d7, %d8; ld.shared.b32 %r2, [%d8]; OUT: st.global.b32 [%d4], %r2;"
    );
    let got = words(&body, &count(128), 128, 128).unwrap();
    let want = |i: u32| {
        if i < 32 {
            i
        } else if i < 64 {
            i - 32
        } else {
            i ^ 32
        }
    };
    assert_eq!(got, (0..128).map(want).collect::<Vec<u32>>());
    let e = words(&body.replace("bar.arrive 3, 64;", ""), &count(128), 128, 128).unwrap_err();
    assert!(matches!(&e, SimError::Deadlock { report, .. } if report.contains("barrier 3: 32 of 64")), "{e}");
    let e = words(&body.replace("bar.sync 4, 64;", "bar.sync 4, 32;"), &count(128), 128, 128).unwrap_err();
    assert!(e.fault().is_some(), "{e}");
}

#[test]
fn registers_are_asked_for_in_steps_of_eight() {
    let body = format!(
        "{HEAD} setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.inc.sync.aligned.u32 56; st.global.b32 [%d4], %r2;"
    );
    assert_eq!(words(&body, &count(128), 128, 128).unwrap(), count(128));
    // Half a warpgroup has none to change.
    assert!(matches!(fault(&body), Fault::Divergence(_)));
    assert!(matches!(fault(&body.replace("40;", "44;")), Fault::Misuse(_)));
    assert!(matches!(fault(&body.replace("56;", "264;")), Fault::Misuse(_)));
}
