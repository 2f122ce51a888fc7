//! A schedule: the kernels a graph was cut into, the buffers between them and the order they run in.
//!
//! A [`Kernel`] is target-neutral: its body is an [`Entry`] whose inputs `a0, a1, …` are the operands and whose outputs
//! `r0, r1, …` are the results, so the reference interpreter runs a kernel too. Kernels of one signature are stored
//! once. [`Schedule::check`] is independent of the passes that build a schedule.
//!
//! # What a body may hold, by class
//! * [`Class::Row`]: every result has the same axis 0 (the rows; rank 0 counts as one row). Inside the body a computed
//!   value may be read only at its own row; operands may be read through any movement. `reduce` over any axis of a
//!   row-local value but axis 0; a reduce over axis 0 is allowed only directly on (elementwise functions of) operands.
//! * [`Class::Contraction`]: one or more `matmul`s whose left operands are operands or slices/reshapes/transposes of
//!   operands, whose right operands are operands (packed, row-major, or blocks of codes, in another type or with parts set
//!   by a `scatter`), either maybe rows or columns that a `gather` picks of an operand by indices that are one, followed by elementwise operators, broadcasts
//!   and static slices of the last axis. Every result is `[.., M, N']`, with N' one of the sliced widths.
//! * [`Class::Attention`]: on operands, `attention` and `attention_lse` of the same q and k, or either alone; or one to
//!   three gradients of one attention (equal operands).
//! * [`Class::Scatter`]: one `scatter` whose target operand is aliased to the result (updated in place), or several of one form, side by
//!   side: a result each.

use crate::error::IrError;
use crate::graph::{Entry, Node, ParamId};
use crate::op::{Op, ScatterMode};
use crate::types::{Dim, TensorType};
pub use crate::window::{Loop, Seen};

/// A kernel of a schedule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KernelId(pub u32);

/// A buffer of a scheduled entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BufferId(pub u32);

/// How a tensor lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Layout {
    /// Row-major, dense.
    #[default]
    RowMajor,
    /// A static matrix as right operand of a product: with `K` the contracted and `N` the other dimension, panels of
    /// `nr` columns, `[ceil(N/nr)][K][nr]`, the last panel padded with zeros.
    ///
    /// 16-bit elements lie in pairs along `K`, as dot products of pairs read them: `[ceil(N/nr)][ceil(K/2)][nr][2]`.
    /// Element `(k, n)` is number `((n / nr) · ceil(K/2) + k / 2) · 2·nr + (n mod nr)·2 + k mod 2`; where `K` is odd
    /// the last half of each pair is zero.
    Panels {
        /// Columns of a panel, a multiple of 16.
        nr: u32,
        /// False: the tensor is `[K, N]`. True: the tensor is `[N, K]` (the product has `tb`).
        transposed: bool,
    },
    /// A static matrix `[N, K]` as a checkpoint stores it in blocks along `K` (a multiple of 32), block after block, row
    /// after row. It holds only values that such blocks give; the type says what they expand to.
    Blocks(BlockFormat),
    /// A static matrix `[N, K]` as right operand of a product (which has `tb`), panels of `nr` columns of the product,
    /// `[ceil(N/nr)][K/32]`, still as codes with their scales.
    ///
    /// A piece of 32 steps of a panel holds `nr` scales (f16), as many minima (f16, where the format has them), and the
    /// codes: for each pair of steps `(k, k + 1)` and each 16 columns, with 4 bits 16 bytes (step `k` in the low halves,
    /// `k + 1` in the high ones), with 8 bits 32 bytes (step `k`, then `k + 1`). The last panel is padded with zeros. The
    /// element is the value of the code, rounded to the tensor's type.
    CodedPanels {
        /// Columns of a panel, a multiple of 16.
        nr: u32,
        /// What a code and its scale stand for.
        format: BlockFormat,
    },
}

/// Blocks of 32 values that share a scale, as ggml defines them: value = code · scale, plus a minimum where there is one.
/// Scales and minima are f16; the sum is rounded once, to f32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(non_camel_case_types, reason = "ggml's own names")]
pub enum BlockFormat {
    /// f16 scale, 4-bit codes minus 8; 18 bytes.
    Q4_0,
    /// f16 scale, f16 minimum, 4-bit codes; 20 bytes.
    Q4_1,
    /// f16 scale, 8-bit signed codes; 34 bytes.
    Q8_0,
}

impl BlockFormat {
    /// Values in a block.
    pub const VALUES: u64 = 32;

    /// Every format.
    pub const ALL: [BlockFormat; 3] = [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q8_0];

