//! Attention over packed sequences, its log-sum-exp and its gradients. Plain loops; all accumulate in f64 and round once.

use super::contract::dot;
use super::tensor::Tensor;
use crate::op::{AttentionAttrs, AttentionWrt};
use crate::types::DType;

/// Sizes and checked segment bounds.
struct Packed<'a> {
    heads: usize,
    kv_heads: usize,
    hd: usize,
    scale: f64,
    at: &'a AttentionAttrs,
    segments: &'a [i32],
    start: &'a [i32],
    len: &'a [i32],
}

/// One query of one head with the keys it sees.
struct Pair {
    /// Row of q.
    row: usize,
    /// Query head.
    head: usize,
    /// First element of the query in q (and out, and d_out).
    at: usize,
    /// For every key: the first element of its head in k (and v).
    keys: Vec<usize>,
}

fn bounds<'a>(t: &'a Tensor, what: &str) -> Result<&'a [i32], String> {
    let v = t.as_i32().ok_or_else(|| format!("{what} must be i32"))?;
    match v.iter().find(|x| **x < 0) {
        Some(x) => Err(format!("{what} has a negative element {x}")),
        None => Ok(v),
    }
}

impl<'a> Packed<'a> {
    fn new(at: &'a AttentionAttrs, q: &Tensor, k: &Tensor, x: &[&'a Tensor]) -> Result<Packed<'a>, String> {
        let (heads, kv_heads, hd) = (at.heads as usize, at.kv_heads as usize, at.head_dim as usize);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err("kv_heads must divide heads".into());
        }
        if at.window.is_some() && !at.causal {
            return Err("a window needs causal attention".into());
        }
        let (segments, start, len) = (bounds(x[0], "q_segments")?, bounds(x[1], "kv_start")?, bounds(x[2], "kv_len")?);
        let (tokens, keys) = (q.shape[0] as usize, k.shape[0] as usize);
        let ends_meet = segments.first() == Some(&0) && segments.last().map(|e| *e as usize) == Some(tokens);
        if segments.len() != len.len() + 1 || start.len() != len.len() {
            return Err(format!("{} segment bounds for {} sequences", segments.len(), len.len()));
        }
        if !ends_meet || segments.windows(2).any(|w| w[0] > w[1]) {
            return Err(format!("q_segments must ascend from 0 to the number of tokens {tokens}"));
        }
        for s in 0..len.len() {
            let (k0, kn, qn) = (start[s] as usize, len[s] as usize, (segments[s + 1] - segments[s]) as usize);
            if k0 + kn > keys {
                return Err(format!("sequence {s} reads keys {k0}..{} of {keys}", k0 + kn));
            }
            if qn > 0 && (kn == 0 || at.causal && kn < qn) {
                return Err(format!("sequence {s} has {qn} queries but {kn} keys"));
            }
        }
        if at.window == Some(0) {
            return Err("a window of no keys".into());
        }
        Ok(Packed { heads, kv_heads, hd, scale: f64::from(f32::from_bits(at.scale)), at, segments, start, len })
    }

    /// Every query of every head, in the order of rows, then heads.
    fn each(&self, mut f: impl FnMut(Pair)) {
        let (qw, kw) = (self.heads * self.hd, self.kv_heads * self.hd);
        for s in 0..self.len.len() {
            let (q0, qn) = (self.segments[s] as usize, (self.segments[s + 1] - self.segments[s]) as usize);
            let (k0, kn) = (self.start[s] as usize, self.len[s] as usize);
            for i in 0..qn {
                // The last query stands at the last key.
                let hi = if self.at.causal { kn - qn + i + 1 } else { kn };
                let lo = self.at.window.map_or(0, |w| hi.saturating_sub(w as usize));
                for head in 0..self.heads {
                    let group = head / (self.heads / self.kv_heads) * self.hd;
                    let keys = (lo..hi).map(|j| (k0 + j) * kw + group).collect();
                    f(Pair { row: q0 + i, head, at: (q0 + i) * qw + head * self.hd, keys });
                }
            }
        }
    }

    fn scores(&self, p: &Pair, q: &[f32], k: &[f32]) -> Vec<f64> {
        p.keys.iter().map(|j| dot(&q[p.at..][..self.hd], &k[*j..][..self.hd]) * self.scale).collect()
    }
}

