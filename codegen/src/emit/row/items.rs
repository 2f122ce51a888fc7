//! What a row's passes have to leave: results, reductions, and values that later passes read again.

use super::model::{Mode, product};
use super::nest::{Item, What};
use super::plan::Planner;
use super::pull::{Saved, scratch_type};
use crate::emit::expr::Buf;
use pleach_ir::Op;

impl Planner {
    /// Finds what the passes compute: results, values to keep, reductions.
    pub(super) fn find_items(&mut self) -> Result<(), String> {
        let m = &self.b.model;
        let (results, reductions) = (m.results.clone(), m.reductions.clone());
        let last = results.iter().map(|r| m.level[*r]).max().unwrap_or(0);
        // Results first: they are where later passes find values again.
        for (i, r) in results.iter().enumerate() {
            let node = self.strip(*r);
            let level = self.b.model.level[node];
            let dtype = self.b.model.nodes[node].dtype;
            let (nest, axes) = self.value_nest(node);
            let result = Buf::Result(i as u32);
            if self.deferred.contains(&(i as u32)) {
                let slot = self.slot(self.b.row_elements(node), dtype);
                let buf = Buf::Scratch(slot);
                let what = What::Store { buf, dtype: scratch_type(dtype) };
                self.items.push(Item { what, node, level, nest: nest.clone(), axes: axes.clone() });
                self.b.saved.insert(node, Saved { buf, level });
                let what = What::Store { buf: result, dtype };
                self.items.push(Item { what, node, level: last.max(level) + 1, nest, axes });
                continue;
            }
            self.items.push(Item { what: What::Store { buf: result, dtype }, node, level, nest, axes });
            let plain = matches!(self.b.model.nodes[node].op, Op::Input { .. } | Op::Const { .. } | Op::Iota { .. });
            if !plain && !self.b.saved.contains_key(&node) {
                self.b.saved.insert(node, Saved { buf: result, level });
            }
        }
        self.keep_heavy();
        for r in reductions {
            let shape = self.b.within(&self.b.model.nodes[r].shape).to_vec();
            let small = shape.iter().all(|d| d.known() == Some(1));
            self.b.registers.insert(r, small);
            if !small {
                let s = self.slot(product(&shape), self.b.model.nodes[r].dtype);
                self.b.slot_of.insert(r, s);
            }
        }
        for r in self.b.model.reductions.clone() {
            let (nest, axes) = self.reduction_nest(r)?;
            let (node, level) = (self.b.model.nodes[r].inputs[0], self.b.model.level[r] - 1);
            self.items.push(Item { what: What::Reduce(r), node, level, nest, axes });
        }
        Ok(())
    }

    /// A result that only shows its operand under another shape is stored in the operand's shape.
    fn strip(&self, mut n: usize) -> usize {
        while let Op::Reshape(_) = self.b.model.nodes[n].op {
            let x = self.b.model.nodes[n].inputs[0];
            let (a, b) = (&self.b.model.nodes[n].shape, &self.b.model.nodes[x].shape);
            let whole = self.b.mode == Mode::One;
            if a.is_empty() || b.is_empty() || (!whole && a[0] != b[0]) || self.b.saved.contains_key(&n) {
                break;
            }
            n = x;
        }
        n
    }

    /// Values that cost much and that passes of different levels read.
    fn keep_heavy(&mut self) {
        let saved = self.b.saved.clone();
        let stop = |i: usize, level: u32| saved.get(&i).is_some_and(|s| level > s.level);
        let wanted = |i: usize| {
            let shape = &self.b.model.nodes[i].shape;
            let rows = self.b.mode == Mode::One || shape.first() == Some(&self.b.model.rows);
            rows && self.b.is_heavy(i) && self.b.row_elements(i).known() != Some(1)
        };
        let levels = self.b.model.read_levels(wanted, &stop);
        for (node, l) in levels.into_iter().enumerate() {
            let (Some(first), true) = (l.first().copied(), l.len() > 1 && !self.b.saved.contains_key(&node)) else {
                continue;
            };
            let dtype = self.b.model.nodes[node].dtype;
            let slot = self.slot(self.b.row_elements(node), dtype);
            let (nest, axes) = self.value_nest(node);
            let what = What::Store { buf: Buf::Scratch(slot), dtype: scratch_type(dtype) };
            self.items.push(Item { what, node, level: first, nest, axes });
            self.b.saved.insert(node, Saved { buf: Buf::Scratch(slot), level: first });
        }
    }
}
