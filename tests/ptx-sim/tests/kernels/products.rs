//! Warpgroup products: every layout of operands in shared memory, the left one in registers, and what is found when a
//! wait, a fence or an address is wrong. Matrices of small integers, so that sums are exact.

use super::*;

/// How an operand lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Lay {
    /// Along the rows or columns of the result, not along the sum.
    across: bool,
    /// Bytes of the swizzle: 0, 32, 64, 128.
    swizzle: u64,
}

impl Lay {
    /// The descriptor's lead and stride for a tile of `rows` by 16, as this test lays it out.
    fn steps(self, rows: u64) -> (u64, u64) {
        match (self.across, self.swizzle) {
            // Core matrices of 8 rows by 16 bytes: the two along the sum lie side by side, groups of 8 rows after them.
            (false, 0) => (128, 256),
            (false, s) => (16, 8 * s),
            // Core matrices of 8 steps of the sum by 16 bytes: those of one group of 8 steps, then the next group.
            (true, 0) => (16 * rows, 128),
            // Blocks as wide as the swizzle with 16 steps of the sum each.
            (true, s) => (16 * s, 8 * s),
        }
    }

    /// Byte of element `(row, k)`.
    fn byte(self, row: u64, k: u64, rows: u64) -> u64 {
        let (lead, stride) = self.steps(rows);
        let plain = match (self.across, self.swizzle) {
            (false, 0) => row / 8 * stride + k / 8 * lead + row % 8 * 16 + k % 8 * 2,
            (false, s) => row * s + 2 * k,
            (true, 0) => row / 8 * stride + k / 8 * lead + k % 8 * 16 + row % 8 * 2,
            (true, s) => {
                let wide = s / 2;
                row / wide * lead + k * s + row % wide * 2
            }
        };
        let turn = if self.swizzle > 0 { (plain >> 7) & (self.swizzle / 16 - 1) } else { 0 };
        plain ^ (turn << 4)
    }

    /// Bytes of a tile, the whole of what the descriptor may reach.
    fn bytes(self, rows: u64) -> u64 {
        let last = (0..rows).flat_map(|r| (0..16).map(move |k| self.byte(r, k, rows))).max().unwrap_or(0);
        (last + 2).next_multiple_of(1024)
    }

    fn image(self, m: &[f32], rows: u64) -> Vec<u8> {
        let mut out = vec![0; self.bytes(rows) as usize];
        for (i, x) in m.iter().enumerate() {
            let at = self.byte(i as u64 / 16, i as u64 % 16, rows) as usize;
            out[at..at + 2].copy_from_slice(&pleach_ptx_sim::f32_to_bf16(*x).to_le_bytes());
        }
        out
    }

    /// Without the address, which the kernel adds.
    fn descriptor(self, rows: u64) -> u64 {
        let (lead, stride) = self.steps(rows);
        let mode = match self.swizzle {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0u64,
        };
        lead >> 4 << 16 | stride >> 4 << 32 | mode << 62
    }
}

/// A matrix of small integers.
fn numbers(rows: u64, seed: u64) -> Vec<f32> {
    (0..rows * 16).map(|i| ((i * 7 + seed * 13 + i / 16 * 5) % 9) as f32 - 4.0).collect()
}

/// One product of 64 by `n` by 16, twice on the same accumulators, by one warpgroup.
struct Product {
    n: u64,
    /// `None`: in registers.
    left: Option<Lay>,
    right: Lay,
}

const COPY: &str = "mov.b64 %d7, smem; setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%d7], 1;\n\
    fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%d7], BYTES; add.s64 %d5, %d7, 1024;\n\
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%d5], [%d1], BYTES, [%d7];\n\
    READY: bar.sync 0; mov.b32 %r8, 0; W: mbarrier.try_wait.parity.shared.b64 %p3, [%d7], %r8; @!%p3 bra W;\n";