/// The largest score and the sum of exp(score - largest).
fn sum_exp(scores: &[f64]) -> (f64, f64) {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (top, scores.iter().map(|s| (s - top).exp()).sum())
}

fn add(to: &mut [f64], w: f64, x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(a, y)| *a += w * f64::from(*y));
}

pub(super) fn forward(at: &AttentionAttrs, x: &[&Tensor]) -> Result<Tensor, String> {
    let p = Packed::new(at, x[0], x[1], &x[3..])?;
    let (q, k, v) = (x[0].floats(), x[1].floats(), x[2].floats());
    let mut out = vec![0f32; q.len()];
    p.each(|c| {
        let scores = p.scores(&c, &q, &k);
        let (top, total) = sum_exp(&scores);
        let mut acc = vec![0f64; p.hd];
        for (j, s) in c.keys.iter().zip(&scores) {
            add(&mut acc, (s - top).exp(), &v[*j..][..p.hd]);
        }
        out[c.at..][..p.hd].iter_mut().zip(acc).for_each(|(o, a)| *o = (a / total) as f32);
    });
    Ok(Tensor::from_floats(x[0].dtype(), x[0].shape.clone(), out))
}

pub(super) fn lse(at: &AttentionAttrs, x: &[&Tensor]) -> Result<Tensor, String> {
    let p = Packed::new(at, x[0], x[1], &x[2..])?;
    let (q, k) = (x[0].floats(), x[1].floats());
    let mut out = vec![0f32; x[0].shape[0] as usize * p.heads];
    p.each(|c| {
        let (top, total) = sum_exp(&p.scores(&c, &q, &k));
        out[c.row * p.heads + c.head] = (top + total.ln()) as f32;
    });
    Ok(Tensor { shape: vec![x[0].shape[0], p.heads as u64], data: super::Data::F32(out) })
}

/// With P = exp(scores - lse) and dS = P·(d_out·vᵀ - rowsum(d_out·out)): dv = Pᵀ·d_out, dq = scale·dS·k, dk = scale·dSᵀ·q.
pub(super) fn gradient(at: &AttentionAttrs, wrt: AttentionWrt, x: &[&Tensor]) -> Result<Tensor, String> {
    let p = Packed::new(at, x[0], x[1], &x[6..])?;
    let [q, k, v, out, lse, d_out] = [0, 1, 2, 3, 4, 5].map(|i| x[i].floats());
    if x[4].dtype() != DType::F32 || lse.len() != x[0].shape[0] as usize * p.heads {
        return Err(format!("lse is {}", x[4].describe()));
    }
    let like = x[wrt as usize];
    let mut acc = vec![0f64; like.data.len()];
    p.each(|c| {
        let dy = &d_out[c.at..][..p.hd];
        let mean = dot(dy, &out[c.at..][..p.hd]);
        let top = f64::from(lse[c.row * p.heads + c.head]);
        for (j, s) in c.keys.iter().zip(p.scores(&c, &q, &k)) {
            let w = (s - top).exp();
            let ds = w * (dot(dy, &v[*j..][..p.hd]) - mean) * p.scale;
            match wrt {
                AttentionWrt::Q => add(&mut acc[c.at..][..p.hd], ds, &k[*j..][..p.hd]),
                AttentionWrt::K => add(&mut acc[*j..][..p.hd], ds, &q[c.at..][..p.hd]),
                AttentionWrt::V => add(&mut acc[*j..][..p.hd], w, dy),
            }
        }
    });
    Ok(Tensor::from_floats(like.dtype(), like.shape.clone(), acc.into_iter().map(|a| a as f32).collect()))
}
