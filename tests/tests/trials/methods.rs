//! Every adapter method against PEFT or its reference: see `pleach_tests::methods` for what is checked.

use crate::Trials;
use pleach_tests::methods::{CHECKS, check_matrix};
use pleach_tests::training::cases_in;

pub(crate) fn trials(trials: &mut Trials) {
    let list = trials.listed("tests/fixtures/methods", cases_in("methods"));
    let all = list.clone();
    trials.add("METHODS.md's table", move || check_matrix(&all));
    for case in list {
        for (name, check) in CHECKS {
            let case = case.clone();
            trials.add(format!("{}/{name}", case.name), move || check(&case));
        }
        let one = case.clone();
        trials.add(format!("{}/at once", one.name), move || match one.trains(&one.open()?) {
            true => super::training::interpreted_at_once(&one, false).map(drop),
            false => Ok(()),
        });
        #[cfg(feature = "llvm")]
        trials.add(format!("{}/compiled", case.name), move || {
            if case.trains(&case.open()?) {
                pleach_tests::methods::compiled(&case, 1, false)?;
            }
            Ok(())
        });
    }
}
