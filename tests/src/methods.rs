//! The checks that every adapter method gets from its fixture in `tests/fixtures/methods`, and the support matrix they make.
//!
//! Nothing here names a method: what is checked follows from the trait, the configuration and the dumps (see
//! `scripts/make_method_fixtures.py`).

use crate::training::{CHANGE, Interpreted, LOSS, Opened, Program, TrainCase};
use pleach_frontend::adapter::{
    self, AdapterPlan, Request, SlotData, SlotTensor, SlotValue, edited, merged, obstacle, prepare, slot_values,
    to_lora,
};
use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Dtype, Import, TensorRef, TensorTable};
use pleach_ir::interp::{Data, Tensor};
use pleach_ir::{Graph, Op, Source};
use pleach_passes::{Options, Pipeline, manager};
use pleach_runtime::train::{AdapterPlan as Saved, Events, Look, Machine, Measured, Moment, Order, calibrate, step};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Largest difference of logits, gradients and weights over the largest magnitude.
pub const TOLERANCE: f64 = 1e-4;

/// A check of a case.
pub type Check = fn(&TrainCase) -> Result<(), String>;

/// Every check by name. Compiled kernels are the business of the test itself.
pub const CHECKS: [(&str, Check); 9] = [
    ("initial", initial),
    ("forward", forward),
    ("gradients", gradients),
    ("steps", steps),
    ("saved", saved),
    ("merged", merging),
    ("swapped", swapped),
    ("converted", converted),
    ("trained", trained),
];

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<(), String> {
    let error = got.relative_error(want);
    if error <= tolerance { Ok(()) } else { Err(format!("{what} is off by {error:.1e}, allowed {tolerance:.0e}")) }
}

fn dumps(case: &TrainCase) -> Result<TensorTable, String> {
    TensorTable::open_file(&case.dir.join("dumps.safetensors")).map_err(text)
}

fn dump(dumps: &TensorTable, name: &str) -> Result<Tensor, String> {
    let t = dumps.get(name).ok_or_else(|| format!("the fixture has no {name}"))?;
    Ok(Tensor::f32(t.shape.clone(), t.read_f32().map_err(text)?))
}

/// Every dump `kind.<rest>`: rest and tensor.
fn of_kind(dumps: &TensorTable, kind: &str) -> Result<Vec<(String, Tensor)>, String> {
    let named = dumps.names().filter_map(|n| Some((n, n.strip_prefix(kind)?.strip_prefix('.')?)));
    named.map(|(full, rest)| Ok((rest.to_owned(), dump(dumps, full)?))).collect()
}

/// Logits of the first two rows by an imported graph.
fn logits(o: &Opened, adapters: &[Adapter]) -> Result<Tensor, String> {
    let (_, inputs) = o.inference()?;
    let graph = pleach_frontend::import(&o.checkpoint, adapters, &["infer"]).map_err(text)?;
    let mut machine = Interpreted::with(Program::Graph(graph), o, adapters)?;
    machine.entry("infer", &inputs)?.outputs.remove("logits").ok_or_else(|| "no logits".into())
}

/// A new adapter of the fixture's configuration with its first values.
fn fresh(o: &Opened, case: &TrainCase) -> Result<Adapter, String> {
    let config = MethodConfig::read(&case.dir.join("start")).map_err(text)?;
    let adapter = Adapter::fresh(&config, &o.checkpoint.modules).map_err(text)?;
    let mut made = Measured::new();
    if adapter.is_prepared() {
        let values = prepare(&adapter, &o.checkpoint, &calibrated(o, &adapter)?, 2).map_err(text)?;
        let floats = |(key, t): (String, SlotTensor)| match t.data {
            SlotData::F32(x) => Some((key, x)),
            SlotData::I32(_) => None,
        };
        made.values = values.into_iter().filter_map(floats).collect();
    }
    case.fresh(&o.checkpoint, &made)
}

