//! Ranks that are left out when an adapter is saved: a slot holds the most that there may be, the file those in use.
//!
//! In use is what is not zero in a tensor that the plan names. Checkpoints hold such tensors whole.

use super::adapter::AdapterPlan;
use super::machine::Machine;
use crate::error::Result;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// Where a configuration says which ranks there are.
const PATTERN: &str = "rank_pattern";

/// What is saved of a tensor.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Kept {
    /// Key of the tensor whose zeros are left out.
    pub by: String,
    /// Axes along which they are; none where only cells are kept, in their order.
    pub axes: Vec<u8>,
}

/// The entry of one site in `rank_pattern`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct SiteRanks {
    /// Its name there.
    pub name: String,
    /// Key of the tensor whose zeros are left out.
    pub by: String,
    /// Whether it is a truth per rank in place of a number.
    pub flags: bool,
    /// Whether it is there even if nothing is left out.
    pub always: bool,
}

impl AdapterPlan {
    /// What of a tensor of the slot is not zero.
    pub(super) fn in_use(&self, machine: &dyn Machine, key: &str) -> Result<Vec<bool>> {
        // A site without ranks has no parameters.
        if self.tensors.iter().any(|t| t.key == key && t.shape.contains(&0)) {
            return Ok(vec![]);
        }
        let v = machine.read(&format!("slot{}.{key}", self.slot))?;
        Ok(v.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b) != 0.0).collect())
    }

    /// Writes `rank_pattern`. Truths that the configuration holds already are about ranks of which the slot has the true ones.
    pub(super) fn put_ranks(&self, machine: &dyn Machine, config: &mut Map<String, Value>) -> Result<()> {
        let used = self.ranks.iter().map(|s| self.in_use(machine, &s.by)).collect::<Result<Vec<_>>>()?;
        if used.iter().flatten().all(|u| *u) && !self.ranks.iter().any(|s| s.always) {
            // The configuration says it already.
            return Ok(());
        }
        let old = match config.remove(PATTERN) {
            Some(Value::Object(old)) => old,
            _ => Map::new(),
        };
        let mut pattern = Map::new();
        for (site, used) in self.ranks.iter().zip(used) {
            let entry = match (site.flags, old.get(&site.name)) {
                (false, _) => used.iter().filter(|u| **u).count().into(),
                (true, Some(Value::Array(old))) => {
                    let mut of_slot = used.iter();
                    let flag = |was: &Value| was.as_bool() == Some(true) && of_slot.next().is_some_and(|u| *u);
                    old.iter().map(flag).collect::<Vec<bool>>().into()
                }
                (true, _) => used.into(),
            };
            pattern.insert(site.name.clone(), entry);
        }
        config.insert(PATTERN.into(), pattern.into());
        Ok(())
    }
}

/// The elements of a tensor, `element` bytes each, whose place along every one of these axes is in use; without axes, the cells in use as a
/// list.
pub(super) fn select<'b>(
    shape: &[u64],
    bytes: &Cow<'b, [u8]>,
    element: usize,
    axes: &[u8],
    used: &[bool],
) -> (Vec<u64>, Cow<'b, [u8]>) {
    if axes.is_empty() {
        let cells = bytes.chunks_exact(element).zip(used).filter(|(_, u)| **u);
        let cells: Vec<u8> = cells.flat_map(|(x, _)| x).copied().collect();
        return (vec![(cells.len() / element) as u64], Cow::Owned(cells));
    }
    if used.iter().all(|u| *u) {
        return (shape.to_vec(), bytes.clone());
    }
    let count = used.iter().filter(|u| **u).count() as u64;
    let along = |axis: usize| axes.contains(&(axis as u8));
    let new = shape.iter().enumerate().map(|(i, d)| if along(i) { count } else { *d }).collect();
    let stays = |place: usize| {
        let mut rest = place;
        (0..shape.len()).rev().all(|axis| {
            let (width, at) = (shape[axis].max(1) as usize, rest % shape[axis].max(1) as usize);
            rest /= width;
            !along(axis) || used.get(at).copied().unwrap_or(false)
        })
    };
    let chosen = bytes.chunks_exact(element).enumerate().filter(|(place, _)| stays(*place));
    (new, Cow::Owned(chosen.flat_map(|(_, x)| x).copied().collect()))
}

/// The places of what is in use in a tensor, i64 [axes, n].
pub(super) fn places(shape: &[u64], used: &[bool]) -> (Vec<u64>, Vec<u8>) {
    let flat: Vec<u64> = (0u64..).zip(used).filter(|(_, u)| **u).map(|(i, _)| i).collect();
    let mut bytes = vec![];
    for axis in 0..shape.len() {
        let below: u64 = shape[axis + 1..].iter().product();
        bytes.extend(flat.iter().flat_map(|i| ((i / below.max(1) % shape[axis].max(1)) as i64).to_le_bytes()));
    }
    (vec![shape.len() as u64, flat.len() as u64], bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_rows_columns_and_both() {
        let bytes: Vec<u8> = (0..9u32).flat_map(u32::to_le_bytes).collect();
        let used = [true, false, true];
        let get = |axes: &[u8]| {
            let (shape, b) = select(&[3, 3], &Cow::Borrowed(&bytes[..]), 4, axes, &used);
            let values: Vec<u32> = b.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            (shape, values)
        };
        assert_eq!(get(&[0]), (vec![2, 3], vec![0, 1, 2, 6, 7, 8]));
        assert_eq!(get(&[1]), (vec![3, 2], vec![0, 2, 3, 5, 6, 8]));
        assert_eq!(get(&[0, 1]), (vec![2, 2], vec![0, 2, 6, 8]));
        let cells = [false, true, false, false, false, true, false, true, true];
        let (shape, b) = select(&[3, 3], &Cow::Borrowed(&bytes[..]), 4, &[], &cells);
        let values: Vec<u32> = b.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        assert_eq!((shape, values), (vec![4], vec![1, 5, 7, 8]));
        let (shape, b) = places(&[3, 3], &cells);
        let values: Vec<i64> = b.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        assert_eq!((shape, values), (vec![2, 4], vec![0, 1, 2, 2, 1, 2, 1, 2]));
    }
}
