//! Lowered graphs, run by the reference interpreter, against transformers and PEFT.
//!
//! The constants are what `tests/reference.py` prints: one number per token, the row's product with a fixed vector.

use std::collections::BTreeMap;

use pleach_ir::interp::{Data, Symbols, Tensor, run_entry_with};
use pleach_ir::{ParamId, Role, Source, Sym};
use serde_json::{Value, json};

use super::*;
use crate::adapter::{SlotData, SlotValue, slot_values};
use crate::modules::ModuleTable;
use crate::testing::{Folder, folder, tiny_bert, tiny_llama, values, write_tensors};

const LLAMA: [f64; 8] = [2.09959, 3.87599, 3.92773, 1.53238, -6.46631, 8.10495, 8.30445, 8.32177];
const LLAMA_WIDE: [f64; 8] = [-2.22068, 1.22431, 1.89943, 3.0314, 4.60746, -3.45185, 1.52303, 3.51415];
const LLAMA_ONE: [f64; 8] = [8.40367, 7.84278, -7.97122, -8.16883, -7.76491, 2.81966, 5.29005, 4.58912];
const LLAMA_TWO: [f64; 8] = [-2.09665, 0.83457, -6.39402, -6.01951, -5.60445, 0.86829, 2.94657, 3.06604];
const LLAMA_ENDS: [f64; 8] = [0.8417, 1.81756, -0.99935, 7.56616, 1.3443, 0.22323, 0.20744, 1.2403];
const BERT: [f64; 8] = [4.00371, 3.91501, 4.03126, 4.00682, 4.04669, 3.72459, 3.72835, 3.71157];
const BERT_TANH: [f64; 8] = [4.00402, 3.91517, 4.03158, 4.00721, 4.04702, 3.72486, 3.72856, 3.71177];
const BERT_RELU_ADAPTED: [f64; 8] = [4.98501, 4.96011, 4.9793, 4.97963, 4.97909, 5.10131, 5.08541, 5.07726];

const IDS: [i32; 8] = [3, 17, 39, 0, 8, 21, 5, 5];
const POSITIONS: [i32; 8] = [0, 1, 2, 3, 4, 0, 1, 2];
const TYPES: [i32; 8] = [0, 0, 1, 1, 1, 1, 0, 0];

