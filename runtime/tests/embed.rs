//! Embedding: the Rust and the C example run a plan from files; the header is current and small; C calls fail cleanly.

mod common;

use common::*;
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The folder with this build's results: `target/debug`.
fn build() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    exe.ancestors().nth(2).unwrap().to_path_buf()
}

/// Writes the toy as files: plan, weights.
fn files(name: &str) -> (PathBuf, PathBuf) {
    let d = folder(name);
    plan().write(&d.join("toy.pleach")).unwrap();
    let (emb, head) = (noise(V * D, 1), noise(V * D, 2));
    let n = V * D * 4;
    let header = format!(
        r#"{{"emb":{{"dtype":"F32","shape":[{V},{D}],"data_offsets":[0,{n}]}},"head":{{"dtype":"F32","shape":[{V},{D}],"data_offsets":[{n},{}]}}}}"#,
        2 * n
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(emb.iter().chain(&head).flat_map(|x| x.to_le_bytes()));
    std::fs::write(d.join("model.safetensors"), bytes).unwrap();
    (d.join("toy.pleach"), d)
}

fn run(program: &Path, plan: &Path, weights: &Path, ids: &[&str]) -> (i32, String, String) {
    let out = Command::new(program).arg(plan).arg(weights).args(ids).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap().trim().to_string();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn check_example(program: &Path, name: &str) {
    let (plan, weights) = files(name);
    let want = greedy(&[3, 1, 4, 1, 5], 1, None)[0].to_string();
    assert_eq!(run(program, &plan, &weights, &["3", "1", "4", "1", "5"]), (0, want, String::new()));
    let (code, _, why) = run(program, &plan, &weights, &["99"]);
    assert!(code == 1 && why.contains("value 0 is 99"), "{why}");
    let (code, _, why) = run(program, &plan, &plan, &["1"]);
    assert!(code == 1 && why.contains("no usable safetensors file"), "{why}");
    let (code, _, why) = run(program, &weights.join("model.safetensors"), &weights, &["1"]);
    assert!(code == 1 && why.contains("not a usable plan"), "{why}");
}

#[test]
fn the_rust_example_runs() {
    check_example(&build().join("examples/embed"), "embed-rs");
}

#[test]
fn the_c_example_runs_with_the_static_library() {
    // Where a test build leaves it; only `cargo build` links it to the folder above.
    let library = build().join("deps/libpleach_runtime.a");
    assert!(library.is_file(), "{} is missing; build the whole package", library.display());
    let program = folder("embed-c").join("embed");
    // The command that the example gives, with this build's library.
    let source = std::fs::read_to_string(Path::new(ROOT).join("examples/embed.c")).unwrap();
    let command = source.lines().map(str::trim).find(|l| l.starts_with("cc ")).expect("a command");
    let place = |word: &str| match word {
        "target/release/libpleach_runtime.a" => library.clone().into_os_string(),
        "embed" => program.clone().into_os_string(),
        other => other.into(),
    };
    let done = Command::new("cc")
        .args(command.split_whitespace().skip(1).map(place))
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
        .current_dir(Path::new(ROOT).join(".."))
        .status();
    assert!(done.unwrap().success(), "{command}");
    check_example(&program, "embed-c");
}

#[test]
fn a_program_with_the_runtime_alone_is_small() {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let done = Command::new(cargo)
        .args(["build", "--release", "--quiet", "-p", "pleach-runtime", "--example", "embed"])
        .current_dir(ROOT)
        .status();
    assert!(done.unwrap().success());
    let program = build().with_file_name("release").join("examples/embed");
    let bytes = std::fs::metadata(&program).unwrap().len();
    assert!(bytes <= 2_000_000, "{} has {bytes} bytes", program.display());
    check_example(&program, "embed-release");
}

#[test]
fn the_header_is_current_and_small() {
    let config = cbindgen::Config::from_file(Path::new(ROOT).join("cbindgen.toml")).unwrap();
    let source = Path::new(ROOT).join("src/capi.rs");
    let mut out = vec![];
    cbindgen::Builder::new().with_config(config).with_src(source).generate().unwrap().write(&mut out);
    let new = String::from_utf8(out).unwrap();
    let path = Path::new(ROOT).join("include/pleach.h");
    if std::env::var_os("PLEACH_BLESS").is_some() {
        std::fs::write(&path, &new).unwrap();
    }
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(old == new, "runtime/include/pleach.h is not current; run this test with PLEACH_BLESS=1");
    let functions = new
        .lines()
        .filter(|l| l.contains(" pleach_") || l.contains("*pleach_"))
        .filter(|l| l.contains('(') && !l.starts_with([' ', '*', '/']) && !l.contains("typedef"))
        .count();
    assert!((10..20).contains(&functions), "{functions} functions");
}

#[test]
#[allow(unsafe_code)]
fn c_calls_fail_cleanly() {
    use pleach_runtime::capi::*;
    use std::ffi::{CStr, CString};
    use std::ptr::{null, null_mut};
    // SAFETY: the text is valid until the next failure, and is copied at once.
    let last = || unsafe { CStr::from_ptr(pleach_last_error()) }.to_str().unwrap().to_string();
    let (plan, weights) = files("capi");
    let c = |p: &Path| CString::new(p.to_str().unwrap()).unwrap();
    let (plan, weights) = (c(&plan), c(&weights));
    // SAFETY: each call keeps the contract of its function, nulls included.
    unsafe {
        assert!(pleach_open(null(), weights.as_ptr(), null()).is_null());
        assert_eq!(last(), "the plan's path is null");
        assert!(pleach_open(weights.as_ptr(), weights.as_ptr(), null()).is_null());
        assert_eq!(pleach_infer(null_mut(), null(), null(), 0), 1);
        assert!(last().contains("null"));
        pleach_close(null_mut());
        let s = pleach_open(plan.as_ptr(), weights.as_ptr(), null());
        assert!(!s.is_null(), "{}", last());
        assert!(CStr::from_ptr(pleach_describe(s)).to_str().unwrap().contains("\"vocab\":37"));
        assert_eq!(pleach_capacity(s, c"T".as_ptr()), 512);
        assert_eq!(pleach_capacity(s, c"X".as_ptr()), 0);
        let ids = [3, 1, 4];
        assert_eq!(pleach_infer(s, ids.as_ptr(), [0, 3].as_ptr(), 1), 0);
        let (mut values, mut shape, mut rank) = (null(), [0u64; 8], 0);
        assert_eq!(pleach_output(s, c"logits".as_ptr(), &mut values, shape.as_mut_ptr(), &mut rank), 0);
        assert_eq!((rank, shape[0], shape[1]), (2, 3, V as u64));
        close(std::slice::from_raw_parts(values, 3 * V), &expected(&ids, None));
        assert_eq!(pleach_output(s, c"x".as_ptr(), &mut values, null_mut(), null_mut()), 1);
        assert!(last().contains("it gave: logits"), "{}", last());
        assert_eq!(pleach_infer(s, ids.as_ptr(), [0, 3, 2].as_ptr(), 2), 1);
        let input = |name: &'static CStr, v: &[i32]| pleach_input {
            name: name.as_ptr(),
            i32_values: v.as_ptr(),
            f32_values: null(),
            len: v.len(),
        };
        let inputs = [
            input(c"input_ids", &ids),
            input(c"positions", &[0, 1, 2]),
            input(c"q_segments", &[0, 3]),
            input(c"kv_start", &[0]),
            input(c"kv_len", &[3]),
        ];
        assert_eq!(pleach_run(s, c"infer".as_ptr(), inputs.as_ptr(), 5), 0);
        assert_eq!(pleach_run(s, c"infer".as_ptr(), inputs.as_ptr(), 4), 1);
        assert!(last().contains("`kv_len` is missing"), "{}", last());
        extern "C" fn hear(id: i32, user: *mut std::ffi::c_void) -> i32 {
            // SAFETY: the test gives a vector.
            unsafe { (*user.cast::<Vec<i32>>()).push(id) };
            0
        }
        let (mut heard, mut out, mut n) = (Vec::<i32>::new(), [0; 7], 0);
        let p = pleach_sampling { max_new_tokens: 7, temperature: 0.0, top_p: 0.0, seed: 0 };
        let user = (&raw mut heard).cast();
        assert_eq!(pleach_generate(s, ids.as_ptr(), 3, &p, Some(hear), user, out.as_mut_ptr(), &mut n), 0);
        assert_eq!((&out[..n], heard.as_slice()), (greedy(&ids, 7, None).as_slice(), greedy(&ids, 7, None).as_slice()));
        assert_eq!(pleach_clear_slot(s, 0), 0);
        assert_eq!(pleach_clear_slot(s, 3), 1);
        let file = CString::new(format!("{}/model.safetensors", weights.to_str().unwrap())).unwrap();
        assert_eq!(pleach_load_slot(s, 0, file.as_ptr()), 1);
        assert!(last().contains("`head.lora_A` is missing"), "{}", last());
        pleach_close(s);
        assert!(!CStr::from_ptr(pleach_version()).to_str().unwrap().is_empty());
    }
}
