//! The README's table of what is checked against PEFT (PaCA against its definition in PyTorch), made from the fixtures.
//!
//! A row is a feature that some fixture's adapter uses; every case with that feature is run by the tests `fixtures` and
//! `models`, beside the weights and merged, so a row says what has to pass, not what is hoped for.

use crate::fixtures::Fixture;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// The lines around the table in the README.
pub const MARKS: [&str; 2] = ["<!-- made from the fixtures: begin -->", "<!-- made from the fixtures: end -->"];

fn json(path: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Whether an adapter's configuration has a feature.
type Has = fn(&Value) -> bool;

fn filled(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => false,
        Value::Object(m) => !m.is_empty(),
        _ => true,
    }
}

const FEATURES: [(&str, Has); 13] = [
    ("LoRA", |c| c["peft_type"] == "LORA" && !filled(&c["use_rslora"]) && !filled(&c["use_dora"])),
    ("rsLoRA", |c| filled(&c["use_rslora"])),
    ("DoRA", |c| filled(&c["use_dora"])),
    ("PaCA", |c| c["peft_type"] == "PACA"),
    ("IA³", |c| c["peft_type"] == "IA3"),
    ("`modules_to_save`", |c| filled(&c["modules_to_save"])),
    ("trained biases", |c| c["bias"].as_str().is_some_and(|b| b != "none")),
    ("`target_modules` as a list", |c| c["target_modules"].is_array()),
    ("`target_modules` as a regex", |c| c["target_modules"].as_str().is_some_and(|s| s != "all-linear")),
    ("`rank_pattern`", |c| filled(&c["rank_pattern"])),
    ("`alpha_pattern`", |c| filled(&c["alpha_pattern"])),
    ("`layers_to_transform`", |c| filled(&c["layers_to_transform"])),
    ("`exclude_modules`", |c| filled(&c["exclude_modules"])),
];

/// The table.
///
/// # Errors
/// A configuration that cannot be read.
pub fn table(cases: &[Fixture]) -> Result<String, String> {
    let mut rows: Vec<(String, Vec<&Fixture>)> = vec![];
    for (name, has) in FEATURES {
        let mut with = vec![];
        for c in cases {
            let mut any = false;
            for a in &c.adapters {
                any |= has(&json(&a.join("adapter_config.json"))?);
            }
            if any {
                with.push(c);
            }
        }
        rows.push((name.into(), with));
    }
    rows.push(("several adapters at once".into(), cases.iter().filter(|c| c.adapters.len() > 1).collect()));
    let mut out =
        String::from("| | cases | models | run | merged | generate |\n| --- | --- | --- | --- | --- | --- |\n");
    for (name, with) in rows {
        let mut models = vec![];
        let mut decoder = false;
        for c in &with {
            let kind = json(&c.model.join("config.json"))?["model_type"].as_str().unwrap_or("?").to_string();
            decoder |= kind != "bert";
            if !models.contains(&kind) {
                models.push(kind);
            }
        }
        let yes = if with.is_empty() { "–" } else { "yes" };
        let generate = if decoder { "yes" } else { "–" };
        let _ = writeln!(out, "| {name} | {} | {} | {yes} | {yes} | {generate} |", with.len(), models.join(", "));
    }
    Ok(out)
}

/// What stands above the methods' matrix.
const METHODS: &str = "Every method against PEFT or a PyTorch reference (first values, forward, gradients, five steps; [METHODS.md](METHODS.md) has the cases). Export: whose \
                       folder is written, and whether `adapter convert` makes LoRA of it.";

/// Compares the README with the table and the methods' matrix; `PLEACH_BLESS=1` writes them.
///
/// # Errors
/// The README lacks the marks, or differs.
pub fn check(cases: &[Fixture]) -> Result<(), String> {
    let methods = crate::methods::summary(&crate::training::cases_in("methods")?)?;
    between("README.md", MARKS, &format!("{}\n{METHODS}\n\n{methods}", table(cases)?))
}

/// Compares what lies between two marks of a file with a table; `PLEACH_BLESS=1` writes it.
///
/// # Errors
/// The file lacks the marks, or differs.
pub fn between(file: &str, marks: [&str; 2], table: &str) -> Result<(), String> {
    let path = crate::root().join(file);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{file}: {e}"))?;
    let at = |m: &str| text.find(m).ok_or_else(|| format!("{file} has no line {m}"));
    let (a, b) = (at(marks[0])? + marks[0].len(), at(marks[1])?);
    let want = format!("\n{table}");
    if text.get(a..b) == Some(want.as_str()) {
        return Ok(());
    }
    if std::env::var_os("PLEACH_BLESS").is_some() {
        let new = format!("{}{want}{}", &text[..a], &text[b..]);
        return std::fs::write(&path, new).map_err(|e| e.to_string());
    }
    Err(format!("{file}: the table is not what the fixtures give; run this test with PLEACH_BLESS=1"))
}
