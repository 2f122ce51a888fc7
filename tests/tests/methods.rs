//! Every adapter method against PEFT or its reference: see `pleach_tests::methods` for what is checked.

use libtest_mimic::{Arguments, Trial};
use pleach_tests::methods::{CHECKS, check_matrix};
use pleach_tests::training::cases_in;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut trials = vec![];
    match cases_in("methods") {
        Err(e) => trials.push(Trial::test("tests/fixtures/methods", move || Err(e.into()))),
        Ok(list) => {
            let all = list.clone();
            trials.push(Trial::test("METHODS.md's table", move || Ok(check_matrix(&all)?)));
            for case in list {
                for (name, check) in CHECKS {
                    let case = case.clone();
                    trials.push(Trial::test(format!("{}/{name}", case.name), move || Ok(check(&case)?)));
                }
                #[cfg(feature = "llvm")]
                trials.push(Trial::test(format!("{}/compiled", case.name), move || {
                    if case.trains(&case.open()?) {
                        pleach_tests::methods::compiled(&case, 1, false)?;
                    }
                    Ok(())
                }));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
