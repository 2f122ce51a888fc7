//! What a row kernel computes, prepared for planning: live nodes with polynomial shapes, the way the kernel is divided
//! into tasks, and the number of passes that come before each value.

use crate::emit::index::{Atom, Poly, Space};
use pleach_ir::{DType, Dim, Kernel, Layout, Op, Sym};
use std::collections::BTreeSet;

/// The largest number of elements of a tensor, as far as it is static.
const MAX_ELEMENTS: u64 = 1 << 48;

/// How the work is divided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// One row (axis 0 of the results) after another; what a row holds is spread over loops and lanes.
    Rows,
    /// The results have one axis, which is spread over tasks and lanes.
    Flat,
    /// A single task.
    One,
    /// One panel of a packed result after another.
    Panels {
        /// Columns of a panel.
        nr: i64,
        /// The tensor is `[N, K]`.
        transposed: bool,
    },
}

/// A node of the body.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) op: Op,
    pub(crate) inputs: Vec<usize>,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<Poly>,
}

/// The body of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) nodes: Vec<Node>,
    pub(crate) live: Vec<bool>,
    /// For each node, how many reductions must be complete before it is computed.
    pub(crate) level: Vec<u32>,
    /// Result values, as nodes.
    pub(crate) results: Vec<usize>,
    /// Rows.
    pub(crate) rows: Poly,
    /// For each node that is an input, which operand it is.
    pub(crate) operand: Vec<Option<u32>>,
    /// Layouts of the operands.
    pub(crate) layouts: Vec<Layout>,
    /// Live reductions.
    pub(crate) reductions: Vec<usize>,
}

/// Product of dimensions.
pub(crate) fn product(dims: &[Poly]) -> Poly {
    dims.iter().fold(Poly::from(1), |p, d| p.mul(d))
}

fn dim(space: &mut Space, d: Dim, symbols: &[Sym]) -> Result<Poly, String> {
    match d {
        Dim::Known(n) => Ok(Poly::from(n as i64)),
        Dim::Symbol(s) => match symbols.iter().position(|x| *x == s) {
            Some(i) => Ok(space.outer(Atom::Sym(i as u32))),
            None => Err(format!("symbol {s} is not one of the plan's")),
        },
    }
}

impl Model {
    /// Reads a kernel; refuses operators that have no place here.
    pub(crate) fn new(k: &Kernel, symbols: &[Sym], space: &mut Space) -> Result<Model, String> {
        let live = k.body.live();
        let mut m = Model {
            nodes: vec![],
            live,
            level: vec![],
            results: k.body.roots.iter().map(|r| r.value.index()).collect(),
            rows: Poly::from(1),
            operand: vec![],
            layouts: k.operands.clone(),
            reductions: vec![],
        };
        let mut inputs = 0;
        for (i, n) in k.body.nodes.iter().enumerate() {
            let fixed = n.ty.shape.iter().filter_map(|d| d.known()).try_fold(1u64, |a, d| a.checked_mul(d.max(1)));
            if fixed.is_none_or(|e| e > MAX_ELEMENTS) {
                return Err(format!("{} has more than 2^48 elements", n.ty));
            }
            let shape = n.ty.shape.iter().map(|d| dim(space, *d, symbols)).collect::<Result<Vec<_>, _>>()?;
            let ins: Vec<usize> = n.inputs.iter().map(|v| v.index()).collect();
            let mut level = ins.iter().map(|x| m.level[*x]).max().unwrap_or(0);
            let mut operand = None;
            match &n.op {
                Op::Input { .. } => {
                    operand = Some(inputs);
                    inputs += 1;
                }
                Op::Param(_) | Op::MatMul { .. } | Op::Attention(_) | Op::Scatter { .. } if m.live[i] => {
                    return Err(format!("a row kernel cannot hold {}", n.op.name()));
                }
                Op::Reduce { .. } => {
                    level += 1;
                    if m.live[i] {
                        m.reductions.push(i);
                    }
                }
                _ => {}
            }
            m.level.push(level);
            m.operand.push(operand);
            m.nodes.push(Node { op: n.op.clone(), inputs: ins, dtype: n.ty.dtype, shape });
        }
        if m.results.is_empty() {
            return Err("a kernel needs a result".into());
        }
        if k.results.len() != m.results.len()
            || k.aliases.len() != m.results.len()
            || k.operands.len() != inputs as usize
        {
            return Err("layouts or aliases do not match operands and results".into());
        }
        m.sink_reshapes();
        for (i, n) in m.nodes.iter().enumerate() {
            let packed = m.operand[i].is_some_and(|o| matches!(m.layouts[o as usize], Layout::Panels { .. }));
            if packed && (n.shape.len() != 2 || n.shape.iter().any(|d| d.known().is_none())) {
                return Err("a packed operand must be a static matrix".into());
            }
        }
        Ok(m)
    }