    /// Its name, in lower case: `q4_1`.
    pub fn name(self) -> &'static str {
        match self {
            BlockFormat::Q4_0 => "q4_0",
            BlockFormat::Q4_1 => "q4_1",
            BlockFormat::Q8_0 => "q8_0",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<BlockFormat> {
        BlockFormat::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Bits of a code.
    pub fn code_bits(self) -> u64 {
        match self {
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => 4,
            BlockFormat::Q8_0 => 8,
        }
    }

    /// A minimum is added.
    pub fn has_minimum(self) -> bool {
        self == BlockFormat::Q4_1
    }

    /// Bytes of a block before its codes: scale and minimum.
    pub fn head(self) -> u64 {
        if self.has_minimum() { 4 } else { 2 }
    }

    /// Bytes of a block: scale, minimum and codes.
    pub fn bytes(self) -> u64 {
        self.head() + BlockFormat::VALUES * self.code_bits() / 8
    }
}

impl Layout {
    /// Columns of a panel for a product with `n` columns whose slices are cut at `cuts`: of `widths` (widest first)
    /// that divide every cut, the one with the least padding, then the widest; 16 where none divides them all.
    pub fn panel_width(n: u64, cuts: &[u64], widths: &[u64]) -> u32 {
        let fits = |w: &&u64| cuts.iter().all(|c| c % **w == 0);
        let best = widths.iter().filter(fits).min_by_key(|w| n.next_multiple_of(**w));
        best.map_or(16, |w| *w as u32)
    }

    /// Bytes a tensor of this type takes in this layout under an assignment of symbols.
    pub fn bytes(&self, ty: &TensorType, env: &dyn Fn(crate::types::Sym) -> Option<u64>) -> Option<u64> {
        let matrix = || Some((ty.shape.first()?.eval(env)?, ty.shape.get(1)?.eval(env)?));
        let panels = |n: u64, nr: u32| n.div_ceil(u64::from(nr)).checked_mul(u64::from(nr));
        match self {
            Layout::RowMajor => ty.elements(env)?.checked_mul(ty.dtype.size()),
            Layout::Panels { nr, transposed } => {
                let (r, c) = matrix()?;
                let (k, n) = if *transposed { (c, r) } else { (r, c) };
                let k = if ty.dtype.size() == 2 { k.next_multiple_of(2) } else { k };
                panels(n, *nr)?.checked_mul(k)?.checked_mul(ty.dtype.size())
            }
            Layout::Blocks(format) => {
                let (n, k) = matrix()?;
                n.checked_mul(k.div_ceil(BlockFormat::VALUES))?.checked_mul(format.bytes())
            }
            Layout::CodedPanels { nr, format } => {
                let (n, k) = matrix()?;
                panels(n, *nr)?.checked_mul(k.div_ceil(BlockFormat::VALUES))?.checked_mul(format.bytes())
            }
        }
    }
}

/// Which skeleton compiles a kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "described in the module text")]
pub enum Class {
    Row,
    Contraction,
    Attention,
    Scatter,
}

/// A region of the graph as one unit of work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// A readable, unique symbol: `row_3_rsqrt_mul`.
    pub name: String,
    /// Skeleton.
    pub class: Class,
    /// The computation; inputs named `a0…`, outputs named `r0…`. No params.
    pub body: Entry,
    /// Layout of each operand, in the order of the inputs' names.
    pub operands: Vec<Layout>,
    /// Layout of each result.
    pub results: Vec<Layout>,
    /// `aliases[i] = Some(j)`: result `i` is written over operand `j`, element by element in place (or, for a scatter,
    /// only where an index points).
    pub aliases: Vec<Option<u32>>,
}

impl Kernel {
    /// Types of the operands, in order.
    pub fn operand_types(&self) -> Vec<TensorType> {
        self.body.inputs().iter().map(|(v, _)| self.body.ty(*v).clone()).collect()
    }

    /// What it computes, whatever its name: the same for equal kernels of any schedule. 16 hexadecimal digits.
    pub fn signature(&self) -> String {
        let text = crate::text::print_kernel(&Kernel { name: String::new(), ..self.clone() });
        // FNV-1a; a signature finds a kernel among those of a few models.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        format!("{hash:016x}")
    }

    /// Types of the results, in order.
    pub fn result_types(&self) -> Vec<TensorType> {
        self.body.roots.iter().map(|r| self.body.ty(r.value).clone()).collect()
    }
}

/// Where a buffer's bytes live.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BufferKind {
    /// An input of the entry, given by the caller.
    Input(String),
    /// A parameter.
    Param(ParamId),
    /// Between kernels; lives in the arena.
    Arena,
    /// An output of the entry; lives in the arena until the entry ends.
    Output(String),
}

