//! The C interface: opaque handles, one error text per thread, no panic across the border.
//!
//! The header is `include/pleach.h`, generated from this file. Functions that return `int` give 0 on success; those that
//! return a pointer give null on failure; [`pleach_last_error`] then says why.
#![allow(unsafe_code)]

use crate::error::{Result, RuntimeError};
use crate::generate::{GenerateParams, generate};
use crate::run::{Outputs, Values};
use crate::sample::Sampling;
use crate::session::{Options, Session};
use crate::weights::{Files, open_weights};
use pleach_plan::Plan;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

/// A plan with its weights, ready to run. Use it from one thread at a time.
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct pleach_session {
    session: Session,
    outputs: Vec<Kept>,
    description: CString,
}

struct Kept {
    name: String,
    data: *const f32,
    shape: Vec<u64>,
}

/// What a session is opened with. Zero means the default.
#[repr(C)]
#[allow(non_camel_case_types, reason = "the name in C")]
#[derive(Clone, Copy, Debug)]
pub struct pleach_options {
    /// Workers; default one per core.
    pub threads: u32,
    /// Tokens of a run; default 512.
    pub tokens: u64,
    /// Sequences of a run; default 1.
    pub sequences: u64,
    /// Slots of the key/value cache; default 2048.
    pub cache: u64,
    /// Positions; default what the model was made for.
    pub positions: u64,
}

/// An input of a run: `i32` or `f32` values, the other null.
#[repr(C)]
#[allow(non_camel_case_types, reason = "the name in C")]
#[derive(Clone, Copy, Debug)]
pub struct pleach_input {
    /// Name of the input.
    pub name: *const c_char,
    /// Integer values, or null.
    pub i32_values: *const i32,
    /// Float values, or null.
    pub f32_values: *const f32,
    /// Number of values.
    pub len: usize,
}

/// How to generate.
#[repr(C)]
#[allow(non_camel_case_types, reason = "the name in C")]
#[derive(Clone, Copy, Debug)]
pub struct pleach_sampling {
    /// New ids at most.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus; 0 means 1.
    pub top_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
}

/// Called with every new id; a result other than 0 stops.
#[allow(non_camel_case_types, reason = "the name in C")]
pub type pleach_on_token = Option<extern "C" fn(id: i32, user: *mut c_void) -> c_int>;

fn guard<T>(fail: T, f: impl FnOnce() -> Result<T>) -> T {
    let why = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(v)) => return v,
        Ok(Err(e)) => e.to_string(),
        Err(_) => "an internal error; this is a bug of pleach".into(),
    };
    let text = CString::new(why.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|e| *e.borrow_mut() = text);
    fail
}

/// # Safety
/// Null, or a C string.
unsafe fn text<'a>(s: *const c_char, what: &str) -> Result<&'a str> {
    if s.is_null() {
        return Err(RuntimeError::Values(format!("{what} is null")));
    }
    // SAFETY: promised by the caller of the C interface.
    let s = unsafe { CStr::from_ptr(s) };
    s.to_str().map_err(|_| RuntimeError::Values(format!("{what} is no UTF-8")))
}

/// # Safety
/// Null, or `n` readable values.
unsafe fn list<'a, T>(p: *const T, n: usize, what: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if p.is_null() || n > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(RuntimeError::Values(format!("{what} is null or has an impossible length")));
    }
    // SAFETY: promised by the caller of the C interface.
    Ok(unsafe { std::slice::from_raw_parts(p, n) })
}

/// # Safety
/// Null, or a live session that nobody else uses now.
unsafe fn handle<'a>(s: *mut pleach_session) -> Result<&'a mut pleach_session> {
    // SAFETY: promised by the caller of the C interface.
    unsafe { s.as_mut() }.ok_or_else(|| RuntimeError::Values("the session is null".into()))
}

fn keep(outputs: &Outputs<'_>) -> Vec<Kept> {
    let mut out = vec![];
    for o in &outputs.list {
        if let Ok(v) = outputs.f32(o.name) {
            out.push(Kept { name: o.name.into(), data: v.as_ptr(), shape: o.shape.clone() });
        }
    }
    out
}

/// Why the last call of this thread failed. Valid until the next failure.
#[unsafe(no_mangle)]
pub extern "C" fn pleach_last_error() -> *const c_char {
    LAST_ERROR.with(|e| e.borrow().as_ptr())
}

