//! `pleach completions` and `pleach man`: made from the definition of the arguments, so they are never behind it.

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::failure::{Failure, Result};
use crate::report::{self, Ui};
use clap::CommandFactory;

/// Prints the script of a shell.
///
/// # Errors
/// None.
#[allow(clippy::unnecessary_wraps, reason = "every command has this form")]
pub(crate) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut out = vec![];
    clap_complete::generate(args.shell, &mut Cli::command(), "pleach", &mut out);
    report::print(&String::from_utf8_lossy(&out));
    Ok(())
}

/// Writes `pleach.1` and a page for every command.
///
/// # Errors
/// The folder cannot be written.
pub(crate) fn man(ui: &Ui, args: &ManArgs) -> Result<()> {
    std::fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
    clap_mangen::generate_to(Cli::command(), &args.out).map_err(Failure::io("write to", &args.out))?;
    ui.note(&format!("manual pages are in {}", args.out.display()));
    Ok(())
}
