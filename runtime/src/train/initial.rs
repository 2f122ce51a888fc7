//! The first values of a new adapter, made from the recipes that its plan carries.
//!
//! Random recipes are keyed by (seed, key of the tensor): a value depends neither on the order of making nor on threads.
//! Norms are summed in f64, row by row, so that no second copy of a weight is made.

use super::adapter::{AdapterPlan, Init, Norms, Scores, TensorPlan};
use super::data::fnv1a;
use crate::cast::cast;
use crate::error::{Result, RuntimeError};
use crate::weights::{InMemory, Tensor, TensorSource};
use pleach_plan::DType;
use pleach_plan::random::{self, Philox, Twister};
use std::collections::BTreeMap;

/// Values of one tensor.
#[derive(Clone, Debug, PartialEq)]
enum Made {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

/// What was made beforehand for the tensors that ask for it, by their keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Sums of squares of a weight's gradient, by column, that calibration measured.
    pub squares: BTreeMap<String, Vec<f64>>,
    /// Values of tensors that are prepared.
    pub values: BTreeMap<String, Vec<f32>>,
}

impl Measured {
    /// Nothing.
    pub fn new() -> Measured {
        Measured::default()
    }
}

/// The values of all tensors of a slot, by key.
///
/// # Errors
/// A tensor of the base that is missing or does not fit, and a recipe that asks for a measurement that was not made.
pub fn initial_values(plan: &AdapterPlan, base: &dyn TensorSource, seed: u64, measured: &Measured) -> Result<InMemory> {
    let mut made: BTreeMap<&str, Made> = BTreeMap::new();
    // Norms may ask for other tensors of the slot, which come first.
    let norms = |t: &&TensorPlan| matches!(t.init, Init::RowNorms(_) | Init::ColumnNorms(_));
    for t in plan.tensors.iter().filter(|t| !norms(t)).chain(plan.tensors.iter().filter(norms)) {
        let value = make(t, base, seed, measured, &made)
            .map_err(|why| RuntimeError::Values(format!("the initial value of `{}` cannot be made: {why}", t.key)))?;
        made.insert(&t.key, value);
    }
    let mut out = InMemory::new();
    for t in &plan.tensors {
        match made.remove(t.key.as_str()) {
            Some(Made::F32(v)) => out = out.f32(t.key.clone(), &t.shape, &v),
            Some(Made::I32(v)) => {
                out.insert(t.key.clone(), DType::I32, &t.shape, v.iter().flat_map(|x| x.to_le_bytes()).collect());
            }
            None => {}
        }
    }
    Ok(out)
}

fn make(
    t: &TensorPlan,
    base: &dyn TensorSource,
    seed: u64,
    measured: &Measured,
    made: &BTreeMap<&str, Made>,
) -> std::result::Result<Made, String> {
    let n = t.shape.iter().product::<u64>() as usize;
    let draws = Draws::new(seed, &t.key);
    let value = match &t.init {
        Init::Zeros {} => Made::F32(vec![0.0; n]),
        Init::Constant { value } => Made::F32(vec![*value; n]),
        Init::Leading { count } => Made::F32((0..n as u64).map(|i| f32::from(u8::from(i < *count))).collect()),
        Init::Uniform { bound } => Made::F32((0..n).map(|i| (draws.unit(i) * 2.0 - 1.0) as f32 * bound).collect()),
        Init::Normal { std } => Made::F32((0..n).map(|i| (draws.normal(i) * f64::from(*std)) as f32).collect()),
        Init::Seeded { seed, bound } => Made::F32(random::uniform(*seed, &t.key, n, *bound)),
        Init::Twister { seed, skip, bound } => Made::F32(Twister::new(*seed).uniform(*skip, n, *bound)),
        Init::RandomCells { rows, columns } => {
            let cells = draws.distinct(n / 2, rows * columns)?;
            let width = (*columns).max(1) as i32;
            Made::I32(cells.iter().map(|c| c / width).chain(cells.iter().map(|c| c % width)).collect())
        }
        Init::Base { tensor } => {
            let mut all = Vec::with_capacity(n);
            let w = find(base, tensor)?;
            for_rows(w, |_, row| all.extend_from_slice(row));
            base.release(tensor);
            Made::F32(all)
        }
        Init::RowNorms(norms) => Made::F32(lengths(norms, false, base, made)?),
        Init::ColumnNorms(norms) => Made::F32(lengths(norms, true, base, made)?),
        Init::RandomIndices { from } => Made::I32(draws.distinct(n, *from)?),
        Init::Units { units, first, by } => {
            let chosen = match by {
                None => draws.distinct(*first as usize, *units)?,
                Some(scores) => largest(&unit_scores(scores, *units as usize, base)?, *first as usize)?,
            };
            let rest = (0..*units as i32).filter(|u| chosen.binary_search(u).is_err());
            Made::I32(chosen.iter().copied().chain(rest).take(n).collect())
        }
        Init::LargestColumns { tensor } => {
            let w = find(base, tensor)?;
            let mut squares = vec![0.0; w.shape.last().copied().unwrap_or(0) as usize];
            for_rows(w, |_, row| squares.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x)));
            base.release(tensor);
            Made::I32(largest(&squares, n)?)
        }
        Init::LargestGradientColumns { .. } => {
            let squares = measured.squares.get(&t.key).ok_or("the gradient of its weight was not measured")?;
            Made::I32(largest(squares, n)?)
        }
        Init::Prepared { .. } => Made::F32(measured.values.get(&t.key).ok_or("it was not prepared")?.clone()),
    };
    let len = match &value {
        Made::F32(v) => v.len(),
        Made::I32(v) => v.len(),
    };
    if len == n { Ok(value) } else { Err(format!("its recipe gives {len} values, it has {n}")) }
}

