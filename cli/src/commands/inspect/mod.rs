//! `pleach inspect`: any stage of a model folder, or what a plan holds; as text for people or JSON for scripts.

#[cfg(feature = "compiler")]
mod estimate;
#[cfg(feature = "compiler")]
mod model;
#[cfg(feature = "compiler")]
mod model_explorer;
#[cfg(feature = "compiler")]
mod page;
mod plan;

use crate::args::InspectArgs;
use crate::failure::{Failure, Result};
use crate::report::Ui;

/// Shows.
///
/// # Errors
/// Files that are refused, a stage that does not exist, and whatever the passes refuse.
pub(crate) fn inspect(ui: &Ui, args: &InspectArgs) -> Result<()> {
    if crate::ready::looks_like_a_plan(&args.model.model) {
        if args.ir || args.mlir || args.rules || args.dot || args.wants_explorer() {
            let why =
                "a plan holds no graph: give the model folder to see --ir, --mlir, --rules, --dot or --model-explorer";
            return Err(Failure::usage(why));
        }
        return plan::inspect(ui, args);
    }
    if args.wants_estimate() {
        return Err(Failure::usage(
            "--estimate is for a compiled plan: `pleach compile MODEL … --target sm_90a -o F.pleach` first",
        ));
    }
    #[cfg(feature = "compiler")]
    return model::inspect(ui, args);
    #[cfg(not(feature = "compiler"))]
    {
        Err(Failure::usage("this build has no compiler and inspects plans only (F.pleach)"))
    }
}
