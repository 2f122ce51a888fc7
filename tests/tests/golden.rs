//! One trial per file of `golden/`.

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let dir = pleach_tests::root().join("tests/golden");
    let bless = std::env::var_os("PLEACH_BLESS").is_some_and(|v| v == "1");
    let trials = pleach_tests::files(&dir).into_iter().map(|path| {
        let name = path.strip_prefix(&dir).unwrap_or(&path).display().to_string();
        Trial::test(name, move || pleach_tests::golden::check(&path, bless).map_err(Into::into))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