/// A tensor in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Where.
    pub kind: BufferKind,
    /// Type.
    pub ty: TensorType,
    /// Layout.
    pub layout: Layout,
    /// What it holds, for people: where the value comes from and its operator, such as `model.layers.0.mlp.gate_proj matmul`. Empty
    /// where its kind says that.
    pub name: String,
}

/// An operand or result of a step: a buffer, read or written as a tensor of the kernel's type (the same bytes may be
/// seen under another shape, which is how reshapes cost nothing).
pub type Arg = BufferId;

/// One launch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// What runs.
    pub kernel: KernelId,
    /// Operands, in the kernel's order.
    pub reads: Vec<Arg>,
    /// Results, in the kernel's order. An aliased result names the operand's buffer, or one placed at the same bytes.
    pub writes: Vec<Arg>,
    /// Buffers that must have been written before, although the kernel does not read them: what is computed a second time
    /// to save memory waits for what needs it.
    pub after: Vec<BufferId>,
    /// Module path or pass that this launch stems from.
    pub origin: Option<String>,
}

/// An entry as launches over buffers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScheduledEntry {
    /// Name of the entry.
    pub name: String,
    /// Buffers.
    pub buffers: Vec<Buffer>,
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Loops over windows of rows, in the order of their steps, no step in two of them.
    pub loops: Vec<Loop>,
    /// Outputs: name, buffer, type under which it is returned.
    pub outputs: Vec<(String, BufferId, TensorType)>,
}

/// Kernels and entries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Schedule {
    /// Parameters of the graph, with the layout each one is stored in.
    pub params: Vec<(crate::graph::Param, Layout)>,
    /// Kernels, each signature once.
    pub kernels: Vec<Kernel>,
    /// Entries.
    pub entries: Vec<ScheduledEntry>,
}

impl Schedule {
    /// Checks what every consumer relies on: ids in range, types of buffers fit the kernels, nothing is read before it
    /// is written, no arena buffer is written twice except in place, parameters are written only where aliased or in
    /// whole, outputs exist.
    ///
    /// # Errors
    /// [`IrError::Schedule`] listing every fault.
    pub fn check(&self) -> Result<(), IrError> {
        let mut faults = vec![];
        for k in &self.kernels {
            check_kernel(k, &mut faults);
        }
        for e in &self.entries {
            self.check_entry(e, &mut faults);
        }
        if faults.is_empty() { Ok(()) } else { Err(IrError::Schedule(faults.join("\n"))) }
    }

    fn check_entry(&self, e: &ScheduledEntry, faults: &mut Vec<String>) {
        let mut ready: Vec<bool> =
            e.buffers.iter().map(|b| matches!(b.kind, BufferKind::Input(_) | BufferKind::Param(_))).collect();
        for b in &e.buffers {
            if let BufferKind::Param(p) = b.kind {
                match self.params.get(p.index()) {
                    Some((q, l)) if q.ty == b.ty && *l == b.layout => {}
                    _ => faults.push(format!("{}: buffer of {p} differs from the parameter", e.name)),
                }
            }
        }
        for (i, s) in e.steps.iter().enumerate() {
            let at = format!("{}: step {i}", e.name);
            let Some(k) = self.kernels.get(s.kernel.0 as usize) else {
                faults.push(format!("{at}: no such kernel"));
                continue;
            };
            let (ot, rt) = (k.operand_types(), k.result_types());
            if ot.len() != s.reads.len() || rt.len() != s.writes.len() {
                faults.push(format!("{at}: {} has {} operands and {} results", k.name, ot.len(), rt.len()));
                continue;
            }
            let fits = |b: &Buffer, ty: &TensorType, l: &Layout| {
                b.ty.dtype == ty.dtype
                    && b.layout == *l
                    && (b.ty == *ty || (*l == Layout::RowMajor && same_elements(&b.ty.shape, &ty.shape)))
            };
            for a in &s.after {
                if !ready.get(a.0 as usize).is_some_and(|r| *r) {
                    faults.push(format!("{at}: runs before buffer {}, which it waits for", a.0));
                }
            }
            for (j, r) in s.reads.iter().enumerate() {
                match e.buffers.get(r.0 as usize) {
                    None => faults.push(format!("{at}: no buffer {}", r.0)),
                    Some(b) if !fits(b, &ot[j], &k.operands[j]) => {
                        faults.push(format!("{at}: operand {j} of {} is {}, buffer is {}", k.name, ot[j], b.ty));
                    }
                    Some(_) if !ready[r.0 as usize] => {
                        faults.push(format!("{at}: operand {j} of {} is read before it is written", k.name));
                    }
                    Some(_) => {}
                }
            }
            for (j, w) in s.writes.iter().enumerate() {
                let Some(b) = e.buffers.get(w.0 as usize) else {
                    faults.push(format!("{at}: no buffer {}", w.0));
                    continue;
                };
                if !fits(b, &rt[j], &k.results[j]) {
                    faults.push(format!("{at}: result {j} of {} is {}, buffer is {}", k.name, rt[j], b.ty));
                }
                let in_place = k.aliases[j].is_some_and(|a| s.reads.get(a as usize) == Some(w));
                match b.kind {
                    BufferKind::Input(_) => faults.push(format!("{at}: writes an input")),
                    BufferKind::Param(_) => {}
                    _ if ready[w.0 as usize] && !in_place => {
                        faults.push(format!("{at}: buffer {} is written twice", w.0));
                    }
                    _ => {}
                }
                ready[w.0 as usize] = true;
            }
        }
        crate::window::check(self, e, faults);
        for (name, b, ty) in &e.outputs {
            let ok = e.buffers.get(b.0 as usize).is_some_and(|x| {
                ready[b.0 as usize] && x.ty.dtype == ty.dtype && same_elements(&x.ty.shape, &ty.shape)
            });
            if !ok {
                faults.push(format!("{}: output {name} is never written", e.name));
            }
        }
    }
}

