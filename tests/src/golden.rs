//! Golden files: a header of `// key: value` lines, a graph in text form, and what a stage makes of it below a `---`.
//!
//! ```text
//! // test: pass rewrite
//! // why: the low-rank branch joins the base matmul when both read the same x
//! // options: merge
//! graph core
//! …
//! ---
//! graph core
//! …
//! ```
//!
//! * `test: parse` – the graph prints as it stands; with a part below `---` it does not parse, and this is the error.
//! * `test: verify` – `// error: …` lines stand after the faulty lines, and nowhere else.
//! * `test: pass NAME` – the pass alone gives the graph below. In a file called `fires…` the graph must change in more
//!   than the order of its lines, in one called `not…` it must not.
//! * `test: schedule` – the kernels, buffers and launches below come out of `fuse-kernels`.
//!
//! Whatever the test, graphs are verified, printed and read again, and what comes out of a pass or schedule is run by
//! the interpreter beside its source on seeded values. `why` is required; `options` may list `merge`, `pack`, `bf16`,
//! `tokens=N`, `T=N` (or another symbol), `no=RULE`, `blocks=TENSOR:FORMAT`, `picks` (products may pick by themselves), `unlaid` (nothing can be laid
//! over blocks). An unknown word is an error. `PLEACH_BLESS=1` rewrites the lower part.

use crate::compare::{Start, run_graph, run_schedule, same};
use crate::values;
use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::text::{parse, print, print_schedule};
use pleach_ir::{BlockFormat, Class, DType, Graph, Kernel, Op, Sym, verify};
use pleach_passes::fuse_kernels::CutOptions;
use pleach_passes::{Options, Report, Target, chunk, find, fuse_kernels, join};
use similar::TextDiff;
use std::collections::BTreeMap;
use std::path::Path;

/// What two forms of one computation may differ by, relative to the largest element.
const TOLERANCE: f64 = 2e-5;

/// What rounding to bf16 may change, relative to the largest element.
const ROUNDING: f64 = 2e-2;

enum Test {
    Parse,
    Verify,
    Pass(String),
    Schedule,
}

struct Golden<'a> {
    header: &'a str,
    test: Test,
    options: Options,
    pack: bool,
    chunk: bool,
    blocks: BTreeMap<String, BlockFormat>,
    join: bool,
    picks: bool,
    unlaid: bool,
    symbols: Symbols,
    above: &'a str,
    below: Option<&'a str>,
}

/// Checks a golden file, or rewrites it when `bless` is set.
///
/// # Errors
/// What is wrong with the file, or a unified diff.
pub fn check(path: &Path, bless: bool) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let want = expected(path, &read(&text)?)?;
    if want == text {
        return Ok(());
    }
    if bless {
        return std::fs::write(path, want).map_err(|e| e.to_string());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let diff = TextDiff::from_lines(&text, &want).unified_diff().context_radius(3).header("stored", "now").to_string();
    Err(format!(
        "{name} differs; if the new form is right: PLEACH_BLESS=1 cargo test -p pleach-tests --test trials golden/\n{diff}"
    ))
}

fn read(text: &str) -> Result<Golden<'_>, String> {
    let (mut test, mut why, mut at) = (None, false, 0);
    let mut g = Golden {
        header: "",
        test: Test::Parse,
        options: Options::default(),
        pack: false,
        chunk: false,
        blocks: BTreeMap::new(),
        join: false,
        picks: false,
        unlaid: false,
        symbols: values::symbols(),
        above: "",
        below: None,
    };
    for line in text.split_inclusive('\n') {
        let Some(rest) = line.strip_prefix("// ") else { break };
        let (key, value) = rest.trim_end().split_once(": ").ok_or("a header line is '// key: value'")?;
        match key {
            "test" => {
                test = Some(match value.split_once(' ').unwrap_or((value, "")) {
                    ("parse", "") => Test::Parse,
                    ("verify", "") => Test::Verify,
                    ("schedule", "") => Test::Schedule,
                    ("pass", name) => Test::Pass(name.into()),
                    _ => return Err(format!("unknown test '{value}'")),
                });
            }
            "why" => why = true,
            "options" => value.split_whitespace().try_for_each(|o| option(&mut g, o))?,
            _ => return Err(format!("unknown header word '{key}'")),
        }
        at += line.len();
    }
    g.test = test.ok_or("the header has no 'test'")?;
    if !why {
        return Err("the header has no 'why'".into());
    }
    let (header, body) = text.split_at(at);
    g.header = header;
    (g.above, g.below) = match body.split_once("\n---\n") {
        Some((a, b)) => (&body[..a.len() + 1], Some(b)),
        None => (body, None),
    };
    Ok(g)
}

fn option(g: &mut Golden, word: &str) -> Result<(), String> {
    let unknown = || format!("unknown option '{word}'");
    match word.split_once('=') {
        None if word == "merge" => g.options.merge = true,
        None if word == "pack" => g.pack = true,
        None if word == "chunk" => g.chunk = true,
        None if word == "join" => g.join = true,
        None if word == "picks" => g.picks = true,
        None if word == "unlaid" => g.unlaid = true,
        None if word == "bf16" => g.options.dtype = DType::BF16,
        Some(("blocks", tensor)) => {
            let (name, format) = tensor.split_once(':').ok_or_else(unknown)?;
            g.blocks.insert(name.into(), BlockFormat::from_name(format).ok_or_else(unknown)?);
        }
        Some(("no", rule)) => g.options.disabled_rules.push(rule.into()),
        Some((key, n)) => {
            let n: u64 = n.parse().map_err(|_| unknown())?;
            if key == "tokens" {
                g.options.tokens_hint.extend(["infer", "generate"].map(|e| (e.to_string(), n)));
            } else {
                g.symbols.insert(Sym::new(key).ok_or_else(unknown)?, n);
            }
        }
        None => return Err(unknown()),
    }
    Ok(())
}

