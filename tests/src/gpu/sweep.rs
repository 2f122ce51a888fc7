//! The code of many graphs through the assembler. Graphs of one model have most of their kernels in common: every kernel is lowered and
//! assembled once, however many graphs it is in.

use super::ptxas;
use pleach_codegen::compile::kernel_symbols;
use pleach_codegen::emit::gpu::{self, GpuChip};
use pleach_codegen::mlir;
use pleach_ir::{Kernel, Schedule};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

/// Kernels of one text.
const TOGETHER: usize = 8;

/// What was assembled so far, by chip and code.
#[derive(Debug, Default)]
pub struct Sweep {
    seen: Mutex<BTreeSet<(GpuChip, u64)>>,
}

impl Sweep {
    /// Whether a kernel with this code is new; it is not from now on.
    fn is_new(&self, chip: GpuChip, text: &str) -> bool {
        let mut hash = DefaultHasher::new();
        text.hash(&mut hash);
        self.seen.lock().unwrap_or_else(|e| e.into_inner()).insert((chip, hash.finish()))
    }

    /// Lowers and assembles the kernels of a schedule that are new: what the assembler refuses or warns of, spills and stacks, in words.
    /// Without the assembler kernels are lowered only.
    ///
    /// # Errors
    /// What codegen refuses.
    pub fn faults(&self, s: &Schedule, chip: GpuChip) -> Result<Vec<String>, String> {
        let symbols = kernel_symbols(s);
        let emit = |k: &Kernel| gpu::emit(k, &symbols, chip).map(|e| e.text).map_err(|e| format!("codegen: {e}"));
        let mut new = vec![];
        for k in &s.kernels {
            if self.is_new(chip, &emit(&Kernel { name: "k".into(), ..k.clone() })?) {
                new.push(emit(k)?);
            }
        }
        let modules: Vec<String> = new.chunks(TOGETHER).map(|g| gpu::module(g.iter().map(String::as_str))).collect();
        let mut faults = vec![];
        for ptx in mlir::compile_ptx_parallel(&modules, chip.name(), 1) {
            let ptx = ptx.map_err(|e| format!("codegen: {e}"))?;
            let Some(program) = ptxas::program() else { continue };
            match pleach_codegen::ptxas::assemble(&program, ptx.as_bytes(), chip.name()) {
                Ok(all) => {
                    let bad = all.into_iter().filter(|(_, r)| r.spills > 0 || r.stack > 0);
                    faults.extend(bad.map(|(entry, r)| format!("{entry}: {r:?}")));
                }
                Err(e) => faults.push(e.to_string()),
            }
        }
        Ok(faults)
    }
}
