//! Matching folders: whole ones, faulty ones, other names.

use super::*;
use crate::config::ModelConfig;
use crate::safetensors::Writer;
use crate::testing::{folder, tiny_bert, tiny_llama, values, write_tensors};
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

#[test]
fn a_weight_of_two_modules_is_not_changed_for_both() {
    let fresh = |tied: bool, keys: Value| {
        let mut base = tiny_llama();
        base["tie_word_embeddings"] = tied.into();
        let base = ModelConfig::parse(Path::new("c"), base.as_object().unwrap()).unwrap();
        let mut all = json!({"target_modules": ["q_proj"], "ensure_weight_tying": true});
        all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let config = MethodConfig::named("lora", all.as_object().unwrap()).unwrap();
        Adapter::fresh(&config, &ModuleTable::new(&base)).map(|a| a.parameters()).map_err(|e| e.to_string())
    };
    let changes = [
        json!({"modules_to_save": ["embed_tokens"]}),
        json!({"modules_to_save": ["lm_head"]}),
        json!({"target_modules": ["q_proj", "embed_tokens"]}),
        json!({"target_modules": ["q_proj", "lm_head"]}),
    ];
    for keys in changes {
        let refused = fresh(true, keys.clone()).unwrap_err();
        assert!(refused.contains("`ensure_weight_tying` is true and") && refused.contains("shares its"), "{refused}");
        assert!(fresh(false, keys).is_ok());
    }
    assert!(fresh(true, json!({})).is_ok());
    let mut base = tiny_llama();
    base["tie_word_embeddings"] = true.into();
    let base = ModelConfig::parse(Path::new("c"), base.as_object().unwrap()).unwrap();
    let dir = folder("adapter-tied");
    let config = json!({"peft_type": "LORA", "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": true});
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    write_tensors(&dir.join("adapter_model.safetensors"), &[], 0);
    let refused = Adapter::open(&dir, None, &ModuleTable::new(&base)).unwrap_err().to_string();
    assert!(refused.contains("shares its weight"), "{refused}");
}

#[test]
fn biases_are_saved_again_under_the_names_of_wrappers() {
    let base = ModelConfig::parse(Path::new("c"), tiny_bert().as_object().unwrap()).unwrap();
    let modules = ModuleTable::new(&base);
    let keys = json!({"modules_to_save": ["LayerNorm"], "bias": "all", "target_modules": ["query"], "r": 2});
    let config = MethodConfig::named("lora", keys.as_object().unwrap()).unwrap();
    let fresh = Adapter::fresh(&config, &modules).unwrap();
    let mut list: Tensors = fresh.replaced.iter().map(|r| (format!("{PREFIX}{}", r.file), r.shape.clone())).collect();
    for s in &fresh.sites {
        list.push((format!("{PREFIX}{}.lora_A.weight", s.module), vec![2, 16]));
        list.push((format!("{PREFIX}{}.lora_B.weight", s.module), vec![16, 2]));
    }
    let dir = folder("adapter-wrapped");
    let saved = Value::Object(config.saved());
    std::fs::write(dir.join("adapter_config.json"), saved.to_string()).unwrap();
    let open = |more: &[(&str, u32)]| {
        let bias = list.iter().position(|t| t.0.ends_with("embeddings.LayerNorm.bias")).unwrap() as u32;
        let mut all: Vec<(String, Vec<u64>, u32)> =
            list.iter().enumerate().map(|(i, (name, shape))| (name.clone(), shape.clone(), i as u32)).collect();
        all.extend(
            more.iter()
                .map(|(part, other)| (format!("{PREFIX}embeddings.LayerNorm.{part}.bias"), vec![16], bias + other)),
        );
        let declared: Vec<_> = all.iter().map(|(name, shape, _)| (name.clone(), Dtype::F32, shape.clone())).collect();
        let mut writer = Writer::create(&dir.join("adapter_model.safetensors"), &declared).unwrap();
        all.iter().for_each(|(_, shape, i)| writer.write_f32(&values(*i, shape.iter().product())).unwrap());
        writer.finish().unwrap();
        Adapter::open(&dir, None, &modules).map(|a| a.tensors).map_err(|e| e.to_string())
    };
    assert_eq!(open(&[]), Ok(list.len()));
    assert_eq!(open(&[("modules_to_save", 0), ("original_module", 7)]), Ok(list.len() + 2));
    assert!(open(&[("modules_to_save", 1)]).unwrap_err().contains("differs from"));
    assert!(open(&[("modules_to_keep", 0)]).unwrap_err().contains("belongs to no module"));
}
