//! `pleach doctor`: one page of facts about this machine and this build, to paste into a report.

use crate::args::DoctorArgs;
use crate::failure::Result;
use crate::report::{self, bytes};
use serde_json::{Map, Value};
use std::path::Path;
use std::process::Command;

/// Prints the page.
///
/// # Errors
/// None; what cannot be found is said.
#[allow(clippy::unnecessary_wraps, reason = "every command has this form")]
pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let mut facts: Vec<(&str, String)> = vec![
        (
            "pleach",
            format!("{}{}", env!("CARGO_PKG_VERSION"), if cfg!(debug_assertions) { " (debug build)" } else { "" }),
        ),
        ("features", features()),
        ("system", system()),
        ("processor", processor()),
        ("cores", std::thread::available_parallelism().map_or("unknown".into(), |n| n.to_string())),
        ("vectors", vectors()),
        ("caches", caches()),
        ("memory", memory()),
        ("huge pages", huge_pages()),
    ];
    #[cfg(feature = "compiler")]
    facts.extend(compiler());
    facts.push(("ptxas", ptxas()));
    facts.extend(gpu());
    if args.json {
        let map: Map<String, Value> = facts.into_iter().map(|(k, v)| (k.to_string(), v.into())).collect();
        report::json(&Value::Object(map));
        return Ok(());
    }
    let width = facts.iter().map(|f| f.0.len()).max().unwrap_or(0);
    for (name, value) in facts {
        report::line(&format!("{name:width$}  {value}"));
    }
    Ok(())
}

fn features() -> String {
    let list = [("compiler", cfg!(feature = "compiler")), ("models", cfg!(feature = "models"))];
    let on: Vec<&str> = list.iter().filter(|f| f.1).map(|f| f.0).collect();
    if on.is_empty() { "none: runs plans from token ids".into() } else { on.join(", ") }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn system() -> String {
    let os = read("/etc/os-release");
    let name = os.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or(std::env::consts::OS);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, kernel {}, {}", name.trim_matches('"'), kernel.trim(), std::env::consts::ARCH)
}

fn field(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix(':').map(|v| v.trim().to_string()))
}

fn processor() -> String {
    field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into())
}

fn vectors() -> String {
    let flags = field(&read("/proc/cpuinfo"), "flags").unwrap_or_default();
    let known = [
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
    ];
    let have: Vec<&str> = known.into_iter().filter(|k| flags.split(' ').any(|f| f == *k)).collect();
    if have.is_empty() { "none that is used".into() } else { have.join(" ") }
}

/// The caches of the first core, as the system tells them.
fn caches() -> String {
    let one = |i: u32| {
        let of = |what: &str| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{i}/{what}")).trim().to_string();
        let (level, kind, size) = (of("level"), of("type"), of("size"));
        let shared = of("shared_cpu_list");
        let kind = match kind.as_str() {
            "Data" => "d",
            "Instruction" => "i",
            _ => "",
        };
        (!size.is_empty()).then(|| format!("L{level}{kind} {size} (cores {shared})"))
    };
    let list: Vec<String> = (0..8).filter_map(one).collect();
    if list.is_empty() { "unknown".into() } else { list.join(", ") }
}

/// Transparent huge pages: which of the modes is on, how large they are, and what is reserved beside.
fn huge_pages() -> String {
    let folder = "/sys/kernel/mm/transparent_hugepage";
    let mode = |name: &str| {
        let text = read(&format!("{folder}/{name}"));
        text.split('[').nth(1).and_then(|t| t.split(']').next()).unwrap_or("unknown").to_string()
    };
    let size = read(&format!("{folder}/hpage_pmd_size")).trim().parse().map_or("unknown size".into(), bytes);
    let reserved = field(&read("/proc/meminfo"), "HugePages_Total").unwrap_or_else(|| "0".into());
    format!("transparent: {} (of files: {}), {size}; reserved: {reserved}", mode("enabled"), mode("shmem_enabled"))
}

