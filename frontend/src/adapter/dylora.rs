//! DyLoRA: LoRA whose first ranks are good by themselves, for any number of them (Valipour et al. 2023, "DyLoRA: Parameter-Efficient Tuning
//! of Pretrained Models using Dynamic Search-Free Low Rank Adaptation"), as the authors' code (KD-NLP) computes it.
//!
//! Every step draws b from `dylora_min_r` to r, the same for all sites, and trains y += alpha / b · (x · A[:b]ᵀ) · B[:, :b]ᵀ; with
//! `dylora_frozen` only the last of the b ranks gets a gradient. What is saved is a LoRA adapter of rank r, and its first b ranks with the
//! same alpha are one of rank b (`pleach adapter convert --to lora --r b`). Between steps all ranks are in use.

use std::sync::Arc;

use super::lora::{Lora, like_lora};
use super::low_rank::{Change, DOWN, Middle, UP};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Event, Moment, Site, TRAINING};
use crate::error::Result;
use crate::json::Fields;
use pleach_ir::{BinaryOp, Op, ValueId};
use serde_json::Value;

/// Keys that only training knows.
const KEYS: [&str; 2] = ["dylora_min_r", "dylora_frozen"];
/// The part that is one for the first b ranks.
const USED: &str = "rank_used";
/// The part that is one for the ranks that get a gradient.
const LEARNING: &str = "rank_learning";

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "dylora",
    keys: &[("peft_type", Key::Text("LORA")), (TRAINING, Key::Text("dylora"))],
    read: |f| Ok(Arc::new(DyLora::read(f)?)),
};

/// DyLoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DyLora {
    lora: Lora,
    least: u64,
    frozen: bool,
}

impl DyLora {
    fn read(f: &mut Fields) -> Result<DyLora> {
        let least = f.count(KEYS[0], 1 << 24)?.unwrap_or(1);
        if let Some(r) = f.count("r", 1 << 24)?
            && least > r
        {
            return Err(f.fault(KEYS[0], format!("is {least}, more than r = {r}")));
        }
        f.must_be_off("use_rslora", "the scale of a drawn rank is alpha over it")?;
        Ok(DyLora { least, frozen: f.flag(KEYS[1])?.unwrap_or(false), lora: Lora::read(f)? })
    }
}

impl Method for DyLora {
    like_lora!(except buffers output);

    fn name(&self) -> &'static str {
        "dylora"
    }

    fn formula(&self) -> &'static str {
        "LoRA; every step trains the first b ranks with scale alpha/b, b drawn from 1 to r"
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let mut buffers = self.lora.buffers(site);
        buffers.retain(|b| b.part != "scale");
        buffers.push(Buffer::changing("scale", &[], site.scale));
        buffers.push(Buffer::changing(USED, &[site.rank], 1.0));
        if self.frozen {
            buffers.push(Buffer::changing(LEARNING, &[site.rank], 1.0));
        }
        buffers
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (mut down, mut up, scale) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer("scale")?);
        if !s.trains() {
            return Ok(Some(Change { down, middle: Middle::Nothing, up, scale }));
        }
        let used = s.buffer(USED)?;
        if self.frozen {
            let learning = s.buffer(LEARNING)?;
            down = halves(s, down, learning, 0)?;
            up = halves(s, up, learning, 1)?;
        }
        Ok(Some(Change { down, middle: Middle::Vector(used), up, scale }))
    }

    fn has_events(&self) -> bool {
        true
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        let sites = e.sites_with(USED);
        let most = sites.iter().map(|s| s.rank).max().unwrap_or(1);
        let b = match e.moment {
            Moment::Gradients => return Ok(()),
            Moment::After => most,
            Moment::Before => self.least + (e.draw("rank") * (most + 1 - self.least.min(most)) as f64) as u64,
        };
        for s in &sites {
            let b = b.min(s.rank);
            let flags =
                |on: &dyn Fn(u64) -> bool| (0..s.rank).map(|i| f32::from(u8::from(on(i)))).collect::<Vec<f32>>();
            e.write(s, "scale", &[(s.alpha / b as f64) as f32])?;
            e.write(s, USED, &flags(&|i| i < b))?;
            if self.frozen {
                e.write(s, LEARNING, &flags(&|i| i + 1 == b))?;
            }
        }
        Ok(())
    }
}

/// A matrix of which only the ranks of a mask get a gradient.
fn halves(s: &mut Scope, x: ValueId, mask: ValueId, axis: u8) -> Result<ValueId> {
    let shape: Vec<u64> = s.shape(x).iter().filter_map(|d| d.known()).collect();
    let (still, one) = (s.push(Op::StopGradient, &[x])?, s.number(1.0)?);
    let rest = s.binary(BinaryOp::Sub, one, mask)?;
    let (mask, rest) = (s.along(axis, mask, &shape)?, s.along(axis, rest, &shape)?);
    let (a, b) = (s.mul(x, mask)?, s.mul(still, rest)?);
    s.sum(&[a, b])
}
