//! Several finished LoRA adapters made into one, with the results of PEFT's `add_weighted_adapter`.
//!
//! The result has scale 1. `linear`, `ties` (Yadav et al. 2023), `dare` (Yu et al. 2024) and `magnitude_prune` work on the factors, each
//! scaled by √|weight · scale|; `cat` stacks ranks and is exact; the forms that end in `svd` work on the products and cut them to a
//! rank; `lego` groups ranks by likeness ([`super::cluster`]), which PEFT does not have. Adapters that are no LoRA, or that replace whole modules, are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::Site;
use super::cluster::cluster;
use super::svd::{Matrix, svd};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::peft::{Adapter, PREFIX};
use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// What is done with the factors, or with the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Linear,
    Prune,
    Ties,
    DareLinear,
    DareTies,
}

/// How adapters are combined.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    /// PEFT's `combination_type`, or `lego` (`lego_plain` without its scales).
    pub kind: String,
    /// One weight per adapter.
    pub weights: Vec<f64>,
    /// Part of the values that is kept, where values are dropped.
    pub density: f64,
    /// Rank of the result, for the forms that end in `svd` and for `lego`; the largest of the adapters' without.
    pub rank: Option<u64>,
    /// Keys what `dare` drops.
    pub seed: u64,
}

impl Combination {
    /// Every kind.
    pub const KINDS: [&'static str; 13] = [
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_linear_svd",
        "dare_ties",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
        "lego",
        "lego_plain",
    ];

    fn rule(&self) -> Rule {
        match self.kind.trim_end_matches("_svd") {
            "magnitude_prune" => Rule::Prune,
            "ties" => Rule::Ties,
            "dare_linear" => Rule::DareLinear,
            "dare_ties" => Rule::DareTies,
            _ => Rule::Linear,
        }
    }

    /// Tensors of one shape with their weights to one.
    fn merge(&self, mut tensors: Vec<Vec<f32>>, weights: &[f32], name: &str) -> Vec<f32> {
        let rule = self.rule();
        for (i, t) in tensors.iter_mut().enumerate().filter(|_| self.density < 1.0) {
            match rule {
                Rule::Linear => {}
                Rule::Prune | Rule::Ties => keep_largest(t, self.density),
                Rule::DareLinear | Rule::DareTies => drop_random(t, self.density, self.seed, &format!("{name}.{i}")),
            }
        }
        let elect = matches!(rule, Rule::Ties | Rule::DareTies);
        let one = |k: usize| {
            let values = || tensors.iter().map(|t| t[k]);
            if !elect {
                return values().zip(weights).map(|(x, w)| x * w).sum::<f32>();
            }
            let up = values().sum::<f32>() >= 0.0;
            let (mut sum, mut n) = (0.0, 0.0f32);
            for (x, w) in values().zip(weights).filter(|(x, _)| *x != 0.0 && (*x > 0.0) == up) {
                sum += x * w;
                n += 1.0;
            }
            sum / n.max(1.0)
        };
        (0..tensors.first().map_or(0, Vec::len)).map(one).collect()
    }
}

/// Everything but the part with the largest magnitudes becomes zero.
fn keep_largest(t: &mut [f32], density: f64) {
    let k = (density * t.len() as f64) as usize;
    let mut order: Vec<usize> = (0..t.len()).collect();
    order.sort_by(|a, b| t[*b].abs().total_cmp(&t[*a].abs()).then(a.cmp(b)));
    order[k..].iter().for_each(|i| t[*i] = 0.0);
}

/// Values are dropped at random, the others scaled so that the mean stays.
fn drop_random(t: &mut [f32], density: f64, seed: u64, name: &str) {
    for (i, x) in t.iter_mut().enumerate() {
        *x = if super::schedule::draw(name, seed, i as u64) < density { *x / density as f32 } else { 0.0 };
    }
}

/// The factors of one site: A [r, in] and B [out, r].
struct Factors {
    rank: u64,
    scale: f64,
    a: Vec<f32>,
    b: Vec<f32>,
}

fn factors(site: &Site, base: &Checkpoint) -> Result<Factors> {
    let read = |part: &str| site.floats(part, base);
    Ok(Factors { rank: site.rank, scale: site.scale, a: read("lora_A")?, b: read("lora_B")? })
}

