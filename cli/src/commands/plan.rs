//! `pleach plan`: the exact memory of a training run, before it runs.

use crate::args::{MethodArgs, PlanArgs, Search, ShapeArgs, Size};
use crate::failure::{Failure, Result};
use crate::report::{self, Table, Ui, bytes, layerless};
use crate::training::{Training, minimum, within_budget};
use pleach_plan::Step;
use pleach_runtime::Memory;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Plans.
///
/// # Errors
/// Files and options that are refused, a budget that is too small.
pub(crate) fn plan(ui: &Ui, args: &PlanArgs) -> Result<()> {
    let (method, shape, found) = match args.search {
        None => (args.method.clone(), args.shape.clone(), None),
        Some(what) => {
            let (method, shape, best) = search(ui, args, what)?;
            (method, shape, Some((what, best)))
        }
    };
    let asked = Planned::new(ui, args, &method, &shape)?;
    let minimum = minimum(ui, &args.model, &method, &shape)?.min(asked.memory.total());
    within_budget(asked.memory.total(), shape.budget, || Ok(minimum))?;
    if args.json {
        report::json(&asked.json(minimum, found.as_ref())?);
    } else {
        report::print(&asked.text(minimum, found.as_ref())?);
    }
    Ok(())
}

/// The largest number for which the plan fits into the budget.
fn search(ui: &Ui, args: &PlanArgs, what: Search) -> Result<(MethodArgs, ShapeArgs, u64)> {
    let Some(Size(budget)) = args.shape.budget else {
        return Err(Failure::usage("--search needs --budget"));
    };
    let with = |n: u64| {
        let (mut method, mut shape) = (args.method.clone(), args.shape.clone());
        match what {
            Search::Batch => shape.batch = n,
            Search::Length => shape.max_length = Some(n),
            Search::Rank => method.r = Some(n),
        }
        (method, shape)
    };
    let fits = |n: u64| -> Result<bool> {
        let (method, shape) = with(n);
        match Planned::new(ui, args, &method, &shape) {
            Ok(planned) => Ok(planned.memory.total() <= budget),
            // How methods say that a layer has fewer rows or columns; other failures are none of the rank's.
            Err(e) if what == Search::Rank && e.message.contains("fewer than r = ") => Ok(false),
            Err(e) => Err(e),
        }
    };
    let (low, limit) = match what {
        Search::Batch => (1, 1 << 14),
        Search::Length => (2, Planned::new(ui, args, &with(2).0, &with(2).1)?.limit()),
        Search::Rank => (1, 1 << 10),
    };
    if !fits(low)? {
        let (method, shape) = with(low);
        let total = Planned::new(ui, args, &method, &shape)?.memory.total();
        within_budget(total, args.shape.budget, || minimum(ui, &args.model, &method, &shape))?;
    }
    // Doubled until it no longer fits, then halved.
    let (mut good, mut bad) = (low, limit + 1);
    let mut next = low * 2;
    while next < bad {
        if fits(next)? {
            good = next;
            next *= 2;
        } else {
            bad = next;
        }
    }
    while good + 1 < bad {
        let middle = good + (bad - good) / 2;
        if fits(middle)? { good = middle } else { bad = middle }
    }
    let (method, shape) = with(good);
    Ok((method, shape, good))
}

/// Rows of the table of what is alive at the peak.
const ALIVE: usize = 12;

/// A plan with its memory at capacity.
struct Planned {
    training: Training,
    memory: Memory,
    env: Vec<u64>,
}

/// A value that is kept for the backward half.
#[derive(Clone, Debug, PartialEq)]
struct Saved {
    name: String,
    bytes: u64,
    reason: String,
    trained_only: bool,
    /// What building it again would take, microseconds.
    rebuild_us: f64,
}

impl Saved {
    /// What would drop it.
    fn drop(&self) -> String {
        let freeze = if self.trained_only { "not to train that weight, or " } else { "" };
        format!("{freeze}a smaller --budget: {:.2} ms to build it again", self.rebuild_us / 1e3)
    }
}

impl Planned {
    fn new(ui: &Ui, args: &PlanArgs, method: &MethodArgs, shape: &ShapeArgs) -> Result<Planned> {
        let quiet = Ui { quiet: true, ..*ui };
        let training = Training::open(&quiet, &args.model, method, shape)?;
        let weights = training.ready.weights()?;
        let memory = training.memory(ui, &weights)?;
        let options = training.options(ui);
        let env = training.ready.plan.env(&|s| options.capacities.get(s).copied())?;
        Ok(Planned { training, memory, env })
    }

