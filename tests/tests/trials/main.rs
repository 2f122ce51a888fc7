//! One trial for each file, fixture and kernel, in one program, so that LLVM is linked once. A word after `--` chooses:
//! `cargo test -p pleach-tests --test trials -- golden/`.

mod corpus;
mod fixtures;
mod golden;
#[cfg(feature = "llvm")]
mod gpu_sim;
#[cfg(feature = "llvm")]
mod gpu_sizes;
mod methods;
#[cfg(feature = "llvm")]
mod models;
mod training;

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

/// A name of a trial, and what it does.
type Check = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// What the parts of this program collect: trials under the name of their part.
pub(crate) struct Trials {
    part: &'static str,
    list: Vec<Trial>,
}

impl Trials {
    /// A trial of this part.
    pub(crate) fn add(
        &mut self,
        name: impl std::fmt::Display,
        check: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) {
        let check: Check = Box::new(check);
        self.list.push(Trial::test(format!("{}/{name}", self.part), move || Ok(check()?)));
    }

    /// What was to be listed, or a trial that fails with the reason.
    pub(crate) fn listed<T>(&mut self, what: &str, list: Result<Vec<T>, String>) -> Vec<T> {
        list.unwrap_or_else(|e| {
            self.add(what, move || Err(e));
            vec![]
        })
    }
}

/// The name of a part, and what collects its trials.
type Part = (&'static str, fn(&mut Trials));

fn main() -> ExitCode {
    let parts: &[Part] = &[
        ("corpus", corpus::trials),
        ("fixtures", fixtures::trials),
        ("golden", golden::trials),
        #[cfg(feature = "llvm")]
        ("gpu_sim", gpu_sim::trials),
        #[cfg(feature = "llvm")]
        ("gpu_sizes", gpu_sizes::trials),
        ("methods", methods::trials),
        #[cfg(feature = "llvm")]
        ("models", models::trials),
        ("training", training::trials),
    ];
    let mut all = vec![];
    for (part, collect) in parts {
        let mut trials = Trials { part, list: vec![] };
        collect(&mut trials);
        all.append(&mut trials.list);
    }
    libtest_mimic::run(&Arguments::from_args(), all).exit_code()
}
