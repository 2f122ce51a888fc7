//! PiSSA: LoRA that starts as the principal singular part of the weight, which the base loses (Meng et al. 2024, "PiSSA: Principal
//! Singular Values and Singular Vectors Adaptation of Large Language Models"), as PEFT has it.
//!
//! W = U · Σ · Vᵀ; A = √(Σ_r / s) · V_rᵀ, B = U_r · √(Σ_r / s). `pissa` takes the decomposition itself, `pissa_niter_N` N rounds of subspace
//! iteration from a random start.

use std::sync::Arc;

use faer::Mat;
use serde_json::{Value, json};

use super::decompose::{leading, randomised};
use super::lora;
use super::method::{Entry, Key};
use super::prepare::Given;
use super::start::Preparation;
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "pissa",
    keys: &[("peft_type", Key::Text("LORA")), ("init_lora_weights", Key::Text("pissa"))],
    read: lora::read,
};

/// The start of this name.
pub(super) fn read(name: &str, f: &mut Fields) -> Result<Option<Arc<dyn Preparation>>> {
    let rounds = match name.strip_prefix("pissa_niter_") {
        None if name == "pissa" => None,
        None => return Ok(None),
        Some(n) => match n.parse() {
            Ok(n) => Some(n),
            Err(_) => {
                let what = format!("is \"{name}\"; after pissa_niter_ comes a number of rounds, as in pissa_niter_16");
                return Err(f.fault("init_lora_weights", what));
            }
        },
    };
    Ok(Some(Arc::new(Pissa { rounds })))
}

/// PiSSA.
#[derive(Debug)]
struct Pissa {
    /// Rounds of subspace iteration; none: the decomposition itself.
    rounds: Option<u64>,
}

impl Preparation for Pissa {
    fn name(&self) -> &'static str {
        "pissa"
    }

    fn formula(&self) -> &'static str {
        "LoRA; s·B·A starts as the r largest singular parts of W, which the base loses"
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let name = self.rounds.map_or("pissa".into(), |n| format!("pissa_niter_{n}"));
        vec![("init_lora_weights", json!(name))]
    }

    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)> {
        let (w, rank) = (given.matrix(), given.site.rank as usize);
        let found = match self.rounds {
            None => leading(w.as_ref(), rank)?,
            Some(rounds) => {
                let draws = given.draws("start", rank * w.nrows().min(w.ncols()));
                randomised(w.as_ref(), rank, rounds, |i| draws[i])?
            }
        };
        Ok(found.split(given.site.scale.recip()))
    }

    fn note(&self) -> Option<&'static str> {
        self.rounds.map(|_| {
            "the first factors of pissa_niter_N depend on random numbers, and the folder does not hold them (initial_adapter): the base \
             was changed by another draw than the one it was trained with, as PEFT does; `pissa` without niter has no such draw"
        })
    }
}
