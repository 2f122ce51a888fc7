//! Which line of a kernel's text each line of its machine code stems from, by the debug information that LLVM carries.

use super::llvm::{self, LlvmModule, Machine};
use super::{HOST_PIPELINE, HostTarget, Stages, gpu_pipeline, with_worker};
use crate::error::CodegenError;

/// Gives every function a scope, so that positions survive the translation.
const SCOPES: &str = ",ensure-debug-info-scope-on-llvm-func{emission-kind=LineTablesOnly})";

/// A pipeline that ends in [`SCOPES`].
fn scoped(pipeline: &str) -> String {
    format!("{}{SCOPES}", pipeline.strip_suffix(')').unwrap_or(pipeline))
}

/// The assembly that a module of host kernels becomes, and for every line of it the line of `module_text`, from 1; 0 where
/// it stems from none. The instructions are those of [`super::assembly`].
///
/// # Errors
/// As [`super::compile_object`].
pub fn assembly_with_lines(module_text: &str, target: &HostTarget) -> Result<(String, Vec<u32>), CodegenError> {
    with_worker(|w| {
        let (ir, machine): (LlvmModule, Machine) =
            w.lower_by(module_text, target, &scoped(HOST_PIPELINE), &mut Stages::default())?;
        let bytes = machine.emit(&ir, llvm::ASSEMBLY_FILE)?;
        Ok(take_lines(&String::from_utf8_lossy(&bytes)))
    })
}

/// The PTX of a module with one `gpu.module`, with lines as [`assembly_with_lines`].
///
/// # Errors
/// As [`super::compile_ptx`].
pub fn ptx_with_lines(module_text: &str, chip: &str) -> Result<(String, Vec<u32>), CodegenError> {
    let before = ",nvvm-attach-target";
    let pipeline = gpu_pipeline(chip)?;
    let (head, tail) = pipeline.split_once(before).unwrap_or((&pipeline, ""));
    let scopes = SCOPES.trim_end_matches(')');
    super::ptx_by(module_text, &format!("{head}{scopes}{before}{tail}")).map(|t| take_lines(&t))
}

/// Takes the debug directives out of assembly or PTX and keeps what they say.
fn take_lines(text: &str) -> (String, Vec<u32>) {
    let (mut out, mut lines) = (String::new(), vec![]);
    let (mut at, mut debug) = (0, false);
    for line in text.lines() {
        let word = line.trim_start();
        if let Some(rest) = word.strip_prefix(".section") {
            debug = rest.trim_start().starts_with(".debug");
        } else if [".text", ".globl", ".visible", ".entry"].iter().any(|w| word.starts_with(w)) {
            debug = false;
        }
        if let Some(loc) = word.strip_prefix(".loc") {
            at = loc.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
            continue;
        }
        let dropped = [".file", ".cfi_", ".ident", ".Ltmp", "$L__tmp", ".Lfunc_begin", "$L__func_begin", ".addrsig"];
        if debug || dropped.iter().any(|d| word.starts_with(d)) {
            continue;
        }
        if word.starts_with(".Lfunc_end") || word.starts_with("$L__func_end") || word == "}" {
            at = 0;
        }
        // Only instructions stem from anything.
        let instruction =
            !word.is_empty() && !word.starts_with(['.', '#', '/', '$', '{', '}', ')']) && !word.ends_with(':');
        lines.push(if instruction { at } else { 0 });
        out.push_str(line);
        out.push('\n');
    }
    (out, lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_go_and_their_lines_stay() {
        let text = "\t.text\n\t.file\t\"x\"\nf:\n.Lfunc_begin0:\n\t.loc\t1 7 3 prologue_end\n\tmovq\t%rax, %rbx\n.Ltmp0:\n\tretq\n.Lfunc_end0:\n\t.section\t.debug_line,\"\",@progbits\n\t.byte\t1\n";
        let (code, lines) = take_lines(text);
        assert_eq!(code, "\t.text\nf:\n\tmovq\t%rax, %rbx\n\tretq\n.Lfunc_end0:\n");
        assert_eq!(lines, [0, 0, 7, 7, 0]);
    }
}
