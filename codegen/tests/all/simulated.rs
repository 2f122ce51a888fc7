//! GPU kernels run in the PTX simulator on small ragged shapes, compared with the interpreter.

use crate::kit::noise;
use pleach_codegen::emit::gpu::{self, GpuChip};
use pleach_codegen::mlir;
use pleach_ir::interp::Tensor;
use pleach_ir::{BinaryOp, Class, DType, Dim, Entry, Kernel, Layout, Op, ReduceOp, Sym, UnaryOp, ValueId};
use pleach_plan::LaunchParam;
use pleach_ptx_sim::{Counts, Launch, Memory, Mode, Module, Param, Ptr, TensorMap};

/// Compiles a kernel, runs it with asynchronous work done late and at once, and compares with the interpreter. Returns the
/// PTX and what was executed.
pub(crate) fn simulate(
    k: &Kernel,
    chip: GpuChip,
    operands: &[Tensor],
    symbols: &[(Sym, u64)],
    tolerance: f64,
) -> (String, Counts) {
    simulate_at(k, chip, operands, symbols, symbols, tolerance)
}

/// [`simulate`] with grids, buffers and tensor maps made for larger counts; what lies past the operands is NaN.
fn simulate_at(
    k: &Kernel,
    chip: GpuChip,
    operands: &[Tensor],
    symbols: &[(Sym, u64)],
    capacity: &[(Sym, u64)],
    tolerance: f64,
) -> (String, Counts) {
    let stored: Vec<Vec<u8>> = operands.iter().map(Tensor::to_bytes).collect();
    let ran = simulate_stored(k, chip, (operands, &stored), symbols, capacity, tolerance);
    (ran.ptx, ran.counts)
}

/// What a kernel was and did.
pub(crate) struct Ran {
    pub(crate) ptx: String,
    pub(crate) counts: Counts,
    /// Bytes of the results.
    pub(crate) results: Vec<Vec<u8>>,
}

