//! One trial per file of `golden/`.

use crate::Trials;

pub(crate) fn trials(trials: &mut Trials) {
    let dir = pleach_tests::root().join("tests/golden");
    let bless = std::env::var_os("PLEACH_BLESS").is_some_and(|v| v == "1");
    for path in pleach_tests::files(&dir) {
        let name = path.strip_prefix(&dir).unwrap_or(&path).display().to_string();
        trials.add(name, move || pleach_tests::golden::check(&path, bless));
    }
}
