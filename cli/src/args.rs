//! What can be asked for: commands, flags and their spelling. No work is done here.

mod numbers;
mod tools;
#[cfg(feature = "models")]
mod train;

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;
use std::{ffi::OsStr, ffi::OsString, os::unix::ffi::OsStrExt};
pub(crate) use tools::*;
#[cfg(feature = "models")]
pub(crate) use train::*;

/// Compiles models with adapters into one plan, and runs it.
#[derive(Debug, Parser)]
#[command(name = "pleach", version, about, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// No progress and no remarks on stderr
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Workers; 0 means one per core
    #[arg(long, global = true, value_name = "N", default_value_t = 0, value_parser = numbers::workers)]
    pub threads: usize,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compile (cached) and run: logits of a decoder, hidden states of an encoder
    #[command(
        after_help = "Example:\n  pleach run models/minilm --similarity --prompt \"a hedge\" --prompt \"a fence\""
    )]
    Run(RunArgs),
    /// Continue a text, token by token
    #[command(after_help = "Example:\n  pleach generate models/smollm2 --adapter demo/adapter --prompt \"A hedge is\"")]
    Generate(GenerateArgs),
    /// Fine-tune: train an adapter on rows of text or ids
    #[cfg(feature = "models")]
    #[command(
        after_help = "Example:\n  pleach train models/smollm2 --method lora --r 16 --target-modules all-linear --data rows.jsonl --out out --max-steps 100 --batch 4 --max-length 128"
    )]
    Train(Box<TrainArgs>),
    /// Exact memory of a training run, before it runs
    #[cfg(feature = "compiler")]
    #[command(
        after_help = "Example:\n  pleach plan models/smollm2 --method paca --r 16 --target-modules all-linear --batch 4 --max-length 128"
    )]
    Plan(Box<PlanArgs>),
    /// Compile a model with its adapters into one file
    #[cfg(feature = "compiler")]
    #[command(
        after_help = "Example:\n  pleach compile models/smollm2 --entry infer,generate --target cpu -o smollm2.pleach"
    )]
    Compile(CompileArgs),
    /// Compile for this machine's GPU with the forms of kernels that are measured to be the fastest
    #[cfg(feature = "compiler")]
    #[command(
        after_help = "Example:\n  pleach tune models/smollm2 --method lora --r 16 --target-modules all-linear --entry train --batch 4 --max-length 512 --dtype bf16 --target cuda -o tuned.pleach\n  pleach train tuned.pleach --weights models/smollm2 --data rows.jsonl --out out"
    )]
    Tune(Box<TuneArgs>),
    /// Show any stage of a model, or what a plan holds
    #[command(after_help = "Example:\n  pleach inspect models/smollm2 --memory --kernels")]
    Inspect(InspectArgs),
    /// Run passes on the textual IR; the result goes to stdout
    #[cfg(feature = "compiler")]
    #[command(
        after_help = "Example:\n  pleach inspect models/smollm2 --ir --stage imported > g.ir\n  pleach opt g.ir --passes canonicalize,rewrite --timing"
    )]
    Opt(OptArgs),
    /// Merge an adapter into the weights of its model
    #[cfg(feature = "models")]
    #[command(after_help = "Example:\n  pleach merge models/smollm2 demo/adapter --out models/merged")]
    Merge(MergeArgs),
    /// Look at adapters
    #[cfg(feature = "models")]
    #[command(subcommand)]
    Adapter(AdapterCommand),
    /// Adapter methods: what each computes, and what it costs for a model
    #[cfg(feature = "models")]
    #[command(after_help = "Example:\n  pleach methods models/smollm2 --r 16")]
    Methods(MethodsArgs),
    /// GGUF file to Hugging Face folder
    #[cfg(feature = "models")]
    #[command(after_help = "Example:\n  pleach import smollm2.gguf --out models/smollm2")]
    Import(ImportArgs),
    /// Our own timings
    #[cfg(feature = "compiler")]
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Where buffers of known lifetimes lie in one arena, as small as possible
    #[command(after_help = "Example:\n  pleach plan-memory tests/data/memory/A.1048576.csv --out placed")]
    PlanMemory(PlanMemoryArgs),
    /// The cheapest choice of nodes in an e-graph, each counted once
    #[cfg(feature = "compiler")]
    #[command(after_help = "Example:\n  pleach extract tests/data/extraction/bert.json.gz --out chosen")]
    Extract(ExtractArgs),
    /// What this machine and this build have: one page to paste into a report
    #[command(after_help = "Example:\n  pleach doctor")]
    Doctor(DoctorArgs),
    /// Completions for a shell, on stdout
    #[command(after_help = "Example:\n  pleach completions bash > /etc/bash_completion.d/pleach")]
    Completions(CompletionsArgs),
    /// Manual pages, one per command
    #[command(after_help = "Example:\n  pleach man --out /usr/local/share/man/man1")]
    Man(ManArgs),
    /// Measures gradients for `train`; started by it
    #[cfg(feature = "models")]
    #[command(name = "measure-here", hide = true)]
    MeasureHere(Box<TrainArgs>),
    /// Compiles in this process; started by the other commands
    #[cfg(feature = "compiler")]
    #[command(name = "compile-here", hide = true)]
    CompileHere,
}

