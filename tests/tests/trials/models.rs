//! The fixtures, compiled: logits against PEFT, apart and merged; greedy ids against transformers, as many as stored.

use crate::Trials;
use pleach_frontend::ModelConfig;
use pleach_ir::interp::Tensor;
use pleach_ir::{Graph, Source};
use pleach_passes::Options;
use pleach_plan::{DType, Meta};
use pleach_runtime::{GenerateParams, InMemory, generate};
use pleach_tests::compare::{Start, run_graph};
use pleach_tests::compiled::{plan_of, run, session, targets};
use pleach_tests::fixtures::{Fixture, cases};
use std::ops::ControlFlow;
use std::sync::Arc;

pub(crate) fn trials(trials: &mut Trials) {
    for c in trials.listed("cases.json", cases()) {
        for merge in [false, true] {
            let (c, kind) = (c.clone(), if merge { "merged" } else { "apart" });
            trials.add(format!("{}/{kind}", c.name), move || check(&c, merge));
        }
    }
    trials.add("a slot takes another adapter and gives the first one back", swap);
}

/// The tensors of slot 0 as a source for the runtime.
fn slot(graph: &Graph, start: &Start, leave_out: Option<&str>) -> InMemory {
    let mut out = InMemory::new();
    for p in &graph.params {
        if let (Source::Adapter { key, .. }, Some(t)) = (&p.source, start.params.get(&p.name))
            && leave_out != Some(key.as_str())
        {
            out.insert(key.clone(), DType::F32, &t.shape, t.to_bytes());
        }
    }
    out
}

/// One plan, one session: adapter A, then B of the same signature, a misfit, and A again.
fn swap() -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let c = cases()?.into_iter().find(|c| c.name == "llama-tiny+lora-all").ok_or("no such fixture")?;
    let o = c.open()?;
    let graph = pleach_frontend::import(&o.checkpoint, &o.adapters, &["infer"]).map_err(|e| text(&e))?;
    let a = o.start(&graph)?;
    let mut b = a.clone();
    let mut keys = vec![];
    for (i, p) in graph.params.iter().enumerate() {
        if let (Source::Adapter { key, .. }, Some(t)) = (&p.source, b.params.get_mut(&p.name)) {
            let factor = 0.4 + 0.1 * (i % 7) as f32;
            *t = Tensor::f32(t.shape.clone(), t.floats().iter().map(|x| x * factor).collect());
            keys.push(key.clone());
        }
    }
    let want = run_graph(&graph, &b).map_err(|e| text(&e))?;
    let capacity = [("T", 64), ("S", 4), ("C", 64), ("P", 64)];
    let capacity = capacity.into_iter().fold(pleach_runtime::Options::default(), |o, (s, n)| o.capacity(s, n));
    for target in targets() {
        let meta = Meta { vocab: o.checkpoint.config.vocab(), max_positions: 64, ..Meta::default() };
        let plan = Arc::new(plan_of(&graph, &Options::default(), &target, meta)?);
        let mut s = session(plan, &graph, &a, &capacity)?;
        let names: Vec<String> = s.plan().params.iter().map(|p| p.name.clone()).collect();
        let first = run(&mut s, "infer", &a)?;
        let at: Vec<_> = names.iter().map(|n| s.address_of(n)).collect();

        s.load_slot(0, &slot(&graph, &b, None)).map_err(|e| text(&e))?;
        let second = run(&mut s, "infer", &b)?;
        let e = second["infer/logits"].relative_error(&want["infer/logits"]);
        let apart = second["infer/logits"].relative_error(&first["infer/logits"]);
        if e.is_nan() || e > 2e-5 || apart < 2e-3 {
            return Err(format!("adapter B is off by {e:.1e}, and {apart:.1e} away from adapter A"));
        }
        // A misfit is refused by name, and the slot keeps what it has.
        let missing = &keys[keys.len() / 2];
        match s.load_slot(0, &slot(&graph, &a, Some(missing))) {
            Ok(()) => return Err("an adapter without one of its tensors was taken".into()),
            Err(e) if !e.to_string().contains(missing.as_str()) => {
                return Err(format!("does not name {missing}: {e}"));
            }
            Err(_) => {}
        }
        if run(&mut s, "infer", &b)? != second {
            return Err("a refused adapter changed the slot".into());
        }
        s.load_slot(0, &slot(&graph, &a, None)).map_err(|e| text(&e))?;
        if run(&mut s, "infer", &a)? != first {
            return Err("the first adapter does not come back bit for bit".into());
        }
        if names.iter().map(|n| s.address_of(n)).collect::<Vec<_>>() != at {
            return Err("a parameter moved".into());
        }
    }
    Ok(())
}

fn check(c: &Fixture, merge: bool) -> Result<(), String> {
    let o = c.open()?;
    let entries: &[&str] = if o.checkpoint.config.is_decoder() { &["infer", "generate"] } else { &["infer"] };
    let graph = pleach_frontend::import(&o.checkpoint, &o.adapters, entries).map_err(|e| e.to_string())?;
    let start = o.start(&graph)?;
    let config = &o.checkpoint.config;
    let (max_positions, type_vocab) = match config {
        ModelConfig::Llama(c) => (c.max_positions, 0),
        ModelConfig::Bert(c) => (c.max_positions, c.type_vocab),
    };
    let meta = Meta { vocab: config.vocab(), max_positions, type_vocab, ..Meta::default() };
    let sequences = o.segments.len() as u64 - 1;
    let mut capacity = pleach_runtime::Options::default().threads(2);
    for (s, n) in [("T", o.ids.len() as u64), ("S", sequences), ("C", 256), ("P", 64)] {
        capacity = capacity.capacity(s, n);
    }
    for target in targets() {
        let options = Options { merge, ..Options::default() };
        let plan = Arc::new(plan_of(&graph, &options, &target, meta.clone())?);
        let mut s = session(plan, &graph, &start, &capacity)?;
        let got = run(&mut s, "infer", &start)?;
        let want = if merge { &o.merged } else { &o.want };
        let e = got[&format!("infer/{}", o.output)].relative_error(want);
        if e.is_nan() || e > c.tolerance {
            return Err(format!("relative error {e:.2e}, allowed {:.0e}", c.tolerance));
        }
        if o.greedy.is_empty() {
            continue;
        }
        let params = GenerateParams { max_new_tokens: o.greedy[0].len(), ..GenerateParams::default() };
        let new = generate(&mut s, &o.prompts(), &params, &mut |_, _| ControlFlow::Continue(()));
        let new = new.map_err(|e| e.to_string())?.ids;
        if new != o.greedy {
            return Err(format!("greedy ids\n{new:?}\nexpected\n{:?}", o.greedy));
        }
    }
    Ok(())
}
