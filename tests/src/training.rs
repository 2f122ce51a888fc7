//! The training fixtures of `tests/fixtures/train`: twenty optimizer steps, beside what PyTorch and PEFT made of them.
//!
//! The steps are those of the runtime ([`pleach_runtime::train::step`]); the machine behind them is a session, or the reference interpreter
//! on any graph ([`Interpreted`]).

mod near;

use pleach_frontend::adapter::{self, AdapterPlan, Buffers, EventsPlan, SlotData, SlotTensor, SlotValue, slot_values};
use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Checkpoint, Import, TensorTable};
use pleach_ir::interp::{Data, RunResult, Symbols, Tensor, run_entry_with, run_schedule_with};
use pleach_ir::{Graph, Param, Role, Schedule, Source, Sym};
use pleach_plan::DType;
use pleach_runtime::train::{
    Events, IGNORED, Machine, Measured, Moment, Order, Rows, Schedule as Rate, Settings, Warmup, initial_values,
    step_with,
};
use pleach_runtime::{ParamValues, RuntimeError, TensorSource, Values, open_weights};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Largest relative difference of a loss, a rate or a norm.
pub const LOSS: f64 = 1e-5;
/// Largest |ours − reference| / |reference − start| of the adapter.
pub const CHANGE: f64 = 1e-2;

/// One fixture.
#[derive(Clone, Debug)]
pub struct TrainCase {
    /// Name of its folder.
    pub name: String,
    /// The folder.
    pub dir: PathBuf,
}

/// A fixture with its files opened.
#[derive(Debug)]
pub struct Opened {
    /// The model.
    pub checkpoint: Checkpoint,
    /// The adapter that is trained, alone in slot 0.
    pub adapters: [Adapter; 1],
    /// Rows of ids and labels.
    pub rows: Rows,
    /// How it is trained.
    pub settings: Settings,
    /// `case.json`.
    pub expected: Value,
    /// Start and end of every trained tensor, by the name of its parameter.
    moves: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
}

/// Every case of the folder, sorted.
///
/// # Errors
/// A folder that cannot be read.
pub fn cases() -> Result<Vec<TrainCase>, String> {
    cases_in("train")
}

