//! `pleach run`: one forward pass over all sequences, packed.

use crate::args::RunArgs;
use crate::failure::{Failure, Result};
use crate::inputs::{InferInputs, Sequences, parse_ids, read_sequences, write_tensors};
use crate::profile;
use crate::ready::ready;
use crate::report::{self, Table, Ui};
use crate::text;
use serde_json::{Value, json};
use std::path::Path;

/// Tokens shown per sequence.
const TOP: usize = 5;

/// Refuses results in place of a file that is read: in the folder of the model or of an adapter, a plan, sequences.
fn not_among_inputs(out: &Path, args: &RunArgs) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    let folders = [args.model.folder(), &args.model.model].into_iter();
    let inputs = folders.chain(args.model.adapter.iter().map(|a| a.path.as_path())).chain(args.input.as_deref());
    // A link lies where its name is, and where it leads.
    let parent = crate::files::above(out);
    let place = parent.canonicalize().ok().zip(out.file_name()).map(|(p, name)| p.join(name));
    let places: Vec<_> = out.canonicalize().into_iter().chain(place).collect();
    for input in inputs.filter_map(|i| i.canonicalize().ok()) {
        if places.iter().any(|p| p.starts_with(&input)) {
            let why = "lies among what is read; --out names another file";
            return Err(Failure::usage(format!("{}: {why}", out.display())));
        }
    }
    Ok(())
}

/// Runs.
///
/// # Errors
/// Everything on the way from files to results.
pub(crate) fn run(ui: &Ui, args: &RunArgs) -> Result<()> {
    let sequences = match &args.input {
        Some(file) => read_sequences(file)?,
        None if args.prompt.is_empty() => {
            Sequences::pack(&args.ids.iter().map(|s| parse_ids(s)).collect::<Result<Vec<_>>>()?)?
        }
        None => Sequences::pack(&text::encode(args.model.folder(), &args.prompt)?)?,
    };
    if let Some(out) = &args.out {
        not_among_inputs(out, args)?;
    }
    let ready = ready(ui, &args.model, &["infer"], &[])?;
    ready.takes(sequences.longest())?;
    let encoder = ready.is_encoder();
    if args.similarity && !encoder {
        return Err(Failure::usage("--similarity is for encoders; this model is a decoder"));
    }
    let needed =
        [("T", sequences.ids.len() as u64), ("S", sequences.len() as u64), ("C", 1), ("P", sequences.longest())];
    let mut session = ready.session(ui, &args.capacity, &needed)?;
    let inputs = InferInputs::new(&sequences, encoder);
    if let Some(file) = &args.profile {
        // Weights are packed and pages come in before the clock starts.
        session.run("infer", &inputs.values())?;
        session.set_profile(true);
        session.run("infer", &inputs.values())?;
        profile::write(ui, &session, "pleach run", file)?;
        session.set_profile(false);
    }
    let outputs = session.run("infer", &inputs.values())?;
    let name = if encoder { "last_hidden_state" } else { "logits" };
    let output = outputs.get(name)?;
    if let Some(path) = &args.out {
        write_tensors(path, &[(name, output.shape.clone(), output.bytes)])?;
        ui.note(&format!("{name} {:?} written to {}", output.shape, path.display()));
        if !args.similarity && !args.json {
            return Ok(());
        }
    }
    let width = output.shape.last().copied().unwrap_or(1) as usize;
    let rows = outputs.f32(name)?;
    if let Some(i) = rows.iter().position(|x| !x.is_finite()) {
        let (row, x) = (i / width.max(1), rows[i]);
        return Err(Failure::new(format!("{name} holds {x} at token {row}; check the weights and the adapters")));
    }
    match (encoder, args.similarity) {
        (true, true) => similarity(&sequences, rows, width, args.json),
        (true, false) => vectors(&sequences, rows, width, args.json),
        _ => next_tokens(args, &sequences, rows, width),
    }
    Ok(())
}

