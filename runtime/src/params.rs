//! Parameters by name: what training keeps, saves and brings back.
//!
//! Only parameters that the session owns can be written; the mapped files never are. A write makes every preparation
//! that depends on the parameter due again.
#![allow(unsafe_code)]

use crate::error::{Result, RuntimeError};
use crate::session::Session;
use crate::weights::nearest;
use pleach_plan::{BufferKind, DType, Layout, Param, Source, Step};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// The values of a parameter: in memory of the session, or a copy where a device has memory of its own.
#[derive(Clone, Debug)]
pub struct ParamValues<'s> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions at capacity.
    pub shape: Vec<u64>,
    /// Elements, row-major, little endian.
    pub bytes: Cow<'s, [u8]>,
}

impl Session {
    /// The values of a parameter that stays in memory.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] for an unknown name, a parameter that only preparations read, or one in panels.
    pub fn read_param(&self, name: &str) -> Result<ParamValues<'_>> {
        let (i, p) = self.param(name)?;
        let at = self.params[i];
        if at.is_null() || p.layout != Layout::RowMajor {
            return Err(RuntimeError::Values(format!("parameter `{name}` is not kept as rows that can be read")));
        }
        let bytes = p.bytes.eval(&self.capacity)?;
        let shape = p.shape.iter().map(|d| d.eval(&self.capacity)).collect::<std::result::Result<_, _>>()?;
        let bytes = if self.device.shares_memory() {
            // SAFETY: the parameter has this many bytes and stays untouched while the session is borrowed.
            Cow::Borrowed(unsafe { std::slice::from_raw_parts(at, bytes as usize) })
        } else {
            let mut copy = vec![0; bytes as usize];
            // SAFETY: the parameter has this many bytes.
            unsafe { self.device.read(at, &mut copy)? };
            Cow::Owned(copy)
        };
        Ok(ParamValues { dtype: p.dtype, shape, bytes })
    }

    /// Overwrites a parameter that the session owns, and marks what depends on it as due.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] for an unknown name, a parameter in a mapped file, another type or another size.
    pub fn write_param(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        let (i, p) = self.param(name)?;
        let at = self.params[i];
        let mapped = matches!(p.source, Source::Checkpoint(_)) && !self.owned[i];
        if at.is_null() || mapped || p.layout != Layout::RowMajor {
            return Err(RuntimeError::Values(format!("parameter `{name}` is not the session's own; it is only read")));
        }
        let want = p.bytes.eval(&self.capacity)?;
        if p.dtype != dtype || want != bytes.len() as u64 {
            return Err(RuntimeError::Values(format!(
                "parameter `{name}` takes {want} bytes of {}, got {} of {}",
                p.dtype.name(),
                bytes.len(),
                dtype.name()
            )));
        }
        // SAFETY: the parameter is owned and has exactly this size.
        unsafe { self.device.write(at, bytes)? };
        self.make_due(BTreeSet::from([i as u32]), None);
        Ok(())
    }

    fn param(&self, name: &str) -> Result<(usize, &Param)> {
        self.plan.params.iter().enumerate().find(|(_, p)| p.name == name).ok_or_else(|| {
            let near = nearest(self.plan.params.iter().map(|p| p.name.as_str()), name);
            let near = near.map(|n| format!(" (nearest: `{n}`)")).unwrap_or_default();
            RuntimeError::Values(format!("the plan has no parameter `{name}`{near}"))
        })
    }

    /// Marks every preparation that reads one of these parameters, or what such a preparation wrote, and that of `slot`.
    pub(crate) fn make_due(&mut self, mut changed: BTreeSet<u32>, slot: Option<u32>) {
        let plan = self.plan.clone();
        for (i, e) in plan.entries.iter().enumerate() {
            let Some(of) = e.prepares() else { continue };
            let param = |b: &u32| match e.buffers[*b as usize].kind {
                BufferKind::Param(p) => Some(p),
                _ => None,
            };
            let operands = |s: &Step| plan.kernels[s.kernel as usize].operands.len();
            let reads = |s: &Step| s.buffers[..operands(s)].iter().filter_map(param).any(|p| changed.contains(&p));
            if (slot.is_some() && of == slot) || e.steps.iter().any(reads) {
                for s in &e.steps {
                    changed.extend(s.buffers[operands(s)..].iter().filter_map(param));
                }
                self.stale.insert(i);
            }
        }
    }
}
