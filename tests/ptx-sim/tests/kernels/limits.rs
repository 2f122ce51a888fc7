//! What a chip would do otherwise, or refuse: sizes of launches, memory read as constant, accesses of two proxies that no fence orders,
//! warps of a warpgroup that do not agree.

use super::copies::{STORE, load, map, mapped};
use super::*;

/// A launch of a kernel whose text is changed, over 16 words.
fn launched(change: fn(String) -> String, l: Launch<'_>) -> Result<Counts, SimError> {
    let mut mem = Memory::new();
    let (a, b) = (mem.alloc_i32(&[0; 16]), mem.alloc(64));
    let params = [Param::Ptr(a), Param::Ptr(b)];
    Module::parse(&change(text(""))).unwrap().kernel("k")?.launch(&mut mem, Launch { params: &params, ..l })
}

#[test]
fn launches_have_limits() {
    let refuses = |change: fn(String) -> String, l: Launch<'_>, part: &str| match launched(change, l) {
        Err(SimError::Launch { what, .. }) => assert!(what.contains(part), "{what}"),
        other => panic!("{other:?}"),
    };
    let same = |t: String| t;
    let grid = |grid| Launch { grid, sample: Some(1), ..Launch::default() };
    launched(same, grid([1, 65_535, 1])).unwrap();
    refuses(same, grid([1, 65_536, 1]), "a grid of 1 by 65536 by 1");
    refuses(same, grid([1, 1, 65_536]), "a grid");
    launched(same, grid([i32::MAX as u32, 1, 1])).unwrap();
    refuses(same, grid([1 << 31, 1, 1]), "a grid");
    // 48 KiB are there for static and dynamic memory together; more dynamic memory is asked for.
    let of = |dynamic_shared| Launch { dynamic_shared, ..Launch::default() };
    let fixed = |t: String| t.replace(".visible", ".shared .align 16 .b8 own[1024];\n.visible");
    launched(fixed, of(47 << 10)).unwrap();
    refuses(fixed, of(48 << 10), "50176 bytes of shared memory");
    launched(fixed, of(49 << 10)).unwrap();
    refuses(|t| t.replace(".visible", ".shared .align 16 .b8 own[49168];\n.visible"), of(0), "50176 bytes");
    // Parameters of either chip: 4096 and 32764 bytes.
    let wide = |t: String| t.replace("b)", "b, .param .align 8 .b8 c[4096])");
    refuses(|t| t.replace("sm_90a", "sm_80").replace("b)", "b, .param .align 8 .b8 c[4096])"), of(0), "4112 bytes");
    refuses(wide, of(0), "3 parameters, 2 arguments");
}

#[test]
fn maps_have_limits() {
    let run = |change: fn(&mut TensorMap)| {
        let mut mem = Memory::new();
        let (_, mut m) = map(&mut mem, 128, [64, 8]);
        change(&mut m);
        let out = mem.alloc(1024);
        let params = [Param::TensorMap(m), Param::Ptr(out)];
        let l = Launch { block: [64, 1, 1], dynamic_shared: 16384, params: &params, ..Launch::default() };
        Module::parse(&mapped(&load(0, 0, 1024))).unwrap().kernel("k")?.launch(&mut mem, l)
    };
    run(|_| {}).unwrap();
    let changes: [fn(&mut TensorMap); 6] = [
        |m| m.sizes[1] = 0,
        |m| m.sizes[0] = (1 << 32) + 1,
        |m| m.strides[0] = 0,
        |m| m.strides[0] = 1 << 40,
        |m| m.strides[0] = 1,
        |m| m.boxes[1] = 257,
    ];
    for change in changes {
        assert!(matches!(run(change), Err(SimError::Launch { .. })));
    }
}

#[test]
fn constant_memory_is_not_written() {
    let same = |body: &str| {
        let mut mem = Memory::new();
        let a = mem.alloc_i32(&(0..64).collect::<Vec<i32>>());
        run(&format!("{HEAD} {body}"), &mut mem, a, a, 64, Mode::Late)
    };
    // In place: an ordinary read does, one as constant does not, whichever comes first.
    same("add.s32 %r2, %r2, 1; st.global.b32 [%d4], %r2;").unwrap();
    for body in [
        "ld.global.nc.b32 %r3, [%d6]; st.global.b32 [%d4], %r3;",
        "st.global.b32 [%d4], %r2; ld.global.nc.b32 %r3, [%d6];",
    ] {
        let e = same(body).unwrap_err();
        assert!(matches!(e.fault(), Some(Fault::Constant { .. })), "{e}");
    }
    let apart = format!("{HEAD} ld.global.nc.b32 %r3, [%d6]; st.global.b32 [%d4], %r3;");
    assert_eq!(words(&apart, &[7; 64], 64, 64).unwrap(), [7; 64]);
    // Of global memory alone.
    assert!(Module::parse(&text("ld.nc.b32 %r3, [%d1];")).is_err());
}

