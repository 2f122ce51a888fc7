//! The modules of a model as transformers names them: what adapters are matched against, and which parameters a
//! checkpoint must hold.
//!
//! Paths are those of `LlamaForCausalLM` ("model.layers.0.self_attn.q_proj") and `BertModel`
//! ("encoder.layer.0.attention.self.query"). Containers are listed too, since a pattern that matches one is a mistake
//! worth reporting. Modules without parameters (activations, dropout) are listed as [`ModuleKind::Other`].

use crate::config::{BertConfig, LlamaConfig, LlamaFamily, ModelConfig};
use crate::coupling::{Member, couple};

/// What a module is, with its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// y = x · Wᵀ + b, W [out, in].
    Linear {
        /// Width of x.
        input: u64,
        /// Width of y.
        output: u64,
        /// Whether there is a bias [out].
        bias: bool,
    },
    /// Table [rows, width].
    Embedding {
        /// Number of rows.
        rows: u64,
        /// Width of a row.
        width: u64,
    },
    /// Scale [width], and a shift of the same width if `bias`.
    Norm {
        /// Width of the normalised row.
        width: u64,
        /// Whether there is a shift.
        bias: bool,
    },
    /// A container, an activation, dropout: nothing that an adapter can attach to.
    Other,
}

/// One module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Dotted path.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Whether it is the output head, which "all-linear" leaves out.
    pub output_head: bool,
    /// Its part in a coupling.
    pub member: Option<Member>,
}

/// Whether an entry computes this module: an encoder's pooler comes after the last hidden state.
pub(crate) fn is_computed(path: &str) -> bool {
    !path.starts_with("pooler.")
}

/// A parameter that belongs to a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Dotted path with `.weight` or `.bias`.
    pub path: String,
    /// Row-major shape.
    pub shape: Vec<u64>,
}

/// All modules of one model, in the order of `named_modules()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleTable {
    modules: Vec<Module>,
    /// Name under which head-bearing classes hold the bare model: "model" or "bert".
    wrapper: &'static str,
    /// Whether the paths of this table carry the wrapper's name.
    wrapped: bool,
    /// Whether the embedding's table is the output head's weight.
    tied: bool,
    default_targets: &'static [&'static str],
    scaled_targets: &'static [&'static str],
}

impl Module {
    /// The parameters of the module with their shapes.
    pub fn parameters(&self) -> Vec<Parameter> {
        let parameter = |name: &str, shape: Vec<u64>| Parameter { path: format!("{}.{name}", self.path), shape };
        match self.kind {
            ModuleKind::Linear { input, output, bias } => {
                let mut list = vec![parameter("weight", vec![output, input])];
                list.extend(bias.then(|| parameter("bias", vec![output])));
                list
            }
            ModuleKind::Embedding { rows, width } => vec![parameter("weight", vec![rows, width])],
            ModuleKind::Norm { width, bias } => {
                let mut list = vec![parameter("weight", vec![width])];
                list.extend(bias.then(|| parameter("bias", vec![width])));
                list
            }
            ModuleKind::Other => Vec::new(),
        }
    }
}

impl ModuleTable {
    /// The modules of a model.
    pub fn new(config: &ModelConfig) -> ModuleTable {
        match config {
            ModelConfig::Llama(c) => llama(c),
            ModelConfig::Bert(c) => bert(c),
        }
    }

