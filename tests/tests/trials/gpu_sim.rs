//! GPU plans in the PTX simulator: every kernel by itself, whole inferences, whole training steps, beside the interpreter.
//!
//! `PLEACH_GPU_FULL=1` takes every fixture and all steps of it (`make test-gpu-full`). Needs LLVM, and no GPU.

use crate::Trials;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::{Class, DType, Sym};
use pleach_passes::Options;
use pleach_plan::{LaunchParam, Meta};
use pleach_tests::gpu::cases::{Case, From};
use pleach_tests::gpu::mutate::{CHANGES, Change, DECODING, HOPPER, survey};
use pleach_tests::gpu::{Compiled, alone, attention, estimate};
use pleach_tests::{fixtures, training};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

pub(crate) fn trials(trials: &mut Trials) {
    let full = std::env::var_os("PLEACH_GPU_FULL").is_some();
    for from in trials.listed("fixtures", list(full)) {
        if ["llama-lora", "llama-paca", "llama-tiny+lora-r4", "llama-tiny+paca"].contains(&from.name()) {
            add_in_blocks(trials, from.clone(), full);
        }
        add(trials, from, full);
    }
    for x in attention::forms(full) {
        // Wide heads have a form of their own on the newer chip.
        let both = full || (64..=128).contains(&x.head_dim);
        for chip in GpuChip::ALL.into_iter().filter(|c| both || *c == GpuChip::Sm80) {
            let name = format!("attention/{x:?}/{}", chip.name());
            trials.add(name, move || attend(&x, chip, full));
        }
    }
    for (name, mode, count) in
        [("set-few", "set", "6"), ("add-few", "add", "6"), ("set", "set", "T"), ("add", "add", "T")]
    {
        trials.add(format!("scatter/{name}"), move || scatter(mode, count));
    }
    for (name, count) in [("few", 6), ("many", 70)] {
        trials.add(format!("scatter/side-by-side-{name}"), move || side_by_side(count));
    }
    for dtype in [DType::F32, DType::BF16, DType::I32] {
        trials.add(format!("long-sum/{dtype}"), move || long_sum(dtype));
    }
    for chip in GpuChip::ALL {
        trials.add(format!("many/small/{}", chip.name()), move || many(chip, &SMALL, true));
    }
    trials.add("many/large", || many(GpuChip::Sm80, &[1_100_000, 3], false));
    trials.add("many/differ", many_differ);
    trials.add("estimate", move || estimate(full));
    for method in ["lora", "paca"] {
        for chip in GpuChip::ALL {
            trials.add(format!("executed/{method}/{}", chip.name()), move || executed(method, chip));
        }
    }
    if let Some(folder) = std::env::var_os("PLEACH_GPU_ESTIMATE") {
        for method in ["lora", "paca"] {
            for chip in GpuChip::ALL {
                let file = Path::new(&folder).join(format!("counts-llama-3-8b-1-{method}-r16.{}.json", chip.name()));
                trials.add(format!("counts/{method}/{}", chip.name()), move || counts(method, chip, &file));
            }
        }
    }
    mutations(trials);
}

/// A form of attention; in a full sweep with what the assembler says of it.
#[allow(clippy::print_stdout, reason = "registers are what a full sweep is asked for")]
fn attend(x: &attention::Form, chip: GpuChip, full: bool) -> Result<(), String> {
    let all = attention::check(x, chip)?;
    if full {
        println!("{x:?} {}", chip.name());
        all.iter().for_each(|(entry, r)| println!("{entry}: {r:?}"));
    }
    Ok(())
}

