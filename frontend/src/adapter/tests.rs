//! Methods by what they write and read: folders, plans, merged weights, conversions.

use std::path::Path;

use pleach_ir::{Role, verify::verify};
use serde_json::{Map, Value, json};

use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::lower::Import;
use crate::modules::ModuleTable;
use crate::peft::{MethodConfig, PREFIX};
use crate::safetensors::Writer;
use crate::tensors::Dtype;
use crate::testing::{Folder, folder, tiny_llama, values, write_tensors};

fn model(edit: impl Fn(&mut Value)) -> (Checkpoint, Folder) {
    let dir = folder("method-model");
    let mut config = tiny_llama();
    edit(&mut config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let modules = ModuleTable::new(&ModelConfig::read(&dir).unwrap());
    let list: Vec<_> = modules.iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
    write_tensors(&dir.join("model.safetensors"), &list, 0);
    (Checkpoint::open(&dir).unwrap(), dir)
}

fn keys(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn fresh(model: &Checkpoint, method: &str, options: Value) -> std::result::Result<Adapter, String> {
    let config = MethodConfig::named(method, &keys(options)).map_err(|e| e.to_string())?;
    Adapter::fresh(&config, &model.modules).map_err(|e| e.to_string())
}

/// A PaCA folder on `v_proj`; D in the form of `part`.
fn paca(dir: &Path, part: &str, indices: [i64; 3], delta: &dyn Fn(usize) -> Vec<f32>, config: Value) {
    let mut all = keys(json!({"peft_type": "PACA", "r": 3, "paca_alpha": 6, "target_modules": ["v_proj"]}));
    all.extend(keys(config));
    std::fs::write(dir.join("adapter_config.json"), Value::Object(all).to_string()).unwrap();
    let name = |layer: usize, part: &str| format!("{PREFIX}model.layers.{layer}.self_attn.v_proj.{part}");
    let declared: Vec<_> = (0..2)
        .flat_map(|l| [(name(l, part), Dtype::F32, vec![8, 3]), (name(l, "paca_indices"), Dtype::I64, vec![3])])
        .collect();
    let mut writer = Writer::create(&dir.join("adapter_model.safetensors"), &declared).unwrap();
    for layer in 0..2 {
        writer.write_f32(&delta(layer)).unwrap();
        writer.write(&indices.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
}

fn merged_all(adapter: &Adapter, base: &Checkpoint) -> Vec<Vec<f32>> {
    let one = |s: &Site| {
        let w = base.param(&format!("{}.weight", s.module)).unwrap().read_f32().unwrap();
        merged(adapter, s, base, &w).unwrap()
    };
    adapter.sites.iter().map(one).collect()
}

fn close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().flatten().zip(b.iter().flatten()) {
        assert!((x - y).abs() < 1e-5, "{x} {y}");
    }
}

#[test]
fn paca_adds_to_its_columns_in_both_forms_and_as_lora() {
    let (base, _dir) = model(|_| {});
    let (indices, scale) = ([2i64, 7, 11], 2.0f32);
    let delta = |layer: usize| values(500 + layer as u32, 24);
    let weight = |layer: usize| {
        base.param(&format!("model.layers.{layer}.self_attn.v_proj.weight")).unwrap().read_f32().unwrap()
    };
    let expected: Vec<Vec<f32>> = (0..2)
        .map(|layer| {
            let (mut w, d) = (weight(layer), delta(layer));
            for row in 0..8 {
                for (k, column) in indices.iter().enumerate() {
                    w[row * 16 + *column as usize] += scale * d[row * 3 + k];
                }
            }
            w
        })
        .collect();
    let dir = folder("paca");
    paca(&dir, "paca_delta", indices, &delta, json!({"modules_to_save": null}));
    let adapter = Adapter::open(&dir, None, &base.modules).unwrap();
    assert_eq!((adapter.tensors, adapter.parameters()), (4, 2 * 24));
    close(&merged_all(&adapter, &base), &expected);

    // The authors' form: the columns themselves over the scale, in any order of the indices.
    let absolute = folder("paca-absolute");
    let columns = |layer: usize| -> Vec<f32> {
        let pick = |row: usize| indices.map(|c| expected[layer][row * 16 + c as usize] / scale);
        (0..8).flat_map(pick).collect()
    };
    paca(&absolute, "paca_w", indices, &columns, json!({"bias": "none", "gradient_accumulation_steps": 4}));
    close(&merged_all(&Adapter::open(&absolute, None, &base.modules).unwrap(), &base), &expected);

    let lora = folder("paca-lora");
    to_lora(&adapter, &base, None, &lora).unwrap();
    let converted = Adapter::open(&lora, None, &base.modules).unwrap();
    assert_eq!((converted.config.method.name(), converted.sites[0].scale), ("lora", 2.0));
    close(&merged_all(&converted, &base), &expected);
    let b = converted.sites[1].values["lora_B"].read(&base).unwrap();
    assert_eq!(b.data, SlotData::F32(delta(1)), "bit for bit");
    assert!(to_lora(&converted, &base, None, &lora).unwrap_err().to_string().contains("lora already"));

    // The first rank, with the same alpha.
    let first = folder("paca-first");
    to_lora(&converted, &base, Some(1), &first).unwrap();
    let first = Adapter::open(&first, None, &base.modules).unwrap();
    let (a, whole) = (&first.sites[0], &converted.sites[0]);
    assert_eq!((a.rank, a.alpha, a.scale), (1, whole.alpha, whole.scale * 3.0));
    let values = |s: &Site, part: &str| match s.values[part].read(&base).unwrap().data {
        SlotData::F32(x) => x,
        SlotData::I32(_) => vec![],
    };
    assert_eq!(values(a, "lora_A"), values(whole, "lora_A")[..16]);
    let column: Vec<f32> = values(whole, "lora_B").iter().step_by(3).copied().collect();
    assert_eq!(values(a, "lora_B"), column);
    assert!(to_lora(&converted, &base, Some(4), &lora).unwrap_err().to_string().contains("first 4 ranks"));
}

#[test]
fn layers_that_hang_together_are_ordered_together() {
    let (base, _dir) = model(|c| c["attention_bias"] = true.into());
    let adapter = fresh(&base, "s2ft", json!({"r": 3, "target_modules": ["v_proj", "up_proj"]})).unwrap();
    // Both layers of the tiny model have an order of heads and one of channels, named after the consumers.
    let keys: Vec<String> = adapter.orders.iter().map(Ordered::key).collect();
    assert_eq!(keys.len(), 4);
    assert_eq!(keys[0], "model.layers.0.self_attn.o_proj.s2ft_order");
    let plan = AdapterPlan::new(&adapter, 0, &base).unwrap();
    let order = plan.tensors.iter().find(|t| t.key == keys[1]).unwrap();
    let channels = order.shape[0];
    assert_eq!(order.file.as_deref(), Some("base_model.model.model.layers.0.mlp.down_proj.s2ft_order"));
    assert_eq!(order.init, Init::Units { units: channels, first: 3, by: None });
    let up = plan.tensors.iter().find(|t| t.key.ends_with("0.mlp.up_proj.s2ft_delta")).unwrap();
    assert_eq!(up.shape, [3, 16]);
    let adapters = [adapter];
    let import = |entry: &str| Import::new(&base).adapters(&adapters).entries(&[entry]).train(0).graph().unwrap();
    let gathers = |g: &pleach_ir::Graph| {
        let over = |n: &&pleach_ir::Node| matches!(n.op, pleach_ir::Op::Gather { .. });
        g.entries[0].nodes.iter().filter(over).count()
    };
    let graph = import("train");
    verify(&graph).unwrap();
    // 7 weights, 3 biases and 2 trained parts in each layer, embedding, 2 rotary tables, counted rows.
    assert_eq!(gathers(&graph) - gathers(&import("infer")), 2 * 10 + 1);
    let pruned = [fresh(&base, "loram", json!({"r": 2, "pruning_ratio": 0.5, "target_modules": ["q_proj"]})).unwrap()];
    let graph = Import::new(&base).adapters(&pruned).entries(&["train", "infer"]).train(0).graph().unwrap();
    verify(&graph).unwrap();
    let heads = |entry: &str| {
        let found = graph.entry(entry).unwrap().nodes.iter().find_map(|n| match n.op {
            pleach_ir::Op::Attention(a) => Some((a.heads, a.kv_heads)),
            _ => None,
        });
        found.unwrap()
    };
    let (whole, part) = (heads("infer"), heads("train"));
    assert_eq!((part.0 * 2, part.1 * 2), whole, "half of the heads, groups as they were");
    let stacked = [adapters[0].clone(), fresh(&base, "lora", json!({"target_modules": ["down_proj"]})).unwrap()];
    let message = Import::new(&base).adapters(&stacked).entries(&["train"]).train(0).graph().unwrap_err().to_string();
    assert!(message.contains("down_proj") && message.contains("merge the other one"), "{message}");
    for (method, options, expected) in [
        ("s2ft", json!({"target_modules": ["lm_head"]}), "not coupled"),
        ("s2ft", json!({"r": 1000, "target_modules": ["up_proj"]}), "channels"),
        ("s2ft", json!({"selection": "best"}), "selection"),
        ("smora", json!({"r": 2, "top_k": 3}), "top_k"),
        ("loram", json!({"pruning_ratio": 1.0}), "pruning_ratio"),
        ("loram", json!({"pruned_layers": [2]}), "pruned_layers"),
    ] {
        let message = fresh(&base, method, options).unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn wrong_indices_and_shapes_are_refused() {
    let (base, _dir) = model(|_| {});
    let delta = |_: usize| vec![0.5; 24];
    let read = |indices: [i64; 3]| {
        let dir = folder("paca-indices");
        paca(&dir, "paca_delta", indices, &delta, json!({}));
        let adapter = Adapter::open(&dir, None, &base.modules).unwrap();
        slot_values(&adapter)[0].1.read(&base).map_err(|e| e.to_string())
    };
    assert_eq!(read([0, 3, 15]).unwrap().data, SlotData::I32(vec![0, 3, 15]));
    assert!(read([0, 3, 16]).unwrap_err().contains("16 columns"));
    assert!(read([-1, 3, 4]).unwrap_err().contains("-1"));
    assert!(read([3, 1, 3]).unwrap_err().contains("twice"));
    for (options, expected) in [
        (json!({"r": 17}), "fewer than r"),
        (json!({"target_modules": ["embed_tokens"]}), "embedding"),
        (json!({"rank_pattern": {"q_proj": 2}}), "rank_pattern"),
        (json!({"selection": "best"}), "selection"),
    ] {
        let message = fresh(&base, "paca", options).unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn plans_say_how_tensors_start_and_where_they_are_saved() {
    let (base, _dir) = model(|_| {});
    let plan =
        |method: &str, options: Value| AdapterPlan::new(&fresh(&base, method, options).unwrap(), 0, &base).unwrap();
    let of = |plan: &AdapterPlan, end: &str| plan.tensors.iter().find(|t| t.key.ends_with(end)).unwrap().clone();
    let targets = json!({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"});
    let lora = plan("lora", targets.clone());
    let a = of(&lora, "layers.1.self_attn.q_proj.lora_A");
    assert_eq!(a.file.as_deref(), Some("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"));
    assert_eq!((a.shape, a.trained, a.init), (vec![4, 16], true, Init::Normal { std: 0.25 }));
    assert_eq!(of(&lora, "scale").init, Init::Constant { value: 2.0 });
    assert_eq!((lora.config["r"].clone(), lora.config["target_modules"].clone()), (json!(4), json!(["q_proj"])));
    assert!(!lora.config.contains_key("base_model_name_or_path"));
    let bound = of(&plan("lora", json!({"target_modules": "all-linear"})), "lora_A").init;
    assert_eq!(bound, Init::Uniform { bound: 0.25 });

    let dora = plan("dora", targets);
    let Init::RowNorms(norms) = of(&dora, "lora_magnitude_vector").init else { panic!("{dora:?}") };
    assert_eq!((norms.weight.as_str(), norms.a), ("model.layers.0.self_attn.q_proj.weight", None));
    assert_eq!(dora.config["use_dora"], json!(true));

    let paca = plan("paca", json!({"r": 2, "selection": "gradient_norm", "calibration_batches": 3}));
    let indices = of(&paca, "v_proj.paca_indices");
    assert_eq!((indices.dtype.as_str(), indices.trained), ("I64", false));
    let tensor = "model.layers.0.self_attn.v_proj.weight".to_owned();
    assert_eq!(indices.init, Init::LargestGradientColumns { tensor, batches: 3 });
    assert_eq!(paca.config["target_modules"], json!(["q_proj", "v_proj"]), "PEFT's default, spelled out");
    assert!(!paca.config.contains_key("selection") && !paca.config.contains_key("bias"));
    assert_eq!(fresh(&base, "paca", json!({"selection": "gradient-norm"})).unwrap().requests().len(), 4);

    let again: AdapterPlan = serde_json::from_value(paca.to_json()).unwrap();
    assert_eq!(again, paca);
}

#[test]
fn whole_modules_and_biases_are_replaced_by_path() {
    let (base, _dir) = model(|c| c["attention_bias"] = true.into());
    let paths = |method: &str, options: Value| -> Vec<String> {
        fresh(&base, method, options).unwrap().replaced.into_iter().map(|r| r.path).collect()
    };
    let saved = json!({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "0.mlp"]});
    let mlp = |p: &str| format!("model.layers.0.mlp.{p}.weight");
    assert_eq!(paths("lora", saved), [mlp("gate_proj"), mlp("up_proj"), mlp("down_proj"), "lm_head.weight".into()]);
    let only = json!({"target_modules": ["q_proj"], "bias": "lora_only"});
    assert_eq!(paths("lora", only), [0, 1].map(|l| format!("model.layers.{l}.self_attn.q_proj.bias")));
    assert_eq!(paths("lora", json!({"target_modules": ["q_proj"], "bias": "all"})).len(), 8);
    let adapter = fresh(&base, "lora", json!({"target_modules": ["q_proj"], "bias": "all"})).unwrap();
    assert_eq!(adapter.replaced[0].file, "model.layers.0.self_attn.q_proj.base_layer.bias");
    assert_eq!(adapter.replaced[1].file, "model.layers.0.self_attn.k_proj.bias");

    let full = fresh(&base, "full", json!({"target_modules": ".*1\\.(mlp\\.up_proj|input_layernorm)"})).unwrap();
    let config = full.config.saved();
    let names = ["model.layers.1.input_layernorm", "model.layers.1.mlp.up_proj"];
    assert_eq!(config["target_modules"], json!("dummy-target-modules"));
    assert_eq!(
        json!(
            config["modules_to_save"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_str().unwrap())
                .collect::<std::collections::BTreeSet<_>>()
        ),
        json!(names)
    );
    let again = MethodConfig::from_json(&config).unwrap();
    assert_eq!(again.method.name(), "lora");
    assert_eq!(Adapter::fresh(&again, &base.modules).unwrap().replaced, full.replaced);

    let adapters = [full];
    let graph = Import::new(&base).adapters(&adapters).entries(&["train"]).train(0).graph().unwrap();
    verify(&graph).unwrap();
    let trained: Vec<&str> = graph.params.iter().filter(|p| p.role == Role::Train).map(|p| p.name.as_str()).collect();
    assert_eq!(trained, ["slot0.model.layers.1.input_layernorm.weight", "slot0.model.layers.1.mlp.up_proj.weight"]);
    assert!(!graph.params.iter().any(|p| p.name == "model.layers.1.mlp.up_proj.weight"), "the base's own is not read");
    let two = [adapters[0].clone(), adapters[0].clone()];
    let message = Import::new(&base).adapters(&two).entries(&["infer"]).graph().unwrap_err().to_string();
    assert!(message.contains("replaced as a whole by both"), "{message}");
}

#[test]
fn options_are_refused_by_name() {
    let (base, _dir) = model(|_| {});
    let cases = [
        ("lora", json!({"lora_dropout": 0.1}), "lora_dropout"),
        ("lora", json!({"init_lora_weights": "pissa_niter"}), "init_lora_weights"),
        ("lora", json!({"init_lora_weights": "orthogonal"}), "adapters that PEFT started so are read, but a new one"),
        (
            "lora",
            json!({"init_lora_weights": "x"}),
            "lora_ga and eva, of adapters that are made already orthogonal and mica",
        ),
        ("lora", json!({"peft_type": "PACA"}), "contradicts"),
        ("dora", json!({"use_dora": false}), "use_dora"),
        ("boft", json!({}), "known are lora"),
        ("lora", json!({"modules_to_save": ["lm_haed"]}), "nearest"),
        ("paca", json!({"bias": "lora_only"}), "bias"),
        ("lora", json!({"use_new_thing": true}), "use_new_thing"),
        ("galore", json!({"proj_type": "both"}), "proj_type"),
        ("fira", json!({"proj_type": "full"}), "proj_type"),
    ];
    for (method, options, expected) in cases {
        let message = fresh(&base, method, options).unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

/// A LoRA folder on `v_proj` with this configuration.
fn lora(dir: &Path, first: u32, config: Value) {
    let mut all = keys(json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["v_proj"]}));
    all.extend(keys(config));
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), Value::Object(all).to_string()).unwrap();
    let list = (0..2).flat_map(|l| {
        let name = |part: &str| format!("{PREFIX}model.layers.{l}.self_attn.v_proj.{part}.weight");
        [(name("lora_A"), vec![3, 16]), (name("lora_B"), vec![8, 3])]
    });
    write_tensors(&dir.join("adapter_model.safetensors"), &list.collect::<Vec<_>>(), first);
}

#[test]
fn a_changed_base_is_made_again_read_or_refused() {
    let (base, _dir) = model(|_| {});
    let open = |dir: &Path| Adapter::open(dir, None, &base.modules).map_err(|e| e.to_string());
    let plain: Vec<Vec<f32>> = ["0", "1"]
        .map(|l| base.param(&format!("model.layers.{l}.self_attn.v_proj.weight")).unwrap().read_f32().unwrap())
        .to_vec();
    for (name, why) in [("corda", "calibrated"), ("lora_ga", "gradients")] {
        let dir = folder("changed");
        lora(&dir, 50, json!({"init_lora_weights": name}));
        let refused = open(&dir).unwrap_err();
        assert!(refused.contains("initial_adapter") && refused.contains(why), "{refused}");
        // With the first factors beside it; those of the adapter itself change nothing.
        lora(&dir.join("initial_adapter"), 50, json!({"init_lora_weights": true}));
        close(&merged_all(&open(&dir).unwrap(), &base), &plain);
        lora(&dir.join("initial_adapter"), 60, json!({"init_lora_weights": true}));
        let other = merged_all(&open(&dir).unwrap(), &base);
        assert!(other.iter().flatten().zip(plain.iter().flatten()).any(|(a, b)| (a - b).abs() > 0.1));
        let converted = folder("changed-lora");
        to_lora(&open(&dir).unwrap(), &base, None, &converted).unwrap();
        let converted = open(&converted).unwrap();
        assert_eq!((converted.config.rank, converted.config.alpha, converted.sites[0].scale), (6, 12.0, 2.0));
        close(&merged_all(&converted, &base), &other);
    }
    for (name, noted) in [("pissa", false), ("olora", false), ("pissa_niter_2", true)] {
        let dir = folder("changed-again");
        lora(&dir, 50, json!({"init_lora_weights": name}));
        let adapter = open(&dir).unwrap();
        assert_eq!(!adapter.notes.is_empty(), noted, "{name}");
        let site = &adapter.sites[0];
        let without = edited(&adapter, site, &base, &plain[0]).unwrap();
        // What is taken out is the prepared start, and no more than its rank.
        let first = fresh(
            &base,
            "lora",
            json!({"init_lora_weights": name, "r": 3, "lora_alpha": 6,
                                                "target_modules": ["v_proj"]}),
        );
        let made = prepare(&first.unwrap(), &base, &Default::default(), 3).unwrap();
        let part = |p: &str| match &made[&format!("{}.{p}", site.module)].data {
            SlotData::F32(x) => x.clone(),
            SlotData::I32(_) => vec![],
        };
        let (a, b) = (part("lora_A"), part("lora_B"));
        assert_eq!((&a, &b), (&part("initial_A"), &part("initial_B")));
        for i in 0..8 * 16 {
            let ba: f32 = (0..3).map(|k| b[i / 16 * 3 + k] * a[k * 16 + i % 16]).sum();
            assert!((without[i] + 2.0 * ba - plain[0][i]).abs() < 1e-5, "{name}");
        }
        assert!(without.iter().zip(&plain[0]).any(|(a, b)| (a - b).abs() > 0.05), "{name} takes nothing out");
    }
}

#[test]
fn starts_that_make_no_sense_are_refused_by_name() {
    let (base, _dir) = model(|_| {});
    let cases = [
        ("lora", json!({"init_lora_weights": "loftq"}), "loftq"),
        ("dora", json!({"init_lora_weights": "pissa"}), "use_dora"),
        ("kasa", json!({"kasa_config": {"beta": -1}}), "kasa_config.beta"),
        ("kasa", json!({"init_lora_weights": "olora"}), "kasa_config"),
        ("pissa", json!({"r": 9, "target_modules": ["v_proj"]}), "8 singular values"),
        ("pissa", json!({"lora_alpha": -1, "target_modules": ["v_proj"]}), "scale"),
        ("olora", json!({"target_modules": ["embed_tokens"]}), "embedding"),
        ("kasa", json!({"r": 8, "target_modules": ["v_proj"]}), "lower r"),
        ("loldu", json!({"r": 9, "target_modules": ["v_proj"]}), "8 pivots"),
        ("corda", json!({"corda_config": {"corda_method": "xpm"}}), "corda_config.corda_method"),
        ("corda", json!({"corda_config": {"cache_file": "x"}}), "corda_config.cache_file"),
        ("lora-ga", json!({"lora_ga_config": {"direction": "up"}}), "lora_ga_config.direction"),
        ("eva", json!({"eva_config": {"rho": 2.0}}), "rho"),
    ];
    for (method, options, part) in cases {
        let why = fresh(&base, method, options).unwrap_err();
        assert!(why.contains(part), "{method}: {why}");
    }
}
