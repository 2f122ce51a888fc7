//! Which parts of a kernel compute the same, in whatever order their operands, results and operators are written.

use pleach_ir::text::print_kernel;
use pleach_ir::{Class, Entry, FlatPart, Kernel, Layout, Op, ValueId, flat_parts};
use std::collections::BTreeMap;

/// Elements of a pattern's tensors, as good as any other number but 1, which stands for one element for all.
const ELEMENTS: u64 = 1024;

/// Parts that compute the same, of any sizes.
pub(super) struct Pattern {
    /// What each part computes, over flat memory of any size.
    pub(super) one: Kernel,
    /// Of each operand of it: the operand of the kernel that all parts have in common.
    pub(super) shared: Vec<Option<u32>>,
    /// The parts, shortest first.
    pub(super) parts: Vec<Part>,
}

/// A part of a kernel.
pub(super) struct Part {
    pub(super) elements: u64,
    /// Operands and results in the order of the pattern, by their numbers in the kernel.
    pub(super) operands: Vec<u32>,
    pub(super) results: Vec<u32>,
    /// The values of the kernel's body that those of the pattern's stand for.
    pub(super) values: Vec<ValueId>,
}

/// The patterns of a kernel that is several flat kernels side by side; `None` for any other.
pub(super) fn patterns(k: &Kernel) -> Option<Vec<Pattern>> {
    let plain = k.operands.iter().chain(&k.results).all(|l| *l == Layout::RowMajor);
    if k.class != Class::Row || !plain || k.body.roots.len() < 2 {
        return None;
    }
    let list = flat_parts(k)?;
    if list.len() < 2 {
        return None;
    }
    let operands: BTreeMap<ValueId, u32> = k.body.inputs().iter().zip(0..).map(|((v, _), i)| (*v, i)).collect();
    let mut found: Vec<(String, Pattern)> = vec![];
    for p in &list {
        let (one, part) = Turn::of(k, &operands, p)?;
        let key = print_kernel(&one);
        match found.iter_mut().find(|f| f.0 == key) {
            Some((_, pattern)) => pattern.parts.push(part),
            None => found.push((key, Pattern { one, shared: vec![], parts: vec![part] })),
        }
    }
    let mut out: Vec<Pattern> = found.into_iter().map(|f| f.1).collect();
    for p in &mut out {
        let first = p.parts[0].operands.clone();
        let same = |i: usize| p.parts.iter().all(|x| x.operands[i] == first[i]);
        p.shared = (0..first.len()).map(|i| same(i).then_some(first[i])).collect();
        p.parts.sort_by_key(|x| x.elements);
    }
    Some(out)
}

/// A part being written in the order that its results ask for.
struct Turn<'a> {
    k: &'a Kernel,
    body: Entry,
    /// Where a value stands in the new body.
    place: BTreeMap<ValueId, ValueId>,
    operands: &'a BTreeMap<ValueId, u32>,
    taken: Vec<u32>,
    values: Vec<ValueId>,
}

impl Turn<'_> {
    /// A part as a kernel of its own.
    fn of(k: &Kernel, operands: &BTreeMap<ValueId, u32>, p: &FlatPart) -> Option<(Kernel, Part)> {
        let marks = marks(&k.body, p);
        let mut roots = p.roots.clone();
        roots.sort_by_key(|r| marks[&k.body.roots[*r].value]);
        let body = Entry::new("kernel");
        let mut t = Turn { k, body, place: BTreeMap::new(), operands, taken: vec![], values: vec![] };
        for (i, r) in roots.iter().enumerate() {
            let v = t.put(k.body.roots[*r].value)?;
            t.body.output(format!("r{i}"), v);
        }
        let over = |r: &usize| k.aliases[*r].and_then(|a| t.taken.iter().position(|o| *o == a)).map(|a| a as u32);
        let one = Kernel {
            name: k.name.clone(),
            class: Class::Row,
            operands: vec![Layout::RowMajor; t.taken.len()],
            results: vec![Layout::RowMajor; roots.len()],
            aliases: roots.iter().map(over).collect(),
            body: t.body,
        };
        let results = roots.iter().map(|r| *r as u32).collect();
        Some((one, Part { elements: p.elements, operands: t.taken, results, values: t.values }))
    }

    /// A value with all that it needs.
    fn put(&mut self, v: ValueId) -> Option<ValueId> {
        if let Some(at) = self.place.get(&v) {
            return Some(*at);
        }
        let n = self.k.body.node(v);
        let inputs = n.inputs.iter().map(|i| self.put(*i)).collect::<Option<Vec<_>>>()?;
        let shape = if n.ty.rank() == 0 { vec![] } else { vec![ELEMENTS.into()] };
        let op = match &n.op {
            Op::Input { dtype, .. } => {
                self.taken.push(*self.operands.get(&v)?);
                Op::Input { name: format!("a{}", self.taken.len() - 1), dtype: *dtype, shape }
            }
            Op::Const { dtype, bits, .. } => {
                let number = Op::Const { dtype: *dtype, shape: vec![], bits: vec![*bits.first()?] };
                if shape.is_empty() {
                    number
                } else {
                    let x = self.push(number, &[], v)?;
                    return self.keep(Op::Broadcast { shape, axes: vec![] }, &[x], v);
                }
            }
            Op::Broadcast { .. } => Op::Broadcast { shape, axes: vec![] },
            op => op.clone(),
        };
        self.keep(op, &inputs, v)
    }

    fn keep(&mut self, op: Op, inputs: &[ValueId], v: ValueId) -> Option<ValueId> {
        let at = self.push(op, inputs, v)?;
        self.place.insert(v, at);
        Some(at)
    }

    fn push(&mut self, op: Op, inputs: &[ValueId], of: ValueId) -> Option<ValueId> {
        self.values.push(of);
        self.body.push(&[], op, inputs).ok()
    }
}

/// A mark of what each value of a part computes, whatever its operands are. It orders the results.
fn marks(body: &Entry, p: &FlatPart) -> BTreeMap<ValueId, u64> {
    let mut out: BTreeMap<ValueId, u64> = BTreeMap::new();
    for v in &p.values {
        let n = body.node(*v);
        let what = match &n.op {
            Op::Input { .. } => "operand".to_string(),
            Op::Const { bits, .. } => format!("{}", bits[0]),
            Op::Broadcast { .. } => "all".to_string(),
            op => format!("{op:?}"),
        };
        let inputs: Vec<u64> = n.inputs.iter().map(|i| out.get(i).copied().unwrap_or(0)).collect();
        let text = format!("{what} {:?} {} {inputs:?}", n.ty.dtype, n.ty.rank() > 0);
        // FNV-1a; equal marks of different values leave results in the order they have.
        let mark = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        out.insert(*v, mark);
    }
    out
}
