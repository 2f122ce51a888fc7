//! `pleach inspect --html`: one page that shows a whole compilation, or what a plan can show.
//!
//! This side collects; the page draws. Everything is in the file: style, script and data.

mod columns;
mod html;
mod kernels;
mod memory;
mod passes;
mod profile;

use crate::args::InspectArgs;
use crate::failure::Result;
use crate::pipeline::stages::Stages;
use crate::pipeline::{Request, Row};
use crate::report::{Ui, bytes};
use columns::Strings;
use pleach_ir::Sym;
use pleach_passes::differentiate::SETTINGS;
use pleach_passes::recompute::SEED;
use pleach_plan::Plan;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What a page is made of. Without a compilation it shows a plan alone.
pub(super) struct Subject<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Values of its symbols.
    pub env: Vec<u64>,
    /// How it was made.
    pub made: Option<Made<'a>>,
}

/// A compilation.
pub(super) struct Made<'a> {
    /// Every graph on the way.
    pub stages: &'a Stages,
    /// What was asked for.
    pub request: &'a Request,
    /// Report of the compilation.
    pub rows: &'a [Row],
}

/// Writes the page.
///
/// # Errors
/// Files that do not read or cannot be written, a profile of another plan.
pub(super) fn write(ui: &Ui, args: &InspectArgs, subject: &Subject<'_>, out: &Path) -> Result<()> {
    let title = title(args);
    let data = data(args, subject, &title)?;
    let mut blocks = vec![html::packed(&data)?];
    for other in &args.compare {
        blocks.extend(html::data_of(other)?);
    }
    let page = html::page(&title, &blocks);
    crate::files::write(out, &page)?;
    ui.note(&format!("{} written, {}", out.display(), bytes(page.len() as u64)));
    Ok(())
}

/// A name for people: the model, its adapters or the method.
fn title(args: &InspectArgs) -> String {
    let name = |p: &Path| p.file_name().map_or_else(|| p.display().to_string(), |n| n.to_string_lossy().into_owned());
    let mut parts = vec![name(&args.model.model)];
    parts.extend(args.model.adapter.iter().map(|a| a.name.clone().unwrap_or_else(|| name(&a.path))));
    if let Some(m) = &args.method.method {
        parts.push(args.method.r.map_or_else(|| m.clone(), |r| format!("{m} r={r}")));
    }
    if let Some(b) = args.shape_of_training.budget {
        parts.push(format!("budget {}", bytes(b.0)));
    }
    parts.join(" + ")
}

fn data(args: &InspectArgs, subject: &Subject<'_>, title: &str) -> Result<Value> {
    let plan = subject.plan;
    let mut strings = Strings::default();
    let value = |s: Sym| plan.symbol(s.as_str()).and_then(|i| subject.env.get(i as usize).copied());
    let mut kernels = kernels::facts(plan, &subject.env)?;
    let mut out = Map::new();
    out.insert("format".into(), json!("pleach-page"));
    out.insert("version".into(), json!(1));
    out.insert("program".into(), json!(env!("CARGO_PKG_VERSION")));
    out.insert("title".into(), json!(title));
    out.insert("seed".into(), json!(SEED));
    out.insert("settings".into(), json!(SETTINGS));
    out.insert("rules".into(), passes::rules());
    let gpu = !plan.target.arch.starts_with("x86");
    let speeds = if gpu { pleach_passes::Target::GPU } else { pleach_passes::Target::CPU };
    out.insert("speeds".into(), json!([speeds.flops, speeds.bytes_per_s]));
    if let Some(m) = &subject.made {
        kernels::code(&mut kernels, &m.stages.schedule, m.request)?;
        out.insert("graphs".into(), passes::graphs(m.stages, &mut strings, &value));
        out.insert("passes".into(), passes::passes(&m.stages.reports, m.rows));
        out.insert("saved".into(), passes::saved(m.stages));
        out.insert("dtype".into(), json!(m.request.dtype));
        out.insert("merge".into(), json!(m.request.merge));
    } else {
        let text = |b: &pleach_plan::Blob| json!([b.name, String::from_utf8_lossy(&b.bytes)]);
        let ptx = plan.blobs.iter().filter(|b| b.kind == pleach_plan::BlobKind::Ptx);
        out.insert("ptx".into(), ptx.map(text).collect::<Vec<_>>().into());
    }
    out.insert("kernels".into(), kernels.into_iter().map(Value::Object).collect::<Vec<_>>().into());
    out.insert("plan".into(), memory::plan(plan, &subject.env, &mut strings)?);
    if let Some(p) = &args.profile {
        out.insert("profile".into(), profile::read(p, plan)?);
    }
    out.insert("strings".into(), strings.into_json());
    Ok(Value::Object(out))
}
