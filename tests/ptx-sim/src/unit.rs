//! How long the units of one processor take at least for what a launch executes: issue rates of the chips, no latencies.
//!
//! Sources. CUDA C++ programming guide, throughput of native arithmetic instructions, results a clock and processor for 8.0 and 9.0: 32-bit
//! floats 64 and 128, integers, shifts, logic and comparisons 64, special functions 16, conversions 16 or 64, shuffles 32; four warp
//! instructions are issued a clock. Nsight Compute's guide, pipelines: integer multiplications take that of floats (FMA), conversions between
//! integers and floats that of special functions (XU). Matrices: 312 and 989 TFLOP/s over 108 and 132 processors at 1.41 and 1.83 GHz are
//! 2048 and 4096 operations a clock; `mma.sync` reaches about 0.63 of that on the newer chip (Luo et al., Benchmarking and Dissecting the
//! Nvidia Hopper GPU Architecture, 2024). Assumed: packing two floats to 16 bits takes as long as an integer instruction; 64-bit integers are two
//! instructions; moves, and parts of registers, are none. The assembler may merge or add instructions: a bound for PTX, not for its result.

use crate::isa::{Elem, Float1, Float2, Int1, Int2, Int3, Op, Round, Space, Ty};

/// Number of units.
pub const UNITS: usize = 6;

/// What instructions of a processor wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Matrix products.
    Tensor,
    /// Multiplications and additions of floats, multiplications of integers.
    Float,
    /// Integers, logic, comparisons, selections.
    Integer,
    /// Exponentials, reciprocals, roots; conversions between integers and floats.
    Special,
    /// Warp instructions of any kind, four a clock.
    Issue,
    /// Wavefronts of shared memory, and shuffles.
    Shared,
}

impl Unit {
    /// All units, in order.
    pub const ALL: [Unit; UNITS] = [Unit::Tensor, Unit::Float, Unit::Integer, Unit::Special, Unit::Issue, Unit::Shared];

    /// Adds the cycles of an instruction that so many warps execute. `newer`: sm_90. What accesses of shared memory take is added elsewhere.
    pub(crate) fn take(cycles: &mut [f64; UNITS], op: &Op, newer: bool, warps: u64) {
        let (unit, rate, instructions) = cost(op, newer);
        let n = warps as f64;
        cycles[Unit::Issue as usize] += n * instructions / 4.0;
        if let Some(u) = unit {
            cycles[u as usize] += n * rate;
        }
        // A division is a reciprocal and two multiplications.
        if matches!(op, Op::Float2 { f: Float2::Div, .. }) {
            cycles[Unit::Float as usize] += n * 2.0 * 32.0 / floats(newer);
        }
    }
}

/// Results of 32-bit floats a clock.
fn floats(newer: bool) -> f64 {
    if newer { 128.0 } else { 64.0 }
}

/// The unit of an instruction, cycles for one warp, and instructions that are issued for it.
fn cost(op: &Op, newer: bool) -> (Option<Unit>, f64, f64) {
    let float = |n: f64| (Some(Unit::Float), n * 32.0 / floats(newer), n);
    let integer = |n: f64| (Some(Unit::Integer), n * 0.5, n);
    let product = |n: f64| (Some(Unit::Float), n * 0.5, n);
    let special = |n: f64| (Some(Unit::Special), 2.0, n);
    let tensor = |ops: f64, e: Elem, reached: f64| {
        let peak = if newer { 4096.0 } else { 2048.0 } * if e == Elem::Tf32 { 0.5 } else { 1.0 };
        (Some(Unit::Tensor), ops / (peak * reached), 1.0)
    };
    let wide = |bits: u32| if bits > 32 { 2.0 } else { 1.0 };
    match op {
        // Parameters are operands of the instructions that use them.
        Op::Nop | Op::Mov { .. } | Op::Pack { .. } | Op::Unpack { .. } | Op::Ld { space: Space::Param, .. } => {
            (None, 0.0, 0.0)
        }
        Op::Float1 { f: Float1::Neg | Float1::Abs, .. } => (None, 0.0, 0.0),
        Op::Float1 { .. } => special(1.0),
        Op::Float2 { f, .. } => match f {
            Float2::Add | Float2::Sub | Float2::Mul => float(1.0),
            Float2::Div => special(3.0),
            _ => integer(1.0),
        },
        Op::Fma { .. } => float(1.0),
        Op::Int1 { f: Int1::Popc | Int1::Clz | Int1::Brev | Int1::Bfind | Int1::BfindShift, .. } => special(1.0),
        Op::Int1 { ty, .. } => integer(wide(ty.bits())),
        Op::Int2 { f, ty, .. } => match f {
            Int2::Mul | Int2::MulHi if ty.bits() > 32 => product(3.0),
            Int2::Mul | Int2::MulHi | Int2::MulWide => product(1.0),
            // A reciprocal, conversions and corrections.
            Int2::Div | Int2::Rem => special(20.0 * wide(ty.bits())),
            _ => integer(wide(ty.bits())),
        },
        Op::Int3 { f, ty, .. } => match f {
            Int3::Mad | Int3::MadHi if ty.bits() > 32 => product(3.0),
            Int3::Mad | Int3::MadHi | Int3::MadWide | Int3::Dp4a => product(1.0),
            _ => integer(wide(ty.bits())),
        },
        Op::Bfi { bits, .. } | Op::Selp { bits, .. } => integer(wide(*bits)),
        Op::Setp { ty, .. } => integer(if ty.is_float() { 1.0 } else { wide(ty.bits()) }),
        Op::PredLogic { .. } | Op::CvtPack { .. } => integer(1.0),
        Op::Cvt { to, from, round, .. } => match (to.is_float(), from.is_float()) {
            (true, true) if *round == Round::None || to.bits().max(from.bits()) <= 32 && !integral(*round) => {
                integer(1.0)
            }
            (false, false) => integer(if widens(*to, *from) { 0.0 } else { 1.0 }),
            _ => special(1.0),
        },
        Op::Mma { elem, k, .. } => tensor((2 * 16 * 8 * k) as f64, *elem, if newer { 0.63 } else { 1.0 }),
        // A quarter of a warpgroup's 64 rows, with the 32 bytes of a row that every product takes.
        Op::WgMma { elem, n, .. } => tensor((2 * 16 * n * if *elem == Elem::Tf32 { 8 } else { 16 }) as f64, *elem, 1.0),
        Op::Shfl { .. } => (Some(Unit::Shared), 1.0, 1.0),
        _ => (None, 0.0, 1.0),
    }
}

fn integral(r: Round) -> bool {
    matches!(r, Round::NearI | Round::ZeroI | Round::DownI | Round::UpI)
}

/// Conversions of integers that only name more registers, or fewer, or join the shift that follows.
fn widens(to: Ty, from: Ty) -> bool {
    to.bits() >= from.bits() && !from.signed() || to.bits() == from.bits()
}
