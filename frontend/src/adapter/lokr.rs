//! LoKr: the change of a weight is a Kronecker product (Edalati et al. 2022, "KronA"; Yeh et al. 2023, "Navigating Text-To-Image
//! Customization: From LyCORIS Fine-Tuning to Model Evaluation"), as LyCORIS and PEFT have it.
//!
//! W' = W + scale · K₁ ⊗ K₂ with K₁ [a, c] and K₂ [b, d] for out = a·b and in = c·d; either may be a product of rank r, K = A · B. K₁
//! starts at zero.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "lokr", keys: &[("peft_type", Key::Text("LOKR"))], read: |f| Ok(Arc::new(LoKr::read(f)?)) };

/// `init_weights`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Start {
    /// K₁ is zero.
    Usual,
    /// K₂ is zero, as in LyCORIS.
    Lycoris,
    /// Nothing is, for tests.
    Random,
}

/// LoKr.
#[derive(Debug, Clone)]
struct LoKr {
    /// Whether K₁ may be a product too.
    both: bool,
    /// The size that K₁ should have; `None` for as close to K₂'s as can be.
    factor: Option<u64>,
    start: Start,
}

/// The factors at one site.
struct Shapes {
    /// a, c.
    first: [u64; 2],
    /// b, d.
    second: [u64; 2],
    /// Whether each is a matrix of its own rather than a product.
    whole: [bool; 2],
}

impl LoKr {
    fn read(f: &mut Fields) -> Result<LoKr> {
        // They concern convolutions and dropout.
        f.raw("use_effective_conv2d");
        f.raw("rank_dropout_scale");
        let factor = match f.number("decompose_factor")? {
            None => None,
            Some(-1.0) => None,
            Some(x) if x >= 1.0 && x.fract() == 0.0 => Some(x as u64),
            Some(x) => return Err(f.fault("decompose_factor", format!("is {x}; expected -1 or a positive integer"))),
        };
        let start = match f.raw("init_weights") {
            None | Some(Value::Bool(true)) => Start::Usual,
            Some(Value::Bool(false)) => Start::Random,
            Some(Value::String(s)) if s == "lycoris" => Start::Lycoris,
            Some(v) => return Err(f.fault("init_weights", format!("is {v}; expected true, false or \"lycoris\""))),
        };
        Ok(LoKr { both: f.flag("decompose_both")?.unwrap_or(false), factor, start })
    }

    fn shapes(&self, site: &Site) -> Shapes {
        let (c, d) = factors(site.input, self.factor);
        let (a, b) = factors(site.output, self.factor);
        let whole = [!(self.both && 2 * site.rank < a.max(c)), 2 * site.rank >= b.max(d)];
        Shapes { first: [a, c], second: [b, d], whole }
    }
}

impl Method for LoKr {
    fn name(&self) -> &'static str {
        "lokr"
    }

    fn formula(&self) -> &'static str {
        "W' = W + alpha/r · K₁ ⊗ K₂, K₂ = A·B"
    }

    fn peft_type(&self) -> &'static str {
        "LOKR"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        Some("alpha")
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let k = self.shapes(site);
        let r = site.rank;
        let zero = |when: Start, fan: u64| if self.start == when { Init::Zeros {} } else { Init::fan_in(fan) };
        let mut list = match k.whole[0] {
            true => vec![Buffer::trained("lokr_w1", "lokr_w1", &k.first, zero(Start::Usual, k.first[1]))],
            false => vec![
                Buffer::trained("lokr_w1_a", "lokr_w1_a", &[k.first[0], r], zero(Start::Usual, r)),
                Buffer::trained("lokr_w1_b", "lokr_w1_b", &[r, k.first[1]], Init::fan_in(k.first[1])),
            ],
        };
        match k.whole[1] {
            true => list.push(Buffer::trained("lokr_w2", "lokr_w2", &k.second, zero(Start::Lycoris, k.second[1]))),
            false => list.extend([
                Buffer::trained("lokr_w2_a", "lokr_w2_a", &[k.second[0], r], Init::fan_in(r)),
                Buffer::trained("lokr_w2_b", "lokr_w2_b", &[r, k.second[1]], zero(Start::Lycoris, k.second[1])),
            ]),
        }
        list.push(Buffer::constant("scale", site.scale));
        list
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let k = self.shapes(s.site());
        let ([a, c], [b, d]) = (k.first, k.second);
        let one = if k.whole[0] { s.buffer("lokr_w1")? } else { product(s, "lokr_w1_a", "lokr_w1_b")? };
        let two = if k.whole[1] { s.buffer("lokr_w2")? } else { product(s, "lokr_w2_a", "lokr_w2_b")? };
        let scale = s.buffer("scale")?;
        let one = s.mul(scale, one)?;
        // (K₁ ⊗ K₂)[(i, j), (k, l)] = K₁[i, k] · K₂[j, l].
        let one = s.spread(one, &[a, b, c, d], &[0, 2])?;
        let two = s.spread(two, &[a, b, c, d], &[1, 3])?;
        let delta = s.mul(one, two)?;
        let delta = s.reshape(delta, &[a * b, c * d])?;
        s.sum(&[weight, delta])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let start = match self.start {
            Start::Usual => json!(true),
            Start::Random => json!(false),
            Start::Lycoris => json!("lycoris"),
        };
        vec![
            ("decompose_both", json!(self.both)),
            ("decompose_factor", self.factor.map_or(json!(-1), |x| json!(x))),
            ("init_weights", start),
            ("module_dropout", json!(0.0)),
            ("rank_dropout", json!(0.0)),
        ]
    }
}

fn product(s: &mut Scope, a: &str, b: &str) -> Result<ValueId> {
    let (a, b) = (s.buffer(a)?, s.buffer(b)?);
    s.matmul(a, false, b, false)
}

/// n as m · k with m ≤ k, as PEFT's `factorization` splits it: m is `wanted` where that divides n, else the divisor up to `wanted`
/// with the smallest sum.
fn factors(n: u64, wanted: Option<u64>) -> (u64, u64) {
    if let Some(m) = wanted.filter(|m| n.is_multiple_of(*m)) {
        return (m, n / m);
    }
    let limit = wanted.unwrap_or(n);
    let (mut m, mut k) = (1, n);
    let sum = m + k;
    while m < k {
        let next = (m + 1..=n).find(|d| n.is_multiple_of(*d)).unwrap_or(n);
        if next + n / next > sum || next > limit {
            break;
        }
        (m, k) = (next, n / next);
    }
    (m.min(k), m.max(k))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_as_peft_does() {
        assert_eq!(factors(256, None), (16, 16));
        assert_eq!(factors(128, None), (8, 16));
        assert_eq!(factors(127, None), (1, 127));
        assert_eq!(factors(128, Some(4)), (4, 32));
        assert_eq!(factors(576, Some(7)), (6, 96));
        assert_eq!(factors(1536, None), (32, 48));
    }
}
