//! Weights trained whole with the moments of their gradient in a subspace: GaLore (Zhao et al. 2024, "GaLore: Memory-Efficient LLM
//! Training by Gradient Low-Rank Projection") and Fira (Chen et al. 2024, "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
//! Constraint?"), as the authors' packages `galore-torch` 1.0 and `fira` 1.0.2 compute them.
//!
//! Every `update_proj_gap` steps P becomes the r leading singular vectors of the gradient G, on the side of the smaller dimension. AdamW
//! sees R = Pᵀ·G (G·Pᵀ on the right), with ε = 10⁻⁶ added before the second correction; W loses lr · scale · P·N(R), decay comes after the step.
//! Fira adds what the projection left out, φ·(G − scale·P·R) with φ = ‖N(R)‖ / ‖R‖ per column (per row on the right), its norm growing by a
//! hundredth per step at most. Vectors are trained by AdamW. What is saved is what full fine-tuning saves.

use std::sync::Arc;

use pleach_ir::{BinaryOp, UnaryOp, ValueId};
use serde_json::{Value, json};

use super::full::NO_TARGET;
use super::lora_fa::{decayed, late_decay};
use super::method::{Buffer, Entry, Key, Method};
use super::svd::{Side, leading};
use super::{Event, Moment, Site, TRAINING, Update};
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::peft::Target;

/// Keys that only training knows.
const KEYS: [&str; 3] = ["update_proj_gap", "proj_scale", "proj_type"];
/// Kept out of divisions by zero, as in `fira`.
const SMALL: f64 = 1e-8;
/// The most that a residual's norm grows by from one step to the next.
const GROWTH: f64 = 1.01;

/// How GaLore is found.
pub(super) const GALORE: Entry = Entry {
    name: "galore",
    keys: &[("peft_type", Key::Text("FULL")), (TRAINING, Key::Text("galore"))],
    read: |f| Ok(Arc::new(Projected::read(f, false)?)),
};

/// How Fira is found.
pub(super) const FIRA: Entry = Entry {
    name: "fira",
    keys: &[("peft_type", Key::Text("FULL")), (TRAINING, Key::Text("fira"))],
    read: |f| Ok(Arc::new(Projected::read(f, true)?)),
};

/// `proj_type`: which sides of a gradient are projected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Std,
    ReverseStd,
    Left,
    Right,
    Full,
}

/// GaLore and Fira.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Projected {
    gap: u64,
    scale: f64,
    sides: Type,
    /// Whether what the projection leaves out is used too.
    residual: bool,
}

impl Projected {
    fn read(f: &mut Fields, residual: bool) -> Result<Projected> {
        let sides = match f.text(KEYS[2])?.unwrap_or("std") {
            "std" => Type::Std,
            "reverse_std" => Type::ReverseStd,
            "left" => Type::Left,
            "right" => Type::Right,
            "full" if !residual => Type::Full,
            other => {
                let full = if residual { "" } else { ", full" };
                return Err(
                    f.fault(KEYS[2], format!("is `{other}`; expected one of std, reverse_std, left, right{full}"))
                );
            }
        };
        let gap = f.count(KEYS[0], 1 << 40)?.unwrap_or(200);
        let scale = f.positive(KEYS[1])?.unwrap_or(if residual { 1.0 } else { 0.25 });
        Ok(Projected { gap, scale, sides, residual })
    }

