//! A block of values in registers, turned.

use super::{Func, Val, vty};

/// The columns of a square block whose rows are vectors of 2^n elements, by swapping ever smaller blocks: n rounds of two-operand
/// shuffles.
pub(crate) fn transpose(f: &mut Func, mut rows: Vec<Val>, elem: &str) -> Vec<Val> {
    let lanes = rows.len();
    let t = vty(lanes, elem);
    let mut d = lanes / 2;
    while d > 0 {
        for i in (0..lanes).filter(|i| i & d == 0) {
            let (a, b) = (rows[i].clone(), rows[i + d].clone());
            let pick = |high: usize| {
                let at = |l: usize| if l & d == 0 { l + high } else { lanes + l - d + high };
                (0..lanes).map(|l| at(l).to_string()).collect::<Vec<_>>().join(", ")
            };
            rows[i] = f.op(format!("vector.shuffle {a}, {b} [{}] : {t}, {t}", pick(0)));
            rows[i + d] = f.op(format!("vector.shuffle {a}, {b} [{}] : {t}, {t}", pick(d)));
        }
        d /= 2;
    }
    rows
}
