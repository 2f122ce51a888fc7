//! Elementary functions as straight-line vector code: no calls to a mathematics library.
//!
//! f32 in, f32 out, any number of lanes. Errors over the whole range (measured in tests against f64): exp 1.0 ulp, log
//! 0.9 ulp for normal x > 0, sigmoid 2.5 ulp, tanh 1.4 ulp, erf 2.5 ulp. exp saturates instead of overflowing.
//! NaN is propagated. Coefficients are minimax fits in f32.
#![allow(
    clippy::excessive_precision,
    clippy::approx_constant,
    reason = "coefficients of fitted polynomials, as they were fitted"
)]

use super::func::{Func, Val, vty};

const SIN: [f32; 3] = [-0.166_666_55, 0.008_332_161, -0.000_195_152_96];
const COS: [f32; 3] = [0.041_666_646, -0.001_388_731_6, 2.443_315_7e-5];
/// π/2 in three parts.
const HALF_PI: [f32; 3] = [1.570_796_4, -4.371_139e-8, -1.715_124_5e-15];
const EXP: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_4, 0.008_368_852, 0.001_381_431_8];
const LOG: [f32; 8] = [
    0.333_333_32,
    -0.250_008_23,
    0.200_012_27,
    -0.166_233_57,
    0.142_017_62,
    -0.131_601_94,
    0.127_615_5,
    -0.076_344_296,
];
const TANH: [f32; 5] = [-0.333_332_8, 0.133_314_42, -0.053_739_715, 0.020_639_09, -0.005_704_990_6];
const ERF_SMALL: [f32; 6] =
    [1.128_379_1, -0.376_125_25, 0.112_821_415, -0.026_778_935, 0.005_011_993_5, -0.000_609_049_63];
const ERF_BIG: [f32; 8] = [
    0.000_169_205_13,
    -1.129_488_3,
    -0.633_400_86,
    -0.108_220_38,
    0.025_080_616,
    -0.004_156_254_7,
    0.000_431_393_56,
    -2.082_862e-5,
];

/// Vector arithmetic at one lane count.
pub struct Math<'f> {
    /// The function that is written to.
    pub f: &'f mut Func,
    /// Lanes; 1 is scalar.
    pub lanes: usize,
}

