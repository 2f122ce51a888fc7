//! The code of kernels in the page, from IR over MLIR to the machine's: which lines belong together.

use crate::browser::Browser;
use crate::kit::{Folder, Pleach, fixture};
use crate::page::{program, text};
use serde_json::Value;
use std::path::Path;

const KERNELS: &str = "pleach.views.kernels";

/// Every kernel has all three texts; each of its values that is computed or read has lines of MLIR, and those of nearly all that are
/// computed have instructions: some become part of another's.
pub(crate) fn every_level_is_linked(b: &mut Browser) {
    let texts = b.js("pleach.data.kernels.every((k) => k.ir && k.mlir && k.code && k.lines.length === k.code.split('\\n').length - 1)");
    assert_eq!(texts, true);
    // of each kernel: lines of IR that compute or read something, and those of them without MLIR or without an instruction
    let found = b.js(&format!(
        "pleach.data.kernels.map((k, i) => {{ {KERNELS}.pick(i); const l = {KERNELS}.linked, \
         views = /= (const|iota|broadcast|reshape|transpose|slice|cast|after|stop_gradient|concat|pad)\\b/, \
         all = l.ir.lines.map((t, n) => [t, n]).filter(([t]) => /^ *%/.test(t) && !views.test(t)).map(([t, n]) => [t, l.of(l.ir, n)]); \
         return {{ name: k.name, all: all.length, dark: all.filter(([, o]) => !o.mlir.length).map(([t]) => t), idle: all.filter(([t, o]) => !/= input /.test(t) && !o.code.length).map(([t]) => t) }}; }})"
    ));
    let found = found.as_array().unwrap();
    let (mut all, mut idle) = (0, 0);
    for k in found {
        all += k["all"].as_u64().unwrap();
        idle += k["idle"].as_array().unwrap().len() as u64;
        assert!(
            k["dark"].as_array().unwrap().is_empty(),
            "no line of MLIR is for these of {}: {}",
            k["name"],
            k["dark"]
        );
    }
    println!("{all} lines of IR in {} kernels have MLIR, {idle} of them no instruction", found.len());
    assert!(all > 30 && idle * 10 < all, "{idle} of {all} lines of IR have no instruction: {found:?}");
}

/// A click on a line of IR marks its lines of MLIR and their instructions, and one on an instruction leads back.
pub(crate) fn a_click_marks_all_levels(b: &mut Browser) {
    // the kernel with most lines of IR that has a product
    let kernel = b.js("pleach.data.kernels.map((k, i) => [/ matmul\\(/.test(k.ir) * k.ir.length, i]).sort((a, b) => b[0] - a[0])[0][1]");
    b.js(&format!("{KERNELS}.pick({kernel})"));
    let line = b.js(&format!("{KERNELS}.linked.ir.lines.findIndex((l) => / = matmul\\(/.test(l))")).as_i64().unwrap();
    assert!(line > 0);
    b.js(&format!("{KERNELS}.linked.ir.list.show({line})"));
    b.click(&format!(".pane:nth-child(1) .ln[data-line=\"{line}\"] .code"));
    let marked = |b: &mut Browser| b.js(&format!("['ir', 'mlir', 'code'].map((p) => [...{KERNELS}.linked[p].marked])"));
    let shown = |b: &mut Browser| {
        b.js("[1, 2, 3].map((k) => document.querySelectorAll(`.pane:nth-child(${k}) .ln.on`).length)")
    };
    let list = |v: &Value| -> Vec<i64> { v.as_array().unwrap().iter().filter_map(Value::as_i64).collect() };
    let m = marked(b);
    assert_eq!(list(&m[0]), [line]);
    let value = b.js(&format!("{KERNELS}.linked.ir.values[{line}][0]"));
    // exactly the lines that say so, and exactly their instructions
    let says = b.js(&format!(
        "pleach.data.kernels[{kernel}].mlir.split('\\n').flatMap((l, i) => (/ \\/\\/( %\\d+)+$/.test(l) && l.slice(l.lastIndexOf('//')).split(' ').includes('%{value}') ? [i] : []))"
    ));
    assert_eq!(m[1], says);
    let from =
        b.js(&format!("pleach.data.kernels[{kernel}].lines.flatMap((m, i) => ({says}.includes(m - 1) ? [i] : []))"));
    assert_eq!(m[2], from);
    assert!(!list(&m[1]).is_empty() && !list(&m[2]).is_empty(), "{m}");
    let seen = list(&shown(b));
    assert!(seen.iter().all(|n| *n > 0), "a marked line of each level is in sight: {seen:?}");
    b.picture("tiny-kernel-linked");
    // the pointer elsewhere changes nothing until the next click
    b.js("document.querySelector('.pane:nth-child(2) .ln').dispatchEvent(new MouseEvent('mouseenter'))");
    assert_eq!(marked(b), m);
    let instruction = list(&m[2])[0];
    b.js(&format!("{KERNELS}.linked.code.list.show({instruction})"));
    b.click(&format!(".pane:nth-child(3) .ln[data-line=\"{instruction}\"] .code"));
    let back = marked(b);
    assert!(list(&back[0]).contains(&line), "an instruction leads back to {line}: {back}");
    assert_eq!(list(&back[1]).len(), 1);
    assert!(list(&m[1]).contains(&list(&back[1])[0]));
    b.click(&format!(".pane:nth-child(3) .ln[data-line=\"{instruction}\"] .code"));
    assert_eq!(list(&marked(b)[2]).len(), 0, "a second click lets go");
}

#[test]
fn the_code_of_a_gpu_is_linked() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-gpu");
    let pleach = Pleach::new(&folder);
    let model = text(&fixture("llama-tiny"));
    for (target, dtype) in [("sm_80", "f32"), ("sm_90a", "bf16")] {
        let page = text(&folder.join(&format!("{target}.html")));
        let method = ["--method", "lora", "--r", "4", "--batch", "2", "--max-length", "16"];
        let shown = ["inspect", &model, "--target", target, "--dtype", dtype, "--html", &page];
        pleach.ok(&[&shown[..], &method[..]].concat());
        let b = &mut Browser::open(&program, Path::new(&page), false);
        b.click("#tab-kernels");
        b.wait("document.querySelectorAll('table.kernels tbody tr').length > 3");
        every_level_is_linked(b);
        a_click_marks_all_levels(b);
        b.picture(&format!("gpu-kernels-{target}"));
        b.was_quiet();
    }
}