/// What the method asks for, measured by the interpreter over the fixture's rows.
fn calibrated(o: &Opened, adapter: &Adapter) -> Result<BTreeMap<String, adapter::Measured>, String> {
    let requests = adapter.requests();
    let Some((_, first)) = requests.first() else { return Ok(BTreeMap::new()) };
    let modules: Vec<String> = requests.iter().map(|(module, _)| module.clone()).collect();
    let (entry, look) = match first {
        Request::Gradient { .. } => ("calibrate", Look::Gradients),
        Request::Inputs { .. } => ("measure", Look::Inputs),
    };
    let adapters = std::slice::from_ref(adapter);
    let import = Import::new(&o.checkpoint).adapters(adapters).entries(&[entry]).calibrated(&modules);
    let graph = manager::run(&import.graph().map_err(text)?, &Pipeline::default(), &options(o)).map_err(text)?.graph;
    let names: Vec<String> = graph.params.iter().map(|p| p.name.clone()).collect();
    let mut machine = Interpreted::with(Program::Graph(graph), o, &[])?;
    let batches = first.batches();
    calibrate(&mut machine, look, &o.rows, &mut Order::new(o.rows.len(), None), o.settings.batch, batches)
        .map_err(text)?;
    adapter::collect(&modules, &o.checkpoint, batches, &names, |name| {
        let value = machine.value(name).ok_or_else(|| format!("{name} was not measured"))?;
        Ok(value.floats().into_owned())
    })
}

/// A new adapter's change of the base and its own, beside those of the reference.
fn prepared(o: &Opened, case: &TrainCase, adapter: &Adapter) -> Result<(), String> {
    let dumps = dumps(case)?;
    let mut compared = 0;
    for kind in ["base", "delta"] {
        for (module, want) in of_kind(&dumps, kind)? {
            let site = adapter.site(&module).ok_or_else(|| format!("{module} is no site"))?;
            let t = o.checkpoint.param(&format!("{module}.weight")).ok_or_else(|| format!("no weight of {module}"))?;
            let weight = t.read_f32().map_err(text)?;
            let mut got = edited(adapter, site, &o.checkpoint, &weight).map_err(text)?;
            if kind == "delta" {
                let whole = merged(adapter, site, &o.checkpoint, &weight).map_err(text)?;
                got = whole.iter().zip(&got).map(|(a, b)| a - b).collect();
            }
            // A delta of nothing is as small beside the weight as rounding makes it.
            let got = Tensor::f32(t.shape.clone(), got);
            let zero = want.floats().iter().all(|x| *x == 0.0);
            let (got, want) = match zero {
                true => {
                    let sum = |x: &Tensor| x.floats().iter().zip(&weight).map(|(a, b)| a + b).collect::<Vec<_>>();
                    (Tensor::f32(t.shape.clone(), sum(&got)), Tensor::f32(t.shape.clone(), sum(&want)))
                }
                false => (got, want),
            };
            close(&format!("{kind} of a new adapter at {module}"), &got, &want, TOLERANCE)?;
            compared += 1;
        }
    }
    // Directions without lengths or signs: what a factor spans.
    for (file, want) in of_kind(&dumps, "span")? {
        let (module, part) = file.rsplit_once('.').unwrap_or_default();
        let value = adapter.site(module).and_then(|s| s.values.iter().find(|v| v.0 == &part));
        let t = value.ok_or_else(|| format!("{file} is no buffer"))?.1.read(&o.checkpoint).map_err(text)?;
        let SlotData::F32(x) = t.data else { return Err(format!("{file} holds indices")) };
        // Over the shorter axis, the rank's.
        let (rows, columns) = (t.shape[0] as usize, t.shape[1] as usize);
        let at = |i: usize, k: usize| if rows <= columns { x[k * columns + i] } else { x[i * columns + k] };
        let (rank, n) = (rows.min(columns), rows.max(columns));
        let cell = |i: usize, j: usize| (0..rank).map(|k| at(i, k) * at(j, k)).sum::<f32>();
        let got = (0..n * n).map(|k| cell(k / n, k % n)).collect();
        close(&format!("what {file} spans"), &Tensor::f32([n as u64, n as u64], got), &want, TOLERANCE)?;
        compared += 1;
    }
    let want = dump(&dumps, "start")?;
    close("the output of a new adapter", &logits(o, std::slice::from_ref(adapter))?, &want, TOLERANCE)?;
    if compared == 0 { Err("the fixture says nothing of a new adapter".into()) } else { Ok(()) }
}

