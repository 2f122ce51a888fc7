//! The fixtures, compiled: logits against PEFT, apart and merged; greedy ids against transformers, as many as stored.

#[cfg(feature = "llvm")]
mod run {
    use libtest_mimic::{Arguments, Trial};
    use pleach_frontend::ModelConfig;
    use pleach_passes::Options;
    use pleach_plan::Meta;
    use pleach_runtime::{GenerateParams, generate};
    use pleach_tests::compiled::{plan_of, run, session, targets};
    use pleach_tests::fixtures::{Fixture, cases};
    use std::ops::ControlFlow;
    use std::process::ExitCode;
    use std::sync::Arc;

    pub(crate) fn main() -> ExitCode {
        let mut trials = vec![];
        match cases() {
            Err(e) => trials.push(Trial::test("cases.json", move || Err(e.into()))),
            Ok(list) => {
                for c in list {
                    for merge in [false, true] {
                        let (c, kind) = (c.clone(), if merge { "merged" } else { "apart" });
                        trials.push(Trial::test(format!("{}/{kind}", c.name), move || Ok(check(&c, merge)?)));
                    }
                }
            }
        }
        libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
    }

    fn check(c: &Fixture, merge: bool) -> Result<(), String> {
        let o = c.open()?;
        let entries: &[&str] = if o.checkpoint.config.is_decoder() { &["infer", "generate"] } else { &["infer"] };
        let graph = pleach_frontend::import(&o.checkpoint, &o.adapters, entries).map_err(|e| e.to_string())?;
        let start = o.start(&graph)?;
        let config = &o.checkpoint.config;
        let (max_positions, type_vocab) = match config {
            ModelConfig::Llama(c) => (c.max_positions, 0),
            ModelConfig::Bert(c) => (c.max_positions, c.type_vocab),
        };
        let meta = Meta { vocab: config.vocab(), max_positions, type_vocab, ..Meta::default() };
        let sequences = o.segments.len() as u64 - 1;
        let mut capacity = pleach_runtime::Options::default().threads(2);
        for (s, n) in [("T", o.ids.len() as u64), ("S", sequences), ("C", 256), ("P", 64)] {
            capacity = capacity.capacity(s, n);
        }
        for target in targets() {
            let options = Options { merge, ..Options::default() };
            let plan = Arc::new(plan_of(&graph, &options, &target, meta.clone())?);
            let mut s = session(plan, &graph, &start, &capacity)?;
            let got = run(&mut s, "infer", &start)?;
            let want = if merge { &o.merged } else { &o.want };
            let e = got[&format!("infer/{}", o.output)].relative_error(want);
            if e.is_nan() || e > c.tolerance {
                return Err(format!("relative error {e:.2e}, allowed {:.0e}", c.tolerance));
            }
            if o.greedy.is_empty() {
                continue;
            }
            let params = GenerateParams { max_new_tokens: o.greedy[0].len(), ..GenerateParams::default() };
            let new = generate(&mut s, &o.prompts(), &params, &mut |_, _| ControlFlow::Continue(()));
            let new = new.map_err(|e| e.to_string())?.ids;
            if new != o.greedy {
                return Err(format!("greedy ids\n{new:?}\nexpected\n{:?}", o.greedy));
            }
        }
        Ok(())
    }
}

#[cfg(feature = "llvm")]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(feature = "llvm"))]
#[allow(clippy::print_stdout, reason = "what is skipped is said")]
fn main() {
    println!("models: skipped, needs --features llvm");
}
