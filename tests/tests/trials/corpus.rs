//! Replays the stored corpora of the fuzz targets through the readers, as stored, cut short and damaged.
//!
//! A name says what is expected of the file as stored: `good…` is accepted, `bad…` is refused with a message of a few
//! lines; what a fuzzer adds under other names, and variants, only must not panic.

use crate::Trials;
use pleach_tests::readers::{READERS, Reader};
use pleach_tests::values::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Cuts and damages per file; `PLEACH_VARIANTS` asks for more.
fn variants() -> u64 {
    std::env::var("PLEACH_VARIANTS").ok().and_then(|v| v.parse().ok()).unwrap_or(200)
}

pub(crate) fn trials(trials: &mut Trials) {
    let dir = pleach_tests::root().join("tests/fuzz/corpus");
    for (name, reader) in READERS {
        let files = pleach_tests::files(&dir.join(name));
        let good = files.iter().any(|f| stem(f).starts_with("good"));
        let bad = files.iter().any(|f| stem(f).starts_with("bad"));
        let both = move || if good && bad { Ok(()) } else { Err("needs a good and a bad file".into()) };
        trials.add(format!("{name}/has-a-corpus"), both);
        for path in files {
            trials.add(format!("{name}/{}", stem(&path)), move || replay(reader, &path));
        }
    }
}

fn stem(p: &Path) -> String {
    p.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn replay(reader: Reader, path: &Path) -> Result<(), String> {
    let data = std::fs::read(path).map_err(|e| e.to_string())?;
    let (good, bad) = (stem(path).starts_with("good"), stem(path).starts_with("bad"));
    match calm(reader, &data)? {
        Err(why) if good => return Err(format!("is refused: {why}")),
        Ok(()) if bad => return Err("is accepted".into()),
        Err(why) if why.trim().is_empty() || why.lines().count() > 40 || why.len() > 4000 => {
            return Err(format!("is refused with no readable message: {why}"));
        }
        _ => {}
    }
    let mut rng = Rng::new(1, &stem(path));
    for _ in 0..variants() {
        let variant = damage(&data, &mut rng);
        if let Err(what) = calm(reader, &variant) {
            return Err(format!("{what}\non {:?}", String::from_utf8_lossy(&variant)));
        }
    }
    Ok(())
}

/// The reader's answer; an error of its own if it panics.
fn calm(reader: Reader, data: &[u8]) -> Result<Result<(), String>, String> {
    catch_unwind(AssertUnwindSafe(|| reader(data))).map_err(|p| {
        let text = p.downcast_ref::<String>().map(String::as_str).or(p.downcast_ref::<&str>().copied());
        format!("panics: {}", text.unwrap_or("(no text)"))
    })
}

/// Cut, flipped bytes, a doubled or moved part, or a number made large.
fn damage(data: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut out = data.to_vec();
    let n = data.len() as u64;
    if n == 0 {
        return vec![rng.below(256) as u8];
    }
    let at = |rng: &mut Rng| rng.below(n) as usize;
    match rng.below(6) {
        0 => out.truncate(at(rng)),
        1 => {
            for _ in 0..=rng.below(4) {
                out[at(rng)] = rng.below(256) as u8;
            }
        }
        2 => {
            let i = at(rng);
            out[i] ^= 1 << rng.below(8);
        }
        3 => {
            let (i, j, k) = (at(rng), at(rng), at(rng));
            let part = data[i.min(j)..i.max(j)].to_vec();
            out.splice(k..k, part);
        }
        4 => {
            let digits: Vec<usize> = (0..out.len()).filter(|i| out[*i].is_ascii_digit()).collect();
            if !digits.is_empty() {
                let i = digits[rng.below(digits.len() as u64) as usize];
                let big = ["4294967295", "18446744073709551615", "-1", "0", "1e300", "99999999999999999999"];
                out.splice(i..=i, big[rng.below(6) as usize].bytes());
            }
        }
        _ => {
            let i = at(rng);
            let end = (i + 8).min(out.len());
            out[i..end].fill(if rng.below(2) == 0 { 0xff } else { 0 });
        }
    }
    out
}
