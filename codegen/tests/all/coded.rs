//! Weights that stay coded: blocks rearranged as panels, and products that read these or the blocks themselves, beside the same
//! products over the values. Both must give the same bits.

use crate::contraction::Build;
use crate::kit::{Loaded, laid_out, run_bytes, targets};
use pleach_codegen::compile::{emit_host, supported};
use pleach_ir::interp::Tensor;
use pleach_ir::{BlockFormat, Class, DType, Dim, Kernel, Layout, Op, ScatterMode, Sym, UnaryOp, ValueId};

const T: Dim = Dim::Symbol(Sym::T);
const STEPS: usize = BlockFormat::VALUES as usize;

/// A matrix in blocks: `[n, k]`, row after row.
pub(crate) struct Blocks {
    format: BlockFormat,
    n: usize,
    k: usize,
    pub(crate) bytes: Vec<u8>,
}

fn half(bytes: &[u8]) -> f32 {
    Tensor::from_bytes(DType::F16, [1], &bytes[..2]).unwrap().floats()[0]
}

impl Blocks {
    pub(crate) fn noise(format: BlockFormat, n: usize, k: usize, seed: u64) -> Blocks {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s >> 32
        };
        let f16 = |x: f32| Tensor::from_floats(DType::F16, [1], vec![x]).to_bytes();
        let mut bytes = vec![];
        for _ in 0..n * k / STEPS {
            bytes.extend(f16((next() % 4001) as f32 / 40000.0 - 0.05));
            if format.has_minimum() {
                bytes.extend(f16((next() % 3001) as f32 / 1500.0 - 1.0));
            }
            bytes.extend((0..STEPS as u64 * format.code_bits() / 8).map(|_| next() as u8));
        }
        Blocks { format, n, k, bytes }
    }

    fn code(&self, n: usize, k: usize) -> u8 {
        let size = self.format.bytes() as usize;
        let block = &self.bytes[(n * self.k + k) / STEPS * size..][..size];
        let (codes, i) = (&block[if self.format.has_minimum() { 4 } else { 2 }..], k % STEPS);
        match self.format.code_bits() {
            4 => codes[i % 16] >> (4 * (i / 16)) & 15,
            _ => codes[i],
        }
    }

    /// The bytes of the scale (0) or the minimum (1) of a value's block.
    fn head(&self, n: usize, k: usize, which: usize) -> &[u8] {
        &self.bytes[(n * self.k + k) / STEPS * self.format.bytes() as usize + 2 * which..][..2]
    }

    fn value(&self, n: usize, k: usize) -> f32 {
        let (code, scale) = (self.code(n, k), half(self.head(n, k, 0)));
        match self.format {
            BlockFormat::Q4_0 => (f32::from(code) - 8.0) * scale,
            BlockFormat::Q4_1 => f32::from(code) * scale + half(self.head(n, k, 1)),
            BlockFormat::Q8_0 => f32::from(code as i8) * scale,
        }
    }

    pub(crate) fn values(&self, dtype: DType) -> Tensor {
        let all = (0..self.n * self.k).map(|i| self.value(i / self.k, i % self.k)).collect();
        Tensor::from_floats(dtype, [self.n as u64, self.k as u64], all)
    }

    /// The panels that the layout describes, written out step by step.
    fn panels(&self, nr: usize) -> Vec<u8> {
        let mut out = vec![];
        for p in 0..self.n.div_ceil(nr) {
            let columns = || p * nr..(p + 1) * nr;
            for k in (0..self.k).step_by(STEPS) {
                for which in 0..if self.format.has_minimum() { 2 } else { 1 } {
                    for n in columns() {
                        out.extend(if n < self.n { self.head(n, k, which) } else { &[0, 0] });
                    }
                }
                let code = |n: usize, k: usize| if n < self.n { self.code(n, k) } else { 0 };
                for k in (k..k + STEPS).step_by(2) {
                    for n in columns().step_by(16) {
                        match self.format.code_bits() {
                            4 => out.extend((n..n + 16).map(|n| code(n, k) | code(n, k + 1) << 4)),
                            _ => out.extend((k..k + 2).flat_map(|k| (n..n + 16).map(move |n| code(n, k)))),
                        }
                    }
                }
            }
        }
        out
    }
}