fn with(mut config: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn model(config: &Value) -> (Checkpoint, Folder) {
    let dir = folder("lower-model");
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let modules = ModuleTable::new(&ModelConfig::read(&dir).unwrap());
    let list: Vec<_> = modules.iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
    write_tensors(&dir.join("model.safetensors"), &list, 0);
    (Checkpoint::open(&dir).unwrap(), dir)
}

fn adapter(model: &Checkpoint, slot: u32, config: Value) -> (Adapter, Folder) {
    let dir = folder("lower-adapter");
    let config = with(json!({"peft_type": "LORA"}), config);
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let parsed = crate::peft::MethodConfig::read(&dir).unwrap();
    let mut list = Vec::new();
    for t in crate::peft::match_modules(&parsed, &model.modules).unwrap() {
        let (prefix, suffix) = if t.embedding { ("embedding_", "") } else { ("", ".weight") };
        let name = |part: &str| format!("base_model.model.{}.lora_{prefix}{part}{suffix}", t.module);
        list.push((name("A"), vec![t.rank, t.input]));
        list.push((name("B"), vec![t.output, t.rank]));
    }
    list.sort();
    write_tensors(&dir.join("adapter_model.safetensors"), &list, 1000 * (slot + 1));
    (Adapter::open(&dir, None, &model.modules).unwrap(), dir)
}

/// Values of all parameters; caches are zeros of `cache` slots.
fn load(graph: &Graph, model: &Checkpoint, adapters: &[Adapter], cache: u64) -> Vec<Tensor> {
    let slots: Vec<BTreeMap<String, SlotValue>> =
        adapters.iter().map(|a| slot_values(a).into_iter().collect()).collect();
    let value = |param: &pleach_ir::Param| {
        let tensor = match &param.source {
            Source::Checkpoint(name) => model.params().find(|(_, t)| t.name == *name).unwrap().1.clone(),
            Source::Adapter { slot, key } => {
                let t = slots[*slot as usize][key].read(model).unwrap();
                return match t.data {
                    SlotData::F32(x) => Tensor::f32(t.shape, x),
                    SlotData::I32(x) => Tensor::i32(t.shape, x),
                };
            }
            _ => {
                let width = param.ty.shape[1].known().unwrap();
                return Tensor::f32([cache, width], vec![0.0; (cache * width) as usize]);
            }
        };
        Tensor::f32(tensor.shape.clone(), tensor.read_f32().unwrap())
    };
    graph.params.iter().map(value).collect()
}

fn inputs(list: &[(&str, &[i32])]) -> BTreeMap<String, Tensor> {
    list.iter().map(|(name, v)| ((*name).to_owned(), Tensor::i32([v.len() as u64], v.to_vec()))).collect()
}

/// Runs an entry; returns its output's rows times the fixed vector, and keeps what it assigned.
fn run(graph: &Graph, entry: &str, params: &mut [Tensor], given: &[(&str, &[i32])]) -> Vec<f64> {
    let symbols = Symbols::from([(Sym::P, 32)]);
    let given = inputs(given);
    let current = params.to_vec();
    let value = |id: ParamId| current.get(id.index());
    let result = run_entry_with(&graph.params, &value, graph.entry(entry).unwrap(), &given, &symbols).unwrap();
    for (id, tensor) in result.assigns {
        params[id.index()] = tensor;
    }
    let output = result.outputs.into_values().next().unwrap();
    let Data::F32(rows) = output.data else { panic!("not f32") };
    let width = output.shape[1] as usize;
    let fixed = values(777, width as u64);
    rows.chunks(width).map(|row| row.iter().zip(&fixed).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()).collect()
}

fn infer(config: Value, adapters: &[Value]) -> Vec<f64> {
    let (model, _dir) = model(&config);
    let (adapters, _dirs): (Vec<_>, Vec<_>) =
        adapters.iter().enumerate().map(|(i, c)| adapter(&model, i as u32, c.clone())).unzip();
    let graph = import(&model, &adapters, &["infer"]).unwrap();
    let mut params = load(&graph, &model, &adapters, 0);
    let packed: [(&str, &[i32]); 6] = [
        ("input_ids", &IDS),
        ("positions", &POSITIONS),
        ("q_segments", &[0, 5, 8]),
        ("kv_start", &[0, 5]),
        ("kv_len", &[5, 3]),
        ("token_type_ids", &TYPES),
    ];
    run(&graph, "infer", &mut params, &packed)
}

fn assert_close(actual: &[f64], expected: &[f64]) {
    let size = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (a, e) in actual.iter().zip(expected) {
        assert!((a - e).abs() <= 1e-5 * size, "{actual:?}\n{expected:?}");
    }
    assert_eq!(actual.len(), expected.len());
}

fn first_adapter() -> Value {
    json!({"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 5}})
}

fn second_adapter() -> Value {
    json!({"r": 4, "lora_alpha": 2, "use_rslora": true, "target_modules": "all-linear", "alpha_pattern": {"0.mlp.up_proj": 1}})
}

#[test]
fn llama_agrees_with_transformers() {
    assert_close(&infer(tiny_llama(), &[]), &LLAMA);
    let wide = json!({
        "attention_bias": true, "mlp_bias": true, "head_dim": 6, "rope_theta": null,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    });
    assert_close(&infer(with(tiny_llama(), wide), &[]), &LLAMA_WIDE);
}

#[test]
fn adapters_agree_with_peft_and_add_up() {
    assert_close(&infer(tiny_llama(), &[first_adapter()]), &LLAMA_ONE);
    assert_close(&infer(tiny_llama(), &[first_adapter(), second_adapter()]), &LLAMA_TWO);
}

#[test]
fn adapters_of_embedding_and_head_agree_with_peft() {
    let ends = json!({"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head", "k_proj"]});
    assert_close(&infer(tiny_llama(), &[ends]), &LLAMA_ENDS);
}

#[test]
fn bert_agrees_with_transformers_and_peft() {
    assert_close(&infer(tiny_bert(), &[]), &BERT);
    assert_close(&infer(with(tiny_bert(), json!({"hidden_act": "gelu_new"})), &[]), &BERT_TANH);
    let relu = with(tiny_bert(), json!({"hidden_act": "relu"}));
    let adapter = json!({"r": 2, "lora_alpha": 3, "target_modules": ["query", "dense"]});
    assert_close(&infer(relu, &[adapter]), &BERT_RELU_ADAPTED);
}

#[test]
fn generating_step_by_step_equals_one_pass() {
    let (model, _dir) = model(&tiny_llama());
    let (adapter, _adir) = adapter(&model, 0, first_adapter());
    let adapters = [adapter];
    let graph = import(&model, &adapters, &["infer", "generate"]).unwrap();
    let mut params = load(&graph, &model, &adapters, 16);
    // Sequence 0 owns slots 1.., sequence 1 owns slots 9..: first three and two tokens, then one each, then one.
    let start: [i32; 2] = [1, 9];
    let prefill = run(
        &graph,
        "generate",
        &mut params,
        &[
            ("input_ids", &[3, 17, 39, 21, 5]),
            ("positions", &[0, 1, 2, 0, 1]),
            ("q_segments", &[0, 3, 5]),
            ("kv_start", &start),
            ("kv_len", &[3, 2]),
            ("slots", &[1, 2, 3, 9, 10]),
            ("last", &[2, 4]),
        ],
    );
    assert_close(&prefill, &[LLAMA_ONE[2], LLAMA_ONE[6]]);
    let both = run(
        &graph,
        "generate",
        &mut params,
        &[
            ("input_ids", &[0, 5]),
            ("positions", &[3, 2]),
            ("q_segments", &[0, 1, 2]),
            ("kv_start", &start),
            ("kv_len", &[4, 3]),
            ("slots", &[4, 11]),
            ("last", &[0, 1]),
        ],
    );
    assert_close(&both, &[LLAMA_ONE[3], LLAMA_ONE[7]]);
    let one = run(
        &graph,
        "generate",
        &mut params,
        &[
            ("input_ids", &[8]),
            ("positions", &[4]),
            ("q_segments", &[0, 1]),
            ("kv_start", &[1]),
            ("kv_len", &[5]),
            ("slots", &[5]),
            ("last", &[0]),
        ],
    );
    assert_close(&one, &[LLAMA_ONE[4]]);
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_counted_rows() {
    let (model, _dir) = model(&tiny_llama());
    let (adapter, _adir) = adapter(&model, 0, first_adapter());
    let adapters = [adapter];
    let graph =
        Import::new(&model).adapters(&adapters).entries(&["infer", "train", "evaluate"]).train(0).graph().unwrap();
    pleach_ir::verify::verify(&graph).unwrap();
    let role = |name: &str| graph.params.iter().find(|p| p.name == name).unwrap().role;
    assert_eq!(role("slot0.model.layers.0.self_attn.q_proj.lora_A"), Role::Train);
    assert_eq!(role("slot0.model.layers.0.self_attn.q_proj.scale"), Role::Frozen);
    let params = load(&graph, &model, &adapters, 0);
    let symbols = Symbols::from([(Sym::P, 32)]);
    let mut given = inputs(&[
        ("input_ids", &IDS),
        ("positions", &POSITIONS),
        ("q_segments", &[0, 5, 8]),
        ("kv_start", &[0, 5]),
        ("kv_len", &[5, 3]),
    ]);
    let output = |name: &str, given: &BTreeMap<String, Tensor>| {
        let entry = graph.entry(name).unwrap();
        let value = |id: ParamId| params.get(id.index());
        let result = run_entry_with(&graph.params, &value, entry, given, &symbols).unwrap();
        let Data::F32(x) = result.outputs.into_values().next().unwrap().data else { panic!("not f32") };
        x
    };
    let logits = output("infer", &given);
    let (rows, labels) = ([1usize, 3, 6], [39usize, 8, 5]);
    let expected: f64 = rows
        .iter()
        .zip(labels)
        .map(|(row, label)| {
            let row = &logits[row * 40..][..40];
            row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln() - f64::from(row[label])
        })
        .sum();
    given.extend(inputs(&[("rows", &[1, 3, 6]), ("labels", &[39, 8, 5])]));
    given.insert("loss_scale".into(), Tensor::f32([], vec![0.25]));
    for entry in ["train", "evaluate"] {
        let loss = output(entry, &given);
        assert!((f64::from(loss[0]) - 0.25 * expected).abs() < 1e-5 * expected, "{loss:?} {expected}");
    }
}

#[test]
fn graphs_are_shared_named_and_deterministic() {
    let (model, _dir) = model(&with(tiny_llama(), json!({"num_hidden_layers": 3})));
    let (adapter, _adir) = adapter(&model, 0, first_adapter());
    let adapters = [adapter];
    let build = || import(&model, &adapters, &["infer", "generate"]).unwrap();
    let graph = build();
    assert_eq!(graph, build());
    pleach_ir::verify::verify(&graph).unwrap();
    let names: Vec<&str> = graph.params.iter().map(|p| p.name.as_str()).collect();
    assert!(names.contains(&"slot0.model.layers.2.mlp.down_proj.lora_B"));
    assert!(names.contains(&"slot0.model.layers.0.self_attn.q_proj.scale"));
    assert!(names.contains(&"cache.2.v"));
    let unique: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
    assert!(graph.entries.iter().all(|e| e.nodes.iter().all(|n| n.op.is_leaf() || n.origin.is_some())));
}

#[test]
fn encoders_do_not_generate() {
    let (model, _dir) = model(&tiny_bert());
    assert!(import(&model, &[], &["generate"]).unwrap_err().to_string().contains("encoder"));
    assert!(import(&model, &[], &["evaluate"]).unwrap_err().to_string().contains("encoder"));
    assert!(import(&model, &[], &["train"]).unwrap_err().to_string().contains("`train`"));
    assert!(import(&model, &[], &["learn"]).unwrap_err().to_string().contains("no entry `learn`"));
}
