//! The part of LLVM's C interface that emits objects, and the reading of compiled GPU modules.
//!
//! LLVM is linked through mlir-sys, whose bindings cover MLIR's headers and what those include; the functions of
//! `llvm-c/TargetMachine.h` are declared here.
#![allow(unsafe_code, reason = "calls into LLVM and MLIR")]

use super::HostTarget;
use crate::error::CodegenError;
use melior::ir::Module;
use mlir_sys::{
    LLVMContextCreate, LLVMContextDispose, LLVMContextRef, LLVMDisposeMemoryBuffer, LLVMDisposeMessage,
    LLVMDisposeModule, LLVMGetBufferSize, LLVMGetBufferStart, LLVMMemoryBufferRef, LLVMModuleRef,
    LLVMPrintModuleToString, LLVMSetTarget, mlirArrayAttrGetElement, mlirArrayAttrGetNumElements,
    mlirAttributeIsAArray, mlirAttributeIsAGPUObjectAttr, mlirBlockGetFirstOperation, mlirGPUObjectAttrGetObject,
    mlirModuleGetBody, mlirOperationGetAttributeByName, mlirOperationGetNextInBlock, mlirStringRefCreateFromCString,
    mlirTranslateModuleToLLVMIR,
};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Once;

pub(super) const ASSEMBLY_FILE: c_int = 0;
pub(super) const OBJECT_FILE: c_int = 1;
const CODEGEN_AGGRESSIVE: c_int = 3;
const RELOC_PIC: c_int = 2;
const CODE_MODEL_DEFAULT: c_int = 0;
const TRIPLE: &CStr = c"x86_64-unknown-linux-gnu";

#[allow(non_snake_case, reason = "LLVM's names")]
unsafe extern "C" {
    fn LLVMInitializeX86TargetInfo();
    fn LLVMInitializeX86Target();
    fn LLVMInitializeX86TargetMC();
    fn LLVMInitializeX86AsmPrinter();
    fn LLVMGetTargetFromTriple(triple: *const c_char, target: *mut *mut c_void, error: *mut *mut c_char) -> c_int;
    fn LLVMCreateTargetMachine(
        target: *mut c_void,
        triple: *const c_char,
        cpu: *const c_char,
        features: *const c_char,
        level: c_int,
        reloc: c_int,
        model: c_int,
    ) -> *mut c_void;
    fn LLVMDisposeTargetMachine(machine: *mut c_void);
    fn LLVMCreateTargetDataLayout(machine: *mut c_void) -> *mut c_void;
    fn LLVMSetModuleDataLayout(module: LLVMModuleRef, layout: *mut c_void);
    fn LLVMDisposeTargetData(layout: *mut c_void);
    fn LLVMTargetMachineEmitToMemoryBuffer(
        machine: *mut c_void,
        module: LLVMModuleRef,
        kind: c_int,
        error: *mut *mut c_char,
        out: *mut LLVMMemoryBufferRef,
    ) -> c_int;
}

fn failed(stage: &'static str, message: *mut c_char) -> CodegenError {
    let why = if message.is_null() {
        "LLVM gave no reason".to_string()
    } else {
        // SAFETY: LLVM's messages are NUL-terminated strings that the caller owns and disposes of once.
        unsafe {
            let s = CStr::from_ptr(message).to_string_lossy().into_owned();
            LLVMDisposeMessage(message);
            s
        }
    };
    CodegenError::Lowering { stage, why }
}

/// An LLVM module with the context it lives in.
pub(super) struct LlvmModule {
    module: LLVMModuleRef,
    context: LLVMContextRef,
}

impl LlvmModule {
    /// Translates a module that holds only what has an LLVM form.
    pub(super) fn translate(module: &Module<'_>) -> Option<LlvmModule> {
        // SAFETY: the operation outlives the call; the context is disposed of after the module, in `drop`.
        unsafe {
            let context = LLVMContextCreate();
            let module = mlirTranslateModuleToLLVMIR(module.as_operation().to_raw(), context);
            if module.is_null() {
                LLVMContextDispose(context);
                return None;
            }
            Some(LlvmModule { module, context })
        }
    }

    /// Sets triple and data layout.
    pub(super) fn prepare(&self, machine: &Machine) {
        // SAFETY: both handles are live; the layout is copied into the module before it is disposed of.
        unsafe {
            LLVMSetTarget(self.module, TRIPLE.as_ptr());
            let layout = LLVMCreateTargetDataLayout(machine.0);
            LLVMSetModuleDataLayout(self.module, layout);
            LLVMDisposeTargetData(layout);
        }
    }