fn find<'b>(base: &'b dyn TensorSource, name: &str) -> std::result::Result<Tensor<'b>, String> {
    let t = base.tensor(name).ok_or_else(|| format!("the model has no tensor `{name}`"))?;
    if matches!(t.dtype, DType::F32 | DType::BF16 | DType::F16) {
        Ok(t)
    } else {
        Err(format!("`{name}` is {}, expected floats", t.dtype.name()))
    }
}

/// Calls with every row, the last dimension, as f32.
fn for_rows(t: Tensor<'_>, mut f: impl FnMut(usize, &[f32])) {
    let width = t.shape.last().copied().unwrap_or(1).max(1) as usize;
    let mut bytes = vec![0u8; width * 4];
    let mut row = vec![0.0f32; width];
    for (i, x) in t.bytes.chunks_exact(width * t.dtype.size() as usize).enumerate() {
        cast(t.dtype, x, DType::F32, &mut bytes);
        row.iter_mut().zip(bytes.as_chunks().0).for_each(|(r, b)| *r = f32::from_le_bytes(*b));
        f(i, &row);
    }
}

/// Lengths of the rows of W + scale · B · A, or of the columns of W + scale · (B · A)ᵀ; W is [rows, width].
fn lengths(
    n: &Norms,
    columns: bool,
    base: &dyn TensorSource,
    made: &BTreeMap<&str, Made>,
) -> std::result::Result<Vec<f32>, String> {
    let w = find(base, &n.weight)?;
    let (rows, width) = match w.shape {
        [r, c] => (*r as usize, *c as usize),
        other => return Err(format!("`{}` is {other:?}, expected a matrix", n.weight)),
    };
    let get = |key: &Option<String>| match key.as_deref().and_then(|k| made.get(k)) {
        Some(Made::F32(v)) => v.as_slice(),
        _ => &[],
    };
    let (a, b, scale) = (get(&n.a), get(&n.b), get(&n.scale).first().copied().map_or(1.0, f64::from));
    // A is [r, in] and B [out, r]; for columns W stands transposed, so its rows run over A's columns.
    let inner = if columns { a.len() / rows.max(1) } else { a.len() / width.max(1) };
    let product = inner > 0 && b.len() == inner * if columns { width } else { rows } && b.iter().any(|x| *x != 0.0);
    let mut squares = vec![0.0f64; if columns { width } else { rows }];
    for_rows(w, |i, row| {
        for (j, x) in row.iter().enumerate() {
            let mut y = f64::from(*x);
            if product {
                let (out, into, stride) = if columns { (j, i, rows) } else { (i, j, width) };
                let ba: f64 = (0..inner).map(|k| f64::from(b[out * inner + k]) * f64::from(a[k * stride + into])).sum();
                y += scale * ba;
            }
            squares[if columns { j } else { i }] += y * y;
        }
    });
    base.release(&n.weight);
    Ok(squares.into_iter().map(|s| s.sqrt() as f32).collect())
}