/// [`simulate_at`] with operands as they are stored.
pub(crate) fn simulate_stored(
    k: &Kernel,
    chip: GpuChip,
    (operands, stored): (&[Tensor], &[Vec<u8>]),
    symbols: &[(Sym, u64)],
    capacity: &[(Sym, u64)],
    tolerance: f64,
) -> Ran {
    let room: Vec<u64> = capacity.iter().map(|s| s.1).collect();
    let most = |s: Sym| capacity.iter().find(|x| x.0 == s).map(|x| x.1);
    let names: Vec<Sym> = symbols.iter().map(|s| s.0).collect();
    let values: Vec<u64> = symbols.iter().map(|s| s.1).collect();
    let env = |s: Sym| symbols.iter().find(|x| x.0 == s).map(|x| x.1);
    let want = pleach_ir::interp::run_kernel(k, operands).unwrap();
    let e = gpu::emit(k, &names, chip).unwrap();
    let text = gpu::module([e.text.as_str()]);
    let ptx = mlir::compile_ptx(&text, chip.name()).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert!(!ptx.contains(".local") && !ptx.contains("call"), "{ptx}");
    let module = Module::parse(&ptx).unwrap_or_else(|e| panic!("{e}\n{ptx}"));
    let mut counts = Counts::default();
    let mut results = vec![];
    for mode in [Mode::Late, Mode::AtOnce] {
        let mut mem = Memory::new();
        let padded = |((bytes, ty), layout): ((&Vec<u8>, &pleach_ir::TensorType), &Layout)| {
            let mut bytes = bytes.clone();
            bytes.resize(layout.bytes(ty, &most).unwrap() as usize, 0xff);
            bytes
        };
        let all = stored.iter().zip(&k.operand_types()).zip(&k.operands).map(padded).collect::<Vec<_>>();
        let mut buffers: Vec<Ptr> = all.iter().map(|x| mem.alloc_from(x)).collect();
        for ((ty, layout), alias) in k.result_types().iter().zip(&k.results).zip(&k.aliases) {
            let at = match alias {
                Some(a) => buffers[*a as usize],
                None => mem.alloc(layout.bytes(ty, &most).unwrap() as usize),
            };
            buffers.push(at);
        }
        let dims = mem.alloc_i64(&values.iter().map(|v| *v as i64).collect::<Vec<_>>());
        let scratch = mem.alloc(e.scratch_bytes.eval(&room).unwrap() as usize);
        for l in e.launches.iter().filter(|l| l.runs(&room).unwrap()) {
            let params: Vec<Param> = l
                .params
                .iter()
                .map(|p| match p {
                    LaunchParam::Buffer(b) => Param::Ptr(buffers[*b as usize]),
                    LaunchParam::Table(list) => {
                        let list: Vec<Ptr> = list.iter().map(|b| buffers[*b as usize]).collect();
                        Param::Ptr(mem.alloc_pointers(&list))
                    }
                    LaunchParam::Scratch => Param::Ptr(scratch),
                    LaunchParam::Dims => Param::Ptr(dims),
                    LaunchParam::TensorMap(m) => {
                        let eval = |v: &[pleach_plan::Expr]| v.iter().map(|e| e.eval(&room).unwrap()).collect();
                        Param::TensorMap(TensorMap {
                            base: buffers[m.buffer as usize],
                            element: m.dtype.size() as u32,
                            sizes: eval(&m.sizes),
                            strides: eval(&m.strides),
                            boxes: m.boxes.clone(),
                            swizzle: m.swizzle,
                        })
                    }
                })
                .collect();
            let grid = [0, 1, 2].map(|i| l.grid[i].eval(&room).unwrap() as u32);
            // A larger grid than the counts ask for does nothing more.
            let launch = Launch {
                grid: [grid[0] + 1, grid[1], grid[2]],
                block: [l.block, 1, 1],
                dynamic_shared: l.shared_bytes,
                params: &params,
                mode,
                ..Launch::default()
            };
            let kernel = module.kernel(&l.function).unwrap();
            let c = kernel.launch(&mut mem, launch).unwrap_or_else(|e| panic!("{} ({mode:?}): {e}\n{ptx}", k.name));
            counts.add(&c);
        }
        let mut own = vec![];
        for (i, (ty, want)) in k.result_types().iter().zip(&want).enumerate() {
            let bytes = mem.read(buffers[operands.len() + i], k.results[i].bytes(ty, &env).unwrap() as usize);
            let bytes = bytes.unwrap_or_else(|e| panic!("{}: {e}", k.name));
            own.push(bytes.to_vec());
            if k.results[i] != Layout::RowMajor {
                continue;
            }
            let got = Tensor::from_bytes(ty.dtype, want.shape.clone(), bytes).unwrap();
            let err = got.relative_error(want);
            assert!(err <= tolerance, "{} on {} ({mode:?}): result {i} is off by {err:e}", k.name, chip.name());
        }
        assert!(results.is_empty() || results == own, "{} on {}: other bits {mode:?}", k.name, chip.name());
        results = own;
    }
    Ran { ptx, counts, results }
}

/// An f32 tensor rounded to another float type.
fn in_type(t: &Tensor, dtype: DType) -> Tensor {
    let bytes: Vec<u8> = match dtype {
        DType::BF16 => t.floats().iter().flat_map(|x| pleach_ptx_sim::f32_to_bf16(*x).to_le_bytes()).collect(),
        _ => t.to_bytes(),
    };
    Tensor::from_bytes(dtype, t.shape.clone(), &bytes).unwrap()
}

/// A kernel under construction: operands in order with their values.
pub(crate) struct Build {
    pub(crate) e: Entry,
    pub(crate) operands: Vec<Tensor>,
    pub(crate) symbols: Vec<(Sym, u64)>,
    valued: bool,
    inputs: usize,
}

impl Build {
    pub(crate) fn new(symbols: &[(Sym, u64)]) -> Build {
        Build { e: Entry::new("kernel"), operands: vec![], symbols: symbols.to_vec(), valued: true, inputs: 0 }
    }

    /// The same without values: operands have none.
    pub(crate) fn shapes(symbols: &[(Sym, u64)]) -> Build {
        Build { valued: false, ..Build::new(symbols) }
    }