/// True when two shapes hold the same elements: equal static products and equal symbols.
pub fn same_elements(a: &[Dim], b: &[Dim]) -> bool {
    let m = |s: &[Dim]| {
        let mut syms: Vec<Dim> = s.iter().copied().filter(|d| d.known().is_none()).collect();
        syms.sort_unstable();
        (s.iter().filter_map(|d| d.known()).try_fold(1u64, u64::checked_mul), syms)
    };
    m(a) == m(b)
}

/// True when these nodes are one attention: its result, its log-sum-exp or both; or some of its gradients.
fn one_attention(nodes: &[&Node]) -> bool {
    let key = |n: &Node| match n.op {
        Op::Attention(a) => Some((a, n.inputs[..2].to_vec(), n.inputs[3..].to_vec())),
        Op::AttentionLse(a) => Some((a, n.inputs[..2].to_vec(), n.inputs[2..].to_vec())),
        Op::AttentionGrad { attrs, .. } => Some((attrs, n.inputs.clone(), vec![])),
        _ => None,
    };
    let different = |a: &Node, b: &Node| key(a) == key(b) && a.op != b.op;
    !nodes.is_empty() && nodes.iter().enumerate().all(|(i, a)| nodes[..i].iter().all(|b| different(a, b)))
}

/// Whether a node is no scatter, or sets parts of an operand in blocks of codes.
fn laid_over_codes(k: &Kernel, n: &Node) -> bool {
    let Op::Scatter { mode, .. } = n.op else { return true };
    let of = k.body.inputs().iter().position(|(v, _)| *v == n.inputs[0]);
    mode == ScatterMode::Set && of.is_some_and(|i| matches!(k.operands.get(i), Some(Layout::Blocks(_))))
}

fn check_kernel(k: &Kernel, faults: &mut Vec<String>) {
    let n = k.body.inputs().len();
    let mut bad = |why: String| faults.push(format!("kernel {}: {why}", k.name));
    for (i, (_, name)) in k.body.inputs().iter().enumerate() {
        if *name != format!("a{i}") {
            bad(format!("operand {i} is called {name}"));
        }
    }
    if k.operands.len() != n {
        bad(format!("{n} operands, {} layouts", k.operands.len()));
    }
    if k.results.len() != k.body.roots.len() || k.aliases.len() != k.body.roots.len() {
        bad("layouts or aliases do not match the results".into());
    }
    if k.aliases.iter().flatten().any(|a| *a as usize >= n) {
        bad("an alias names no operand".into());
    }
    if k.body.nodes.iter().any(|x| matches!(x.op, Op::Param(_))) {
        bad("reads a parameter directly".into());
    }
    let count = |f: &dyn Fn(&Op) -> bool| k.body.nodes.iter().filter(|x| f(&x.op)).count();
    let attention: Vec<&Node> = k.body.nodes.iter().filter(|x| x.op.is_attention()).collect();
    let (mm, at, sc) =
        (count(&|o| matches!(o, Op::MatMul { .. })), attention.len(), count(&|o| matches!(o, Op::Scatter { .. })));
    let ok = match k.class {
        Class::Row => mm + at + sc == 0,
        Class::Contraction => mm > 0 && at == 0 && k.body.nodes.iter().all(|x| laid_over_codes(k, x)),
        Class::Attention => mm + sc == 0 && one_attention(&attention),
        Class::Scatter => {
            let over = k.aliases.iter().all(Option::is_some);
            mm + at == 0 && sc > 0 && sc == k.body.roots.len() && over
        }
    };
    if !ok {
        bad(format!("its operators do not fit class {:?}", k.class));
    }
}
