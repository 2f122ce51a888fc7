//! LoLDU: of W = P · L · D · U only a part of the diagonal is trained (Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper
//! Decomposition for Parameter-Efficient Fine-Tuning"), as the authors' `minloldu` has it.
//!
//! With L_r = (P · L)[:, :r] and U_r = U[:r], whose diagonal is one: y = x · (W − s₀ · L_r · diag(z₀) · U_r)ᵀ + s · ((x · U_rᵀ) ∘ z) · L_rᵀ. The vector
//! z [r] starts as z₀ = D[:r], the number s as s₀ = alpha / r; both are trained. All but z and s follows from W, so folders hold these alone.

use std::sync::Arc;

use pleach_ir::{BinaryOp, Op, ValueId};
use serde_json::Value;

use super::decompose::{first_of_lu, values};
use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::prepare::{Given, Values, floats};
use super::{Init, LowRank, Site};
use crate::error::Result;
use crate::peft::Target;

/// The parts of the branch: L_r [out, r], U_r [r, in], z₀ [r].
const FIXED: [&str; 3] = ["loldu_L", "loldu_U", "initial_z"];
/// The part, and the name in files, of z.
const DIAGONAL: &str = "vector_z";
/// The part, and the name in files, of s.
const SCALE: &str = "scaling_factor";

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "loldu", keys: &[("peft_type", Key::Text("LOLDU"))], read: |_| Ok(Arc::new(Loldu)) };

/// LoLDU.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Loldu;

impl Method for Loldu {
    fn name(&self) -> &'static str {
        "loldu"
    }

    fn formula(&self) -> &'static str {
        "W' = W + P·L_r·diag(s·z − s₀·z₀)·U_r, W = P·L·D·U, z₀ = D[:r]; z and s trained"
    }

    fn peft_type(&self) -> &'static str {
        "LOLDU"
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        let most = target.input.min(target.output);
        if target.rank > most {
            return Err(format!("has {most} pivots, fewer than r = {}", target.rank));
        }
        Ok(())
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let r = site.rank;
        let shapes = [vec![site.output, r], vec![r, site.input], vec![r]];
        let fixed =
            |(part, shape): (&'static str, Vec<u64>)| Buffer::frozen(part, None, &shape, Init::Prepared { kept: None });
        let mut buffers: Vec<Buffer> = FIXED.into_iter().zip(shapes).map(fixed).collect();
        buffers.push(Buffer::trained(DIAGONAL, DIAGONAL, &[r], Init::Prepared { kept: None }));
        buffers.push(Buffer::trained(SCALE, SCALE, &[], Init::Constant { value: site.scale as f32 }));
        buffers.push(Buffer::constant("scale", site.scale));
        buffers
    }

    fn prepare(&self, given: &Given) -> Result<Values> {
        let site = given.site;
        let (l, d, u) = first_of_lu(given.matrix().as_ref(), site.rank as usize)?;
        let z: Vec<f32> = d.iter().map(|x| *x as f32).collect();
        let r = site.rank;
        Ok(Values::from([
            (FIXED[0], floats(&[site.output, r], values(l.as_ref()))),
            (FIXED[1], floats(&[r, site.input], values(u.as_ref()))),
            (FIXED[2], floats(&[r], z.clone())),
            (DIAGONAL, floats(&[r], z)),
        ]))
    }

    /// One branch with s · z − s₀ · z₀ takes the place of what the base loses and what is added.
    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (l, u) = (s.buffer(FIXED[0])?, s.buffer(FIXED[1])?);
        let change = change(s)?;
        let narrow = s.times(x, u)?;
        let change = s.over_rows(change, narrow)?;
        let narrow = s.mul(narrow, change)?;
        terms.push(s.times(narrow, l)?);
        Ok(terms)
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (l, down) = (s.buffer(FIXED[0])?, s.buffer(FIXED[1])?);
        let change = change(s)?;
        let change = s.over_rows(change, l)?;
        Ok(Some(LowRank { down, up: s.mul(l, change)?, scale: 1.0 }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![]
    }
}

/// s · z − s₀ · z₀, [r].
fn change(s: &mut Scope) -> Result<ValueId> {
    let (first, z, now) = (s.buffer(FIXED[2])?, s.buffer(DIAGONAL)?, s.buffer(SCALE)?);
    let scale = s.buffer("scale")?;
    let (new, old) = (s.mul(now, z)?, s.mul(scale, first)?);
    s.push(Op::Binary(BinaryOp::Sub), &[new, old])
}
