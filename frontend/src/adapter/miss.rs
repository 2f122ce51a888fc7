//! MiSS, once called Bone: blocks of a weight share one change (Kang and Yin 2024, "Balancing LoRA Performance and Efficiency with
//! Simple Shard Sharing").
//!
//! y += fold(x) · D, where fold adds up x's pieces of r inputs (the last one may be shorter) and D [r, out]; with `init_weights` "mini"
//! D has `mini_r` columns that repeat. With "bat" the change depends on the weight: of the r × r blocks W_ji of W [out, in],
//! W'_ji = W_ji + W_ji · D_j + D_j. Everything starts at zero.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "miss", keys: &[("peft_type", Key::Text("MISS"))], read: |f| Ok(Arc::new(Miss::read(f)?)) };

/// `init_weights`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Plain,
    /// Plain, away from zero, for tests.
    Random,
    Bat,
    Mini(u64),
}

/// MiSS.
#[derive(Debug, Clone)]
struct Miss {
    form: Form,
}

impl Miss {
    fn read(f: &mut Fields) -> Result<Miss> {
        let mini = f.count("mini_r", 1 << 24)?.unwrap_or(1);
        let form = match f.raw("init_weights") {
            None | Some(Value::Bool(true)) => Form::Plain,
            Some(Value::Bool(false)) => Form::Random,
            Some(Value::String(s)) if s == "bat" => Form::Bat,
            Some(Value::String(s)) if s == "mini" => Form::Mini(mini),
            Some(v) => {
                return Err(f.fault("init_weights", format!("is {v}; expected true, false, \"bat\" or \"mini\"")));
            }
        };
        Ok(Miss { form })
    }

    /// D [r, out].
    fn whole(&self, s: &mut Scope) -> Result<ValueId> {
        let d = s.buffer("miss_block")?;
        let (r, output) = (s.site().rank, s.site().output);
        match self.form {
            Form::Mini(width) => {
                let d = s.spread(d, &[r, output / width, width], &[0, 2])?;
                s.reshape(d, &[r, output])
            }
            _ => Ok(d),
        }
    }
}

impl Method for Miss {
    fn name(&self) -> &'static str {
        "miss"
    }

    fn formula(&self) -> &'static str {
        match self.form {
            Form::Bat => "W'_ji = W_ji + W_ji·D_j + D_j, r × r blocks",
            _ => "y = x·Wᵀ + fold_r(x)·D",
        }
    }

    fn peft_type(&self) -> &'static str {
        "MISS"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn default_rank(&self) -> u64 {
        64
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        let (r, input, output) = (target.rank, target.input, target.output);
        if r > input {
            return Err(format!("has {input} inputs, fewer than r = {r}"));
        }
        match self.form {
            Form::Bat if input % r != 0 || output % r != 0 => {
                Err(format!("is {output} × {input}, which is not made of blocks of r = {r}, as \"bat\" needs"))
            }
            Form::Mini(width) if output % width != 0 => {
                Err(format!("has {output} outputs, which mini_r = {width} does not divide"))
            }
            _ => Ok(()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, output) = (site.rank, site.output);
        let shape = match self.form {
            Form::Bat => vec![output / r, r, r],
            Form::Mini(width) => vec![r, width],
            Form::Plain | Form::Random => vec![r, output],
        };
        let init = if self.form == Form::Random { Init::fan_in(output) } else { Init::Zeros {} };
        vec![Buffer::trained("miss_block", "miss_block", &shape, init)]
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (r, input, output) = (s.site().rank, s.site().input, s.site().output);
        if self.form == Form::Bat {
            let d = s.buffer("miss_block")?;
            let (down, across) = (output / r, input / r);
            // Blocks of one D below one another: [j, (a, i), b].
            let w = s.reshape(weight, &[down, r * across, r])?;
            let product = s.matmul(w, false, d, false)?;
            let product = s.reshape(product, &[output, input])?;
            let d = s.spread(d, &[down, r, across, r], &[0, 1, 3])?;
            let d = s.reshape(d, &[output, input])?;
            return s.sum(&[weight, product, d]);
        }
        if s.trains() {
            return Ok(weight);
        }
        // One weight: D's columns over and over along the inputs.
        let d = self.whole(s)?;
        let d = s.transpose(d, &[1, 0])?;
        let pieces = input.div_ceil(r);
        let d = s.spread(d, &[output, pieces, r], &[0, 2])?;
        let d = s.reshape(d, &[output, pieces * r])?;
        let d = s.head(d, 1, input)?;
        s.sum(&[weight, d])
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        if self.form == Form::Bat || !s.trains() {
            return Ok(terms);
        }
        let (r, input) = (s.site().rank, s.site().input);
        let pieces = input.div_ceil(r);
        let x = s.pad_to(x, 1, pieces * r)?;
        let x = s.rows_as(x, &[pieces, r])?;
        let folded = s.sum_over(1, x)?;
        let d = self.whole(s)?;
        terms.push(s.matmul(folded, false, d, false)?);
        Ok(terms)
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let (init, mini) = match self.form {
            Form::Plain => (json!(true), 1),
            Form::Random => (json!(false), 1),
            Form::Bat => (json!("bat"), 1),
            Form::Mini(width) => (json!("mini"), width),
        };
        vec![("bias", json!("none")), ("init_weights", init), ("mini_r", json!(mini)), ("miss_dropout", json!(0.0))]
    }
}
