//! Passes of a plan that trains, within a memory budget.
//!
//! Keeping everything that is dear to build again is tried first. If the session would be too large, rising prices of a
//! kept byte are tried until it fits, and the price is halved once; between the two prices that are left, the first part of
//! the forward half takes the higher one. Every trial that fits is cut into kernels, ordered and placed, so the size compared is
//! the size a session will have. Only the entry with a backward half is tried: the others are the same at every price. Two
//! trials run at a time, whatever the number of threads, so that the result is the same.

use super::{Request, TrainPart, cut_of};
use crate::failure::Result;
use pleach_codegen::compile::{self, CompileOptions};
use pleach_ir::Graph;
use pleach_passes::recompute::{self, Price};
use pleach_passes::{Options, PassReport, Pipeline, Report, chunk, fuse_kernels};
use pleach_plan::{Meta, Plan};
use pleach_runtime::{Memory, TensorSource, arena_and_scratch, plan_memory};

/// What is tried in turn until it fits: a price in multiples of what keeping a byte costs in time, and at how many narrow places
/// the forward half stops (every second one is about a layer). At the last ones whatever can be built again is.
const LADDER: [(f64, usize); 8] = [(2.0, 2), (4.0, 2), (8.0, 2), (16.0, 2), (32.0, 2), (64.0, 2), (1e5, 4), (1e5, 8)];

/// Rounds in which the share of the forward half falls to a third: the last one is about a layer.
const SHARES: usize = 3;

/// The graph after all passes, their reports, and the price that `recompute` ran with.
///
/// # Errors
/// The error of a pass. A budget that cannot be met gives the smallest plan seen; whoever opens it compares.
pub(super) fn passes(
    graph: &Graph,
    request: &Request,
    train: &TrainPart,
    meta: &Meta,
    weights: &dyn TensorSource,
) -> Result<(Graph, Vec<PassReport>, Option<Price>)> {
    let opts = request.options();
    let disable = request.disable.clone();
    let (last, first): (Vec<String>, Vec<String>) =
        Pipeline::default().passes.into_iter().partition(|p| p == "recompute");
    let before =
        pleach_passes::run(graph, &Pipeline { passes: first, disable: disable.clone(), ..Pipeline::default() }, &opts)?;
    let finish = |price: Option<Price>| -> Result<(Graph, Vec<PassReport>, Option<Price>)> {
        let opts = Options { recompute: price, ..opts.clone() };
        let pipeline = Pipeline { passes: last.clone(), disable: disable.clone(), ..Pipeline::default() };
        let out = pleach_passes::run(&before.graph, &pipeline, &opts)?;
        Ok((out.graph, out.reports, price))
    };
    let mut best = finish(None)?;
    if let Some(budget) = train.budget.filter(|_| !disable.iter().any(|d| d == "recompute")) {
        let whole = plan_memory(&without_code(&best.0, request, meta)?, weights, &train.capacities())?;
        if whole.total() > budget {
            let trials = Trials::new(&before.graph, &whole, budget, (request, train, meta));
            if let Some(price) = trials.search(whole.total(), weights)? {
                best = finish(Some(price))?;
            }
        }
    }
    let mut reports = before.reports;
    reports.extend(best.1);
    Ok((best.0, reports, best.2))
}

/// The plan of a graph, but for its code.
fn without_code(graph: &Graph, request: &Request, meta: &Meta) -> Result<Plan> {
    let mut s = fuse_kernels::cut(graph, &cut_of(request, graph)?)?;
    chunk::run(&mut s, &request.options())?;
    fuse_kernels::order(&mut s)?;
    Ok(match request.gpu() {
        Some(chip) => compile::without_code_gpu(&s, chip, meta.clone())?,
        None => {
            let options = CompileOptions { target: request.host()?, threads: 1, meta: meta.clone() };
            compile::without_code(&s, &options)?
        }
    })
}

/// Trials of a price.
struct Trials<'a> {
    /// The graph with nothing but the entry that has a backward half.
    graph: Graph,
    /// Bytes of a session beside arena and scratch.
    beside: u64,
    /// What the other entries need of the arena, and all of them of scratch.
    arena: u64,
    scratch: u64,
    budget: u64,
    request: &'a Request,
    train: &'a TrainPart,
    meta: &'a Meta,
}

impl<'a> Trials<'a> {
    /// `whole` is what a session needs that keeps everything dear.
    fn new(
        graph: &Graph,
        whole: &Memory,
        budget: u64,
        (request, train, meta): (&'a Request, &'a TrainPart, &'a Meta),
    ) -> Trials<'a> {
        let entries: Vec<_> = graph.entries.iter().filter(|e| recompute::has_halves(e)).cloned().collect();
        let tried = |name: &str| entries.iter().any(|e| e.name == name);
        let arena = whole.entries.iter().filter(|e| !tried(&e.0)).map(|e| e.1).max().unwrap_or(0);
        Trials {
            graph: Graph { phase: graph.phase, params: graph.params.clone(), entries },
            beside: whole.total() - whole.arena - whole.scratch,
            arena,
            scratch: whole.scratch,
            budget,
            request,
            train,
            meta,
        }
    }

