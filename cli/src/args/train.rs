//! Flags of training: the method with its options, data, optimizer, files.

use super::{AdapterPath, ModelArgs};
use clap::{Args, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

/// A number of bytes: `8GiB`, `500MB`, `123456B`, `123456`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Size, String> {
        let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (number, unit) = s.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err("sizes are written as 8GiB, 500MB or 123456B".into()),
        };
        let value = match number.parse::<u64>() {
            Ok(n) => n.checked_mul(factor),
            Err(_) => number.parse::<f64>().ok().map(|x| (x * factor as f64) as u64),
        };
        value.map(Size).ok_or_else(|| "sizes are written as 8GiB, 500MB or 123456B".into())
    }
}

/// An adapter method with its options, by PEFT's names.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct MethodArgs {
    /// Adapter method: lora, dora, paca, … (`pleach methods` lists them)
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    pub method: Option<String>,
    /// A PEFT configuration as a whole; other options go before it
    #[arg(long, value_name = "FILE", help_heading = "Method")]
    pub method_config: Option<PathBuf>,
    /// Rank; columns per layer for paca
    #[arg(long, alias = "lora-r", value_name = "R", help_heading = "Method")]
    pub r: Option<u64>,
    /// The scale is alpha / r
    #[arg(long, value_name = "A", help_heading = "Method", value_parser = super::numbers::finite, conflicts_with_all = ["lora_alpha", "paca_alpha"])]
    pub alpha: Option<f64>,
    /// The same as --alpha, for the LoRA family
    #[arg(long, value_name = "A", help_heading = "Method", value_parser = super::numbers::finite)]
    pub lora_alpha: Option<f64>,
    /// The same as --alpha, for PaCA
    #[arg(long, value_name = "A", help_heading = "Method", value_parser = super::numbers::finite)]
    pub paca_alpha: Option<f64>,
    /// Regular expression for whole module paths, comma list of names, or all-linear
    #[arg(long, alias = "lora-target-modules", value_name = "SPEC", help_heading = "Method")]
    pub target_modules: Option<String>,
    /// Modules to leave out: regular expression or comma list
    #[arg(long, value_name = "SPEC", help_heading = "Method")]
    pub exclude_modules: Option<String>,
    /// Layer indices, comma separated
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', help_heading = "Method")]
    pub layers_to_transform: Vec<u64>,
    /// Scale by alpha / sqrt(r)
    #[arg(long, help_heading = "Method")]
    pub use_rslora: bool,
    /// Weight-decomposed LoRA
    #[arg(long, help_heading = "Method")]
    pub use_dora: bool,
    /// Ranks by pattern, as JSON
    #[arg(long, value_name = "JSON", help_heading = "Method")]
    pub rank_pattern: Option<String>,
    /// Alphas by pattern, as JSON
    #[arg(long, value_name = "JSON", help_heading = "Method")]
    pub alpha_pattern: Option<String>,
    /// Modules to train and save whole, comma separated
    #[arg(long, alias = "lora-modules-to-save", value_name = "A,B", value_delimiter = ',', help_heading = "Method")]
    pub modules_to_save: Vec<String>,
    /// Biases to train: none, all, lora_only
    #[arg(long, value_name = "WHICH", help_heading = "Method")]
    pub bias: Option<String>,
    /// How A and B start: true, false, gaussian, …
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    pub init_lora_weights: Option<String>,
    /// Dropout; only 0
    #[arg(long, value_name = "P", help_heading = "Method", value_parser = super::numbers::finite)]
    pub lora_dropout: Option<f64>,
    /// How PaCA chooses columns: random, weight_norm, gradient_norm
    #[arg(long, value_name = "HOW", help_heading = "Method")]
    pub selection: Option<String>,
    /// A key of the method's configuration that has no option of its own; VALUE is JSON or a text
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Method")]
    pub set: Vec<String>,
    /// Batches that gradient_norm looks at
    #[arg(long, value_name = "N", help_heading = "Method")]
    pub calibration_batches: Option<u64>,
}

/// `pleach methods`.
#[derive(Debug, Args)]
pub(crate) struct MethodsArgs {
    /// Model folder; without one only what holds for every model is told
    pub model: Option<PathBuf>,
    /// Rank that is counted with
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..1 << 24))]
    pub r: Option<u64>,
    /// Where the methods attach: regular expression for whole module paths, comma list of names, or all-linear
    #[arg(long, value_name = "SPEC", default_value = "all-linear")]
    pub target_modules: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// What a training plan is made for.
