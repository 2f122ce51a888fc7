//! MLIR text to machine code. The only place that names melior, mlir-sys or LLVM.
//!
//! A text of `func.func`s (func, scf, arith, math, vector, llvm dialects) is parsed, lowered by one fixed pipeline,
//! translated to LLVM IR and emitted for an explicit processor. No mid-level optimisation runs: kernels are written as
//! vectors already, and the code generator's own passes do the rest. Floating-point contraction is off: a product and a
//! sum are fused only where the text says `fma`, so results do not depend on the target's taste.
//!
//! Every thread has a context of its own; nothing is shared between threads but LLVM's target registry.

mod lines;
mod llvm;
mod target;

use crate::error::CodegenError;
pub use lines::{assembly_with_lines, ptx_with_lines};
use llvm::{LlvmModule, Machine};
use melior::Context;
use melior::dialect::DialectRegistry;
use melior::ir::Module;
use melior::pass::PassManager;
use melior::utility::{
    parse_pass_pipeline, register_all_dialects, register_all_llvm_translations, register_all_passes,
};
use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
pub use target::HostTarget;

/// Lowering of host kernels.
const HOST_PIPELINE: &str = "builtin.module(canonicalize,cse,convert-scf-to-cf,\
convert-vector-to-llvm{vector-transpose-lowering=shuffle16x16},convert-math-to-llvm,convert-func-to-llvm,\
convert-arith-to-llvm,convert-cf-to-llvm,reconcile-unrealized-casts)";

/// How long the stages of [`compile_object_timed`] took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stages {
    /// Text to MLIR.
    pub parse: Duration,
    /// The pipeline.
    pub passes: Duration,
    /// MLIR to LLVM IR.
    pub translate: Duration,
    /// LLVM IR to the object.
    pub emit: Duration,
}

/// A context with the collected diagnostics of what runs in it.
struct Worker {
    context: Context,
    faults: Rc<RefCell<Vec<String>>>,
}

thread_local! {
    static WORKER: OnceCell<Worker> = const { OnceCell::new() };
}

impl Worker {
    fn new() -> Worker {
        register_all_passes();
        let registry = DialectRegistry::new();
        register_all_dialects(&registry);
        let context = Context::new_with_threading(false);
        context.append_dialect_registry(&registry);
        register_all_llvm_translations(&context);
        let faults = Rc::new(RefCell::new(vec![]));
        let sink = Rc::clone(&faults);
        context.attach_diagnostic_handler(move |d| {
            sink.borrow_mut().push(format!("{}: {d}", d.location()));
            true
        });
        Worker { context, faults }
    }

    fn error(&self, stage: &'static str, what: &str) -> CodegenError {
        let said = std::mem::take(&mut *self.faults.borrow_mut()).join("\n");
        CodegenError::Lowering { stage, why: if said.is_empty() { what.to_string() } else { said } }
    }

    fn parse(&self, text: &str) -> Result<Module<'_>, CodegenError> {
        self.faults.borrow_mut().clear();
        if text.contains('\0') {
            return Err(self.error("parse", "the text holds a NUL character"));
        }
        Module::parse(&self.context, text).ok_or_else(|| self.error("parse", "the text is not a module"))
    }

    fn run(&self, module: &mut Module<'_>, pipeline: &str) -> Result<(), CodegenError> {
        let manager = PassManager::new(&self.context);
        parse_pass_pipeline(manager.as_operation_pass_manager(), pipeline)
            .map_err(|e| self.error("lowering", &e.to_string()))?;
        manager.run(module).map_err(|e| self.error("lowering", &e.to_string()))
    }

    fn lower(&self, text: &str, target: &HostTarget, t: &mut Stages) -> Result<(LlvmModule, Machine), CodegenError> {
        self.lower_by(text, target, HOST_PIPELINE, t)
    }

    fn lower_by(
        &self,
        text: &str,
        target: &HostTarget,
        pipeline: &str,
        t: &mut Stages,
    ) -> Result<(LlvmModule, Machine), CodegenError> {
        let clock = Instant::now();
        let mut module = self.parse(text)?;
        t.parse = clock.elapsed();
        let clock = Instant::now();
        self.run(&mut module, pipeline)?;
        t.passes = clock.elapsed();
        let clock = Instant::now();
        let machine = Machine::host(target)?;
        let ir = LlvmModule::translate(&module)
            .ok_or_else(|| self.error("translation", "the module holds operators without an LLVM form"))?;
        ir.prepare(&machine);
        t.translate = clock.elapsed();
        Ok((ir, machine))
    }
}

fn with_worker<T>(f: impl FnOnce(&Worker) -> T) -> T {
    WORKER.with(|w| f(w.get_or_init(Worker::new)))
}

/// Compiles a module of host kernels to a relocatable object (ELF, position independent).
///
/// # Errors
/// [`CodegenError::Lowering`] with the diagnostics and the positions in the text.
pub fn compile_object(module_text: &str, target: &HostTarget) -> Result<Vec<u8>, CodegenError> {
    compile_object_timed(module_text, target).map(|x| x.0)
}

