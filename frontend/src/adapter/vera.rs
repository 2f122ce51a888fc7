//! VeRA: one pair of fixed random matrices for all layers, of which each learns to scale rank and outputs (Kopiczko et al. 2023,
//! "VeRA: Vector-based Random Matrix Adaptation").
//!
//! y += b ∘ ((d ∘ (x · Aᵀ)) · Bᵀ) with A [r, in] and B [out, r] cut from matrices of the widest layer; d [r] starts at `d_initial`, b
//! [out] at zero. A file that holds no A and B (`save_projection` off) means those that PyTorch draws from `projection_prng_key`.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "vera", keys: &[("peft_type", Key::Text("VERA"))], read: |f| Ok(Arc::new(Vera::read(f)?)) };

/// VeRA.
#[derive(Debug, Clone)]
struct Vera {
    seed: u64,
    saved: bool,
    d_initial: f64,
    /// Whether the vectors start as they should rather than for tests.
    usual: bool,
}

impl Vera {
    fn read(f: &mut Fields) -> Result<Vera> {
        Ok(Vera {
            seed: f.whole("projection_prng_key")?.unwrap_or(0),
            saved: f.flag("save_projection")?.unwrap_or(true),
            d_initial: f.number("d_initial")?.unwrap_or(0.1),
            usual: f.flag("init_weights")?.unwrap_or(true),
        })
    }
}

impl Method for Vera {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + b ∘ ((d ∘ (x·Aᵀ))·Bᵀ), A and B fixed, one pair for all layers"
    }

    fn peft_type(&self) -> &'static str {
        "VERA"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn default_rank(&self) -> u64 {
        256
    }

    fn shared(&self, site: &Site) -> Vec<Buffer> {
        let (input, output) = site.widest;
        // Kaiming's uniform: √(6 / fan in).
        let bound = |fan: u64| (6.0 / fan as f64).sqrt() as f32;
        let draw = |skip, fan| Init::Twister { seed: self.seed, skip, bound: bound(fan) };
        let file = |name| self.saved.then_some(name);
        vec![
            Buffer::frozen("vera_A", file("vera_A"), &[site.rank, input], draw(0, input)),
            Buffer::frozen("vera_B", file("vera_B"), &[output, site.rank], draw(site.rank * input, site.rank)),
        ]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let d = if self.usual { Init::Constant { value: self.d_initial as f32 } } else { Init::Normal { std: 1.0 } };
        let b = if self.usual { Init::Zeros {} } else { Init::Constant { value: 1.0 } };
        vec![
            Buffer::trained("vera_lambda_b", "vera_lambda_b", &[site.output], b),
            Buffer::trained("vera_lambda_d", "vera_lambda_d", &[site.rank], d),
        ]
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (input, output) = (s.site().input, s.site().output);
        let (a, b) = (s.buffer("vera_A")?, s.buffer("vera_B")?);
        let (a, b) = (s.head(a, 1, input)?, s.head(b, 0, output)?);
        let narrow = s.times(x, a)?;
        let narrow = weighted(s, "vera_lambda_d", narrow)?;
        let wide = s.times(narrow, b)?;
        terms.push(weighted(s, "vera_lambda_b", wide)?);
        Ok(terms)
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("bias", json!("none")),
            ("d_initial", json!(self.d_initial)),
            ("fan_in_fan_out", json!(false)),
            ("init_weights", json!(self.usual)),
            ("projection_prng_key", json!(self.seed)),
            ("save_projection", json!(self.saved)),
            ("vera_dropout", json!(0.0)),
        ]
    }
}

/// A learned vector over the rows of x.
fn weighted(s: &mut Scope, part: &str, x: ValueId) -> Result<ValueId> {
    let v = s.buffer(part)?;
    let v = s.over_rows(v, x)?;
    s.mul(x, v)
}