#[test]
fn threads_of_a_block_meet_between_a_read_and_a_write_of_global_memory() {
    // Every thread adds the word of the one 32 further on to its own, in place; of the next one in its warp.
    let shared = |apart: u32, meet: &str| {
        let mut mem = Memory::new();
        let a = mem.alloc_i32(&(0..64).collect::<Vec<i32>>());
        let body = format!(
            "{HEAD} xor.b32 %r3, %r1, {apart}; mul.wide.u32 %d8, %r3, 4; add.s64 %d8, %d1, %d8; ld.global.b32 %r4, [%d8];\n\
             {meet} add.s32 %r4, %r4, %r2; st.global.b32 [%d4], %r4;"
        );
        run(&body, &mut mem, a, a, 64, Mode::Late)?;
        mem.read_i32(a)
    };
    let want = |apart: i32| (0..64).map(|i| i + (i ^ apart)).collect::<Vec<i32>>();
    assert_eq!(shared(32, "bar.sync 0;").unwrap(), want(32));
    assert_eq!(shared(1, "bar.warp.sync -1;").unwrap(), want(1));
    assert_eq!(shared(1, "shfl.sync.bfly.b32 %r9, %r4, 1, 31, -1;").unwrap(), want(1));
    for (apart, meet) in [(32, ""), (32, "bar.warp.sync -1;"), (1, "")] {
        let e = shared(apart, meet).unwrap_err();
        assert!(matches!(e.fault(), Some(Fault::ThreadRace { .. })), "{e}");
    }
    // What one thread has written another one reads.
    let e = shared(
        0,
        "st.global.b32 [%d4], %r4; xor.b32 %r3, %r1, 32; mul.wide.u32 %d8, %r3, 4; add.s64 %d8, %d1, %d8; ld.global.b32 %r4, [%d8];",
    );
    assert!(matches!(e.unwrap_err().fault(), Some(Fault::ThreadRace { .. })));
}

fn box_of(body: &str, swizzle: u32, threads: u32) -> Result<Vec<u8>, SimError> {
    let mut mem = Memory::new();
    let (base, m) = map(&mut mem, swizzle, [if swizzle == 0 { 32 } else { 64 }, 8]);
    let out = mem.alloc(1024);
    let params = [Param::TensorMap(m), Param::Ptr(out)];
    let l = Launch { block: [threads, 1, 1], dynamic_shared: 16384, params: &params, ..Launch::default() };
    Module::parse(&mapped(body)).unwrap().kernel("k")?.launch(&mut mem, l)?;
    Ok(mem.read(base, 1440)?.to_vec())
}

#[test]
fn proxies_are_fenced_by_who_stores_or_who_sends() {
    let fence = "fence.proxy.async.shared::cta;";
    let stored = |body: &str| box_of(body, 0, 32);
    let want = stored(STORE).unwrap();
    let missing = |body: String| {
        assert_ne!(body, STORE);
        let e = stored(&body).unwrap_err();
        matches!(e.fault(), Some(Fault::Proxy { what: "read", .. })) || panic!("{e}")
    };
    // One thread's fence before the two meet is one thread's.
    let alone = STORE.replace(fence, &format!("setp.eq.u32 %p2, %r1, 0; @%p2 {fence}"));
    assert!(missing(alone));
    assert!(missing(STORE.replace(fence, "fence.proxy.async.global;")), "another memory");
    // After they have met it is for all, if it is the sender's, and before it sends.
    let after = |who: &str| STORE.replace(fence, "").replace("@%p1 bra OUT;", &format!("{who}{fence} @%p1 bra OUT;"));
    assert_eq!(stored(&after("")).unwrap(), want);
    assert_eq!(stored(&after("@!%p1 ")).unwrap(), want);
    assert!(missing(after("@%p1 ")), "of those that do not send");
    // A store behind the fence.
    assert!(missing(STORE.replace(fence, &format!("{fence} st.shared.v4.b32 [%d4], {{%r2, %r2, %r2, %r2}};"))));
    assert_eq!(stored(&STORE.replace(fence, "fence.proxy.async;")).unwrap(), want, "of all memory");
}

#[test]
fn copies_write_over_what_was_fenced() {
    let first = "st.shared.b32 [%d7+1024], %r1; FENCE mbarrier.arrive.expect_tx";
    let with = |fence: &str| load(0, 0, 1024).replacen("mbarrier.arrive.expect_tx", &first.replace("FENCE", fence), 1);
    box_of(&with("fence.proxy.async.shared::cta;"), 128, 64).unwrap();
    let e = box_of(&with(""), 128, 64).unwrap_err();
    // The fence for mbarriers is before the address is known: it orders no stores.
    assert!(matches!(e.fault(), Some(Fault::Proxy { what: "write", writer: 0, .. })), "{e}");
}

#[test]
fn blocks_do_not_end_before_their_copies() {
    let whole = load(0, 0, 1024);
    let start = whole.find("READY:").unwrap();
    let e = box_of(&format!("{}READY: bar.sync 0;", &whole[..start]), 128, 64).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Misuse(what)) if what.contains("the block ends")), "{e}");
}

#[test]
fn mbarriers_have_limits() {
    let of = |from: &str, to: &str| {
        let body = load(0, 0, 1024);
        assert!(body.contains(from));
        box_of(&body.replace(from, to), 128, 64).unwrap_err()
    };
    for (from, to) in
        [("[%d7], 1;", "[%d7], 0;"), ("[%d7], 1;", "[%d7], 1048576;"), ("_, [%d7], 1024", "_, [%d7], 1048576")]
    {
        let e = of(from, to);
        assert!(matches!(e.fault(), Some(Fault::Misuse(what)) if what.contains("1048575")), "{e}");
    }
}
