//! CorDA: LoRA that starts as the part of the weight that matters most, or least, for the inputs of a task, which the base loses (Yang et
//! al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models"), as PEFT has it.
//!
//! C is the mean over the data's rows of Xᵀ · X / max(X)², damped by a hundredth of its mean diagonal; W · C = U · Σ · Vᵀ. With the r largest
//! (`ipm`, instruction-previewed) or smallest (`kpm`, knowledge-preserved) singular values, B = U_r · √(Σ_r / s) and A = √(Σ_r / s) · V_rᵀ · C⁻¹.
//! No inverse is needed, because Σ · Vᵀ · C⁻¹ = Uᵀ · W: so B · A = U_r · U_rᵀ · W / s. (PEFT inverts C in f32 and doubles the damping until
//! that is accurate.)

use std::sync::Arc;

use faer::Mat;
use pleach_ir::{BinaryOp, Op, ReduceOp, ValueId};
use serde_json::{Value, json};

use super::Measure;
use super::decompose::{leading, matrix, smallest};
use super::lora;
use super::method::{Entry, Key, Request};
use super::prepare::Given;
use super::start::{Batches, Preparation};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "corda",
    keys: &[("peft_type", Key::Text("LORA")), ("init_lora_weights", Key::Text("corda"))],
    read: lora::read,
};

/// The start of this name.
pub(super) fn read(name: &str, f: &mut Fields) -> Result<Option<Arc<dyn Preparation>>> {
    if name != "corda" {
        return Ok(None);
    }
    let mut smallest = false;
    if let Some(options) = f.object("corda_config")? {
        let path = f.path().to_owned();
        let mut o = Fields::new(&path, "corda_config.", options);
        for key in ["verbose", "prune_temporary_fields"] {
            o.flag(key)?;
        }
        for key in ["cache_file", "covariance_file"] {
            o.must_be_off(key, "files of PyTorch are not read; the covariance is measured again")?;
        }
        o.must_be_off("use_float16_for_covariance", "covariances are f32")?;
        smallest = match o.text("corda_method")? {
            None | Some("ipm") => false,
            Some("kpm") => true,
            Some(other) => return Err(o.fault("corda_method", format!("is `{other}`; known are ipm and kpm"))),
        };
    }
    Ok(Some(Arc::new(Corda { smallest, batches: Batches::read(f, 8)? })))
}

/// CorDA.
#[derive(Debug)]
struct Corda {
    smallest: bool,
    batches: Batches,
}

impl Preparation for Corda {
    fn name(&self) -> &'static str {
        "corda"
    }

    fn formula(&self) -> &'static str {
        "LoRA; s·B·A starts as U_r·U_rᵀ·W, U the left singular vectors of W·C, C = E[xᵀx]; the base loses it"
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let options = json!({
            "cache_file": null, "corda_method": if self.smallest { "kpm" } else { "ipm" }, "covariance_file": null,
            "prune_temporary_fields": true, "use_float16_for_covariance": false, "verbose": false,
        });
        vec![("init_lora_weights", json!("corda")), ("corda_config", options)]
    }

    fn requests(&self) -> Vec<Request> {
        vec![Request::Inputs { batches: self.batches.0 }]
    }

    fn measure(&self, m: &mut Measure, x: ValueId) -> Result<()> {
        let n = m.site().input;
        let rows = m.push(Op::Reduce { op: ReduceOp::Max, axis: 1 }, &[x])?;
        let largest = m.push(Op::Reduce { op: ReduceOp::Max, axis: 0 }, &[rows])?;
        let square = m.mul(largest, largest)?;
        let product = m.matmul(x, true, x, false)?;
        let product = m.push(Op::Binary(BinaryOp::Div), &[product, square])?;
        let old = m.kept("covariance", &[n, n])?;
        let sum = m.sum(&[old, product])?;
        m.keep("covariance", &[n, n], sum)?;
        let (old, one) = (m.kept("rows", &[])?, m.number(1.0)?);
        let sum = m.sum(&[old, one])?;
        m.keep("rows", &[], sum)
    }

    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)> {
        let (n, rank, scale) = (given.site.input, given.site.rank as usize, given.site.scale);
        let rows = f64::from(given.stat("rows")?.first().copied().unwrap_or(0.0)).max(1.0);
        let mut c = matrix(n, n, given.stat("covariance")?) * faer::Scale(rows.recip());
        let damping = 0.01 * (0..n as usize).map(|i| c[(i, i)]).sum::<f64>() / n as f64;
        (0..n as usize).for_each(|i| c[(i, i)] += damping);
        let w = given.matrix();
        let m = &w * &c;
        let found = if self.smallest { smallest(m.as_ref(), rank)? } else { leading(m.as_ref(), rank)? };
        let mut a = found.u.transpose() * &w;
        let mut b = found.u;
        for (k, s) in found.s.iter().enumerate() {
            let (down, up) = if *s > 0.0 { ((s * scale).sqrt().recip(), (s / scale).sqrt()) } else { (0.0, 0.0) };
            (0..a.ncols()).for_each(|j| a[(k, j)] *= down);
            (0..b.nrows()).for_each(|i| b[(i, k)] *= up);
        }
        Ok((a, b))
    }

    fn repeatable(&self) -> std::result::Result<(), &'static str> {
        Err(
            "is missing: CorDA changed the base by factors that follow from the data it was calibrated with, and PEFT cannot load such a \
             folder either; put the adapter as it was before training into `initial_adapter`, or save it with PEFT's \
             `path_initial_model_for_weight_conversion`",
        )
    }
}