impl Product {
    fn body(&self) -> String {
        let n = self.n;
        let (a, b) = (self.left.map_or(0, |l| l.bytes(64)), self.right.bytes(n));
        let acc: Vec<String> = (0..n / 2).map(|i| format!("%f{i}")).collect();
        let acc = acc.join(", ");
        let zero: String = (0..n / 2).map(|i| format!("mov.b32 %f{i}, 0f00000000;")).collect();
        let descriptor = |to: &str, at: u64, d: u64| {
            format!(
                "add.s64 {to}, %d7, {at}; shr.u64 {to}, {to}, 4; and.b64 {to}, {to}, 16383; or.b64 {to}, {to}, {d};\n"
            )
        };
        let (turn_a, turn_b) = (u64::from(self.left.is_some_and(|l| l.across)), u64::from(self.right.across));
        let (head, left, tail) = match self.left {
            Some(l) => (descriptor("%d11", 1024, l.descriptor(64)), "%d11".to_string(), format!("{turn_a}, {turn_b}")),
            // Row g = lane / 4, columns 2 (lane % 4) and 8 further on, of the warp's 16 rows: from global memory.
            None => {
                let list = "shr.u32 %r2, %r1, 5; shl.b32 %r2, %r2, 4; and.b32 %r3, %r1, 31; shr.u32 %r4, %r3, 2;\n\
                    add.s32 %r2, %r2, %r4; shl.b32 %r2, %r2, 5; and.b32 %r3, %r3, 3; shl.b32 %r3, %r3, 2;\n\
                    add.s32 %r2, %r2, %r3; cvt.u64.u32 %d3, %r2; add.s64 %d3, %d1, %d3;\n"
                    .to_string();
                let places = [(20, 0), (21, 256), (22, 16), (23, 272)];
                let loads: String =
                    places.iter().map(|(r, at)| format!("ld.global.b32 %r{r}, [%d3+{}];", b + at)).collect();
                (list + &loads, "{%r20, %r21, %r22, %r23}".to_string(), format!("{turn_b}"))
            }
        };
        let mma = |keep: &str| {
            format!(
                "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{acc}}}, {left}, %d12, {keep}, 1, 1, {tail};\n"
            )
        };
        // Row 16 warp + lane / 4 + 8 (q / 2), column 8 j + 2 (lane % 4) + q % 2.
        let mut store = format!(
            "shr.u32 %r2, %r1, 5; shl.b32 %r2, %r2, 4; and.b32 %r3, %r1, 31; shr.u32 %r4, %r3, 2; add.s32 %r2, %r2, %r4;\n\
             mul.lo.u32 %r2, %r2, {}; and.b32 %r3, %r3, 3; shl.b32 %r3, %r3, 3; add.s32 %r2, %r2, %r3;\n\
             cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3;\n",
            4 * n
        );
        for i in 0..n / 2 {
            let at = 32 * (i / 4) + i % 2 * 4 + (i / 2 % 2) * 8 * 4 * n;
            store += &format!("st.global.b32 [%d4+{at}], %f{i};");
        }
        let copy = COPY.replace("BYTES", &(a + b).to_string());
        let first = if self.left.is_some() { a } else { 0 };
        format!(
            ".reg .b32 %f<{}>;\n{zero}{copy}{head}{}setp.eq.u32 %p4, %r8, 1;\nwgmma.fence.sync.aligned;\n{}{}\
             wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n{store}",
            n / 2,
            descriptor("%d12", 1024 + first, self.right.descriptor(n)),
            mma("%p4"),
            mma("1"),
        )
    }

    /// Runs a body, perhaps a changed one.
    fn run(&self, body: &str, mode: Mode) -> Result<Vec<f32>, SimError> {
        let (a, b) = (numbers(64, 1), numbers(self.n, 2));
        let mut image = self.left.map_or(vec![], |l| l.image(&a, 64));
        image.extend(self.right.image(&b, self.n));
        if self.left.is_none() {
            image.extend(a.iter().flat_map(|x| pleach_ptx_sim::f32_to_bf16(*x).to_le_bytes()));
        }
        let mut mem = Memory::new();
        let (input, out) = (mem.alloc_from(&image), mem.alloc(64 * self.n as usize * 4));
        let params = [Param::Ptr(input), Param::Ptr(out)];
        let l = Launch { block: [128, 1, 1], dynamic_shared: 65536, params: &params, mode, ..Launch::default() };
        let c = Module::parse(&text(body)).unwrap().kernel("k")?.launch(&mut mem, l)?;
        assert_eq!(c.mma_flops, 2 * 2 * 64 * 16 * self.n);
        mem.read_f32(out)
    }

    /// Twice the product: the first one starts from nothing, as its scale says, the second one adds.
    fn wanted(&self) -> Vec<f32> {
        let (a, b) = (numbers(64, 1), numbers(self.n, 2));
        let n = self.n as usize;
        let one = |i: usize| (0..16).map(|k| a[i / n * 16 + k] * b[i % n * 16 + k]).sum::<f32>();
        (0..64 * n).map(|i| 2.0 * one(i)).collect()
    }
}

fn lays() -> Vec<Lay> {
    [false, true].into_iter().flat_map(|across| [0, 32, 64, 128].map(|swizzle| Lay { across, swizzle })).collect()
}