/// A kernel that packs parts of these heights.
fn packing(format: BlockFormat, dtype: DType, rows: &[usize], k: usize, nr: u32) -> Kernel {
    let mut b = Build::new();
    let part = |b: &mut Build, n: &usize| {
        b.typed(DType::F32, &[Dim::Known(*n as u64), Dim::Known(k as u64)], Layout::Blocks(format))
    };
    let parts: Vec<ValueId> = rows.iter().map(|n| part(&mut b, n)).collect();
    let mut x = if parts.len() == 1 { parts[0] } else { b.op(Op::Concat { axis: 0 }, &parts) };
    if dtype != DType::F32 {
        x = b.op(Op::Cast(dtype), &[x]);
    }
    let k = b.done("pack", &[x]);
    Kernel { class: Class::Row, results: vec![Layout::CodedPanels { nr, format }], ..k }
}

#[test]
fn blocks_become_panels() {
    for format in BlockFormat::ALL {
        for (i, (rows, k, nr)) in
            [(vec![50], 32, 48), (vec![32, 7, 25], 96, 32), (vec![16], 64, 16), (vec![1, 1], 32, 48)].iter().enumerate()
        {
            let parts: Vec<Blocks> =
                rows.iter().enumerate().map(|(j, n)| Blocks::noise(format, *n, *k, (10 * i + j) as u64)).collect();
            let whole = Blocks {
                format,
                n: rows.iter().sum(),
                k: *k,
                bytes: parts.iter().flat_map(|p| p.bytes.clone()).collect(),
            };
            let kernel = packing(format, [DType::F32, DType::BF16][i % 2], rows, *k, *nr as u32);
            supported(&kernel).unwrap();
            for target in targets() {
                let e = emit_host(&kernel, &[], &target).unwrap();
                let lib = Loaded::new(&e.text, &target);
                for each in [1, 1000] {
                    let memory = parts.iter().map(|p| p.bytes.clone()).collect();
                    let got = run_bytes(&lib, &kernel, &e, memory, &[], each);
                    assert_eq!(got, [whole.panels(*nr)], "{format:?} {rows:?} {k} {nr}");
                }
            }
        }
    }
}

/// A product over a weight `[n, k]` in this layout, as it lies or turned round; the two halves of its columns multiplied, or all negated.
pub(crate) fn either_way(dtype: DType, (n, k): (u64, u64), layout: Layout, turned: bool, halves: bool) -> Kernel {
    let mut b = Build::new();
    let x = b.typed(dtype, &[T, Dim::Known(if turned { n } else { k })], Layout::RowMajor);
    let w = b.typed(dtype, &[Dim::Known(n), Dim::Known(k)], layout);
    let y = if turned { b.mm(x, w) } else { b.mm_t(x, w) };
    let columns = if turned { k } else { n };
    let half = |b: &mut Build, start: u64| b.op(Op::Slice { axis: 1, start, end: start + columns / 2 }, &[y]);
    let y = if halves {
        let (low, high) = (half(&mut b, 0), half(&mut b, columns / 2));
        b.op(Op::Binary(pleach_ir::BinaryOp::Mul), &[low, high])
    } else {
        b.op(Op::Unary(UnaryOp::Neg), &[y])
    };
    b.done("product", &[y])
}

#[test]
fn products_read_blocks_whichever_way_round() {
    let plain = |n, k| (n, k, false);
    let whole = [plain(64, 96), plain(50, 32), plain(33, 64), plain(7, 32), plain(2081, 64), plain(48, 2080)];
    for (i, (n, k, halves)) in whole.into_iter().chain([(64, 96, true), (96, 64, true)]).enumerate() {
        for (j, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
            for turned in [false, true] {
                let format = FORMATS[(i + j) % 3];
                let blocks = Blocks::noise(format, n as usize, k as usize, n + k);
                let plain = either_way(dtype, (n, k), Layout::RowMajor, turned, halves);
                let coded = either_way(dtype, (n, k), Layout::Blocks(format), turned, halves);
                supported(&coded).unwrap();
                for target in targets() {
                    let [a, b] = [&plain, &coded].map(|x| emit_host(x, &[Sym::T], &target).unwrap());
                    let [la, lb] = [&a, &b].map(|x| Loaded::new(&x.text, &target));
                    for t in [0, 1, 3, 13, 70] {
                        let shape = [t, if turned { n } else { k }];
                        let x = crate::kit::noise(&shape, 3 + t);
                        let x = Tensor::from_floats(dtype, shape, x.floats().into_owned()).to_bytes();
                        let symbols = [(Sym::T, t)];
                        let memory = vec![x.clone(), blocks.values(dtype).to_bytes()];
                        let want = run_bytes(&la, &plain, &a, memory, &symbols, u64::MAX >> 1);
                        for each in [1, u64::MAX >> 1] {
                            let memory = vec![x.clone(), blocks.bytes.clone()];
                            let got = run_bytes(&lb, &coded, &b, memory, &symbols, each);
                            let at = format!("{format:?} {dtype} {n}x{k} turned {turned} T {t} {:?}", target.isa);
                            assert!(got == want, "{at}: not the same bits");
                        }
                    }
                }
            }
        }
    }
}

