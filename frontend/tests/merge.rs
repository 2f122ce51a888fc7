//! Adapters combined, beside what PEFT's `add_weighted_adapter` makes of them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use pleach_frontend::adapter::{Combination, SlotData, combine};
use pleach_frontend::{Adapter, Checkpoint, TensorTable};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// Module, A and B, rank.
type Merged = (String, [Vec<f32>; 2], usize);

/// Every module of a combination.
fn combined(kind: &str, density: f64, seed: u64) -> Result<Vec<Merged>, String> {
    ranked(kind, density, seed, None)
}

fn ranked(kind: &str, density: f64, seed: u64, rank: Option<u64>) -> Result<Vec<Merged>, String> {
    let base = Checkpoint::open(&fixtures().join("train/models/llama")).unwrap();
    let open = |name| Adapter::open(&fixtures().join("merge").join(name), None, &base.modules).unwrap();
    // Tests run at once and may ask for the same combination: each call has a folder of its own.
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("merge-{}-{call}", std::process::id()));
    std::fs::create_dir_all(&out).unwrap();
    let how = Combination { kind: kind.into(), weights: vec![0.7, -0.4], density, rank, seed };
    let (rank, modules) = combine(&[open("a"), open("b")], &how, &base, &out).map_err(|e| e.to_string())?;
    let adapter = Adapter::open(&out, None, &base.modules).unwrap();
    assert_eq!((adapter.sites.len(), adapter.sites[0].scale), (modules, 1.0));
    let value = |s: &pleach_frontend::adapter::Site, part: &str| match s.values[part].read(&base).unwrap().data {
        SlotData::F32(x) => x,
        SlotData::I32(_) => panic!("{part} holds indices"),
    };
    let site = |s: &pleach_frontend::adapter::Site| {
        (s.module.clone(), [value(s, "lora_A"), value(s, "lora_B")], rank as usize)
    };
    let merged = adapter.sites.iter().map(site).collect();
    std::fs::remove_dir_all(&out).unwrap();
    Ok(merged)
}

fn product(a: &[f32], b: &[f32], rank: usize) -> Vec<f32> {
    let (input, output) = (a.len() / rank, b.len() / rank);
    let at =
        |i: usize, j: usize| (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * input + j])).sum::<f64>();
    (0..output).flat_map(|i| (0..input).map(move |j| at(i, j) as f32)).collect()
}

fn close(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-5, "{what} is {worst} off");
}

#[test]
fn combinations_are_those_of_peft() {
    let expected = TensorTable::open_file(&fixtures().join("merge/expected.safetensors")).unwrap();
    let read = |name: &str| expected.get(name).unwrap_or_else(|| panic!("no {name}")).read_f32().unwrap();
    let mut compared = 0;
    for kind in Combination::KINDS {
        let density = if kind.starts_with("dare") { 1.0 } else { 0.45 };
        if !expected.names().any(|n| n.starts_with(&format!("{kind}."))) {
            continue;
        }
        for (module, [a, b], rank) in combined(kind, density, 0).unwrap() {
            let what = format!("{kind}.{module}");
            if kind.ends_with("svd") || kind.starts_with("lego") {
                close(&product(&a, &b, rank), &read(&what), &what);
                compared += 1;
            } else {
                close(&a, &read(&format!("{what}.lora_A")), &what);
                close(&b, &read(&format!("{what}.lora_B")), &what);
                compared += 2;
            }
        }
    }
    assert_eq!(compared, expected.len());
}

#[test]
fn as_many_groups_as_ranks_are_the_sum() {
    let (groups, whole) = (ranked("lego_plain", 1.0, 0, Some(8)).unwrap(), combined("cat", 1.0, 0).unwrap());
    for ((module, [a, b], rank), (_, [x, y], of)) in groups.iter().zip(&whole) {
        close(&product(a, b, *rank), &product(x, y, *of), module);
    }
    let scaled = ranked("lego", 1.0, 0, Some(8)).unwrap();
    assert_ne!(scaled[0].1, groups[0].1, "4 ranks each, 8 groups: the output is scaled");
}

#[test]
fn dare_drops_its_part_and_keeps_the_mean() {
    let whole = combined("dare_linear", 1.0, 0).unwrap();
    let (half, again, other) =
        (combined("dare_linear", 0.5, 3), combined("dare_linear", 0.5, 3), combined("dare_linear", 0.5, 4));
    let (half, again, other) = (half.unwrap(), again.unwrap(), other.unwrap());
    assert!(half == again && half != other, "the seed decides");
    // v_proj has one adapter only: a value is dropped, or doubled.
    let (mut kept, mut all) = (0, 0);
    for ((module, x, _), (_, y, _)) in half.iter().zip(&whole).filter(|p| p.0.0.ends_with("v_proj")) {
        for (x, y) in x.iter().flatten().zip(y.iter().flatten()) {
            assert!(*x == 0.0 || (x - 2.0 * y).abs() < 1e-5, "{module}: {x} of {y}");
            kept += usize::from(*x != 0.0);
            all += 1;
        }
    }
    let part = kept as f64 / all as f64;
    assert!((part - 0.5).abs() < 0.1, "{part} of {all} are kept");
}

#[test]
fn what_does_not_fit_is_refused() {
    assert!(combined("mean", 1.0, 0).unwrap_err().contains("known are linear"));
    assert!(combined("ties", 0.0, 0).unwrap_err().contains("density"));
}