/// What a training step of one layer of a large model executes, for one sequence of 2048 tokens; two blocks of a launch stand for the others.
/// All work but the optimizer's grows with the number of sequences.
fn counts(method: &str, chip: GpuChip, file: &Path) -> Result<(), String> {
    let graph = pleach_tests::shaped::LLAMA_3_8B.open(1)?.training(method, 16)?;
    // As a plan for four rows of 2048 tokens is made.
    let hints = ["train", "accumulate", "step", "evaluate"].map(|n| (n.to_string(), 8192));
    let options = Options { dtype: DType::BF16, tokens_hint: hints.to_vec(), length_hint: 2048, ..Options::default() };
    let c = pleach_tests::gpu::compile(&graph, &options, chip, Meta::default())?;
    let (mut symbols, _) = alone::symbols([2048, 1, 2047]);
    symbols.insert(Sym::P, 2048);
    symbols.insert(Sym::C, 1);
    let rows = estimate::entries(&c, &["accumulate", "update"], &symbols, 2)?;
    let out = serde_json::json!({
        "what": "counted by the simulator: two blocks of every launch stand for the others; an estimate, not a measurement",
        "model": "llama-3-8b, 1 layer", "method": method, "rank": 16, "dtype": "bf16", "tokens": 2048, "sequences": 1,
        "target": chip.name(), "classes": estimate::classes(&rows), "kernels": estimate::kernels(&rows, chip),
    });
    std::fs::write(file, format!("{out:#}\n")).map_err(|e| format!("{}: {e}", file.display()))
}

/// A training step of one layer of whole tiles, executed as a whole, beside the formulas of the estimate: operations of products are the same,
/// and the sectors of memory that are touched are the operands and results, each once. No access takes much more than its bytes need.
fn executed(method: &str, chip: GpuChip) -> Result<(), String> {
    let graph = pleach_tests::shaped::WHOLE_TILES.open(1)?.training(method, 32)?;
    let options = Options { dtype: DType::BF16, ..Options::default() };
    let c = pleach_tests::gpu::compile(&graph, &options, chip, Meta::default())?;
    let (symbols, _) = alone::symbols([256, 1, 256]);
    let rows = estimate::entries(&c, &["accumulate", "update"], &symbols, u64::MAX)?;
    estimate::agree(&c, &rows)?;
    estimate::held(&c, &rows)?;
    let Some(folder) = std::env::var_os("PLEACH_GPU_ESTIMATE") else { return Ok(()) };
    let file = Path::new(&folder).join(format!("executed-whole-tiles-1-{method}-r32.{}.json", chip.name()));
    let out = serde_json::json!({
        "what": "executed in the simulator, all blocks of every launch, and held against the formulas; not a measurement",
        "model": "whole-tiles, 1 layer", "method": method, "rank": 32, "dtype": "bf16", "tokens": 256, "sequences": 1,
        "target": chip.name(), "classes": estimate::classes(&rows), "kernels": estimate::kernels(&rows, chip),
    });
    std::fs::write(&file, format!("{out:#}\n")).map_err(|e| format!("{}: {e}", file.display()))
}

/// Rows set or added up where some indices are equal: of few, whose number is known, and of as many as there are tokens.
fn scatter(mode: &str, count: &str) -> Result<(), String> {
    let (indices, rows) = match count {
        "T" => ("input \"indices\" : i32[T]", "f32[T,8]"),
        _ => ("const [3, 1, 3, 0, 1, 3] : i32[6]", "f32[6,8]"),
    };
    let text = format!(
        "graph core\nparam @0 \"table\" f32[9,8] state zeros\nentry \"infer\" {{\n%0 = param @0 : f32[9,8]\n%1 = {indices}\n\
         %2 = input \"values\" : {rows}\n%3 = scatter_{mode}(%0, %1, %2) {{axis = 0}} : f32[9,8]\nassign @0 %3\n}}\n"
    );
    let graph = pleach_ir::text::parse(&text).map_err(|e| e.to_string())?;
    let c = pleach_tests::gpu::compile(&graph, &Options::default(), GpuChip::Sm80, Meta::default())?;
    let kernel = c.schedule.kernels.iter().position(|k| k.class == Class::Scatter).ok_or("no scatter")?;
    let launches = c.plan.kernels[kernel].launches.len();
    if launches != if count == "T" { 2 } else { 1 } {
        return Err(format!("{launches} launches"));
    }
    for (seed, at) in [[5, 1, 1], [70, 2, 1]].into_iter().enumerate() {
        alone::check(&c, kernel, at, seed as u64)?;
    }
    Ok(())
}