/// A new adapter leaves the model as it is, unless the fixture says that the method means otherwise.
fn initial(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let adapter = fresh(&o, case)?;
    if o.expected["initial"] == "prepared" {
        return prepared(&o, case, &adapter);
    }
    let plain = logits(&o, &[])?;
    let error = logits(&o, std::slice::from_ref(&adapter))?.relative_error(&plain);
    match o.expected["initial"].as_str() {
        Some("random") if error < TOLERANCE => Err(format!("a new adapter changes nothing: {error:.1e}")),
        Some("random") => Ok(()),
        _ if error <= TOLERANCE / 5.0 => Ok(()),
        _ => Err(format!("a new adapter changes the logits by {error:.1e}")),
    }
}

/// The adapter's logits are the reference's, and far from the base's.
fn forward(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let want = dump(&dumps(case)?, "logits")?;
    close("the output", &logits(&o, &o.adapters)?, &want, TOLERANCE)?;
    let effect = logits(&o, &[])?.relative_error(&want);
    if !case.starts_new() && effect < 100.0 * TOLERANCE {
        return Err(format!("the adapter changes the output by {effect:.1e} only: the fixture cannot fail"));
    }
    Ok(())
}

/// Loss and gradients of the first step.
fn gradients(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    if case.trains(&o) {
        let graph = manager::run(&o.graph()?, &Pipeline::of(&["differentiate"]), &options(&o)).map_err(text)?.graph;
        let mut machine = Interpreted::new(Program::Graph(graph), &o)?;
        let b = o.rows.pack(0..o.settings.batch as usize * o.settings.accum as usize);
        let scale = [1.0 / b.labels.len() as f32];
        if let Some(events) = o.events()? {
            events.at(Moment::Before, 0, o.settings.steps, o.settings.seed, &mut machine).map_err(text)?;
        }
        let loss = Machine::run(&mut machine, "accumulate", &b.values(&scale), "loss").map_err(text)?;
        let want = o.expected["losses"][0].as_f64().unwrap_or(f64::NAN);
        let error = (f64::from(loss) / want - 1.0).abs();
        if error.is_nan() || error > LOSS {
            return Err(format!("the loss is {loss} instead of {want}"));
        }
        let list = of_kind(&dumps(case)?, "grad")?;
        if list.is_empty() {
            return Err("the fixture has no gradients".into());
        }
        let names = file_names(&o)?;
        for (file, want) in list {
            let key = names.get(&file).ok_or_else(|| format!("{file} is no tensor of the adapter"))?;
            let got = machine.value(&format!("grad.slot0.{key}")).ok_or_else(|| format!("{key} has no gradient"))?;
            close(&format!("the gradient of {key}"), got, &want, TOLERANCE)?;
        }
    }
    Ok(())
}

/// Key in the slot of every tensor of the adapter's file.
fn file_names(o: &Opened) -> Result<BTreeMap<String, String>, String> {
    let own = |t: &TensorRef| t.file.parent() == Some(&*o.adapters[0].dir);
    let named = |(key, value): (String, SlotValue)| Some((value.tensor().filter(|t| own(t))?.name.clone(), key));
    let read = slot_values(&o.adapters[0]).into_iter().filter_map(named);
    let plan = AdapterPlan::new(&o.adapters[0], 0, &o.checkpoint).map_err(text)?;
    let written = plan.tensors.into_iter().filter_map(|t| Some((t.file?, t.key)));
    Ok(written.chain(read).collect())
}

/// All optimizer steps, after all passes.
fn steps(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    if case.trains(&o) {
        let graph = manager::run(&o.graph()?, &Pipeline::default(), &options(&o)).map_err(text)?.graph;
        o.train(&mut Interpreted::new(Program::Graph(graph), &o)?, LOSS, CHANGE)?;
    }
    Ok(())
}

