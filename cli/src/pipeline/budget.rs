//! Passes of a plan that trains, within a memory budget.
//!
//! Keeping everything that is dear to build again is tried first. If the session would be too large, rising prices of a
//! kept byte are tried until it fits, and the price is bisected; between the two prices that are left, the first part of
//! the forward half takes the higher one. Every trial is cut into kernels, ordered and placed, so the size compared is
//! the size a session will have.

use super::{Request, TrainPart, cut_of};
use crate::failure::Result;
use pleach_codegen::compile::{self, CompileOptions};
use pleach_ir::Graph;
use pleach_passes::recompute::Price;
use pleach_passes::{Options, PassReport, Pipeline, fuse_kernels};
use pleach_plan::Meta;
use pleach_runtime::{TensorSource, plan_memory};

/// What is tried in turn until it fits: a price in multiples of what keeping a byte costs in time, and at how many narrow places
/// the forward half stops (every second one is about a layer). At the last ones whatever can be built again is.
const LADDER: [(f64, usize); 8] = [(2.0, 2), (4.0, 2), (8.0, 2), (16.0, 2), (32.0, 2), (64.0, 2), (1e5, 4), (1e5, 8)];

/// Trials of the price.
const PRICES: usize = 1;
/// Trials of the share of the forward half: the last one is about a layer.
const SHARES: usize = 5;

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
    let total = |graph: &Graph| -> Result<u64> {
        let mut s = fuse_kernels::cut(graph, &cut_of(request, graph)?)?;
        pleach_passes::chunk::run(&mut s, &request.options())?;
        fuse_kernels::order(&mut s)?;
        let plan = match request.gpu() {
            Some(chip) => compile::without_code_gpu(&s, chip, meta.clone())?,
            None => {
                let options = CompileOptions { target: request.host()?, threads: 1, meta: meta.clone() };
                compile::without_code(&s, &options)?
            }
        };
        Ok(plan_memory(&plan, weights, &train.capacities())?.total())
    };
    let floor = Price::floor(opts.target.bytes_per_s).byte_us;
    let mut best = finish(None)?;
    if let Some(budget) = train.budget.filter(|_| !disable.iter().any(|d| d == "recompute")) {
        let mut least = total(&best.0)?;
        let (mut low, mut high) = (floor, None);
        for (times, every) in if least > budget { LADDER.to_vec() } else { vec![] } {
            let price = Price { every, ..Price::flat(times * floor) };
            let next = finish(Some(price))?;
            let size = total(&next.0)?;
            if size < least {
                (least, best) = (size, next);
            }
            if size <= budget {
                high = Some(price);
                break;
            }
            low = price.byte_us;
        }
        if let Some(mut high) = high {
            for _ in 0..PRICES {
                let price = Price { every: high.every, ..Price::flat((low * high.byte_us).sqrt()) };
                let next = finish(Some(price))?;
                if total(&next.0)? <= budget {
                    (high, best) = (price, next);
                } else {
                    low = price.byte_us;
                }
            }
            let (mut none, mut all) = (0.0, 1.0);
            for _ in 0..SHARES {
                let early = (none + all) / 2.0;
                let next = finish(Some(Price { byte_us: low, early, ..high }))?;
                if total(&next.0)? <= budget {
                    (all, best) = (early, next);
                } else {
                    none = early;
                }
            }
        }
    }
    let mut reports = before.reports;
    reports.extend(best.1);
    Ok((best.0, reports, best.2))
}