/// Columns of three parameters that are set at once are one run.
fn side_by_side(count: usize) -> Result<(), String> {
    let mut text = String::from("graph core\n");
    (0..3).for_each(|i| text += &format!("param @{i} \"w{i}\" f32[9,80] state zeros\n"));
    text += "entry \"infer\" {\n";
    for i in 0..3 {
        let n = 4 * i;
        text += &format!(
            "%{n} = param @{i} : f32[9,80]\n%{} = input \"i{i}\" : i32[{count}]\n%{} = input \"x{i}\" : f32[9,{count}]\n\
             %{} = scatter_set(%{n}, %{}, %{}) {{axis = 1}} : f32[9,80]\n",
            n + 1,
            n + 2,
            n + 3,
            n + 1,
            n + 2
        );
    }
    (0..3).for_each(|i| text += &format!("assign @{i} %{}\n", 4 * i + 3));
    let graph = pleach_ir::text::parse(&(text + "}\n")).map_err(|e| e.to_string())?;
    let c = pleach_tests::gpu::compile(&graph, &Options::default(), GpuChip::Sm80, Meta::default())?;
    let (entry, kernels) = (&c.schedule.entries[0], &c.schedule.kernels);
    let [step] = &entry.steps[..] else { return Err(format!("{} launches in place of one", entry.steps.len())) };
    let kernel = step.kernel.0 as usize;
    if kernels[kernel].class != Class::Scatter || kernels[kernel].results.len() != 3 {
        return Err("the launch is no three scatters".into());
    }
    alone::check(&c, kernel, [5, 1, 1], 3).map(|_| ())
}

/// A sum of many terms is rounded once, however it is taken up.
fn long_sum(dtype: DType) -> Result<(), String> {
    let terms: Vec<String> = (0..70).map(|i| format!("%{i}")).collect();
    let mut text = String::from("graph core\nentry \"infer\" {\n");
    terms.iter().for_each(|t| text += &format!("{t} = input \"x{}\" : {dtype}[T,24]\n", &t[1..]));
    text += &format!("%70 = add({}) : {dtype}[T,24]\noutput \"sum\" %70\n}}\n", terms.join(", "));
    let graph = pleach_ir::text::parse(&text).map_err(|e| e.to_string())?;
    let c = pleach_tests::gpu::compile(&graph, &Options::default(), GpuChip::Sm80, Meta::default())?;
    alone::check(&c, 0, [5, 1, 1], 7).map(|_| ())
}

/// Elements of parameters that are stepped together: less than 16 bytes, whole multiples of them, and what is left past them.
const SMALL: [u64; 9] = [1, 3, 8, 1024, 1031, 35, 2048, 1024, 4105];

