//! Arguments of a launch: grid, pointers, tensor maps.

use super::driver::check;
use crate::device::Address;
use crate::error::{Result, RuntimeError};
use cudarc::driver::sys::{self, CUtensorMap};
use pleach_plan::{DType, Expr, Launch, LaunchParam, TensorMap};
use std::ffi::c_void;

/// Rows of a tensor map are a multiple of so many bytes apart.
const PIECE: u64 = 16;

/// What the arguments of a launch are made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given<'a> {
    /// Operands, then results.
    pub(crate) buffers: &'a [Address],
    pub(crate) scratch: u64,
    /// Where the values of the symbols lie on the device.
    pub(crate) dims: u64,
    /// Where the launch's table of pointers lies on the device, if it has one.
    pub(crate) table: u64,
    /// The same values, or for a grid that is to serve several, larger ones.
    pub(crate) env: &'a [u64],
}

/// An argument: a pointer in the first 8 bytes, or a tensor map.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Slot([u64; 16]);

/// The arguments of one launch.
#[derive(Debug, Default)]
pub(crate) struct Args {
    slots: Vec<Slot>,
    pointers: Vec<*mut c_void>,
}

impl Args {
    /// Makes the arguments of a launch anew.
    pub(crate) fn set(&mut self, l: &Launch, g: &Given<'_>) -> Result<()> {
        self.slots.clear();
        for p in &l.params {
            let mut slot = Slot([0; 16]);
            match p {
                LaunchParam::Buffer(b) => slot.0[0] = g.buffers[*b as usize] as u64,
                LaunchParam::Table(_) => slot.0[0] = g.table,
                LaunchParam::Scratch => slot.0[0] = g.scratch,
                LaunchParam::Dims => slot.0[0] = g.dims,
                LaunchParam::TensorMap(m) => slot.0 = encode(m, g)?.opaque,
            }
            self.slots.push(slot);
        }
        self.pointers.clear();
        self.pointers.extend(self.slots.iter_mut().map(|s| std::ptr::from_mut(s).cast::<c_void>()));
        Ok(())
    }

    /// What the driver takes; valid until the next [`Args::set`].
    pub(crate) fn pointers(&mut self) -> *mut *mut c_void {
        self.pointers.as_mut_ptr()
    }
}

/// The buffers of a launch's table; none for most launches.
pub(crate) fn table(l: &Launch) -> &[u32] {
    let list = l.params.iter().find_map(|p| match p {
        LaunchParam::Table(list) => Some(list.as_slice()),
        _ => None,
    });
    list.unwrap_or_default()
}

/// Blocks in x, y and z.
pub(crate) fn grid(l: &Launch, env: &[u64]) -> Result<[u32; 3]> {
    let mut out = [1; 3];
    for ((n, e), most) in out.iter_mut().zip(&l.grid).zip([i32::MAX as u64, 65_535, 65_535]) {
        let blocks = e.eval(env)?;
        if blocks == 0 || blocks > most {
            return Err(RuntimeError::Capacity(format!(
                "kernel {} takes {blocks} blocks in a direction where a GPU takes 1 to {most}; run less at a time",
                l.function
            )));
        }
        *n = blocks as u32;
    }
    Ok(out)
}

/// Whether a launch's arguments depend on counts beyond what it reads from memory.
pub(crate) fn depends_on_counts(l: &Launch) -> bool {
    l.params.iter().any(|p| match p {
        LaunchParam::TensorMap(m) => m.sizes.iter().chain(&m.strides).any(|e: &Expr| !e.symbols().is_empty()),
        _ => false,
    })
}

fn encode(m: &TensorMap, g: &Given<'_>) -> Result<CUtensorMap> {
    use sys::{
        CUtensorMapDataType_enum as T, CUtensorMapFloatOOBfill_enum as Fill, CUtensorMapInterleave_enum as Interleave,
        CUtensorMapL2promotion_enum as Promotion, CUtensorMapSwizzle_enum as S,
    };
    let dtype = match m.dtype {
        DType::F32 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::BF16 => T::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F16 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::I32 => T::CU_TENSOR_MAP_DATA_TYPE_INT32,
        DType::Bool => T::CU_TENSOR_MAP_DATA_TYPE_UINT8,
    };
    let swizzle = match m.swizzle {
        32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
        64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
        128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => S::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    // A window past the end has no rows: the kernel reads none, and a map has at least one.
    let value = |e: &Expr| e.eval(g.env).map(|v| v.max(1));
    let sizes = m.sizes.iter().map(value).collect::<std::result::Result<Vec<u64>, _>>()?;
    // Where there are no rows any distance will do that is one: a multiple of 16 bytes.
    let stride = |e: &Expr| e.eval(g.env).map(|v| if v == 0 { PIECE } else { v });
    let strides = m.strides.iter().map(stride).collect::<std::result::Result<Vec<u64>, _>>()?;
    let steps = vec![1u32; m.sizes.len()];
    let mut out = CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays have as many values as the rank says, and live through the call.
    let r = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut out,
            dtype,
            m.sizes.len() as u32,
            g.buffers[m.buffer as usize].cast(),
            sizes.as_ptr(),
            strides.as_ptr(),
            m.boxes.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check(r, &format!("a tensor map of sizes {sizes:?}, strides {strides:?}, tile {:?}", m.boxes))?;
    Ok(out)
}
