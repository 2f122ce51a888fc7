//! Deliberate errors in emitted PTX: what the checks of this harness are worth.

use super::{Compiled, alone, read};
use pleach_ir::Sym;
use pleach_plan::Launch;

/// A change of the text of one entry; `None` where it has no place.
pub type Change = fn(&str) -> Option<String>;

/// Errors that a generator could make, by name.
pub const CHANGES: [(&str, Change); 8] = [
    ("a copy too few is waited for", |t| {
        let at = t.find("cp.async.wait_group")?;
        let digit = at + t[at..].find(|c: char| c.is_ascii_digit())?;
        let number: u32 = t[digit..=digit].parse().ok()?;
        Some(format!("{}{}{}", &t[..digit], number + 1, &t[digit + 1..]))
    }),
    ("matrices are loaded turned", |t| swap(t, ".x4.shared", ".x4.trans.shared")),
    ("matrices are not turned", |t| swap(t, ".x4.trans.shared", ".x4.shared")),
    ("a barrier is missing", |t| {
        let at = t.find("bar.sync")?;
        let end = at + t[at..].find(';')?;
        Some(format!("{}{}", &t[..at], &t[end + 1..]))
    }),
    ("a copy arrives 16 bytes further on", |t| shifted(t, "cp.async.cg.shared.global")),
    ("a result is stored 16 bytes further on", |t| shifted(t, "\tst.global")),
    ("a branch is taken when it must not be", |t| {
        let at = t.find("\t@%p").or_else(|| t.find("\t@!%p"))?;
        let turned = if t[at..].starts_with("\t@!") { "\t@" } else { "\t@!" };
        let rest = at + if t[at..].starts_with("\t@!") { 3 } else { 2 };
        Some(format!("{}{turned}{}", &t[..at], &t[rest..]))
    }),
    ("a bound is one too large", |t| swap(t, "setp.ge.s64", "setp.gt.s64")),
];

/// Errors that one could make where weights in blocks of codes are decoded. 0x7541 picks the second byte of a word.
pub const DECODING: [(&str, Change); 3] = [
    ("another code is taken", |t| swap(t, ", 0x7541U;", ", 0x7542U;")),
    ("what is decoded is written 16 bytes further on", |t| shifted(t, "\tst.shared.v4")),
    ("codes are read 16 bytes further on", |t| shifted(t, "\tld.global.nc.b16")),
];

fn swap(t: &str, from: &str, to: &str) -> Option<String> {
    t.contains(from).then(|| t.replacen(from, to, 1))
}

/// The first address after `instruction` grows by 16.
fn shifted(t: &str, instruction: &str) -> Option<String> {
    let from = t.find(instruction)?;
    let open = from + t[from..].find('[')?;
    let close = open + t[open..].find(']')?;
    let address = &t[open + 1..close];
    let (base, offset) = match address.split_once('+') {
        Some((b, o)) => (b, o.parse::<i64>().ok()?),
        None => (address, 0),
    };
    Some(format!("{}[{base}+{}{}", &t[..open], offset + 16, &t[close..]))
}

/// Whether a launch runs at any of the counts that kernels are run at.
fn runs(c: &Compiled, l: &Launch) -> bool {
    alone::COUNTS.iter().any(|at| {
        let (counts, larger) = alone::symbols(*at);
        [counts, larger].iter().any(|s| {
            let env = c.plan.env(&|n| Sym::new(n).and_then(|n| s.get(&n).copied()));
            env.is_ok_and(|env| l.runs(&env) == Ok(true))
        })
    })
}

/// What became of a change in every kernel that it has a place in: kernels, and those whose error nobody saw.
///
/// # Errors
/// PTX that cannot be read.
pub fn survey(c: &Compiled, change: Change) -> Result<(usize, Vec<String>), String> {
    let (mut places, mut unseen) = (0, vec![]);
    for (i, k) in c.plan.kernels.iter().enumerate() {
        let text = String::from_utf8_lossy(&c.plan.blobs[k.blob as usize].bytes).into_owned();
        let Some(launch) = k.launches.iter().rfind(|l| runs(c, l)) else { continue };
        let start = text.find(&format!(".visible .entry {}(", launch.function)).ok_or("an entry is missing")?;
        let end = start + text[start..].find("\n}\n").ok_or("an entry does not end")?;
        let Some(changed) = change(&text[start..end]) else { continue };
        places += 1;
        let mut other = c.clone();
        other.modules[k.blob as usize] = read(format!("{}{changed}{}", &text[..start], &text[end..]).as_bytes())?;
        let seen = alone::COUNTS.iter().any(|at| alone::check(&other, i, *at, 1).is_err());
        if !seen {
            unseen.push(k.symbol.clone());
        }
    }
    Ok((places, unseen))
}
