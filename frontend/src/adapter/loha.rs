//! LoHa: the change of a weight is the elementwise product of two of low rank (Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard
//! Product for Communication-Efficient Federated Learning"), as LyCORIS and PEFT have it.
//!
//! W' = W + scale · (A₁ · B₁) ∘ (A₂ · B₂), A [out, r], B [r, in], scale = alpha / r; B₂ starts at zero.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "loha", keys: &[("peft_type", Key::Text("LOHA"))], read: |f| Ok(Arc::new(LoHa::read(f)?)) };

/// LoHa.
#[derive(Debug, Clone)]
struct LoHa {
    /// Whether B₂ starts at zero rather than at random, which is for tests.
    zero: bool,
}

impl LoHa {
    fn read(f: &mut Fields) -> Result<LoHa> {
        // It concerns convolutions.
        f.raw("use_effective_conv2d");
        Ok(LoHa { zero: f.flag("init_weights")?.unwrap_or(true) })
    }
}

impl Method for LoHa {
    fn name(&self) -> &'static str {
        "loha"
    }

    fn formula(&self) -> &'static str {
        "W' = W + alpha/r · (A₁·B₁) ∘ (A₂·B₂)"
    }

    fn peft_type(&self) -> &'static str {
        "LOHA"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        Some("alpha")
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (up, down) = ([site.output, site.rank], [site.rank, site.input]);
        let last = if self.zero { Init::Zeros {} } else { Init::fan_in(site.input) };
        vec![
            Buffer::trained("hada_w1_a", "hada_w1_a", &up, Init::fan_in(site.rank)),
            Buffer::trained("hada_w1_b", "hada_w1_b", &down, Init::fan_in(site.input)),
            Buffer::trained("hada_w2_a", "hada_w2_a", &up, Init::fan_in(site.rank)),
            Buffer::trained("hada_w2_b", "hada_w2_b", &down, last),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (one, two) = (product(s, "hada_w1_a", "hada_w1_b")?, product(s, "hada_w2_a", "hada_w2_b")?);
        let delta = s.mul(one, two)?;
        let scale = s.buffer("scale")?;
        let delta = s.mul(scale, delta)?;
        s.sum(&[weight, delta])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("init_weights", json!(self.zero)), ("module_dropout", json!(0.0)), ("rank_dropout", json!(0.0))]
    }
}

fn product(s: &mut Scope, a: &str, b: &str) -> Result<ValueId> {
    let (a, b) = (s.buffer(a)?, s.buffer(b)?);
    s.matmul(a, false, b, false)
}
