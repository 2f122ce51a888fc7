//! `pleach inspect --html` in a real browser: every tab opens, search finds, layers fold and unfold, nothing is logged and
//! nothing is loaded. Pictures are kept in the folder `page` of `CARGO_TARGET_TMPDIR`.

use crate::browser::{self, Browser};
use crate::kit::{Folder, Pleach, fixture};
use serde_json::{Value, json};
use std::path::Path;

/// The browser's program; says so where there is none.
fn program() -> Option<String> {
    let p = browser::program();
    if p.is_none() {
        println!(
            "skipped: no Chromium is there; scripts/setup_chromium.sh installs Debian's, PLEACH_CHROMIUM names another"
        );
    }
    p
}

fn text(p: &Path) -> String {
    p.display().to_string()
}

/// A model folder of a given shape whose weights are a hole in a sparse file: enough for everything but running.
fn shaped(folder: &Path, layers: u64, hidden: u64, inner: u64, heads: u64, kv: u64, vocab: u64) {
    std::fs::create_dir_all(folder).unwrap();
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("llama-tiny").join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("num_hidden_layers", layers),
        ("hidden_size", hidden),
        ("intermediate_size", inner),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv),
        ("head_dim", hidden / heads),
        ("vocab_size", vocab),
        ("max_position_embeddings", 8192),
    ] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = false.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![vocab, hidden])];
    let d = hidden / heads * kv;
    for i in 0..layers {
        let mut add = |name: &str, shape: Vec<u64>| tensors.push((format!("model.layers.{i}.{name}.weight"), shape));
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(name, vec![hidden]);
        }
        for (name, rows) in [("q_proj", hidden), ("k_proj", d), ("v_proj", d), ("o_proj", hidden)] {
            add(&format!("self_attn.{name}"), vec![rows, hidden]);
        }
        add("mlp.gate_proj", vec![inner, hidden]);
        add("mlp.up_proj", vec![inner, hidden]);
        add("mlp.down_proj", vec![hidden, inner]);
    }
    tensors.extend([("model.norm.weight".into(), vec![hidden]), ("lm_head.weight".into(), vec![vocab, hidden])]);
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let file = folder.join("model.safetensors");
    std::fs::write(&file, &bytes).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(bytes.len() as u64 + at).unwrap();
}

const GRAPH: &str = "pleach.views.graph";

/// Screen position of a sign of the first box for which `which` holds: `x` and `y` from its right upper corner.
fn sign(which: &str, dx: i32, dy: i32) -> String {
    format!(
        "(() => {{ const g = {GRAPH}, e = g.scene.elems.find((e) => {which}), r = g.canvas.getBoundingClientRect(); \
         return [r.x + g.view.x + (e.x + e.w - {dx}) * g.view.scale, r.y + g.view.y + (e.y + {dy}) * g.view.scale]; }})()"
    )
}

struct Trained {
    folder: Folder,
    pleach: Pleach,
    page: String,
}

/// A page of a short training run of the tiny model, with its times.
fn trained() -> Trained {
    let folder = Folder::new("page");
    let pleach = Pleach::new(&folder);
    let (model, data) = (text(&fixture("llama-tiny")), text(&fixture("train/rows.jsonl")));
    let (out, profile, page) =
        (text(&folder.join("out")), text(&folder.join("p.json")), text(&folder.join("train.html")));
    let method =
        ["--method", "lora", "--r", "4", "--target-modules", "all-linear", "--batch", "2", "--max-length", "16"];
    let run = ["train", &model, "--data", &data, "--out", &out, "--max-steps", "3", "--profile", &profile];
    pleach.ok(&[&run[..], &method[..]].concat());
    trace_is_sound(&profile);
    pleach.ok(&[&["inspect", &model, "--html", &page, "--profile", &profile][..], &method[..]].concat());
    Trained { folder, pleach, page }
}