/// As [`compile_object`], with the time each stage took.
///
/// # Errors
/// As [`compile_object`].
pub fn compile_object_timed(module_text: &str, target: &HostTarget) -> Result<(Vec<u8>, Stages), CodegenError> {
    with_worker(|w| {
        let mut t = Stages::default();
        let (ir, machine) = w.lower(module_text, target, &mut t)?;
        let clock = Instant::now();
        let bytes = machine.emit(&ir, llvm::OBJECT_FILE)?;
        t.emit = clock.elapsed();
        Ok((bytes, t))
    })
}

/// Compiles many modules on up to `threads` threads, each with its own context. Results are in the order of `texts`
/// and do not depend on `threads`. The name of a text is put before its error.
pub fn compile_parallel(
    texts: &[(String, String)],
    target: &HostTarget,
    threads: usize,
) -> Vec<Result<Vec<u8>, CodegenError>> {
    in_parallel(
        texts.len(),
        |i| texts[i].1.len(),
        threads,
        |i| {
            let (name, text) = &texts[i];
            compile_object(text, target).map_err(|e| match e {
                CodegenError::Lowering { stage, why } => {
                    CodegenError::Lowering { stage, why: format!("kernel {name}: {why}") }
                }
                other => other,
            })
        },
    )
}

/// [`compile_ptx`] of many modules on up to `threads` threads, in the order of `texts`.
pub fn compile_ptx_parallel(texts: &[String], chip: &str, threads: usize) -> Vec<Result<String, CodegenError>> {
    in_parallel(texts.len(), |i| texts[i].len(), threads, |i| compile_ptx(&texts[i], chip))
}

/// `work` of `0..n` on up to `threads` threads, largest `size` first, so that no thread is left alone with a long one at
/// the end.
fn in_parallel<T: Send>(
    n: usize,
    size: impl Fn(usize) -> usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, CodegenError> + Sync,
) -> Vec<Result<T, CodegenError>> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(size(*i)), *i));
    let done: Vec<Mutex<Option<Result<T, CodegenError>>>> = (0..n).map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let r = work(i);
            if let Ok(mut slot) = done[i].lock() {
                *slot = Some(r);
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads.min(n) {
            s.spawn(run);
        }
        run();
    });
    let lost = || CodegenError::Lowering { stage: "emission", why: "a compiling thread stopped".into() };
    done.into_iter().map(|m| m.into_inner().ok().flatten().unwrap_or_else(|| Err(lost()))).collect()
}

/// The MLIR of the llvm dialect that a module of host kernels is lowered to.
///
/// # Errors
/// As [`compile_object`].
pub fn lowered_mlir(module_text: &str) -> Result<String, CodegenError> {
    with_worker(|w| {
        let mut module = w.parse(module_text)?;
        w.run(&mut module, HOST_PIPELINE)?;
        Ok(module.as_operation().to_string())
    })
}

/// The LLVM IR that a module of host kernels becomes.
///
/// # Errors
/// As [`compile_object`].
pub fn lowered_llvm(module_text: &str, target: &HostTarget) -> Result<String, CodegenError> {
    with_worker(|w| w.lower(module_text, target, &mut Stages::default()).map(|(ir, _)| ir.text()))
}

/// The assembly that a module of host kernels becomes.
///
/// # Errors
/// As [`compile_object`].
pub fn assembly(module_text: &str, target: &HostTarget) -> Result<String, CodegenError> {
    with_worker(|w| {
        let (ir, machine) = w.lower(module_text, target, &mut Stages::default())?;
        let bytes = machine.emit(&ir, llvm::ASSEMBLY_FILE)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    })
}

/// Compiles a module with one `gpu.module` of `llvm.func`s marked `nvvm.kernel` (bodies in arith, math, scf, vector,
/// llvm, nvvm) to PTX text for a chip such as `sm_80` or `sm_90a`.
///
/// # Errors
/// [`CodegenError::Lowering`]. An operator that the chip lacks may abort the process instead: callers check first.
pub fn compile_ptx(module_text: &str, chip: &str) -> Result<String, CodegenError> {
    ptx_by(module_text, &gpu_pipeline(chip)?)
}

/// Lowering of kernels for a chip, to PTX.
fn gpu_pipeline(chip: &str) -> Result<String, CodegenError> {
    let number: u32 = chip.strip_prefix("sm_").map_or("", |s| s.trim_end_matches('a')).parse().unwrap_or(0);
    if number < 70 {
        let why = format!("{chip} is no supported chip; use sm_70 or later, such as sm_80");
        return Err(CodegenError::Lowering { stage: "target", why });
    }
    let isa = if number >= 90 { "+ptx83" } else { "+ptx78" };
    Ok(format!(
        "builtin.module(convert-scf-to-cf,convert-cf-to-llvm,gpu.module(convert-vector-to-llvm,convert-math-to-llvm,\
         convert-arith-to-llvm,convert-nvvm-to-llvm,canonicalize,cse,reconcile-unrealized-casts),\
         nvvm-attach-target{{chip={chip} features={isa} O=3}},gpu-module-to-binary{{format=isa}})"
    ))
}

fn ptx_by(module_text: &str, pipeline: &str) -> Result<String, CodegenError> {
    with_worker(|w| {
        let mut module = w.parse(module_text)?;
        w.run(&mut module, pipeline)?;
        llvm::gpu_object(&module).ok_or_else(|| w.error("emission", "the module has no gpu.module"))
    })
}
