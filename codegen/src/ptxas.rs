//! What NVIDIA's assembler says of PTX: registers, shared memory, spills.
//!
//! `ptxas` is never needed to compile or to run: drivers assemble PTX themselves. Where it is at hand (`PLEACH_PTXAS`, else in
//! `PATH`), it tells what a text will take.

use crate::error::CodegenError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// What an entry takes of a multiprocessor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack.
    pub stack: u32,
    /// Bytes stored and loaded for want of registers.
    pub spills: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
}

/// The assembler named by `PLEACH_PTXAS`, else the first one in `PATH`.
pub fn find() -> Option<PathBuf> {
    if let Some(p) = std::env::var_os("PLEACH_PTXAS").filter(|p| !p.is_empty()) {
        return Some(p.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join("ptxas")).find(|p| p.is_file())
}

/// Assembles a text for a chip; the resources of its entries by name. What the assembler warns of is an error too: a product
/// that it serialises works, but at a fraction of the speed.
///
/// # Errors
/// [`CodegenError::Lowering`] with what the assembler says.
pub fn assemble(ptxas: &Path, ptx: &[u8], chip: &str) -> Result<BTreeMap<String, Resources>, CodegenError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("pleach-ptxas-{}-{n}", std::process::id()));
    let fail = |why: String| CodegenError::Lowering { stage: "ptxas", why };
    let io = |e: std::io::Error| fail(format!("{}: {e}", ptxas.display()));
    std::fs::create_dir_all(&dir).map_err(io)?;
    let run = || -> std::io::Result<_> {
        std::fs::write(dir.join("k.ptx"), ptx)?;
        let arch = format!("-arch={chip}");
        Command::new(ptxas).args(["-v", &arch, "k.ptx", "-o", "k.cubin"]).current_dir(&dir).output()
    };
    let out = run();
    let _ = std::fs::remove_dir_all(&dir);
    let out = out.map_err(io)?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    if !out.status.success() || said.contains("warning") || said.contains("(C75") {
        return Err(fail(said));
    }
    Ok(read(&said))
}

/// Reads what `ptxas -v` prints.
fn read(said: &str) -> BTreeMap<String, Resources> {
    let mut all: BTreeMap<String, Resources> = BTreeMap::new();
    let mut name = String::new();
    for line in said.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            name = rest.split('\'').next().unwrap_or_default().to_string();
            all.entry(name.clone()).or_default();
        }
        let Some(r) = all.get_mut(&name) else { continue };
        // Numbers stand before what they count: `40 bytes stack frame, 0 bytes spill stores`, `Used 40 registers`.
        for part in line.split([',', ':']) {
            let mut words = part.split_whitespace().filter(|w| *w != "Used");
            let Some(n) = words.next().and_then(|w| w.parse::<u32>().ok()) else { continue };
            match words.collect::<Vec<_>>().join(" ").as_str() {
                "bytes stack frame" => r.stack = n,
                "bytes spill stores" | "bytes spill loads" => r.spills += n,
                "registers" => r.registers = n,
                "bytes smem" => r.shared = n,
                _ => {}
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_assembler_prints() {
        let said = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : \
                    Function properties for k\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nptxas \
                    info    : Used 168 registers, used 2 barriers, 16 bytes smem\n";
        let want = Resources { registers: 168, stack: 8, spills: 16, shared: 16 };
        assert_eq!(read(said), BTreeMap::from([("k".to_string(), want)]));
    }
}
