//! What a plan says: parameters, launches, buffers, and where each lies when.

use super::columns::Strings;
use crate::failure::Result;
use pleach_passes::differentiate::SETTINGS;
use pleach_passes::recompute::SEED;
use pleach_plan::{Buffer, BufferKind, Entry, Expr, Layout, Plan, Residency, Source};
use serde_json::{Value, json};

/// The plan at these values of its symbols. `saved` is the plan's own list of what is kept for the backward half.
///
/// # Errors
/// A size without a value.
pub(super) fn plan(plan: &Plan, env: &[u64], strings: &mut Strings) -> Result<Value> {
    let symbols: Vec<Value> = plan.symbols.iter().zip(env).map(|(s, v)| json!([s.name, v])).collect();
    let entries = plan.entries.iter().map(|e| entry(plan, e, env, strings)).collect::<Result<Vec<Value>>>()?;
    let m = &plan.meta;
    Ok(json!({
        "arch": plan.target.arch, "features": plan.target.features, "symbols": symbols,
        "params": params(plan, env, strings)?, "entries": entries, "saved": saved(plan),
        "meta": {"kind": m.kind, "layers": m.layers, "hidden": m.hidden, "vocab": m.vocab},
    }))
}

fn params(plan: &Plan, env: &[u64], strings: &mut Strings) -> Result<Value> {
    let (mut name, mut ty, mut bytes, mut role, mut source, mut stays) =
        (vec![], vec![], vec![], vec![], vec![], vec![]);
    for p in &plan.params {
        name.push(p.name.clone());
        let dims: Vec<String> = p.shape.iter().map(|d| d.display(&plan.symbols).to_string()).collect();
        let layout = layout(p.layout);
        ty.push(strings.id(&format!("{}[{}]{layout}", p.dtype.name(), dims.join(","))));
        bytes.push(p.bytes.eval(env)?);
        role.push(strings.id(&format!("{:?}", p.role).to_lowercase()));
        source.push(strings.id(match p.source {
            Source::Checkpoint(_) => "checkpoint",
            Source::Adapter { .. } => "adapter",
            Source::Derived => "derived",
            Source::Zeros => "zeros",
        }));
        stays.push(strings.id(match p.residency {
            Residency::Mapped => "mapped",
            Residency::PrepareOnly => "read by prepare only",
            Residency::Owned => "in memory",
        }));
    }
    Ok(json!({"name": name, "ty": ty, "bytes": bytes, "role": role, "source": source, "stays": stays}))
}

/// How a parameter lies in memory, where that is not row by row.
fn layout(l: Layout) -> String {
    match l {
        Layout::RowMajor => String::new(),
        Layout::Panels { .. } => " in panels".into(),
        Layout::Blocks(format) => format!(" in {} blocks", format.name()),
        Layout::CodedPanels { format, .. } => format!(" in panels of {} codes", format.name()),
    }
}

/// The plan's list of kept values with its bytes worked out later, from `unit_bytes` and `symbol`.
fn saved(plan: &Plan) -> Value {
    plan.meta.extra.get("saved").cloned().unwrap_or_else(|| json!([]))
}

/// Steps of the backward half: those that depend on the factor of the loss, and those after the first of them that reads a value of the
/// forward half, which build such values again. The second list marks the latter.
fn backward(plan: &Plan, e: &Entry) -> (Vec<bool>, Vec<bool>) {
    let seed = |b: &Buffer| matches!(b.kind, BufferKind::Input(i) if e.inputs[i as usize].name == SEED);
    let mut late: Vec<bool> = e.buffers.iter().map(seed).collect();
    let (mut out, mut first) = (vec![], e.steps.len());
    let mut made = vec![false; e.buffers.len()];
    for (i, s) in e.steps.iter().enumerate() {
        let (reads, writes) = s.buffers.split_at(plan.kernels[s.kernel as usize].operands.len());
        let is = reads.iter().any(|b| late[*b as usize]);
        // A factor alone may be changed long before.
        if is && reads.iter().any(|b| made[*b as usize] && !late[*b as usize]) {
            first = first.min(i);
        }
        for b in writes {
            late[*b as usize] |= is;
            made[*b as usize] = true;
        }
        out.push(is);
    }
    let again = out.iter().enumerate().map(|(i, l)| i > first && !l).collect();
    out.iter_mut().skip(first).for_each(|l| *l = true);
    (out, again)
}

/// Steps of the optimizer: those that depend on its settings.
fn optimizer(plan: &Plan, e: &Entry) -> Vec<bool> {
    let setting =
        |b: &Buffer| matches!(b.kind, BufferKind::Input(i) if SETTINGS.contains(&e.inputs[i as usize].name.as_str()));
    let mut set: Vec<bool> = e.buffers.iter().map(setting).collect();
    let one = |s: &pleach_plan::Step| {
        let (reads, writes) = s.buffers.split_at(plan.kernels[s.kernel as usize].operands.len());
        let is = reads.iter().any(|b| set[*b as usize]);
        writes.iter().for_each(|b| set[*b as usize] |= is);
        is
    };
    e.steps.iter().map(one).collect()
}