    fn limit(&self) -> u64 {
        match self.training.ready.plan.meta.max_positions {
            0 => 1 << 20,
            n => n,
        }
    }

    /// Kept values in the order they are made; equal names (layers apart) stay apart.
    fn saved(&self) -> Vec<Saved> {
        let plan = &self.training.ready.plan;
        let list = plan.meta.extra.get("saved").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let text = |v: &Value, k: &str| v.get(k).and_then(Value::as_str).unwrap_or_default().to_owned();
        let one = |v: &Value| {
            let count = plan.symbol(&text(v, "symbol")).and_then(|i| self.env.get(i as usize).copied()).unwrap_or(1);
            let unit = v.get("unit_bytes").and_then(Value::as_u64).unwrap_or(0);
            Saved {
                name: text(v, "name"),
                bytes: unit.saturating_mul(count),
                reason: text(v, "reason"),
                trained_only: v.get("trained_only").and_then(Value::as_bool).unwrap_or(false),
                rebuild_us: v.get("rebuild_us").and_then(Value::as_f64).unwrap_or(0.0),
            }
        };
        list.iter().map(one).collect()
    }

    /// Bytes alive at the fullest moment of the entry that decides, and what runs then.
    fn peak(&self) -> Result<Peak> {
        let plan = &self.training.ready.plan;
        let mut best = Peak::default();
        for e in plan.entries.iter().filter(|e| e.prepares().is_none()) {
            let layout = pleach_plan::arena(e, &plan.kernels, &self.env)?;
            if layout.total < best.arena || layout.requests.is_empty() {
                continue;
            }
            let moments = layout.requests.iter().map(|(_, r)| r.last).max().unwrap_or(0) as usize;
            let mut change = vec![0i128; moments + 1];
            for (_, r) in &layout.requests {
                change[r.first as usize] += i128::from(r.size);
                change[r.last as usize] -= i128::from(r.size);
            }
            let (mut alive, mut most, mut at) = (0i128, 0i128, 0u64);
            for (i, c) in change.iter().enumerate() {
                alive += c;
                if alive > most {
                    (most, at) = (alive, i as u64);
                }
            }
            let waves = pleach_plan::waves(e, &plan.kernels);
            let steps = e.steps.iter().zip(&waves).filter(|(_, w)| u64::from(**w) == at);
            let name = |s: &Step| {
                let kernel = &plan.kernels[s.kernel as usize].symbol;
                if s.origin.is_empty() { kernel.clone() } else { format!("{} ({kernel})", s.origin) }
            };
            let alive = layout.requests.iter().filter(|(_, r)| r.first <= at && at < r.last).map(|(b, r)| {
                let maker = e.steps.iter().find(|s| s.buffers.contains(b)).map(name).unwrap_or_default();
                (maker, r.size)
            });
            best = Peak {
                entry: e.name.clone(),
                arena: layout.total,
                live: most as u64,
                at: steps.map(|(s, _)| name(s)).collect::<Vec<_>>().join(", "),
                alive: alive.collect(),
            };
        }
        Ok(best)
    }

    fn json(&self, minimum: u64, found: Option<&(Search, u64)>) -> Result<Value> {
        let (m, peak) = (&self.memory, self.peak()?);
        let saved: Vec<Value> = self
            .saved()
            .iter()
            .map(|s| {
                json!({
                    "name": s.name, "bytes": s.bytes, "reason": s.reason, "trained_only": s.trained_only,
                    "drop": s.drop(), "rebuild_us": s.rebuild_us,
                })
            })
            .collect();
        let kept: u64 = self.saved().iter().map(|s| s.bytes).sum();
        let alive: Vec<Value> = grouped(&peak.alive())
            .iter()
            .map(|(count, s)| json!({"name": s.name, "count": count, "bytes": s.bytes}))
            .collect();
        let mut out = json!({
            "total_bytes": m.total(), "arena_bytes": m.arena, "minimum_bytes": minimum,
            "weights": {"mapped_bytes": m.mapped, "owned_bytes": m.weights, "prepare_only_bytes": m.prepare_only},
            "adapter_bytes": m.adapter, "optimizer_bytes": m.optimizer, "gradient_bytes": m.gradients,
            "state_bytes": m.state, "scratch_bytes": m.scratch, "saved_bytes": kept,
            "workspace_bytes": m.arena.saturating_sub(kept),
            "peak": {"entry": peak.entry, "live_bytes": peak.live, "op": peak.at, "alive": alive},
            "trained_values": self.training.adapter.trained(),
            "batch": self.training.batch, "max_length": self.training.max_length, "saved": saved,
        });
        if let (Some((what, n)), Some(map)) = (found, out.as_object_mut()) {
            map.insert("found".into(), json!({format!("{what:?}").to_lowercase(): n}));
        }
        Ok(out)
    }