    /// LLVM IR as text.
    pub(super) fn text(&self) -> String {
        // SAFETY: the module is live; the returned string is owned by us and disposed of once.
        unsafe {
            let s = LLVMPrintModuleToString(self.module);
            let text = CStr::from_ptr(s).to_string_lossy().into_owned();
            LLVMDisposeMessage(s);
            text
        }
    }
}

impl Drop for LlvmModule {
    fn drop(&mut self) {
        // SAFETY: both were created by `translate` and are disposed of here only, the module first.
        unsafe {
            LLVMDisposeModule(self.module);
            LLVMContextDispose(self.context);
        }
    }
}

/// A target machine.
pub(super) struct Machine(*mut c_void);

impl Machine {
    /// The machine for host code.
    pub(super) fn host(target: &HostTarget) -> Result<Machine, CodegenError> {
        static READY: Once = Once::new();
        // SAFETY: LLVM's registry is filled once, before any look-up.
        READY.call_once(|| unsafe {
            LLVMInitializeX86TargetInfo();
            LLVMInitializeX86Target();
            LLVMInitializeX86TargetMC();
            LLVMInitializeX86AsmPrinter();
        });
        let text = |s: &str| {
            CString::new(s).map_err(|_| CodegenError::Lowering {
                stage: "target",
                why: "a target's name holds a NUL character".into(),
            })
        };
        let (cpu, features) = (text(&target.cpu)?, text(&target.features)?);
        let (mut t, mut message) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: strings are NUL-terminated and live through the calls; out-pointers are valid.
        let machine = unsafe {
            if LLVMGetTargetFromTriple(TRIPLE.as_ptr(), &mut t, &mut message) != 0 {
                return Err(failed("target", message));
            }
            LLVMCreateTargetMachine(
                t,
                TRIPLE.as_ptr(),
                cpu.as_ptr(),
                features.as_ptr(),
                CODEGEN_AGGRESSIVE,
                RELOC_PIC,
                CODE_MODEL_DEFAULT,
            )
        };
        if machine.is_null() { Err(failed("target", std::ptr::null_mut())) } else { Ok(Machine(machine)) }
    }

    /// Runs the code generator; the module is used up (its functions are lowered in place).
    pub(super) fn emit(&self, ir: &LlvmModule, kind: c_int) -> Result<Vec<u8>, CodegenError> {
        let (mut message, mut buffer) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: machine and module are live; on success the buffer is owned by us, copied and disposed of once.
        unsafe {
            if LLVMTargetMachineEmitToMemoryBuffer(self.0, ir.module, kind, &mut message, &mut buffer) != 0 {
                return Err(failed("emission", message));
            }
            let (start, size) = (LLVMGetBufferStart(buffer).cast::<u8>(), LLVMGetBufferSize(buffer));
            let bytes = std::slice::from_raw_parts(start, size).to_vec();
            LLVMDisposeMemoryBuffer(buffer);
            Ok(bytes)
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: created by `host`, disposed of here only.
        unsafe { LLVMDisposeTargetMachine(self.0) }
    }
}

/// The code of the first `gpu.binary` in a module, without the trailing NUL.
pub(super) fn gpu_object(module: &Module<'_>) -> Option<String> {
    // SAFETY: handles are used while the module lives; null handles are tested before use; the string's bytes belong to
    // an attribute of the module's context.
    unsafe {
        let mut op = mlirBlockGetFirstOperation(mlirModuleGetBody(module.to_raw()));
        let name = mlirStringRefCreateFromCString(c"objects".as_ptr());
        while !op.ptr.is_null() {
            let list = mlirOperationGetAttributeByName(op, name);
            if !list.ptr.is_null() && mlirAttributeIsAArray(list) && mlirArrayAttrGetNumElements(list) > 0 {
                let object = mlirArrayAttrGetElement(list, 0);
                if mlirAttributeIsAGPUObjectAttr(object) {
                    let s = mlirGPUObjectAttrGetObject(object);
                    let bytes = std::slice::from_raw_parts(s.data.cast::<u8>(), s.length);
                    return Some(String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string());
                }
            }
            op = mlirOperationGetNextInBlock(op);
        }
    }
    None
}