/// Steps of parameters of these sizes are one launch, whatever numbers they take: `lr` or numbers of their own. `copies`: every other one has a
/// copy in bf16.
fn many(chip: GpuChip, sizes: &[u64], copies: bool) -> Result<(), String> {
    let copied = |i: usize| copies && i % 2 == 1;
    let (mut params, mut body, mut assigns) = (String::new(), String::new(), String::new());
    let (mut param, mut next) = (0, 2);
    for (i, n) in sizes.iter().enumerate() {
        // Seen as matrices where that is possible.
        let shape = if n % 7 == 0 { format!("{},7", n / 7) } else { n.to_string() };
        let rate = if i % 3 == 0 {
            body += &format!("%{next} = input \"lr{i}\" : f32[]\n");
            next += 1;
            next - 1
        } else {
            1
        };
        let (p, v, g) = (param, param + 1, param + 2);
        for (at, name) in [(p, "p"), (v, "v"), (g, "g")] {
            params += &format!("param @{at} \"{name}{i}\" f32[{shape}] state zeros\n");
        }
        let lines = [
            format!("param @{g} : f32[{shape}]"),
            format!("param @{v} : f32[{shape}]"),
            format!("mul(%0, %{}) : f32[{shape}]", next + 1),
            format!("mul(%{next}, %{next}) : f32[{shape}]"),
            format!("add(%{}, %{}) : f32[{shape}]", next + 2, next + 3),
            format!("exp(%{}) : f32[{shape}]", next + 4),
            format!("div(%{next}, %{}) : f32[{shape}]", next + 5),
            format!("mul(%{rate}, %{}) : f32[{shape}]", next + 6),
            format!("param @{p} : f32[{shape}]"),
            format!("sub(%{}, %{}) : f32[{shape}]", next + 8, next + 7),
            "const 0.0 : f32[]".to_string(),
            format!("broadcast(%{}) {{axes = []}} : f32[{shape}]", next + 10),
            format!("cast(%{}) : bf16[{shape}]", next + 9),
        ];
        let taken = lines.len() - usize::from(!copied(i));
        lines[..taken].iter().enumerate().for_each(|(j, l)| body += &format!("%{} = {l}\n", next + j));
        // Results in another order are the same results; a gradient is set to zero where it is read.
        let mut own = vec![(p, next + 9), (v, next + 4), (g, next + 11)];
        param += 3;
        if copied(i) {
            params += &format!("param @{param} \"c{i}\" bf16[{shape}] state zeros\n");
            own.insert(i % 4, (param, next + 12));
            param += 1;
        }
        own.iter().for_each(|(p, x)| assigns += &format!("assign @{p} %{x}\n"));
        next += taken;
    }
    let text = format!(
        "graph core\n{params}entry \"infer\" {{\n%0 = input \"beta\" : f32[]\n%1 = input \"lr\" : f32[]\n{body}{assigns}}}\n"
    );
    let graph = pleach_ir::text::parse(&text).map_err(|e| format!("{e}\n{text}"))?;
    let c = pleach_tests::gpu::compile(&graph, &Options::default(), chip, Meta::default())?;
    let [step] = &c.schedule.entries[0].steps[..] else {
        return Err(format!("{} launches in place of one", c.schedule.entries[0].steps.len()));
    };
    let kernel = step.kernel.0 as usize;
    let [launch] = &c.plan.kernels[kernel].launches[..] else { return Err("not one launch".into()) };
    let table =
        launch.params.iter().find_map(|p| if let LaunchParam::Table(list) = p { Some(list.len()) } else { None });
    // Gradients, values and second moments of all, copies, and rates that are not in common to a pattern.
    let few = 3 * sizes.len() + sizes.iter().enumerate().filter(|(i, _)| copied(*i)).count();
    if table.is_none_or(|n| n < few || n > few + sizes.len()) {
        return Err(format!("a table of {table:?} pointers for {} parameters", sizes.len()));
    }
    alone::check(&c, kernel, [5, 1, 1], 3).map(|_| ())
}

/// Launches of other forms are one launch, each with code of its own, while what only looks alike is told apart.
fn many_differ() -> Result<(), String> {
    let text = "graph core\nparam @0 \"a\" f32[37] state zeros\nparam @1 \"b\" f32[300] state zeros\nparam @2 \"c\" f32[37] state zeros\n\
                entry \"infer\" {\n%0 = input \"s\" : f32[]\n%1 = input \"t\" : f32[]\n%2 = param @0 : f32[37]\n%3 = param @1 : f32[300]\n\
                %4 = param @2 : f32[37]\n%5 = sub(%0, %2) : f32[37]\n%6 = sub(%3, %0) : f32[300]\n%7 = sub(%1, %4) : f32[37]\n\
                assign @0 %5\nassign @1 %6\nassign @2 %7\n}\n";
    let graph = pleach_ir::text::parse(text).map_err(|e| e.to_string())?;
    let c = pleach_tests::gpu::compile(&graph, &Options::default(), GpuChip::Sm80, Meta::default())?;
    let [step] = &c.schedule.entries[0].steps[..] else { return Err("not one launch".into()) };
    alone::check(&c, step.kernel.0 as usize, [5, 1, 1], 7).map(|_| ())
}

