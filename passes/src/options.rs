//! What the caller can ask of the passes, and the numbers of a target that costs are computed from.

use crate::recompute::Price;
use pleach_ir::DType;

/// Speeds of a target, for choosing between equal forms. Rough is enough: they only rank alternatives.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Target {
    /// Floating-point operations per second of a large matrix product.
    pub flops: f64,
    /// Bytes per second between memory and the cores.
    pub bytes_per_s: f64,
    /// Microseconds that one more launch costs.
    pub launch_us: f64,
    /// Microseconds that handing a strided part of a result to another kernel costs on top of handing it a dense one.
    pub view_us: f64,
    /// Columns of a matrix product's tile: a narrower product costs as much as one this wide.
    pub tile: f64,
    /// Microseconds one resident parameter byte is worth.
    pub resident_us: f64,
    /// Microseconds one byte built at load time from base weights is worth.
    pub prepare_us: f64,
    /// Rows of a window where a chain of launches runs window by window: as many as make a product with a large weight
    /// more than reading the weight.
    pub window_rows: u64,
}

impl Target {
    /// Two cores with AVX-512 or AVX2.
    pub const CPU: Target = Target {
        flops: 150e9,
        bytes_per_s: 12e9,
        launch_us: 0.3,
        view_us: 0.3,
        tile: 32.0,
        resident_us: 1e-7,
        prepare_us: 1e-6,
        window_rows: 128,
    };
    /// A data-centre accelerator: products are cheap, launches are not.
    pub const GPU: Target = Target {
        flops: 700e12,
        bytes_per_s: 4.3e12,
        launch_us: 2.0,
        view_us: 0.0,
        tile: 128.0,
        resident_us: 1e-9,
        prepare_us: 1e-8,
        window_rows: 512,
    };
}

impl Default for Target {
    fn default() -> Target {
        Target::CPU
    }
}

/// Options of every pass.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// Fold adapter slots into the base weights. False: a slot is swapped without touching a base weight.
    pub merge: bool,
    /// Cost hint: the token count an entry is tuned for, by entry name. Entries not named use
    /// [`Options::tokens`]'s defaults.
    pub tokens_hint: Vec<(String, u64)>,
    /// Cost hint: tokens of a sequence of a training batch.
    pub length_hint: u64,
    /// Speeds of the target.
    pub target: Target,
    /// Rewrite rules that may not fire, by name.
    pub disabled_rules: Vec<String>,
    /// Rounds of rewriting per region at most.
    pub round_limit: usize,
    /// E-nodes per region at most.
    pub node_limit: usize,
    /// Type of weights and activations that `precision` brings in: f32 (nothing changes) or bf16.
    pub dtype: DType,
    /// What a byte kept for the backward half is worth when terms are chosen, microseconds. `None`: what it costs in
    /// time alone, to be written and read once.
    pub saved_byte_us: Option<f64>,
    /// An optimizer step has one micro-batch, and nothing needs all gradients together: `differentiate` makes one entry of
    /// forward, backward and optimizer, in which a gradient lives until its parameter is stepped.
    pub step_at_once: bool,
    /// What a kept byte is worth when it is decided which values are built again; `None` for the same as above; without
    /// either what takes next to no time ([`crate::recompute::SPARE`]).
    pub recompute: Option<Price>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            merge: false,
            tokens_hint: vec![],
            length_hint: 128,
            target: Target::CPU,
            disabled_rules: vec![],
            round_limit: 40,
            node_limit: 20_000,
            dtype: DType::F32,
            saved_byte_us: None,
            step_at_once: false,
            recompute: None,
        }
    }
}

impl Options {
    /// The price of kept bytes that `recompute` works with, where one is given.
    pub fn price(&self) -> Option<Price> {
        self.recompute.or_else(|| self.saved_byte_us.map(Price::flat))
    }

    /// The token count that costs of this entry are computed at: the hint, else 1 for `generate`, 512 otherwise.
    pub fn tokens(&self, entry: &str) -> u64 {
        match self.tokens_hint.iter().find(|(e, _)| e == entry) {
            Some((_, n)) => (*n).max(1),
            None if entry == "generate" => 1,
            None => 512,
        }
    }
}
