//! The instructions after parsing: registers are numbers, symbols are addresses, branch targets are positions.

pub(crate) use crate::inst::{Collective, Inst};

/// A data register (8 to 64 bits) of the kernel's register file.
pub(crate) type Reg = u32;
/// A predicate register.
pub(crate) type Pred = u32;

/// A data operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Src {
    Reg(Reg),
    Imm(u64),
}

/// A predicate operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PSrc {
    Is(Pred),
    Not(Pred),
    Const(bool),
}

/// `[base + offset]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addr {
    pub(crate) base: Src,
    pub(crate) offset: i64,
}

/// Types as instructions name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ty {
    B(u32),
    U(u32),
    S(u32),
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
    Tf32,
}

impl Ty {
    pub(crate) fn parse(s: &str) -> Option<Ty> {
        Some(match s {
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            "tf32" => Ty::Tf32,
            _ => {
                let bits: u32 = s.get(1..)?.parse().ok().filter(|b| [8, 16, 32, 64, 128].contains(b))?;
                match &s[..1] {
                    "b" => Ty::B(bits),
                    "u" if bits < 128 => Ty::U(bits),
                    "s" if bits < 128 => Ty::S(bits),
                    _ => return None,
                }
            }
        })
    }

    pub(crate) fn bits(self) -> u32 {
        match self {
            Ty::B(n) | Ty::U(n) | Ty::S(n) => n,
            Ty::F16 | Ty::Bf16 => 16,
            Ty::F16x2 | Ty::Bf16x2 | Ty::F32 | Ty::Tf32 => 32,
            Ty::F64 => 64,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        !matches!(self, Ty::B(_) | Ty::U(_) | Ty::S(_))
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S(_))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
    Warp,
    Nwarp,
    LaneMask(Cmp),
    Clock,
    DynSmemSize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int1 {
    Neg,
    Not,
    Abs,
    Popc,
    Clz,
    Brev,
    Bfind,
    BfindShift,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int2 {
    Add,
    Sub,
    Mul,
    MulHi,
    MulWide,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int3 {
    Mad,
    MadHi,
    MadWide,
    Bfe,
    Prmt,
    ShfLWrap,
    ShfRWrap,
    ShfLClamp,
    ShfRClamp,
    Lop3(u8),
    Dp4a,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float1 {
    Neg,
    Abs,
    Ex2,
    Lg2,
    Rcp,
    Rsqrt,
    Sqrt,
    Tanh,
    Sin,
    Cos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float2 {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
    MinNan,
    MaxNan,
    Copysign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BoolOp {
    And,
    Or,
    Xor,
}

/// How a conversion rounds. The `I` forms round to an integral value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    None,
    Near,
    Zero,
    Down,
    Up,
    NearAway,
    NearI,
    ZeroI,
    DownI,
    UpI,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// Matrix multiplicands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Elem {
    Bf16,
    F16,
    Tf32,
}

/// The left operand of a warpgroup product.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum WgA {
    Desc(Src),
    Regs([Src; 4]),
}

/// What an mbarrier operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mbar {
    Init(Src),
    Inval,
    /// Announced bytes, arrivals.
    Arrive {
        tx: Option<Src>,
        count: Option<Src>,
    },
    ExpectTx(Src),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Op {
    Mov {
        d: Reg,
        a: Src,
        bits: u32,
    },
    Special {
        d: Reg,
        which: Special,
    },
    Pack {
        d: Reg,
        parts: Box<[Src]>,
        bits: u32,
    },
    Unpack {
        d: Box<[Option<Reg>]>,
        a: Src,
        bits: u32,
    },
    PredLogic {
        f: BoolOp,
        d: Pred,
        a: PSrc,
        b: PSrc,
    },
    Int1 {
        f: Int1,
        ty: Ty,
        d: Reg,
        a: Src,
    },
    Int2 {
        f: Int2,
        ty: Ty,
        d: Reg,
        a: Src,
        b: Src,
    },
    Int3 {
        f: Int3,
        ty: Ty,
        d: Reg,
        a: Src,
        b: Src,
        c: Src,
    },
    Bfi {
        bits: u32,
        d: Reg,
        a: Src,
        b: Src,
        pos: Src,
        len: Src,
    },
    Float1 {
        f: Float1,
        ty: Ty,
        ftz: bool,
        d: Reg,
        a: Src,
    },
    Float2 {
        f: Float2,
        ty: Ty,
        ftz: bool,
        sat: bool,
        d: Reg,
        a: Src,
        b: Src,
    },
    Fma {
        ty: Ty,
        ftz: bool,
        sat: bool,
        relu: bool,
        d: Reg,
        a: Src,
        b: Src,
        c: Src,
    },
    Setp {
        cmp: Cmp,
        ty: Ty,
        ftz: bool,
        d: Option<Pred>,
        q: Option<Pred>,
        a: Src,
        b: Src,
        with: Option<(BoolOp, PSrc)>,
    },
    Selp {
        bits: u32,
        d: Reg,
        a: Src,
        b: Src,
        p: PSrc,
    },
    Cvt {
        to: Ty,
        from: Ty,
        round: Round,
        ftz: bool,
        sat: bool,
        relu: bool,
        d: Reg,
        a: Src,
    },
    /// Two f32 to a pair of 16-bit floats; the first source is the upper half.
    CvtPack {
        to: Ty,
        round: Round,
        relu: bool,
        d: Reg,
        hi: Src,
        lo: Src,
    },
    /// `constant`: by way of the cache for memory that nothing writes.
    Ld {
        space: Space,
        constant: bool,
        ty: Ty,
        d: Box<[Option<Reg>]>,
        addr: Addr,
    },
    St {
        space: Space,
        ty: Ty,
        addr: Addr,
        v: Box<[Src]>,
    },
    /// Reduces one value, or a vector of them when `d` is none.
    Atom {
        space: Space,
        f: AtomOp,
        ty: Ty,
        d: Option<Reg>,
        addr: Addr,
        v: Box<[Src]>,
        swap: Option<Src>,
    },
    Bra {
        target: u32,
    },
    Brx {
        index: Src,
        targets: Box<[u32]>,
    },
    Ret,
    Trap,
    Nop,
    // Collectives of a warp.
    Shfl {
        f: Shuffle,
        d: Reg,
        p: Option<Pred>,
        a: Src,
        b: Src,
        c: Src,
        members: Src,
    },
    Vote {
        f: Vote,
        d: Option<Reg>,
        p: Option<Pred>,
        a: PSrc,
        members: Src,
    },
    Redux {
        f: AtomOp,
        ty: Ty,
        d: Reg,
        a: Src,
        members: Src,
    },
    Elect {
        d: Option<Reg>,
        p: Pred,
        members: Src,
    },
    MatchAny {
        d: Reg,
        bits: u32,
        a: Src,
        members: Src,
    },
    Activemask {
        d: Reg,
    },
    WarpSync {
        members: Src,
    },
    Ldmatrix {
        d: Box<[Reg]>,
        trans: bool,
        addr: Addr,
    },
    Stmatrix {
        v: Box<[Src]>,
        trans: bool,
        addr: Addr,
    },
    Mma {
        elem: Elem,
        k: usize,
        d: Box<[Reg]>,
        a: Box<[Src]>,
        b: Box<[Src]>,
        c: Box<[Src]>,
    },
    Setmaxnreg {
        n: u32,
        more: bool,
    },
    // Barriers of a block.
    Bar {
        id: Src,
        threads: Option<Src>,
        wait: bool,
    },
    BarRed {
        f: Vote,
        d: Option<Reg>,
        p: Option<Pred>,
        id: Src,
        a: PSrc,
    },
    FenceProxyAsync,
    FenceMbarrierInit,
    // Asynchronous copies.
    CpAsync {
        dst: Addr,
        src: Addr,
        bytes: u32,
        valid: Option<Src>,
    },
    CpCommit,
    CpWait {
        keep: Option<u32>,
    },
    Mbarrier {
        f: Mbar,
        addr: Addr,
        d: Option<Reg>,
    },
    MbarWait {
        p: Pred,
        addr: Addr,
        state: Src,
        parity: bool,
        block: bool,
    },
    TmaLoad {
        dst: Addr,
        map: Addr,
        at: Box<[Src]>,
        bar: Addr,
    },
    TmaStore {
        map: Addr,
        at: Box<[Src]>,
        src: Addr,
    },
    BulkLoad {
        dst: Addr,
        src: Addr,
        bytes: Src,
        bar: Addr,
    },
    BulkStore {
        dst: Addr,
        src: Addr,
        bytes: Src,
    },
    BulkCommit,
    BulkWait {
        keep: u32,
    },
    // Warpgroup products.
    WgFence,
    WgMma {
        elem: Elem,
        n: usize,
        d: Box<[Reg]>,
        a: WgA,
        b: Src,
        scale_d: PSrc,
        neg: [bool; 2],
        trans: [bool; 2],
    },
    WgCommit,
    WgWait {
        keep: u32,
    },
}
