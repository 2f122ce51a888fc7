//! Ranks that are left out when an adapter is saved: a slot holds the most that there may be, the file those in use.
//!
//! Which ones these are is for values to say, so a trainer decides it when it writes.

use serde::{Deserialize, Serialize};

use super::Site;
use super::method::Method;

/// Which ranks of a method's sites are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedRanks {
    /// The part whose zeros are left out, one value per rank.
    pub by: &'static str,
    /// Parts with the axes that run over ranks; none where single cells are left out.
    pub along: &'static [(&'static str, &'static [u8])],
    /// How `rank_pattern` of the configuration says it.
    pub pattern: RankPattern,
}

/// Form of `rank_pattern`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankPattern {
    /// Module to number of ranks.
    Counts,
    /// The name of a tensor of the module to a truth per rank.
    Flags,
    /// Module to number of cells, where the tensors are whole matrices; always there.
    Cells,
}

/// What is saved of a tensor, where not all of it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Key of the tensor whose zeros are left out.
    pub by: String,
    /// Axes along which they are; none where only cells are kept, in their order.
    pub axes: Vec<u8>,
}

/// The entry of one site in `rank_pattern`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRanks {
    /// Its name there.
    pub name: String,
    /// Key of the tensor whose zeros are left out.
    pub by: String,
    /// Whether it is a truth per rank in place of a number.
    pub flags: bool,
    /// Whether it is there even if nothing is left out.
    pub always: bool,
}

impl SavedRanks {
    /// What is saved of a part of a site.
    pub(super) fn kept(&self, site: &Site, part: &str) -> Option<Kept> {
        let (_, axes) = self.along.iter().find(|(p, _)| *p == part)?;
        Some(Kept { by: format!("{}.{}", site.module, self.by), axes: axes.to_vec() })
    }

    /// The entry of a site.
    pub(super) fn entry(&self, site: &Site) -> SiteRanks {
        let by = format!("{}.{}", site.module, self.by);
        let flags = self.pattern == RankPattern::Flags;
        let always = self.pattern == RankPattern::Cells;
        SiteRanks { name: if flags { by.clone() } else { site.module.clone() }, by, flags, always }
    }
}

/// The entries of all sites.
pub(super) fn entries<'s>(method: &dyn Method, sites: impl Iterator<Item = &'s Site>) -> Vec<SiteRanks> {
    let Some(saved) = method.saved_ranks() else { return vec![] };
    sites.map(|s| saved.entry(s)).collect()
}