/// The file of `--profile` is a chrome trace, and its sums are those of its launches.
fn trace_is_sound(file: &str) {
    let v: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let events: Vec<&Value> = v["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
    assert!(events.len() > 100, "{}", events.len());
    let number = |e: &Value, k: &str| e[k].as_f64().unwrap_or_else(|| panic!("{k} of {e}"));
    assert!(events.windows(2).all(|w| number(w[0], "ts") + number(w[0], "dur") <= number(w[1], "ts") + 1e-3));
    assert!(events.iter().all(|e| e["name"].is_string() && e["pid"].is_u64() && e["tid"].is_u64()));
    let sum: f64 = events.iter().map(|e| number(e, "dur")).sum();
    let steps = v["pleach"]["entries"].as_array().unwrap().iter().flat_map(|e| e["steps"].as_array().unwrap());
    let told: f64 = steps.map(|s| number(s, "ns") / 1e3).sum();
    assert!((sum - told).abs() <= 1e-6 * told, "{sum} µs of launches, {told} µs told");
    let names: Vec<&str> =
        v["pleach"]["entries"].as_array().unwrap().iter().filter_map(|e| e["entry"].as_str()).collect();
    assert!(names.contains(&"step"), "{names:?}");
}

#[test]
fn a_training_run_in_every_tab() {
    let Some(program) = program() else { return };
    let t = trained();
    for dark in [false, true] {
        let theme = if dark { "dark" } else { "light" };
        let mut b = Browser::open(&program, Path::new(&t.page), dark);
        let tabs = [
            ("graph", "aside h2"),
            ("passes", ".diff-row"),
            ("memory", ".arena canvas"),
            ("kernels", ".ln"),
            ("profile", "canvas.timeline"),
        ];
        for (tab, inside) in tabs {
            b.click(&format!("#tab-{tab}"));
            b.wait(&format!("!document.querySelector('#panel-{tab}').hidden"));
            b.wait(&format!("document.querySelector('#panel-{tab} {inside}')"));
            b.picture(&format!("tiny-{tab}-{theme}"));
        }
        b.was_quiet();
    }
    let mut b = Browser::open(&program, Path::new(&t.page), false);
    search_finds(&mut b);
    overlays_count(&mut b);
    the_rest_is_there(&mut b);
    b.was_quiet();
    two_plans(&program, &t);
}

fn search_finds(b: &mut Browser) {
    b.press("/");
    b.write("down_proj matmul");
    b.wait("document.querySelectorAll('.results button').length > 3");
    let found = b.js(&format!("{GRAPH}.results.length")).as_u64().unwrap();
    b.press("Enter");
    b.wait(&format!("{GRAPH}.selected"));
    let shown = b.js("document.querySelector('.details').textContent");
    let shown = shown.as_str().unwrap();
    for word in ["matmul", "down_proj", "dtype", "shape", "Inputs", "Users"] {
        assert!(shown.contains(word), "{word} is not in: {shown}");
    }
    assert!(
        b.js(&format!("{GRAPH}.scene.shown[{GRAPH}.selected.i] >= 0 && {GRAPH}.elemOf({GRAPH}.selected).kind"))
            == "node"
    );
    b.picture("tiny-search");
    b.press("Enter");
    b.wait(&format!("{GRAPH}.found === 1 && {GRAPH}.results.length === {found}"));
    b.press("Escape");
    b.wait("document.querySelector('.results').hidden");
}

#[test]
fn equal_layers_fold_and_unfold() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-fold");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("fold.html")));
    shaped(&model, 6, 64, 96, 4, 2, 128);
    pleach.ok(&["inspect", &text(&model), "--entry", "infer", "--html", &page]);
    let b = &mut Browser::open(&program, Path::new(&page), false);
    b.js(&format!("{GRAPH}.all(false)"));
    b.wait(&format!("{GRAPH}.scene.elems.some((e) => e.kind === 'stack')"));
    b.js(&format!("{GRAPH}.fit(false)"));
    let count = |b: &mut Browser| b.js(&format!("{GRAPH}.scene.elems.length")).as_u64().unwrap();
    let folded = count(b);
    let members = b.js(&format!("{GRAPH}.scene.elems.find((e) => e.kind === 'stack').item.members.length"));
    // the sign ×N spreads the stack; the sign of one of its layers folds it again; the plus opens a box
    b.click(&sign("e.kind === 'stack'", 45, 16));
    b.wait(&format!("{GRAPH}.scene.elems.length === {folded} + {members} - 1"));
    b.picture("tiny-spread");
    b.click(&sign("e.item.stack", 45, 16));
    b.wait(&format!("{GRAPH}.scene.elems.length === {folded}"));
    b.click(&sign("e.kind === 'stack'", 14, 16));
    b.wait(&format!(
        "{GRAPH}.scene.elems.length > {folded} && {GRAPH}.scene.elems.find((e) => e.kind === 'stack').item.open"
    ));
    b.picture("tiny-open");
    b.js(&format!("{GRAPH}.all(true)"));
    // everything is in sight: one element for each node that is no parameter
    let seen = b.js(&format!("{GRAPH}.scene.elems.filter((e) => e.kind === 'node').length"));
    let nodes = b.js(&format!("[...Array({GRAPH}.entry.n).keys()].filter((i) => !{GRAPH}.entry.isLeaf(i)).length"));
    assert_eq!(seen, nodes);
    let overlap = "((s) => s.elems.some((p) => p.kids.some((a, i) => p.kids.slice(i + 1).some((b) => { const [x, y] = [s.elems[a], s.elems[b]]; \
                   return x.x < y.x + y.w - .5 && y.x < x.x + x.w - .5 && x.y < y.y + y.h - .5 && y.y < x.y + x.h - .5; }))))";
    assert_eq!(b.js(&format!("{overlap}({GRAPH}.scene)")), false, "two elements of one box overlap");
    b.picture("tiny-all-open");
    b.was_quiet();
}

