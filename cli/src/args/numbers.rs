//! Numbers of the command line that have bounds.

/// Workers at most: each has scratch memory and a stack of its own.
const WORKERS: usize = 1024;

/// A number of workers.
pub(super) fn workers(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(n) if n <= WORKERS => Ok(n),
        Ok(_) => Err(format!("at most {WORKERS} workers; 0 means one per core")),
        Err(_) => Err("is no whole number".into()),
    }
}

/// A number that is neither infinite nor none.
#[cfg(feature = "models")]
pub(super) fn finite(s: &str) -> Result<f64, String> {
    let x: f64 = s.parse().map_err(|_| "is no number".to_owned())?;
    if x.is_finite() { Ok(x) } else { Err("must be finite".into()) }
}
