//! Flags of the tools: compiling to a file, passes on text, the two solvers, facts, shells.

use super::{Count, DType, Target};
#[cfg(feature = "compiler")]
use super::{MethodArgs, ModelArgs, ShapeArgs};
use clap::Args;
use std::path::PathBuf;
use std::str::FromStr;

/// A token count, of every entry or of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tokens {
    /// The entry; every one without it.
    pub entry: Option<String>,
    /// Tokens.
    pub count: u64,
}

impl FromStr for Tokens {
    type Err = String;

    fn from_str(s: &str) -> Result<Tokens, String> {
        let (entry, count) = s.split_once('=').map_or((None, s), |(e, n)| (Some(e.to_string()), n));
        let count = count.parse().ok().filter(|n| *n > 0).ok_or("expected a number of at least 1, or ENTRY=NUMBER")?;
        Ok(Tokens { entry, count })
    }
}

/// `pleach opt`.
#[derive(Debug, Args)]
pub(crate) struct OptArgs {
    /// Text of a graph; `-` reads stdin
    #[arg(required_unless_present = "diff")]
    pub file: Option<PathBuf>,
    /// Compare the entries and parameters of two texts; exit code 1 if they differ
    #[arg(long, num_args = 2, value_names = ["A.ir", "B.ir"], conflicts_with = "file")]
    pub diff: Option<Vec<PathBuf>>,
    /// Passes in order, comma separated; the default pipeline without it
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub passes: Option<Vec<String>>,
    /// Leave out a pass; repeatable
    #[arg(long, value_name = "PASS")]
    pub disable: Vec<String>,
    /// Leave out a rewrite rule; repeatable
    #[arg(long, value_name = "RULE")]
    pub disable_rule: Vec<String>,
    /// Stop after this many passes
    #[arg(long, value_name = "N")]
    pub stop_after: Option<usize>,
    /// Print the graph after every pass that changed it
    #[arg(long)]
    pub print_ir_after_change: bool,
    /// Write the graph as it came in and after every pass to this folder, as NN-PASS.ir
    #[arg(long, value_name = "DIR")]
    pub dump_dir: Option<PathBuf>,
    /// Verify the graph after every pass; false: after the last one only
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub verify_each: bool,
    /// Where the graph goes that a pass failed on, with the command that repeats the failure
    #[arg(long, value_name = "FILE", default_value = "pleach-reproducer.ir")]
    pub reproducer: PathBuf,
    /// The table of passes on stderr
    #[arg(long)]
    pub timing: bool,
    /// Fold adapter slots into the weights
    #[arg(long)]
    pub merge: bool,
    /// Type of weights and activations that `precision` brings in
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DType,
    /// What costs are computed for
    #[arg(long, value_enum, default_value = "cpu")]
    pub target: Target,
    /// Token count that costs are computed at: of every entry, or of one; repeatable
    #[arg(long, value_name = "[ENTRY=]N")]
    pub tokens: Vec<Tokens>,
    /// `differentiate` makes one entry `step` of forward, backward and optimizer, as training does without --accum and --max-grad-norm
    #[arg(long)]
    pub at_once: bool,
    /// Run the result in the reference interpreter: inputs and parameters by name
    #[arg(long, value_name = "FILE")]
    pub interpret: Option<PathBuf>,
    /// With --interpret: run before and after every pass and name the first one that moves an output
    #[arg(long, requires = "interpret")]
    pub check_each: bool,
    /// With --check-each: the largest difference, relative to the largest value of the output
    #[arg(long, value_name = "X", default_value_t = 1e-5)]
    pub tolerance: f64,
    /// With --interpret: the entry to run; the first one without it
    #[arg(long, value_name = "NAME")]
    pub entry: Option<String>,
    /// With --interpret: write all outputs
    #[arg(long, value_name = "FILE", requires = "interpret")]
    pub out: Option<PathBuf>,
    /// With --interpret: counts that no tensor shows
    #[arg(long, value_name = "SYMBOL=N", value_delimiter = ',')]
    pub capacity: Vec<Count>,
}

/// `pleach compile`.
#[cfg(feature = "compiler")]
#[derive(Debug, Args)]
pub(crate) struct CompileArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub shape_of_training: ShapeArgs,
    /// Functions to compile: infer, generate, train
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "infer")]
    pub entry: Vec<String>,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Token count that `infer` is tuned for; the plan serves any
    #[arg(long, value_name = "T=N", value_delimiter = ',')]
    pub shape: Vec<Count>,
    /// Take forms of GPU kernels from a plan that `pleach tune` wrote, where kernels are the same
    #[arg(long, value_name = "F.pleach")]
    pub choices: Option<PathBuf>,
    /// The table as JSON
    #[arg(long)]
    pub json: bool,
}

/// `pleach tune`.
#[cfg(feature = "compiler")]
#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    #[command(flatten)]
    pub compile: CompileArgs,
    /// Rounds in which every form is measured; the fastest time of each counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub rounds: u64,
    /// Tokens of the runs of `infer` that are measured
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,
    /// Random weights in place of the checkpoint's
    #[arg(long)]
    pub random_weights: bool,
    /// Measure nothing: write a plan that has every form, to be measured on a machine without a compiler (benches/gpu)
    #[arg(long)]
    pub forms_only: bool,
    /// Measure nothing: take the times that were measured with a plan of --forms-only
    #[arg(long, value_name = "F.json", conflicts_with = "forms_only")]
    pub times: Option<PathBuf>,
}

/// `pleach plan-memory`.
#[derive(Debug, Args)]
pub(crate) struct PlanMemoryArgs {
    /// Files with the columns id,lower,upper,size; upper is exclusive
    #[arg(required = true, value_name = "F.csv")]
    pub files: Vec<PathBuf>,
    /// Write the files with a column `offset` added, under the same names
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Replace what the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// A list of JSON objects
    #[arg(long)]
    pub json: bool,
}

/// `pleach extract`.
#[cfg(feature = "compiler")]
#[derive(Debug, Args)]
pub(crate) struct ExtractArgs {
    /// E-graphs as extraction-gym JSON
    #[arg(required = true, value_name = "F.json[.gz]")]
    pub files: Vec<PathBuf>,
    /// Write the chosen node of each class the roots reach, under the same names
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Replace what the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// A list of JSON objects
    #[arg(long)]
    pub json: bool,
}

/// `pleach doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// `pleach completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// bash, elvish, fish, powershell or zsh
    pub shell: clap_complete::Shell,
}

/// `pleach man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Folder to write the pages to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}