/// Every case of a folder of `tests/fixtures`, sorted.
///
/// # Errors
/// A folder that cannot be read.
pub fn cases_in(folder: &str) -> Result<Vec<TrainCase>, String> {
    let root = crate::root().join("tests/fixtures").join(folder);
    let list = std::fs::read_dir(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    let dirs = list.flatten().map(|e| e.path()).filter(|d| d.join("case.json").is_file());
    let name = |d: &PathBuf| d.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut cases: Vec<_> = dirs.map(|dir| TrainCase { name: name(&dir), dir }).collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(cases)
}

impl TrainCase {
    /// Whether the fixture has optimizer steps.
    pub fn trains(&self, o: &Opened) -> bool {
        !o.moves.is_empty()
    }

    /// Whether the fixture starts from a new adapter: its start is a configuration alone.
    pub fn starts_new(&self) -> bool {
        !self.dir.join("start/adapter_model.safetensors").is_file()
    }

    /// A new adapter of the fixture's configuration with its first values, some of which may be `made` before.
    ///
    /// # Errors
    /// Whatever a reader refuses.
    pub fn fresh(&self, checkpoint: &Checkpoint, made: &Measured) -> Result<Adapter, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let config = MethodConfig::read(&self.dir.join("start")).map_err(|e| text(&e))?;
        let mut adapter = Adapter::fresh(&config, &checkpoint.modules).map_err(|e| text(&e))?;
        let plan = AdapterPlan::new(&adapter, 0, checkpoint).map_err(|e| text(&e))?;
        let plan: pleach_runtime::train::AdapterPlan = serde_json::from_value(plan.to_json()).map_err(|e| text(&e))?;
        let weights = open_weights(&checkpoint.dir).map_err(|e| text(&e))?;
        let values = initial_values(&plan, &*weights, 7, made).map_err(|e| text(&e))?;
        let first = |key: &str| {
            let t = values.tensor(key).ok_or_else(|| format!("no first value of {key}"))?;
            let words = t.bytes.as_chunks().0.iter();
            let data = match t.dtype {
                DType::I32 => SlotData::I32(words.map(|b| i32::from_le_bytes(*b)).collect()),
                _ => SlotData::F32(words.map(|b| f32::from_le_bytes(*b)).collect()),
            };
            Ok::<_, String>(SlotValue::Made(Arc::new(SlotTensor { shape: t.shape.to_vec(), data })))
        };
        let named = adapter.clone();
        for o in &mut adapter.orders {
            o.value = first(&o.key())?;
        }
        for (site, same) in adapter.sites.iter_mut().zip(&named.sites) {
            for (part, value) in &mut site.values {
                *value = first(&named.key(same, part))?;
            }
        }
        Ok(adapter)
    }

    /// Opens the files.
    ///
    /// # Errors
    /// Whatever a reader refuses.
    pub fn open(&self) -> Result<Opened, String> {
        let text = |e: &dyn std::fmt::Display| format!("{}: {e}", self.name);
        let read = |path: PathBuf| std::fs::read_to_string(&path).map_err(|e| text(&e));
        let expected: Value = serde_json::from_str(&read(self.dir.join("case.json"))?).map_err(|e| text(&e))?;
        let root = crate::root().join("tests/fixtures/train");
        let model = expected["model"].as_str().unwrap_or_default();
        let checkpoint = Checkpoint::open(&root.join("models").join(model)).map_err(|e| text(&e))?;
        let adapter = match self.starts_new() {
            true => self.fresh(&checkpoint, &Measured::new()).map_err(|e| text(&e))?,
            false => Adapter::open(&self.dir.join("start"), None, &checkpoint.modules).map_err(|e| text(&e))?,
        };
        adapter.config.check_training().map_err(|e| text(&e))?;
        let number = |key: &str| expected[key].as_f64().unwrap_or(f64::NAN);
        let settings = Settings {
            batch: number("batch") as u64,
            accum: number("accum") as u64,
            steps: number("steps") as u64,
            max_length: 64,
            shuffle: false,
            lr: number("lr"),
            schedule: match expected["schedule"].as_str() {
                Some("cosine") => Rate::Cosine,
                Some("linear") => Rate::Linear,
                _ => Rate::Constant,
            },
            warmup: Warmup::Steps(number("warmup") as u64),
            weight_decay: number("weight_decay"),
            max_grad_norm: expected["max_grad_norm"].as_f64(),
            ..Settings::default()
        };
        let rows = rows(&read(root.join("rows.jsonl"))?)?;
        let after = self.dir.join("final.safetensors");
        let mut moves = BTreeMap::new();
        if !after.is_file() {
            // Nothing is trained.
            return Ok(Opened { checkpoint, adapters: [adapter], rows, settings, expected, moves });
        }
        let after = TensorTable::open_file(&after).map_err(|e| text(&e))?;
        let plan = AdapterPlan::new(&adapter, 0, &checkpoint).map_err(|e| text(&e))?;
        let file: BTreeMap<String, String> = plan.tensors.into_iter().filter_map(|t| Some((t.key, t.file?))).collect();
        for (key, value) in slot_values(&adapter) {
            let name = match &value {
                // What lies in another folder than the adapter's own is not trained.
                SlotValue::Tensor(before) if before.file.parent() != Some(&*self.dir.join("start")) => None,
                SlotValue::Tensor(before) => Some(&before.name),
                SlotValue::Made(_) => file.get(&key),
                _ => None,
            };
            let Some(tensor) = name.and_then(|n| after.get(n)) else { continue };
            let SlotData::F32(before) = value.read(&checkpoint).map_err(|e| text(&e))?.data else { continue };
            moves.insert(format!("slot0.{key}"), (before, tensor.read_f32().map_err(|e| text(&e))?));
        }
        if moves.len() != after.len() {
            return Err(text(&format!("{} of {} tensors of the reference are trained", moves.len(), after.len())));
        }
        Ok(Opened { checkpoint, adapters: [adapter], rows, settings, expected, moves })
    }
}

