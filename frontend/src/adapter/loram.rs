//! LoRAM: LoRA is trained on a smaller base, of which heads and channels were left out, and used on the whole one (Zhang et al. 2025, "Train
//! Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models").
//!
//! A share `pruning_ratio` of the units of every coupling (channels of feedforward blocks, key/value heads with the query heads
//! that read them) is left out in training; A and B have the shapes of what is left. Outside training the missing columns of A and rows of B are
//! zero, as in the authors' code (`zeroA`): y = x·Wᵀ + alpha/r · (x·Āᵀ)·B̄ᵀ with the whole W. The authors keep the first and the last layers whole:
//! `pruned_layers` = [from, to). Units to keep are chosen by random or, with `selection` = `weight` or `product`, by their weights; the
//! authors' pruner also looks at gradients. PEFT has no such class; `adapter convert` writes the LoRA adapter of the whole base.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, LowRank, Method, Scope};
use super::{Init, Site, units};
use crate::coupling::{Coupling, Member, Side};
use crate::error::Result;
use crate::json::{Fields, brief};

/// The part, and the name in files, of the units that stay.
const KEPT: &str = "loram_units";
/// How choices are named.
const SELECTIONS: [&str; 3] = ["random", "weight", "product"];

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "loram", keys: &[("peft_type", Key::Text("LORAM"))], read: |f| Ok(Arc::new(Loram::read(f)?)) };

/// LoRAM.
#[derive(Debug, Clone)]
struct Loram {
    ratio: f64,
    layers: Option<(u64, u64)>,
    selection: &'static str,
}

impl Loram {
    fn read(f: &mut Fields) -> Result<Loram> {
        let ratio = f.number("pruning_ratio")?.unwrap_or(0.5);
        if !(0.0..1.0).contains(&ratio) {
            return Err(f.fault("pruning_ratio", format!("is {ratio}; expected a share from 0 to below 1")));
        }
        let layers = match f.raw("pruned_layers") {
            None => None,
            Some(v) => match v.as_array().map(|a| a.iter().map(Value::as_u64).collect::<Vec<_>>()).as_deref() {
                Some([Some(from), Some(to)]) if from < to => Some((*from, *to)),
                _ => return Err(f.fault("pruned_layers", format!("is {}; expected [from, to)", brief(v)))),
            },
        };
        let asked = f.text("selection")?.unwrap_or("random");
        let Some(selection) = SELECTIONS.iter().find(|s| **s == asked) else {
            return Err(f.fault("selection", format!("is `{asked}`; known are {}", SELECTIONS.join(", "))));
        };
        Ok(Loram { ratio, layers, selection })
    }

    /// Units that stay in a coupling.
    fn kept(&self, consumer: &str, units: u64) -> u64 {
        let layer = consumer.split('.').find_map(|part| part.parse::<u64>().ok());
        let pruned = match (self.layers, layer) {
            (Some((from, to)), Some(layer)) => (from..to).contains(&layer),
            _ => true,
        };
        let gone = if pruned { (self.ratio * units as f64).floor() as u64 } else { 0 };
        (units - gone.min(units)).max(1)
    }

    fn part<'s>(&self, site: &'s Site) -> Option<(&'s Member, u64)> {
        site.member.as_ref().map(|m| (m, self.kept(&m.consumer, m.units)))
    }
}

impl Method for Loram {
    fn name(&self) -> &'static str {
        "loram"
    }

    fn formula(&self) -> &'static str {
        "LoRA trained on a base without some heads and channels, y = x·Wᵀ + alpha/r · (x·Āᵀ)·B̄ᵀ with the whole base"
    }

    fn peft_type(&self) -> &'static str {
        "LORAM"
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (mut input, mut output) = (site.input, site.output);
        match self.part(site) {
            Some((m, kept)) if m.side == Side::Produces => output = kept * m.width,
            Some((m, kept)) => input = kept * m.width,
            None => {}
        }
        vec![
            Buffer::trained("lora_A", "lora_A.weight", &[site.rank, input], Init::fan_in(input)),
            Buffer::trained("lora_B", "lora_B.weight", &[output, site.rank], Init::Zeros {}),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn order(&self, coupling: &Coupling, _targeted: bool) -> Option<Buffer> {
        let (units, kept) = (coupling.units, self.kept(&coupling.consumer, coupling.units));
        let by = (self.selection != SELECTIONS[0]).then(|| units::scores(coupling, self.selection == SELECTIONS[2]));
        let init = Init::Units { units, first: kept, by };
        (kept < units).then(|| Buffer::indices(KEPT, KEPT, &[kept], init))
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (down, up) = match s.arranged() {
            true => (s.buffer("lora_A")?, s.buffer("lora_B")?),
            false => self.whole(s)?,
        };
        let narrow = s.times(x, down)?;
        let wide = s.times(narrow, up)?;
        let scale = s.buffer("scale")?;
        terms.push(s.mul(scale, wide)?);
        Ok(terms)
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (down, up) = self.whole(s)?;
        Ok(Some(LowRank { down, up, scale: s.site().scale }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let layers = self.layers.map(|(from, to)| [from, to]);
        vec![("pruning_ratio", json!(self.ratio)), ("pruned_layers", json!(layers)), ("lora_dropout", json!(0.0))]
    }
}

impl Loram {
    /// A and B of the whole base.
    fn whole(&self, s: &mut Scope) -> Result<(ValueId, ValueId)> {
        let (down, up) = (s.buffer("lora_A")?, s.buffer("lora_B")?);
        let (site, Some(_)) = (s.site(), &s.site().order) else { return Ok((down, up)) };
        let Some((member, kept)) = self.part(site) else { return Ok((down, up)) };
        let index = s.first_units(KEPT, kept)?;
        Ok(match member.side {
            Side::Produces => (down, s.placed(up, 0, index, site.output)?),
            Side::Consumes => (s.placed(down, 1, index, site.input)?, up),
        })
    }
}
