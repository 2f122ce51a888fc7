//! Parameters of the base that an adapter replaces as a whole: `modules_to_save`, and biases.
//!
//! As PEFT's `_set_trainable` has it, a name in `modules_to_save` means every module whose path ends with it; a container means everything in
//! it. A replaced table is the module's own: a tied output head does not follow a replaced embedding, nor the other way round.

use std::collections::BTreeSet;

use super::config::{Bias, MethodConfig};
use super::targets::Target;
use crate::adapter::{Init, Replaced, SlotValue};
use crate::error::{Error, Result};
use crate::modules::{Module, ModuleTable};
use crate::nearest::nearest_hint;

/// All replaced parameters in module order, as a new adapter has them: they start as the base's own.
///
/// # Errors
/// A name that no module's path ends with, or none with parameters.
pub(super) fn replaced(config: &MethodConfig, modules: &ModuleTable, targets: &[Target]) -> Result<Vec<Replaced>> {
    let roots = roots(config, modules)?;
    let targeted: BTreeSet<&str> = targets.iter().map(|t| t.module.as_str()).collect();
    let mut list = vec![];
    for module in modules.iter() {
        let whole = roots.iter().any(|root| under(&module.path, root));
        for p in module.parameters() {
            let is_bias = p.path.ends_with(".bias");
            let here = targeted.contains(module.path.as_str());
            let trained_bias = is_bias && (config.bias == Bias::All || config.bias == Bias::Targets && here);
            if !(whole || trained_bias) {
                continue;
            }
            let file = if here && !whole { format!("{}.base_layer.bias", module.path) } else { p.path.clone() };
            let value = SlotValue::New(Init::Base { tensor: p.path.clone() });
            list.push(Replaced { path: p.path, shape: p.shape, file, value });
        }
    }
    Ok(list)
}

fn under(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Paths of the modules that `modules_to_save` names.
fn roots<'a>(config: &MethodConfig, modules: &'a ModuleTable) -> Result<Vec<&'a str>> {
    let mut roots = vec![];
    for name in &config.modules_to_save {
        let found: Vec<&Module> = modules.iter().filter(|m| m.path.ends_with(name.as_str())).collect();
        let has_parameters =
            |root: &&Module| modules.iter().any(|m| under(&m.path, &root.path) && !m.parameters().is_empty());
        if name.is_empty() || !found.iter().any(has_parameters) {
            let ends = modules.iter().filter(|m| !m.parameters().is_empty()).map(|m| m.path.as_str());
            let what = format!("in `modules_to_save` names no module with parameters{}", nearest_hint(name, ends));
            return Err(Error::Pattern { pattern: name.clone(), what });
        }
        roots.extend(found.iter().map(|m| m.path.as_str()));
    }
    Ok(roots)
}
