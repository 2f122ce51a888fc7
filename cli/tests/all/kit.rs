//! Calling the binary, a folder per test, fixtures, tensors.

use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder of fixtures.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(path)
}

/// A folder that goes away with its value.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pleach-cli-{}-{n}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies a folder of files.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap().flatten().filter(|e| e.path().is_file()) {
        std::fs::copy(e.path(), to.join(e.file_name())).unwrap();
    }
}

/// What a call gave.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    fn new(o: &Output) -> Said {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        Said { code: o.status.code(), out: text(&o.stdout), err: text(&o.stderr) }
    }
}

/// Calls the binary with a cache of its own; arguments are split at spaces but for those in `more`.
pub(crate) struct Pleach {
    cache: PathBuf,
    env: Vec<(String, String)>,
}

impl Pleach {
    pub(crate) fn new(cache: &Folder) -> Pleach {
        Pleach { cache: cache.join("cache"), env: vec![] }
    }

    /// The same binary and cache with more variables.
    pub(crate) fn with_env(&self, env: &[(&str, &str)]) -> Pleach {
        let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Pleach { cache: self.cache.clone(), env }
    }

    pub(crate) fn call(&self, arguments: &[&str]) -> Said {
        let out = Command::new(env!("CARGO_BIN_EXE_pleach"))
            .args(arguments)
            .env("PLEACH_CACHE_DIR", &self.cache)
            .env("NO_COLOR", "1")
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .output()
            .unwrap();
        Said::new(&out)
    }

    /// The call with its stdout led elsewhere.
    pub(crate) fn call_with_stdout(&self, stdout: impl Into<Stdio>, arguments: &[&str]) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pleach"));
        command.args(arguments).env("PLEACH_CACHE_DIR", &self.cache).env("NO_COLOR", "1").stderr(Stdio::piped());
        Said::new(&command.stdout(stdout).spawn().unwrap().wait_with_output().unwrap())
    }

    /// The call must succeed; its stdout.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let said = self.call(arguments);
        assert_eq!(said.code, Some(0), "{arguments:?}: {}", said.err);
        said.out
    }

    /// The call must fail with this code and one clear message; that message.
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let said = self.call(&[arguments, &["--quiet"]].concat());
        assert_eq!(said.code, Some(code), "{arguments:?}: {}{}", said.out, said.err);
        let message = said.err.strip_prefix("error: ").unwrap_or_else(|| panic!("{arguments:?}: {}", said.err));
        assert!(!message.contains("error: ") && !message.contains("panicked"), "{arguments:?}: {message}");
        message.to_string()
    }
}

/// Shape and values of every tensor of a file, floats and integers alike as f64.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |t: &safetensors::tensor::TensorView<'_>| -> Vec<f64> {
        let d = t.data();
        match t.dtype() {
            Dtype::F32 => d.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::I64 => d.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            other => panic!("{other:?} in {}", path.display()),
        }
    };
    file.iter().map(|(n, t)| (n.to_string(), (t.shape().to_vec(), values(&t)))).collect()
}

/// Largest difference over largest magnitude of the second.
pub(crate) fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m }) / top
}
