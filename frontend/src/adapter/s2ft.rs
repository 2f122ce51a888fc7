//! S²FT: a few heads and channels are trained as they are (Yang et al. 2024, "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
//! Structured Sparsity").
//!
//! A unit is a channel of a feedforward block, or a key/value head with the query heads that read it. r channels, rounded up to whole heads
//! in attention, are chosen for each coupling; W' = W with D added to the columns (o_proj, down_proj) or rows (the others) of
//! the chosen units. In training all layers of a coupling hold the chosen units first, so that what is trained lies together; the model
//! computes the same. This is the form of the authors' training module, D starts at zero; their columns and rows are chosen by random. D and
//! the order are saved as the base has them. Other choices: `weight`, the units with the largest weights, and `product`, with the largest product
//! of the norms in their layers. PEFT has no such class.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::Value;

use super::method::{Buffer, Entry, Key, LowRank, Method, Scope};
use super::{Init, Site, units};
use crate::coupling::{Coupling, Member, Side};
use crate::error::Result;
use crate::json::Fields;
use crate::modules::ModuleTable;
use crate::peft::Target;

/// The part, and the name in files, of D.
const DELTA: &str = "s2ft_delta";
/// The part, and the name in files, of the units in their order, the chosen ones first.
const ORDER: &str = "s2ft_order";

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "s2ft", keys: &[("peft_type", Key::Text("S2FT"))], read: |f| Ok(Arc::new(S2ft::read(f)?)) };

/// How the units of a new adapter are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Selection {
    Random,
    Weight,
    Product,
}

/// S²FT.
#[derive(Debug, Clone)]
struct S2ft {
    /// Channels.
    rank: u64,
    selection: Selection,
    /// Whether D starts at zero rather than at random, which is for tests.
    zero: bool,
}

impl S2ft {
    fn read(f: &mut Fields) -> Result<S2ft> {
        let selection = match f.text("selection")? {
            None | Some("random") => Selection::Random,
            Some("weight") => Selection::Weight,
            Some("product") => Selection::Product,
            Some(other) => {
                return Err(f.fault("selection", format!("is `{other}`; known are random, weight and product")));
            }
        };
        let rank = f.count("r", 1 << 24)?.unwrap_or(8);
        Ok(S2ft { rank, selection, zero: f.flag("init_weights")?.unwrap_or(true) })
    }

    /// Units that are trained.
    fn count(&self, units: u64, narrowest: u64) -> u64 {
        self.rank.div_ceil(narrowest.max(1)).clamp(1, units)
    }
}

impl Method for S2ft {
    fn name(&self) -> &'static str {
        "s2ft"
    }

    fn formula(&self) -> &'static str {
        "y = x·W'ᵀ, W' = W with D added to rows or columns of r channels, whole heads in attention"
    }

    fn peft_type(&self) -> &'static str {
        "S2FT"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn default_targets(&self, modules: &ModuleTable) -> &'static [&'static str] {
        modules.consumers()
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        match &target.member {
            Some(m) if m.narrowest == 1 && self.rank > m.units => {
                Err(format!("has {} channels, fewer than r = {}", m.units, self.rank))
            }
            Some(_) => Ok(()),
            None => Err("is not coupled with another layer; S²FT trains heads and channels between layers".into()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let Some(m) = &site.member else { return vec![] };
        let n = self.count(m.units, m.narrowest) * m.width;
        let shape = match m.side {
            Side::Produces => [n, site.input],
            Side::Consumes => [site.output, n],
        };
        let init = if self.zero { Init::Zeros {} } else { Init::Normal { std: 0.1 } };
        vec![Buffer::trained(DELTA, DELTA, &shape, init)]
    }

    fn order(&self, coupling: &Coupling, targeted: bool) -> Option<Buffer> {
        let narrowest = coupling.members.first().map_or(1, |m| m.1.narrowest);
        let by = match self.selection {
            Selection::Random => None,
            Selection::Weight => Some(units::scores(coupling, false)),
            Selection::Product => Some(units::scores(coupling, true)),
        };
        let units = coupling.units;
        let init = Init::Units { units, first: self.count(units, narrowest), by };
        targeted.then(|| Buffer::indices(ORDER, ORDER, &[units], init))
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (count, delta) = (self.chosen(s.member()?), s.buffer(DELTA)?);
        s.with_units(weight, ORDER, count, delta)
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let member = s.member()?;
        let (delta, units) = (s.buffer(DELTA)?, s.first_units(ORDER, self.chosen(member))?);
        let (down, up) = match member.side {
            Side::Consumes => (s.selector(units, s.site().input)?, delta),
            Side::Produces => {
                let rows = s.selector(units, s.site().output)?;
                (delta, s.transpose(rows, &[1, 0])?)
            }
        };
        Ok(Some(LowRank { down, up, scale: 1.0 }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("init_weights", self.zero.into())]
    }
}

impl S2ft {
    fn chosen(&self, m: &Member) -> u64 {
        self.count(m.units, m.narrowest)
    }
}
