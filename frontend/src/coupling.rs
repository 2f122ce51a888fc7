//! Which layers hang together: the outputs of the producers of a coupling are, unit by unit, the inputs of its consumer.
//!
//! A unit is what can change places without changing what the model computes, provided that all members change places alike: a channel
//! of a feedforward block, or a key/value head together with the query heads that read it. Everything between producers and
//! consumer treats units alike: activations element by element, attention head by head.

use crate::modules::{Module, ModuleTable};

/// The side of a coupling that a layer is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its outputs are units: rows of W [out, in].
    Produces,
    /// Its inputs are units: columns of W.
    Consumes,
}

/// The part of a layer in a coupling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Path of the coupling's consumer, which names the coupling.
    pub consumer: String,
    /// The layer's side.
    pub side: Side,
    /// Units of the coupling.
    pub units: u64,
    /// Rows or columns of the layer that are one unit.
    pub width: u64,
    /// The same of the coupling's narrowest member: 1 in a feedforward block, the width of a head in attention.
    pub narrowest: u64,
}

/// A coupling: its members are one consumer and its producers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coupling {
    /// Path of the consumer.
    pub consumer: String,
    /// Units.
    pub units: u64,
    /// Paths of all members with their parts, in module order.
    pub members: Vec<(String, Member)>,
}

impl Member {
    /// The axis of W [out, in] that units lie along.
    pub fn axis(&self) -> u8 {
        match self.side {
            Side::Produces => 0,
            Side::Consumes => 1,
        }
    }
}

impl ModuleTable {
    /// All couplings, in the order of their first members.
    pub fn couplings(&self) -> Vec<Coupling> {
        let mut list: Vec<Coupling> = vec![];
        for m in self.iter() {
            let Some(member) = m.member.clone() else { continue };
            let entry = (m.path.clone(), member);
            match list.iter_mut().find(|c| c.consumer == entry.1.consumer) {
                Some(c) => c.members.push(entry),
                None => list.push(Coupling {
                    consumer: entry.1.consumer.clone(),
                    units: entry.1.units,
                    members: vec![entry],
                }),
            }
        }
        list
    }
}

/// Marks the members of a coupling with `units` units among finished modules; producers with the width of a unit in their outputs.
pub(crate) fn couple(modules: &mut [Module], units: u64, producers: &[(String, u64)], consumer: (&str, u64)) {
    let narrowest = producers.iter().map(|p| p.1).min().unwrap_or(1).min(consumer.1).max(1);
    let mut mark = |path: &str, side: Side, width: u64| {
        if let Some(m) = modules.iter_mut().rev().find(|m| m.path == path) {
            m.member = Some(Member { consumer: consumer.0.to_owned(), side, units, width, narrowest });
        }
    };
    for (path, width) in producers {
        mark(path, Side::Produces, *width);
    }
    mark(consumer.0, Side::Consumes, consumer.1);
}