impl Math<'_> {
    fn ty(&self) -> String {
        vty(self.lanes, "f32")
    }
    fn ity(&self) -> String {
        vty(self.lanes, "i32")
    }
    /// A constant in every lane.
    pub fn k(&mut self, x: f32) -> Val {
        self.f.f32(x, self.lanes)
    }
    /// `arith.<op>f`-style binary operator, such as `addf`, `mulf`, `maximumf`.
    pub fn bin(&mut self, op: &str, a: &Val, b: &Val) -> Val {
        let t = self.ty();
        self.f.op(format!("arith.{op} {a}, {b} : {t}"))
    }
    fn ibin(&mut self, op: &str, a: &Val, b: &Val) -> Val {
        let t = self.ity();
        self.f.op(format!("arith.{op} {a}, {b} : {t}"))
    }
    /// a*b + c, one rounding.
    pub fn fma(&mut self, a: &Val, b: &Val, c: &Val) -> Val {
        let t = self.ty();
        self.f.op(format!("math.fma {a}, {b}, {c} : {t}"))
    }
    /// -x.
    pub fn neg(&mut self, x: &Val) -> Val {
        let t = self.ty();
        self.f.op(format!("arith.negf {x} : {t}"))
    }
    /// |x|.
    pub fn abs(&mut self, x: &Val) -> Val {
        let t = self.ty();
        self.f.op(format!("math.absf {x} : {t}"))
    }
    fn copysign(&mut self, mag: &Val, sign: &Val) -> Val {
        let t = self.ty();
        self.f.op(format!("math.copysign {mag}, {sign} : {t}"))
    }
    fn as_int(&mut self, x: &Val) -> Val {
        let (t, i) = (self.ty(), self.ity());
        self.f.op(format!("arith.bitcast {x} : {t} to {i}"))
    }
    fn as_float(&mut self, x: &Val) -> Val {
        let (t, i) = (self.ty(), self.ity());
        self.f.op(format!("arith.bitcast {x} : {i} to {t}"))
    }
    /// `pred` (such as `olt`) ? a : b.
    pub fn choose(&mut self, pred: &str, x: &Val, y: &Val, a: &Val, b: &Val) -> Val {
        let t = self.ty();
        let c = self.f.op(format!("arith.cmpf {pred}, {x}, {y} : {t}"));
        if self.lanes == 1 {
            return self.f.op(format!("arith.select {c}, {a}, {b} : {t}"));
        }
        let m = vty(self.lanes, "i1");
        self.f.op(format!("arith.select {c}, {a}, {b} : {m}, {t}"))
    }
    fn horner(&mut self, x: &Val, c: &[f32]) -> Val {
        let mut r = self.k(c[c.len() - 1]);
        for k in c[..c.len() - 1].iter().rev() {
            let k = self.k(*k);
            r = self.fma(&r, x, &k);
        }
        r
    }
    /// e^x; saturates outside [-87.34, 88.38].
    pub fn exp(&mut self, x: &Val) -> Val {
        if self.f.gpu {
            return self.exp_of_two(x);
        }
        let (lo, hi) = (self.k(-87.336_54), self.k(88.376_26));
        let x = self.bin("maximumf", x, &lo);
        let x = self.bin("minimumf", &x, &hi);
        let (log2e, magic) = (self.k(std::f32::consts::LOG2_E), self.k(12_582_912.0));
        let t = self.fma(&x, &log2e, &magic);
        let n = self.bin("subf", &t, &magic);
        let (ln2_hi, ln2_lo) = (self.k(-0.693_359_375), self.k(2.121_944_4e-4));
        let r = self.fma(&n, &ln2_hi, &x);
        let r = self.fma(&n, &ln2_lo, &r);
        let q = self.horner(&r, &EXP);
        let r2 = self.bin("mulf", &r, &r);
        let p = self.fma(&q, &r2, &r);
        let one = self.k(1.0);
        let p = self.bin("addf", &p, &one);
        let ti = self.as_int(&t);
        let c23 = self.f.i32(23, self.lanes);
        let s = self.ibin("shli", &ti, &c23);
        let pi = self.as_int(&p);
        let y = self.ibin("addi", &pi, &s);
        self.as_float(&y)
    }
    /// e^x by the GPU's 2^x: the exponent is split into what 2^x takes and what rounding it lost.
    fn exp_of_two(&mut self, x: &Val) -> Val {
        let (log2e, ln2) = (self.k(std::f32::consts::LOG2_E), self.k(std::f32::consts::LN_2));
        let rest = self.k(1.925_963e-8);
        let t = self.bin("mulf", x, &log2e);
        let n = self.neg(&t);
        let lost = self.fma(x, &log2e, &n);
        let lost = self.fma(x, &rest, &lost);
        let y = self.f.op(format!("llvm.call_intrinsic \"llvm.nvvm.ex2.approx.ftz.f\"({t}) : (f32) -> f32"));
        let lost = self.bin("mulf", &lost, &ln2);
        let fine = self.fma(&y, &lost, &y);
        // Where 2^x is 0 or infinite there is nothing to mend.
        let (zero, inf) = (self.k(0.0), self.k(f32::INFINITY));
        let fine = self.choose("oeq", &y, &inf, &inf, &fine);
        self.choose("oeq", &y, &zero, &zero, &fine)
    }
    /// sin(x), or cos(x) with `quarter` 1: the argument reduced by multiples of π/2, then polynomials. Good to 2 ulp up to
    /// |x| about 10^5.
    pub fn sin_cos(&mut self, x: &Val, quarter: i32) -> Val {
        let t = self.ty();
        let (two_over_pi, magic) = (self.k(std::f32::consts::FRAC_2_PI), self.k(12_582_912.0));
        let shifted = self.fma(x, &two_over_pi, &magic);
        let n = self.bin("subf", &shifted, &magic);
        let mut r = x.clone();
        for part in HALF_PI {
            let part = self.k(-part);
            r = self.fma(&n, &part, &r);
        }
        let u = self.bin("mulf", &r, &r);
        let p = self.horner(&u, &SIN);
        let cube = self.bin("mulf", &u, &r);
        let sin = self.fma(&p, &cube, &r);
        let p = self.horner(&u, &COS);
        let square = self.bin("mulf", &u, &u);
        let (half, one) = (self.k(-0.5), self.k(1.0));
        let cos = self.fma(&u, &half, &one);
        let cos = self.fma(&p, &square, &cos);
        // The low bits of the shifted number are the quarter turns.
        let bits = self.as_int(&shifted);
        let quarter = self.f.i32(quarter, self.lanes);
        let q = self.ibin("addi", &bits, &quarter);
        let (one, two) = (self.f.i32(1, self.lanes), self.f.i32(2, self.lanes));
        let (i, c1, c30) = (self.ity(), self.f.i32(0, self.lanes), self.f.i32(30, self.lanes));
        let odd = self.ibin("andi", &q, &one);
        let odd = self.f.op(format!("arith.cmpi ne, {odd}, {c1} : {i}"));
        let y = self.f.op(format!("arith.select {odd}, {cos}, {sin} : {t}"));
        let sign = self.ibin("andi", &q, &two);
        let sign = self.ibin("shli", &sign, &c30);
        let y = self.as_int(&y);
        let y = self.ibin("xori", &y, &sign);
        self.as_float(&y)
    }
    /// Natural logarithm of a normal x > 0; 0 gives -inf, negative gives NaN.
    pub fn log(&mut self, x: &Val) -> Val {
        let xi = self.as_int(x);
        let root = self.f.i32(0x3f35_04f3, self.lanes);
        let d = self.ibin("subi", &xi, &root);
        let c23 = self.f.i32(23, self.lanes);
        let e = self.ibin("shrsi", &d, &c23);
        let sh = self.ibin("shli", &e, &c23);
        let m = self.ibin("subi", &xi, &sh);
        let m = self.as_float(&m);
        let one = self.k(1.0);
        let g = self.bin("subf", &m, &one);
        let (t, i) = (self.ty(), self.ity());
        let ef = self.f.op(format!("arith.sitofp {e} : {i} to {t}"));
        let q = self.horner(&g, &LOG);
        let g2 = self.bin("mulf", &g, &g);
        let g3 = self.bin("mulf", &g2, &g);
        let t = self.bin("mulf", &q, &g3);
        let lo = self.k(-2.121_944_4e-4);
        let t = self.fma(&ef, &lo, &t);
        let half = self.k(-0.5);
        let t = self.fma(&g2, &half, &t);
        let t = self.bin("addf", &t, &g);
        let hi = self.k(0.693_359_375);
        let y = self.fma(&ef, &hi, &t);
        let (zero, ninf, nan, inf) = (self.k(0.0), self.k(f32::NEG_INFINITY), self.k(f32::NAN), self.k(f32::INFINITY));
        let y = self.choose("oeq", x, &inf, &inf, &y);
        let y = self.choose("oeq", x, &zero, &ninf, &y);
        self.choose("uge", x, &zero, &y, &nan)
    }
    /// 1 / (1 + e^-x).
    pub fn sigmoid(&mut self, x: &Val) -> Val {
        let n = self.neg(x);
        let e = self.exp(&n);
        let one = self.k(1.0);
        let d = self.bin("addf", &e, &one);
        if self.f.gpu {
            return self.f.op(format!("nvvm.rcp.approx.ftz.f {d} : f32"));
        }
        self.bin("divf", &one, &d)
    }
    /// Hyperbolic tangent.
    pub fn tanh(&mut self, x: &Val) -> Val {
        let a = self.abs(x);
        let u = self.bin("mulf", x, x);
        let p = self.horner(&u, &TANH);
        let p = self.bin("mulf", &p, &u);
        let small = self.fma(&p, x, x);
        let a2 = self.bin("addf", &a, &a);
        let e = self.exp(&a2);
        let (one, two) = (self.k(1.0), self.k(2.0));
        let d = self.bin("addf", &e, &one);
        let d = self.bin("divf", &two, &d);
        let g = self.bin("subf", &one, &d);
        let g = self.copysign(&g, x);
        let lim = self.k(0.625);
        self.choose("olt", &a, &lim, &small, &g)
    }
    /// Error function.
    pub fn erf(&mut self, x: &Val) -> Val {
        let four = self.k(4.0);
        let a = self.abs(x);
        let a = self.bin("minimumf", &a, &four);
        let u = self.bin("mulf", x, x);
        let p = self.horner(&u, &ERF_SMALL);
        let small = self.bin("mulf", &p, x);
        let q = self.horner(&a, &ERF_BIG);
        let e = self.exp(&q);
        let one = self.k(1.0);
        let g = self.bin("subf", &one, &e);
        let g = self.copysign(&g, x);
        let lim = self.k(0.9);
        self.choose("olt", &a, &lim, &small, &g)
    }
}