fn rows(text: &str) -> Result<Rows, String> {
    let mut rows = Rows::default();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let list = |key: &str| -> Vec<i32> {
            let values = row[key].as_array().into_iter().flatten();
            values.map(|v| v.as_i64().unwrap_or(i64::from(IGNORED)) as i32).collect()
        };
        rows.push(&list("input_ids"), Some(&list("labels")), 64);
    }
    Ok(rows)
}

impl Opened {
    /// The graph with the entries `train` and `evaluate`.
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn graph(&self) -> Result<Graph, String> {
        let import = Import::new(&self.checkpoint).adapters(&self.adapters).entries(&["train", "evaluate"]).train(0);
        import.graph().map_err(|e| e.to_string())
    }

    /// The graph with the entry `infer`, and inputs for it: the first two rows.
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn inference(&self) -> Result<(Graph, BTreeMap<String, Tensor>), String> {
        let graph = pleach_frontend::import(&self.checkpoint, &self.adapters, &["infer"]).map_err(|e| e.to_string())?;
        let b = self.rows.pack(0..2);
        let list = [
            ("input_ids", b.input_ids),
            ("positions", b.positions),
            ("q_segments", b.q_segments),
            ("kv_start", b.kv_start),
            ("kv_len", b.kv_len),
        ];
        let tensor = |(name, v): (&str, Vec<i32>)| (name.to_string(), Tensor::i32([v.len() as u64], v));
        Ok((graph, list.into_iter().map(tensor).collect()))
    }

    /// Most tokens and sequences of a micro-batch.
    pub fn capacity(&self) -> (u64, u64) {
        (self.settings.batch * self.rows.report().longest, self.settings.batch)
    }

