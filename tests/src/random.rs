//! Random graphs that type-check, run without overflow and say how exact their results can be expected to be.
//!
//! A [`Recipe`] is a list of plain numbers, so that proptest can shrink it; [`Recipe::build`] reads it as a graph: every
//! step picks an operator or a small composition (softmax, a norm, a linear layer with a low-rank branch, attention) and
//! operands among the values so far, and is skipped where nothing fits. One entry, `infer`, over a symbolic number of
//! tokens and static matrices; element types f32, i32 and bool.
//!
//! Each value carries a bound of its size and of its rounding error (a running error analysis with unit 1.2e-7, products
//! counted with the square root of their length times a safety factor). Steps that could make a value larger than 1e3 or
//! its error larger than 1e-2 are skipped, and operators that jump (comparison, `floor`) take only values that carry no
//! error. [`Case::tolerance`] turns the bounds into an allowed relative error per output.

mod steps;

use crate::compare::{Results, Start};
use pleach_ir::interp::Symbols;
use pleach_ir::{DType, Dim, Entry, Graph, Op, Param, ParamId, Role, Source, Sym, TensorType, ValueId};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// One step: which operator, and numbers it chooses its operands and attributes with.
#[derive(Clone, Copy)]
pub struct Step {
    /// Operator.
    pub kind: u8,
    /// Choices.
    pub pick: [u16; 6],
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.kind % steps::KINDS, self.pick)
    }
}

/// A graph as plain numbers.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Tokens of the run, 1 to 9.
    pub tokens: u8,
    /// Width of the token-wise input, 1 to 24.
    pub width: u8,
    /// Rows and columns of the static input, 1 to 12.
    pub matrix: (u8, u8),
    /// Seed of the values.
    pub seed: u64,
}

/// Recipes of up to `steps` steps.
pub fn recipe(steps: usize) -> impl Strategy<Value = Recipe> {
    let step = (any::<u8>(), any::<[u16; 6]>()).prop_map(|(kind, pick)| Step { kind, pick });
    (proptest::collection::vec(step, 1..steps), 1..10u8, 1..25u8, (1..13u8, 1..13u8), any::<u64>())
        .prop_map(|(steps, tokens, width, matrix, seed)| Recipe { steps, tokens, width, matrix, seed })
}

/// How large a value can be, and how far a computed value can be from the exact one.
#[derive(Clone, Copy, Debug)]
struct Bound {
    size: f64,
    error: f64,
}

/// Rounding of one operation, relative to the result.
const UNIT: f64 = 1.2e-7;

/// A graph with all that is needed to run it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The graph, phase `Imported`.
    pub graph: Graph,
    /// Values of symbols.
    pub symbols: Symbols,
    /// Seed of the values.
    pub seed: u64,
    /// Expected absolute error by result, named as in [`Results`].
    errors: BTreeMap<String, f64>,
}

impl Case {
    /// Parameters and inputs.
    pub fn start(&self) -> Start {
        Start::seeded(&self.graph, self.symbols.clone(), self.seed)
    }

    /// The relative error that a result may have beside `reference`, `factor` times what rounding explains.
    pub fn tolerance<'a>(&'a self, reference: &'a Results, factor: f64) -> impl Fn(&str) -> f64 + 'a {
        move |name| {
            let largest =
                |t: &pleach_ir::interp::Tensor| t.floats().iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
            let size = reference.get(name).map_or(0.0, largest).max(f64::from(f32::MIN_POSITIVE));
            factor * self.errors.get(name).copied().unwrap_or(0.0) / size
        }
    }
}

impl Recipe {
    /// The graph of these numbers.
    pub fn build(&self) -> Case {
        let mut b = Builder { symbols: crate::values::symbols(), ..Builder::default() };
        b.symbols.insert(Sym::T, u64::from(self.tokens));
        b.input("x", DType::F32, vec![Dim::Symbol(Sym::T), Dim::Known(u64::from(self.width))]);
        b.input("m", DType::F32, vec![Dim::Known(self.matrix.0.into()), Dim::Known(self.matrix.1.into())]);
        for s in &self.steps {
            // A step that does not fit leaves the graph as it was, but for values nobody reads.
            let _ = steps::step(&mut b, s.kind, &mut Picks { left: s.pick.iter() });
        }
        b.finish(self.seed)
    }
}