/// What is saved is what was read: the same tensors, bit for bit, also after a step, and the same configuration.
fn saved(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let plan = AdapterPlan::new(&o.adapters[0], 0, &o.checkpoint).map_err(text)?;
    let plan: Saved = serde_json::from_value(plan.to_json()).map_err(text)?;
    let mut machine = Interpreted::new(Program::Graph(o.graph()?), &o)?;
    let folder = temporary(&case.name)?;
    plan.write(&machine, None, &folder).map_err(text)?;
    if case.starts_new() {
        // Nothing was read.
        return std::fs::remove_dir_all(&folder).map_err(text);
    }
    let name = "adapter_model.safetensors";
    let read = |dir: &PathBuf| TensorTable::open_file(&dir.join(name)).map_err(text);
    let (start, ours) = (read(&case.dir.join("start"))?, read(&folder)?);
    let names = |t: &TensorTable| t.names().map(str::to_owned).collect::<Vec<_>>();
    let (mut a, mut b) = (names(&start), names(&ours));
    // What all modules share is written once; some of PEFT's files repeat it at every module.
    a.retain(|n| b.contains(n) || !b.iter().any(|o| repeats(n, o)));
    a.sort();
    b.sort();
    if a != b {
        return Err(format!("saved are {b:?}, read were {a:?}"));
    }
    let mut unused = false;
    for t in start.iter().filter(|t| a.contains(&t.name)) {
        let again = ours.get(&t.name).ok_or_else(|| format!("{} is not saved", t.name))?;
        // Of room for ranks that are not in use nothing is saved.
        let partial = plan.tensors.iter().any(|p| p.kept.is_some() && p.file.as_ref() == Some(&t.name));
        if partial && t.shape != again.shape {
            unused = true;
            continue;
        }
        if t.shape != again.shape || elements(t)? != elements(again)? {
            return Err(format!("{} was saved with other values", t.name));
        }
    }
    let again = Adapter::open(&folder, None, &o.checkpoint.modules).map_err(text)?;
    let said = |a: &Adapter| {
        let mut config = a.config.saved();
        config.retain(|key, _| !unused || key != "rank_pattern");
        config
    };
    if said(&again) != said(&o.adapters[0]) {
        return Err("the configuration was saved otherwise than it was read".into());
    }
    if case.trains(&o) {
        let graph = manager::run(&o.graph()?, &Pipeline::of(&["differentiate"]), &options(&o)).map_err(text)?.graph;
        machine = Interpreted::new(Program::Graph(graph), &o)?;
        step(&mut machine, &o.rows, &mut Order::new(o.rows.len(), None), &o.settings, 0).map_err(text)?;
        plan.write(&machine, None, &folder).map_err(text)?;
        let trained = [Adapter::open(&folder, None, &o.checkpoint.modules).map_err(text)?];
        // What no file holds starts again from the configuration.
        for (key, value) in slot_values(&trained[0]).into_iter().filter(|(_, v)| v.tensor().is_some()) {
            let got = value.read(&o.checkpoint).map_err(text)?;
            let have = machine.value(&format!("slot0.{key}"));
            let partial = plan.tensors.iter().any(|p| p.kept.is_some() && p.key == key);
            if partial && have.is_some_and(|t| t.shape != got.shape) {
                continue;
            }
            let same = match (&got.data, have.map(|t| &t.data)) {
                (SlotData::F32(a), Some(Data::F32(b))) => a == b,
                (SlotData::I32(a), Some(Data::I32(b))) => a == b,
                (_, None) => true,
                _ => false,
            };
            if !same {
                return Err(format!("{key} was saved with other values after a step"));
            }
        }
    }
    std::fs::remove_dir_all(&folder).map_err(text)
}

