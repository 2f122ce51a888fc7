//! Deliberate errors in emitted PTX: what the checks of this harness are worth.

//! On the newer chip each has to be seen for what it is: a product that lacks its fence, a copy that nobody waits for.

use super::{Compiled, alone, read};
use pleach_ir::Sym;
use pleach_plan::Launch;

/// A change of the text of one entry; `None` where it has no place.
pub type Change = fn(&str) -> Option<String>;

/// Errors that a generator could make, by name.
pub const CHANGES: [(&str, Change); 9] = [
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
    ("what is written over is read as constant", constant),
];

/// Errors that one could make where weights in blocks of codes are decoded. 0x7541 picks the second byte of a word.
pub const DECODING: [(&str, Change); 3] = [
    ("another code is taken", |t| swap(t, ", 0x7541U;", ", 0x7542U;")),
    ("what is decoded is written 16 bytes further on", |t| shifted(t, "\tst.shared.v4")),
    ("codes are read 16 bytes further on", |t| shifted(t, "\tld.global.nc.b16")),
];

/// Errors that one could make with warpgroup products, tensor copies and mbarriers, and what one of the reports must say.
pub const HOPPER: [(&str, Change, &[&str]); 17] = [
    (
        "a product too few is waited for",
        |t| last(t, "wait_group.sync.aligned \t0;", "wait_group.sync.aligned \t1;"),
        EARLY,
    ),
    ("a product is not committed", |t| last(t, "wgmma.commit_group.sync.aligned;", ""), EARLY),
    (
        "a wait at an mbarrier is not repeated",
        |t| {
            // Before the last product, whose operands are copied where anything is.
            let product = t.rfind("wgmma.mma_async")?;
            last(&t[..product], "bra.uni     LAB_WAIT;", "").map(|head| head + &t[product..])
        },
        UNORDERED,
    ),
    (
        "a copy announces no bytes",
        |t| {
            let at = t[..t.find(COPY)?].rfind("mbarrier.arrive.expect_tx")?;
            let end = at + t[at..].find(';')?;
            let comma = at + t[at..end].rfind(',')?;
            Some(format!("{}{}{}", &t[..at], t[at..comma].replace(".expect_tx", ""), &t[end..]))
        },
        UNORDERED,
    ),
    (
        "an mbarrier waits for one arrival more",
        |t| {
            let at = t.find("mbarrier.init")?;
            let end = at + t[at..].find(';')?;
            let comma = at + t[at..end].rfind(',')?;
            let register = t[comma + 1..end].trim();
            let set = t[..at].rfind(&format!("{register}, "))? + register.len() + 2;
            let count: u32 = t[set..].split(';').next()?.parse().ok()?;
            Some(format!("{}, {}{}", &t[..comma], count + 1, &t[end..]))
        },
        &["deadlock"],
    ),
    ("a descriptor has another stride", |t| descriptor(t, |d| d ^ 64 << 32), WRONG),
    ("a descriptor has another swizzle", |t| descriptor(t, |d| d ^ 3 << 62), WRONG),
    (
        "a first product adds to what was there",
        |t| {
            let memory = swap(t, "setp.ne.b32 p, 0, 0;", "setp.ne.b32 p, 1, 0;");
            memory.or_else(|| swap(t, ", 0, 1, 1, ", ", 1, 1, 1, "))
        },
        &[" off, allowed"],
    ),
    (
        "copies need not see their mbarriers",
        |t| {
            // A fence for what threads have stored orders this as well.
            let before = &t[t.find("mbarrier.init")?..t.find(COPY)?];
            if before.contains("fence.proxy.async") { None } else { without(t, "fence.mbarrier_init") }
        },
        &["need not see its initialisation"],
    ),
    ("products need not see what was stored", |t| without(t, "fence.proxy.async"), &["without fence.proxy.async"]),
    (
        "products see what one lane has stored",
        |t| {
            let fence = "fence.proxy.async.shared::cta;";
            let alone = format!(
                "{{ .reg .pred only; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 only, lane, 0; @only {fence} }}"
            );
            t.contains(fence).then(|| t.replace(fence, &alone))
        },
        &["without fence.proxy.async"],
    ),
    (
        "a descriptor says that its pattern begins elsewhere",
        |t| descriptor(t, |d| d ^ 1 << 49),
        &["does not begin with its pattern"],
    ),
    ("products are not ordered behind registers", |t| without(t, "wgmma.fence"), &["without wgmma.fence"]),
    ("the first fence of products is missing", |t| swap(t, "wgmma.fence.sync.aligned;", ""), &["without wgmma.fence"]),
    (
        "the first barrier is missing",
        |t| {
            let at = t.find("mbarrier.init")?;
            let bar = at + t[at..].find("bar.sync")?;
            let end = bar + t[bar..].find(';')?;
            Some(format!("{}{}", &t[..bar], &t[end + 1..]))
        },
        &["need not see its initialisation", "no mbarrier was initialised"],
    ),
    ("nobody gives registers back", |t| without(t, "setmaxnreg.dec"), POOL),
    (
        "more registers are asked for than there are",
        |t| {
            let head = "setmaxnreg.inc.sync.aligned.u32 \t";
            let more = |part: &str| -> Option<String> {
                let (number, rest) = part.split_once(';')?;
                Some(format!("{head}{};{rest}", number.parse::<u32>().ok()? + 8))
            };
            let mut parts = t.split(head);
            let first = parts.next()?.to_string();
            let rest = parts.map(more).collect::<Option<Vec<String>>>()?;
            (!rest.is_empty()).then(|| first + &rest.concat())
        },
        POOL,
    ),
];
/// A copy of a tile.
const COPY: &str = "cp.async.bulk.tensor";
const EARLY: &[&str] = &["is touched", "asynchronous work of its own is under way"];
const UNORDERED: &[&str] = &["an asynchronous copy into it is under way", "never written", "nothing orders the two"];
const WRONG: &[&str] = &[" off, allowed", "never written", "out of bounds", "race on shared memory"];
const POOL: &[&str] = &["registers to give away"];

