//! The house rules that a program can check: crate edges, file sizes, module headers, who may print, who may name MLIR,
//! where `unsafe` may stand, golden folders, no paths of a machine.
//!
//! Every rule lists all its violations at once, each with file and line.

use pleach_tests::{files, root};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const CRATES: [&str; 8] = ["ir", "frontend", "passes", "codegen", "plan", "runtime", "cli", "tests"];

/// Which crates of the project a crate may depend on. `cli` and `tests` may use all.
const EDGES: [(&str, &[&str]); 8] = [
    ("ir", &[]),
    ("plan", &[]),
    ("frontend", &["pleach-ir", "pleach-plan"]),
    ("passes", &["pleach-ir", "pleach-plan"]),
    ("codegen", &["pleach-ir", "pleach-plan"]),
    ("runtime", &["pleach-plan"]),
    ("tests/ptx-sim", &[]),
    ("tests/fake-cuda", &["pleach-ptx-sim"]),
];

/// What may not be reached from the runtime, directly or not: it is what people embed.
const NOT_IN_RUNTIME: [&str; 7] =
    ["pleach-ir", "pleach-passes", "pleach-codegen", "egg", "petgraph", "melior", "mlir-sys"];

/// Files of more than 600 lines, each with its reason. Over 800 there is none.
const LONG: [(&str, &str); 0] = [];

fn fail_on(rule: &str, faults: Vec<String>) {
    assert!(faults.is_empty(), "{rule}\n  {}", faults.join("\n  "));
}

fn read(p: &Path) -> String {
    std::fs::read_to_string(p).unwrap_or_default()
}

fn short(p: &Path) -> String {
    p.strip_prefix(root()).unwrap_or(p).display().to_string()
}

/// Every Rust file of every crate, without build outputs and fuzz targets.
fn rust_files() -> Vec<PathBuf> {
    let all = CRATES.iter().flat_map(|c| files(&root().join(c)));
    all.filter(|p| p.extension().is_some_and(|e| e == "rs") && !short(p).starts_with("tests/fuzz/")).collect()
}

/// The lines of a file that are code and not tests, with their numbers. Unit tests stand at the end of a file.
fn code_lines(text: &str) -> Vec<(usize, &str)> {
    let lines: Vec<&str> = text.lines().collect();
    let tests =
        lines.windows(2).position(|w| w[0].trim() == "#[cfg(test)]" && w[1].starts_with("mod ") && w[1].ends_with('{'));
    let code = lines.into_iter().enumerate().take(tests.unwrap_or(usize::MAX));
    code.map(|(i, l)| (i + 1, l)).filter(|(_, l)| !l.trim_start().starts_with("//")).collect()
}

fn is_test_file(p: &Path) -> bool {
    let s = short(p);
    s.starts_with("tests/") || s.contains("/tests/") || s.ends_with("/tests.rs") || s.ends_with("/testing.rs")
}

/// `section → keys` of a Cargo.toml, as far as dependencies need it.
fn sections(toml: &str) -> BTreeMap<String, Vec<String>> {
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut at = String::new();
    for line in toml.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            at = name.trim_matches(['[', ']']).to_string();
            // `[dependencies.egg]` is a dependency too.
            if let Some((table, key)) = name.rsplit_once('.').filter(|(t, _)| t.ends_with("dependencies")) {
                out.entry(table.into()).or_default().push(key.into());
            }
        } else if let Some((key, _)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            let key = key.trim().split('.').next().unwrap_or("").trim_matches('"');
            out.entry(at.clone()).or_default().push(key.to_string());
        }
    }
    out
}

#[test]
fn crates_depend_one_way() {
    let mut faults = vec![];
    for (name, allowed) in EDGES {
        let toml = read(&root().join(name).join("Cargo.toml"));
        assert!(!toml.is_empty(), "{name} has no Cargo.toml");
        for (section, keys) in sections(&toml) {
            // What only tests use does not reach a user of the crate.
            if !section.ends_with("dependencies") || section.ends_with("dev-dependencies") {
                continue;
            }
            for k in keys.iter().filter(|k| k.starts_with("pleach") && !allowed.contains(&k.as_str())) {
                faults.push(format!("{name} depends on {k}"));
            }
        }
    }
    fail_on("a crate may depend only on those that the architecture names", faults);
}

#[test]
fn runtime_reaches_no_compiler() {
    let lock = read(&root().join("Cargo.lock"));
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let (mut name, mut inside) = ("", false);
    for line in lock.lines() {
        if let Some(n) = line.strip_prefix("name = ") {
            name = n.trim_matches('"');
        }
        if inside && line.starts_with(']') || line.starts_with('[') {
            inside = false;
        } else if inside {
            let n = line.trim().trim_matches([',', '"']);
            needs.entry(name).or_default().push(n.split(' ').next().unwrap_or(n));
        }
        inside |= line == "dependencies = [";
    }
    let (mut seen, mut stack) = (BTreeSet::new(), vec!["pleach-runtime"]);
    while let Some(n) = stack.pop() {
        if seen.insert(n) {
            stack.extend(needs.get(n).into_iter().flatten());
        }
    }
    assert!(seen.contains("pleach-plan"), "Cargo.lock was not understood");
    let bad = NOT_IN_RUNTIME.iter().filter(|n| seen.contains(*n));
    fail_on("the runtime is what people embed", bad.map(|n| format!("pleach-runtime reaches {n}")).collect());
}