/// The file as it should be.
fn expected(path: &Path, g: &Golden) -> Result<String, String> {
    let head = g.header;
    let graph = match (&g.test, g.below, parse(g.above)) {
        (Test::Parse, Some(_), Ok(_)) => return Err("the graph parses, but an error is stored below '---'".into()),
        (Test::Parse, Some(_), Err(e)) => return Ok(format!("{head}{}---\n{e}\n", g.above)),
        (_, _, Err(e)) => return Err(format!("the graph above does not parse: {e}")),
        (_, _, Ok(graph)) => graph,
    };
    round_trip(&graph)?;
    if let Test::Verify = g.test {
        return Ok(format!("{head}{}", verify::annotate(&graph)));
    }
    verify::verify(&graph).map_err(|e| e.to_string())?;
    let above = format!("{head}{}", print(&graph));
    Ok(match &g.test {
        Test::Parse | Test::Verify => above,
        Test::Pass(name) => {
            let after = pass(name, &graph, g)?;
            let file = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let changed = outline(&after) != outline(&graph);
            if file.starts_with("fires") && !changed || file.starts_with("not") && changed {
                return Err(format!("a file called {file}, but the pass gives\n{}", print(&after)));
            }
            format!("{above}---\n{}", print(&after))
        }
        Test::Schedule => format!("{above}---\n{}", schedule(&graph, g)?),
    })
}

/// The lines of a graph without the numbers of values, sorted: what it does, but not in which order it is written.
fn outline(g: &Graph) -> Vec<String> {
    let bare = |line: &str| {
        let words = line.split('%').map(|w| w.trim_start_matches(|c: char| c.is_ascii_digit()));
        words.collect::<Vec<_>>().join("%")
    };
    let mut all: Vec<String> = print(g).lines().map(bare).collect();
    all.sort();
    all
}

fn round_trip(g: &Graph) -> Result<(), String> {
    let text = print(g);
    let again = parse(&text).map_err(|e| format!("the printed graph does not parse: {e}\n{text}"))?;
    if again == *g { Ok(()) } else { Err(format!("the printed graph reads as another one:\n{text}")) }
}

fn pass(name: &str, graph: &Graph, g: &Golden) -> Result<Graph, String> {
    let pass = find(name).map_err(|e| e.to_string())?;
    let run = |x: &Graph| (pass.run)(x, &g.options, &mut Report::default()).map_err(|e| e.to_string());
    let after = run(graph)?;
    if run(graph)? != after {
        return Err("the pass gives another graph the second time".into());
    }
    verify::verify(&after).map_err(|e| format!("the graph after the pass does not verify: {e}\n{}", print(&after)))?;
    round_trip(&after)?;
    let start = Start::seeded(graph, g.symbols.clone(), 1);
    let mut want = run_graph(graph, &start).map_err(|e| e.to_string())?;
    let start = if ["differentiate", "precision"].contains(&name) {
        Start::seeded(&after, g.symbols.clone(), 1)
    } else {
        start
    };
    let mut got = run_graph(&after, &start).map_err(|e| format!("after the pass: {e}\n{}", print(&after)))?;
    if after.entry("accumulate").is_some() && graph.entry("accumulate").is_none() {
        // gradients and steps are new; the loss is what it was
        want = want.into_iter().map(|(n, t)| (n.replace("train/", "accumulate/"), t)).collect();
        got.retain(|n, _| want.contains_key(n));
    }
    let rounded = name == "precision";
    if rounded {
        got.values_mut()
            .chain(want.values_mut())
            .for_each(|t| *t = Tensor::f32(t.shape.clone(), t.floats().into_owned()));
    }
    same(&got, &want, &|_| if rounded { ROUNDING } else { TOLERANCE })
        .map_err(|e| format!("the pass changed results: {e}\n{}", print(&after)))?;
    Ok(after)
}

fn schedule(graph: &Graph, g: &Golden) -> Result<String, String> {
    let on_gpu = Options { target: Target::GPU, ..g.options.clone() };
    let laid = |k: &Kernel| {
        let sets = k.body.nodes.iter().any(|n| matches!(n.op, Op::Scatter { .. }));
        k.class == Class::Contraction && sets
    };
    let options = CutOptions {
        supported: &|k| if g.unlaid && laid(k) { Err("nothing is laid over blocks".into()) } else { Ok(()) },
        panels: if g.pack { &[48, 32, 16] } else { &[] },
        blocks: g.blocks.clone(),
        picks: g.picks.then(|| on_gpu.clone()),
    };
    let mut s = fuse_kernels::schedule(graph, &options).map_err(|e| e.to_string())?;
    if g.chunk {
        chunk::run_with(&mut s, &|_| 16, 256, 4).map_err(|e| e.to_string())?;
    }
    if g.join {
        join::run(&mut s, &on_gpu).map_err(|e| e.to_string())?;
    }
    // What entries leave behind may lie in other parameters than before: a second run of them reads it.
    let start = Start { again: !g.blocks.is_empty(), ..Start::seeded(graph, g.symbols.clone(), 1) };
    let mut want = run_graph(graph, &start).map_err(|e| e.to_string())?;
    let text = print_schedule(&s);
    let mut got = run_schedule(&s, &start).map_err(|e| format!("the schedule: {e}\n{text}"))?;
    want.retain(|n, _| got.contains_key(n) || !got.contains_key(&format!("{n}.set")));
    got.retain(|n, _| !n.ends_with(".set") || want.contains_key(n));
    same(&got, &want, &|_| TOLERANCE).map_err(|e| format!("the schedule changed results: {e}\n{text}"))?;
    Ok(text)
}