    /// Values of the parameters of a graph of this model, but for what it derives.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn values(&self, params: &[Param]) -> Result<BTreeMap<String, Tensor>, String> {
        self.values_with(params, &self.adapters)
    }

    /// The same with these adapters in the slots.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn values_with(&self, params: &[Param], adapters: &[Adapter]) -> Result<BTreeMap<String, Tensor>, String> {
        let slots: Vec<BTreeMap<String, SlotValue>> =
            adapters.iter().map(|a| slot_values(a).into_iter().collect()).collect();
        let mut values = BTreeMap::new();
        for p in params {
            let value = match &p.source {
                Source::Checkpoint(name) => {
                    let t =
                        self.checkpoint.params().find(|(_, t)| t.name == *name).ok_or(format!("no tensor {name}"))?;
                    Tensor::f32(t.1.shape.clone(), t.1.read_f32().map_err(|e| e.to_string())?)
                }
                Source::Adapter { slot, key } => {
                    let value = slots.get(*slot as usize).and_then(|s| s.get(key));
                    let value = value.ok_or_else(|| format!("no value for {key}"))?;
                    let t = value.read(&self.checkpoint).map_err(|e| e.to_string())?;
                    match t.data {
                        SlotData::F32(x) => Tensor::f32(t.shape, x),
                        SlotData::I32(x) => Tensor::i32(t.shape, x),
                    }
                }
                Source::Zeros => Tensor::zeros(p.ty.dtype, crate::values::shape(&p.ty, &symbols())),
                Source::Derived => continue,
            };
            let value = match (&value.data, p.ty.dtype == value.dtype()) {
                (Data::F32(x), false) => Tensor::from_floats(p.ty.dtype, value.shape, x.clone()),
                _ => value,
            };
            values.insert(p.name.clone(), value);
        }
        Ok(values)
    }

    /// Trains and compares every step, and the adapter at the end.
    ///
    /// # Errors
    /// What differs, in words.
    pub fn train(&self, machine: &mut dyn Machine, loss: f64, change: f64) -> Result<(), String> {
        let mut order = Order::new(self.rows.len(), None);
        let mut faults = vec![];
        let events = self.events()?;
        let events = events.as_ref().map(|e| e as &dyn Events);
        for i in 0..self.settings.steps {
            let s = step_with(machine, &self.rows, &mut order, &self.settings, i, events).map_err(|e| e.to_string())?;
            let want = |key: &str| self.expected[key][i as usize].as_f64().unwrap_or(f64::NAN);
            // Norms and rates follow from other sums than losses: ten times as much.
            let told = [("losses", s.loss, loss), ("grad_norms", s.grad_norm, 10.0 * loss), ("lrs", s.lr, 1e-9)];
            for (key, got, tolerance) in told {
                let (want, error) = (want(key), (got - want(key)).abs() / want(key).abs().max(1e-12));
                if error.is_nan() || error > tolerance {
                    faults.push(format!("step {}: {key} {got:.8} instead of {want:.8}, {error:.1e}", i + 1));
                }
            }
            if s.tokens as f64 != want("tokens") {
                faults.push(format!("step {}: {} tokens instead of {}", i + 1, s.tokens, want("tokens")));
            }
            if !faults.is_empty() {
                return Err(faults.join("\n"));
            }
        }
        let error = self.distance(machine)?;
        if error <= change { Ok(()) } else { Err(format!("the adapter is {error:.1e} of its change off")) }
    }

    /// Trains without comparing steps: the root mean square of the losses' relative differences, and how far the adapter ends
    /// from the reference, as a part of its change.
    ///
    /// # Errors
    /// What the machine refuses.
    pub fn drift(&self, machine: &mut dyn Machine) -> Result<(f64, f64), String> {
        let mut order = Order::new(self.rows.len(), None);
        let mut squares = 0.0;
        let events = self.events()?;
        let events = events.as_ref().map(|e| e as &dyn Events);
        for i in 0..self.settings.steps {
            let s = step_with(machine, &self.rows, &mut order, &self.settings, i, events).map_err(|e| e.to_string())?;
            let want = self.expected["losses"][i as usize].as_f64().unwrap_or(f64::NAN);
            squares += (s.loss / want - 1.0).powi(2);
        }
        Ok(((squares / self.settings.steps as f64).sqrt(), self.distance(machine)?))
    }

    /// What the method changes from step to step.
    ///
    /// # Errors
    /// What the frontend refuses.
    pub fn events(&self) -> Result<Option<MethodEvents>, String> {
        let Some(plan) = EventsPlan::new(&self.adapters[0], 0) else { return Ok(None) };
        adapter::Events::from_plan(&plan).map(|e| Some(MethodEvents(e))).map_err(|e| e.to_string())
    }

    /// |ours − reference| / |reference − start| over everything that is trained.
    fn distance(&self, machine: &dyn Machine) -> Result<f64, String> {
        let (mut off, mut moved) = (0.0, 0.0);
        for (name, (before, after)) in &self.moves {
            let got = machine.read(name).map_err(|e| e.to_string())?;
            let got = Tensor::from_bytes(pleach_ir::DType::F32, [before.len() as u64], &got.bytes)
                .map_err(|e| e.to_string())?;
            for ((got, before), after) in got.floats().iter().zip(before).zip(after) {
                off += f64::from(got - after).powi(2);
                moved += f64::from(after - before).powi(2);
            }
        }
        Ok((off / moved).sqrt())
    }
}

/// A method's events at the moments of a run.
#[derive(Debug)]
pub struct MethodEvents(adapter::Events);

impl Events for MethodEvents {
    fn at(&self, moment: Moment, step: u64, steps: u64, seed: u64, m: &mut dyn Machine) -> pleach_runtime::Result<()> {
        let moment = match moment {
            Moment::Before => adapter::Moment::Before,
            Moment::Gradients => adapter::Moment::Gradients,
            Moment::After => adapter::Moment::After,
        };
        self.0.at(moment, step, steps, seed, &mut OfMachine(m)).map_err(RuntimeError::Values)
    }
}

struct OfMachine<'m>(&'m mut dyn Machine);

impl Buffers for OfMachine<'_> {
    fn read(&self, name: &str) -> Result<Vec<f32>, String> {
        let v = self.0.read(name).map_err(|e| e.to_string())?;
        Ok(v.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn write(&mut self, name: &str, values: &[f32]) -> Result<(), String> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.write(name, DType::F32, &bytes).map_err(|e| e.to_string())
    }
}

fn symbols() -> Symbols {
    [(Sym::P, 64), (Sym::C, 1)].into_iter().collect()
}

