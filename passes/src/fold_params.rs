//! Skeleton.
use crate::{Options, PassError, Report};
/// The pass.
pub fn run(g: &pleach_ir::Graph, _: &Options, _: &mut Report) -> Result<pleach_ir::Graph, PassError> {
    Ok(g.clone())
}
