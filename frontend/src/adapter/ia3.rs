//! IA³: one learned factor per output of a layer, or per input where the layer closes a feedforward block (Liu et al. 2022,
//! "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning").
//!
//! y = l ∘ (x · Wᵀ + bias), or y = (l ∘ x) · Wᵀ + bias for the modules in `feedforward_modules`; l starts at one.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::modules::ModuleTable;
use crate::peft::Pattern;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "ia3", keys: &[("peft_type", Key::Text("IA3"))], read: |f| Ok(Arc::new(Ia3::read(f)?)) };

/// What PEFT takes for feedforward where the configuration does not say: names that end in `down_proj` or `output.dense`. As a pattern,
/// since PEFT refuses a list with names that are no targets.
const FEEDFORWARD: &str = r".*(down_proj|output\.dense)";

/// `feedforward_modules`.
#[derive(Debug, Clone)]
enum Feedforward {
    Pattern(Pattern, String),
    Names(Vec<String>),
}

/// IA³.
#[derive(Debug, Clone)]
struct Ia3 {
    feedforward: Feedforward,
    /// Whether the factors start at one rather than at random, which is for tests.
    ones: bool,
}

impl Ia3 {
    fn read(f: &mut Fields) -> Result<Ia3> {
        let pattern = |s: &str| Ok::<_, crate::error::Error>(Feedforward::Pattern(Pattern::full(s)?, s.to_owned()));
        let feedforward = match f.raw("feedforward_modules") {
            Some(Value::String(s)) => pattern(s)?,
            _ => match f.strings("feedforward_modules")? {
                Some(names) => Feedforward::Names(names),
                None => pattern(FEEDFORWARD)?,
            },
        };
        Ok(Ia3 { feedforward, ones: f.flag("init_ia3_weights")?.unwrap_or(true) })
    }

    fn is_feedforward(&self, site: &Site) -> bool {
        match &self.feedforward {
            // A pattern that needs too many steps matches nothing.
            Feedforward::Pattern(p, _) => p.is_match(&site.module).unwrap_or(false),
            Feedforward::Names(names) => names.iter().any(|n| site.module.ends_with(n.as_str())),
        }
    }
}

impl Method for Ia3 {
    fn name(&self) -> &'static str {
        "ia3"
    }

    fn formula(&self) -> &'static str {
        "y = l ∘ (x·Wᵀ), in feedforward modules y = (l ∘ x)·Wᵀ"
    }

    fn peft_type(&self) -> &'static str {
        "IA3"
    }

    fn rank_key(&self) -> Option<&'static str> {
        None
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn default_targets(&self, modules: &ModuleTable) -> &'static [&'static str] {
        modules.scaled_targets()
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let shape = if self.is_feedforward(site) { [1, site.input] } else { [site.output, 1] };
        let init = if self.ones { Init::Constant { value: 1.0 } } else { Init::Normal { std: 1.0 } };
        vec![Buffer::trained("ia3_l", "ia3_l", &shape, init)]
    }

    fn input(&self, s: &mut Scope, x: ValueId) -> Result<ValueId> {
        if self.is_feedforward(s.site()) && s.trains() { scaled(s, x) } else { Ok(x) }
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        if !self.is_feedforward(s.site()) || s.trains() {
            return Ok(weight);
        }
        // One weight: (l ∘ x) · Wᵀ = x · (l ∘ W)ᵀ.
        scaled(s, weight)
    }

    fn result(&self, s: &mut Scope, _x: ValueId, y: ValueId) -> Result<ValueId> {
        if self.is_feedforward(s.site()) { Ok(y) } else { scaled(s, y) }
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let feedforward = match &self.feedforward {
            Feedforward::Pattern(_, source) => json!(source),
            Feedforward::Names(names) => json!(names),
        };
        vec![
            ("fan_in_fan_out", json!(false)),
            ("feedforward_modules", feedforward),
            ("init_ia3_weights", json!(self.ones)),
        ]
    }
}

/// l ∘ x over the rows of x [n, d].
fn scaled(s: &mut Scope, x: ValueId) -> Result<ValueId> {
    let l = s.buffer("ia3_l")?;
    let width = s.shape(x)[1].known().unwrap_or(0);
    let l = s.reshape(l, &[width])?;
    let l = s.over_rows(l, x)?;
    s.mul(x, l)
}
