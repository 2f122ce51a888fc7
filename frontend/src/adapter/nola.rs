//! NOLA: the factors of LoRA are learned mixtures of fixed random matrices (Koohpayegani et al. 2023, "NOLA: Compressing LoRA using Linear
//! Combination of Random Basis").
//!
//! A = Σ αᵢ · Aᵢ and B = Σ βⱼ · Bⱼ; α and β [k] are trained, y += scale · (x · Aᵀ) · Bᵀ. The k matrices are those of the widest layer,
//! drawn from `projection_prng_key`, of which every layer takes its part; they are saved only if `save_projection` is on. β starts at
//! zero. PEFT has no such class.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, LowRank, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "nola", keys: &[("peft_type", Key::Text("NOLA"))], read: |f| Ok(Arc::new(Nola::read(f)?)) };

/// NOLA.
#[derive(Debug, Clone)]
struct Nola {
    count: u64,
    seed: u64,
    saved: bool,
}

impl Nola {
    fn read(f: &mut Fields) -> Result<Nola> {
        Ok(Nola {
            count: f.count("num_basis", 1 << 20)?.unwrap_or(64),
            seed: f.whole("projection_prng_key")?.unwrap_or(0),
            saved: f.flag("save_projection")?.unwrap_or(false),
        })
    }
}

impl Method for Nola {
    fn name(&self) -> &'static str {
        "nola"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/r · (x·Aᵀ)·Bᵀ, A = Σ αᵢ·Aᵢ, B = Σ βⱼ·Bⱼ, Aᵢ and Bⱼ fixed"
    }

    fn peft_type(&self) -> &'static str {
        "NOLA"
    }

    fn shared(&self, site: &Site) -> Vec<Buffer> {
        let (r, (input, output)) = (site.rank, site.widest);
        let draw = |fan: u64| Init::Seeded { seed: self.seed, bound: (fan as f32).sqrt().recip() };
        let file = |name| self.saved.then_some(name);
        vec![
            Buffer::frozen("nola_basis_A", file("nola_basis_A"), &[self.count, r, input], draw(input)),
            Buffer::frozen("nola_basis_B", file("nola_basis_B"), &[self.count, output, r], draw(r)),
        ]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let start = Init::Normal { std: (self.count as f32).sqrt().recip() };
        vec![
            Buffer::trained("nola_alpha", "nola_alpha", &[self.count], start),
            Buffer::trained("nola_beta", "nola_beta", &[self.count], Init::Zeros {}),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (a, b) = self.factors(s)?;
        let narrow = s.times(x, a)?;
        let wide = s.times(narrow, b)?;
        let scale = s.buffer("scale")?;
        terms.push(s.mul(scale, wide)?);
        Ok(terms)
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (down, up) = self.factors(s)?;
        Ok(Some(LowRank { down, up, scale: s.site().scale }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("num_basis", json!(self.count)),
            ("projection_prng_key", json!(self.seed)),
            ("save_projection", json!(self.saved)),
        ]
    }
}

impl Nola {
    /// A [r, in] and B [out, r].
    fn factors(&self, s: &mut Scope) -> Result<(ValueId, ValueId)> {
        let (r, input, output) = (s.site().rank, s.site().input, s.site().output);
        let (a, b) = (s.buffer("nola_basis_A")?, s.buffer("nola_basis_B")?);
        let (a, b) = (s.head(a, 2, input)?, s.head(b, 1, output)?);
        Ok((self.mixed(s, "nola_alpha", a, [r, input])?, self.mixed(s, "nola_beta", b, [output, r])?))
    }

    /// The sum of matrices [count, …], each with its factor.
    fn mixed(&self, s: &mut Scope, factors: &str, basis: ValueId, shape: [u64; 2]) -> Result<ValueId> {
        let factors = s.buffer(factors)?;
        let factors = s.reshape(factors, &[1, self.count])?;
        let basis = s.reshape(basis, &[self.count, shape[0] * shape[1]])?;
        let sum = s.matmul(factors, false, basis, false)?;
        s.reshape(sum, &shape)
    }
}
