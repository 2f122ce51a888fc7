//! The blocks of codes that an import keeps beside the f32 weights of a folder: `blocks/model.safetensors`.
//!
//! Every tensor `[N, K]` of the weights that came in blocks is there under its name as U8 `[N, K/32 · bytes of a block]`:
//! the blocks of its rows, as ggml defines them; `__metadata__` maps the name to the format (`q4_1`). The f32 weights stay
//! what the folder's other readers see, and what the blocks stand for. Only the header is read here; whether the blocks
//! still give the f32 weights is for the runtime to compare, which reads values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pleach_ir::BlockFormat;
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::safetensors::{Writer, read_header};
use crate::tensors::{Dtype, TensorRef};

/// The folder, inside the model's.
pub const FOLDER: &str = "blocks";
/// The file in it.
pub const FILE: &str = "model.safetensors";

/// Where the blocks of a model folder are, if it has any.
pub fn file(model: &Path) -> PathBuf {
    model.join(FOLDER).join(FILE)
}

/// A writer for the blocks of these matrices: name, N, K, format. Their bytes follow in this order.
///
/// # Errors
/// A file that cannot be created.
pub(crate) fn writer(path: &Path, matrices: &[(&str, u64, u64, BlockFormat)]) -> Result<Writer> {
    let declared: Vec<_> =
        matrices.iter().map(|(name, n, k, f)| ((*name).to_owned(), Dtype::U8, vec![*n, width(*k, *f)])).collect();
    let formats: Map<String, Value> =
        matrices.iter().map(|(name, _, _, f)| ((*name).to_owned(), f.name().into())).collect();
    Writer::create_with(path, &declared, Value::Object(formats))
}

/// Bytes of a row of `k` values.
fn width(k: u64, format: BlockFormat) -> u64 {
    k / BlockFormat::VALUES * format.bytes()
}

