//! Graph, parameters, entries and nodes.
//!
//! Ids are `u32` newtypes over a `Vec`. Nodes of an entry are in an order where operands come first, which `push`
//! guarantees. Nothing here knows a model, a method or a kernel.

use crate::error::IrError;
use crate::infer::infer;
use crate::op::Op;
use crate::types::{Sym, TensorType};
use std::fmt;
use std::sync::Arc;

/// A value of an entry, printed `%7`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ValueId(pub u32);

impl ValueId {
    /// As a position in [`Entry::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// A parameter of a graph, printed `@7`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ParamId(pub u32);

impl ParamId {
    /// As a position in [`Graph::params`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ParamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

/// What a parameter is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "each name is the role")]
pub enum Role {
    Frozen,
    Train,
    Index,
    Gate,
    Stat,
    State,
    Teacher,
}

impl Role {
    /// Every role with its name in the text form.
    pub const ALL: [(Role, &'static str); 7] = [
        (Role::Frozen, "frozen"),
        (Role::Train, "train"),
        (Role::Index, "index"),
        (Role::Gate, "gate"),
        (Role::Stat, "stat"),
        (Role::State, "state"),
        (Role::Teacher, "teacher"),
    ];
}

/// Where a parameter's values come from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Source {
    /// A tensor of the base checkpoint, by the name the checkpoint uses.
    Checkpoint(String),
    /// A tensor of the adapter in this slot, by the name the adapter uses after the method's key map.
    Adapter {
        /// Slot number.
        slot: u32,
        /// Key in the slot.
        key: String,
    },
    /// Filled by a `prepare` entry.
    Derived,
    /// Starts as zeros (caches, optimizer state).
    Zeros,
}

/// A parameter: a named buffer that outlives a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Param {
    /// Unique name; the checkpoint's where there is one.
    pub name: String,
    /// Type; caches and tables may have symbolic dimensions.
    pub ty: TensorType,
    /// What it is for.
    pub role: Role,
    /// Where its values come from.
    pub source: Source,
}

/// One operator with one result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Operator.
    pub op: Op,
    /// Operands, all earlier values of the same entry.
    pub inputs: Vec<ValueId>,
    /// Result type, inferred.
    pub ty: TensorType,
    /// Where it comes from: a module path, or the name of the rewrite that made it. Not part of identity.
    pub origin: Option<Arc<str>>,
}

/// What a root does with its value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RootKind {
    /// Returned under a name.
    Output(String),
    /// Written to a parameter when the entry ends: every read of the parameter in the entry means its value before.
    Assign(ParamId),
}

/// A result of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Root {
    /// What happens to the value.
    pub kind: RootKind,
    /// The value.
    pub value: ValueId,
}

/// A runnable function: `infer`, `generate`, `train_step`, `prepare(base)`, `prepare(slot)`, …
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    /// Name, unique in the graph.
    pub name: String,
    /// Nodes, operands first.
    pub nodes: Vec<Node>,
    /// Results, in order.
    pub roots: Vec<Root>,
}

impl Entry {
    /// An empty entry.
    pub fn new(name: impl Into<String>) -> Entry {
        Entry { name: name.into(), nodes: vec![], roots: vec![] }
    }

    /// Appends a node; its type is inferred from the operands.
    ///
    /// # Errors
    /// [`IrError::Shape`] when the operands do not fit.
    pub fn push(&mut self, params: &[Param], op: Op, inputs: &[ValueId]) -> Result<ValueId, IrError> {
        let mut types = Vec::with_capacity(inputs.len());
        for v in inputs {
            match self.nodes.get(v.index()) {
                Some(n) => types.push(&n.ty),
                None => {
                    return Err(IrError::Shape {
                        op: op.name().into(),
                        types: String::new(),
                        why: format!("operand {v} does not exist yet"),
                    });
                }
            }
        }
        let ty = infer(params, &op, &types)?;
        let id = ValueId(self.nodes.len() as u32);
        self.nodes.push(Node { op, inputs: inputs.to_vec(), ty, origin: None });
        Ok(id)
    }