/// Counts hang together: products take at least what they need, and every result is written.
#[allow(clippy::print_stdout, reason = "the table is what a full sweep is asked for")]
fn estimate(full: bool) -> Result<(), String> {
    let from = list(false)?.into_iter().nth(1).ok_or("no fixture")?;
    let case = Case::new(from, DType::BF16, GpuChip::Sm80);
    let rows = estimate::rows(case.compiled()?, &alone::symbols([64, 2, 40]).0, u64::MAX)?;
    for r in rows.iter().filter(|r| r.class == Class::Contraction) {
        if r.counts.mma_flops > 0 && r.excess() < 1.0 || r.counts.global_read == 0 || r.counts.global_written == 0 {
            return Err(estimate::table(std::slice::from_ref(r)));
        }
    }
    if !rows.iter().any(|r| r.counts.mma_flops > 0) {
        return Err(format!("no product takes tensor cores:\n{}", estimate::table(&rows)));
    }
    let model = pleach_tests::root().join("models/smollm2");
    if full && model.is_dir() {
        let checkpoint = pleach_frontend::Checkpoint::open(&model).map_err(|e| e.to_string())?;
        let graph = pleach_frontend::import(&checkpoint, &[], &["infer"]).map_err(|e| e.to_string())?;
        let options = Options { dtype: DType::BF16, ..Options::default() };
        for chip in GpuChip::ALL {
            let c = pleach_tests::gpu::compile(&graph, &options, chip, Meta::default())?;
            let rows = estimate::rows(&c, &alone::symbols([512, 1, 1]).0, 4)?;
            println!("SmolLM2, 512 tokens of one sequence, bf16, {}:\n{}", chip.name(), estimate::table(&rows));
        }
    }
    Ok(())
}

/// Attention in which warpgroups multiply.
const WIDE: attention::Form =
    attention::Form { head_dim: 64, heads: (2, 1), causal: true, window: None, cached: false, gradient: true };

/// A deliberate error: its name, the change, what a report of it must say (anything where that is empty), and where it is planted.
type Planted = (String, Change, &'static [&'static str], Arc<Vec<Case>>);

/// Deliberate errors in the code of a training step and of an inference.
#[allow(clippy::print_stderr, reason = "a change that nobody sees is worth knowing")]
fn mutations(trials: &mut Trials) {
    let Ok(list) = list(false) else { return };
    let of = |chip| -> Vec<Case> {
        list.iter().skip(1).take(2).map(|from| Case::new(from.clone(), DType::BF16, chip)).collect()
    };
    let cases = Arc::new(of(GpuChip::Sm80));
    let in_blocks = |from: From, chip: GpuChip| Case::in_blocks(from, DType::BF16, chip);
    let coded = list.iter().filter(|f| f.name() == "llama-tiny+lora-r4");
    let coded: Vec<Case> = coded.flat_map(|f| GpuChip::ALL.map(|chip| in_blocks(f.clone(), chip))).collect();
    let newer: Vec<Case> = of(GpuChip::Sm90a)
        .into_iter()
        .chain(list.iter().filter(|f| f.name() == "llama-tiny+lora-r4").map(|f| in_blocks(f.clone(), GpuChip::Sm90a)))
        .collect();
    let (coded, newer) = (Arc::new(coded), Arc::new(newer));
    // Its warpgroups are in attention too, where no other case has heads so wide.
    let wide: Arc<OnceLock<Result<Compiled, String>>> = Arc::new(OnceLock::new());
    let mut all: Vec<Planted> = vec![];
    all.extend(CHANGES.map(|(name, c)| (name.into(), c, &[][..], cases.clone())));
    all.extend(DECODING.map(|(name, c)| (name.into(), c, &[][..], coded.clone())));
    all.extend(HOPPER.map(|(name, c, reasons)| (format!("sm_90a/{name}"), c, reasons, newer.clone())));
    for (name, change, reasons, cases) in all {
        let wide = wide.clone();
        trials.add(format!("mutation/{name}"), move || {
            let (mut places, mut unseen) = (0, vec![]);
            for chip in GpuChip::ALL {
                let before = places;
                for c in cases.iter().filter(|c| c.chip == chip) {
                    let (n, list) = survey(c.compiled()?, change, reasons)?;
                    places += n;
                    unseen.extend(list.into_iter().map(|k| format!("{}: {k}", c.name)));
                }
                if places == before && reasons.is_empty() && cases.iter().any(|c| c.chip == chip) {
                    return Err(format!("no kernel for {} has a place for it", chip.name()));
                }
            }
            if !reasons.is_empty() {
                let c =
                    wide.get_or_init(|| attention::compiled(&WIDE, GpuChip::Sm90a)).as_ref().map_err(Clone::clone)?;
                let (n, list) = survey(c, change, reasons)?;
                places += n;
                unseen.extend(list.into_iter().map(|k| format!("{WIDE:?}: {k}")));
            }
            // Some changes change nothing: a second barrier behind a first one, a bound that another one implies.
            let list = unseen.join("\n");
            if places == 0 || 10 * unseen.len() > places {
                return Err(format!("not seen in {} of {places} kernels:\n{list}", unseen.len()));
            }
            if !unseen.is_empty() {
                eprintln!("{name}: not seen in {} of {places} kernels:\n{list}", unseen.len());
            }
            Ok(())
        });
    }
}