/// An adapter, with the name it goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AdapterPath {
    /// Given as `NAME=`.
    pub name: Option<String>,
    /// PEFT folder.
    pub path: PathBuf,
}

impl From<OsString> for AdapterPath {
    fn from(s: OsString) -> AdapterPath {
        // A path may hold `=` and bytes that are no text; a name holds no `/`, and an existing path is a path.
        let bytes = s.as_bytes();
        let parts = bytes.iter().position(|b| *b == b'=').map(|i| (std::str::from_utf8(&bytes[..i]), &bytes[i + 1..]));
        match parts {
            Some((Ok(name), path)) if !(name.is_empty() || name.contains('/') || PathBuf::from(&s).exists()) => {
                AdapterPath { name: Some(name.into()), path: OsStr::from_bytes(path).into() }
            }
            _ => AdapterPath { name: None, path: s.into() },
        }
    }
}

/// A count by name: `T=512`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Count {
    /// `T`, `S`, `C`, `P`.
    pub symbol: String,
    /// Its value.
    pub value: u64,
}

impl FromStr for Count {
    type Err = String;

    fn from_str(s: &str) -> Result<Count, String> {
        let (symbol, value) = s.split_once('=').ok_or("expected SYMBOL=NUMBER, such as T=512")?;
        let value = value.parse::<u64>().ok().filter(|v| *v > 0).ok_or("the number must be at least 1")?;
        if !["T", "S", "C", "P", "L"].contains(&symbol) {
            return Err(
                "the symbols are T (tokens), S (sequences), L (counted targets), C (cache slots) and P (positions)"
                    .into(),
            );
        }
        Ok(Count { symbol: symbol.into(), value })
    }
}

/// Element type of the computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DType {
    /// 32-bit floats.
    F32,
    /// Weights and activations in bfloat16; sums, norms, adapters and optimizer in 32 bits.
    Bf16,
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// This machine's processor class.
    Cpu,
    /// Any x86-64 with AVX2 and FMA.
    Avx2,
    /// Any x86-64 with AVX-512 F, BW, CD, DQ, VL.
    Avx512,
    /// This machine's NVIDIA GPU: the best target that it runs.
    Cuda,
    /// NVIDIA GPUs of compute capability 8.0 and later.
    #[value(name = "sm_80")]
    Sm80,
    /// NVIDIA GPUs of compute capability 9.0.
    #[value(name = "sm_90a")]
    Sm90a,
}

