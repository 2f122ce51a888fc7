//! `pleach import`: a GGUF file as a Hugging Face folder.

use crate::args::ImportArgs;
use crate::failure::Result;
use crate::report::{self, Ui, bytes, count};
use pleach_frontend::gguf::{ImportOptions, import_gguf};
use serde_json::json;

/// Imports.
///
/// # Errors
/// What the reader refuses, or a folder that holds files already.
pub(crate) fn import(ui: &Ui, args: &ImportArgs) -> Result<()> {
    let options = ImportOptions { overwrite: args.overwrite, blocks: !args.no_blocks };
    let r = import_gguf(&args.file, &args.out, &options)?;
    if args.json {
        let types: serde_json::Map<_, _> = r.types.iter().map(|(k, n)| (k.clone(), (*n).into())).collect();
        report::json(&json!({
            "folder": r.dir, "files": r.files, "tensors": r.tensors, "parameters": r.parameters,
            "types": types, "tokens": r.tokens, "blocks": r.blocks, "block_bytes": r.block_bytes,
        }));
    } else if !ui.quiet {
        let types: Vec<String> = r.types.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        let blocks = match r.blocks {
            0 => String::new(),
            n => format!(", {n} matrices in blocks too ({})", bytes(r.block_bytes)),
        };
        report::line(&format!(
            "{}: {} tensors ({}), {} parameters as f32{blocks}, {} tokens; {}",
            r.dir.display(),
            r.tensors,
            types.join(", "),
            count(r.parameters),
            r.tokens,
            r.files.join(", ")
        ));
    }
    Ok(())
}
