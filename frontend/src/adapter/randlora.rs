//! RandLoRA: a change of full rank from fixed random matrices that all layers share, each scaled by learned diagonals (Albert et al. 2025,
//! "RandLoRA: Full-rank parameter-efficient fine-tuning of large models").
//!
//! ΔW = scale · B · (λ ∘ A ∘ γ) with A [r, 1, m], B [M, n, r], λ [r, n] and γ [n, m], taken as [M, n·r] times [r·n, m], for m = min(in, out),
//! M = max(in, out) and n = ⌈m / r⌉; turned round where out < in. λ starts at zero, γ at 1 / max(n, m).

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "randlora",
    keys: &[("peft_type", Key::Text("RANDLORA"))],
    read: |f| Ok(Arc::new(RandLora::read(f)?)),
};

/// RandLoRA.
#[derive(Debug, Clone)]
struct RandLora {
    seed: u64,
    usual: bool,
    /// `sparse` and `very_sparse`: how a new adapter's matrices are drawn, which only matters there.
    sparse: [bool; 2],
}

impl RandLora {
    fn read(f: &mut Fields) -> Result<RandLora> {
        if f.flag("save_projection")? == Some(false) {
            let what =
                "is false: its random matrices cannot be drawn again here; save the adapter with `save_projection`";
            return Err(f.fault("save_projection", what));
        }
        Ok(RandLora {
            seed: f.whole("projection_prng_key")?.unwrap_or(0),
            usual: f.flag("init_weights")?.unwrap_or(true),
            sparse: [f.flag("sparse")?.unwrap_or(false), f.flag("very_sparse")?.unwrap_or(false)],
        })
    }
}

impl Method for RandLora {
    fn name(&self) -> &'static str {
        "randlora"
    }

    fn formula(&self) -> &'static str {
        "W' = W + alpha/r · B·(λ ∘ A ∘ γ), A and B fixed, one pair for all layers"
    }

    fn peft_type(&self) -> &'static str {
        "RANDLORA"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        Some("randlora_alpha")
    }

    fn default_rank(&self) -> u64 {
        32
    }

    fn default_alpha(&self, _rank: u64) -> f64 {
        640.0
    }

    fn shared(&self, site: &Site) -> Vec<Buffer> {
        let (r, (input, output)) = (site.rank, site.widest);
        let (small, large) = (input.min(output), input.max(output));
        // Uniform with standard deviation one.
        let draw = || Init::Seeded { seed: self.seed, bound: 3f32.sqrt() };
        vec![
            Buffer::frozen("randlora_A", Some("randlora_A"), &[r, 1, small], draw()),
            Buffer::frozen("randlora_B", Some("randlora_B"), &[large, small.div_ceil(r), r], draw()),
        ]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let small = site.input.min(site.output);
        let bases = small.div_ceil(site.rank);
        let lambda = if self.usual { Init::Zeros {} } else { Init::Normal { std: 1.0 } };
        let gamma = Init::Constant { value: 1.0 / bases.max(small) as f32 };
        vec![
            Buffer::trained("randlora_lambda", "randlora_lambda", &[site.rank, bases], lambda),
            Buffer::trained("randlora_gamma", "randlora_gamma", &[bases, small], gamma),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (r, input, output) = (s.site().rank, s.site().input, s.site().output);
        let (small, large) = (input.min(output), input.max(output));
        let bases = small.div_ceil(r);
        let (a, b) = (s.buffer("randlora_A")?, s.buffer("randlora_B")?);
        let a = s.head(a, 2, small)?;
        let a = s.reshape(a, &[r, small])?;
        let b = s.head(b, 0, large)?;
        let b = s.head(b, 1, bases)?;
        let b = s.reshape(b, &[large, bases * r])?;
        let (lambda, gamma, scale) = (s.buffer("randlora_lambda")?, s.buffer("randlora_gamma")?, s.buffer("scale")?);
        let shape = [r, bases, small];
        let a = s.spread(a, &shape, &[0, 2])?;
        let lambda = s.mul(scale, lambda)?;
        let lambda = s.spread(lambda, &shape, &[0, 1])?;
        let gamma = s.spread(gamma, &shape, &[1, 2])?;
        let a = s.mul(lambda, a)?;
        let a = s.mul(a, gamma)?;
        let a = s.reshape(a, &[r * bases, small])?;
        let delta = match small == input {
            true => s.matmul(b, false, a, false)?,
            false => s.matmul(a, true, b, true)?,
        };
        s.sum(&[weight, delta])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(false)),
            ("init_weights", json!(self.usual)),
            ("projection_prng_key", json!(self.seed)),
            ("randlora_dropout", json!(0.0)),
            ("save_projection", json!(true)),
            ("sparse", json!(self.sparse[0])),
            ("very_sparse", json!(self.sparse[1])),
        ]
    }
}
