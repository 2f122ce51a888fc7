//! cuBLASLt: products that a plan offers to a library, where the machine has it.
//!
//! The library is looked for when a plan first has products for it, and never needed: what it cannot do, a kernel's own launches do.
//! The loader of the bindings panics where a library or one of its functions is missing and knows few of its names, so only their
//! types are used, and functions are looked for here. `PLEACH_CUBLASLT_LIBRARY` names a library that is not where the system looks, such
//! as the one that comes with PyTorch.
//!
//! Matrices are row-major here and column-major there: the transposed result is computed, with the operands exchanged. Sums are in one
//! order for the same counts: algorithms whose blocks add to the result in turn are left out.

use super::args::Given;
use super::driver::check;
use crate::error::{Result, RuntimeError};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys::{self, CUgraph, CUgraphNode, CUstream, CUstreamCaptureMode};
use libloading::Library;
use pleach_plan::{DType, Kernel, Product};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::OnceLock;

/// The variable that names the library.
pub const CUBLASLT: &str = "PLEACH_CUBLASLT_LIBRARY";

/// Names under which systems have it.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// Memory for its own use, bytes: what it recommends for the largest chips.
pub(crate) const WORKSPACE: usize = 32 << 20;
/// Bytes that every address and stride is a multiple of.
const ALIGNED: u32 = 16;

type Handle = *mut c_void;
/// A status as a number: a newer library may have more of them than the bindings know.
type Status = u32;

/// Declares the functions that are called, and how they are found.
macro_rules! functions {
    ($($field:ident = $name:literal ($($arg:ty),*);)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($arg),*) -> Status),* }

        impl Functions {
            fn find(lib: &Library) -> std::result::Result<Functions, String> {
                let missing = |name: &str| format!("it lacks {name}; install the one of CUDA 12 or later");
                $(
                    // SAFETY: the library's function of that name has these arguments.
                    let found = unsafe { lib.get::<unsafe extern "C" fn($($arg),*) -> Status>($name.as_bytes()) };
                    let $field = *found.map_err(|_| missing($name))?;
                )*
                Ok(Functions { $($field),* })
            }
        }
    };
}

functions! {
    create = "cublasLtCreate" (*mut Handle);
    destroy = "cublasLtDestroy" (Handle);
    desc_create = "cublasLtMatmulDescCreate" (*mut Handle, u32, u32);
    desc_set = "cublasLtMatmulDescSetAttribute" (Handle, u32, *const c_void, usize);
    desc_destroy = "cublasLtMatmulDescDestroy" (Handle);
    layout_create = "cublasLtMatrixLayoutCreate" (*mut Handle, u32, u64, u64, i64);
    layout_destroy = "cublasLtMatrixLayoutDestroy" (Handle);
    preference_create = "cublasLtMatmulPreferenceCreate" (*mut Handle);
    preference_set = "cublasLtMatmulPreferenceSetAttribute" (Handle, u32, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy" (Handle);
    heuristic = "cublasLtMatmulAlgoGetHeuristic" (
        Handle, Handle, Handle, Handle, Handle, Handle, Handle, i32, *mut lt::cublasLtMatmulHeuristicResult_t, *mut i32
    );
    matmul = "cublasLtMatmul" (
        Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void, Handle,
        *mut c_void, Handle, *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, CUstream
    );
}

/// The functions of the library, found once and kept for good.
fn functions() -> std::result::Result<&'static Functions, String> {
    static DONE: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
    DONE.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> std::result::Result<Functions, String> {
    let named = std::env::var_os(CUBLASLT).filter(|v| !v.is_empty());
    let lib = match &named {
        Some(path) => {
            // SAFETY: whoever sets the variable trusts the library.
            unsafe { Library::new(path) }.map_err(|e| {
                let why = std::error::Error::source(&e).map_or(String::new(), |s| format!(": {s}"));
                format!("{CUBLASLT} names {}, which cannot be loaded: {e}{why}", path.display())
            })?
        }
        None => {
            // SAFETY: looks for the library by name; it may be loaded at any time.
            let found = NAMES.iter().find_map(|n| unsafe { Library::new(*n) }.ok());
            found.ok_or_else(|| format!("{} is not found; install it, or name it in {CUBLASLT}", NAMES[2]))?
        }
    };
    // Never unloaded: the driver keeps what it gave to it.
    Functions::find(Box::leak(Box::new(lib)))
}

/// Whether the library is there.
///
/// # Errors
/// Why not, as a text.
pub fn find_cublaslt() -> std::result::Result<(), String> {
    functions().map(|_| ())
}

/// Turns an answer into an error that says what was tried.
fn told(status: Status, what: &str) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(RuntimeError::Device(format!("cuBLASLt failed: {what}: status {status}"))) }
}