    /// The sides that are projected, with the name of the statistic that holds the basis [r, dimension of the side].
    fn of(&self, site: &Site) -> &'static [(Side, &'static str)] {
        const LEFT: (Side, &str) = (Side::Left, "left");
        const RIGHT: (Side, &str) = (Side::Right, "right");
        let tall = site.output >= site.input;
        match self.sides {
            Type::Std if tall => &[RIGHT],
            Type::Std => &[LEFT],
            Type::ReverseStd if tall => &[LEFT],
            Type::ReverseStd => &[RIGHT],
            Type::Left => &[LEFT],
            Type::Right => &[RIGHT],
            Type::Full => &[LEFT, RIGHT],
        }
    }

    /// P·x, or x·P on the right, for every projected side.
    fn back(&self, u: &mut Update, bases: &[(Side, ValueId)], x: ValueId) -> Result<ValueId> {
        let mut x = x;
        for (side, basis) in bases {
            x = match side {
                Side::Left => u.product(*basis, true, x, false)?,
                Side::Right => u.product(x, false, *basis, false)?,
            };
        }
        let scale = u.number(self.scale)?;
        u.mul(x, scale)
    }

    /// The new weight of Fira.
    fn with_residual(&self, u: &mut Update, bases: &[(Side, ValueId)], low: ValueId, low_shape: &[u64]) -> Result<()> {
        // AdamW at a rate that cancels its corrections gives N(R) itself.
        let (c1, c2) = (u.setting("correction1")?, u.setting("correction2")?);
        let root = u.unary(UnaryOp::Sqrt, c2)?;
        let undo = u.binary(BinaryOp::Div, c1, root)?;
        u.give("lr", undo);
        let normal = u.change(low_shape)?;

        let shape = u.shape().to_vec();
        let (across, along) = if bases[0].0 == Side::Left { (0, 1) } else { (1, 0) };
        let norm = |u: &mut Update, x: ValueId, axes: &[u8]| {
            let mut sum = u.mul(x, x)?;
            for axis in axes {
                sum = u.sum_over(*axis, sum)?;
            }
            u.unary(UnaryOp::Sqrt, sum)
        };
        let small = u.number(SMALL)?;
        let (above, below) = (norm(u, normal, &[across])?, norm(u, low, &[across])?);
        let below = u.sum(&[below, small])?;
        let phi = u.binary(BinaryOp::Div, above, below)?;
        let phi = u.along(along, phi, &shape)?;
        let (g, seen) = (u.gradient()?, self.back(u, bases, low)?);
        let rest = u.binary(BinaryOp::Sub, g, seen)?;
        let rest = u.mul(rest, phi)?;

        let (size, last) = (norm(u, rest, &[1, 0])?, u.kept("residual_norm", &[])?);
        let last = u.sum(&[last, small])?;
        let growth = u.binary(BinaryOp::Div, size, last)?;
        let most = u.number(GROWTH)?;
        let growth = u.binary(BinaryOp::Max, growth, most)?;
        let limit = u.binary(BinaryOp::Div, growth, most)?;
        let size = u.binary(BinaryOp::Div, size, limit)?;
        u.keep("residual_norm", &[], size)?;
        let rest = u.binary(BinaryOp::Div, rest, limit)?;

        let direction = self.back(u, bases, normal)?;
        let direction = u.sum(&[direction, rest])?;
        let lr = u.setting("lr")?;
        let rate = u.binary(BinaryOp::Div, lr, undo)?;
        let change = u.mul(direction, rate)?;
        self.set(u, change)
    }

    /// W − change, then decay.
    fn set(&self, u: &mut Update, change: ValueId) -> Result<()> {
        let old = u.old()?;
        let new = u.binary(BinaryOp::Sub, old, change)?;
        let new = decayed(u, new)?;
        u.give("value", new);
        Ok(())
    }
}

/// Whether it is a matrix, which alone is projected.
fn is_matrix(site: &Site) -> bool {
    site.input > 1 && site.output > 1
}

impl Method for Projected {
    fn name(&self) -> &'static str {
        if self.residual { "fira" } else { "galore" }
    }

    fn formula(&self) -> &'static str {
        if self.residual {
            "y = x·Wᵀ, W trained by P·N(PᵀG) + φ·(G − P·PᵀG), P the leading singular vectors of G"
        } else {
            "y = x·Wᵀ, W trained by P·N(PᵀG), P the leading singular vectors of G"
        }
    }

    fn peft_type(&self) -> &'static str {
        "LORA"
    }

    fn default_rank(&self) -> u64 {
        128
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn attach(&self, _target: &Target) -> std::result::Result<(), String> {
        Ok(())
    }

    fn buffers(&self, _site: &Site) -> Vec<Buffer> {
        vec![]
    }

    fn whole(&self) -> bool {
        true
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if u.shape().len() != 2 || !is_matrix(u.site()) {
            return late_decay(u, 1e-6);
        }
        let rank = u.site().rank;
        let (mut low, mut low_shape, mut bases) = (u.gradient()?, u.shape().to_vec(), vec![]);
        for (side, name) in self.of(u.site()) {
            let at = usize::from(*side == Side::Right);
            let basis_shape = [rank, u.shape()[at]];
            let basis = u.kept(name, &basis_shape)?;
            low = match side {
                Side::Left => u.product(basis, false, low, false)?,
                Side::Right => u.product(low, false, basis, true)?,
            };
            low_shape[at] = rank;
            bases.push((*side, basis));
        }
        u.give("grad", low);
        let (eps, correction) = (u.number(1e-6)?, u.setting("correction2")?);
        let root = u.unary(UnaryOp::Sqrt, correction)?;
        let eps = u.binary(BinaryOp::Div, eps, root)?;
        u.give("eps", eps);
        if self.residual {
            return self.with_residual(u, &bases, low, &low_shape);
        }
        let change = u.change(&low_shape)?;
        let change = self.back(u, &bases, change)?;
        self.set(u, change)
    }

    fn has_events(&self) -> bool {
        true
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        if e.moment != Moment::Gradients || !e.step.is_multiple_of(self.gap) {
            return Ok(());
        }
        for site in e.sites.iter().filter(|s| is_matrix(s)) {
            let weight = format!("grad.{}", e.name(site, "weight"));
            let g = e.read_param(&weight)?;
            let (m, n) = (site.output as usize, site.input as usize);
            for (side, name) in self.of(site) {
                let basis = leading(&g, m, n, site.rank as usize, *side).ok_or_else(|| {
                    Error::Graph(format!("the gradient of {} holds values that are no numbers", site.module))
                })?;
                e.set_stat(site, "weight", name, &basis)?;
            }
            if self.residual && e.step == 0 {
                // No norm yet, so no limit.
                e.set_stat(site, "weight", "residual_norm", &[f32::MAX])?;
            }
        }
        Ok(())
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("target_modules", json!(NO_TARGET))]
    }
}