#[test]
fn operands_lie_in_every_way() {
    for left in lays() {
        for right in lays() {
            let p = Product { n: 64, left: Some(left), right };
            for mode in [Mode::Late, Mode::AtOnce] {
                assert_eq!(p.run(&p.body(), mode).unwrap(), p.wanted(), "{left:?} {right:?} {mode:?}");
            }
        }
    }
}

#[test]
fn every_width_and_the_left_operand_in_registers() {
    let k_major = Lay { across: false, swizzle: 128 };
    for n in [8, 24, 128, 192, 256] {
        let p = Product { n, left: Some(k_major), right: k_major };
        assert_eq!(p.run(&p.body(), Mode::Late).unwrap(), p.wanted(), "{n} columns");
    }
    for right in lays() {
        let p = Product { n: 64, left: None, right };
        for mode in [Mode::Late, Mode::AtOnce] {
            assert_eq!(p.run(&p.body(), mode).unwrap(), p.wanted(), "{right:?} {mode:?}");
        }
    }
}

#[test]
fn wrong_products_are_found() {
    let k_major = Lay { across: false, swizzle: 128 };
    let p = Product { n: 128, left: Some(k_major), right: k_major };
    let body = p.body();
    let shows = |changed: String| {
        assert_ne!(changed, body);
        match p.run(&changed, Mode::Late) {
            Ok(v) => v != p.wanted(),
            Err(e) => e.fault().is_some(),
        }
    };
    assert!(shows(body.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1")), "a missing wait");
    assert!(shows(body.replace("add.s64 %d12, %d7, ", "add.s64 %d12, %d7, 32; add.s64 %d12, %d12, ")), "an address");
    assert!(shows(body.replace("1, 1, 0, 0;", "1, 1, 0, 1;")), "a transposed operand");
    assert!(shows(body.replace("1, 1, 0, 0;", "1, -1, 0, 0;")), "a sign");
    assert!(shows(body.replace("%p4, 1, 1", "1, 1, 1").replace("0f00000000", "0f3F800000")), "accumulators");
    // The operands are written over while the product reads them.
    let early = body.replace("wgmma.wait_group", "st.shared.b32 [%d7+1024], %r1; wgmma.wait_group");
    let e = p.run(&early, Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Race { .. })), "{e}");
    // Ordinary stores are not seen without the fence.
    let stored = body
        .replace("wgmma.fence", "ld.shared.b32 %r9, [%d7+1024]; bar.sync 0; WRITE wgmma.fence")
        .replace("WRITE", "setp.eq.u32 %p5, %r1, 0; @%p5 st.shared.b32 [%d7+1024], %r9; FENCE bar.sync 0;");
    assert_eq!(p.run(&stored.replace("FENCE", "fence.proxy.async.shared::cta;"), Mode::Late).unwrap(), p.wanted());
    let e = p.run(&stored.replace("FENCE", ""), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Proxy { .. })), "{e}");
    // One lane with another descriptor.
    let e = p.run(&body.replace("wgmma.fence", "@!%p1 add.s64 %d12, %d12, 1; wgmma.fence"), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Misuse(_))), "{e}");
    // One warp with another descriptor, or with one product less.
    let changed = |what: &str| {
        p.run(&body.replace("wgmma.fence", &format!("setp.lt.u32 %p5, %r1, 32; {what} wgmma.fence")), Mode::Late)
    };
    let e = changed("@%p5 add.s64 %d12, %d12, 2;").unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Divergence(_))), "{e}");
    let (second, commit) = (body.rfind("wgmma.mma_async").unwrap(), body.find("wgmma.commit").unwrap());
    let less = format!(
        "{}setp.lt.u32 %p5, %r1, 32; @%p5 bra LESS; {}LESS: {}",
        &body[..second],
        &body[second..commit],
        &body[commit..]
    );
    let e = p.run(&less, Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Divergence(_))), "{e}");
    // A pattern that begins elsewhere, and bits that mean nothing.
    for bit in [3, 14, 46, 49, 52] {
        let e = changed(&format!("mov.b64 %d13, {}; or.b64 %d12, %d12, %d13;", 1u64 << bit)).unwrap_err();
        assert!(matches!(e.fault(), Some(Fault::Misuse(_))), "bit {bit}: {e}");
    }
}

