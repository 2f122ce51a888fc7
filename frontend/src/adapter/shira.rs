//! SHiRA: a few cells of a weight are trained (Bhardwaj et al. 2024, "Sparse High Rank Adapters").
//!
//! W' = W with v added at the cells I; r · (in + out) of them, as many as LoRA has values, chosen without preference. v starts at zero.

use std::sync::Arc;

use pleach_ir::{BinaryOp, Op, ScatterMode, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "shira", keys: &[("peft_type", Key::Text("SHIRA"))], read: |f| Ok(Arc::new(Shira::read(f)?)) };

/// SHiRA.
#[derive(Debug, Clone)]
struct Shira {
    /// Whether v starts at zero rather than at random, which is for tests.
    zero: bool,
    /// `mask_type` and `random_seed`: how cells were chosen, which the file says itself.
    chosen: (String, Value),
}

impl Shira {
    fn read(f: &mut Fields) -> Result<Shira> {
        let chosen = (f.text("mask_type")?.unwrap_or("random").to_owned(), json!(f.raw("random_seed")));
        Ok(Shira { zero: f.flag("init_weights")?.unwrap_or(true), chosen })
    }
}

/// Cells of a site.
fn count(site: &Site) -> u64 {
    site.rank * (site.input + site.output)
}

impl Method for Shira {
    fn name(&self) -> &'static str {
        "shira"
    }

    fn formula(&self) -> &'static str {
        "W' = W with v added at r·(in + out) cells"
    }

    fn peft_type(&self) -> &'static str {
        "SHIRA"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn default_rank(&self) -> u64 {
        32
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        let (cells, all) = (target.rank * (target.input + target.output), target.input * target.output);
        if cells > all {
            Err(format!("has {all} cells, fewer than the {cells} of r = {}", target.rank))
        } else {
            Ok(())
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let cells = Init::RandomCells { rows: site.output, columns: site.input };
        let start = if self.zero { Init::Zeros {} } else { Init::Normal { std: 1.0 } };
        vec![
            Buffer::indices("shira_indices", "shira_indices", &[2, count(site)], cells),
            Buffer::trained("shira_weight", "shira_weight", &[count(site)], start),
        ]
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (input, output) = (s.site().input, s.site().output);
        let n = count(s.site());
        let (cells, values) = (s.buffer("shira_indices")?, s.buffer("shira_weight")?);
        let row = s.head(cells, 0, 1)?;
        let row = s.reshape(row, &[n])?;
        let column = s.push(Op::Slice { axis: 0, start: 1, end: 2 }, &[cells])?;
        let column = s.reshape(column, &[n])?;
        let width = s.push(Op::i32(input as i32), &[])?;
        let row = s.push(Op::Binary(BinaryOp::Mul), &[row, width])?;
        let place = s.sum(&[row, column])?;
        let flat = s.reshape(weight, &[output * input])?;
        let flat = s.push(Op::Scatter { axis: 0, mode: ScatterMode::Add }, &[flat, place, values])?;
        s.reshape(flat, &[output, input])
    }

    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        match self.chosen.0.as_str() {
            "random" => Ok(()),
            other => Err(("mask_type", format!("is `{other}`; cells of a new adapter are chosen by random"))),
        }
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("fan_in_fan_out", json!(false)),
            ("init_weights", json!(self.zero)),
            ("mask_type", json!(self.chosen.0)),
            ("random_seed", self.chosen.1.clone()),
        ]
    }
}
