//! What the simulator runs: fixtures, compiled for a chip in a type, and the checks of each.

use super::reference::{Reference, values};
use super::session::{Simulated, Tensors};
use super::{Compiled, How, WAYS, alone, blocks, compile_with};
use crate::training::{CHANGE, Interpreted, LOSS, Program, TrainCase};
use crate::{fixtures, training};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::{BlockFormat, DType, Graph, Layout, Param, Source, Sym};
use pleach_passes::Options;
use pleach_plan::Meta;
use pleach_runtime::train::{Events, Machine, Order, Settings, Stepped, Warmup, step_with};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

/// Where a graph comes from.
#[derive(Clone, Debug)]
pub enum From {
    /// A training fixture.
    Train(TrainCase),
    /// A fixture for inference.
    Infer(Box<fixtures::Fixture>),
}

/// A graph for a chip.
#[derive(Debug)]
pub struct Case {
    /// `llama-lora/bf16/sm_80`.
    pub name: String,
    /// Its graph.
    pub from: From,
    /// Weights and activations.
    pub dtype: DType,
    /// For which chip.
    pub chip: GpuChip,
    /// Weights are in blocks of codes, and rounded to what these hold.
    pub blocks: bool,
    compiled: OnceLock<Result<Compiled, String>>,
}

impl From {
    /// Name of the fixture.
    pub fn name(&self) -> &str {
        match self {
            From::Train(c) => &c.name,
            From::Infer(f) => &f.name,
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Loss of a step in bf16 beside the interpreter's in bf16: both round the same values, one may fall to the other side.
const LOSS_HALF: f64 = 2e-3;
/// The same for |ours − reference| / |reference − start| of what is trained, after one step, whose size does not depend on
/// how large a gradient is: signs of the smallest ones change.
const CHANGE_HALF: f64 = 0.15;
/// Single numbers of a gradient in bf16, over the largest of their kind: in f32 they agree to 5e-5 of themselves, while rounding of what they
/// are summed from moves them by up to 2e-3 of the largest, however small they are.
const LEFT_HALF: f64 = 0.01;
/// Logits in bf16 beside the interpreter's in bf16, over the largest: a unit in the last place of 8 bits, some layers deep.
const LOGITS_HALF: f64 = 0.03;

/// Tokens that are generated.
const ROUNDS: usize = 4;

impl Case {
    /// A case that is compiled when it is first asked for.
    pub fn new(from: From, dtype: DType, chip: GpuChip) -> Case {
        Case::of(from, dtype, chip, false)
    }

    /// The same with weights in blocks.
    pub fn in_blocks(from: From, dtype: DType, chip: GpuChip) -> Case {
        Case::of(from, dtype, chip, true)
    }

    fn of(from: From, dtype: DType, chip: GpuChip, blocks: bool) -> Case {
        let name = format!("{}/{dtype}/{}{}", from.name(), chip.name(), if blocks { "/blocks" } else { "" });
        Case { name, from, dtype, chip, blocks, compiled: OnceLock::new() }
    }

    fn graph(&self) -> Result<(Graph, Meta), String> {
        Ok(match &self.from {
            From::Train(c) => {
                let o = c.open()?;
                let vocab = o.checkpoint.config.vocab();
                (o.graph()?, Meta { vocab, max_positions: 64, ..Meta::default() })
            }
            From::Infer(f) => {
                let o = f.open()?;
                let entries: &[&str] = if o.greedy.is_empty() { &["infer"] } else { &["infer", "generate"] };
                let graph = pleach_frontend::import(&o.checkpoint, &o.adapters, entries).map_err(text)?;
                (graph, Meta { vocab: o.checkpoint.config.vocab(), max_positions: 64, ..Meta::default() })
            }
        })
    }

    /// The plan.
    ///
    /// # Errors
    /// Whatever refuses.
    pub fn compiled(&self) -> Result<&Compiled, String> {
        let make = || {
            let (graph, meta) = self.graph()?;
            compile_with(
                &graph,
                &Options { dtype: self.dtype, ..Options::default() },
                self.chip,
                meta,
                &self.formats(&graph),
            )
        };
        self.compiled.get_or_init(make).as_ref().map_err(Clone::clone)
    }

    /// The tensors that are in blocks.
    fn formats(&self, graph: &Graph) -> BTreeMap<String, BlockFormat> {
        if self.blocks { blocks::formats(graph) } else { BTreeMap::new() }
    }

    /// Every kernel by itself, but for those whose code `skip` has.
    ///
    /// # Errors
    /// The faults of all kernels.
    pub fn alone(&self, skip: &BTreeSet<String>) -> Result<usize, String> {
        let c = self.compiled()?;
        let (mut faults, mut run) = (vec![], 0);
        for i in 0..c.plan.kernels.len() {
            if skip.contains(&code(c, i)) {
                continue;
            }
            run += 1;
            for (seed, at) in alone::COUNTS.into_iter().enumerate() {
                if let Err(e) = alone::check(c, i, at, seed as u64) {
                    faults.push(e);
                    break;
                }
            }
        }
        if faults.is_empty() {
            Ok(run)
        } else {
            Err(format!("{} of {run} kernels:\n{}", faults.len(), faults.join("\n")))
        }
    }

    /// The code of every kernel.
    ///
    /// # Errors
    /// Whatever refuses.
    pub fn codes(&self) -> Result<BTreeSet<String>, String> {
        let c = self.compiled()?;
        Ok((0..c.plan.kernels.len()).map(|i| code(c, i)).collect())
    }

    /// Whole entries.
    ///
    /// # Errors
    /// Faults and differences.
    pub fn whole(&self) -> Result<(), String> {
        match &self.from {
            From::Train(c) => self.step(&c.open()?),
            From::Infer(f) => self.infer(&f.open()?),
        }
    }

    /// One optimizer step, beside the interpreter running the same kernels, and beside the fixture.
    fn step(&self, o: &training::Opened) -> Result<(), String> {
        let c = self.compiled()?;
        let params: Vec<Param> = c.schedule.params.iter().map(|(p, _)| p.clone()).collect();
        let mut start = o.values(&params)?;
        blocks::round(&params, &self.formats(&self.graph()?.0), &mut start);
        // The first step of a warm-up changes nothing.
        let settings = Settings { warmup: Warmup::Steps(0), ..o.settings.clone() };
        let events = o.events()?;
        let step = |m: &mut dyn Machine| -> Result<Stepped, String> {
            let mut order = Order::new(o.rows.len(), None);
            step_with(m, &o.rows, &mut order, &settings, 0, events.as_ref().map(|e| e as &dyn Events)).map_err(text)
        };
        let mut machines = vec![];
        for how in WAYS {
            let mut m = self.open_training(c, o, &start, how)?;
            machines.push((step(&mut m)?, m));
        }
        let mut reference = Interpreted::new(Program::Schedule(c.schedule.clone()), o)?;
        if self.blocks {
            reference.set(start.clone())?;
        }
        let want = step(&mut reference)?;
        let (got, machine) = &machines[0];
        let half = self.dtype != DType::F32;
        let loss = if half { LOSS_HALF } else { LOSS };
        let told = o.expected["losses"][0].as_f64().unwrap_or(f64::NAN);
        let mut list = vec![("loss", got.loss, want.loss, loss), ("norm", got.grad_norm, want.grad_norm, 10.0 * loss)];
        if !half && !self.blocks && matches!(&self.from, From::Train(c) if c.trains(o)) {
            list.push(("loss of the fixture", got.loss, told, loss));
        }
        for (what, got, want, allowed) in list {
            let error = (got / want - 1.0).abs();
            if error.is_nan() || error > allowed {
                return Err(format!("{what}: {got} instead of {want}"));
            }
        }
        let (mut off, mut moved) = (0.0, 0.0);
        // In bf16 a single number may be what is left of large, rounded terms: it is held against the largest one of its name.
        let last = |n: &str| n.rsplit('.').next().unwrap_or_default().to_string();
        let mut largest: BTreeMap<String, f64> = BTreeMap::new();
        for name in machine.changing().iter().filter(|n| n.starts_with("adam.m.")) {
            if let (true, Some([x])) = (half, reference.value(name).map(|t| t.floats()).as_deref()) {
                let most = largest.entry(last(name)).or_default();
                *most = most.max(f64::from(x.abs()));
            }
        }
        for name in machine.changing() {
            let got = machine.value(&name)?;
            if machines[1].1.value(&name)? != got {
                return Err(format!("{name}: another order gives other bits"));
            }
            let want = reference.value(&name).ok_or_else(|| format!("no {name}"))?;
            let all = if half { LOGITS_HALF } else { 1e-4 };
            let (error, allowed) = match (&got.floats()[..], &want.floats()[..], largest.get(&last(&name))) {
                ([g], [w], Some(most)) => (f64::from((g - w).abs()) / most, LEFT_HALF),
                _ => (got.relative_error(want), all),
            };
            if name.starts_with("adam.m.") && (error.is_nan() || error > allowed) {
                return Err(format!("{name} is {error:.1e} off, allowed {allowed:.1e}"));
            }
            let Some(before) = start.get(&name).filter(|_| !name.starts_with("adam.")) else { continue };
            for ((g, w), b) in got.floats().iter().zip(want.floats().iter()).zip(before.floats().iter()) {
                off += f64::from(g - w).powi(2);
                moved += f64::from(w - b).powi(2);
            }
        }
        let (error, allowed) = ((off / moved).sqrt(), if half { CHANGE_HALF } else { CHANGE });
        if error.is_nan() || error > allowed {
            return Err(format!("what is trained is {error:.1e} of its change off"));
        }
        if machines[1].0.loss.to_bits() != got.loss.to_bits() {
            return Err("another order gives another loss".into());
        }
        Ok(())
    }

    fn open_training<'c>(
        &self,
        c: &'c Compiled,
        o: &training::Opened,
        start: &Tensors,
        how: How,
    ) -> Result<Simulated<'c>, String> {
        let (tokens, sequences) = o.capacity();
        Simulated::open(c, start, &symbols(tokens, sequences, 1), how)
    }

    /// All steps of a fixture: in f32 against the reference's losses and its adapter at the end.
    ///
    /// # Errors
    /// Faults and differences.
    pub fn train(&self) -> Result<(), String> {
        let From::Train(case) = &self.from else { return Ok(()) };
        let o = case.open()?;
        if !case.trains(&o) {
            return Ok(());
        }
        let c = self.compiled()?;
        let params: Vec<Param> = c.schedule.params.iter().map(|(p, _)| p.clone()).collect();
        let mut m = self.open_training(c, &o, &o.values(&params)?, WAYS[0])?;
        o.train(&mut m, LOSS, CHANGE)
    }

    /// `infer` against the fixture, and greedy `generate` with a cache against the interpreter and the fixture.
    fn infer(&self, o: &fixtures::Opened) -> Result<(), String> {
        let c = self.compiled()?;
        let start = o.start(&self.graph()?.0)?;
        let half = self.dtype != DType::F32;
        let count = o.segments.len() as u64 - 1;
        let symbols = symbols(o.ids.len() as u64 + 9, count + 1, 64);
        let mut given = values(&c.schedule, &start.params, &symbols);
        for (p, layout) in &c.schedule.params {
            // Of the same tensor of the checkpoint.
            if let (Layout::Blocks(_), Source::Checkpoint(name)) = (layout, &p.source) {
                let of = |q: &&Param| matches!(&q.source, Source::Checkpoint(n) if n == name);
                let first = c.schedule.params.iter().map(|q| &q.0).find(of).and_then(|q| start.params.get(&q.name));
                let t = first.ok_or_else(|| format!("no value of {name}"))?;
                given.insert(p.name.clone(), Tensor::from_floats(p.ty.dtype, t.shape.clone(), t.floats().into_owned()));
            }
        }
        let params: Vec<Param> = c.schedule.params.iter().map(|(p, _)| p.clone()).collect();
        blocks::round(&params, &self.formats(&self.graph()?.0), &mut given);
        let mut machines = vec![];
        for how in WAYS {
            machines.push(Simulated::open(c, &given, &symbols, how)?);
        }
        // Counts of a run follow from its inputs.
        let fixed = symbols.iter().filter(|(s, _)| [Sym::P, Sym::C].contains(s)).map(|(s, n)| (*s, *n)).collect();
        let mut reference = Reference::open(&c.schedule, &given, &fixed)?;
        let mut both = |entry: &str, inputs: &Tensors| -> Result<(Tensors, Tensors), String> {
            let got = machines[0].run(entry, inputs)?;
            if machines[1].run(entry, inputs)? != got {
                return Err(format!("{entry}: another order gives other bits"));
            }
            Ok((got, reference.run(entry, inputs)?))
        };
        let close = |what: &str, got: &Tensor, want: &Tensor, allowed: f64| {
            let error = got.relative_error(want);
            let ok = error <= allowed;
            if ok { Ok(()) } else { Err(format!("{what} is {error:.1e} off, allowed {allowed:.1e}")) }
        };
        let one = |list: &Tensors, name: &str| list.get(name).cloned().ok_or_else(|| format!("no {name}"));
        let allowed = if half { LOGITS_HALF } else { 2e-5 };
        let (got, want) = both("infer", &start.inputs["infer"])?;
        let got = one(&got, &o.output)?;
        close("infer", &got, &one(&want, &o.output)?, allowed)?;
        if !self.blocks {
            close("infer beside the fixture", &got, &o.want, if half { 2.0 * LOGITS_HALF } else { 2e-5 })?;
        }
        if o.greedy.is_empty() {
            return Ok(());
        }
        // In the cache the last sequence comes first; each has room for what it is given and a little more.
        let mut new: Vec<Vec<i32>> = o.prompts();
        let room: Vec<i32> = new.iter().map(|ids| (ids.len() + ROUNDS) as i32).collect();
        let home = |s: usize| room[s + 1..].iter().sum::<i32>();
        let mut have = vec![0i32; new.len()];
        for round in 0..o.greedy[0].len().min(ROUNDS) {
            let inputs = cached(&new, &have, home);
            for (h, n) in have.iter_mut().zip(&new) {
                *h += n.len() as i32;
            }
            let (got, want) = both("generate", &inputs)?;
            let (got, want) = (one(&got, "logits")?, one(&want, "logits")?);
            close(&format!("generate, round {round}"), &got, &want, allowed)?;
            let vocab = want.shape[1] as usize;
            let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |x| x.0 as i32);
            new = want.floats().chunks(vocab).map(|row| vec![best(row)]).collect();
            let told: Vec<Vec<i32>> = o.greedy.iter().map(|g| vec![g[round]]).collect();
            let ours: Vec<Vec<i32>> = got.floats().chunks(vocab).map(|row| vec![best(row)]).collect();
            if !half && !self.blocks && ours != told {
                return Err(format!("round {round}: {ours:?} instead of {told:?}"));
            }
        }
        Ok(())
    }
}

