//! Values that a plan derives from trained ones: a step renews them, a preparation makes them.

use pleach_plan::{Param, Role, Source};
use pleach_runtime::Session;
use std::collections::BTreeMap;

/// What a step makes of the trained values must be what a preparation makes of them, bit by bit: a run that goes on from a checkpoint
/// prepares where the other one has stepped.
///
/// # Errors
/// The derived values that differ, by name.
pub fn as_prepared(session: &mut Session) -> Result<(), String> {
    let plan = session.plan().clone();
    let of = |keep: &dyn Fn(&&Param) -> bool| -> Vec<String> {
        plan.params.iter().filter(keep).map(|p| p.name.clone()).collect()
    };
    let derived = of(&|p| p.source == Source::Derived);
    // Some live only while preparations run.
    let read = |s: &Session| -> BTreeMap<String, Vec<u8>> {
        derived.iter().filter_map(|n| Some((n.clone(), s.read_param(n).ok()?.bytes.to_vec()))).collect()
    };
    let stepped = read(session);
    for name in of(&|p| p.role == Role::Train) {
        let v = session.read_param(&name).map_err(|e| e.to_string())?;
        let (dtype, bytes) = (v.dtype, v.bytes.to_vec());
        session.write_param(&name, dtype, &bytes).map_err(|e| e.to_string())?;
    }
    session.prepare_all().map_err(|e| e.to_string())?;
    let prepared = read(session);
    let other: Vec<&str> = stepped.iter().filter(|(n, x)| prepared[*n] != **x).map(|(n, _)| n.as_str()).collect();
    match other.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "{} of {} derived values differ when prepared: {}",
            other.len(),
            stepped.len(),
            other.join(", ")
        )),
    }
}
