//! Matching folders: whole ones, faulty ones, other names.

use super::*;
use crate::config::ModelConfig;
use crate::testing::{folder, tiny_llama, write_tensors};
use serde_json::{Value, json};

type Tensors = Vec<(String, Vec<u64>)>;

fn open(config: Value, edit: impl Fn(&mut Tensors)) -> std::result::Result<Adapter, String> {
    let base = ModelConfig::parse(Path::new("c"), tiny_llama().as_object().unwrap()).unwrap();
    let modules = ModuleTable::new(&base);
    let mut list = Tensors::new();
    for layer in 0..2 {
        for (proj, out) in [("q_proj", 16), ("v_proj", 8)] {
            let module = format!("{PREFIX}model.layers.{layer}.self_attn.{proj}");
            list.push((format!("{module}.lora_A.weight"), vec![4, 16]));
            list.push((format!("{module}.lora_B.weight"), vec![out, 4]));
        }
    }
    edit(&mut list);
    let dir = folder("adapter");
    let mut full = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]});
    for (k, v) in config.as_object().unwrap() {
        full[k] = v.clone();
    }
    std::fs::write(dir.join("adapter_config.json"), full.to_string()).unwrap();
    write_tensors(&dir.join("adapter_model.safetensors"), &list, 0);
    Adapter::open(&dir, Some("style"), &modules).map_err(|e| e.to_string())
}

#[test]
fn a_whole_adapter_is_matched() {
    let adapter = open(json!({}), |_| {}).unwrap();
    assert_eq!((adapter.sites.len(), adapter.name.as_str()), (4, "style"));
    assert_eq!(adapter.sites[3].module, "model.layers.1.self_attn.v_proj");
    assert_eq!(
        (adapter.sites[3].scale, adapter.sites[3].values["lora_B"].tensor().unwrap().shape.clone()),
        (2.0, vec![8, 4])
    );
    assert_eq!(adapter.parameters(), 2 * (4 * 16 + 16 * 4 + 4 * 16 + 8 * 4));
}

#[test]
fn adapters_of_the_bare_model_fit_too() {
    let adapter = open(json!({}), |l| l.iter_mut().for_each(|t| t.0 = t.0.replace("model.model.", "model."))).unwrap();
    assert_eq!(adapter.sites[0].module, "model.layers.0.self_attn.q_proj");
}

#[test]
fn faults_name_the_tensor_and_the_nearest_candidate() {
    type Edit = fn(&mut Tensors);
    let rename: Edit = |l| l[0].0 = l[0].0.replace("q_proj", "q_porj");
    let cases: [(Value, Edit, &str); 8] = [
        (json!({}), rename, "nearest name is `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`"),
        (json!({}), |l| drop(l.remove(0)), "is missing (1 of 8"),
        (json!({}), |l| l[0].1 = vec![5, 16], "rank 4"),
        (json!({"r": 3}), |_| {}, "make it [3, 16]"),
        (json!({"target_modules": ["q_proj"]}), |_| {}, "targets"),
        (json!({"target_modules": ["embed_tokens"]}), |_| {}, "belongs to no module"),
        (json!({}), |l| l.iter_mut().for_each(|t| t.0 = t.0.replace("base_model.", "")), "does not start with"),
        (
            json!({}),
            |l| l.push((format!("{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"), vec![16])),
            "DoRA",
        ),
    ];
    for (config, edit, expected) in cases {
        let message = open(config, edit).unwrap_err();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn embeddings_and_copies_of_base_weights() {
    let dir = folder("adapter-base");
    std::fs::write(dir.join("config.json"), tiny_llama().to_string()).unwrap();
    let modules = ModuleTable::new(&ModelConfig::read(&dir).unwrap());
    let list: Vec<_> = modules.iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
    write_tensors(&dir.join("model.safetensors"), &list, 0);
    let base = Checkpoint::open(&dir).unwrap();
    let config = json!({"peft_type": "LORA", "r": 4, "target_modules": ["embed_tokens"]});
    let name = format!("{PREFIX}model.embed_tokens");
    let write = |first: u32| {
        let list = [
            // The first tensor of the base is the embedding: with the same index it has the same values.
            (format!("{name}.base_layer.weight"), vec![40, 16]),
            (format!("{name}.lora_embedding_A"), vec![4, 40]),
            (format!("{name}.lora_embedding_B"), vec![16, 4]),
        ];
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        write_tensors(&dir.join("adapter_model.safetensors"), &list, first);
        Adapter::open(&dir, None, &base.modules).unwrap()
    };
    let adapter = write(0);
    assert!(adapter.sites[0].embedding && adapter.copies[0].0 == "model.embed_tokens.weight");
    adapter.check_copies(&base).unwrap();
    assert!(write(5).check_copies(&base).unwrap_err().to_string().contains("another base"));
}

#[test]
fn rank_patterns_decide_shapes() {
    let adapter = open(json!({"rank_pattern": {"v_proj": 6}}), |l| {
        for (name, shape) in l.iter_mut().filter(|t| t.0.contains("v_proj")) {
            let at = usize::from(name.contains("lora_B"));
            shape[at] = 6;
        }
    });
    assert_eq!(adapter.unwrap().sites[1].rank, 6);
}