    /// All modules in order.
    pub fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter()
    }

    /// The module at `path`.
    pub fn get(&self, path: &str) -> Option<&Module> {
        self.modules.iter().find(|m| m.path == path)
    }

    /// `target_modules` where an adapter's configuration leaves them out, as PEFT fills them in.
    pub fn default_targets(&self) -> &'static [&'static str] {
        self.default_targets
    }

    /// The same for methods that scale activations.
    pub fn scaled_targets(&self) -> &'static [&'static str] {
        self.scaled_targets
    }

    /// Last names of the consumers of couplings.
    pub fn consumers(&self) -> &'static [&'static str] {
        match self.wrapper {
            "model" => &["o_proj", "down_proj"],
            _ => &["output.dense"],
        }
    }

    /// The prefix ("model." or "bert.") that other transformers classes of this family add or leave out.
    pub fn wrapper(&self) -> &'static str {
        self.wrapper
    }

    /// Whether this table's paths carry the wrapper.
    pub fn is_wrapped(&self) -> bool {
        self.wrapped
    }

    /// Whether the module's weight is shared: by the embedding and the output head, where the model ties them.
    pub(crate) fn is_tied(&self, module: &Module) -> bool {
        self.tied && (module.output_head || matches!(module.kind, ModuleKind::Embedding { .. }))
    }

    /// The same modules as the other transformers class names them (`LlamaModel` for `LlamaForCausalLM`, a class with a
    /// head for `BertModel`), each with its path in `self`.
    pub fn renamed(&self) -> (ModuleTable, Vec<String>) {
        let prefix = format!("{}.", self.wrapper);
        let (mut modules, mut origins) = (Vec::new(), Vec::new());
        if !self.wrapped {
            let path = self.wrapper.into();
            modules.push(Module { path, kind: ModuleKind::Other, output_head: false, member: None });
            origins.push(String::new());
        }
        let rename = |path: &str| match self.wrapped {
            true => path.strip_prefix(&prefix).map(str::to_owned),
            false => Some(format!("{prefix}{path}")),
        };
        for module in &self.modules {
            let Some(path) = rename(&module.path) else { continue };
            origins.push(module.path.clone());
            let member = module.member.clone().and_then(|m| Some(Member { consumer: rename(&m.consumer)?, ..m }));
            modules.push(Module { path, member, ..module.clone() });
        }
        (ModuleTable { modules, wrapped: !self.wrapped, ..self.clone() }, origins)
    }
}

struct Builder(Vec<Module>);

impl Builder {
    fn add(&mut self, path: String, kind: ModuleKind) {
        self.0.push(Module { path, kind, output_head: false, member: None });
    }

    fn linear(&mut self, path: String, input: u64, output: u64, bias: bool) {
        self.add(path, ModuleKind::Linear { input, output, bias });
    }

    fn other(&mut self, paths: &[String]) {
        for path in paths {
            self.add(path.clone(), ModuleKind::Other);
        }
    }
}

fn llama(c: &LlamaConfig) -> ModuleTable {
    let mut b = Builder(Vec::new());
    let norm = ModuleKind::Norm { width: c.hidden, bias: false };
    b.other(&["model".into()]);
    b.add("model.embed_tokens".into(), ModuleKind::Embedding { rows: c.vocab, width: c.hidden });
    b.other(&["model.layers".into()]);
    for i in 0..c.layers {
        let p = format!("model.layers.{i}");
        b.other(&[p.clone(), format!("{p}.self_attn")]);
        b.linear(format!("{p}.self_attn.q_proj"), c.hidden, c.heads * c.head_dim, c.qkv_bias);
        b.linear(format!("{p}.self_attn.k_proj"), c.hidden, c.kv_heads * c.head_dim, c.qkv_bias);
        b.linear(format!("{p}.self_attn.v_proj"), c.hidden, c.kv_heads * c.head_dim, c.qkv_bias);
        b.linear(format!("{p}.self_attn.o_proj"), c.heads * c.head_dim, c.hidden, c.out_bias);
        b.other(&[format!("{p}.mlp")]);
        b.linear(format!("{p}.mlp.gate_proj"), c.hidden, c.intermediate, c.mlp_bias);
        b.linear(format!("{p}.mlp.up_proj"), c.hidden, c.intermediate, c.mlp_bias);
        b.linear(format!("{p}.mlp.down_proj"), c.intermediate, c.hidden, c.mlp_bias);
        b.other(&[format!("{p}.mlp.act_fn")]);
        b.add(format!("{p}.input_layernorm"), norm);
        b.add(format!("{p}.post_attention_layernorm"), norm);
        let group = c.heads / c.kv_heads.max(1) * c.head_dim;
        let attention = [("q", group), ("k", c.head_dim), ("v", c.head_dim)];
        let attention = attention.map(|(n, width)| (format!("{p}.self_attn.{n}_proj"), width));
        couple(&mut b.0, c.kv_heads, &attention, (&format!("{p}.self_attn.o_proj"), group));
        let feedforward = ["gate", "up"].map(|n| (format!("{p}.mlp.{n}_proj"), 1));
        couple(&mut b.0, c.intermediate, &feedforward, (&format!("{p}.mlp.down_proj"), 1));
    }
    b.add("model.norm".into(), norm);
    b.other(&["model.rotary_emb".into()]);
    b.linear("lm_head".into(), c.hidden, c.vocab, false);
    if let Some(head) = b.0.last_mut() {
        head.output_head = true;
    }
    let default_targets: &[&str] = match c.family {
        LlamaFamily::Llama | LlamaFamily::Mistral | LlamaFamily::Qwen2 => &["q_proj", "v_proj"],
    };
    let scaled_targets: &[&str] = match c.family {
        LlamaFamily::Llama | LlamaFamily::Mistral => &["k_proj", "v_proj", "down_proj"],
        LlamaFamily::Qwen2 => &["q_proj", "v_proj", "down_proj"],
    };
    ModuleTable { modules: b.0, wrapper: "model", wrapped: true, tied: c.tied_head, default_targets, scaled_targets }
}