/// What the interpreter runs.
#[derive(Debug)]
pub enum Program {
    /// A graph.
    Graph(Graph),
    /// A schedule.
    Schedule(Schedule),
}

/// The reference interpreter as a machine that trains.
#[derive(Debug)]
pub struct Interpreted {
    program: Program,
    params: Vec<Param>,
    entries: Vec<String>,
    values: BTreeMap<String, Tensor>,
    /// Bytes of the slots and of what is trained, as a machine shows them.
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Interpreted {
    /// A program with the values of a fixture; preparations are run.
    ///
    /// # Errors
    /// Tensors that cannot be read, and what the interpreter refuses.
    pub fn new(program: Program, fixture: &Opened) -> Result<Interpreted, String> {
        Interpreted::with(program, fixture, &fixture.adapters)
    }

    /// The same with these adapters in the slots.
    ///
    /// # Errors
    /// As [`Interpreted::new`].
    pub fn with(program: Program, fixture: &Opened, adapters: &[Adapter]) -> Result<Interpreted, String> {
        let (params, entries): (Vec<Param>, Vec<String>) = match &program {
            Program::Graph(g) => (g.params.clone(), g.entries.iter().map(|e| e.name.clone()).collect()),
            Program::Schedule(s) => {
                (s.params.iter().map(|(p, _)| p.clone()).collect(), s.entries.iter().map(|e| e.name.clone()).collect())
            }
        };
        let values = fixture.values_with(&params, adapters)?;
        // What a method may look at before the first step.
        let of_slot = |p: &&Param| matches!(p.source, Source::Adapter { .. }) || p.role == Role::Stat;
        let bytes =
            params.iter().filter(of_slot).filter_map(|p| Some((p.name.clone(), values.get(&p.name)?.to_bytes())));
        let bytes = bytes.collect();
        let mut machine = Interpreted { program, params, entries, bytes, values };
        machine.prepare(|_| true)?;
        Ok(machine)
    }

    /// Puts other adapters into the slots, as a session does: their values, and what is prepared from them.
    ///
    /// # Errors
    /// As [`Interpreted::new`].
    pub fn load(&mut self, fixture: &Opened, adapters: &[Adapter]) -> Result<(), String> {
        let of_slot = |p: &&Param| matches!(p.source, Source::Adapter { .. });
        let params: Vec<Param> = self.params.iter().filter(of_slot).cloned().collect();
        self.values.extend(fixture.values_with(&params, adapters)?);
        self.prepare(|entry| entry.starts_with("prepare(slot"))
    }

    /// Gives parameters other values, and prepares everything again.
    ///
    /// # Errors
    /// What the interpreter refuses.
    pub fn set(&mut self, values: BTreeMap<String, Tensor>) -> Result<(), String> {
        self.values.extend(values);
        self.prepare(|_| true)
    }

    fn prepare(&mut self, which: impl Fn(&str) -> bool) -> Result<(), String> {
        for entry in self.entries.clone().iter().filter(|e| e.starts_with("prepare") && which(e)) {
            self.entry(entry, &BTreeMap::new())?;
        }
        Ok(())
    }

    /// The value of a parameter now.
    pub fn value(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)
    }

    /// Runs an entry; what it assigns is kept.
    ///
    /// # Errors
    /// What the interpreter refuses.
    pub fn entry(&mut self, entry: &str, inputs: &BTreeMap<String, Tensor>) -> Result<RunResult, String> {
        let value = |p: pleach_ir::ParamId| self.values.get(&self.params[p.index()].name);
        let result = match &self.program {
            Program::Graph(g) => {
                let e = g.entry(entry).ok_or_else(|| format!("no entry {entry}"))?;
                let inputs = inputs.iter().filter(|(n, _)| e.inputs().iter().any(|i| i.1 == n.as_str()));
                let inputs = inputs.map(|(n, t)| (n.clone(), t.clone())).collect();
                run_entry_with(&g.params, &value, e, &inputs, &symbols())
            }
            Program::Schedule(s) => run_schedule_with(s, entry, &value, inputs, &symbols()),
        };
        let mut result = result.map_err(|e| format!("{entry}: {e}"))?;
        for (id, tensor) in std::mem::take(&mut result.assigns) {
            let p = &self.params[id.index()];
            self.bytes.insert(p.name.clone(), tensor.to_bytes());
            self.values.insert(p.name.clone(), tensor);
        }
        Ok(result)
    }
}