/// The text without all instructions that begin so.
fn without(t: &str, instruction: &str) -> Option<String> {
    let mut parts = t.split(instruction);
    let first = parts.next()?.to_string();
    let rest: Vec<&str> = parts.map(|p| p.split_once(';').map_or("", |x| x.1)).collect();
    (!rest.is_empty()).then(|| first + &rest.concat())
}

fn last(t: &str, from: &str, to: &str) -> Option<String> {
    let at = t.rfind(from)?;
    Some(format!("{}{to}{}", &t[..at], &t[at + from.len()..]))
}

/// The first read of global memory that the same entry writes, by way of the cache for memory that nothing writes.
fn constant(t: &str) -> Option<String> {
    let address = |l: &str| Some(format!("[{}]", l.split_once('[')?.1.split_once(']')?.0));
    let plain = |l: &str| ![".nc", ".param", ".shared", ".local"].iter().any(|s| l.contains(s));
    let stores = t.lines().filter(|l| l.starts_with("\tst.") && plain(l));
    let written: Vec<String> = stores.filter_map(address).collect();
    let over = |l: &&str| l.starts_with("\tld.") && plain(l) && address(l).is_some_and(|a| written.contains(&a));
    let line = t.lines().find(over)?;
    let rest = line.strip_prefix("\tld.global.").or_else(|| line.strip_prefix("\tld."))?;
    Some(t.replacen(line, &format!("\tld.global.nc.{rest}"), 1))
}

/// Another constant part of the first matrix descriptor of a product.
fn descriptor(t: &str, change: fn(u64) -> u64) -> Option<String> {
    t.contains("wgmma.mma_async").then_some(())?;
    for (at, _) in t.match_indices("or.b64") {
        let end = at + t[at..].find(';')?;
        let from = at + t[at..end].rfind(", ")? + 2;
        let Some(d) = t[from..end].parse::<u64>().ok().filter(|d| d >> 62 == 1) else { continue };
        return Some(format!("{}{}{}", &t[..from], change(d), &t[end..]));
    }
    None
}

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

/// What became of a change in every kernel that it has a place in: kernels, and those whose error nobody saw, or where something was
/// seen that is none of `reasons` (if there are any).
///
/// # Errors
/// PTX that cannot be read.
pub fn survey(c: &Compiled, change: Change, reasons: &[&str]) -> Result<(usize, Vec<String>), String> {
    let (mut places, mut unseen) = (0, vec![]);
    for (i, k) in c.plan.kernels.iter().enumerate() {
        let text = String::from_utf8_lossy(&c.plan.blobs[k.blob as usize].bytes).into_owned();
        let Some(launch) = k.launches.iter().rfind(|l| runs(c, l)) else { continue };
        let start = text.find(&format!(".visible .entry {}(", launch.function)).ok_or("an entry is missing")?;
        // Inline assembly has braces too.
        let end = text[start + 1..].find(".visible .entry ").map_or(text.len(), |n| start + 1 + n);
        let Some(changed) = change(&text[start..end]) else { continue };
        places += 1;
        let mut other = c.clone();
        other.modules[k.blob as usize] = read(format!("{}{changed}{}", &text[..start], &text[end..]).as_bytes())?;
        match alone::COUNTS.iter().find_map(|at| alone::check(&other, i, *at, 1).err()) {
            None => unseen.push(k.symbol.clone()),
            Some(e) if !reasons.is_empty() && !reasons.iter().any(|r| e.contains(r)) => unseen.push(e),
            Some(_) => {}
        }
    }
    Ok((places, unseen))
}