    fn options(&self, price: Price) -> Options {
        Options { recompute: Some(price), ..self.request.options() }
    }

    /// The price that fits into the budget and costs least; if none does, that of the smallest plan seen, which is none where the plan
    /// of `whole` bytes without a price is.
    fn search(&self, whole: u64, weights: &dyn TensorSource) -> Result<Option<Price>> {
        let floor = Price::floor(self.request.options().target.bytes_per_s).byte_us;
        let ladder = LADDER.map(|(times, every)| Price { every, ..Price::flat(times * floor) });
        let (mut low, mut high): (Price, Option<Price>) =
            (Price { every: ladder[0].every, ..Price::flat(floor) }, None);
        for pair in ladder.chunks(2) {
            for (price, size) in pair.iter().zip(self.sizes(pair)?) {
                if size <= self.budget {
                    high = high.or(Some(*price));
                } else if high.is_none() {
                    low = *price;
                }
            }
            if high.is_some() {
                break;
            }
        }
        let Some(mut high) = high else { return self.smallest(&ladder, whole, weights) };
        // With fewer stops the same price keeps less: nothing is known of lower ones.
        let mut low = if low.every == high.every { low.byte_us } else { floor };
        // Dearer and dearer candidates; the first that fits bounds from above, the one before it from below.
        let middle = (low * high.byte_us).sqrt();
        let candidates = [(low * middle).sqrt(), middle];
        match self.first(&candidates.map(|x| Price { every: high.every, ..Price::flat(x) }))? {
            Some(i) => {
                high.byte_us = candidates[i];
                low = if i > 0 { candidates[i - 1] } else { low };
            }
            None => low = candidates[1],
        }
        high.early_byte_us = high.byte_us;
        let mut best = high;
        let (mut none, mut all) = (0.0, 1.0);
        for _ in 0..SHARES {
            let candidates = [none + (all - none) / 3.0, none + (all - none) / 3.0 * 2.0];
            let prices = candidates.map(|early| Price { byte_us: low, early, ..high });
            match self.first(&prices)? {
                Some(i) => {
                    (best, all) = (prices[i], candidates[i]);
                    none = if i > 0 { candidates[i - 1] } else { none };
                }
                None => none = candidates[1],
            }
        }
        Ok(Some(best))
    }

    /// The price of the smallest plan, where none fits: sizes are exact.
    fn smallest(&self, ladder: &[Price], whole: u64, weights: &dyn TensorSource) -> Result<Option<Price>> {
        let (mut best, mut least) = (None, whole);
        for price in ladder {
            let graph = recompute::run(&self.graph, &self.options(*price), &mut Report::default())?;
            let plan = without_code(&graph, self.request, self.meta)?;
            let m = plan_memory(&plan, weights, &self.train.capacities())?;
            let size = self.beside + m.arena.max(self.arena) + m.scratch.max(self.scratch);
            if size < least {
                (best, least) = (Some(*price), size);
            }
        }
        Ok(best)
    }

    /// The first of two prices that fits into the budget.
    fn first(&self, prices: &[Price]) -> Result<Option<usize>> {
        Ok(self.sizes(prices)?.iter().position(|size| *size <= self.budget))
    }

    /// The sizes at these prices, each tried on a thread of its own.
    fn sizes(&self, prices: &[Price]) -> Result<Vec<u64>> {
        std::thread::scope(|s| {
            let running: Vec<_> = prices.iter().map(|p| s.spawn(|| self.size(*p))).collect();
            let all = running.into_iter().map(|r| r.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
            all.collect()
        })
    }

    /// Bytes of a session at this price; where they are above the budget maybe less, but not within it.
    fn size(&self, price: Price) -> Result<u64> {
        let opts = self.options(price);
        let graph = recompute::run(&self.graph, &opts, &mut Report::default())?;
        let kept = graph.entries.iter().map(|e| recompute::kept(&graph, e, &opts)).max().unwrap_or(0);
        let beside = self.beside + self.scratch;
        if beside + kept > self.budget {
            return Ok(beside + kept.max(self.arena));
        }
        let plan = without_code(&graph, self.request, self.meta)?;
        let enough = self.budget.saturating_sub(self.beside);
        let (arena, scratch) = arena_and_scratch(&plan, &self.train.capacities(), enough)?;
        Ok(self.beside + arena.max(self.arena) + scratch.max(self.scratch))
    }
}