/// The numbers of a step; zeros after the last.
struct Picks<'a> {
    left: std::slice::Iter<'a, u16>,
}

impl Picks<'_> {
    /// Below `n`.
    fn below(&mut self, n: u64) -> u64 {
        u64::from(self.left.next().copied().unwrap_or(0)) % n.max(1)
    }

    /// One of a list.
    fn of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.below(all.len() as u64) as usize]) }
    }
}

#[derive(Default)]
struct Builder {
    graph: Graph,
    entry: Entry,
    bounds: Vec<Bound>,
    symbols: Symbols,
    /// `(parameter, new value)` of state that is written.
    assigns: Vec<(ParamId, ValueId)>,
}

impl Builder {
    fn ty(&self, v: ValueId) -> &TensorType {
        self.entry.ty(v)
    }

    fn size(&self, d: Dim) -> u64 {
        d.eval(&|s| self.symbols.get(&s).copied()).unwrap_or(1)
    }

    fn bound(&self, v: ValueId) -> Bound {
        self.bounds[v.index()]
    }

    /// Pushes a node unless its operands do not fit or its bound is out of range.
    fn push(&mut self, op: Op, x: &[ValueId], bound: Bound) -> Option<ValueId> {
        if bound.size > 1e3 || bound.error > 1e-2 {
            return None;
        }
        let v = self.entry.push(&self.graph.params, op, x).ok()?;
        let elements: u64 = self.entry.ty(v).shape.iter().map(|d| self.size(*d)).product();
        if elements > 20_000 || self.entry.ty(v).rank() > 4 {
            self.entry.nodes.pop();
            return None;
        }
        self.bounds.push(bound);
        Some(v)
    }

    fn leaf(&mut self, op: Op, size: f64) -> Option<ValueId> {
        self.push(op, &[], Bound { size, error: 0.0 })
    }

    fn input(&mut self, name: &str, dtype: DType, shape: Vec<Dim>) -> Option<ValueId> {
        let have = self.entry.inputs().iter().find(|(_, n)| *n == name).map(|x| x.0);
        have.or_else(|| self.leaf(Op::Input { name: name.into(), dtype, shape }, 1.0))
    }

    /// A scalar constant.
    fn scalar(&mut self, x: f32) -> Option<ValueId> {
        self.leaf(Op::f32(x), f64::from(x.abs()))
    }

    /// A new frozen parameter, read at once.
    fn param(&mut self, stem: &str, source: Option<u32>, shape: &[u64]) -> Option<ValueId> {
        let name = format!("{stem}.{}", self.graph.params.len());
        let source = match source {
            None => Source::Checkpoint(name.clone()),
            Some(slot) => Source::Adapter { slot, key: name.clone() },
        };
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        let p = self.graph.add_param(Param { name, ty, role: Role::Frozen, source });
        self.leaf(Op::Param(p), 1.0)
    }

    /// Values of f32 that pass a test, newest first.
    fn floats(&self, f: impl Fn(&Builder, ValueId) -> bool) -> Vec<ValueId> {
        self.entry.values().rev().filter(|v| self.ty(*v).dtype == DType::F32 && f(self, *v)).collect()
    }

    fn finish(mut self, seed: u64) -> Case {
        // What nobody reads is a result, so most of the graph is live; a middle value too, so values have several uses.
        let users = self.entry.users();
        let computed = |v: &ValueId| !self.entry.node(*v).op.is_leaf();
        let ends = self.entry.values().filter(|v| users[v.index()].is_empty()).filter(computed);
        let middle = ValueId(self.entry.nodes.len() as u32 / 2);
        // The token-wise input, where nothing else is left, stands for itself.
        let mut all: Vec<ValueId> = ends.rev().take(3).chain([middle].into_iter().filter(computed)).collect();
        all.extend(all.is_empty().then_some(ValueId(0)));
        let mut errors = BTreeMap::new();
        for (i, v) in all.into_iter().enumerate() {
            self.entry.output(format!("y{i}"), v);
            errors.insert(format!("infer/y{i}"), self.bound(v).error);
        }
        for (p, v) in std::mem::take(&mut self.assigns) {
            self.entry.assign(p, v);
            errors.insert(format!("infer/@{}", self.graph.params[p.index()].name), self.bound(v).error);
        }
        self.entry.name = "infer".into();
        self.graph.entries.push(self.entry);
        Case { graph: self.graph, symbols: self.symbols, seed, errors }
    }
}