/// After all steps the adapter is saved, what of it counts for nothing left out, and the file computes what the run's last values do; so
/// does its form as LoRA, where it has one.
fn trained(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    if !case.trains(&o) {
        return Ok(());
    }
    let graph = manager::run(&o.graph()?, &Pipeline::of(&["differentiate"]), &options(&o)).map_err(text)?.graph;
    let mut machine = Interpreted::new(Program::Graph(graph), &o)?;
    o.train(&mut machine, LOSS, CHANGE)?;
    let mut last = o.adapters[0].clone();
    let now = |key: &str, old: &SlotValue| -> Result<SlotValue, String> {
        let Some(t) = machine.value(&format!("slot0.{key}")) else { return Ok(old.clone()) };
        let data = match &t.data {
            Data::I32(x) => SlotData::I32(x.clone()),
            _ => SlotData::F32(t.floats().to_vec()),
        };
        Ok(SlotValue::Made(Arc::new(SlotTensor { shape: t.shape.clone(), data })))
    };
    for (site, named) in last.sites.iter_mut().zip(&o.adapters[0].sites) {
        for (part, value) in &mut site.values {
            *value = now(&o.adapters[0].key(named, part), value)?;
        }
    }
    for r in &mut last.replaced {
        r.value = now(&r.path, &r.value)?;
    }
    let want = logits(&o, std::slice::from_ref(&last))?;
    let plan = AdapterPlan::new(&o.adapters[0], 0, &o.checkpoint).map_err(text)?;
    let plan: Saved = serde_json::from_value(plan.to_json()).map_err(text)?;
    let folder = temporary(&format!("{}-trained", case.name))?;
    plan.write(&machine, None, &folder).map_err(text)?;
    let saved = Adapter::open(&folder, None, &o.checkpoint.modules).map_err(text)?;
    close("the output of what was saved", &logits(&o, std::slice::from_ref(&saved))?, &want, 1e-5)?;
    let left_out = |a: &Adapter| a.sites.iter().map(|s| s.rank).sum::<u64>();
    if o.expected["leaves_out"].as_bool() == Some(true) && left_out(&saved) >= left_out(&last) {
        return Err("no rank was left out: the fixture cannot fail".into());
    }
    let lora = folder.join("lora");
    std::fs::create_dir_all(&lora).map_err(text)?;
    if to_lora(&saved, &o.checkpoint, None, &lora).is_ok() {
        let lora = Adapter::open(&lora, None, &o.checkpoint.modules).map_err(text)?;
        close("the output of the LoRA adapter", &logits(&o, std::slice::from_ref(&lora))?, &want, 1e-5)?;
    }
    std::fs::remove_dir_all(&folder).map_err(text)
}

/// Whether `name` is a tensor of a module with the last name of a shared one.
fn repeats(name: &str, shared: &str) -> bool {
    let end = shared.strip_prefix("base_model.").filter(|e| !e.contains('.'));
    end.is_some_and(|e| name.strip_suffix(e).is_some_and(|head| head.ends_with('.')))
}

/// The bytes of floats, and of whole numbers as i64, whatever their width.
fn elements(t: &TensorRef) -> Result<Vec<u8>, String> {
    let bytes = t.read_bytes().map_err(text)?;
    match t.dtype {
        Dtype::I32 => {
            let wide = bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b)));
            Ok(wide.flat_map(i64::to_le_bytes).collect())
        }
        _ => Ok(bytes),
    }
}

