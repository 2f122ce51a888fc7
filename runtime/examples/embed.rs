//! Runs a compiled plan from another program: `embed PLAN WEIGHTS ID...` prints the likeliest next id.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use pleach_runtime::plan::Plan;
use pleach_runtime::{Options, Result, Session, open_weights};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

fn next(plan: &str, weights: &str, ids: &[i32]) -> Result<usize> {
    let plan = Arc::new(Plan::read(Path::new(plan))?);
    let weights = open_weights(Path::new(weights))?;
    let n = ids.len() as u64;
    let options = Options::default().capacity("T", n).capacity("S", 1).capacity("C", n);
    let mut session = Session::open(plan, weights, &options)?;
    let out = session.infer(&[ids], None)?;
    let logits = out.f32("logits")?;
    let row = &logits[logits.len() / ids.len() * (ids.len() - 1)..];
    Ok((0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [plan, weights, ids @ ..] = args.as_slice() else {
        eprintln!("usage: embed PLAN WEIGHTS ID...");
        return ExitCode::from(2);
    };
    let ids: Vec<i32> = ids.iter().filter_map(|i| i.parse().ok()).collect();
    match next(plan, weights, &ids) {
        Ok(id) => {
            println!("{id}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
