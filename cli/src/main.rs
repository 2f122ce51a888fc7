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

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    pleach_runtime::map_large_blocks();
    let asked = match args::Cli::try_parse() {
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
