//! Which values of a kernel's body each line is written for.

use super::Func;
use pleach_ir::{Kernel, ValueId};
use std::fmt::Write;

impl Func {
    /// Says which kernel this is: lines that use its buffers are for its operands and results, and lines that are said to be for
    /// nothing else are for these values.
    pub fn is_for(&mut self, k: &Kernel, values: &[ValueId]) {
        let operands = k.body.inputs();
        self.buffers = operands.iter().map(|(v, _)| vec![*v]).collect();
        for (r, over) in k.body.roots.iter().zip(&k.aliases) {
            let over = over.and_then(|a| operands.get(a as usize)).map(|x| x.0);
            self.buffers.push(std::iter::once(r.value).chain(over).collect());
        }
        self.set_values(values);
    }

    fn set_values(&mut self, values: &[ValueId]) {
        let list: String = values.iter().map(|v| format!(" {}", self.shown(*v))).collect();
        self.end = if list.is_empty() { "".into() } else { format!(" //{list}").into() };
        self.values = values.into();
    }

    /// Names values by these, in whose place the kernel's body has its own; nothing for its own names.
    pub fn instead_of(&mut self, values: &[ValueId]) {
        self.place_of = values.into();
        let now = self.values.clone();
        self.set_values(&now);
    }

    fn shown(&self, v: ValueId) -> ValueId {
        self.place_of.get(v.index()).copied().unwrap_or(v)
    }

    /// What `body` writes is for these values of the kernel's body.
    pub fn of<T>(&mut self, values: &[ValueId], body: impl FnOnce(&mut Func) -> T) -> T {
        let before = (self.values.clone(), self.end.clone());
        self.set_values(values);
        let out = body(self);
        (self.values, self.end) = before;
        out
    }

    /// How a line of a GPU's kernel ends: it is also for the buffers whose parameters it names.
    pub(super) fn end_of(&self, text: &str) -> String {
        let mut end = self.end.to_string();
        let number = |at: usize| {
            let digits = &text[at..];
            let n = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            digits[..n].parse::<usize>().ok()
        };
        let plain = text.match_indices("%p").filter_map(|(i, s)| number(i + s.len()));
        let map = |n: usize| self.maps.get(n).map(|b| *b as usize);
        let maps = text.match_indices("%map").filter_map(|(i, s)| number(i + s.len()).and_then(map));
        let mut more: Vec<ValueId> = plain.chain(maps).filter_map(|b| self.buffers.get(b)).flatten().copied().collect();
        more.sort_unstable();
        more.dedup();
        for v in more.iter().filter(|v| !self.values.contains(v)) {
            let sign = if end.is_empty() { " //" } else { "" };
            let _ = write!(end, "{sign} {}", self.shown(*v));
        }
        end
    }
}

/// The values of a kernel's body that a line of MLIR says it was written for.
pub fn values_of(line: &str) -> impl Iterator<Item = ValueId> + '_ {
    let list = line.split_once(" // %").map_or("", |x| x.1);
    list.split(" %").filter_map(|n| n.parse().ok().map(ValueId))
}
