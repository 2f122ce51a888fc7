//! `pleach generate`: continues one sequence and streams what comes.

use crate::args::GenerateArgs;
use crate::failure::{Failure, Result};
use crate::inputs::parse_ids;
use crate::profile;
use crate::ready::ready;
use crate::report::{self, Ui};
use crate::text;
#[cfg(feature = "models")]
use pleach_frontend::TextTokenizer;
use pleach_runtime::{GenerateParams, Sampling};
use std::ops::ControlFlow;

/// Prompt tokens that are taken in one run; longer prompts come in chunks.
const CHUNK: u64 = 512;

/// Generates.
///
/// # Errors
/// Everything on the way from files to tokens.
pub(crate) fn generate(ui: &Ui, args: &GenerateArgs) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    sampling.check().map_err(|e| Failure::usage(e.to_string()))?;
    let folder = args.model.folder();
    let prompt = match (&args.ids, &args.prompt, &args.chat) {
        (Some(ids), ..) => parse_ids(ids)?,
        (_, Some(p), _) => text::encode(folder, std::slice::from_ref(p))?.swap_remove(0),
        (_, _, Some(file)) => text::encode_chat(folder, file)?,
        _ => return Err(Failure::usage("nothing to continue: give --prompt, --ids or --chat")),
    };
    if prompt.is_empty() {
        return Err(Failure::usage("the prompt has no token; give at least one character"));
    }
    let ready = ready(ui, &args.model, &["generate"], &[])?;
    let length = prompt.len() as u64 + args.max_new_tokens;
    let limit = ready.plan.meta.max_positions;
    if limit > 0 && length > limit {
        ui.note(&format!("note: {length} tokens are more than the {limit} positions the model was made for"));
    }
    let needed = [("T", (prompt.len() as u64).min(CHUNK)), ("S", 1), ("C", length), ("P", length)];
    let mut session = ready.session(ui, &args.capacity, &needed)?;
    session.set_profile(args.profile.is_some());
    let params = GenerateParams {
        max_new_tokens: usize::try_from(args.max_new_tokens).unwrap_or(usize::MAX),
        sampling,
        eos: ready.plan.meta.eos.clone(),
    };
    let mut shown = Stream::new(args)?;
    let mut failed = None;
    let done = pleach_runtime::generate(&mut session, &[prompt], &params, &mut |_, id| match shown.push(id) {
        Ok(()) => ControlFlow::Continue(()),
        Err(e) => {
            failed = Some(e);
            ControlFlow::Break(())
        }
    })?;
    if let Some(e) = failed {
        return Err(e);
    }
    shown.finish()?;
    if let Some(file) = &args.profile {
        profile::write(ui, &session, "pleach generate", file)?;
    }
    let s = done.stats;
    let rate = |n: u64, t: std::time::Duration| if n > 0 { n as f64 / t.as_secs_f64().max(1e-9) } else { 0.0 };
    ui.note(&format!(
        "prompt: {} tokens, {:.1} tokens/s; new: {} tokens, {:.1} tokens/s",
        s.prompt_tokens,
        rate(s.prompt_tokens, s.prompt_time),
        done.ids.first().map_or(0, Vec::len),
        rate(s.decode_tokens, s.decode_time)
    ));
    Ok(())
}

/// What is printed as ids arrive: text, or the ids themselves.
struct Stream<'a> {
    #[cfg(feature = "models")]
    text: Option<pleach_frontend::TextStream<'a>>,
    any: bool,
    #[cfg(not(feature = "models"))]
    _text: std::marker::PhantomData<&'a ()>,
}

#[cfg(feature = "models")]
impl Stream<'_> {
    /// The tokenizer lives as long as the program: it is needed until the last id.
    fn new(args: &GenerateArgs) -> Result<Stream<'static>> {
        let text = match args.print_ids {
            true => None,
            false => Some(Box::leak(Box::new(TextTokenizer::open(args.model.folder())?)).stream()),
        };
        Ok(Stream { text, any: false })
    }

    fn push(&mut self, id: i32) -> Result<()> {
        match &mut self.text {
            Some(t) => report::print(&t.push(id as u32)?),
            None => report::print(&format!("{}{id}", if self.any { "," } else { "" })),
        }
        self.any = true;
        Ok(())
    }

    fn finish(self) -> Result<()> {
        if let Some(t) = self.text {
            report::print(&t.finish()?);
        }
        report::line("");
        Ok(())
    }
}

#[cfg(not(feature = "models"))]
impl Stream<'_> {
    /// Only ids can be shown.
    fn new(_: &GenerateArgs) -> Result<Stream<'static>> {
        Ok(Stream { any: false, _text: std::marker::PhantomData })
    }

    fn push(&mut self, id: i32) -> Result<()> {
        report::print(&format!("{}{id}", if self.any { "," } else { "" }));
        self.any = true;
        Ok(())
    }

    fn finish(self) -> Result<()> {
        report::line("");
        Ok(())
    }
}