/// Values of the symbols: tokens (and counted rows), sequences, slots of the cache.
fn symbols(tokens: u64, sequences: u64, cache: u64) -> Symbols {
    let list = [(Sym::T, tokens), (Sym::L, tokens), (Sym::S, sequences), (Sym::S1, sequences + 1), (Sym::P, 64)];
    list.into_iter().chain([(Sym::C, cache)]).collect()
}

/// Inputs of `generate` for new tokens of every sequence, of which `have` are in the cache.
fn cached(new: &[Vec<i32>], have: &[i32], home: impl Fn(usize) -> i32) -> Tensors {
    let mut list: [(&str, Vec<i32>); 7] =
        ["input_ids", "positions", "q_segments", "kv_start", "kv_len", "slots", "last"].map(|n| (n, vec![]));
    let mut put = |i: usize, x: i32| list[i].1.push(x);
    let mut end = 0;
    put(2, 0);
    for (s, (ids, n)) in new.iter().zip(have).enumerate() {
        for (i, id) in ids.iter().enumerate() {
            put(0, *id);
            put(1, n + i as i32);
            put(5, home(s) + n + i as i32);
        }
        end += ids.len() as i32;
        put(2, end);
        put(3, home(s));
        put(4, n + ids.len() as i32);
        put(6, end - 1);
    }
    list.into_iter().map(|(n, v)| (n.to_string(), Tensor::i32([v.len() as u64], v))).collect()
}

/// The PTX of all launches of a kernel, without what tells chips apart.
fn code(c: &Compiled, kernel: usize) -> String {
    let k = &c.plan.kernels[kernel];
    let text = String::from_utf8_lossy(&c.plan.blobs[k.blob as usize].bytes);
    let one = |l: &pleach_plan::Launch| {
        let from = text.find(&format!(".entry {}(", l.function)).unwrap_or(0);
        let body = &text[from..];
        body[..body.find("\n}\n").unwrap_or(body.len())].to_string()
    };
    k.launches.iter().map(one).collect()
}