/// A description of the library's; given back when dropped.
struct Owned {
    at: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made once by the library, not used after its owner.
        let _ = unsafe { (self.destroy)(self.at) };
    }
}

/// A product at a number of rows: what it is, and how the library computes it.
struct Prepared {
    desc: Owned,
    /// Left and right operand as the library sees them, and the result.
    layouts: [Owned; 3],
    algorithm: lt::cublasLtMatmulAlgo_t,
    workspace: usize,
}

/// The library with the products of one session.
pub(crate) struct Products {
    // Descriptions before the handle.
    prepared: BTreeMap<(u32, usize, u64), Option<Prepared>>,
    handle: Owned,
    f: &'static Functions,
    workspace: u64,
    /// Two f32 on the device: 0 and 1.
    factors: u64,
}

impl std::fmt::Debug for Products {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Products({} prepared)", self.prepared.len())
    }
}

impl Products {
    /// Opens the library. `workspace` is memory of [`WORKSPACE`] bytes on the device, `factors` the numbers 0 and 1 there.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub(crate) fn open(workspace: u64, factors: u64) -> std::result::Result<Products, String> {
        let f = functions()?;
        let mut at = std::ptr::null_mut();
        // SAFETY: the pointer is of a handle that lives through the call.
        match unsafe { (f.create)(&mut at) } {
            0 => {}
            e => return Err(format!("cuBLASLt does not start: status {e}")),
        }
        let handle = Owned { at, destroy: f.destroy };
        Ok(Products { prepared: BTreeMap::new(), handle, f, workspace, factors })
    }

    /// Whether the library takes a kernel at these counts: all its products, or it is not asked.
    ///
    /// # Errors
    /// A size without a value.
    pub(crate) fn takes(&mut self, number: u32, k: &Kernel, env: &[u64]) -> Result<bool> {
        let Some(library) = &k.library else { return Ok(false) };
        for (i, p) in library.products.iter().enumerate() {
            if !p.runs(env)? {
                continue;
            }
            let rows = p.rows.eval(env)?;
            if let std::collections::btree_map::Entry::Vacant(e) = self.prepared.entry((number, i, rows)) {
                e.insert(prepare(self.f, &self.handle, p, rows)?);
            }
            if self.prepared.get(&(number, i, rows)).is_none_or(Option::is_none) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Enqueues a product of a kernel that [`Products::takes`] was asked about at these counts.
    ///
    /// # Safety
    /// The buffers must be what the kernel expects at these counts.
    pub(crate) unsafe fn multiply(
        &self,
        number: u32,
        index: usize,
        p: &Product,
        g: &Given<'_>,
        stream: CUstream,
    ) -> Result<()> {
        let rows = p.rows.eval(g.env)?;
        let lost = || RuntimeError::Device("a product that cuBLASLt took is not there".into());
        let how = self.prepared.get(&(number, index, rows)).and_then(Option::as_ref).ok_or_else(lost)?;
        let at = |buffer: u32, offset: u64| (g.buffers[buffer as usize] as u64 + offset) as *mut c_void;
        let to = match p.to.buffer {
            Some(b) => at(b, p.to.offset),
            None => (g.scratch + p.to.offset) as *mut c_void,
        };
        let factor = |one: bool| (self.factors + if one { 4 } else { 0 }) as *const c_void;
        let alpha = p.scale.map_or(factor(true), |b| at(b, 0).cast_const());
        let (left, right) = (at(p.left.buffer, p.left.offset), at(p.right.buffer, p.right.offset));
        let [l, r, result] = &how.layouts;
        // SAFETY: descriptions are the library's own; addresses, by the plan's validation and the caller's promise, are of buffers that
        // hold what the descriptions say; the workspace has the size that was told.
        let status = unsafe {
            (self.f.matmul)(
                self.handle.at,
                how.desc.at,
                alpha,
                right,
                r.at,
                left,
                l.at,
                factor(p.adds),
                to,
                result.at,
                to,
                result.at,
                &how.algorithm,
                self.workspace as *mut c_void,
                how.workspace,
                stream,
            )
        };
        told(status, &format!("a product of {rows} rows, {} columns, {} terms", p.columns, p.depth))
    }
}

fn number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => lt::cudaDataType::CUDA_R_32F as u32,
        _ => lt::cudaDataType::CUDA_R_16BF as u32,
    }
}