#[derive(Debug, Clone, Args)]
pub(crate) struct ShapeArgs {
    /// Rows of a micro-batch
    #[arg(long, value_name = "B", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    pub batch: u64,
    /// Tokens at which rows are cut [default: 512, or what the model was made for]
    #[arg(long, value_name = "L", value_parser = clap::value_parser!(u64).range(2..1 << 24))]
    pub max_length: Option<u64>,
    /// Micro-batches of an optimizer step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    pub accum: u64,
    /// Clip the gradient's norm; off without
    #[arg(long, value_name = "X")]
    pub max_grad_norm: Option<f64>,
    /// Memory for weights, adapter, optimizer and everything between: 8GiB, 500MB, …
    #[arg(long, value_name = "SIZE")]
    pub budget: Option<Size>,
}

impl ShapeArgs {
    /// Whether each step has one micro-batch whose gradients nothing needs together.
    pub(crate) fn one_run_a_step(&self) -> bool {
        self.accum == 1 && self.max_grad_norm.is_none()
    }
}

/// How the rate moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScheduleName {
    /// Stays.
    Constant,
    /// Falls to zero.
    Linear,
    /// Half a period of a cosine, to zero.
    Cosine,
}

/// Where metrics go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogKind {
    /// DIR/metrics.jsonl, which is always written.
    Jsonl,
    /// Event files for TensorBoard.
    Tensorboard,
}

/// `pleach train`.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Rows: {"text"}, {"prompt","completion"}, {"messages"} or {"input_ids","labels"}, one a line
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// The folder for the adapter, checkpoints and metrics
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Optimizer steps; --epochs without it
    #[arg(long, value_name = "N", conflicts_with = "epochs", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_steps: Option<u64>,
    /// Passes over the rows [default: 1]
    #[arg(long, value_name = "N")]
    pub epochs: Option<f64>,
    /// Peak learning rate
    #[arg(long, value_name = "RATE", default_value_t = 2e-4)]
    pub lr: f64,
    /// How the rate moves after the warm-up
    #[arg(long, value_enum, default_value = "linear")]
    pub schedule: ScheduleName,
    /// Steps of warm-up, or a share of all steps such as 0.03
    #[arg(long, value_name = "N", default_value = "0")]
    pub warmup: String,
    /// Decoupled weight decay on all trained tensors
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Seed of shuffles and initial values
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Take the rows in the order of the file
    #[arg(long)]
    pub no_shuffle: bool,
    /// Steps between checkpoints; the last step always has one
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub save_every: u64,
    /// Keep only the newest checkpoints; all without
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub keep: Option<u64>,
    /// Go on from a checkpoint
    #[arg(long, value_name = "DIR|latest", num_args = 0..=1, default_missing_value = "latest")]
    pub resume: Option<OsString>,
    /// Replace the results that --out holds
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Rows to evaluate on, before the first and after the last step
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// Also evaluate every so many steps
    #[arg(long, value_name = "N", requires = "eval")]
    pub eval_every: Option<u64>,
    /// Measure every launch (each alone) and write the times: a chrome trace, which `inspect --profile` reads too
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// What to write beside the metrics: jsonl, tensorboard
    #[arg(long, value_enum, value_delimiter = ',', default_value = "jsonl")]
    pub log: Vec<LogKind>,
    /// A summary as one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What `pleach plan --search` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Search {
    /// The largest batch.
    Batch,
    /// The largest length.
    Length,
    /// The largest rank.
    Rank,
}

/// `pleach plan`.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Largest batch, length or rank that fits into --budget
    #[arg(long, value_enum, requires = "budget")]
    pub search: Option<Search>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// `pleach bench train`.
#[derive(Debug, Args)]
pub(crate) struct BenchTrainArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Optimizer steps to measure
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Random weights in place of the checkpoint's
    #[arg(long)]
    pub random_weights: bool,
    /// Also the time of each kernel
    #[arg(long)]
    pub profile: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// The adapter that training starts from.
pub(crate) fn start(model: &ModelArgs) -> Result<Option<&AdapterPath>, String> {
    match model.adapter.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        more => Err(format!("training starts from one adapter, {} were given", more.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let size = |s: &str| s.parse::<Size>().map(|s| s.0);
        assert_eq!(size("8GiB"), Ok(8 << 30));
        assert_eq!(size("500MB"), Ok(500_000_000));
        assert_eq!((size("123456B"), size("7")), (Ok(123_456), Ok(7)));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert!(size("8 apples").is_err() && size("GiB").is_err() && size("").is_err());
    }
}
