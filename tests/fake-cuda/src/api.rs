//! The exported functions. Names, arguments and error numbers are the driver's.
#![allow(clippy::missing_safety_doc, reason = "each function is the driver's of that name")]
#![allow(non_snake_case, reason = "the names are the driver's")]

use crate::graphs::{Exec, Graph, KernelNode, Node};
use crate::maps::pack;
use crate::state::*;
use pleach_ptx_sim::{Module, Ptr, TensorMap};
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

pub(crate) const UNKNOWN: u32 = 999;

/// Exports functions; each body gets the locked state under the name before the bar.
macro_rules! export {
    ($($context:ident fn $name:ident($s:ident | $($arg:ident: $ty:ty),* $(,)?) $body:block)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
            let run = || -> Answer {
                #[allow(unused_mut, reason = "not every function changes the state")]
                let mut $s = state();
                $s.enter(stringify!($name), stringify!($context) == "within")?;
                $body
            };
            match catch_unwind(AssertUnwindSafe(run)) {
                Ok(Ok(())) => 0,
                Ok(Err(e)) => e,
                Err(_) => UNKNOWN,
            }
        }
    )* };
}

/// Writes through a pointer of the caller.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller of the driver's function promises that it may be written.
    unsafe { to.write(value) };
    Ok(())
}

fn device(number: i32) -> Answer {
    if number == 0 { Ok(()) } else { Err(INVALID_DEVICE) }
}

