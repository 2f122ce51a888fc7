//! Entries of a kernel: parameters, attributes, static shared memory.

use super::special;
use crate::emit::anchors;
use crate::emit::func::{Func, Val};
use pleach_ir::Kernel;
use pleach_plan::{Expr, Launch, LaunchParam, TensorMap};

/// A pointer to what a launch only reads.
const CONSTANT: &str = "!llvm.ptr {llvm.noalias, llvm.readonly}";

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
        Unit::with_maps(k, suffix, scratch, &[])
    }

    /// [`Unit::new`] with tensor maps: arguments `map0…`.
    pub(super) fn with_maps(k: &Kernel, suffix: &str, scratch: bool, maps: &[TensorMap]) -> Unit {
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
        for (i, m) in maps.iter().enumerate() {
            // Without `grid_constant` the map would be copied to local memory, where a tensor copy cannot read it.
            let ty = "!llvm.ptr {llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant, \
                      llvm.noalias, llvm.readonly}";
            args.push((format!("map{i}"), ty.into()));
            params.push(LaunchParam::TensorMap(m.clone()));
        }
        args.push(("dims".into(), "!llvm.ptr {llvm.noalias, llvm.readonly}".into()));
        params.push(LaunchParam::Dims);
        let list: Vec<(&str, &str)> = args.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect();
        let mut f = Func::new(&format!("{}{suffix}", k.name), &list);
        f.gpu = true;
        f.round_bf16 = true;
        f.is_for(k, &anchors(k));
        f.maps = maps.iter().map(|m| m.buffer).collect();
        Unit { f, params, statics: 0 }
    }

    /// An entry for `copies` launches of a kernel as one: the second axis of its grid says which one a block belongs to, and a
    /// table in memory has the buffers of all, operands of one after the other, then results. `scratch`: bytes of
    /// scratch memory of each, where it needs any.
    pub(super) fn repeated(k: &Kernel, copies: usize, suffix: &str, scratch: Option<u64>) -> Unit {
        let (n, r) = (k.operands.len(), k.results.len());
        let all = (n + r) * copies;
        let mut args = vec![("table", CONSTANT)];
        let mut params = vec![LaunchParam::Table((0..all as u32).collect())];
        if scratch.is_some() {
            args.push(("scratch_of_all", "!llvm.ptr {llvm.noalias}"));
            params.push(LaunchParam::Scratch);
        }
        args.push(("dims", "!llvm.ptr {llvm.noalias, llvm.readonly}"));
        params.push(LaunchParam::Dims);
        let mut f = Func::new(&format!("{}{suffix}", k.name), &args);
        f.gpu = true;
        f.round_bf16 = true;
        f.is_for(k, &anchors(k));
        let (copy, base) = (special(&mut f, "ctaid.y"), f.arg("table"));
        for (first, count, from) in [(0, n, 0), (n * copies, r, n)] {
            let start = f.mulc(&copy, count as i64);
            for i in 0..count {
                let at = f.addc(&start, (first + i) as i64);
                let at = f.gep(&base, &at, "i64");
                // Said to be global, so that accesses need not find out.
                let p = f.op(format!("llvm.load {at} : !llvm.ptr -> !llvm.ptr"));
                let p = f.op(format!("llvm.addrspacecast {p} : !llvm.ptr to !llvm.ptr<1>"));
                f.name(&format!("p{}", from + i), &format!("llvm.addrspacecast {p} : !llvm.ptr<1> to !llvm.ptr"));
            }
        }
        if let Some(bytes) = scratch {
            let (all, first) = (f.arg("scratch_of_all"), f.mulc(&copy, bytes as i64));
            f.name("scratch", &format!("llvm.getelementptr {all}[{first}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"));
        }
        Unit { f, params, statics: 0 }
    }

    /// An entry for several kernels side by side: arguments `s…` for the operands that they share, by their numbers in the kernel, which
    /// nothing writes over, and `table` with the buffers that they do not.
    pub(super) fn of_many(k: &Kernel, shared: &[u32], table: Vec<u32>) -> Unit {
        let names: Vec<String> = shared.iter().map(|n| format!("s{n}")).collect();
        let mut args: Vec<(&str, &str)> = vec![];
        let mut params = vec![];
        for (n, name) in shared.iter().zip(&names) {
            let over = k.aliases.contains(&Some(*n));
            args.push((name, if over { "!llvm.ptr" } else { CONSTANT }));
            params.push(LaunchParam::Buffer(*n));
        }
        if !table.is_empty() {
            args.push(("table", CONSTANT));
            params.push(LaunchParam::Table(table));
        }
        args.push(("dims", CONSTANT));
        params.push(LaunchParam::Dims);
        let mut f = Func::new(&k.name, &args);
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
            when: None,
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