/// The version of this library.
#[unsafe(no_mangle)]
pub extern "C" fn pleach_version() -> *const c_char {
    const V: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(v) => v,
        Err(_) => c"",
    };
    V.as_ptr()
}

/// Opens a plan file with the weights of a model folder or safetensors file. `options` may be null.
///
/// # Safety
/// The paths are C strings; `options` is null or readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_open(
    plan: *const c_char,
    weights: *const c_char,
    options: *const pleach_options,
) -> *mut pleach_session {
    guard(std::ptr::null_mut(), || {
        // SAFETY: as this function's own.
        let (plan, weights, o) =
            unsafe { (text(plan, "the plan's path")?, text(weights, "the weights' path")?, options.as_ref()) };
        let plan = Arc::new(Plan::read(Path::new(plan))?);
        let or = |v: Option<u64>, default: u64| v.filter(|v| *v > 0).unwrap_or(default);
        let mut options = Options::default()
            .threads(o.map_or(0, |o| o.threads as usize))
            .capacity("T", or(o.map(|o| o.tokens), 512))
            .capacity("S", or(o.map(|o| o.sequences), 1))
            .capacity("C", or(o.map(|o| o.cache), 2048));
        if let Some(p) = o.map(|o| o.positions).filter(|p| *p > 0) {
            options = options.capacity("P", p);
        }
        let description = CString::new(serde_json::to_string(&plan.meta).unwrap_or_default()).unwrap_or_default();
        let session = Session::open(plan, open_weights(Path::new(weights))?, &options)?;
        Ok(Box::into_raw(Box::new(pleach_session { session, outputs: vec![], description })))
    })
}

/// Closes a session; null is allowed.
///
/// # Safety
/// The session came from `pleach_open` and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_close(session: *mut pleach_session) {
    guard((), || {
        if !session.is_null() {
            // SAFETY: as this function's own.
            drop(unsafe { Box::from_raw(session) });
        }
        Ok(())
    });
}

/// Facts about the model as JSON: kind, vocab, hidden, eos, …. Valid as long as the session.
///
/// # Safety
/// The session is live or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_describe(session: *mut pleach_session) -> *const c_char {
    // SAFETY: as this function's own.
    guard(std::ptr::null(), || Ok(unsafe { handle(session)? }.description.as_ptr()))
}

/// The capacity of a symbol (`T`, `S`, `C`, `P`), or 0 when the plan has no such symbol.
///
/// # Safety
/// The session is live or null, the name a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_capacity(session: *mut pleach_session, symbol: *const c_char) -> u64 {
    guard(0, || {
        // SAFETY: as this function's own.
        let (s, name) = unsafe { (handle(session)?, text(symbol, "the symbol")?) };
        s.session.capacity(name).ok_or_else(|| RuntimeError::Values(format!("the plan has no symbol {name}")))
    })
}

/// Runs `infer` on sequences of ids: sequence `i` is `ids[segments[i]..segments[i + 1]]`, `segments` has
/// `sequences + 1` values.
///
/// # Safety
/// The session is live or null, `segments` has `sequences + 1` values, `ids` as many as its last one says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_infer(
    session: *mut pleach_session,
    ids: *const i32,
    segments: *const usize,
    sequences: usize,
) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let (s, segments) = unsafe { (handle(session)?, list(segments, sequences.saturating_add(1), "segments")?) };
        let bad = || RuntimeError::Values("segments must start at 0 and rise".into());
        if segments.first() != Some(&0) || segments.windows(2).any(|w| w[0] >= w[1]) {
            return Err(bad());
        }
        // SAFETY: as this function's own.
        let ids = unsafe { list(ids, *segments.last().ok_or_else(bad)?, "ids")? };
        let parts: Vec<&[i32]> = segments.windows(2).map(|w| &ids[w[0]..w[1]]).collect();
        s.outputs.clear();
        s.outputs = keep(&s.session.infer(&parts, None)?);
        Ok(0)
    })
}