fn bert(c: &BertConfig) -> ModuleTable {
    let mut b = Builder(Vec::new());
    let d = c.hidden;
    let norm = ModuleKind::Norm { width: d, bias: true };
    b.other(&["embeddings".into()]);
    b.add("embeddings.word_embeddings".into(), ModuleKind::Embedding { rows: c.vocab, width: d });
    b.add("embeddings.position_embeddings".into(), ModuleKind::Embedding { rows: c.max_positions, width: d });
    b.add("embeddings.token_type_embeddings".into(), ModuleKind::Embedding { rows: c.type_vocab, width: d });
    b.add("embeddings.LayerNorm".into(), norm);
    b.other(&["embeddings.dropout".into(), "encoder".into(), "encoder.layer".into()]);
    for i in 0..c.layers {
        let p = format!("encoder.layer.{i}");
        b.other(&[p.clone(), format!("{p}.attention"), format!("{p}.attention.self")]);
        for part in ["query", "key", "value"] {
            b.linear(format!("{p}.attention.self.{part}"), d, d, true);
        }
        b.other(&[format!("{p}.attention.self.dropout"), format!("{p}.attention.output")]);
        b.linear(format!("{p}.attention.output.dense"), d, d, true);
        b.add(format!("{p}.attention.output.LayerNorm"), norm);
        b.other(&[format!("{p}.attention.output.dropout"), format!("{p}.intermediate")]);
        b.linear(format!("{p}.intermediate.dense"), d, c.intermediate, true);
        b.other(&[format!("{p}.intermediate.intermediate_act_fn"), format!("{p}.output")]);
        b.linear(format!("{p}.output.dense"), c.intermediate, d, true);
        b.add(format!("{p}.output.LayerNorm"), norm);
        b.other(&[format!("{p}.output.dropout")]);
        let attention = ["query", "key", "value"].map(|n| (format!("{p}.attention.self.{n}"), d / c.heads.max(1)));
        couple(&mut b.0, c.heads, &attention, (&format!("{p}.attention.output.dense"), d / c.heads.max(1)));
        let feedforward = [(format!("{p}.intermediate.dense"), 1)];
        couple(&mut b.0, c.intermediate, &feedforward, (&format!("{p}.output.dense"), 1));
    }
    b.other(&["pooler".into()]);
    b.linear("pooler.dense".into(), d, d, true);
    b.other(&["pooler.activation".into()]);
    let scaled_targets = &["key", "value", "output.dense"];
    ModuleTable {
        modules: b.0,
        wrapper: "bert",
        wrapped: false,
        tied: false,
        default_targets: &["query", "value"],
        scaled_targets,
    }
}
