//! `pleach inspect --html` in a real browser: every tab opens, search finds, layers fold and unfold, nothing is logged and
//! nothing is loaded. Pictures are kept in the folder `page` of `CARGO_TARGET_TMPDIR`.

use crate::browser::{self, Browser};
use crate::kit::{Folder, Pleach, fixture};
use serde_json::{Value, json};
use std::path::Path;

/// The browser's program; says so where there is none.
pub(crate) fn program() -> Option<String> {
    let p = browser::program();
    if p.is_none() {
        println!(
            "skipped: no Chromium is there; scripts/setup_chromium.sh installs Debian's, PLEACH_CHROMIUM names another"
        );
    }
    p
}

pub(crate) fn text(p: &Path) -> String {
    p.display().to_string()
}

/// A model folder of a given shape whose weights are a hole in a sparse file: enough for everything but running.
pub(crate) fn shaped(folder: &Path, layers: u64, hidden: u64, inner: u64, heads: u64, kv: u64, vocab: u64) {
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

pub(crate) const GRAPH: &str = "pleach.views.graph";

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

/// The parts of a step fold one by one: a run of equal layers in each.
#[test]
fn layers_of_a_training_step_fold() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-fold-step");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("fold.html")));
    let layers = 6;
    shaped(&model, layers, 64, 96, 4, 2, 128);
    let method =
        ["--method", "lora", "--r", "4", "--target-modules", "all-linear", "--batch", "2", "--max-length", "16"];
    pleach.ok(&[&["inspect", &text(&model), "--html", &page][..], &method[..]].concat());
    let b = &mut Browser::open(&program, Path::new(&page), false);
    assert_eq!(b.js(&format!("{GRAPH}.entry.name")), "step", "the page shows what training runs");
    let parts = b.js(&format!("{GRAPH}.tree.root.items.map((c) => c.name)"));
    for part in ["forward", "backward", "optimizer"] {
        let most = largest_stack(b, part);
        println!("{part}: a stack of {most}");
        // the first layer has no gradient of its input, the last one is followed by the loss
        assert!(most >= layers - 2, "equal layers of {part} are one stack of {most} in {parts}");
    }
    b.picture("tiny-step-folded");
    b.was_quiet();
}

/// Layers of the largest stack in a part of a step.
pub(crate) fn largest_stack(b: &mut Browser, part: &str) -> u64 {
    let stacks = b.js(&format!(
        "(() => {{ const out = [0], walk = (c) => {{ if (c.kind === 'stack') out.push(c.members.length); if (c.items) c.items.forEach(walk); }}; \
         {GRAPH}.tree.root.items.filter((c) => c.name.split('.')[0] === '{part}').forEach(walk); return Math.max(...out); }})()"
    ));
    stacks.as_u64().unwrap()
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
    kept_is_listed(b);
    b.click("#tab-kernels");
    b.wait("document.querySelectorAll('table.kernels tbody tr').length > 3");
    b.click("table.kernels th:nth-child(5) button");
    let flops = b.js("pleach.views.kernels.sorted.map((r) => r.flops)");
    let flops: Vec<f64> = serde_json::from_value(flops).unwrap();
    assert!(flops.windows(2).all(|w| w[0] >= w[1]), "{flops:?}");
    crate::page_code::every_level_is_linked(b);
    crate::page_code::a_click_marks_all_levels(b);
}

/// The list of what is kept for the backward half is what the arena keeps: as many bytes, and a reason for each buffer.
fn kept_is_listed(b: &mut Browser) {
    let arena = b.js(
        "(() => { const a = pleach.views.memory.arenas[0], of = a.a.kind.flatMap((k, i) => (k === 'kept' ? [i] : [])), bytes = (l) => l.reduce((s, x) => s + x, 0); \
         return { kept: of.length, told: of.filter((i) => a.savedOf.has(i)).length, bytes: bytes(of.map((i) => a.entry.buffers.bytes[a.a.buffer[i]])), \
           listed: bytes(a.data.plan.saved.map((s) => s.unit_bytes * (a.data.symbols[s.symbol] || 1))), \
           untold: of.filter((i) => !a.savedOf.has(i)).map((i) => a.owner(i)) }; })()",
    );
    let n = |k: &str| arena[k].as_f64().unwrap();
    println!("kept: {arena}");
    assert!(n("kept") > 10.0 && n("told") >= 0.95 * n("kept"), "kept buffers without a reason: {arena}");
    assert!((n("listed") - n("bytes")).abs() <= 0.01 * n("bytes"), "the list differs from the arena: {arena}");
}

#[test]
fn windows_of_a_loss_are_not_kept() {
    let Some(program) = program() else { return };
    let folder = Folder::new("page-windows");
    let pleach = Pleach::new(&folder);
    let (model, page) = (folder.join("model"), text(&folder.join("windows.html")));
    // the logits of all tokens have 16 MiB or more: they are made, used and given up window by window
    shaped(&model, 2, 64, 96, 4, 2, 8192);
    for dtype in ["f32", "bf16"] {
        let shown = ["inspect", &text(&model), "--html", &page, "--dtype", dtype];
        let method = ["--method", "lora", "--r", "4", "--batch", "4", "--max-length", "256"];
        pleach.ok(&[&shown[..], &method[..]].concat());
        let b = &mut Browser::open(&program, Path::new(&page), false);
        b.click("#tab-memory");
        b.wait("pleach.views.memory.arenas[0].w > 0");
        let windows = b.js("pleach.views.memory.arenas[0].a.kind.filter((k) => k === 'window').length").as_u64();
        assert!(windows >= Some(1), "the loss runs in windows");
        kept_is_listed(b);
        b.picture(&format!("windows-{dtype}"));
    }
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
