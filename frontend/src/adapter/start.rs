//! Starts of LoRA that are prepared: both factors come from the base's weight or from what calibration measured, and where B · A is not
//! zero the base loses it again, W₀ = W − s · B₀ · A₀, so that a new adapter changes nothing.
//!
//! The first factors are buffers of the slot of their own, so the change of the base is part of the graph and the file of the base is
//! never written. A folder is saved as PEFT saves it, A and B alone; the first factors go into `initial_adapter` inside it, as an adapter
//! that PEFT reads, and are read from there. Without them they are made again where PEFT makes them again when it loads such a folder.

use std::fmt;
use std::sync::Arc;

use faer::Mat;
use pleach_ir::ValueId;
use serde_json::Value;

use super::decompose::values;
use super::method::{Buffer, LowRank, Request, Scope};
use super::prepare::{Given, Values, floats};
use super::{Init, Measure};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;
use pleach_ir::{BinaryOp, Op, UnaryOp};

/// The part that holds A₀.
const A: &str = "initial_A";
/// The part that holds B₀.
const B: &str = "initial_B";

/// One way to prepare A [r, in] and B [out, r].
pub(super) trait Preparation: fmt::Debug + Send + Sync {
    /// The name of the command line.
    fn name(&self) -> &'static str;

    /// In one line.
    fn formula(&self) -> &'static str;

    /// Its keys of the configuration, `init_lora_weights` first.
    fn config(&self) -> Vec<(&'static str, Value)>;

    /// Whether the base loses s · B₀ · A₀; else B starts at zero.
    fn edits_base(&self) -> bool {
        true
    }

    /// Whether a new adapter can be trained with these options.
    ///
    /// # Errors
    /// The key at fault and what is wrong with it.
    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        Ok(())
    }

    /// What must be measured.
    fn requests(&self) -> Vec<Request> {
        vec![]
    }

    /// See [`Method::measure`](super::Method::measure).
    ///
    /// # Errors
    /// Operands that do not fit.
    fn measure(&self, m: &mut Measure, x: ValueId) -> Result<()> {
        let _ = (m, x);
        Ok(())
    }

    /// A and B.
    ///
    /// # Errors
    /// A weight without a decomposition, a measurement that is missing.
    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)>;

    /// Whether A₀ and B₀ follow from the base alone; else why a folder without them cannot be read.
    fn repeatable(&self) -> std::result::Result<(), &'static str> {
        Ok(())
    }

    /// A remark on a folder without A₀ and B₀.
    fn note(&self) -> Option<&'static str> {
        None
    }
}

/// Batches to measure over: `calibration_batches`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batches(pub u64);

impl Batches {
    /// As given, else `default`.
    pub(super) fn read(f: &mut Fields, default: u64) -> Result<Batches> {
        Ok(Batches(f.count("calibration_batches", 1 << 20)?.unwrap_or(default)))
    }
}

/// A prepared start.
#[derive(Clone)]
pub(super) struct Prepared(Arc<dyn Preparation>);

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PartialEq for Prepared {
    fn eq(&self, other: &Prepared) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

impl Eq for Prepared {}

impl std::ops::Deref for Prepared {
    type Target = dyn Preparation;
    fn deref(&self) -> &(dyn Preparation + 'static) {
        &*self.0
    }
}

impl Prepared {
    /// The start that a value of `init_lora_weights` names, if it is one of these.
    ///
    /// # Errors
    /// An option of it that is not known.
    pub(super) fn read(name: &str, f: &mut Fields) -> Result<Option<Prepared>> {
        for read in [super::pissa::read, super::olora::read, super::corda::read, super::lora_ga::read, super::eva::read]
        {
            if let Some(found) = read(name, f)? {
                return Ok(Some(Prepared(found)));
            }
        }
        Ok(None)
    }

    /// Whether it can attach there.
    pub(super) fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        let name = self.name();
        if target.embedding {
            return Err(format!("is an embedding; {name} starts linear layers only"));
        }
        let most = target.input.min(target.output);
        if target.rank > most {
            return Err(format!("has {most} singular values, fewer than r = {}; lower r for {name}", target.rank));
        }
        if target.scale <= 0.0 {
            return Err(format!("has the scale {}; {name} needs one above zero", target.scale));
        }
        Ok(())
    }

    /// The buffers of LoRA, prepared, and those that change the base.
    pub(super) fn buffers(&self, mut lora: Vec<Buffer>) -> Vec<Buffer> {
        for b in lora.iter_mut().filter(|b| matches!(b.part, "lora_A" | "lora_B")) {
            b.init = Init::Prepared { kept: None };
        }
        if self.edits_base() {
            for (part, of, file) in [(A, "lora_A", "lora_A.weight"), (B, "lora_B", "lora_B.weight")] {
                let shape = lora.iter().find(|b| b.part == of).map_or(vec![], |b| b.shape.clone());
                let init = Init::Prepared { kept: Some(file.into()) };
                lora.push(Buffer::frozen(part, None, &shape, init));
            }
        }
        lora
    }

    /// W − s · B₀ · A₀.
    pub(super) fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        if !self.edits_base() {
            return Ok(weight);
        }
        let (a, b, scale) = (s.buffer(A)?, s.buffer(B)?, s.buffer("scale")?);
        let product = s.matmul(b, false, a, false)?;
        let lost = s.mul(scale, product)?;
        s.push(Op::Binary(BinaryOp::Sub), &[weight, lost])
    }

    /// All values.
    pub(super) fn values(&self, given: &Given) -> Result<Values> {
        let (a, b) = self.factors(given)?;
        let (shape_a, shape_b) = ([a.nrows() as u64, a.ncols() as u64], [b.nrows() as u64, b.ncols() as u64]);
        let (a, b) = (floats(&shape_a, values(a.as_ref())), floats(&shape_b, values(b.as_ref())));
        let mut out = Values::from([("lora_A", a.clone()), ("lora_B", b.clone())]);
        if self.edits_base() {
            out.extend([(A, a), (B, b)]);
        }
        Ok(out)
    }

    /// [A; A₀] and [B, −B₀] for the base as it is.
    pub(super) fn low_rank(&self, s: &mut Scope) -> Result<LowRank> {
        let (mut down, mut up, scale) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.site().scale);
        if self.edits_base() {
            let (a, b) = (s.buffer(A)?, s.buffer(B)?);
            down = s.push(Op::Concat { axis: 0 }, &[down, a])?;
            let b = s.push(Op::Unary(UnaryOp::Neg), &[b])?;
            up = s.push(Op::Concat { axis: 1 }, &[up, b])?;
        }
        Ok(LowRank { down, up, scale })
    }
}
