//! The commands, one file each.

#[cfg(feature = "models")]
mod adapter;
#[cfg(feature = "compiler")]
pub(crate) mod bench;
#[cfg(feature = "compiler")]
mod compile;
mod doctor;
#[cfg(feature = "compiler")]
mod extract;
mod generate;
#[cfg(feature = "models")]
mod import;
mod inspect;
#[cfg(feature = "models")]
mod measure;
#[cfg(feature = "models")]
mod merge;
#[cfg(feature = "models")]
mod methods;
#[cfg(feature = "compiler")]
pub(crate) mod opt;
#[cfg(feature = "compiler")]
mod plan;
mod plan_memory;
mod run;
mod shell;
#[cfg(feature = "models")]
mod train;
#[cfg(feature = "compiler")]
mod tune;

use crate::args::{Cli, Command};
use crate::failure::Result;
use crate::report::Ui;

/// Does what was asked for.
///
/// # Errors
/// The command's failure.
pub(crate) fn dispatch(cli: Cli) -> Result<()> {
    let ui = Ui { quiet: cli.quiet, threads: cli.threads };
    match cli.command {
        Command::Run(a) => run::run(&ui, &a),
        Command::Generate(a) => generate::generate(&ui, &a),
        #[cfg(feature = "models")]
        Command::Train(a) => train::train(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Plan(a) => plan::plan(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Compile(a) => compile::compile(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Tune(a) => tune::tune(&ui, &a),
        Command::Inspect(a) => inspect::inspect(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Opt(a) => opt::opt(&ui, &a),
        #[cfg(feature = "models")]
        Command::Merge(a) => merge::merge(&ui, &a),
        #[cfg(feature = "models")]
        Command::Adapter(a) => adapter::adapter(&ui, &a),
        #[cfg(feature = "models")]
        Command::Methods(a) => methods::methods(&ui, &a),
        #[cfg(feature = "models")]
        Command::Import(a) => import::import(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Bench(a) => bench::bench(&ui, &a),
        Command::PlanMemory(a) => plan_memory::plan_memory(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::Extract(a) => extract::extract(&a),
        Command::Doctor(a) => doctor::doctor(&a),
        Command::Completions(a) => shell::completions(&a),
        Command::Man(a) => shell::man(&ui, &a),
        #[cfg(feature = "models")]
        Command::MeasureHere(a) => measure::serve(&ui, &a),
        #[cfg(feature = "compiler")]
        Command::CompileHere => crate::child::serve(),
    }
}
