//! Entries of a kernel: parameters, attributes, static shared memory.

use crate::emit::func::{Func, Val};
use pleach_ir::Kernel;
use pleach_plan::{Expr, Launch, LaunchParam};

/// An entry under construction.
pub(super) struct Unit {
    pub(super) f: Func,
    params: Vec<LaunchParam>,
    /// Bytes of static shared memory.
    statics: u64,
}

impl Unit {
    /// An entry with all buffers of a kernel, scratch memory if asked for, and counts: arguments `p0…`, `scratch`, `dims`.
    /// What `constant` names is not written by it.
    pub(super) fn new(k: &Kernel, suffix: &str, scratch: bool) -> Unit {
        let n = k.operands.len();
        let mut args: Vec<(String, String)> = vec![];
        let mut params = vec![];
        for i in 0..n + k.results.len() {
            let over = |r: usize, a: &Option<u32>| a.is_some_and(|a| a as usize == i || r + n == i);
            let aliased = k.aliases.iter().enumerate().any(|(r, a)| over(r, a));
            let ty = match (aliased, i < n) {
                (true, _) => "!llvm.ptr",
                (false, true) => "!llvm.ptr {llvm.noalias, llvm.readonly}",
                (false, false) => "!llvm.ptr {llvm.noalias}",
            };
            args.push((format!("p{i}"), ty.into()));
            params.push(LaunchParam::Buffer(i as u32));
        }
        if scratch {
            args.push(("scratch".into(), "!llvm.ptr {llvm.noalias}".into()));
            params.push(LaunchParam::Scratch);
        }
        args.push(("dims".into(), "!llvm.ptr {llvm.noalias, llvm.readonly}".into()));
        params.push(LaunchParam::Dims);
        let list: Vec<(&str, &str)> = args.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect();
        let mut f = Func::new(&format!("{}{suffix}", k.name), &list);
        f.gpu = true;
        f.round_bf16 = true;
        Unit { f, params, statics: 0 }
    }

    /// Static shared memory of so many bytes; call once.
    pub(super) fn shared(&mut self, bytes: u64) -> Val {
        self.statics = bytes;
        let name = self.f.name.clone();
        self.f.op(format!("llvm.mlir.addressof @{name}_shared : !llvm.ptr<3>"))
    }

    /// Text and launch of the finished entry.
    pub(super) fn finish(self, grid: [Expr; 3], threads: u32, dynamic: u32, min_blocks: u32) -> (String, Launch) {
        let name = &self.f.name;
        let min = format!(", nvvm.minctasm = {min_blocks} : i32");
        let attrs = format!("attributes {{nvvm.kernel, nvvm.maxntid = array<i32: {threads}, 1, 1>{min}}}");
        let text = self.f.text().replacen("func.func @", "llvm.func @", 1);
        let text = text.replacen(") {\n", &format!(") {attrs} {{\n"), 1);
        let body = text.strip_suffix("  return\n}\n").unwrap_or(&text);
        let global = match self.statics {
            0 => String::new(),
            n => format!(
                "llvm.mlir.global internal @{name}_shared() {{addr_space = 3 : i32, alignment = 16 : i64}} : \
                 !llvm.array<{n} x i8>\n"
            ),
        };
        let launch = Launch {
            function: name.clone(),
            grid: grid.map(|e| if e.known().is_some_and(|n| n > 0) { e } else { e.max(1) }),
            block: threads,
            shared_bytes: dynamic,
            params: self.params,
        };
        (format!("{global}{body}  llvm.return\n}}\n"), launch)
    }
}

/// Address of element `index` of type `elem` in shared memory.
pub(super) fn shared_at(f: &mut Func, base: &Val, index: &Val, elem: &str) -> Val {
    match index.known() {
        Some(0) => base.clone(),
        Some(c) => f.op(format!("llvm.getelementptr {base}[{c}] : (!llvm.ptr<3>) -> !llvm.ptr<3>, {elem}")),
        None => f.op(format!("llvm.getelementptr {base}[{index}] : (!llvm.ptr<3>, i64) -> !llvm.ptr<3>, {elem}")),
    }
}

/// Loads a value of type `ty` from shared memory.
pub(super) fn shared_load(f: &mut Func, at: &Val, ty: &str, align: u32) -> Val {
    f.op(format!("llvm.load {at} {{alignment = {align} : i64}} : !llvm.ptr<3> -> {ty}"))
}

/// Stores a value of type `ty` to shared memory.
pub(super) fn shared_store(f: &mut Func, x: &Val, at: &Val, ty: &str, align: u32) {
    f.stmt(&format!("llvm.store {x}, {at} {{alignment = {align} : i64}} : {ty}, !llvm.ptr<3>"));
}
