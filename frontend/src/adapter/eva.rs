//! EVA: LoRA whose A starts as the directions in which the inputs of the site vary most (Paischer et al. 2024, "One Initialization to Rule
//! them All: Fine-tuning via Explained Variance Adaptation"), as PEFT has it without a new distribution of ranks (`rho` = 1).
//!
//! A holds the r leading principal components of the inputs of all labelled tokens, around their mean; B starts at zero. They come from the
//! covariance itself, to which PEFT's incremental analysis converges.

use std::sync::Arc;

use faer::Mat;
use pleach_ir::{BinaryOp, Op, ValueId};
use serde_json::{Value, json};

use super::Measure;
use super::decompose::{leading, matrix};
use super::lora;
use super::method::{Entry, Key, Request};
use super::prepare::Given;
use super::start::{Batches, Preparation};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "eva",
    keys: &[("peft_type", Key::Text("LORA")), ("init_lora_weights", Key::Text("eva"))],
    read: lora::read,
};

/// The start of this name.
pub(super) fn read(name: &str, f: &mut Fields) -> Result<Option<Arc<dyn Preparation>>> {
    if name != "eva" {
        return Ok(None);
    }
    let mut eva = Eva { rho: 1.0, whiten: false, masked: true, options: Value::Null, batches: Batches::read(f, 8)? };
    if let Some(options) = f.object("eva_config")? {
        eva.options = Value::Object(options.clone());
        let path = f.path().to_owned();
        let mut o = Fields::new(&path, "eva_config.", options);
        eva.rho = o.positive("rho")?.unwrap_or(2.0);
        eva.whiten = o.flag("whiten")?.unwrap_or(false);
        eva.masked = o.flag("use_label_mask")?.unwrap_or(true);
    }
    Ok(Some(Arc::new(eva)))
}

/// EVA.
#[derive(Debug)]
struct Eva {
    rho: f64,
    whiten: bool,
    /// Only labelled tokens count.
    masked: bool,
    options: Value,
    batches: Batches,
}

impl Preparation for Eva {
    fn name(&self) -> &'static str {
        "eva"
    }

    fn formula(&self) -> &'static str {
        "LoRA; A starts as the r leading principal components of the inputs"
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let options = match &self.options {
            Value::Null => json!({"rho": 1.0, "use_label_mask": true, "whiten": false}),
            given => given.clone(),
        };
        vec![("init_lora_weights", json!("eva")), ("eva_config", options)]
    }

    fn edits_base(&self) -> bool {
        false
    }

    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        if self.rho != 1.0 {
            let what =
                format!("has rho = {}: ranks are not distributed anew; set it to 1 and give rank_pattern", self.rho);
            return Err(("eva_config", what));
        }
        if self.whiten {
            let what = "has whiten, whose scale depends on how many passes over the data PEFT makes; leave it out";
            return Err(("eva_config", what.into()));
        }
        Ok(())
    }

    fn requests(&self) -> Vec<Request> {
        vec![Request::Inputs { batches: self.batches.0 }]
    }

    /// Mean and sum of squares around it are carried on as in Chan et al. 1979, so that a large mean costs no digits.
    fn measure(&self, m: &mut Measure, x: ValueId) -> Result<()> {
        let n = m.site().input;
        let x = match self.masked {
            true => {
                let labelled = m.labelled();
                m.push(Op::Gather { axis: 0 }, &[x, labelled])?
            }
            false => x,
        };
        let tokens = m.shape(x)[0];
        let one = m.number(1.0)?;
        let ones = m.push(Op::Broadcast { shape: vec![tokens], axes: vec![] }, &[one])?;
        let count = m.sum_over(0, ones)?;
        let sum = m.sum_over(0, x)?;
        let mean = m.push(Op::Binary(BinaryOp::Div), &[sum, count])?;
        let spread = m.over_rows(mean, x)?;
        let around = m.push(Op::Binary(BinaryOp::Sub), &[x, spread])?;
        let squares = m.matmul(around, true, around, false)?;

        let (old_count, old_mean, old) = (m.kept("count", &[])?, m.kept("mean", &[n])?, m.kept("squares", &[n, n])?);
        let total = m.sum(&[old_count, count])?;
        let share = m.push(Op::Binary(BinaryOp::Div), &[count, total])?;
        let apart = m.push(Op::Binary(BinaryOp::Sub), &[mean, old_mean])?;
        let moved = m.mul(apart, share)?;
        let new_mean = m.sum(&[old_mean, moved])?;
        let weight = m.mul(old_count, share)?;
        let row = m.reshape(apart, &[1, n])?;
        let outer = m.matmul(row, true, row, false)?;
        let outer = m.mul(weight, outer)?;
        let new = m.sum(&[old, squares, outer])?;
        m.keep("count", &[], total)?;
        m.keep("mean", &[n], new_mean)?;
        m.keep("squares", &[n, n], new)
    }

    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)> {
        let (n, rank) = (given.site.input, given.site.rank as usize);
        let found = leading(matrix(n, n, given.stat("squares")?).as_ref(), rank)?;
        // The largest value of a component is positive, as in PEFT.
        let sign = |k: usize| {
            let column = found.u.col(k);
            let at = (0..column.nrows()).fold(0, |best, i| if column[i].abs() > column[best].abs() { i } else { best });
            if column[at] < 0.0 { -1.0 } else { 1.0 }
        };
        let signs: Vec<f64> = (0..found.s.len()).map(sign).collect();
        let a = Mat::from_fn(rank, n as usize, |k, j| signs[k] * found.u[(j, k)]);
        Ok((a, Mat::zeros(given.site.output as usize, rank)))
    }
}