export! {
    without fn cuInit(s | flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if s.properties.devices == 0 {
            return Err(NO_DEVICE);
        }
        s.started = true;
        Ok(())
    }

    without fn cuDriverGetVersion(s | version: *mut i32) {
        let (major, minor) = s.properties.driver;
        // SAFETY: see `give`.
        unsafe { give(version, major * 1000 + minor * 10) }
    }

    without fn cuDeviceGetCount(s | count: *mut i32) {
        // SAFETY: see `give`.
        unsafe { give(count, s.properties.devices) }
    }

    without fn cuDeviceGet(_s | out: *mut i32, ordinal: i32) {
        device(ordinal)?;
        // SAFETY: see `give`.
        unsafe { give(out, 0) }
    }

    without fn cuDeviceGetName(_s | name: *mut c_char, len: i32, dev: i32) {
        device(dev)?;
        let text = b"Simulated GPU\0";
        if (len as usize) < text.len() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller gives so many bytes.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len()) };
        Ok(())
    }

    without fn cuDeviceGetAttribute(s | out: *mut i32, attribute: i32, dev: i32) {
        device(dev)?;
        let (major, minor) = s.properties.capability;
        let value = match attribute {
            16 => 4,
            75 => major,
            76 => minor,
            97 => if major >= 9 { 232_448 } else { 166_912 },
            _ => return Err(NOT_SUPPORTED),
        };
        // SAFETY: see `give`.
        unsafe { give(out, value) }
    }

    without fn cuDeviceTotalMem_v2(s | bytes: *mut usize, dev: i32) {
        device(dev)?;
        // SAFETY: see `give`.
        unsafe { give(bytes, s.properties.memory as usize) }
    }

    without fn cuDevicePrimaryCtxRetain(_s | out: *mut usize, dev: i32) {
        device(dev)?;
        // SAFETY: see `give`.
        unsafe { give(out, CONTEXT) }
    }

    without fn cuDevicePrimaryCtxRelease_v2(_s | dev: i32) {
        device(dev)
    }

    without fn cuCtxSetCurrent(_s | context: usize) {
        if context != CONTEXT {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.set(true);
        Ok(())
    }

    within fn cuMemGetInfo_v2(s | free: *mut usize, total: *mut usize) {
        // SAFETY: see `give`.
        unsafe {
            give(free, (s.properties.memory - s.used) as usize)?;
            give(total, s.properties.memory as usize)
        }
    }

    within fn cuMemAlloc_v2(s | out: *mut u64, bytes: usize) {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if s.used + bytes as u64 > s.properties.memory {
            return Err(OUT_OF_MEMORY);
        }
        let at = s.memory.alloc(bytes);
        s.used += bytes as u64;
        s.given.insert(at.0, bytes as u64);
        // SAFETY: see `give`.
        unsafe { give(out, at.0) }
    }

    within fn cuMemFree_v2(s | at: u64) {
        s.flush()?;
        let bytes = s.given.remove(&at).ok_or(INVALID_VALUE)?;
        s.used -= bytes;
        s.memory.forget(Ptr(at), bytes as usize).map_err(|_| INVALID_VALUE)
    }

    within fn cuMemHostAlloc(s | out: *mut usize, bytes: usize, flags: u32) {
        if flags != 0 || bytes == 0 {
            return Err(NOT_SUPPORTED);
        }
        // Garbage, so that nobody counts on zeros.
        let block = vec![0xa5u8; bytes].into_boxed_slice();
        let at = block.as_ptr() as usize;
        s.pinned.insert(at, block);
        // SAFETY: see `give`.
        unsafe { give(out, at) }
    }

    within fn cuMemFreeHost(s | at: usize) {
        s.flush()?;
        s.pinned.remove(&at).map(|_| ()).ok_or(INVALID_VALUE)
    }

    within fn cuMemcpyHtoDAsync_v2(s | to: u64, from: *const c_void, bytes: usize, stream: usize) {
        let from = from as usize;
        let pinned = s.pinned.range(..=from).next_back().is_some_and(|(at, b)| from + bytes <= at + b.len());
        let work = if pinned {
            Work::ToDevice { to, from, bytes }
        } else {
            // SAFETY: the caller gives so many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec();
            Work::Bytes { to, bytes }
        };
        s.push(stream, work)
    }

    within fn cuMemcpyDtoHAsync_v2(s | to: usize, from: u64, bytes: usize, stream: usize) {
        s.push(stream, Work::ToHost { to, from, bytes })
    }

    within fn cuMemsetD8Async(s | at: u64, value: u8, bytes: usize, stream: usize) {
        s.push(stream, Work::Set { at, value, bytes })
    }

    within fn cuStreamCreate(s | out: *mut usize, flags: u32) {
        if flags != 1 {
            return Err(NOT_SUPPORTED);
        }
        let h = s.handle();
        s.streams.insert(h, ());
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuStreamSynchronize(s | stream: usize) {
        if !s.streams.contains_key(&stream) {
            return Err(INVALID_HANDLE);
        }
        s.flush()
    }

    within fn cuStreamDestroy_v2(s | stream: usize) {
        s.streams.remove(&stream).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    within fn cuEventCreate(s | out: *mut usize, flags: u32) {
        if flags & !2 != 0 {
            return Err(NOT_SUPPORTED);
        }
        let h = s.handle();
        s.events.insert(h, None);
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuEventRecord(s | event: usize, stream: usize) {
        if !s.events.contains_key(&event) {
            return Err(INVALID_HANDLE);
        }
        s.push(stream, Work::Record(event))
    }

    within fn cuEventSynchronize(s | event: usize) {
        if !s.events.contains_key(&event) {
            return Err(INVALID_HANDLE);
        }
        s.flush()
    }

    within fn cuEventElapsedTime(s | ms: *mut f32, start: usize, end: usize) {
        let at = |e: usize| s.events.get(&e).copied().ok_or(INVALID_HANDLE)?.ok_or(NOT_READY);
        let time = (at(end)? - at(start)?).max(0.0);
        // SAFETY: see `give`.
        unsafe { give(ms, (time * 1e3) as f32) }
    }

    within fn cuEventDestroy_v2(s | event: usize) {
        s.flush()?;
        s.events.remove(&event).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    within fn cuModuleLoadDataEx(s | out: *mut usize, image: *const c_char, n: u32, options: *const u32, values: *const usize) {
        let (mut log, mut room) = (0, 0);
        for i in 0..n as usize {
            // SAFETY: the caller gives so many options and values.
            match unsafe { (*options.add(i), *values.add(i)) } {
                (5, at) => log = at,
                (6, bytes) => room = bytes & 0xffff_ffff,
                _ => return Err(NOT_SUPPORTED),
            }
        }
        let complain = |what: &str| {
            say(what);
            if log != 0 && room > 0 {
                let n = what.len().min(room - 1);
                // SAFETY: the caller gives a buffer of that size.
                unsafe {
                    std::ptr::copy_nonoverlapping(what.as_ptr(), log as *mut u8, n);
                    (log as *mut u8).add(n).write(0);
                }
            }
        };
        // SAFETY: an image is a text that ends with a zero byte.
        let text = unsafe { CStr::from_ptr(image) }.to_str().map_err(|_| INVALID_PTX)?;
        let version = text.lines().find_map(|l| l.trim().strip_prefix(".version ")).ok_or(INVALID_PTX)?;
        let mut numbers = version.trim().split('.').map(|n| n.parse::<i32>().unwrap_or(99));
        let wanted = (numbers.next().unwrap_or(99) + 4, numbers.next().unwrap_or(99));
        if wanted > s.properties.driver {
            return Err(UNSUPPORTED_PTX);
        }
        let module = Module::parse(text).map_err(|e| {
            complain(&e.to_string());
            INVALID_PTX
        })?;
        let (major, minor) = s.properties.capability;
        let chip = module.target().trim_start_matches("sm_").to_string();
        let wanted: i32 = chip.trim_end_matches('a').parse().map_err(|_| INVALID_PTX)?;
        let have = major * 10 + minor;
        if have < wanted || (have != wanted && chip.ends_with('a')) {
            complain(&format!("{} is not for this GPU", module.target()));
            return Err(NO_BINARY);
        }
        let h = s.handle();
        s.modules.insert(h, module);
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuModuleUnload(s | module: usize) {
        s.flush()?;
        s.functions.retain(|_, f| f.module != module);
        s.modules.remove(&module).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    within fn cuModuleGetFunction(s | out: *mut usize, module: usize, name: *const c_char) {
        // SAFETY: a name ends with a zero byte.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| NOT_FOUND)?;
        let kernel = s.modules.get(&module).ok_or(INVALID_HANDLE)?.kernel(name).map_err(|_| NOT_FOUND)?.clone();
        let h = s.handle();
        s.functions.insert(h, Function { module, kernel, shared: 0 });
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuFuncSetAttribute(s | function: usize, attribute: u32, value: i32) {
        let most = if s.properties.capability.0 >= 9 { 232_448 } else { 166_912 };
        let f = s.functions.get_mut(&function).ok_or(INVALID_HANDLE)?;
        if attribute != 8 {
            return Err(NOT_SUPPORTED);
        }
        if value < 0 || value > most {
            return Err(INVALID_VALUE);
        }
        f.shared = value as u32;
        Ok(())
    }

    within fn cuLaunchKernel(
        s | function: usize, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: usize,
        params: *mut *mut c_void, extra: *mut *mut c_void,
    ) {
        if !extra.is_null() {
            return Err(NOT_SUPPORTED);
        }
        // SAFETY: the caller gives as many arguments as the function has parameters.
        let call = unsafe { s.call(function, [gx, gy, gz], [bx, by, bz], shared, params)? };
        s.log("launch");
        s.push(stream, Work::Run(Box::new(Node::Launch(call))))
    }

    without fn cuTensorMapEncodeTiled(
        _s | out: *mut [u64; 16], dtype: u32, rank: u32, base: u64, sizes: *const u64, strides: *const u64,
        boxes: *const u32, steps: *const u32, interleave: u32, swizzle: u32, _promotion: u32, fill: u32,
    ) {
        let element = match dtype {
            0 => 1,
            1 | 6 | 9 => 2,
            2 | 3 | 7 => 4,
            4 | 5 | 8 => 8,
            _ => return Err(NOT_SUPPORTED),
        };
        if !(1..=5).contains(&rank) {
            return Err(INVALID_VALUE);
        }
        if interleave != 0 || fill != 0 || swizzle > 3 {
            return Err(NOT_SUPPORTED);
        }
        let n = rank as usize;
        // SAFETY: the caller gives arrays of the rank, of strides one less.
        let (sizes, strides, boxes, steps) = unsafe {
            (
                std::slice::from_raw_parts(sizes, n).to_vec(),
                if n > 1 { std::slice::from_raw_parts(strides, n - 1).to_vec() } else { vec![] },
                std::slice::from_raw_parts(boxes, n).to_vec(),
                std::slice::from_raw_parts(steps, n),
            )
        };
        let inner = u64::from(boxes[0]) * element;
        let width = [u64::MAX, 32, 64, 128][swizzle as usize];
        let bad = steps.iter().any(|s| *s != 1)
            || !base.is_multiple_of(16)
            || !(out as usize).is_multiple_of(64)
            || sizes.iter().any(|s| *s == 0 || *s > 1 << 32)
            || strides.iter().any(|s| !s.is_multiple_of(16) || *s >= 1 << 40)
            || boxes.iter().any(|b| *b == 0 || *b > 256)
            || !inner.is_multiple_of(16)
            || inner > width;
        if bad {
            return Err(INVALID_VALUE);
        }
        let swizzle = if swizzle == 0 { 0 } else { width as u32 };
        let map = TensorMap { base: Ptr(base), element: element as u32, sizes, strides, boxes, swizzle };
        // SAFETY: see `give`.
        unsafe { give(out, pack(&map)) }
    }

    within fn cuGraphCreate(s | out: *mut usize, flags: u32) {
        if flags != 0 {
            return Err(NOT_SUPPORTED);
        }
        let h = s.handle();
        s.graphs.insert(h, Graph::default());
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuGraphAddKernelNode_v2(s | out: *mut usize, graph: usize, after: *const usize, n: usize, node: *const KernelNode) {
        // SAFETY: the caller gives so many nodes, and a node's parameters.
        let (after, call) = unsafe {
            let after = if n == 0 { vec![] } else { std::slice::from_raw_parts(after, n).to_vec() };
            (after, s.node(&*node)?)
        };
        let number = s.add_node(graph, &after, Node::Launch(call))?;
        // SAFETY: see `give`.
        unsafe { give(out, number) }
    }

    within fn cuStreamBeginCapture_v2(s | stream: usize, mode: u32) {
        if mode != 2 {
            return Err(NOT_SUPPORTED);
        }
        if !s.streams.contains_key(&stream) || s.captures.contains_key(&stream) {
            return Err(INVALID_HANDLE);
        }
        s.captures.insert(stream, vec![]);
        Ok(())
    }

    within fn cuStreamEndCapture(s | stream: usize, out: *mut usize) {
        let nodes = s.captures.remove(&stream).ok_or(INVALID_VALUE)?;
        let h = s.handle();
        s.graphs.insert(h, Graph { nodes });
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuGraphAddChildGraphNode(s | out: *mut usize, graph: usize, after: *const usize, n: usize, child: usize) {
        // SAFETY: the caller gives so many nodes.
        let after = if n == 0 { vec![] } else { unsafe { std::slice::from_raw_parts(after, n) }.to_vec() };
        let nodes = s.graphs.get(&child).ok_or(INVALID_HANDLE)?.nodes.clone();
        let number = s.add_node(graph, &after, Node::Child(nodes))?;
        // SAFETY: see `give`.
        unsafe { give(out, number) }
    }

    within fn cuGraphInstantiateWithFlags(s | out: *mut usize, graph: usize, flags: u64) {
        if flags != 0 {
            return Err(NOT_SUPPORTED);
        }
        let nodes = s.graphs.get(&graph).ok_or(INVALID_HANDLE)?.nodes.clone();
        s.log(&format!("graph of {} launches", nodes.len()));
        let h = s.handle();
        s.execs.insert(h, Exec { graph, nodes });
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cuGraphExecKernelNodeSetParams_v2(s | exec: usize, node: usize, params: *const KernelNode) {
        // SAFETY: the caller gives a node's parameters.
        let call = unsafe { s.node(&*params)? };
        s.log("set");
        s.set_node(exec, node, call)
    }

    within fn cuGraphLaunch(s | exec: usize, stream: usize) {
        let e = s.execs.get(&exec).ok_or(INVALID_HANDLE)?;
        if !s.graphs.contains_key(&e.graph) {
            return Err(INVALID_VALUE);
        }
        let nodes = e.nodes.clone();
        s.log("replay");
        // What is enqueued keeps the arguments it had.
        nodes.into_iter().try_for_each(|n| s.push(stream, Work::Run(Box::new(n))))
    }

    within fn cuGraphExecDestroy(s | exec: usize) {
        s.execs.remove(&exec).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    within fn cuGraphDestroy(s | graph: usize) {
        s.graphs.remove(&graph).map(|_| ()).ok_or(INVALID_HANDLE)
    }
}