fn memory() -> String {
    let text = read("/proc/meminfo");
    let kib = |key: &str| field(&text, key).and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0);
    format!("{}, {} available", bytes(kib("MemTotal") * 1024), bytes(kib("MemAvailable") * 1024))
}

#[cfg(feature = "compiler")]
fn compiler() -> Vec<(&'static str, String)> {
    use pleach_codegen::HostTarget;
    let host = HostTarget::detect();
    let class = host.map_or("none: this processor lacks AVX2 or FMA".into(), |h| format!("{} ({:?})", h.cpu, h.isa));
    let cache = match crate::cache::folder() {
        None => "none: set PLEACH_CACHE_DIR".into(),
        Some(dir) => {
            let (n, b) = crate::cache::usage(&dir);
            format!("{}: {n} plans, {}", dir.display(), bytes(b))
        }
    };
    vec![
        ("LLVM and MLIR", "22, built in".into()),
        ("targets", targets()),
        ("processor class", class),
        ("linker", first_line(Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into())).arg("--version"))),
        ("compile cache", cache),
    ]
}

/// What plans can be compiled for.
#[cfg(feature = "compiler")]
fn targets() -> String {
    use pleach_codegen::emit::gpu::GpuChip;
    let chips = GpuChip::ALL.map(GpuChip::name);
    format!("x86_64 (avx2, avx512), NVPTX ({})", chips.join(", "))
}

#[cfg(feature = "compiler")]
/// The first line a command prints, or that it is missing.
fn first_line(command: &mut Command) -> String {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(o) => String::from_utf8_lossy(&o.stdout).lines().next().unwrap_or("says nothing").to_string(),
        Err(_) => format!("{name} is not found"),
    }
}

fn ptxas() -> String {
    let program = std::env::var("PLEACH_PTXAS").ok().filter(|p| !p.is_empty()).unwrap_or_else(|| "ptxas".into());
    match Command::new(&program).arg("--version").output() {
        Ok(o) => {
            let text = String::from_utf8_lossy(&o.stdout).into_owned();
            let version = text.lines().find(|l| l.contains("release")).unwrap_or("version unknown");
            format!("{program}: {}", version.trim())
        }
        Err(_) => "not found (needed only to check GPU kernels)".into(),
    }
}

/// Driver and GPUs, as the driver describes them.
fn gpu() -> Vec<(&'static str, String)> {
    use pleach_runtime::cuda;
    let kernel = read("/proc/driver/nvidia/version");
    let kernel = kernel.lines().next().map(|l| l.trim_start_matches("NVRM version:").trim().to_string());
    let found = cuda::version().and_then(|v| Ok((v, cuda::gpus()?)));
    let ((major, minor), gpus) = match found {
        Ok(x) => x,
        Err(e) => {
            let why = e.to_string();
            let why = why.rsplit_once("this machine cannot run the plan: ").map_or(why.as_str(), |w| w.1);
            let why = why.trim_start_matches("it is for a GPU, and ");
            let present = kernel.or_else(|| Path::new("/dev/nvidia0").exists().then(|| "device present".to_string()));
            return vec![("NVIDIA driver", present.map_or(format!("none ({why})"), |p| format!("{p} ({why})")))];
        }
    };
    let mut out =
        vec![("NVIDIA driver", format!("CUDA {major}.{minor}{}", kernel.map_or(String::new(), |k| format!(", {k}"))))];
    for g in gpus {
        let target = g.target().unwrap_or("none: 8.0 or later is needed");
        let free = if g.number == 0 { cuda::memory().ok() } else { None };
        let free = free.map_or(String::new(), |(free, _)| format!(", {} free", bytes(free)));
        let (a, b) = g.capability;
        out.push((
            "GPU",
            format!(
                "{}: {}, compute capability {a}.{b} (target {target}), {} multiprocessors, {}{free}",
                g.number,
                g.name,
                g.processors,
                bytes(g.total)
            ),
        ));
    }
    let library = match cuda::find_cublaslt() {
        Ok(()) => "found; `pleach tune` tries it".to_string(),
        Err(why) => format!("none ({why}); nothing needs it"),
    };
    out.push(("cuBLASLt", library));
    out
}