    fn text(&self, minimum: u64, found: Option<&(Search, u64)>) -> Result<String> {
        let (m, peak) = (&self.memory, self.peak()?);
        let mut out = String::new();
        if let Some((what, n)) = found {
            out += &format!("largest {} that fits: {n}\n\n", format!("{what:?}").to_lowercase());
        }
        let saved = self.saved();
        let kept: u64 = saved.iter().map(|s| s.bytes).sum();
        let mut t = Table::new(&["memory", "size", "bytes"]);
        let rows = [
            ("weights, in the mapped files", m.mapped),
            ("weights, own copies", m.weights),
            ("adapter and trained tensors", m.adapter),
            ("optimizer", m.optimizer),
            ("gradients", m.gradients),
            ("activations and workspace (arena)", m.arena),
            ("scratch of the workers", m.scratch),
            ("other", m.state),
            ("total", m.total()),
            ("least possible", minimum),
        ];
        for (name, n) in rows.into_iter().filter(|r| r.1 > 0) {
            t.row([name.to_string(), bytes(n), n.to_string()]);
        }
        out += &t.text();
        out += &format!("\npeak: {} alive in `{}` at {}\n", bytes(peak.live), peak.entry, peak.at);
        let mut t = Table::new(&["alive at the peak, by who makes it", "count", "size"]);
        for (count, s) in grouped(&peak.alive()).into_iter().take(ALIVE) {
            t.row([s.name, count.to_string(), bytes(s.bytes)]);
        }
        out += &t.text();
        out += &format!("\nkept for the backward half: {}\n", bytes(kept));
        let mut t = Table::new(&["kept", "count", "size", "<why", "<what would drop it"]);
        for (count, s) in grouped(&saved) {
            let drop = s.drop();
            t.row([s.name, count.to_string(), bytes(s.bytes), s.reason, drop]);
        }
        Ok(out + &t.text())
    }
}

/// The fullest moment.
#[derive(Default)]
struct Peak {
    entry: String,
    arena: u64,
    live: u64,
    at: String,
    /// What is alive then: who makes it, and its bytes.
    alive: Vec<(String, u64)>,
}

impl Peak {
    /// What is alive, as values to be put together.
    fn alive(&self) -> Vec<Saved> {
        let one = |(name, bytes): &(String, u64)| Saved {
            name: name.clone(),
            bytes: *bytes,
            reason: String::new(),
            trained_only: false,
            rebuild_us: 0.0,
        };
        self.alive.iter().map(one).collect()
    }
}

/// Equal values of different layers as one, with `*` for the number of the layer, and how many they are; the largest first.
fn grouped(saved: &[Saved]) -> Vec<(usize, Saved)> {
    let mut groups: BTreeMap<(String, String), (usize, Saved)> = BTreeMap::new();
    for s in saved {
        let (name, reason) = (layerless(&s.name), layerless(&s.reason));
        let none = Saved { name: name.clone(), reason: reason.clone(), bytes: 0, rebuild_us: 0.0, ..*s };
        let (count, all) = groups.entry((name, reason)).or_insert((0, none));
        *count += 1;
        all.bytes += s.bytes;
        all.rebuild_us += s.rebuild_us;
        all.trained_only &= s.trained_only;
    }
    let mut out: Vec<_> = groups.into_values().collect();
    out.sort_by(|(_, a), (_, b)| b.bytes.cmp(&a.bytes).then(a.name.cmp(&b.name)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_put_together() {
        let s = |name: &str, bytes| Saved {
            name: name.into(),
            bytes,
            reason: "read by x".into(),
            trained_only: true,
            rebuild_us: 500.0,
        };
        let list = [s("model.layers.0.mlp", 4), s("model.layers.11.mlp", 6), s("model.norm", 100)];
        let g = grouped(&list);
        let group = |name: &str, count, bytes| (count, Saved { rebuild_us: 500.0 * count as f64, ..s(name, bytes) });
        assert_eq!(g, [group("model.norm", 1, 100), group("model.layers.*.mlp", 2, 10)]);
        assert_eq!(list[0].drop(), "not to train that weight, or a smaller --budget: 0.50 ms to build it again");
        let other = Saved { trained_only: false, rebuild_us: 20.0, ..s("model.norm", 1) };
        assert_eq!(other.drop(), "a smaller --budget: 0.02 ms to build it again");
    }
}