/// A model with its adapters.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Hugging Face folder, or a compiled plan (F.pleach, with --weights)
    pub model: PathBuf,
    /// The model folder of a compiled plan
    #[arg(long, value_name = "MODEL")]
    pub weights: Option<PathBuf>,
    /// PEFT folder; repeatable, the contributions add up
    #[arg(long, value_name = "[NAME=]PATH")]
    pub adapter: Vec<AdapterPath>,
    /// Fold the adapters into the weights when they are loaded
    #[arg(long)]
    pub merge: bool,
    /// Element type of the computation
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DType,
    /// Processor class, or a GPU
    #[arg(long, value_enum, default_value = "cpu")]
    pub target: Target,
    /// Compile anew and keep nothing
    #[arg(long)]
    pub no_cache: bool,
    /// Read the f32 weights even where the folder has the same values in blocks of codes; the values are the same, inference is slower and training
    /// takes more memory
    #[arg(long)]
    pub no_blocks: bool,
    /// Leave out a pass; repeatable
    #[arg(long, value_name = "PASS")]
    pub disable: Vec<String>,
    /// Leave out a rewrite rule; repeatable
    #[arg(long, value_name = "RULE")]
    pub disable_rule: Vec<String>,
}

impl ModelArgs {
    /// The model folder: of a plan, what `--weights` names.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.weights.as_deref().unwrap_or(&self.model)
    }
}

/// `pleach run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Token ids of one sequence, comma separated; repeatable
    #[arg(long, value_name = "1,2,3", conflicts_with = "prompt")]
    pub ids: Vec<String>,
    /// Text of one sequence; repeatable
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// safetensors file with `input_ids` [T] and `segments` [S+1]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ids", "prompt"])]
    pub input: Option<PathBuf>,
    /// Write the result: `logits` [T, V] or `last_hidden_state` [T, d], f32
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Measure every launch (each alone) and write the times: a chrome trace, which `inspect --profile` reads too
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Encoders: cosine similarities of the mean-pooled sequences
    #[arg(long)]
    pub similarity: bool,
    /// Capacities, such as T=1024,S=8
    #[arg(long, value_name = "SYMBOL=N", value_delimiter = ',')]
    pub capacity: Vec<Count>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `pleach generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["ids", "chat"], conflicts_with_all = ["ids", "chat"])]
    pub prompt: Option<String>,
    /// Token ids to continue, comma separated
    #[arg(long, value_name = "1,2,3", conflicts_with = "chat")]
    pub ids: Option<String>,
    /// JSON file with a list of {"role", "content"}
    #[arg(long, value_name = "FILE")]
    pub chat: Option<PathBuf>,
    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: u64,
    /// 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the samples
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Measure every launch (each alone) and write the times: a chrome trace, which `inspect --profile` reads too
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Print the new ids, comma separated, instead of text
    #[arg(long)]
    pub print_ids: bool,
    /// Capacities, such as C=4096
    #[arg(long, value_name = "SYMBOL=N", value_delimiter = ',')]
    pub capacity: Vec<Count>,
}

/// `pleach inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[cfg(feature = "models")]
    #[command(flatten)]
    pub method: MethodArgs,
    #[cfg(feature = "models")]
    #[command(flatten)]
    pub shape_of_training: ShapeArgs,
    /// Functions to look at
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub entry: Vec<String>,
    /// The graph as text
    #[arg(long)]
    pub ir: bool,
    /// With --ir, --dot or --model-explorer: `imported`, the name or number of a pass, or `final`
    #[arg(long, value_name = "STAGE", default_value = "final")]
    pub stage: String,
    /// The graph for graphviz
    #[arg(long)]
    pub dot: bool,
    /// The kernels as MLIR
    #[arg(long)]
    pub mlir: bool,
    /// The kernels as assembly; as PTX where the target is a GPU
    #[arg(long)]
    pub asm: bool,
    /// The kernels as PTX: for the target, or for sm_80 where that is a processor
    #[arg(long)]
    pub ptx: bool,
    /// With --mlir, --asm, --ptx or --kernels: only kernels whose name contains this
    #[arg(long, value_name = "NAME")]
    pub kernel: Option<String>,
    /// The kernels: class, operators, launches, work
    #[arg(long)]
    pub kernels: bool,
    /// For a GPU's plan, from counts and limits: how long each entry takes at least on an a100, h100 or h200; the usual board of
    /// the plan's target when none is named
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "GPU", num_args = 0..=1, default_missing_value = "")]
    pub estimate: Option<String>,
    /// Parameters and arena, at the capacities given
    #[arg(long)]
    pub memory: bool,
    /// Rewrite rules: how often each fired and was chosen
    #[arg(long)]
    pub rules: bool,
    /// Capacities for --memory, --kernels and --html
    #[arg(long, value_name = "SYMBOL=N", value_delimiter = ',')]
    pub capacity: Vec<Count>,
    /// One page with the graph, the passes, the memory and the kernels; it needs no network
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "OUT.html")]
    pub html: Option<PathBuf>,
    /// With --html: times that `run`, `generate` or `train` wrote with --profile
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "FILE", requires = "html")]
    pub profile: Option<PathBuf>,
    /// With --html: a page written before, to show beside this one; repeatable
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "OTHER.html", requires = "html")]
    pub compare: Vec<PathBuf>,
    /// Write the graph of --stage as JSON for Model Explorer
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "OUT.json")]
    pub model_explorer: Option<PathBuf>,
    /// Everything as one JSON object
    #[arg(long)]
    pub json: bool,
}