/// Describes a product and asks for its best algorithm; `None` where the library has none.
fn prepare(f: &'static Functions, handle: &Owned, p: &Product, rows: u64) -> Result<Option<Prepared>> {
    use lt::cublasLtMatmulDescAttributes_t as D;
    use lt::cublasLtMatmulPreferenceAttributes_t as P;
    let make = |status: Status, at: Handle, destroy, what: &str| told(status, what).map(|()| Owned { at, destroy });
    let mut at = std::ptr::null_mut();
    let (compute, scale) = (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F as u32, number(DType::F32));
    // SAFETY: the pointer is of a handle that lives through the call.
    let desc = make(unsafe { (f.desc_create)(&mut at, compute, scale) }, at, f.desc_destroy, "a product")?;
    let set = |attribute: D, value: u32| {
        // SAFETY: the attribute is a number of 4 bytes, which lives through the call.
        let status = unsafe { (f.desc_set)(desc.at, attribute as u32, (&raw const value).cast(), size_of::<u32>()) };
        told(status, "an attribute of a product")
    };
    set(D::CUBLASLT_MATMUL_DESC_POINTER_MODE, lt::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE as u32)?;
    // Its left operand is the right one: columns of the result by steps of the sum. 1 is turned, 0 as it lies.
    set(D::CUBLASLT_MATMUL_DESC_TRANSA, u32::from(!p.right.across))?;
    set(D::CUBLASLT_MATMUL_DESC_TRANSB, u32::from(p.left.across))?;
    let layout = |dtype: DType, near: u64, far: u64, stride: u64| {
        let mut at = std::ptr::null_mut();
        // SAFETY: the pointer is of a handle that lives through the call.
        let status = unsafe { (f.layout_create)(&mut at, number(dtype), near, far, stride as i64) };
        make(status, at, f.layout_destroy, "a matrix")
    };
    let operand = |m: &pleach_plan::Matrix, lines: u64| {
        let (near, far) = if m.across { (lines, p.depth) } else { (p.depth, lines) };
        layout(DType::BF16, near, far, m.stride)
    };
    let left = operand(&p.left, rows)?;
    let right = operand(&p.right, p.columns)?;
    let result = layout(p.to.dtype, p.columns, rows, p.to.stride)?;

    let mut at = std::ptr::null_mut();
    // SAFETY: the pointer is of a handle that lives through the call.
    let wish = make(unsafe { (f.preference_create)(&mut at) }, at, f.preference_destroy, "a preference")?;
    let set = |attribute: P, value: *const c_void, bytes: usize| {
        // SAFETY: the value has so many bytes and lives through the call.
        told(unsafe { (f.preference_set)(wish.at, attribute as u32, value, bytes) }, "a preference")
    };
    let (most, scheme) =
        (WORKSPACE as u64, lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32);
    set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const most).cast(), size_of::<u64>())?;
    set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const scheme).cast(), size_of::<u32>())?;
    let aligned = ALIGNED;
    for a in [
        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ] {
        set(a, (&raw const aligned).cast(), size_of::<u32>())?;
    }
    let mut found = std::mem::MaybeUninit::<lt::cublasLtMatmulHeuristicResult_t>::zeroed();
    let mut n = 0;
    // SAFETY: all descriptions are the library's; there is room for one answer.
    let status = unsafe {
        (f.heuristic)(
            handle.at,
            desc.at,
            right.at,
            left.at,
            result.at,
            result.at,
            wish.at,
            1,
            found.as_mut_ptr(),
            &mut n,
        )
    };
    // SAFETY: zeroed, and every field is a number; the status is read as one.
    let (algorithm, workspace, state) = unsafe {
        let r = found.as_ptr();
        ((*r).algo, (*r).workspaceSize, (&raw const (*r).state).cast::<u32>().read())
    };
    if status != 0 || n < 1 || state != 0 || workspace > WORKSPACE {
        return Ok(None);
    }
    Ok(Some(Prepared { desc, layouts: [left, right, result], algorithm, workspace }))
}

/// What is enqueued by `work` as a node of a graph, behind `after`, which may be null.
///
/// # Safety
/// The stream and the graph must be of the current context; nothing else may be enqueued on the stream meanwhile.
pub(crate) unsafe fn captured(
    graph: CUgraph,
    after: CUgraphNode,
    stream: CUstream,
    work: &mut dyn FnMut() -> Result<()>,
) -> Result<CUgraphNode> {
    // Code may be loaded meanwhile.
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: promised by the caller.
    check(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }, "recording a product")?;
    let done = work();
    let mut part = std::ptr::null_mut();
    // SAFETY: the capture began above and ends in any case.
    let ended = unsafe { sys::cuStreamEndCapture(stream, &mut part) };
    let (mut node, n) = (std::ptr::null_mut(), usize::from(!after.is_null()));
    let added = done.and_then(|()| check(ended, "recording a product")).and_then(|()| {
        // SAFETY: the part is complete, and is copied.
        check(unsafe { sys::cuGraphAddChildGraphNode(&mut node, graph, &after, n, part) }, "a node of a graph")
    });
    if !part.is_null() {
        // SAFETY: made by the capture, and copied where it was added.
        let _ = unsafe { sys::cuGraphDestroy(part) };
    }
    added.map(|()| node)
}