    /// An operand of random values.
    pub(crate) fn input(&mut self, dtype: DType, shape: &[Dim]) -> ValueId {
        let n = self.inputs;
        self.inputs += 1;
        let size: Vec<u64> =
            shape.iter().map(|d| d.eval(&|s| self.symbols.iter().find(|x| x.0 == s).map(|x| x.1)).unwrap()).collect();
        if self.valued {
            self.operands.push(in_type(&noise(&size, n as u64 + 1), dtype));
        }
        let op = Op::Input { name: format!("a{n}"), dtype, shape: shape.to_vec() };
        self.e.push(&[], op, &[]).unwrap()
    }

    pub(crate) fn push(&mut self, op: Op, x: &[ValueId]) -> ValueId {
        self.e.push(&[], op, x).unwrap()
    }

    /// x · y, with transposes.
    pub(crate) fn product(&mut self, x: ValueId, y: ValueId, ta: bool, tb: bool) -> ValueId {
        self.push(Op::MatMul { ta, tb }, &[x, y])
    }

    pub(crate) fn mul(&mut self, x: ValueId, y: ValueId) -> ValueId {
        self.push(Op::Binary(BinaryOp::Mul), &[x, y])
    }

    /// The kernel of some results.
    pub(crate) fn kernel(&mut self, class: Class, results: &[ValueId]) -> Kernel {
        self.named("kernel", class, results)
    }

    pub(crate) fn named(&mut self, name: &str, class: Class, results: &[ValueId]) -> Kernel {
        for (i, r) in results.iter().enumerate() {
            self.e.output(format!("r{i}"), *r);
        }
        let (n, r) = (self.inputs, results.len());
        let (operands, results) = (vec![Layout::RowMajor; n], vec![Layout::RowMajor; r]);
        Kernel { name: name.into(), class, body: self.e.clone(), operands, results, aliases: vec![None; r] }
    }

    fn check(&mut self, chip: GpuChip, results: &[ValueId], tolerance: f64) -> (String, Counts) {
        let k = self.kernel(Class::Contraction, results);
        simulate(&k, chip, &self.operands, &self.symbols, tolerance)
    }
}

const T: Dim = Dim::Symbol(Sym::T);

/// y = x · W in every orientation that has a tile of its own.
#[test]
fn plain_products() {
    for chip in GpuChip::ALL {
        for (t, n, k, turned) in [(70, 40, 72, false), (130, 64, 136, true), (65, 264, 64, false), (150, 72, 40, true)]
        {
            let mut b = Build::new(&[(Sym::T, t)]);
            let x = b.input(DType::BF16, &[T, k.into()]);
            let w = if turned { [k.into(), n.into()] } else { [Dim::from(n), k.into()] };
            let w = b.input(DType::BF16, &w);
            let y = b.product(x, w, false, !turned);
            let y = b.push(Op::Cast(DType::BF16), &[y]);
            let k = b.kernel(Class::Contraction, &[y]);
            // Made for more rows than there are.
            let (ptx, _) = simulate_at(&k, chip, &b.operands, &[(Sym::T, t)], &[(Sym::T, t + 90)], 1e-2);
            assert_eq!(ptx.contains("wgmma"), chip == GpuChip::Sm90a);
        }
    }
}

/// silu(x · Wᵀ + s · h · Bᵀ + bias) + residual, as f32 and as bf16.
#[test]
fn products_with_everything_around_them() {
    for chip in GpuChip::ALL {
        let (n, k, r) = (Dim::Known(80), Dim::Known(96), Dim::Known(16));
        let mut b = Build::new(&[(Sym::T, 75)]);
        let (x, w) = (b.input(DType::BF16, &[T, k]), b.input(DType::BF16, &[n, k]));
        let (h, up) = (b.input(DType::BF16, &[T, r]), b.input(DType::BF16, &[n, r]));
        let (s, bias) = (b.input(DType::F32, &[]), b.input(DType::F32, &[n]));
        let residual = b.input(DType::BF16, &[T, n]);
        let main = b.product(x, w, false, true);
        let branch = b.product(h, up, false, true);
        let branch = b.mul(branch, s);
        let bias = b.push(Op::Broadcast { shape: vec![T, n], axes: vec![1] }, &[bias]);
        let sum = b.push(Op::Add, &[main, branch, bias]);
        let gate = b.push(Op::Unary(UnaryOp::Sigmoid), &[sum]);
        let y = b.mul(sum, gate);
        let residual = b.push(Op::Cast(DType::F32), &[residual]);
        let y = b.push(Op::Add, &[y, residual]);
        let z = b.push(Op::Cast(DType::BF16), &[y]);
        b.check(chip, &[y, z], 1e-2);
    }
}

