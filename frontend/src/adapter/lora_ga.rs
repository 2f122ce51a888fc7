//! LoRA-GA: LoRA whose first step goes where a step of full training would: A and B start as singular vectors of the gradient, and the
//! base loses s · B · A (Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"), as PEFT has it.
//!
//! G [out, in] is the mean of dL/dW over batches, U · S · Vᵀ its 2r largest singular parts. `direction` says which go where (ArB2r: A = V[:r]ᵀ,
//! B = U[r:2r] · S[r:2r]; the vectors come from different pairs, so the sign of each rank is whatever the decomposition gives), `scale` multiplies: stable B · out^¼ / √γ, weight_svd B · σ₁(W) / S_B[0], gd_scale A / s and B / s, unit nothing.

use std::sync::Arc;

use faer::Mat;
use serde_json::{Value, json};

use super::decompose::{leading, randomised};
use super::lora;
use super::method::{Entry, Key, Request};
use super::prepare::Given;
use super::start::{Batches, Preparation};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "lora-ga",
    keys: &[("peft_type", Key::Text("LORA")), ("init_lora_weights", Key::Text("lora_ga"))],
    read: lora::read,
};

const DIRECTIONS: [&str; 4] = ["ArBr", "A2rBr", "ArB2r", "random"];
const SCALES: [&str; 4] = ["stable", "weight_svd", "gd_scale", "unit"];

/// The start of this name.
pub(super) fn read(name: &str, f: &mut Fields) -> Result<Option<Arc<dyn Preparation>>> {
    if name != "lora_ga" {
        return Ok(None);
    }
    let (mut direction, mut scale, mut gamma) = ("ArB2r", "stable", 16.0);
    if let Some(options) = f.object("lora_ga_config")? {
        let path = f.path().to_owned();
        let mut o = Fields::new(&path, "lora_ga_config.", options);
        for (key, known, value) in [("direction", DIRECTIONS, &mut direction), ("scale", SCALES, &mut scale)] {
            let Some(asked) = o.text(key)? else { continue };
            *value = known
                .into_iter()
                .find(|k| *k == asked)
                .ok_or_else(|| o.fault(key, format!("is `{asked}`; known are {}", known.join(", "))))?;
        }
        gamma = o.positive("stable_gamma")?.unwrap_or(gamma);
    }
    Ok(Some(Arc::new(LoraGa { direction, scale, gamma, batches: Batches::read(f, 2)? })))
}

/// LoRA-GA.
#[derive(Debug)]
struct LoraGa {
    direction: &'static str,
    scale: &'static str,
    gamma: f64,
    batches: Batches,
}

impl Preparation for LoraGa {
    fn name(&self) -> &'static str {
        "lora-ga"
    }

    fn formula(&self) -> &'static str {
        "LoRA; B and A start as singular vectors of dL/dW, scaled; the base loses s·B·A"
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let gamma = if self.gamma.fract() == 0.0 { json!(self.gamma as i64) } else { json!(self.gamma) };
        let options = json!({"direction": self.direction, "scale": self.scale, "stable_gamma": gamma});
        vec![("init_lora_weights", json!("lora_ga")), ("lora_ga_config", options)]
    }

    fn requests(&self) -> Vec<Request> {
        vec![Request::Gradient { batches: self.batches.0 }]
    }

    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)> {
        let (g, r) = (given.gradient()?, given.site.rank as usize);
        let least = g.nrows().min(g.ncols());
        if 2 * r > least {
            let what = format!(
                "r = {r} is too large: LoRA-GA takes 2r of {least} singular parts of the gradient at {}",
                given.site.module
            );
            return Err(crate::error::Error::Graph(what));
        }
        let q = (4 * r).min(least);
        let draws = given.draws("gradient", q * least);
        let found = randomised(g.as_ref(), q, 4, |i| draws[i])?;
        let (of_a, of_b): (Vec<usize>, Vec<usize>) = match self.direction {
            "ArBr" => ((0..r).map(|k| 2 * k + 1).collect(), (0..r).map(|k| 2 * k).collect()),
            "A2rBr" => ((r..2 * r).collect(), (0..r).collect()),
            "ArB2r" => ((0..r).collect(), (r..2 * r).collect()),
            _ => {
                let mut order: Vec<usize> = (0..2 * r).collect();
                let draws = given.draws("direction", 2 * r);
                order.sort_by(|i, j| draws[*i].total_cmp(&draws[*j]));
                (order[..r].to_vec(), order[..r].to_vec())
            }
        };
        let (for_a, for_b) = (found.at(of_a), found.at(of_b));
        let mut a = for_a.v.transpose().to_owned();
        let mut b = Mat::from_fn(for_b.u.nrows(), r, |i, k| for_b.u[(i, k)] * for_b.s[k]);
        match self.scale {
            "stable" => b *= faer::Scale((b.nrows() as f64).powf(0.25) / self.gamma.sqrt()),
            "weight_svd" if for_b.s[0] > 0.0 => {
                let largest = leading(given.matrix().as_ref(), 1)?.s[0];
                b *= faer::Scale(largest / for_b.s[0]);
            }
            "gd_scale" => {
                a *= faer::Scale(given.site.scale.recip());
                b *= faer::Scale(given.site.scale.recip());
            }
            _ => {}
        }
        Ok((a, b))
    }

    fn repeatable(&self) -> std::result::Result<(), &'static str> {
        Err(
            "is missing: LoRA-GA changed the base by factors that follow from the gradients of its data, and PEFT leaves the base unchanged \
             when it loads such a folder, which is another model; put the adapter as it was before training into `initial_adapter`, or save it \
             with PEFT's `path_initial_model_for_weight_conversion`",
        )
    }
}