/// Writes the combined adapter, `adapter_config.json` and `adapter_model.safetensors`, into the folder `out`, which must exist. Gives
/// its rank and its number of modules.
///
/// # Errors
/// A combination that is not known or does not fit the adapters, values that cannot be read, files that cannot be written.
pub fn combine(adapters: &[Adapter], how: &Combination, base: &Checkpoint, out: &Path) -> Result<(u64, usize)> {
    let rank = check(adapters, how)?;
    let modules: BTreeSet<&str> = adapters.iter().flat_map(|a| a.sites.iter().map(|s| s.module.as_str())).collect();
    let mut tensors: BTreeMap<String, (Vec<u64>, Vec<f32>)> = BTreeMap::new();
    for module in &modules {
        let of: Vec<(&Site, f64)> =
            adapters.iter().zip(&how.weights).filter_map(|(a, w)| Some((a.site(module)?, *w))).collect();
        let Some((site, _)) = of.first() else { continue };
        let parts = of.iter().map(|(s, w)| Ok((factors(s, base)?, *w))).collect::<Result<Vec<(Factors, f64)>>>()?;
        let (a, b) = one(&parts, how, site, rank)?;
        let buffers = adapters[0].config.method.buffers(site);
        for (part, values, shape) in [("lora_A", a, [rank, site.input]), ("lora_B", b, [site.output, rank])] {
            let file = buffers.iter().find(|x| x.part == part).and_then(|x| x.file).unwrap_or(part);
            tensors.insert(format!("{PREFIX}{module}.{file}"), (shape.to_vec(), values));
        }
    }
    let declared: Vec<_> = tensors.iter().map(|(n, t)| (n.clone(), Dtype::F32, t.0.clone())).collect();
    let mut writer = Writer::create(&out.join("adapter_model.safetensors"), &declared)?;
    tensors.values().try_for_each(|t| writer.write_f32(&t.1))?;
    writer.finish()?;
    let mut map = adapters[0].config.saved();
    let more = [
        ("base_model_name_or_path", json!(adapters[0].config.raw.get("base_model_name_or_path"))),
        ("r", json!(rank)),
        ("lora_alpha", json!(rank)),
        ("use_rslora", json!(false)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("target_modules", json!(modules)),
        ("exclude_modules", Value::Null),
        ("layers_to_transform", Value::Null),
        ("layers_pattern", Value::Null),
    ];
    map.extend(more.map(|(key, value)| (key.to_owned(), value)));
    map.sort_keys();
    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{:#}\n", Value::Object(map))).map_err(Error::io("write", &path))?;
    Ok((rank, modules.len()))
}

/// The rank of the result.
fn check(adapters: &[Adapter], how: &Combination) -> Result<u64> {
    let refuse = |what: String| Err(Error::Pattern { pattern: "merge".into(), what });
    if !Combination::KINDS.contains(&how.kind.as_str()) {
        return refuse(format!("`{}` is no combination; known are {}", how.kind, Combination::KINDS.join(", ")));
    }
    if adapters.is_empty() || how.weights.len() != adapters.len() {
        return refuse(format!("{} adapters need as many weights, not {}", adapters.len(), how.weights.len()));
    }
    if !(how.density > 0.0 && how.density <= 1.0) {
        return refuse(format!("a density of {} keeps nothing; it is above 0 and at most 1", how.density));
    }
    for a in adapters {
        if !matches!(a.config.method.name(), "lora" | "rslora") {
            let hint = "`pleach adapter convert --to lora` makes one of an adapter that has such a form";
            let (name, method) = (&a.name, a.config.method.name());
            return refuse(format!("`{name}` is {method}; only LoRA adapters are merged; {hint}"));
        }
        if !a.replaced.is_empty() {
            return refuse(format!("`{}` replaces {} as a whole, which cannot be merged", a.name, a.replaced[0].path));
        }
    }
    let ranks: Vec<u64> = adapters.iter().map(|a| a.sites.iter().map(|s| s.rank).max().unwrap_or(1)).collect();
    let largest = ranks.iter().copied().max().unwrap_or(1);
    match how.kind.as_str() {
        "cat" => Ok(ranks.iter().sum()),
        kind if kind.ends_with("svd") || kind.starts_with("lego") => Ok(how.rank.unwrap_or(largest).max(1)),
        kind if adapters.iter().flat_map(|a| &a.sites).any(|s| s.rank != largest) => {
            refuse(format!("{kind} needs adapters of one rank; these have {ranks:?}; take cat or svd"))
        }
        _ => Ok(largest),
    }
}

/// A [rank, in] and B [out, rank] of one site.
fn one(parts: &[(Factors, f64)], how: &Combination, site: &Site, rank: u64) -> Result<(Vec<f32>, Vec<f32>)> {
    let (input, output, rank) = (site.input as usize, site.output as usize, rank as usize);
    if how.kind == "cat" {
        let (mut a, mut b, mut at) = (vec![0.0; rank * input], vec![0.0; output * rank], 0);
        for (f, w) in parts {
            let r = f.rank as usize;
            let factor = (w * f.scale) as f32;
            a[at * input..(at + r) * input].iter_mut().zip(&f.a).for_each(|(x, y)| *x = y * factor);
            for row in 0..output {
                b[row * rank + at..row * rank + at + r].copy_from_slice(&f.b[row * r..(row + 1) * r]);
            }
            at += r;
        }
        return Ok((a, b));
    }
    let root = |(f, w): &(Factors, f64)| (w * f.scale).abs().sqrt() as f32;
    let sign = |(f, w): &(Factors, f64)| if w * f.scale < 0.0 { -1.0f32 } else { 1.0 };
    if how.kind.starts_with("lego") {
        let mut units = vec![];
        for (p, k) in parts.iter().flat_map(|p| (0..p.0.rank as usize).map(move |k| (p, k))) {
            let r = p.0.rank as usize;
            let row = p.0.a[k * input..(k + 1) * input].iter().map(|x| f64::from(x * root(p) * sign(p)));
            let column = (0..output).map(|i| f64::from(p.0.b[i * r + k] * root(p)));
            units.push(row.chain(column).collect());
        }
        let mean = units.len() as f64 / parts.len().max(1) as f64;
        let (mut a, mut b) = (vec![0.0; rank * input], vec![0.0; output * rank]);
        for (k, unit) in cluster(&units, rank, mean, how.kind == "lego").iter().enumerate() {
            a[k * input..(k + 1) * input].iter_mut().zip(unit).for_each(|(x, y)| *x = *y as f32);
            (0..output).for_each(|i| b[i * rank + k] = unit[input + i] as f32);
        }
        return Ok((a, b));
    }
    if !how.kind.ends_with("svd") {
        let of_a: Vec<f32> = parts.iter().map(|p| root(p) * sign(p)).collect();
        let of_b: Vec<f32> = parts.iter().map(root).collect();
        let (all_a, all_b) = parts.iter().map(|p| (p.0.a.clone(), p.0.b.clone())).unzip();
        let name = |part: &str| format!("{}.{part}", site.module);
        return Ok((how.merge(all_a, &of_a, &name("lora_A")), how.merge(all_b, &of_b, &name("lora_B"))));
    }
    let (u, s, v) = if how.rule() == Rule::Linear {
        // Of B · A without ever making it: first B's own decomposition, then that of what is left.
        let total: usize = parts.iter().map(|p| p.0.rank as usize).sum();
        let (a, b) = one(parts, &Combination { kind: "cat".into(), ..how.clone() }, site, total as u64)?;
        let (u, s, v) = decomposed(&Matrix::new(output, total, &b), site)?;
        let k = s.len();
        let mut rest = v.transposed();
        (0..k).for_each(|i| rest.row_mut(i).iter_mut().for_each(|x| *x *= s[i]));
        let (z, t, w) = decomposed(&rest.times(&Matrix::new(total, input, &a)), site)?;
        (u.times(&z), t, w)
    } else {
        let delta = |(f, _): &(Factors, f64)| {
            let r = f.rank as usize;
            let product = Matrix::new(output, r, &f.b).times(&Matrix::new(r, input, &f.a));
            product.values.iter().map(|x| (x * f.scale) as f32).collect::<Vec<f32>>()
        };
        let weights: Vec<f32> = parts.iter().map(|p| p.1 as f32).collect();
        let whole = how.merge(parts.iter().map(delta).collect(), &weights, &site.module);
        decomposed(&Matrix::new(output, input, &whole), site)?
    };
    let (mut a, mut b) = (vec![0.0; rank * input], vec![0.0; output * rank]);
    for k in 0..rank.min(s.len()) {
        (0..input).for_each(|i| a[k * input + i] = v.at(i, k) as f32);
        (0..output).for_each(|i| b[i * rank + k] = (u.at(i, k) * s[k]) as f32);
    }
    Ok((a, b))
}

fn decomposed(x: &Matrix, site: &Site) -> Result<(Matrix, Vec<f64>, Matrix)> {
    svd(x).ok_or_else(|| Error::Graph(format!("the adapters of {} hold values that are no numbers", site.module)))
}