impl Interpreted {
    /// Runs an entry and gives outputs that are single numbers.
    fn numbers<const N: usize>(
        &mut self,
        entry: &str,
        inputs: &[(&str, Values<'_>)],
        outputs: [&str; N],
    ) -> pleach_runtime::Result<[f32; N]> {
        let tensor = |(name, v): &(&str, Values<'_>)| {
            let scalar = [
                "loss_scale",
                "lr",
                "beta1",
                "beta2",
                "eps",
                "weight_decay",
                "correction1",
                "correction2",
                "max_grad_norm",
            ];
            let t = match v {
                Values::F32(x) if scalar.contains(name) => Tensor::f32([], x.to_vec()),
                Values::F32(x) => Tensor::f32([x.len() as u64], x.to_vec()),
                Values::I32(x) => Tensor::i32([x.len() as u64], x.to_vec()),
            };
            (name.to_string(), t)
        };
        let inputs = inputs.iter().map(tensor).collect();
        let result = self.entry(entry, &inputs).map_err(RuntimeError::Values)?;
        let mut found = [0.0; N];
        for (to, output) in found.iter_mut().zip(outputs) {
            *to = match result.outputs.get(output).map(|t| &t.data) {
                Some(Data::F32(x)) if x.len() == 1 => x[0],
                _ => return Err(RuntimeError::Values(format!("{entry} has no number {output}"))),
            };
        }
        Ok(found)
    }
}

impl Machine for Interpreted {
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> pleach_runtime::Result<f32> {
        self.numbers(entry, inputs, [output]).map(|[x]| x)
    }

    fn step(&mut self, inputs: &[(&str, Values<'_>)]) -> Option<pleach_runtime::Result<[f32; 2]>> {
        if !self.entries.iter().any(|e| e == "step") {
            return None;
        }
        Some(self.numbers("step", inputs, ["loss", "grad_norm"]))
    }

    fn changing(&self) -> Vec<String> {
        self.bytes.keys().cloned().collect()
    }

    fn fixed(&self) -> Vec<String> {
        vec![]
    }

    fn read(&self, name: &str) -> pleach_runtime::Result<ParamValues<'_>> {
        let bytes = self.bytes.get(name).ok_or_else(|| RuntimeError::Values(format!("`{name}` was never assigned")))?;
        let shape = self.values.get(name).map(|t| t.shape.clone()).unwrap_or_default();
        let dtype = match self.values.get(name).map(|t| t.dtype()) {
            Some(pleach_ir::DType::I32) => DType::I32,
            _ => DType::F32,
        };
        Ok(ParamValues { dtype, shape, bytes: bytes.into() })
    }

    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> pleach_runtime::Result<()> {
        let no = |why: String| RuntimeError::Values(format!("`{name}`: {why}"));
        let old = self.values.get(name).ok_or_else(|| no("there is no such parameter".into()))?;
        if dtype != DType::F32 || bytes.len() != old.to_bytes().len() {
            return Err(no(format!("takes another type or size than {} bytes", bytes.len())));
        }
        let new = Tensor::from_bytes(pleach_ir::DType::F32, old.shape.clone(), bytes).map_err(|e| no(e.to_string()))?;
        self.values.insert(name.to_owned(), new);
        self.bytes.insert(name.to_owned(), bytes.to_vec());
        // What is derived from it is made again.
        let entries: Vec<String> = match &self.program {
            Program::Graph(g) => g.entries.iter().map(|e| e.name.clone()).collect(),
            Program::Schedule(s) => s.entries.iter().map(|e| e.name.clone()).collect(),
        };
        for entry in entries.iter().filter(|e| e.starts_with("prepare")) {
            self.entry(entry, &BTreeMap::new()).map_err(RuntimeError::Values)?;
        }
        Ok(())
    }
}