    /// Elementwise operators on rows that were joined (`[T, 9, 64]` as `[T, 576]`) work on the rows as they were, and
    /// the result is joined: loops then follow the structure inside of rows, such as the halves of a head.
    fn sink_reshapes(&mut self) {
        for i in 0..self.nodes.len() {
            if !self.live[i] || !self.nodes[i].op.is_elementwise() {
                continue;
            }
            let n = self.nodes[i].clone();
            let joined = |x: &usize| match &self.nodes[*x] {
                Node { op: Op::Reshape(_), inputs, shape, .. } if *shape == n.shape => {
                    let inner = &self.nodes[inputs[0]].shape;
                    (inner.len() > shape.len() && inner.first() == shape.first()).then(|| inner.clone())
                }
                _ => None,
            };
            let Some(inner) = n.inputs.iter().find_map(joined) else { continue };
            let inputs = n.inputs.iter().map(|x| self.divided(*x, &inner)).collect();
            let work = self.add(Node { inputs, shape: inner, ..n }, i);
            self.nodes[i].op = Op::Reshape(vec![]);
            self.nodes[i].inputs = vec![work];
        }
    }

    /// A value in this shape, which holds the same elements; scalars stay.
    fn divided(&mut self, x: usize, shape: &[Poly]) -> usize {
        let n = &self.nodes[x];
        match n.op {
            _ if n.shape.is_empty() => x,
            Op::Reshape(_) if self.nodes[n.inputs[0]].shape == shape => n.inputs[0],
            _ => {
                let dtype = n.dtype;
                self.add(Node { op: Op::Reshape(vec![]), inputs: vec![x], dtype, shape: shape.to_vec() }, x)
            }
        }
    }

    /// Another node, computed when node `like` is.
    fn add(&mut self, n: Node, like: usize) -> usize {
        self.nodes.push(n);
        self.live.push(true);
        self.level.push(self.level[like]);
        self.operand.push(None);
        self.nodes.len() - 1
    }

    /// Decides how the work is divided, as far as shapes tell; `Rows` for rank-1 results that are reduced along
    /// contiguous elements is decided by the planner.
    pub(crate) fn mode(&mut self, k: &Kernel) -> Result<Mode, String> {
        if k.results.iter().any(|l| matches!(l, Layout::Panels { .. })) {
            return self.panels(k);
        }
        if k.results.iter().any(|l| *l != Layout::RowMajor) {
            return Err("a row kernel writes no codes".into());
        }
        if self.flatten() {
            self.rows = self.nodes[self.results[0]].shape[0].clone();
            return Ok(Mode::Flat);
        }
        let shape = |i: usize| &self.nodes[i].shape;
        let whole = self.reductions.iter().any(|r| shape(*r).is_empty());
        if whole || self.results.iter().all(|r| shape(*r).is_empty()) {
            if self.results.iter().any(|r| shape(*r).len() > 1) {
                return Err("a reduction to a scalar cannot be computed together with results of rank 2".into());
            }
            if self.reductions.iter().any(|r| !shape(*r).is_empty()) {
                return Err("a reduction to a scalar cannot be computed together with reductions of each row".into());
            }
            return Ok(Mode::One);
        }
        let mut rows: Option<Poly> = None;
        for r in &self.results {
            let Some(n) = shape(*r).first() else {
                return Err("a scalar result cannot be computed together with results that have rows".into());
            };
            if rows.get_or_insert_with(|| n.clone()) != n {
                return Err("the results differ in their number of rows".into());
            }
        }
        self.rows = rows.unwrap_or_default();
        let flat =
            self.results.iter().all(|r| shape(*r).len() == 1) && self.reductions.iter().all(|r| shape(*r).len() == 1);
        Ok(if flat { Mode::Flat } else { Mode::Rows })
    }