/// silu(gate) · up of one product with both side by side, each with its own scaled branch.
#[test]
fn two_groups_share_a_left_operand() {
    for chip in GpuChip::ALL {
        let (f, k, r) = (Dim::Known(48), Dim::Known(136), Dim::Known(8));
        let mut b = Build::new(&[(Sym::T, 67)]);
        let (x, w) = (b.input(DType::BF16, &[T, k]), b.input(DType::BF16, &[k, 96.into()]));
        let z = b.product(x, w, false, false);
        let mut parts = vec![];
        for start in [0, 48] {
            let (h, up) = (b.input(DType::BF16, &[T, r]), b.input(DType::BF16, &[f, r]));
            let (h2, up2) = (b.input(DType::BF16, &[T, r]), b.input(DType::BF16, &[f, r]));
            let (s, s2) = (b.input(DType::F32, &[]), b.input(DType::F32, &[]));
            let part = b.push(Op::Slice { axis: 1, start, end: start + 48 }, &[z]);
            let branch = b.product(h, up, false, true);
            let branch = b.mul(branch, s);
            let second = b.product(h2, up2, false, true);
            let second = b.mul(second, s2);
            parts.push(b.push(Op::Add, &[part, branch, second]));
        }
        let gate = b.push(Op::Unary(UnaryOp::Sigmoid), &[parts[0]]);
        let gate = b.mul(parts[0], gate);
        let y = b.mul(gate, parts[1]);
        let y = b.push(Op::Cast(DType::BF16), &[y]);
        b.check(chip, &[y], 1e-2);
    }
}

/// silu(gate) · up where all of the sum is one stage: products of two groups follow each other without a loop.
#[test]
fn two_groups_of_a_single_step() {
    for (k, chip) in [(64, GpuChip::Sm90a), (40, GpuChip::Sm90a), (40, GpuChip::Sm80)] {
        let mut b = Build::new(&[(Sym::T, 67)]);
        let x = b.input(DType::BF16, &[T, k.into()]);
        let parts = [0, 1].map(|_| {
            let w = b.input(DType::BF16, &[96.into(), k.into()]);
            b.product(x, w, false, true)
        });
        let gate = b.push(Op::Unary(UnaryOp::Sigmoid), &[parts[0]]);
        let gate = b.mul(parts[0], gate);
        let y = b.mul(gate, parts[1]);
        let y = b.push(Op::Cast(DType::BF16), &[y]);
        let (ptx, _) = b.check(chip, &[y], 1e-2);
        assert_eq!(ptx.contains("wgmma"), chip == GpuChip::Sm90a);
    }
}

/// xᵀ · y over all tokens, added in place: gradients of whole weights. What lies past the last token is NaN.
#[test]
fn sums_over_tokens() {
    for (t, room) in [(139, 90), (64, 64), (37, 300)] {
        let (m, n) = (Dim::Known(640), Dim::Known(640));
        let mut b = Build::new(&[(Sym::T, t)]);
        let (x, y) = (b.input(DType::BF16, &[T, m]), b.input(DType::BF16, &[T, n]));
        let before = b.input(DType::F32, &[m, n]);
        let z = b.product(x, y, true, false);
        let z = b.push(Op::Add, &[before, z]);
        let mut k = b.kernel(Class::Contraction, &[z]);
        k.aliases = vec![Some(2)];
        let (ptx, _) = simulate_at(&k, GpuChip::Sm90a, &b.operands, &[(Sym::T, t)], &[(Sym::T, t + room)], 1e-2);
        assert!(ptx.contains("wgmma"));
    }
}