    /// Appends a node with an origin.
    ///
    /// # Errors
    /// As [`Entry::push`].
    pub fn push_from(
        &mut self,
        params: &[Param],
        op: Op,
        inputs: &[ValueId],
        origin: Option<Arc<str>>,
    ) -> Result<ValueId, IrError> {
        let v = self.push(params, op, inputs)?;
        self.nodes[v.index()].origin = origin;
        Ok(v)
    }

    /// Adds a named result.
    pub fn output(&mut self, name: impl Into<String>, value: ValueId) {
        self.roots.push(Root { kind: RootKind::Output(name.into()), value });
    }

    /// Adds an assignment to a parameter.
    pub fn assign(&mut self, param: ParamId, value: ValueId) {
        self.roots.push(Root { kind: RootKind::Assign(param), value });
    }

    /// The node of a value.
    pub fn node(&self, v: ValueId) -> &Node {
        &self.nodes[v.index()]
    }

    /// The type of a value.
    pub fn ty(&self, v: ValueId) -> &TensorType {
        &self.nodes[v.index()].ty
    }

    /// Ids of all values, operands first.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = ValueId> + use<> {
        (0..self.nodes.len() as u32).map(ValueId)
    }

    /// For every value, the values that read it (a reader occurs once per operand position).
    pub fn users(&self) -> Vec<Vec<ValueId>> {
        let mut u = vec![vec![]; self.nodes.len()];
        for v in self.values() {
            for i in &self.node(v).inputs {
                u[i.index()].push(v);
            }
        }
        u
    }

    /// Which values a root needs.
    pub fn live(&self) -> Vec<bool> {
        let mut live = vec![false; self.nodes.len()];
        for r in &self.roots {
            live[r.value.index()] = true;
        }
        for v in self.values().rev() {
            if live[v.index()] {
                for i in &self.nodes[v.index()].inputs {
                    live[i.index()] = true;
                }
            }
        }
        live
    }

    /// The input nodes in order: value, name.
    pub fn inputs(&self) -> Vec<(ValueId, &str)> {
        self.values()
            .filter_map(|v| if let Op::Input { name, .. } = &self.node(v).op { Some((v, name.as_str())) } else { None })
            .collect()
    }
}

/// Which operators are legal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Phase {
    /// As a frontend made it.
    Imported,
    /// After canonicalize: no `stop_gradient` outside an entry `train`, sums sorted, no dead nodes.
    Core,
}

/// Parameters and the functions over them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Graph {
    /// Which operators are legal.
    pub phase: Phase,
    /// Parameters.
    pub params: Vec<Param>,
    /// Functions.
    pub entries: Vec<Entry>,
}

impl Default for Graph {
    fn default() -> Graph {
        Graph { phase: Phase::Imported, params: vec![], entries: vec![] }
    }
}

impl Graph {
    /// Adds a parameter and returns its id. Names must be unique; the verifier checks.
    pub fn add_param(&mut self, param: Param) -> ParamId {
        self.params.push(param);
        ParamId(self.params.len() as u32 - 1)
    }

    /// The parameter of that name.
    pub fn find_param(&self, name: &str) -> Option<ParamId> {
        self.params.iter().position(|p| p.name == name).map(|i| ParamId(i as u32))
    }

    /// The entry of that name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// Every symbol that occurs, sorted.
    pub fn symbols(&self) -> Vec<Sym> {
        let types =
            self.params.iter().map(|p| &p.ty).chain(self.entries.iter().flat_map(|e| e.nodes.iter().map(|n| &n.ty)));
        let mut v: Vec<Sym> = types.flat_map(TensorType::symbols).collect();
        v.sort_unstable();
        v.dedup();
        v
    }
}