/// The mean of a sequence's vectors, for each sequence.
fn pooled(s: &Sequences, rows: &[f32], width: usize) -> Vec<Vec<f64>> {
    let one = |w: &[i32]| {
        let mut mean = vec![0.0; width];
        for row in rows[w[0] as usize * width..w[1] as usize * width].chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x));
        }
        mean.iter_mut().for_each(|m| *m /= f64::from(w[1] - w[0]));
        mean
    };
    s.segments.windows(2).map(one).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn similarity(s: &Sequences, rows: &[f32], width: usize, as_json: bool) {
    let means = pooled(s, rows, width);
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE);
    let matrix: Vec<Vec<f64>> = means.iter().map(|a| means.iter().map(|b| cosine(a, b)).collect()).collect();
    if as_json {
        return report::json(&json!({ "cosine": matrix }));
    }
    let numbers: Vec<String> = (1..=matrix.len()).map(|i| i.to_string()).collect();
    let mut t = Table::new(&std::iter::once("").chain(numbers.iter().map(String::as_str)).collect::<Vec<_>>());
    for (n, row) in numbers.iter().zip(&matrix) {
        t.row(std::iter::once(n.clone()).chain(row.iter().map(|x| format!("{x:.4}"))));
    }
    report::print(&t.text());
}

fn vectors(s: &Sequences, rows: &[f32], width: usize, as_json: bool) {
    let means = pooled(s, rows, width);
    if as_json {
        let list: Vec<Value> = s.each().zip(&means).map(|(ids, m)| json!({"tokens": ids.len(), "mean": m})).collect();
        return report::json(&json!({ "sequences": list }));
    }
    let mut t = Table::new(&["sequence", "tokens", "norm of the mean", "<first values of the mean"]);
    for (i, (ids, m)) in s.each().zip(&means).enumerate() {
        let first: Vec<String> = m.iter().take(6).map(|x| format!("{x:+.4}")).collect();
        let cells = [(i + 1).to_string(), ids.len().to_string(), format!("{:.4}", dot(m, m).sqrt()), first.join(" ")];
        t.row(cells);
    }
    report::print(&t.text());
}

fn next_tokens(args: &RunArgs, s: &Sequences, rows: &[f32], vocab: usize) {
    let mut list = vec![];
    let mut t = Table::new(&["sequence", "tokens", "id", "probability", "<text"]);
    for (i, w) in s.segments.windows(2).enumerate() {
        let row = &rows[(w[1] as usize - 1) * vocab..w[1] as usize * vocab];
        let best = likeliest(row);
        let names = text::names(args.model.folder(), &best.iter().map(|b| b.0).collect::<Vec<_>>());
        let mut next = vec![];
        for ((id, p), name) in best.iter().zip(names) {
            let shown = name.as_ref().map_or(String::new(), |n| format!("{n:?}"));
            t.row([(i + 1).to_string(), (w[1] - w[0]).to_string(), id.to_string(), format!("{p:.4}"), shown]);
            next.push(json!({"id": id, "probability": p, "logit": row[*id as usize], "text": name}));
        }
        list.push(json!({"tokens": w[1] - w[0], "next": next}));
    }
    if args.json { report::json(&json!({ "sequences": list })) } else { report::print(&t.text()) }
}

/// The likeliest ids with their probabilities, ties by id.
fn likeliest(row: &[f32]) -> Vec<(i32, f64)> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    let mut order: Vec<usize> = (0..row.len()).collect();
    let by = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
    if order.len() > TOP {
        order.select_nth_unstable_by(TOP, by);
        order.truncate(TOP);
    }
    order.sort_unstable_by(by);
    order.into_iter().map(|i| (i as i32, f64::from(row[i] - max).exp() / total)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_means_are_per_sequence() {
        let best = likeliest(&[0.0, 3.0, 1.0, 3.0, -1.0, 2.0, 0.5]);
        assert_eq!(best.iter().map(|b| b.0).collect::<Vec<_>>(), [1, 3, 5, 2, 6]);
        assert!((best[0].1 - best[1].1).abs() < 1e-12 && best[0].1 < 0.5);
        let s = Sequences::pack(&[vec![1, 2], vec![3]]).unwrap();
        assert_eq!(pooled(&s, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2), [[2.0, 3.0], [5.0, 6.0]]);
    }
}