#[test]
fn files_are_short() {
    let mut faults = vec![];
    let mut long = BTreeSet::new();
    for p in rust_files() {
        let (n, name) = (read(&p).lines().count(), short(&p));
        let reason = LONG.iter().find(|(f, _)| *f == name);
        if n > 600 {
            long.insert(name.clone());
        }
        if n > 800 {
            faults.push(format!("{name} has {n} lines; split it"));
        } else if n > 600 && reason.is_none_or(|(_, why)| why.is_empty()) {
            faults.push(format!("{name} has {n} lines; split it, or give the reason in LONG"));
        }
    }
    faults.extend(
        LONG.iter().filter(|(f, _)| !long.contains(*f)).map(|(f, _)| format!("{f} is in LONG but is not long")),
    );
    fail_on("a file has at most 600 lines, with a reason 800", faults);
}

#[test]
fn modules_say_what_they_are() {
    let silent = |p: &PathBuf| !read(p).starts_with("//!");
    let faults = rust_files().into_iter().filter(silent).map(|p| short(&p)).collect();
    fail_on("a module starts with //!: what it does, assumes, leaves alone", faults);
}

#[test]
fn only_the_command_line_prints() {
    let macros = ["println!", "eprintln!", "print!", "eprint!", "dbg!"];
    let mut faults = vec![];
    for p in rust_files() {
        let s = short(&p);
        let exempt = s.starts_with("cli/") || s.contains("/examples/") || s.ends_with("build.rs") || is_test_file(&p);
        if exempt {
            continue;
        }
        for (n, line) in code_lines(&read(&p)) {
            // Each macro as a word of its own.
            let calls = |m: &str| {
                line.match_indices(m).any(|(i, _)| !line[..i].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            };
            if let Some(m) = macros.iter().find(|m| calls(m)) {
                faults.push(format!("{s}:{n}: {m}"));
            }
        }
    }
    fail_on("a library returns values and errors; only cli prints", faults);
}

#[test]
fn mlir_is_named_in_one_folder() {
    let mut faults = vec![];
    for p in rust_files() {
        let s = short(&p);
        if s.starts_with("codegen/src/mlir") || s == "tests/tests/all/tidy.rs" {
            continue;
        }
        for (n, line) in code_lines(&read(&p)) {
            if line.contains("melior") || line.contains("mlir_sys") {
                faults.push(format!("{s}:{n}"));
            }
        }
    }
    fail_on("melior and mlir_sys are named in codegen/src/mlir only", faults);
}

#[test]
fn unsafe_has_its_place_and_reason() {
    let mut faults = vec![];
    for p in rust_files() {
        let s = short(&p);
        let allowed = s.starts_with("runtime/") || s.starts_with("codegen/src/mlir") || s.contains("/examples/");
        let text = read(&p);
        let all: Vec<&str> = text.lines().collect();
        for (n, line) in code_lines(&text) {
            let opens = ["unsafe {", "unsafe impl"].iter().any(|u| line.contains(u)) && s != "tests/tests/all/tidy.rs";
            if !opens {
                continue;
            }
            let reason = |l: &&str| l.contains("SAFETY:");
            if !allowed && !is_test_file(&p) {
                faults.push(format!("{s}:{n}: unsafe outside runtime and codegen/src/mlir"));
            } else if !all[n.saturating_sub(8)..n].iter().any(reason) {
                faults.push(format!("{s}:{n}: no SAFETY comment"));
            }
        }
    }
    fail_on("every unsafe block has its reason", faults);
}

#[test]
fn every_pass_has_goldens() {
    let mut faults = vec![];
    for name in pleach_passes::manager::names().into_iter().chain(["fuse-kernels"]) {
        let dir = root().join("tests/golden/passes").join(name);
        let have = files(&dir);
        let file =
            |start: &str| have.iter().any(|p| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(start)));
        for start in ["fires", "not"] {
            if !file(start) {
                faults.push(format!("tests/golden/passes/{name}/ has no file {start}*"));
            }
        }
    }
    fail_on("a pass has a graph where it fires and one where it must not", faults);
}

/// Text files that belong to the project.
fn text_files() -> Vec<PathBuf> {
    let skip = ["target", "models", "bench-out", "fixtures", "corpus"];
    let mut out = vec![];
    let mut stack = vec![root()];
    while let Some(d) = stack.pop() {
        for e in std::fs::read_dir(&d).into_iter().flatten().flatten() {
            let name = e.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || skip.contains(&name.as_str()) {
                continue;
            }
            if e.path().is_dir() {
                stack.push(e.path());
            } else if e.metadata().is_ok_and(|m| m.len() < 1 << 20) && std::fs::read_to_string(e.path()).is_ok() {
                out.push(e.path());
            }
        }
    }
    out.sort();
    out
}

#[test]
fn no_path_of_a_machine() {
    // Written in two parts, so that this file passes its own test.
    let roots = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/o", "pt/"),
        concat!("/t", "mp/"),
    ];
    let mut faults = vec![];
    for p in text_files() {
        for (n, line) in read(&p).lines().enumerate() {
            if let Some(r) = roots.iter().find(|r| line.contains(**r)) {
                faults.push(format!("{}:{}: {r}", short(&p), n + 1));
            }
        }
    }
    fail_on("nothing names a folder of the machine it was written on", faults);
}