impl InspectArgs {
    /// Whether an estimate is asked for.
    pub(crate) fn wants_estimate(&self) -> bool {
        #[cfg(feature = "compiler")]
        return self.estimate.is_some();
        #[cfg(not(feature = "compiler"))]
        false
    }

    /// Whether a file for Model Explorer is asked for.
    pub(crate) fn wants_explorer(&self) -> bool {
        #[cfg(feature = "compiler")]
        return self.model_explorer.is_some();
        #[cfg(not(feature = "compiler"))]
        false
    }
}

/// `pleach merge`.
#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// Hugging Face folder
    pub model: PathBuf,
    /// PEFT folder
    pub adapter: AdapterPath,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Compare merged with unmerged on this many random prompts
    #[cfg(feature = "compiler")]
    #[arg(long, value_name = "N")]
    pub verify: Option<u64>,
    /// Replace what the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// The report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `pleach adapter …`.
#[derive(Debug, Subcommand)]
pub(crate) enum AdapterCommand {
    /// Match every tensor of an adapter against its model
    #[command(after_help = "Example:\n  pleach adapter check models/smollm2 demo/adapter")]
    Check {
        /// Hugging Face folder
        model: PathBuf,
        /// PEFT folder
        adapter: AdapterPath,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Which modules a `target_modules` would attach to
    #[command(after_help = "Example:\n  pleach adapter targets models/smollm2 --match '.*\\.(q|v)_proj'")]
    Targets {
        /// Hugging Face folder
        model: PathBuf,
        /// Regular expression for whole module paths, comma list of names, or all-linear
        #[arg(long = "match", value_name = "REGEX|all-linear")]
        spec: String,
        /// Rank to count parameters for
        #[arg(long, short, value_name = "R", default_value_t = 8)]
        r: u64,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make one LoRA adapter of several, as PEFT's add_weighted_adapter does
    #[command(
        after_help = "Example:\n  pleach adapter merge runs/a runs/b --weights 0.7,0.3 --combination svd --out runs/both"
    )]
    Merge {
        /// PEFT folders of LoRA adapters
        #[arg(required = true)]
        adapters: Vec<PathBuf>,
        /// One weight per adapter; 1 each without
        #[arg(long, value_name = "W1,W2", value_delimiter = ',', allow_hyphen_values = true)]
        weights: Vec<f64>,
        /// linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, the last four with _svd too; lego (ranks grouped by likeness),
        /// lego_plain (without its scales)
        #[arg(long, value_name = "HOW", default_value = "cat")]
        combination: String,
        /// Part of the values that is kept, where values are dropped
        #[arg(long, value_name = "D", default_value_t = 1.0)]
        density: f64,
        /// Rank of the result of lego and the forms with svd; the largest of the adapters' without
        #[arg(long, value_name = "R")]
        rank: Option<u64>,
        /// Keys what dare drops
        #[arg(long, value_name = "N", default_value_t = 0)]
        seed: u64,
        /// Folder to write
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Hugging Face folder of their base model; the one that the first adapter names without it
        #[arg(long, value_name = "MODEL")]
        model: Option<PathBuf>,
        /// Replace the adapter that the folder holds
        #[arg(long)]
        overwrite: bool,
    },
    /// Write an equivalent adapter in another method's form, without loss
    #[command(after_help = "Example:\n  pleach adapter convert runs/paca --to lora --out runs/paca-as-lora")]
    Convert {
        /// PEFT folder of an adapter whose change of a weight is of low rank, or of a PaCA adapter
        adapter: PathBuf,
        /// The form
        #[arg(long, value_name = "METHOD", value_parser = ["lora"])]
        to: String,
        /// Only the first ranks of a LoRA adapter, with the same alpha: what training with ranks drawn per step is for
        #[arg(long, value_name = "RANK")]
        r: Option<u64>,
        /// Folder to write
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Hugging Face folder of its base model; the one that adapter_config.json names without it
        #[arg(long, value_name = "MODEL")]
        model: Option<PathBuf>,
        /// Replace the adapter that the folder holds
        #[arg(long)]
        overwrite: bool,
    },
}

