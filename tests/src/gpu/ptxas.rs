//! NVIDIA's assembler, where it is at hand: `PLEACH_PTXAS`, or the one of the Python package in `.venv`.

use pleach_codegen::emit::gpu::GpuChip;
use std::path::PathBuf;
use std::process::Command;

/// The program.
pub fn program() -> Option<PathBuf> {
    if let Some(p) = std::env::var_os("PLEACH_PTXAS") {
        return Some(p.into());
    }
    let list = |p: PathBuf| -> Vec<PathBuf> {
        let mut v: Vec<PathBuf> = std::fs::read_dir(p).into_iter().flatten().flatten().map(|d| d.path()).collect();
        v.sort();
        v
    };
    let root = crate::root().join(".venv/lib");
    let nvidia = list(root).into_iter().flat_map(|p| list(p.join("site-packages/nvidia")));
    nvidia.map(|p| p.join("bin/ptxas")).find(|p| p.exists())
}

/// Assembles a text under a name of its own; gives what `ptxas -v` says, or nothing where there is no such program.
///
/// # Errors
/// What ptxas refuses, and spills of registers.
pub fn assemble(name: &str, chip: GpuChip, ptx: &[u8]) -> Result<Option<String>, String> {
    let Some(program) = program() else { return Ok(None) };
    let text = |e: std::io::Error| format!("{name}: {e}");
    let dir = std::env::temp_dir().join(format!("pleach-gpu-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(text)?;
    std::fs::write(dir.join("k.ptx"), ptx).map_err(text)?;
    let arch = format!("-arch={}", chip.name());
    let run = Command::new(program).args(["-v", &arch, "k.ptx", "-o", "k.cubin"]).current_dir(&dir).output();
    let run = run.map_err(text)?;
    std::fs::remove_dir_all(&dir).map_err(text)?;
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    let spills = |l: &&str| l.contains("bytes spill") && !l.contains(" 0 bytes spill stores, 0 bytes");
    match said.lines().any(|l| spills(&l)) || !run.status.success() {
        true => Err(format!("{name}:\n{said}")),
        false => Ok(Some(said)),
    }
}