/// The score of every unit, as logarithms where norms are multiplied.
fn unit_scores(scores: &Scores, units: usize, base: &dyn TensorSource) -> std::result::Result<Vec<f64>, String> {
    let mut total = vec![0.0f64; units];
    for part in &scores.weights {
        let (w, width) = (find(base, &part.tensor)?, part.width.max(1) as usize);
        let along = if part.columns { w.shape.last() } else { w.shape.first() };
        if along != Some(&((units * width) as u64)) {
            return Err(format!("`{}` is {:?}, which does not hold {units} units of {width}", part.tensor, w.shape));
        }
        let mut squares = vec![0.0f64; units];
        for_rows(w, |i, row| match part.columns {
            true => row.iter().enumerate().for_each(|(j, x)| squares[j / width] += f64::from(*x) * f64::from(*x)),
            false => squares[i / width] += row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>(),
        });
        base.release(&part.tensor);
        let add = |(t, s): (&mut f64, f64)| *t += if scores.product { s.ln() } else { s };
        total.iter_mut().zip(squares).for_each(add);
    }
    Ok(total)
}

/// The places of the `n` largest values, ascending; the smaller place wins a tie.
fn largest(values: &[f64], n: usize) -> std::result::Result<Vec<i32>, String> {
    if n > values.len() {
        return Err(format!("{n} columns are asked for, the weight has {}", values.len()));
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    let mut out: Vec<i32> = order[..n].iter().map(|i| *i as i32).collect();
    out.sort_unstable();
    Ok(out)
}

/// Random numbers of one tensor.
struct Draws {
    random: Philox,
    name: u64,
}

impl Draws {
    fn new(seed: u64, key: &str) -> Draws {
        Draws { random: Philox::new(seed), name: fnv1a(key.bytes()) }
    }

    /// 64 bits for place `i`.
    fn word(&self, i: usize) -> u64 {
        let block = (i / 2) as u64;
        let w = self.random.at([block as u32, (block >> 32) as u32, self.name as u32, (self.name >> 32) as u32]);
        let at = i % 2 * 2;
        u64::from(w[at]) << 32 | u64::from(w[at + 1])
    }

    /// In `[0, 1)`.
    fn unit(&self, i: usize) -> f64 {
        (self.word(i) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal with variance 1 (Box and Muller), two from each pair of draws.
    fn normal(&self, i: usize) -> f64 {
        let (u, v) = (1.0 - self.unit(i & !1), self.unit(i | 1));
        let (r, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        r * if i.is_multiple_of(2) { angle.cos() } else { angle.sin() }
    }

    /// `n` distinct numbers below `from`, ascending.
    fn distinct(&self, n: usize, from: u64) -> std::result::Result<Vec<i32>, String> {
        if n as u64 > from || from > i32::MAX as u64 {
            return Err(format!("{n} distinct indices below {from} are asked for"));
        }
        let mut all: Vec<i32> = (0..from as i32).collect();
        for i in 0..n {
            let rest = (all.len() - i) as u128;
            all.swap(i, i + ((u128::from(self.word(i)) * rest) >> 64) as usize);
        }
        all.truncate(n);
        all.sort_unstable();
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(key: &str, shape: &[u64], init: serde_json::Value) -> TensorPlan {
        let v = serde_json::json!({"key": key, "file": null, "shape": shape, "dtype": "F32", "trained": true,
                                   "init": init});
        serde_json::from_value(v).unwrap()
    }

    fn values(plan: &[TensorPlan], base: &InMemory, seed: u64) -> InMemory {
        let plan = AdapterPlan {
            slot: 0,
            config: serde_json::Map::new(),
            tensors: plan.to_vec(),
            events: None,
            initial: None,
            preparation: None,
            ranks: vec![],
        };
        let measured = Measured {
            squares: BTreeMap::from([("g".into(), vec![1.0, 9.0, 9.0, 4.0])]),
            values: BTreeMap::from([("p".into(), vec![2.0, 1.0])]),
        };
        initial_values(&plan, base, seed, &measured).unwrap()
    }

    fn f32s(m: &InMemory, key: &str) -> Vec<f32> {
        m.tensor(key).unwrap().bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    fn i32s(m: &InMemory, key: &str) -> Vec<i32> {
        m.tensor(key).unwrap().bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn recipes_give_what_they_say() {
        let base = InMemory::new().f32("w", &[2, 3], &[3.0, 0.0, 4.0, 0.0, -5.0, 0.0]).f32(
            "v",
            &[1, 4],
            &[1.0, 0.0, 0.0, 2.0],
        );
        let j = |t: &str| serde_json::from_str(t).unwrap();
        let plan = [
            tensor("z", &[2], j(r#"{"zeros":{}}"#)),
            tensor("s", &[], j(r#"{"constant":{"value":2.0}}"#)),
            tensor("k", &[4], j(r#"{"leading":{"count":3}}"#)),
            tensor("a", &[1, 3], j(r#"{"constant":{"value":1.0}}"#)),
            tensor("b", &[2, 1], j(r#"{"constant":{"value":0.5}}"#)),
            tensor("m", &[2], j(r#"{"row_norms":{"weight":"w","a":null,"b":null,"scale":null}}"#)),
            tensor("mab", &[2], j(r#"{"row_norms":{"weight":"w","a":"a","b":"b","scale":"s"}}"#)),
            tensor("c", &[3], j(r#"{"column_norms":{"weight":"w","a":null,"b":null,"scale":null}}"#)),
            tensor("w2", &[2, 3], j(r#"{"base":{"tensor":"w"}}"#)),
            tensor("l", &[2], j(r#"{"largest_columns":{"tensor":"w"}}"#)),
            tensor("g", &[2], j(r#"{"largest_gradient_columns":{"tensor":"w","batches":1}}"#)),
            tensor("p", &[2], j(r#"{"prepared":{"kept":null}}"#)),
            tensor("r", &[5], j(r#"{"random_indices":{"from":9}}"#)),
            tensor("ur", &[9], j(r#"{"units":{"units":9,"first":4,"by":null}}"#)),
            tensor(
                "uk",
                &[1],
                j(r#"{"units":{"units":3,"first":1,"by":{"product":false,"weights":[
                {"tensor":"w","columns":true,"width":1}]}}}"#),
            ),
            tensor(
                "up",
                &[2],
                j(r#"{"units":{"units":2,"first":1,"by":{"product":true,"weights":[
                {"tensor":"w","columns":false,"width":1},{"tensor":"v","columns":true,"width":2}]}}}"#),
            ),
            tensor("u", &[4000], j(r#"{"uniform":{"bound":0.25}}"#)),
            tensor("n", &[4000], j(r#"{"normal":{"std":0.5}}"#)),
        ];
        let v = values(&plan, &base, 7);
        assert_eq!(
            (f32s(&v, "z"), f32s(&v, "s"), f32s(&v, "w2")),
            (vec![0.0; 2], vec![2.0], vec![3.0, 0.0, 4.0, 0.0, -5.0, 0.0])
        );
        assert_eq!(f32s(&v, "k"), [1.0, 1.0, 1.0, 0.0]);
        assert_eq!((f32s(&v, "m"), f32s(&v, "c")), (vec![5.0, 5.0], vec![3.0, 5.0, 4.0]));
        // Every element grows by 2 · 0.5 · 1.
        assert_eq!(f32s(&v, "mab"), [(16.0f32 + 1.0 + 25.0).sqrt(), (1.0f32 + 16.0 + 1.0).sqrt()]);
        assert_eq!((i32s(&v, "l"), i32s(&v, "g")), (vec![1, 2], vec![1, 2]));
        assert_eq!((i32s(&v, "uk"), i32s(&v, "up")), (vec![1], vec![1, 0]), "column 1 is longest; 5·1 < 5·2");
        let all = i32s(&v, "ur");
        assert!(all[..4].is_sorted() && all[4..].is_sorted() && !all.is_sorted(), "{all:?}");
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 9);
        assert_eq!(f32s(&v, "p"), [2.0, 1.0]);
        let r = i32s(&v, "r");
        assert!(r.windows(2).all(|w| w[0] < w[1]) && r.iter().all(|x| (0..9).contains(x)));
        let (u, n) = (f32s(&v, "u"), f32s(&v, "n"));
        assert!(u.iter().all(|x| x.abs() <= 0.25) && u.iter().any(|x| *x > 0.24) && u.iter().any(|x| *x < -0.24));
        let variance = n.iter().map(|x| x * x).sum::<f32>() / 4000.0;
        assert!((variance - 0.25).abs() < 0.02, "{variance}");
    }

    #[test]
    fn draws_depend_on_seed_and_key_alone() {
        let base = InMemory::new();
        let u = serde_json::json!({"uniform": {"bound": 1.0}});
        let (a, b) = (tensor("a", &[8], u.clone()), tensor("b", &[8], u));
        let one = values(&[a.clone(), b.clone()], &base, 1);
        let two = values(&[b, a.clone()], &base, 1);
        assert_eq!((f32s(&one, "a"), f32s(&one, "b")), (f32s(&two, "a"), f32s(&two, "b")));
        assert_ne!(f32s(&one, "a"), f32s(&one, "b"));
        assert_ne!(f32s(&one, "a"), f32s(&values(&[a], &base, 2), "a"));
    }
}
