//! Packs sequences into the inputs of the standard entries `infer` and `generate`: one after another, no padding.

use crate::error::{Result, RuntimeError};
use crate::run::{Outputs, Values};
use crate::session::Session;

/// The inputs of a run, being packed.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) input_ids: Vec<i32>,
    positions: Vec<i32>,
    q_segments: Vec<i32>,
    kv_start: Vec<i32>,
    kv_len: Vec<i32>,
    slots: Vec<i32>,
    last: Vec<i32>,
}

impl Batch {
    pub(crate) fn new() -> Batch {
        let v = Vec::new;
        let (input_ids, positions, kv_start, kv_len, slots, last) = (v(), v(), v(), v(), v(), v());
        Batch { input_ids, positions, q_segments: vec![0], kv_start, kv_len, slots, last }
    }

    pub(crate) fn clear(&mut self) {
        self.q_segments.truncate(1);
        let Batch { input_ids, positions, kv_start, kv_len, slots, last, .. } = self;
        [input_ids, positions, kv_start, kv_len, slots, last].into_iter().for_each(Vec::clear);
    }

    /// Appends ids at `position` of a sequence whose keys begin at `keys`; the ids' own keys go to the slots from
    /// `slots + position` on.
    pub(crate) fn push(&mut self, keys: usize, position: usize, slots: usize, ids: &[i32]) {
        self.input_ids.extend_from_slice(ids);
        let at = position..position + ids.len();
        self.positions.extend(at.clone().map(|p| p as i32));
        self.slots.extend(at.clone().map(|p| (slots + p) as i32));
        self.q_segments.push(self.input_ids.len() as i32);
        self.kv_start.push(keys as i32);
        self.kv_len.push(at.end as i32);
        self.last.push(self.input_ids.len() as i32 - 1);
    }

    /// Runs an entry with those of these inputs that it takes.
    pub(crate) fn run<'s>(&self, session: &'s mut Session, entry: &str, types: Option<&[i32]>) -> Result<Outputs<'s>> {
        let zeros;
        let types = match types {
            Some(t) => t,
            None => {
                zeros = vec![0; self.input_ids.len()];
                &zeros
            }
        };
        let all: [(&str, &[i32]); 8] = [
            ("input_ids", &self.input_ids),
            ("positions", &self.positions),
            ("q_segments", &self.q_segments),
            ("kv_start", &self.kv_start),
            ("kv_len", &self.kv_len),
            ("slots", &self.slots),
            ("last", &self.last),
            ("token_type_ids", types),
        ];
        let e = session.plan().entry(entry)?;
        let given: Vec<(&str, Values<'_>)> = all
            .into_iter()
            .filter(|(n, _)| e.inputs.iter().any(|x| x.name == *n))
            .map(|(n, v)| (n, Values::I32(v)))
            .collect();
        session.run(entry, &given)
    }
}

impl Session {
    /// Runs `infer` on sequences of ids, packed in the order given. `types` are the token types of an encoder, packed
    /// likewise; without them all are 0.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn infer<S: AsRef<[i32]>>(&mut self, sequences: &[S], types: Option<&[i32]>) -> Result<Outputs<'_>> {
        let mut b = Batch::new();
        for (i, s) in sequences.iter().map(AsRef::as_ref).enumerate() {
            if s.is_empty() {
                let why = format!("sequence {i} is empty; give at least one id");
                return Err(RuntimeError::Input { entry: "infer".into(), why });
            }
            b.push(b.input_ids.len(), 0, b.input_ids.len(), s);
        }
        b.run(self, "infer", types)
    }
}