/// `pleach import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// GGUF file
    pub file: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace what the folder holds
    #[arg(long)]
    pub overwrite: bool,
    /// Write the f32 weights alone: without `blocks/`, the same values as the file has them, which generating reads faster
    #[arg(long)]
    pub no_blocks: bool,
    /// The report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `pleach bench …`.
#[cfg(feature = "compiler")]
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One forward pass of N tokens
    #[command(after_help = "Example:\n  pleach bench run models/smollm2 --tokens 512 --json")]
    Run(BenchArgs),
    /// N tokens after a short prompt
    #[command(after_help = "Example:\n  pleach bench generate models/smollm2 --tokens 64 --json")]
    Generate(BenchArgs),
    /// Optimizer steps on random rows
    #[command(
        after_help = "Example:\n  pleach bench train models/smollm2 --method lora --r 16 --target-modules all-linear --batch 4 --max-length 128 --json"
    )]
    Train(Box<BenchTrainArgs>),
    /// The matmul kernels alone, at the shapes of a model
    #[command(after_help = "Example:\n  pleach bench kernels --json")]
    Kernels {
        /// Hugging Face folder; the shapes of SmolLM2-135M without it
        model: Option<PathBuf>,
        /// Rows
        #[arg(long, value_name = "N", value_delimiter = ',', default_value = "512,1")]
        tokens: Vec<u64>,
        /// A list of JSON objects
        #[arg(long)]
        json: bool,
    },
}

/// `pleach bench run` and `pleach bench generate`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens
    #[arg(long, value_name = "N")]
    pub tokens: u64,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_and_counts_are_read() {
        let a = AdapterPath::from(OsString::from("tone=demo/adapter"));
        assert_eq!((a.name.as_deref(), a.path), (Some("tone"), PathBuf::from("demo/adapter")));
        let a = AdapterPath::from(OsString::from("demo/a=b"));
        assert_eq!((a.name, a.path), (None, PathBuf::from("demo/a=b")));
        assert_eq!("T=512".parse(), Ok(Count { symbol: "T".into(), value: 512 }));
        assert!("T".parse::<Count>().is_err() && "X=1".parse::<Count>().is_err() && "T=0".parse::<Count>().is_err());
    }

    #[test]
    fn generate_needs_exactly_one_start() {
        let parse = |args: &[&str]| Cli::try_parse_from(["pleach", "generate", "m"].iter().chain(args));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--prompt", "a", "--ids", "1"]).is_err());
        assert!(parse(&["--ids", "1,2", "--quiet", "--threads", "2"]).is_ok());
    }
}