/// What is run.
fn list(full: bool) -> Result<Vec<From>, String> {
    let mut out = vec![];
    for c in training::cases()? {
        if full || ["llama-lora", "llama-paca"].contains(&c.name.as_str()) {
            out.push(From::Train(c));
        }
    }
    if full {
        out.extend(training::cases_in("methods")?.into_iter().map(From::Train));
    }
    for f in fixtures::cases()? {
        if full || ["llama-tiny+lora-r4", "llama-tiny+paca", "bert-tiny+bert-all"].contains(&f.name.as_str()) {
            out.push(From::Infer(Box::new(f)));
        }
    }
    Ok(out)
}

/// The trials of a graph: both types, both chips. Kernels whose code is the same for both chips run alone once.
fn add(trials: &mut Trials, from: From, full: bool) {
    for dtype in [DType::F32, DType::BF16] {
        let old = Arc::new(Case::new(from.clone(), dtype, GpuChip::Sm80));
        let new = Arc::new(Case::new(from.clone(), dtype, GpuChip::Sm90a));
        let before = old.clone();
        for (case, before) in [(old, None), (new, Some(before))] {
            let name = case.name.clone();
            let (a, b, c) = (case.clone(), case.clone(), case);
            trials.add(format!("{name}/kernels"), move || {
                let skip = before.map_or(Ok(BTreeSet::new()), |b| b.codes())?;
                a.alone(&skip)?;
                Ok(())
            });
            trials.add(format!("{name}/whole"), move || b.whole());
            if full && dtype == DType::F32 && matches!(c.from, From::Train(_)) {
                trials.add(format!("{name}/steps"), move || c.train());
            }
        }
    }
}

/// The same graph with its weights in blocks: what a plan over numbers does not have.
fn add_in_blocks(trials: &mut Trials, from: From, full: bool) {
    for (dtype, chip) in [(DType::BF16, GpuChip::Sm80), (DType::BF16, GpuChip::Sm90a), (DType::F32, GpuChip::Sm80)] {
        // Kernels over f32 are the same on both chips, and take the longest.
        if !full && dtype == DType::F32 && matches!(from, From::Train(_)) {
            continue;
        }
        let case = Arc::new(Case::in_blocks(from.clone(), dtype, chip));
        let plain = Case::new(from.clone(), dtype, chip);
        let (a, b, name) = (case.clone(), case.clone(), case.name.clone());
        trials.add(format!("{name}/kernels"), move || {
            if a.alone(&plain.codes()?)? == 0 {
                return Err("no kernel reads blocks".into());
            }
            Ok(())
        });
        trials.add(format!("{name}/whole"), move || b.whole());
    }
}
