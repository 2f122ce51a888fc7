//! What the pretended GPU and driver are, from the environment.

use std::path::PathBuf;

/// The variable with the properties.
pub const VARIABLE: &str = "PLEACH_FAKE_CUDA";

/// A call that is to fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) function: String,
    /// Which call of the function, from 1.
    pub(crate) call: u64,
    pub(crate) code: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Properties {
    pub(crate) capability: (i32, i32),
    pub(crate) memory: u64,
    /// Version of CUDA.
    pub(crate) driver: (i32, i32),
    pub(crate) devices: i32,
    /// Work is done when it is asked for, not when it is waited for; and so with asynchronous work within kernels.
    pub(crate) at_once: bool,
    /// Races and uninitialised reads are faults.
    pub(crate) checks: bool,
    pub(crate) failures: Vec<Failure>,
    pub(crate) log: Option<PathBuf>,
    /// Parts of names of functions, and the microseconds that their launches take by the clock of events.
    pub(crate) times: Vec<(String, f64)>,
}

impl Default for Properties {
    fn default() -> Properties {
        Properties {
            capability: (8, 0),
            memory: 8 << 30,
            driver: (12, 8),
            devices: 1,
            at_once: false,
            checks: true,
            failures: vec![],
            log: None,
            times: vec![],
        }
    }
}

impl Properties {
    /// Reads the text of the variable. A text that is not understood is an error of the test that wrote it.
    pub(crate) fn parse(text: &str) -> Result<Properties, String> {
        let mut p = Properties::default();
        for part in text.split(',').filter(|s| !s.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let bad = || format!("{VARIABLE}: `{part}` is not understood");
            let pair = || -> Option<(i32, i32)> {
                let (a, b) = value.split_once('.')?;
                Some((a.parse().ok()?, b.parse().ok()?))
            };
            match (key, value) {
                ("sm", _) => p.capability = pair().ok_or_else(bad)?,
                ("driver", _) => p.driver = pair().ok_or_else(bad)?,
                ("memory", v) => p.memory = v.parse().map_err(|_| bad())?,
                ("devices", v) => p.devices = v.parse().map_err(|_| bad())?,
                ("order", "at-once") => p.at_once = true,
                ("order", "late") => p.at_once = false,
                ("checks", "off") => p.checks = false,
                ("checks", "on") => p.checks = true,
                ("time", v) => {
                    let (part, us) = v.split_once(':').ok_or_else(bad)?;
                    let us: f64 = us.parse().ok().filter(|x| *x >= 0.0).ok_or_else(bad)?;
                    p.times.push((part.into(), us));
                }
                ("log", v) => p.log = Some(v.into()),
                ("fail", v) => {
                    let parts = v.split_once('@').and_then(|(f, rest)| Some((f, rest.split_once(':')?)));
                    let (function, (call, code)) = parts.ok_or_else(bad)?;
                    let (call, code) = (call.parse().map_err(|_| bad())?, code.parse().map_err(|_| bad())?);
                    p.failures.push(Failure { function: function.into(), call, code });
                }
                _ => return Err(bad()),
            }
        }
        Ok(p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_properties_and_refuses_what_it_does_not_know() {
        let p =
            Properties::parse("sm=9.0,memory=1000,driver=11.8,fail=cuInit@2:100,order=at-once,time=mm:2.5").unwrap();
        assert_eq!(p.times, [("mm".to_string(), 2.5)]);
        assert_eq!((p.capability, p.memory, p.driver, p.at_once), ((9, 0), 1000, (11, 8), true));
        assert_eq!(p.failures, [Failure { function: "cuInit".into(), call: 2, code: 100 }]);
        assert_eq!(Properties::parse("").unwrap(), Properties::default());
        for bad in ["sm=9", "time=mm", "time=mm:-1", "memory=x", "speed=1", "fail=cuInit:3", "order=never"] {
            assert!(Properties::parse(bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
