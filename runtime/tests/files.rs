//! Weight files: what is read, and that damaged or hostile ones are refused with a reason.

use pleach_plan::DType;
use pleach_runtime::*;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};

fn folder(name: &str) -> PathBuf {
    let p = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("files-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&p);
    fs::create_dir_all(&p).unwrap();
    p
}

/// A safetensors file with this header.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn two() -> Vec<u8> {
    let h = r#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]}}"#;
    file(h, &[0, 0, 128, 63, 0, 0, 0, 64, 128, 63, 0, 64])
}

fn refused(path: &Path) -> String {
    match open_weights(path) {
        Ok(_) => panic!("{} is accepted", path.display()),
        Err(e) => e.to_string(),
    }
}

#[test]
fn reads_one_file_and_shards() {
    let d = folder("good");
    fs::write(d.join("model.safetensors"), two()).unwrap();
    for path in [d.clone(), d.join("model.safetensors")] {
        let w = open_weights(&path).unwrap();
        assert_eq!(w.names(), ["a", "b"]);
        let a = w.tensor("a").unwrap();
        assert_eq!((a.dtype, a.shape, a.bytes), (DType::F32, &[2, 1][..], &[0, 0, 128, 63, 0, 0, 0, 64][..]));
        assert_eq!(w.tensor("b").unwrap().dtype, DType::BF16);
        assert!(w.tensor("c").is_none());
        w.release("a");
        assert_eq!(w.tensor("a").unwrap().bytes[2], 128);
    }
    let d = folder("shards");
    fs::write(d.join("x-1.safetensors"), two()).unwrap();
    let h = r#"{"c":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
    fs::write(d.join("x-2.safetensors"), file(h, &[0; 8])).unwrap();
    let index =
        |map: &str| fs::write(d.join("model.safetensors.index.json"), format!("{{\"weight_map\":{map}}}")).unwrap();
    index(r#"{"a":"x-1.safetensors","b":"x-1.safetensors","c":"x-2.safetensors"}"#);
    let w = open_weights(&d).unwrap();
    assert_eq!(w.names(), ["a", "b", "c"]);
    assert!(w.tensor("c").is_none(), "a type no plan reads");
    index(r#"{"a":"x-1.safetensors","z":"x-2.safetensors"}"#);
    assert!(refused(&d).contains("lacks tensor `z`, which the index says is here"));
    index(r#"{"a":"../x-1.safetensors"}"#);
    assert!(refused(&d).contains("`../x-1.safetensors`, which is no file of its folder"));
    index(r#"{"a":"/etc/passwd"}"#);
    assert!(refused(&d).contains("no file of its folder"));
    index(r#"{"a":"x-3.safetensors"}"#);
    assert!(refused(&d).contains("x-3.safetensors"));
    index(r#"{"a":5}"#);
    assert!(refused(&d).contains("names no file for `a`"));
    index("7");
    assert!(refused(&d).contains("has no `weight_map`"));
    fs::copy(d.join("x-1.safetensors"), d.join("x-3.safetensors")).unwrap();
    index(r#"{"a":"x-1.safetensors","b":"x-3.safetensors"}"#);
    assert!(refused(&d).contains("is in another shard too"));
    fs::write(d.join("model.safetensors.index.json"), "{").unwrap();
    assert!(refused(&d).contains("is no JSON"));
    let d = folder("empty");
    assert!(refused(&d).contains("has neither `model.safetensors` nor"));
    assert!(refused(&d.join("nothing.safetensors")).contains("nothing.safetensors"));
}

#[test]
fn large_tensors_survive_release() {
    let d = folder("large");
    let n = 3 * 1024 * 1024usize;
    let data: Vec<u8> = (0..n * 4).map(|i| (i / 4096) as u8).collect();
    let h = format!(r#"{{"a":{{"dtype":"F32","shape":[{n}],"data_offsets":[0,{}]}}}}"#, n * 4);
    fs::write(d.join("model.safetensors"), file(&h, &data)).unwrap();
    let w = open_weights(&d).unwrap();
    assert_eq!(w.tensor("a").unwrap().bytes, data);
    w.release("a");
    w.release("nothing");
    assert_eq!(w.tensor("a").unwrap().bytes, data);
}

#[test]
fn every_cut_and_hostile_headers_are_refused() {
    let d = folder("bad");
    let path = d.join("model.safetensors");
    let good = two();
    for n in 0..good.len() {
        fs::write(&path, &good[..n]).unwrap();
        let e = refused(&d);
        assert!(e.contains("model.safetensors") && e.contains("fetch it again"), "{n}: {e}");
    }
    let entry =
        |shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    for header in [
        entry("[2]", "[0,4]"),
        entry("[2]", "[8,0]"),
        entry("[2]", "[4,12]"),
        entry("[18446744073709551615,2]", "[0,8]"),
        entry("[4611686018427387904]", "[0,8]"),
        entry("[-2]", "[0,8]"),
        entry("[2]", "[0,18446744073709551615]"),
        r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#.into(),
        "[]".into(),
        String::new(),
        "[".repeat(5000),
    ] {
        fs::write(&path, file(&header, &[0; 8])).unwrap();
        refused(&d);
    }
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &[b'{'; 100]].concat()).unwrap();
    refused(&d);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_headers_never_crash(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let d = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("flips-{}", std::process::id()));
        let _ = fs::create_dir_all(&d);
        let mut b = two();
        let n = b.len();
        for (i, v) in flips {
            b[i.index(n)] = v;
        }
        let path = d.join("model.safetensors");
        fs::write(&path, &b).unwrap();
        if let Ok(w) = open_weights(&path) {
            for n in w.names() {
                if let Some(t) = w.tensor(n) {
                    let want: u64 = t.shape.iter().product::<u64>() * t.dtype.size();
                    prop_assert_eq!(t.bytes.len() as u64, want);
                }
                w.release(n);
            }
        }
    }
}
