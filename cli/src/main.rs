//! The command line. All printing, reading of arguments, text ↔ ids and reports are here; the work is in the libraries.
//!
//! Without the feature `compiler` this is a small program that runs and generates from plans; without `models` it takes
//! token ids only and reads no adapters.

mod args;
#[cfg(feature = "compiler")]
mod blocks;
#[cfg(feature = "compiler")]
mod cache;
#[cfg(feature = "compiler")]
mod child;
mod commands;
#[cfg(feature = "compiler")]
mod events;
mod failure;
mod files;
mod inputs;
#[cfg(feature = "models")]
mod method;
#[cfg(feature = "models")]
mod model;
#[cfg(feature = "compiler")]
mod pipeline;
mod profile;
mod ready;
mod report;
#[cfg(feature = "models")]
mod rows;
#[cfg(feature = "models")]
mod tensorboard;
mod text;
#[cfg(feature = "models")]
mod training;

use clap::{Command, CommandFactory, FromArgMatches};
use std::process::ExitCode;

/// Every option takes numbers below zero, so that what refuses one says why.
fn with_negative_numbers(c: Command) -> Command {
    let c = c.mut_args(|a| if a.get_action().takes_values() { a.allow_negative_numbers(true) } else { a });
    c.mut_subcommands(with_negative_numbers)
}

fn parse() -> Result<args::Cli, clap::Error> {
    let mut matches = with_negative_numbers(args::Cli::command()).try_get_matches()?;
    args::Cli::from_arg_matches_mut(&mut matches)
}

fn main() -> ExitCode {
    pleach_runtime::map_large_blocks();
    let asked = match parse() {
        Ok(asked) => asked,
        Err(said) => return ExitCode::from(u8::try_from(report::parser(&said)).unwrap_or(2)),
    };
    match commands::dispatch(asked) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            report::error(&e.message);
            ExitCode::from(e.code)
        }
    }
}