fn temporary(name: &str) -> Result<PathBuf, String> {
    let dir = std::env::temp_dir().join(format!("pleach-methods-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(text)?;
    Ok(dir)
}

/// Merged weights are the reference's, and compute what base and adapter do; else the method says why there are none.
fn merging(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let why = obstacle(&o.adapters[0], &o.checkpoint).map_err(text)?;
    let Some(merges) = o.expected["merges"].as_bool() else {
        return Err("the fixture does not say whether it merges".into());
    };
    let weight = |module: &str| {
        let t = o.checkpoint.param(&format!("{module}.weight")).ok_or_else(|| format!("no weight of {module}"))?;
        Ok::<_, String>((t.shape.clone(), t.read_f32().map_err(text)?))
    };
    if !merges {
        let site = o.adapters[0].sites.first().ok_or("no site")?;
        let refused = merged(&o.adapters[0], site, &o.checkpoint, &weight(&site.module)?.1);
        return match (why, refused) {
            (Some(why), Err(e)) if e.to_string().contains(&why) => Ok(()),
            (why, refused) => Err(format!("it must not merge: {why:?}, {:?}", refused.map(|_| ()))),
        };
    }
    if let Some(why) = why {
        return Err(format!("it must merge, but {why}"));
    }
    for (module, want) in of_kind(&dumps(case)?, "merged")? {
        let site = o.adapters[0].site(&module).ok_or_else(|| format!("{module} is no site"))?;
        let (shape, base) = weight(&module)?;
        let got = merged(&o.adapters[0], site, &o.checkpoint, &base).map_err(text)?;
        close(&format!("the merged weight of {module}"), &Tensor::f32(shape, got), &want, TOLERANCE)?;
    }
    folded(&o)
}

/// For inference the passes merge: the layers that an adapter changes become one product each, with the same results.
///
/// # Errors
/// What is left of the adapter, or differs.
pub fn folded(o: &Opened) -> Result<(), String> {
    let (graph, inputs) = o.inference()?;
    let options = Options { merge: true, ..options(o) };
    let after = manager::run(&graph, &Pipeline::default(), &options).map_err(text)?.graph;
    let (products, tensors) = left(&after, o);
    // An embedding's branch stays: its table is looked up, not multiplied.
    let branches = o.adapters[0].sites.iter().filter(|s| s.embedding).count();
    let layers = 7 * 2 + 1;
    if products > layers + branches || (branches == 0 && tensors > 0) {
        return Err(format!("{products} products and {tensors} tensors of the adapter are left after merging"));
    }
    let run = |g: &Graph| -> Result<Tensor, String> {
        let mut machine = Interpreted::new(Program::Graph(g.clone()), o)?;
        machine.entry("infer", &inputs)?.outputs.remove("logits").ok_or_else(|| "no logits".to_string())
    };
    close("what merged weights compute", &run(&after)?, &run(&graph)?, 2e-5)
}

/// Products and tensors of the adapter that `infer` has.
fn left(g: &Graph, o: &Opened) -> (usize, usize) {
    let infer = g.entry("infer").map(|e| e.nodes.iter()).into_iter().flatten();
    let products = infer.clone().filter(|n| matches!(n.op, Op::MatMul { .. })).count();
    let whole = |key: &str| o.adapters[0].replaced.iter().any(|r| r.path == key);
    let of_adapter = |p: &pleach_ir::Param| matches!(&p.source, Source::Adapter { key, .. } if !whole(key));
    let reads = infer.filter(|n| matches!(n.op, Op::Param(p) if of_adapter(&g.params[p.index()]))).count();
    (products, reads)
}

/// An adapter takes the place of another one in a compiled graph: new values and the slot's preparation, nothing else.
fn swapped(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let first = [fresh(&o, case)?];
    let (_, inputs) = o.inference()?;
    let graph = pleach_frontend::import(&o.checkpoint, &first, &["infer"]).map_err(text)?;
    let graph = manager::run(&graph, &Pipeline::default(), &options(&o)).map_err(text)?.graph;
    let mut machine = Interpreted::with(Program::Graph(graph), &o, &first)?;
    machine.load(&o, &o.adapters)?;
    let got = machine.entry("infer", &inputs)?.outputs.remove("logits").ok_or("no logits")?;
    close("the output of the second adapter", &got, &dump(&dumps(case)?, "logits")?, TOLERANCE)
}

/// Where there is an equal LoRA adapter, it computes the same beside the base as it is, read from its folder.
fn converted(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let folder = temporary(&format!("{}-lora", case.name))?;
    // Whether there is one stands in METHODS.md.
    if to_lora(&o.adapters[0], &o.checkpoint, None, &folder).is_ok() {
        let lora = Adapter::open(&folder, None, &o.checkpoint.modules).map_err(text)?;
        if !matches!(lora.config.method.name(), "lora" | "rslora") {
            return Err(format!("it was converted to {}", lora.config.method.name()));
        }
        close("the output of the LoRA adapter", &logits(&o, &[lora])?, &dump(&dumps(case)?, "logits")?, TOLERANCE)?;
    }
    std::fs::remove_dir_all(&folder).map_err(text)
}

/// All optimizer steps by compiled kernels, for this many processor classes; each as one entry, if asked for.
///
/// # Errors
/// Whatever refuses, and what differs.
#[cfg(feature = "llvm")]
pub fn compiled(case: &TrainCase, classes: usize, step_at_once: bool) -> Result<(), String> {
    use crate::compiled::{plan_with, session, targets};
    let o = case.open()?;
    let graph = o.graph()?;
    let params = o.values(&graph.params)?;
    let start = crate::compare::Start { symbols: Default::default(), params, inputs: Default::default(), again: false };
    let (tokens, sequences) = o.capacity();
    let meta = pleach_plan::Meta { vocab: o.checkpoint.config.vocab(), max_positions: 64, ..Default::default() };
    let options = Options { step_at_once, ..options(&o) };
    for target in targets().into_iter().take(classes) {
        let plan = Arc::new(plan_with(&graph, &Pipeline::default(), false, &options, &target, meta.clone())?);
        let capacities = [("T", tokens), ("L", tokens), ("S", sequences), ("P", 64), ("C", 1)];
        let all =
            capacities.iter().fold(pleach_runtime::Options::default().threads(2), |all, (s, n)| all.capacity(s, *n));
        let mut session = session(plan, &graph, &start, &all)?;
        o.train(&mut session, LOSS, CHANGE).map_err(|e| format!("{target:?}: {e}"))?;
        crate::renewed::as_prepared(&mut session).map_err(|e| format!("{target:?}: {e}"))?;
    }
    Ok(())
}

/// Options for the sizes of a fixture.
pub fn options(o: &Opened) -> Options {
    let (tokens, _) = o.capacity();
    let hint = ["train", "accumulate", "step", "evaluate"].map(|e| (e.to_string(), tokens));
    Options { tokens_hint: hint.into_iter().collect(), ..Options::default() }
}

/// The lines around the matrix in METHODS.md.
pub const MARKS: [&str; 2] = ["<!-- made from the fixtures: begin -->", "<!-- made from the fixtures: end -->"];

/// The support matrix, a row for every case in order of name: what the checks of that case prove.
///
/// # Errors
/// A case that cannot be opened.
pub fn matrix(cases: &[TrainCase]) -> Result<String, String> {
    let mut out = String::from(
        "| fixture | method | PEFT | train | run | merge | as LoRA | swap |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for case in cases {
        let o = case.open()?;
        let adapter = &o.adapters[0];
        let why = obstacle(adapter, &o.checkpoint).map_err(text)?;
        let folder = temporary(&format!("{}-matrix", case.name))?;
        let lora = to_lora(adapter, &o.checkpoint, None, &folder).is_ok();
        let _ = std::fs::remove_dir_all(&folder);
        let yes = |x: bool| if x { "yes" } else { "–" };
        let merge = why.map_or("yes".to_owned(), |w| format!("no: {w}"));
        let (method, peft) = (adapter.config.method.name(), adapter.config.method.peft_type());
        let (trains, lora) = (yes(case.trains(&o)), yes(lora));
        out += &format!("| {} | {method} | {peft} | {trains} | yes | {merge} | {lora} | yes |\n", case.name);
    }
    Ok(out)
}

/// The support matrix by method, for the README: what holds for every case of a method.
///
/// # Errors
/// A case that cannot be opened.
pub fn summary(cases: &[TrainCase]) -> Result<String, String> {
    /// One case: name, trained, why it does not merge, where its folder is read.
    type Seen = (String, bool, Option<String>, String);
    let mut by: BTreeMap<String, Vec<Seen>> = BTreeMap::new();
    for case in cases {
        let o = case.open()?;
        let adapter = &o.adapters[0];
        let why = obstacle(adapter, &o.checkpoint).map_err(text)?;
        let folder = temporary(&format!("{}-summary", case.name))?;
        let lora = to_lora(adapter, &o.checkpoint, None, &folder).is_ok();
        let _ = std::fs::remove_dir_all(&folder);
        let peft = adapter.config.raw.get("peft_version").is_some();
        let place = format!("{}{}", if peft { "PEFT" } else { "pleach" }, if lora { ", LoRA" } else { "" });
        let seen = (case.name.clone(), case.trains(&o), why, place);
        by.entry(adapter.config.method.name().into()).or_default().push(seen);
    }
    let mut out =
        String::from("| method | train | run | merge | export | swap |\n| --- | --- | --- | --- | --- | --- |\n");
    for (method, list) in by {
        // A case without steps shows something else, such as a folder with ranks left out.
        let train = if list.iter().any(|s| s.1) { "yes" } else { "–" };
        let against: Vec<&Seen> = list.iter().filter(|s| s.2.is_some()).collect();
        let merge = match (against.as_slice(), against.len() == list.len()) {
            ([], _) => "yes".to_owned(),
            ([first, ..], true) => format!("no: {}", first.2.as_deref().unwrap_or_default()),
            (some, false) => {
                let names: Vec<&str> = some.iter().map(|s| s.0.as_str()).collect();
                format!("yes, but not {}", names.join(", "))
            }
        };
        let mut places: Vec<&str> = list.iter().map(|s| s.3.as_str()).collect();
        places.dedup();
        out += &format!("| {method} | {train} | yes | {merge} | {} | yes |\n", places.join("; "));
    }
    Ok(out)
}

/// Compares METHODS.md with the matrix; `PLEACH_BLESS=1` writes it.
///
/// # Errors
/// The file lacks the marks, or differs.
pub fn check_matrix(cases: &[TrainCase]) -> Result<(), String> {
    crate::matrix::between("METHODS.md", MARKS, &matrix(cases)?)
}