/// A product over a weight `[n, k]` as it lies or turned round: in blocks with some of its rows or columns laid over it, or as it is.
pub(crate) fn laid_over(
    [stored, dtype]: [DType; 2],
    (n, k): (u64, u64),
    turned: bool,
    over: Option<(BlockFormat, u8, u64)>,
) -> Kernel {
    let mut b = Build::new();
    let x = b.typed(dtype, &[T, Dim::Known(if turned { n } else { k })], Layout::RowMajor);
    let layout = over.map_or(Layout::RowMajor, |o| Layout::Blocks(o.0));
    let mut w = b.typed(stored, &[Dim::Known(n), Dim::Known(k)], layout);
    if let Some((_, axis, count)) = over {
        let i = b.typed(DType::I32, &[Dim::Known(count)], Layout::RowMajor);
        let shape = if axis == 0 { [count, k] } else { [n, count] };
        let v = b.typed(stored, &shape.map(Dim::Known), Layout::RowMajor);
        w = b.op(Op::Scatter { axis, mode: ScatterMode::Set }, &[w, i, v]);
    }
    if stored != dtype {
        w = b.op(Op::Cast(dtype), &[w]);
    }
    let y = if turned { b.mm(x, w) } else { b.mm_t(x, w) };
    let y = b.op(Op::Unary(UnaryOp::Neg), &[y]);
    b.done("product", &[y])
}

#[test]
fn products_read_blocks_with_parts_laid_over_them() {
    let (f32, bf16) = (DType::F32, DType::BF16);
    for (i, (n, k)) in [(64u64, 96u64), (50, 32), (33, 64), (48, 2080), (2081, 64)].into_iter().enumerate() {
        for (j, types) in [[f32, f32], [bf16, bf16], [bf16, f32]].into_iter().enumerate() {
            for (turned, axis) in [(false, (i + j) as u8 % 2), (true, (i + j + i / 2) as u8 % 2)] {
                let format = FORMATS[(i + j) % 3];
                let blocks = Blocks::noise(format, n as usize, k as usize, n + k);
                let length = if axis == 0 { n } else { k };
                // Of the repeated one the last counts.
                let picked: Vec<u64> = vec![length - 1, 0, length / 2, 17 % length, length / 2];
                let count = picked.len() as u64;
                let shape = if axis == 0 { [count, k] } else { [n, count] };
                let values = crate::kit::noise(&shape, 5);
                let values = Tensor::from_floats(types[0], shape, values.floats().into_owned());
                let (mut weight, new) = (blocks.values(types[0]).floats().into_owned(), values.floats());
                for (j, at) in picked.iter().enumerate() {
                    for other in 0..if axis == 0 { k } else { n } {
                        let (to, from) = match axis {
                            0 => (at * k + other, j as u64 * k + other),
                            _ => (other * k + at, other * count + j as u64),
                        };
                        weight[to as usize] = new[from as usize];
                    }
                }
                let weight = Tensor::from_floats(types[0], [n, k], weight);
                // As numbers a product takes its weight in its own type.
                let weight = Tensor::from_floats(types[1], [n, k], weight.floats().into_owned());
                let plain = laid_over([types[1]; 2], (n, k), turned, None);
                let coded = laid_over(types, (n, k), turned, Some((format, axis, count)));
                supported(&coded).unwrap();
                let picked: Vec<u8> = picked.iter().flat_map(|i| (*i as i32).to_le_bytes()).collect();
                for target in targets() {
                    let [a, b] = [&plain, &coded].map(|x| emit_host(x, &[Sym::T], &target).unwrap());
                    let [la, lb] = [&a, &b].map(|x| Loaded::new(&x.text, &target));
                    for t in [1, 13, 70] {
                        let shape = [t, if turned { n } else { k }];
                        let x = crate::kit::noise(&shape, 3 + t);
                        let x = Tensor::from_floats(types[1], shape, x.floats().into_owned()).to_bytes();
                        let symbols = [(Sym::T, t)];
                        let memory = vec![x.clone(), weight.to_bytes()];
                        let want = run_bytes(&la, &plain, &a, memory, &symbols, u64::MAX >> 1);
                        for each in [1, u64::MAX >> 1] {
                            let memory = vec![x.clone(), blocks.bytes.clone(), picked.clone(), values.to_bytes()];
                            let got = run_bytes(&lb, &coded, &b, memory, &symbols, each);
                            let at = format!("{format:?} {types:?} {n}x{k} turned {turned} axis {axis} T {t}");
                            assert!(got == want, "{at} {:?}: not the same bits", target.isa);
                        }
                    }
                }
            }
        }
    }
}