/// The tensors of a checkpoint, by name, that its folder has in blocks too; none where it has no such file.
///
/// # Errors
/// A damaged file; a tensor without a format, of another type, or whose weight is missing or of another shape.
pub fn formats(checkpoint: &Checkpoint) -> Result<BTreeMap<String, BlockFormat>> {
    let path = file(&checkpoint.dir);
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let advice = format!("import the model again, or delete the folder `{FOLDER}`");
    let damaged = |e: Error| Error::format(&path, format!("cannot be used ({e}); {advice}"));
    let (tensors, metadata) = read_header(&path).map_err(damaged)?;
    let metadata: BTreeMap<String, String> = metadata.into_iter().collect();
    let weights: BTreeMap<&str, &TensorRef> = checkpoint.params().map(|(_, t)| (t.name.as_str(), t)).collect();
    let mut out = BTreeMap::new();
    for t in tensors {
        let fault = |what: String| Error::tensor(&path, &t.name, format!("{what}; {advice}"));
        let format = metadata.get(&t.name).ok_or_else(|| fault("has no format in `__metadata__`".into()))?;
        let format =
            BlockFormat::from_name(format).ok_or_else(|| fault(format!("is of the unknown format `{format}`")))?;
        let weight = weights.get(t.name.as_str()).ok_or_else(|| fault("belongs to no weight of the model".into()))?;
        let [n, k] = weight.shape[..] else {
            return Err(fault(format!("belongs to a weight of shape {:?}, which is no matrix", weight.shape)));
        };
        let whole = k.is_multiple_of(BlockFormat::VALUES);
        if t.dtype != Dtype::U8 || !whole || t.shape != [n, width(k, format)] {
            let (has, name) = (&t.shape, format.name());
            return Err(fault(format!("is {} {has:?}, not the {name} blocks of a weight [{n}, {k}]", t.dtype)));
        }
        out.insert(t.name, format);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::modules::ModuleTable;
    use crate::testing::{Folder, folder, tiny_llama, write_tensors};

    const DOWN: &str = "model.layers.0.mlp.down_proj.weight";

    /// A checkpoint of width 16 whose `down_proj` is [16, 32].
    fn model() -> Folder {
        let dir = folder("blocks");
        std::fs::write(dir.join("config.json"), tiny_llama().to_string()).unwrap();
        let table = ModuleTable::new(&ModelConfig::read(&dir).unwrap());
        let list: Vec<_> = table.iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
        write_tensors(&dir.join("model.safetensors"), &list, 0);
        std::fs::create_dir(dir.join(FOLDER)).unwrap();
        dir
    }

    fn write(dir: &Path, tensors: &[(&str, Dtype, [u64; 2])], metadata: Value) {
        let list: Vec<_> = tensors.iter().map(|(n, d, s)| ((*n).to_owned(), *d, s.to_vec())).collect();
        let mut w = Writer::create_with(&file(dir), &list, metadata).unwrap();
        for (_, d, s) in tensors {
            w.write(&vec![1; (s[0] * s[1] * d.size()) as usize]).unwrap();
        }
        w.finish().unwrap();
    }

    fn read(dir: &Path) -> Result<BTreeMap<String, BlockFormat>> {
        formats(&Checkpoint::open(dir).unwrap())
    }

    #[test]
    fn formats_come_by_name() {
        let dir = model();
        assert_eq!(read(&dir).unwrap(), BTreeMap::new());
        write(&dir, &[(DOWN, Dtype::U8, [16, 20])], serde_json::json!({"format": "pt", DOWN: "q4_1"}));
        assert_eq!(read(&dir).unwrap(), BTreeMap::from([(DOWN.to_owned(), BlockFormat::Q4_1)]));
        std::fs::remove_file(file(&dir)).unwrap();
        let mut w = writer(&file(&dir), &[(DOWN, 16, 32, BlockFormat::Q8_0)]).unwrap();
        w.write(&[0; 16 * 34]).unwrap();
        w.finish().unwrap();
        assert_eq!(read(&dir).unwrap()[DOWN], BlockFormat::Q8_0);
    }

    #[test]
    fn what_does_not_fit_the_weights_is_refused_with_a_way_out() {
        let dir = model();
        let up = "model.layers.0.mlp.up_proj.weight";
        let cases = [
            ((DOWN, Dtype::U8, [16, 20]), serde_json::json!({}), "has no format"),
            ((DOWN, Dtype::U8, [16, 20]), serde_json::json!({DOWN: "q5_0"}), "unknown format `q5_0`"),
            (
                (DOWN, Dtype::U8, [16, 20]),
                serde_json::json!({DOWN: "q4_0"}),
                "not the q4_0 blocks of a weight [16, 32]",
            ),
            ((DOWN, Dtype::U8, [15, 20]), serde_json::json!({DOWN: "q4_1"}), "is U8 [15, 20]"),
            ((DOWN, Dtype::I8, [16, 20]), serde_json::json!({DOWN: "q4_1"}), "is I8 [16, 20]"),
            // Rows of 16 values.
            ((up, Dtype::U8, [32, 10]), serde_json::json!({up: "q4_1"}), "of a weight [32, 16]"),
            (("nobody", Dtype::U8, [16, 20]), serde_json::json!({"nobody": "q4_1"}), "belongs to no weight"),
            (("model.norm.weight", Dtype::U8, [1, 20]), serde_json::json!({"model.norm.weight": "q4_1"}), "no matrix"),
        ];
        for (tensor, metadata, expected) in cases {
            write(&dir, &[tensor], metadata);
            let message = read(&dir).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("delete the folder `blocks`"), "{message}");
        }
        write(&dir, &[(DOWN, Dtype::U8, [16, 20])], serde_json::json!({DOWN: "q4_1"}));
        let whole = std::fs::read(file(&dir)).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(file(&dir), &whole[..cut]).unwrap();
            let message = read(&dir).unwrap_err().to_string();
            assert!(message.contains("delete the folder `blocks`"), "cut at {cut}: {message}");
        }
    }
}
