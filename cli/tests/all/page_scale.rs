//! Large models in the page: how large it becomes, and how fast it is drawn.

use crate::browser::Browser;
use crate::kit::{Folder, Pleach};
use crate::page::{GRAPH, largest_stack, program, shaped, text};
use std::path::Path;

/// Bytes that the page of a model of 32 layers may have.
const PAGE: u64 = 5_000_000;
/// Nodes of one entry that are drawn at once.
const NODES: u64 = 20_000;
/// Milliseconds that opening every box of it and laying everything out may take.
const OPEN: f64 = 5000.0;
/// Milliseconds that painting a frame may take, the median of several: 25 frames a second. A quiet machine takes a fifth of it.
const FRAME: f64 = 40.0;

const METHOD: [&str; 8] = ["--method", "lora", "--r", "16", "--target-modules", "all-linear", "--batch", "1"];

#[test]
fn thirty_two_layers_are_small() {
    let folder = Folder::new("page-large");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("large.html")));
    shaped(&model, 32, 4096, 14336, 32, 8, 128_256);
    let shown = ["inspect", &text(&model), "--html", &page, "--dtype", "bf16", "--max-length", "2048"];
    pleach.ok(&[&shown[..], &METHOD[..]].concat());
    let size = std::fs::metadata(&page).unwrap().len();
    println!("a page of 32 layers: {:.2} MB", size as f64 / 1e6);
    assert!(size <= PAGE, "{size} bytes");
    let Some(program) = program() else { return };
    let mut b = Browser::open(&program, Path::new(&page), false);
    assert_eq!(b.js(&format!("{GRAPH}.entry.name")), "step");
    b.picture("large");
    for part in ["forward", "backward", "optimizer"] {
        let most = largest_stack(&mut b, part);
        println!("{part}: a stack of {most}");
        assert!(most >= 29, "equal layers of {part} are one stack of {most}");
    }
    for tab in ["passes", "memory", "kernels"] {
        b.click(&format!("#tab-{tab}"));
        b.wait(&format!("document.querySelector('#panel-{tab}').childElementCount"));
        b.picture(&format!("large-{tab}"));
    }
    b.was_quiet();
}

#[test]
fn twenty_thousand_nodes_are_fluid() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-wide");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("wide.html")));
    shaped(&model, 64, 64, 96, 4, 2, 128);
    pleach.ok(&[&["inspect", &text(&model), "--html", &page, "--max-length", "64"][..], &METHOD[..]].concat());
    let mut b = Browser::open(&program, Path::new(&page), false);
    // nothing is folded: every node is an element of the drawing
    let opened = b.js(&format!(
        "(() => {{ const t = performance.now(); {GRAPH}.all(true); const ms = performance.now() - t; \
         const e = {GRAPH}.entry, drawn = {GRAPH}.scene.elems.filter((x) => x.kind === 'node').length; \
         return [e.n, drawn, [...Array(e.n).keys()].filter((i) => !e.isLeaf(i)).length, ms]; }})()"
    ));
    let [nodes, drawn, real] = [0, 1, 2].map(|i| opened[i].as_u64().unwrap());
    assert!(nodes >= NODES && drawn == real, "{nodes} nodes, {drawn} of {real} drawn");
    let ms = opened[3].as_f64().unwrap();
    assert!(ms <= OPEN, "{ms} ms to open and lay out {drawn} nodes");
    let frames = b.js(FRAMES);
    println!("{nodes} nodes, {drawn} drawn, opened and laid out in {ms:.0} ms");
    let mut most = 0;
    for f in frames.as_array().unwrap() {
        let (median, elements) = (f["median"].as_f64().unwrap(), f["drawn"].as_u64().unwrap());
        println!("at the scale {}: {elements} elements, {median} ms a frame, {} the slowest", f["scale"], f["worst"]);
        assert!(median <= FRAME, "{median} ms for a frame of {elements} elements: {frames}");
        most = most.max(elements);
    }
    assert!(most >= 10_000, "no view shows many nodes at once: {frames}");
    b.js(&format!("{GRAPH}.fit(true)"));
    b.picture("wide-all-open");
    b.was_quiet();
}

/// Moves over the middle of everything at rising sizes, 12 frames each: time to paint, and elements that were drawn.
const FRAMES: &str = "(async () => { const g = pleach.views.graph, s = g.scene, out = []; \
    const w = g.canvas.clientWidth, h = g.canvas.clientHeight, nodes = s.elems.filter((e) => e.kind === 'node'), mid = nodes[nodes.length >> 1]; \
    for (let k = Math.min(w / s.width, h / s.height); k < 1.2; k *= 1.6) { \
      const paint = []; let most = 0; \
      for (let n = 0; n < 12; n++) await new Promise((next) => requestAnimationFrame(() => { \
        g.view = { scale: k, x: w / 2 - (mid.x + mid.w / 2) * k + 40 * Math.sin(n), y: h / 2 - mid.y * k + 40 * Math.cos(n) }; \
        paint.push(g.paint()); most = Math.max(most, g.drawn); next(); })); \
      paint.sort((x, y) => x - y); \
      out.push({ scale: Math.round(k * 1e4) / 1e4, drawn: most, median: Math.round(paint[6] * 10) / 10, worst: Math.round(paint[11] * 10) / 10 }); } \
    return out; })()";