/// Few rows go another way: 16-byte loads of the weights, the sum shared by the warps of a block.
#[test]
fn few_rows() {
    for (t, k, r) in [(1, 1024, 16), (5, 200, 8), (8, 512, 40)] {
        let (n, k, r) = (Dim::Known(56), Dim::Known(k), Dim::Known(r));
        let mut b = Build::new(&[(Sym::T, t)]);
        let x = b.input(DType::BF16, &[T, k]);
        let mut parts = vec![];
        for _ in 0..2 {
            let w = b.input(DType::BF16, &[n, k]);
            let (h, up) = (b.input(DType::BF16, &[T, r]), b.input(DType::BF16, &[n, r]));
            let s = b.input(DType::F32, &[]);
            let part = b.product(x, w, false, true);
            let branch = b.product(h, up, false, true);
            let branch = b.mul(branch, s);
            parts.push(b.push(Op::Add, &[part, branch]));
        }
        let residual = b.input(DType::F32, &[T, n]);
        let gate = b.push(Op::Unary(UnaryOp::Sigmoid), &[parts[0]]);
        let gate = b.mul(parts[0], gate);
        let y = b.mul(gate, parts[1]);
        let y = b.push(Op::Add, &[y, residual]);
        let (ptx, counts) = b.check(GpuChip::Sm80, &[y], 1e-2);
        assert!(ptx.contains("kernel_few(") && counts.of("ldmatrix") == 0 && counts.of("mma.sync") > 0);
    }
}

/// Gradients of thin matrices: few results, sums over all tokens, which blocks share.
#[test]
fn long_sums_are_shared() {
    for (m, n) in [(16, 200), (72, 8)] {
        let mut b = Build::new(&[(Sym::T, 139)]);
        let (x, y) = (b.input(DType::BF16, &[T, m.into()]), b.input(DType::BF16, &[T, n.into()]));
        let before = b.input(DType::F32, &[m.into(), n.into()]);
        let s = b.input(DType::F32, &[]);
        let z = b.product(x, y, true, false);
        let z = b.mul(z, s);
        let z = b.push(Op::Add, &[before, z]);
        let mut k = b.kernel(Class::Contraction, &[z]);
        k.aliases = vec![Some(2)];
        let (ptx, _) = simulate(&k, GpuChip::Sm80, &b.operands, &[(Sym::T, 139)], 1e-2);
        assert!(ptx.contains("kernel_sum(") && !ptx.contains("\tatom.") && !ptx.contains("\tred."));
    }
}

/// Products in batches, and a right operand across the sum.
#[test]
fn batches() {
    let mut b = Build::new(&[(Sym::T, 37)]);
    let (x, y) =
        (b.input(DType::BF16, &[3.into(), T, 40.into()]), b.input(DType::BF16, &[3.into(), 40.into(), 24.into()]));
    let z = b.product(x, y, false, false);
    b.check(GpuChip::Sm90a, &[z], 1e-2);
}

/// Launches of one kernel side by side, as an optimizer makes them, are one launch over a table of buffers: in place, flat and
/// row by row.
#[test]
fn launches_side_by_side() {
    for by_row in [false, true] {
        let mut b = Build::new(&[(Sym::T, 5)]);
        let shape = [Dim::Known(6), Dim::Known(40)];
        let mut results = vec![];
        let mut aliases = vec![];
        for c in 0..3u32 {
            let (p, g) = (b.input(DType::F32, &shape), b.input(DType::F32, &shape));
            let rate = b.input(DType::F32, &[]);
            let step = b.mul(g, rate);
            let y = b.push(Op::Binary(BinaryOp::Sub), &[p, step]);
            let square = b.mul(g, g);
            if by_row {
                results.push(b.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[square]));
                aliases.push(None);
            }
            results.push(y);
            aliases.push(Some(3 * c));
        }
        let mut k = b.kernel(Class::Row, &results);
        // Operands of a part stand together, and so do its nodes.
        k.aliases = aliases;
        let (ptx, _) = simulate(&k, GpuChip::Sm80, &b.operands, &[(Sym::T, 5)], 1e-5);
        let head = ptx.split(".visible .entry kernel(").nth(1).and_then(|x| x.split(')').next()).unwrap();
        assert_eq!(head.matches(".param").count(), 2, "{ptx}");
        // Element-wise parts may be of any size, rows of one kind are counted along an axis of their own.
        assert_eq!(ptx.contains("%ctaid.y"), by_row, "{ptx}");
    }
}

