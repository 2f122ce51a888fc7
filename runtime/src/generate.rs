//! The generate loop: ids in, ids out.
//!
//! Works with the entry `generate`: packed tokens, explicit cache slots. Every sequence gets consecutive slots for its
//! whole life. Prompts are taken in chunks of at most `T` tokens, then every sequence gives one token a step. Sequences
//! that do not fit together (slots, `S`) run one group after another.

use crate::error::{Result, RuntimeError};
use crate::pack::Batch;
use crate::sample::{Sampling, pick};
use crate::session::Session;
use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// New ids per sequence, at most.
    pub max_new_tokens: usize,
    /// How an id is chosen.
    pub sampling: Sampling,
    /// Ids that end a sequence; the id itself is still given.
    pub eos: Vec<i32>,
}

impl Default for GenerateParams {
    fn default() -> GenerateParams {
        GenerateParams { max_new_tokens: 64, sampling: Sampling::default(), eos: vec![] }
    }
}

/// Times and counts of a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Time for the prompts, up to the first new ids.
    pub prompt_time: Duration,
    /// New ids after the first of each sequence.
    pub decode_tokens: u64,
    /// Time for those.
    pub decode_time: Duration,
}

/// What was generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// New ids of each sequence, in the order of the prompts.
    pub ids: Vec<Vec<i32>>,
    /// Times and counts.
    pub stats: Stats,
}

/// One sequence in a group.
struct Sequence {
    number: usize,
    /// First slot of the cache.
    base: usize,
    /// Ids fed so far.
    fed: usize,
    /// New ids.
    new: Vec<i32>,
    ended: bool,
}

/// Continues every prompt. `on_token` gets each new id as soon as it is known, with the number of its prompt, and may
/// stop everything by [`ControlFlow::Break`]; what was generated so far is returned.
///
/// # Errors
/// [`RuntimeError::Capacity`] and [`RuntimeError::Input`] before anything runs when a prompt does not fit, and
/// [`RuntimeError::Values`] when logits are not finite.
pub fn generate(
    session: &mut Session,
    prompts: &[Vec<i32>],
    params: &GenerateParams,
    on_token: &mut dyn FnMut(usize, i32) -> ControlFlow<()>,
) -> Result<Generated> {
    params.sampling.check()?;
    session.plan().entry("generate")?;
    let mut out = Generated { ids: vec![vec![]; prompts.len()], stats: Stats::default() };
    if params.max_new_tokens == 0 {
        return Ok(out);
    }
    let groups = group(session, prompts, params)?;
    for g in groups {
        if run_group(session, prompts, g, params, on_token, &mut out)?.is_break() {
            break;
        }
    }
    Ok(out)
}

/// Cuts the prompts into runs of neighbours that fit into the session together.
fn group(session: &Session, prompts: &[Vec<i32>], params: &GenerateParams) -> Result<Vec<Range<usize>>> {
    let capacity = |s: &str| {
        session.capacity(s).map(|c| c as usize).ok_or_else(|| {
            RuntimeError::Capacity(format!(
                "the plan is fixed to one value of {s} and cannot generate; compile it without"
            ))
        })
    };
    let (t, s, c) = (capacity("T")?, capacity("S")?, capacity("C")?);
    let p = session.capacity("P").map_or(usize::MAX, |p| p as usize);
    let mut groups: Vec<Range<usize>> = vec![];
    let mut used = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        let bad = |why: String| RuntimeError::Input { entry: "generate".into(), why };
        if prompt.is_empty() {
            return Err(bad(format!("prompt {i} is empty; give at least one id")));
        }
        let vocab = session.plan().meta.vocab;
        if let Some(id) = prompt.iter().find(|id| **id < 0 || (vocab > 0 && **id as u64 >= vocab)) {
            return Err(bad(format!("prompt {i} has the id {id}, it must be at least 0 and below {vocab}")));
        }
        // The last new id is never fed.
        let need = prompt.len().saturating_add(params.max_new_tokens - 1);
        if need > c || need > p {
            let (what, have) = if need > c { ("C", c) } else { ("P", p) };
            return Err(RuntimeError::Capacity(format!(
                "prompt {i} has {} ids and {} new ones are asked for: {need} places, the session was opened for \
                 {what} = {have}; open it with more or ask for fewer",
                prompt.len(),
                params.max_new_tokens
            )));
        }
        match groups.last_mut() {
            Some(g) if used + need <= c && g.len() < s.min(t) => {
                g.end = i + 1;
                used += need;
            }
            _ => {
                groups.push(i..i + 1);
                used = need;
            }
        }
    }
    Ok(groups)
}

fn run_group(
    session: &mut Session,
    prompts: &[Vec<i32>],
    members: Range<usize>,
    params: &GenerateParams,
    on_token: &mut dyn FnMut(usize, i32) -> ControlFlow<()>,
    out: &mut Generated,
) -> Result<ControlFlow<()>> {
    let capacity = session.capacity("T").unwrap_or(1) as usize;
    let mut base = 0;
    let mut all: Vec<Sequence> = vec![];
    for number in members {
        all.push(Sequence { number, base, fed: 0, new: vec![], ended: false });
        base += prompts[number].len() + params.max_new_tokens - 1;
    }
    let mut batch = Batch::new();
    let mut rows: Vec<usize> = vec![];
    let mut flow = ControlFlow::Continue(());
    while flow.is_continue() && all.iter().any(|s| !s.ended) {
        let started = Instant::now();
        let prefill = all.iter().any(|s| s.fed < prompts[s.number].len());
        let mut room = capacity;
        batch.clear();
        rows.clear();
        for (i, s) in all.iter_mut().enumerate() {
            let prompt = &prompts[s.number];
            let ids = match s.new.last() {
                _ if s.ended || room == 0 => continue,
                Some(last) if !prefill => std::slice::from_ref(last),
                Some(_) => continue,
                None => &prompt[s.fed..prompt.len().min(s.fed + room)],
            };
            batch.push(s.base, s.fed, s.base, ids);
            (s.fed, room) = (s.fed + ids.len(), room - ids.len());
            rows.push(i);
        }
        let tokens = batch.input_ids.len() as u64;
        let logits = batch.run(session, "generate", None)?.f32("logits")?;
        let width = logits.len() / rows.len().max(1);
        for (row, i) in rows.iter().enumerate() {
            let s = &mut all[*i];
            if s.fed < prompts[s.number].len() {
                continue;
            }
            let id = pick(&logits[row * width..][..width], &params.sampling, s.number as u64, s.new.len() as u64)?;
            s.new.push(id);
            out.ids[s.number].push(id);
            s.ended = params.eos.contains(&id) || s.new.len() >= params.max_new_tokens;
            if flow.is_continue() {
                flow = on_token(s.number, id);
            }
        }
        let (count, time) = match prefill {
            true => (&mut out.stats.prompt_tokens, &mut out.stats.prompt_time),
            false => (&mut out.stats.decode_tokens, &mut out.stats.decode_time),
        };
        *count += tokens;
        *time += started.elapsed();
    }
    Ok(flow)
}