fn overlays_count(b: &mut Browser) {
    b.js(&format!("{GRAPH}.all(false)"));
    for overlay in ["bytes", "flops", "time", "trained", "saved"] {
        b.js(&format!("{GRAPH}.overlays.value = '{overlay}'; {GRAPH}.overlays.dispatchEvent(new Event('change'))"));
        let total = b.js(&format!("{GRAPH}.metrics.total")).as_f64().unwrap();
        assert!(total > 0.0, "the overlay {overlay} is empty");
        b.picture(&format!("tiny-overlay-{overlay}"));
    }
    // times of the nodes are those of the entry
    b.js(&format!("{GRAPH}.overlays.value = 'time'; {GRAPH}.overlays.dispatchEvent(new Event('change'))"));
    let entry = b.js(&format!("pleach.data.profile.by.get({GRAPH}.entry.name).total")).as_f64().unwrap();
    let shown = b.js(&format!("{GRAPH}.metrics.total")).as_f64().unwrap();
    assert!((entry - shown).abs() < 1e-6 * entry, "{entry} ns measured, {shown} shown");
}

fn the_rest_is_there(b: &mut Browser) {
    b.click("#tab-passes");
    // the text that the page makes of a graph is the text form
    let line = b.js("pleach.data.graphs[0].entries[0].line(3)");
    assert!(line.as_str().unwrap().starts_with("%3 = "), "{line}");
    b.wait("document.querySelector('.form svg .ruled')");
    assert!(b.js("document.querySelectorAll('table.rules tr.used').length").as_u64().unwrap() > 0);
    b.click("#tab-memory");
    b.wait("pleach.views.memory.arenas[0].w > 0");
    let peak = b.js("pleach.views.memory.arenas.map((a) => [Math.max(...a.live), a.a.peak])[0]");
    assert_eq!(peak[0], peak[1], "the curve's highest point is the plan's peak");
    let kept = b.js("pleach.views.memory.arenas[0].a.kind.filter((k) => k === 'kept').length").as_u64().unwrap();
    let told = b.js("pleach.views.memory.arenas[0].savedOf.size").as_u64().unwrap();
    assert!(kept > 0 && told * 2 > kept, "{told} of {kept} kept buffers say why");
    b.click("#tab-kernels");
    b.wait("document.querySelectorAll('table.kernels tbody tr').length > 3");
    b.click("table.kernels th:nth-child(5) button");
    let flops = b.js("pleach.views.kernels.sorted.map((r) => r.flops)");
    let flops: Vec<f64> = serde_json::from_value(flops).unwrap();
    assert!(flops.windows(2).all(|w| w[0] >= w[1]), "{flops:?}");
    // every kernel has all three texts, and some lines of machine code know where they stem from
    let texts = b.js("pleach.data.kernels.every((k) => k.ir && k.mlir && k.code && k.lines.length === k.code.split('\\n').length - 1)");
    assert_eq!(texts, true);
    let linked =
        b.js("pleach.data.kernels.every((k) => k.lines.some((l) => l > 1 && l <= k.mlir.split('\\n').length))");
    assert_eq!(linked, true);
}

fn two_plans(program: &str, t: &Trained) {
    let model = text(&fixture("llama-tiny"));
    let both = text(&t.folder.join("both.html"));
    let method =
        ["--method", "paca", "--r", "4", "--target-modules", "all-linear", "--batch", "2", "--max-length", "16"];
    t.pleach.ok(&[&["inspect", &model, "--html", &both, "--compare", &t.page][..], &method[..]].concat());
    let mut b = Browser::open(program, Path::new(&both), false);
    b.click("#tab-memory");
    b.wait("document.querySelectorAll('.arena canvas').length === 2 && document.querySelector('.differences')");
    let totals = b.js("pleach.views.memory.arenas.map((a) => [a.a.total, a.top])");
    assert_ne!(totals[0][0], totals[1][0], "the two methods need different arenas");
    assert_eq!(totals[0][1], totals[1][1], "both are drawn on one scale");
    b.picture("tiny-two-plans");
    b.was_quiet();
}