    fn panels(&mut self, k: &Kernel) -> Result<Mode, String> {
        let (1, [Layout::Panels { nr, transposed }]) = (self.results.len(), k.results.as_slice()) else {
            return Err("a packing kernel has one result".into());
        };
        let shape = &self.nodes[self.results[0]].shape;
        let (Some(nr), true) = (Some(i64::from(*nr)).filter(|n| *n > 0 && n % 16 == 0), shape.len() == 2) else {
            return Err("panels need a matrix, and a multiple of 16 columns each".into());
        };
        let n = if *transposed { &shape[0] } else { &shape[1] };
        let (Some(n), true) = (n.known(), shape.iter().all(|d| d.known().is_some())) else {
            return Err("a packed result must be static".into());
        };
        if !self.reductions.is_empty() {
            return Err("a packing kernel cannot reduce".into());
        }
        if k.aliases.iter().any(Option::is_some) {
            return Err("a packing kernel cannot work in place".into());
        }
        self.rows = Poly::from((n + nr - 1) / nr);
        Ok(Mode::Panels { nr, transposed: *transposed })
    }

    /// Bodies that work element by element on one shape are seen as vectors.
    fn flatten(&mut self) -> bool {
        let full = self.nodes[self.results[0]].shape.clone();
        if full.len() < 2 {
            return false;
        }
        let same = |n: &Node| n.shape == full || n.shape.is_empty();
        let plain = self.nodes.iter().enumerate().filter(|(i, _)| self.live[*i]).all(|(i, n)| {
            same(n)
                && match &n.op {
                    Op::Input { .. } => self.operand[i].is_some_and(|o| self.layouts[o as usize] == Layout::RowMajor),
                    Op::Const { shape, .. } => shape.is_empty(),
                    op => op.is_elementwise(),
                }
        });
        if !plain || self.results.iter().any(|r| self.nodes[*r].shape != full) {
            return false;
        }
        let n = product(&full);
        for x in &mut self.nodes {
            if x.shape == full {
                x.shape = vec![n.clone()];
            }
        }
        true
    }

    /// For each node of `wanted`, the levels at which results and reductions read it, reductions and `stop` being
    /// borders.
    pub(crate) fn read_levels(
        &self,
        wanted: impl Fn(usize) -> bool,
        stop: &dyn Fn(usize, u32) -> bool,
    ) -> Vec<BTreeSet<u32>> {
        let mut levels = vec![BTreeSet::new(); self.nodes.len()];
        let mut roots: Vec<(usize, u32)> = self.results.iter().map(|r| (*r, self.level[*r])).collect();
        roots.extend(self.reductions.iter().map(|r| (self.nodes[*r].inputs[0], self.level[*r] - 1)));
        roots.sort_unstable();
        roots.dedup();
        for (root, level) in roots {
            let mut seen = BTreeSet::new();
            let mut stack = vec![root];
            while let Some(i) = stack.pop() {
                if !seen.insert(i) || matches!(self.nodes[i].op, Op::Reduce { .. }) {
                    continue;
                }
                if wanted(i) {
                    levels[i].insert(level);
                }
                if !stop(i, level) {
                    stack.extend(&self.nodes[i].inputs);
                }
            }
        }
        levels
    }

    /// Work of one element of this node, in simple operations.
    pub(crate) fn weight(&self, i: usize) -> u64 {
        use pleach_ir::UnaryOp::*;
        match &self.nodes[i].op {
            Op::Unary(Exp | Sigmoid) => 10,
            Op::Unary(Log | Tanh | Erf) => 16,
            Op::Unary(Sin | Cos) => 60,
            Op::Unary(Sqrt | Rsqrt | Recip) => 4,
            Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_) | Op::Reduce { .. } => 1,
            Op::Add => self.nodes[i].inputs.len() as u64 - 1,
            Op::Gather { .. } => 2,
            _ => 0,
        }
    }
}
