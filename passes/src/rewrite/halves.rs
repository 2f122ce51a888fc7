//! The two halves of an entry that computes gradients, and when a region's inputs are there.
//!
//! A value belongs to the backward half when it depends on the factor of the loss that every gradient starts from. A
//! region may then hold values of both halves, and something outside may lie between its outputs and its inputs. Each
//! value gets a counter that never falls along an edge, rises on every edge that enters or leaves a region, and is higher
//! in the backward half than anywhere in the forward half. A new form of an output that reads no input with a higher
//! counter than the output has can never make a circle, in whatever way all the other regions are rewritten.

use super::lang::{Known, Stage};
use crate::recompute::SEED;
use pleach_ir::{Entry, Op, ValueId};

/// The halves of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Halves {
    /// Belongs to the backward half, by value.
    pub late: Vec<bool>,
    /// There is a backward half.
    pub both: bool,
}

impl Halves {
    /// The halves of an entry.
    pub fn of(e: &Entry) -> Halves {
        let mut late: Vec<bool> = vec![];
        for n in &e.nodes {
            let seed = matches!(&n.op, Op::Input { name, .. } if name == SEED);
            late.push(seed || n.inputs.iter().any(|i| late[i.index()]));
        }
        let both = late.iter().any(|l| *l);
        Halves { late, both }
    }

    /// The counter of every value, where values with the same unit are in one region.
    pub fn counters(&self, e: &Entry, known: &[Known], unit: &[Option<usize>]) -> Vec<u32> {
        let mut at = vec![0u32; e.nodes.len()];
        let of = |v: ValueId| unit[v.index()].ok_or(v);
        for late in [false, true] {
            let floor = if late { at.iter().max().map_or(0, |m| m + 1) } else { 0 };
            for v in e.values().filter(|v| known[v.index()] == Known::Run && self.late[v.index()] == late) {
                let run = e.node(v).inputs.iter().filter(|u| known[u.index()] == Known::Run);
                let before = run.map(|&u| at[u.index()] + u32::from(of(u) != of(v))).max().unwrap_or(0);
                at[v.index()] = before.max(floor);
            }
        }
        at
    }

    /// Stages of these inputs of one region: their counters, numbered from 0, so that equal regions have equal ones.
    pub fn stages(&self, counters: &[u32], inputs: &[ValueId]) -> Vec<Stage> {
        let mut all: Vec<u32> = inputs.iter().map(|v| counters[v.index()]).collect();
        all.sort_unstable();
        all.dedup();
        inputs
            .iter()
            .map(|v| Stage {
                late: self.late[v.index()],
                step: all.partition_point(|c| *c < counters[v.index()]) as u32,
            })
            .collect()
    }
}
