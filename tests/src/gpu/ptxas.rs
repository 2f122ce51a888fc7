//! NVIDIA's assembler, where it is at hand: the one that [`pleach_codegen::ptxas`] finds, or that of the Python package in `.venv`.

use pleach_codegen::ptxas::{self, Resources};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The program.
pub fn program() -> Option<PathBuf> {
    let list = |p: PathBuf| -> Vec<PathBuf> {
        let mut v: Vec<PathBuf> = std::fs::read_dir(p).into_iter().flatten().flatten().map(|d| d.path()).collect();
        v.sort();
        v
    };
    ptxas::find().or_else(|| {
        let root = crate::root().join(".venv/lib");
        let nvidia = list(root).into_iter().flat_map(|p| list(p.join("site-packages/nvidia")));
        nvidia.map(|p| p.join("bin/ptxas")).find(|p| p.exists())
    })
}

/// Assembles a text; gives what its entries take, or nothing where there is no such program.
///
/// # Errors
/// What the assembler refuses or warns of, and spills of registers.
pub fn assemble(name: &str, chip: &str, ptx: &[u8]) -> Result<Option<BTreeMap<String, Resources>>, String> {
    let Some(program) = program() else { return Ok(None) };
    let all = ptxas::assemble(&program, ptx, chip).map_err(|e| format!("{name}: {e}"))?;
    // Where a kernel moves registers between its warps, the simulator must know how many there are.
    for k in super::read(ptx)?.kernels().iter().filter(|k| k.changes_registers()) {
        let (own, counted) = (k.registers(), all.get(k.name()).map(|r| r.registers));
        if own != counted {
            return Err(format!(
                "{name}: {}: {counted:?} registers by the assembler, {own:?} by the simulator",
                k.name()
            ));
        }
    }
    match all.iter().find(|(_, r)| r.spills > 0) {
        Some((entry, r)) => Err(format!("{name}: {entry} spills: {r:?}")),
        None => Ok(Some(all)),
    }
}