/// A residual in place: tiles read what they write over, and nothing else of it.
#[test]
fn sums_in_place() {
    for chip in GpuChip::ALL {
        let mut b = Build::new(&[(Sym::T, 70)]);
        let (n, k) = (Dim::Known(96), Dim::Known(64));
        let (x, w) = (b.input(DType::BF16, &[T, k]), b.input(DType::BF16, &[n, k]));
        let before = b.input(DType::F32, &[T, n]);
        let z = b.product(x, w, false, true);
        let z = b.push(Op::Add, &[before, z]);
        let mut kernel = b.kernel(Class::Contraction, &[z]);
        kernel.aliases = vec![Some(2)];
        simulate(&kernel, chip, &b.operands, &[(Sym::T, 70)], 1e-2);
    }
}

/// A row is added to what is there after a sum over it: rows that a thread walks in one step, in several, and of unequal length.
#[test]
fn rows_in_place() {
    for d in [96, 2048, 4096, 4100] {
        let mut b = Build::new(&[(Sym::T, 3)]);
        let d = Dim::Known(d);
        let (x, before) = (b.input(DType::F32, &[T, d]), b.input(DType::F32, &[T, d]));
        let square = b.push(Op::Binary(BinaryOp::Mul), &[x, x]);
        let sum = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[square]);
        let sum = b.push(Op::Broadcast { shape: vec![T, d], axes: vec![0] }, &[sum]);
        let y = b.push(Op::Binary(BinaryOp::Mul), &[x, sum]);
        let z = b.push(Op::Add, &[before, y]);
        let narrow = b.push(Op::Cast(DType::BF16), &[z]);
        let mut kernel = b.kernel(Class::Row, &[z, narrow]);
        kernel.aliases = vec![Some(1), None];
        simulate(&kernel, GpuChip::Sm80, &b.operands, &[(Sym::T, 3)], 1e-2);
    }
}

/// What a tile of a large product costs: operands are read once for every tile, and few instructions go with each product of a
/// warpgroup.
#[test]
fn work_of_a_large_product() {
    let (t, n, k) = (128, 6144, 512);
    let mut b = Build::new(&[(Sym::T, t)]);
    let (x, w) = (b.input(DType::BF16, &[T, k.into()]), b.input(DType::BF16, &[n.into(), k.into()]));
    let y = b.product(x, w, false, true);
    let y = b.push(Op::Cast(DType::BF16), &[y]);
    let (_, counts) = b.check(GpuChip::Sm90a, &[y], 1e-2);
    // Both ways of running it; tiles of 128 by 256.
    let (tiles, products) = (2 * n / 256, counts.of("wgmma.mma_async"));
    let least = tiles * (128 + 256) * k * 2;
    assert_eq!(counts.mma_flops, 2 * 2 * t * n * k);
    assert_eq!(products, tiles * k / 16 * 8, "products of warps");
    let (read, written) = (counts.global_read as f64 / least as f64, counts.global_written);
    let instructions = counts.warp_instructions as f64 / products as f64;
    eprintln!("{read:.3} of the bytes that tiles have, {instructions:.1} instructions for a product of a warp");
    if std::env::var_os("PLEACH_OPCODES").is_some() {
        for (name, n) in &counts.by_opcode {
            eprintln!("{:8.3} {name}", *n as f64 / products as f64);
        }
    }
    assert!(read < 1.02 && written == 2 * t * n * 2, "{read} {written}");
    // For a product: 11 that exchange, round and store four results of a thread, and 4 zeros that a tile begins with; less than half
    // of one is a wait, which the simulator lets return early once.
    assert!(instructions < 40.0, "{instructions}");
}