/// A kernel that picks rows of a matrix in blocks.
pub(crate) fn picking(dtype: DType, format: BlockFormat, (n, k): (u64, u64)) -> Kernel {
    let mut b = Build::new();
    let w = b.typed(dtype, &[Dim::Known(n), Dim::Known(k)], Layout::Blocks(format));
    let i = b.typed(DType::I32, &[T], Layout::RowMajor);
    let y = b.op(Op::Gather { axis: 0 }, &[w, i]);
    Kernel { class: Class::Row, ..b.done("rows", &[y]) }
}

#[test]
fn rows_of_blocks_are_picked() {
    for format in FORMATS {
        for dtype in [DType::F32, DType::BF16] {
            let (n, k) = (19usize, 96usize);
            // Out of range: the nearest row.
            let near = |i: i32| i.clamp(0, n as i32 - 1) as usize;
            let blocks = Blocks::noise(format, n, k, 7);
            let kernel = picking(dtype, format, (n as u64, k as u64));
            supported(&kernel).unwrap();
            let row = blocks.values(dtype).to_bytes().len() / n;
            for target in targets() {
                let e = emit_host(&kernel, &[Sym::T], &target).unwrap();
                let lib = Loaded::new(&e.text, &target);
                for t in [0usize, 1, 8, 21] {
                    let index: Vec<i32> = (0..t).map(|i| (i * 7 % (n + 2)) as i32 - 1).collect();
                    let bytes = index.iter().flat_map(|i| i.to_le_bytes()).collect();
                    let memory = vec![blocks.bytes.clone(), bytes];
                    let got = run_bytes(&lib, &kernel, &e, memory, &[(Sym::T, t as u64)], 1);
                    let all = blocks.values(dtype).to_bytes();
                    let want: Vec<u8> = index.iter().flat_map(|i| all[near(*i) * row..][..row].to_vec()).collect();
                    assert_eq!(got, [want], "{format:?} {dtype} {t}");
                }
            }
        }
    }
}

#[test]
fn what_reads_no_blocks_is_refused() {
    let refused = |k: &Kernel, why: &str| {
        let e = supported(k).unwrap_err();
        assert!(e.contains(why), "{e}");
    };
    let format = BlockFormat::Q8_0;
    refused(&either_way(DType::F32, (32, 48), Layout::Blocks(format), false, false), "whole blocks");
    refused(&either_way(DType::F32, (32, 48), Layout::Blocks(format), true, false), "whole blocks");
    refused(&either_way(DType::F32, (80, 64), Layout::Blocks(format), false, true), "no multiple of 16");
    refused(&picking(DType::F32, format, (4, 48)), "whole blocks");
    let mut b = Build::new();
    let w = b.typed(DType::F32, &[Dim::Known(4), Dim::Known(32)], Layout::Blocks(format));
    let y = b.op(Op::Unary(UnaryOp::Neg), &[w]);
    refused(&Kernel { class: Class::Row, ..b.done("neg", &[y]) }, "picks rows and does nothing else");
}

#[test]
fn what_no_panel_can_be_made_of_is_refused() {
    let refused = |k: &Kernel, why: &str| {
        let e = supported(k).unwrap_err();
        assert!(e.contains(why), "{e}");
    };
    let good = || packing(BlockFormat::Q4_1, DType::F32, &[16, 16], 32, 16);
    supported(&good()).unwrap();
    let mut k = good();
    k.operands[1] = Layout::Blocks(BlockFormat::Q4_0);
    refused(&k, "of their own format");
    let mut k = good();
    k.results[0] = Layout::RowMajor;
    refused(&k, "picks rows and does nothing else");
    refused(&packing(BlockFormat::Q4_1, DType::F32, &[16], 48, 16), "do not divide 48");
    refused(&packing(BlockFormat::Q4_1, DType::F32, &[16], 64, 24), "a multiple of 16 columns");
    let mut k = good();
    k.results[0] = Layout::Panels { nr: 16, transposed: true };
    refused(&k, "into one result in coded panels");
}