/// Runs any entry with inputs by name.
///
/// # Safety
/// The session is live or null; `inputs` has `count` values, each with a name and `len` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_run(
    session: *mut pleach_session,
    entry: *const c_char,
    inputs: *const pleach_input,
    count: usize,
) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let (s, entry, inputs) =
            unsafe { (handle(session)?, text(entry, "the entry")?, list(inputs, count, "inputs")?) };
        let mut given = vec![];
        for i in inputs {
            // SAFETY: as this function's own.
            let name = unsafe { text(i.name, "an input's name")? };
            let values = if i.f32_values.is_null() {
                // SAFETY: as this function's own.
                Values::I32(unsafe { list(i.i32_values, i.len, name)? })
            } else {
                // SAFETY: as this function's own.
                Values::F32(unsafe { list(i.f32_values, i.len, name)? })
            };
            given.push((name, values));
        }
        s.outputs.clear();
        s.outputs = keep(&s.session.run(entry, &given)?);
        Ok(0)
    })
}

/// An f32 output of the last run: its values, its shape (up to 8 numbers) and rank. Valid until the next call.
///
/// # Safety
/// The session is live or null, the name a C string; the results are writable, `shape` for 8 numbers, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_output(
    session: *mut pleach_session,
    name: *const c_char,
    values: *mut *const f32,
    shape: *mut u64,
    rank: *mut usize,
) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let (s, name) = unsafe { (handle(session)?, text(name, "the output's name")?) };
        let o = s.outputs.iter().find(|o| o.name == name).ok_or_else(|| {
            let have: Vec<&str> = s.outputs.iter().map(|o| o.name.as_str()).collect();
            RuntimeError::Values(format!("the last run gave no f32 output `{name}`; it gave: {}", have.join(", ")))
        })?;
        // SAFETY: as this function's own; a plan's tensors have at most 8 dimensions.
        unsafe {
            if !values.is_null() {
                *values = o.data;
            }
            if !shape.is_null() {
                std::ptr::copy_nonoverlapping(o.shape.as_ptr(), shape, o.shape.len().min(8));
            }
            if !rank.is_null() {
                *rank = o.shape.len();
            }
        }
        Ok(0)
    })
}

/// Continues one prompt; stops at any end-of-sequence id of the model. Writes the new ids to `out`, which has room for
/// `max_new_tokens`, and their number to `count`. `out` and `on_token` may be null.
///
/// # Safety
/// The session is live or null, `ids` has `len` values, `sampling` is readable, `out` has room, `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_generate(
    session: *mut pleach_session,
    ids: *const i32,
    len: usize,
    sampling: *const pleach_sampling,
    on_token: pleach_on_token,
    user: *mut c_void,
    out: *mut i32,
    count: *mut usize,
) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let (s, ids, p) = unsafe { (handle(session)?, list(ids, len, "ids")?, sampling.as_ref()) };
        let p = p.ok_or_else(|| RuntimeError::Values("sampling is null".into()))?;
        let top_p = if p.top_p == 0.0 { 1.0 } else { p.top_p };
        let params = GenerateParams {
            max_new_tokens: p.max_new_tokens,
            sampling: Sampling { temperature: p.temperature, top_p, seed: p.seed },
            eos: s.session.plan().meta.eos.clone(),
        };
        s.outputs.clear();
        let got = generate(&mut s.session, &[ids.to_vec()], &params, &mut |_, id| match on_token {
            Some(f) if f(id, user) != 0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })?;
        let new = &got.ids[0];
        // SAFETY: as this function's own; there are at most `max_new_tokens`.
        unsafe {
            if !out.is_null() {
                std::ptr::copy_nonoverlapping(new.as_ptr(), out, new.len());
            }
            if !count.is_null() {
                *count = new.len();
            }
        }
        Ok(0)
    })
}

/// Puts an adapter into a slot. The safetensors file names its tensors by the keys of the plan. On failure the slot keeps
/// what it had.
///
/// # Safety
/// The session is live or null, the path a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_load_slot(session: *mut pleach_session, slot: u32, path: *const c_char) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let (s, path) = unsafe { (handle(session)?, text(path, "the path")?) };
        s.outputs.clear();
        s.session.load_slot(slot, &Files::open(Path::new(path))?)?;
        Ok(0)
    })
}

/// Empties a slot: the model without that adapter.
///
/// # Safety
/// The session is live or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pleach_clear_slot(session: *mut pleach_session, slot: u32) -> c_int {
    guard(1, || {
        // SAFETY: as this function's own.
        let s = unsafe { handle(session)? };
        s.outputs.clear();
        s.session.clear_slot(slot)?;
        Ok(0)
    })
}