#[test]
fn a_plan_file_shows_what_it_has() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-plan");
    let pleach = Pleach::new(&folder);
    let (plan, page) = (text(&folder.join("m.pleach")), text(&folder.join("m.html")));
    pleach.ok(&["compile", &text(&fixture("llama-tiny")), "--entry", "infer,generate", "-o", &plan, "--quiet"]);
    pleach.ok(&["inspect", &plan, "--html", &page]);
    let mut b = Browser::open(&program, Path::new(&page), false);
    for tab in ["graph", "passes", "memory", "kernels", "profile"] {
        b.click(&format!("#tab-{tab}"));
        b.wait(&format!("document.querySelector('#panel-{tab}').childElementCount"));
    }
    let steps = b.js("pleach.data.graphs[0].entries.map((e) => e.n)");
    assert!(steps.as_array().unwrap().iter().any(|n| n.as_u64() > Some(10)), "{steps}");
    b.was_quiet();
    let message = pleach
        .fails(1, &["inspect", &plan, "--html", &page, "--compare", &text(&fixture("llama-tiny").join("config.json"))]);
    assert!(message.contains("holds no data"), "{message}");
}

#[test]
fn thirty_two_layers_are_small_and_fluid() {
    let folder = Folder::new("page-large");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("large.html")));
    shaped(&model, 32, 4096, 14336, 32, 8, 128_256);
    let method =
        ["--method", "lora", "--r", "16", "--target-modules", "all-linear", "--batch", "1", "--max-length", "2048"];
    pleach.ok(&[&["inspect", &text(&model), "--html", &page, "--dtype", "bf16"][..], &method[..]].concat());
    let size = std::fs::metadata(&page).unwrap().len();
    println!("a page of 32 layers: {:.2} MB", size as f64 / 1e6);
    assert!(size <= 5_000_000, "{size} bytes");
    let Some(program) = program() else { return };
    let mut b = Browser::open(&program, Path::new(&page), false);
    b.picture("large");
    let layers =
        b.js(&format!("{GRAPH}.scene.elems.filter((e) => e.kind === 'stack').map((e) => e.item.members.length)"));
    assert!(layers.as_array().unwrap().iter().any(|n| n.as_u64() >= Some(28)), "equal layers are one stack: {layers}");
    // all of a stage opened at once: at least 20,000 nodes over the entries, the largest alone drawn
    let opened = b.js(&format!("(() => {{ const t = performance.now(); {GRAPH}.all(true); return [{GRAPH}.entry.n, {GRAPH}.scene.elems.length, performance.now() - t]; }})()"));
    let frames = b.js(FRAMES);
    println!(
        "{} nodes, {} elements opened and laid out in {:.0} ms; drawing, ms median and worst: {frames}",
        opened[0],
        opened[1],
        opened[2].as_f64().unwrap()
    );
    b.picture("large-all-open");
    b.was_quiet();
}

/// Moves and zooms over everything for 60 frames at four sizes: time to paint, and from frame to frame.
const FRAMES: &str = "(async () => { const g = pleach.views.graph, out = {}; \
    for (const [name, size] of [['whole', 0], ['far', 0.08], ['middle', 0.25], ['near', 0.8]]) { \
      const w = g.canvas.clientWidth, h = g.canvas.clientHeight, s = size || Math.min(w / g.scene.width, h / g.scene.height), paint = [], gap = []; \
      let last = 0; for (let k = 0; k < 60; k++) await new Promise((next) => requestAnimationFrame((now) => { \
        g.view = { scale: s * (1 + 0.2 * Math.sin(k / 9)), x: (w - g.scene.width * s) / 2 + 60 * Math.sin(k / 5), y: (h - g.scene.height * s) * 0.4 + 60 * Math.cos(k / 7) }; \
        paint.push(g.paint()); if (last) gap.push(now - last); last = now; next(); })); \
      const of = (a) => { a.sort((x, y) => x - y); return [a[a.length >> 1], a[a.length - 1]].map((x) => Math.round(x * 10) / 10); }; \
      out[name] = { paint: of(paint), frame: of(gap), drawn: g.drawn }; } \
    return out; })()";

#[test]
fn model_explorer_gets_its_graph() {
    let folder = Folder::new("explorer");
    let pleach = Pleach::new(&folder);
    let out = text(&folder.join("g.json"));
    pleach.ok(&["inspect", &text(&fixture("llama-tiny")), "--model-explorer", &out, "--stage", "imported"]);
    let v: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let graphs = v["graphs"].as_array().unwrap();
    assert_eq!(graphs.iter().map(|g| g["id"].as_str().unwrap()).collect::<Vec<_>>(), ["infer", "generate"]);
    for g in graphs {
        let nodes = g["nodes"].as_array().unwrap();
        let ids: std::collections::BTreeSet<&str> = nodes.iter().map(|n| n["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), nodes.len(), "ids are unique");
        for n in nodes {
            assert!(n["label"].is_string() && n["namespace"].is_string(), "{n}");
            for e in n["incomingEdges"].as_array().unwrap() {
                assert!(ids.contains(e["sourceNodeId"].as_str().unwrap()), "{e}");
            }
        }
        assert!(nodes.iter().any(|n| n["namespace"] == "model/layers.1/self_attn/q_proj"));
    }
}