fn entry(plan: &Plan, e: &Entry, env: &[u64], strings: &mut Strings) -> Result<Value> {
    let (late, again) = backward(plan, e);
    let steps = optimizer(plan, e);
    let part = late.iter().zip(&steps).map(|(l, s)| if *l && *s { 2 } else { u8::from(*l) });
    let waves = pleach_plan::waves(e, &plan.kernels);
    let (mut kernel, mut origin, mut reads, mut buffers) = (vec![], vec![], vec![], vec![]);
    for s in &e.steps {
        kernel.push(s.kernel);
        origin.push(strings.id(&s.origin));
        reads.push(plan.kernels[s.kernel as usize].operands.len());
        buffers.push(s.buffers.clone());
    }
    let (mut kind, mut bytes, mut names) = (vec![], vec![], vec![]);
    for b in &e.buffers {
        kind.push(match b.kind {
            BufferKind::Input(i) => json!(["i", i]),
            BufferKind::Param(p) => json!(["p", p]),
            BufferKind::Arena => json!("a"),
            BufferKind::Output => json!("o"),
        });
        bytes.push(b.bytes.eval(env)?);
        names.push(strings.id(&b.name));
    }
    let dims =
        |shape: &[Expr]| shape.iter().map(|d| d.display(&plan.symbols).to_string()).collect::<Vec<_>>().join(",");
    let inputs: Vec<Value> =
        e.inputs.iter().map(|i| json!([i.name, format!("{}[{}]", i.dtype.name(), dims(&i.shape))])).collect();
    let outputs: Vec<Value> = e
        .outputs
        .iter()
        .map(|o| json!([o.name, format!("{}[{}]", o.dtype.name(), dims(&o.shape)), o.buffer]))
        .collect();
    let loops: Vec<Value> =
        e.loops.iter().map(|l| json!([l.first, l.last, plan.symbols[l.symbol as usize].name, l.chunk])).collect();
    Ok(json!({
        "name": e.name, "inputs": inputs, "outputs": outputs, "loops": loops,
        "steps": {"kernel": kernel, "from": origin, "reads": reads, "buffers": buffers, "wave": waves,
                  "part": part.collect::<Vec<_>>()},
        "buffers": {"kind": kind, "bytes": bytes, "from": names},
        "arena": arena(plan, e, env, &late, &again)?,
    }))
}

/// Rectangles: buffer, first wave, one past the last, address, size, and what it is for.
fn arena(plan: &Plan, e: &Entry, env: &[u64], late: &[bool], again: &[bool]) -> Result<Value> {
    let layout = pleach_plan::arena(e, &plan.kernels, env)?;
    let both = late.contains(&true) && late.contains(&false);
    // the step that first writes each buffer, and all that read it
    let (mut writer, mut readers) = (vec![None; e.buffers.len()], vec![vec![]; e.buffers.len()]);
    for (i, s) in e.steps.iter().enumerate() {
        let operands = plan.kernels[s.kernel as usize].operands.len();
        s.buffers[..operands].iter().for_each(|b| readers[*b as usize].push(i));
        s.buffers[operands..].iter().for_each(|b| _ = writer[*b as usize].get_or_insert(i));
    }
    let inside = |i: usize| e.loops.iter().any(|l| (l.first..l.last).contains(&(i as u64)));
    let (mut id, mut first, mut last, mut at, mut size, mut kind) = (vec![], vec![], vec![], vec![], vec![], vec![]);
    for (b, r) in &layout.requests {
        let i = *b as usize;
        let (w, rs) = (writer[i], &readers[i]);
        let forward = w.is_none_or(|w| !late[w]);
        let is = if e.buffers[i].kind == BufferKind::Output {
            "output"
        } else if w.is_some_and(inside) && rs.iter().all(|s| inside(*s)) {
            // Both halves of a window run one after the other: nothing of it is kept.
            "window"
        } else if both && forward && rs.iter().any(|s| late[*s]) {
            "kept"
        } else if !both {
            "activation"
        } else if w.is_some_and(|w| again[w]) {
            "rebuilt"
        } else if forward {
            "forward"
        } else {
            "gradient"
        };
        id.push(*b);
        first.push(r.first);
        last.push(r.last);
        size.push(r.size);
        at.push(layout.offsets[i].unwrap_or(0));
        kind.push(is);
    }
    let reads: Vec<Value> =
        layout.requests.iter().map(|(b, _)| json!([writer[*b as usize], readers[*b as usize]])).collect();
    Ok(json!({
        "total": layout.total, "peak": layout.lower_bound, "buffer": id, "first": first, "last": last, "at": at,
        "size": size, "kind": kind, "uses": reads,
    }))
}