/// What is done with the product.
#[derive(Clone, Copy, PartialEq, Debug)]
enum After {
    Nothing,
    /// Another product of few columns is added, with a scale.
    Branch,
    /// The two halves of the columns are multiplied.
    Halves,
}

/// A kernel over a weight in this layout, and the operands beside it.
fn product(dtype: DType, k: u64, n: u64, layout: Layout, after: After, rows: Dim) -> Kernel {
    let d = Dim::Known;
    let mut b = Build::new();
    let x = b.typed(dtype, &[rows, d(k)], Layout::RowMajor);
    let w = b.typed(dtype, &[d(n), d(k)], layout);
    let mut y = b.mm_t(x, w);
    match after {
        After::Nothing => {}
        After::Branch => {
            let h = b.typed(dtype, &[rows, d(8)], Layout::RowMajor);
            let v = b.typed(dtype, &[d(8), d(n)], Layout::RowMajor);
            let z = b.mm(h, v);
            y = b.op(Op::Add, &[y, z]);
        }
        After::Halves => {
            let (low, high) = (
                b.op(Op::Slice { axis: 1, start: 0, end: n / 2 }, &[y]),
                b.op(Op::Slice { axis: 1, start: n / 2, end: n }, &[y]),
            );
            let low = b.op(Op::Unary(UnaryOp::Neg), &[low]);
            y = b.op(Op::Binary(pleach_ir::BinaryOp::Mul), &[low, high]);
        }
    }
    b.done("product", &[y])
}

fn compare(format: BlockFormat, dtype: DType, (k, n, nr): (u64, u64, u32), after: After, rows: Dim, counts: &[u64]) {
    let blocks = Blocks::noise(format, n as usize, k as usize, k + n);
    let values = blocks.values(dtype);
    let plain = Layout::Panels { nr, transposed: true };
    let (a, b) = (
        product(dtype, k, n, plain, after, rows),
        product(dtype, k, n, Layout::CodedPanels { nr, format }, after, rows),
    );
    supported(&b).unwrap();
    for target in targets() {
        let (ea, eb) = (emit_host(&a, &[Sym::T], &target).unwrap(), emit_host(&b, &[Sym::T], &target).unwrap());
        let (la, lb) = (Loaded::new(&ea.text, &target), Loaded::new(&eb.text, &target));
        for t in counts {
            let symbols = [(Sym::T, *t)];
            let rows = rows.eval(&|_| Some(*t)).unwrap();
            let of = |shape: [u64; 2], seed| {
                let x = crate::kit::noise(&shape, seed);
                Tensor::from_floats(dtype, shape, x.floats().into_owned()).to_bytes()
            };
            let mut memory = vec![of([rows, k], 3 + t), laid_out(&values, &plain)];
            if after == After::Branch {
                memory.extend([of([rows, 8], 4), of([8, n], 5)]);
            }
            let want = run_bytes(&la, &a, &ea, memory.clone(), &symbols, u64::MAX >> 1);
            memory[1] = blocks.panels(nr as usize);
            for each in [1, u64::MAX >> 1] {
                let got = run_bytes(&lb, &b, &eb, memory.clone(), &symbols, each);
                let at = format!("{format:?} {dtype} {k}x{n} {after:?} T {t} {:?} bf16 {}", target.isa, target.bf16);
                assert!(got == want, "{at}: not the same bits");
            }
        }
    }
}

const FORMATS: [BlockFormat; 3] = BlockFormat::ALL;

#[test]
fn products_of_codes_are_those_of_their_values() {
    let shapes = [(64, 96, 48), (32, 50, 32), (160, 40, 16), (2080, 48, 48)];
    for (i, shape) in shapes.into_iter().enumerate() {
        for (j, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
            let format = FORMATS[(i + j) % 3];
            compare(format, dtype, shape, After::Nothing, T, &[0, 1, 2, 3, 4, 5, 13, 70]);
        }
    }
}

#[test]
fn every_format_and_what_comes_after() {
    for format in FORMATS {
        for dtype in [DType::F32, DType::BF16] {
            compare(format, dtype, (96, 96, 48), After::Branch, T, &[1, 2, 4, 6]);
            compare(format, dtype, (64, 192, 32), After::Halves, T, &[1, 3, 7]);
            compare(format, dtype, (64, 32, 16), After::Nothing, Dim::Known(1), &[1]);
            compare(format, dtype, (64, 32, 32), After::Nothing, Dim::Known(9), &[9]);
        }
    }
}