#[test]
fn registers_of_products_are_fenced() {
    let k_major = Lay { across: false, swizzle: 128 };
    let fence = "wgmma.fence.sync.aligned;\n";
    for left in [Some(k_major), None] {
        let p = Product { n: 64, left, right: k_major };
        let body = p.body();
        let fault = |changed: String| {
            assert_ne!(changed, body);
            p.run(&changed, Mode::Late).unwrap_err()
        };
        let unfenced = |changed: String| {
            let e = fault(changed);
            matches!(e.fault(), Some(Fault::Unfenced(_))) || panic!("{e}")
        };
        assert!(unfenced(body.replace(fence, "")), "no fence at all");
        // Between the two products: an accumulator is written, or only read; any other register may be.
        let second = body.rfind("wgmma.mma_async").unwrap();
        let touched = |what: &str| format!("{}{what}{}", &body[..second], &body[second..]);
        assert_eq!(p.run(&touched("mov.b32 %r9, %r1; "), Mode::Late).unwrap(), p.wanted());
        let e = fault(touched("mov.b32 %f3, %r1; "));
        assert!(matches!(e.fault(), Some(Fault::Early("summed into"))), "{e}");
        let e = fault(touched("mov.b32 %r9, %f3; "));
        assert!(matches!(e.fault(), Some(Fault::Early("summed into"))), "{e}");
        // After the wait a fence is needed again, and enough.
        let wait = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mov.b32 %r9, %f3; ";
        assert!(unfenced(touched(wait)), "read since the fence");
        let again = touched(&format!("{wait}{fence}"));
        assert_eq!(p.run(&again, Mode::Late).unwrap(), p.wanted());
        // A fence before the last write is none.
        assert!(
            unfenced(body.replace(fence, &format!("{fence}mov.b32 %f1, 0f00000000;\n"))),
            "written since the fence"
        );
    }
    // The left operand in registers: written since the fence, and before the product was waited for.
    let p = Product { n: 64, left: None, right: k_major };
    let body = p.body();
    let e = p.run(&body.replace(fence, &format!("{fence}mov.b32 %r20, %r21;\n")), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Unfenced(_))), "{e}");
    let late = |what: &str| body.replace("wgmma.commit_group", &format!("{what} wgmma.commit_group"));
    let e = p.run(&late("mov.b32 %r20, %r21;"), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Early("read"))), "{e}");
    assert_eq!(p.run(&late("mov.b32 %r9, %r20;"), Mode::Late).unwrap(), p.wanted());
    // Sums of one shape go on in order; those of another do not.
    let p = Product { n: 64, left: Some(k_major), right: k_major };
    let list = |n: u32| (0..n).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", ");
    let second = p.body().rfind("wgmma.mma_async").unwrap();
    let (first, rest) = (p.body()[..second].to_string(), p.body()[second..].to_string());
    let other = rest.replace("m64n64k16", "m64n32k16").replace(&list(32), &list(16));
    let e = p.run(&format!("{first}{other}"), Mode::Late).unwrap_err();
    assert!(matches!(e.fault(), Some(Fault::Unfenced(_))), "{e}");
    // What nobody wrote is no number.
    let scaled = p
        .body()
        .replace("%f3, 0f00000000", "%f99, 0f00000000")
        .replace("%f<32>", "%f<100>")
        .replace("%p4, 1, 1", "1, 1, 1");
    assert!(p.run(&scaled, Mode::Late).unwrap().iter().any(|x| x.is_nan()));
}

#[test]
fn matrices_are_stored_as_they_are_loaded() {
    // Each lane's four registers to shared memory and back.
    for (store, load, turned) in [("x4", "x4", false), ("x4.trans", "x4.trans", false), ("x4.trans", "x4", true)] {
        let body = format!(
            "mov.b64 %d7, smem; mul.wide.u32 %d3, %r1, 16; add.s64 %d5, %d1, %d3; add.s64 %d6, %d7, %d3;\n\
             ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d5];\n\
             stmatrix.sync.aligned.m8n8.{store}.shared.b16 [%d6], {{%r4, %r5, %r6, %r7}}; bar.warp.sync -1;\n\
             ldmatrix.sync.aligned.m8n8.{load}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%d6]; add.s64 %d4, %d2, %d3;\n\
             st.global.v4.b32 [%d4], {{%r8, %r9, %r10, %r11}};"
        );
        let input: Vec<u32> = (0..128).map(|i| (i * 3) | ((i * 5 + 1) << 16)).collect();
        let got = words(&body, &input, 32, 128).unwrap();
        let half = |v: &[u32], row: usize, column: usize, m: usize| {
            v[4 * (4 * row + column / 2) + m] >> (16 * (column % 2)) & 0xffff
        };
        for (m, row, column) in (0..4).flat_map(|m| (0..64).map(move |i| (m, i / 8, i % 8))) {
            let want = if turned { half(&input, column, row, m) } else { half(&input, row, column, m) };
            assert_eq!(half(&got, row, column, m), want, "{store} {load}");
        }
    }
}
