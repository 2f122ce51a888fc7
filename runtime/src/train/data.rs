//! Rows of token ids, their order, and micro-batches packed from them.
//!
//! A micro-batch is the next B rows of the order, one after another without padding; the order begins anew when the rows
//! run out. Targets are shifted inside, per row: the token at place i predicts the label at place i + 1. Token ids are
//! taken as they are; the session checks them against the vocabulary.

use pleach_plan::random::Philox;
use std::ops::Range;

/// The label that is not counted.
pub const IGNORED: i32 = -100;

/// Rows of ids with labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    ids: Vec<i32>,
    labels: Vec<i32>,
    /// Where each row ends.
    ends: Vec<usize>,
    report: RowReport,
}

/// What became of the rows that were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowReport {
    /// Rows that are used.
    pub rows: u64,
    /// Tokens of them.
    pub tokens: u64,
    /// Counted target tokens of them.
    pub targets: u64,
    /// Rows cut at the largest length.
    pub cut: u64,
    /// Tokens lost by that.
    pub cut_tokens: u64,
    /// Rows without any token, which are left out.
    pub dropped: u64,
    /// Rows that are used but have no counted target.
    pub uncounted: u64,
    /// Tokens of the longest row, after cutting.
    pub longest: u64,
}

impl Rows {
    /// Adds a row, cut to `max_length` tokens. `labels` have the length of `ids`; [`IGNORED`] marks what is no target.
    /// Without labels every token is a target.
    pub fn push(&mut self, ids: &[i32], labels: Option<&[i32]>, max_length: usize) {
        let n = ids.len().min(max_length);
        let r = &mut self.report;
        if n == 0 {
            r.dropped += 1;
            return;
        }
        if n < ids.len() {
            r.cut += 1;
            r.cut_tokens += (ids.len() - n) as u64;
        }
        let labels = &labels.unwrap_or(ids)[..n];
        let targets = labels[1..].iter().filter(|l| **l != IGNORED).count() as u64;
        r.rows += 1;
        r.tokens += n as u64;
        r.targets += targets;
        r.uncounted += u64::from(targets == 0);
        r.longest = r.longest.max(n as u64);
        self.ids.extend_from_slice(&ids[..n]);
        self.labels.extend_from_slice(labels);
        self.ends.push(self.ids.len());
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True without any row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// What became of the rows that were given.
    pub fn report(&self) -> &RowReport {
        &self.report
    }

    /// Ids and labels of a row.
    pub fn row(&self, i: usize) -> (&[i32], &[i32]) {
        let r = self.range(i);
        (&self.ids[r.clone()], &self.labels[r])
    }

    fn range(&self, i: usize) -> Range<usize> {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start..self.ends[i]
    }

    /// A number that differs for different rows: FNV-1a over lengths, ids and labels.
    pub fn fingerprint(&self) -> u64 {
        let numbers =
            self.ends.iter().map(|e| *e as i64).chain(self.ids.iter().chain(&self.labels).map(|x| i64::from(*x)));
        fnv1a(numbers.flat_map(i64::to_le_bytes))
    }

    /// Packs rows into the inputs of a run.
    pub fn pack(&self, rows: impl IntoIterator<Item = usize>) -> MicroBatch {
        self.pack_with(rows, 1)
    }

    /// The same, where `rows` and `labels` are those of the tokens that have a label of their own.
    pub fn pack_labelled(&self, rows: impl IntoIterator<Item = usize>) -> MicroBatch {
        self.pack_with(rows, 0)
    }

    /// A label counts for the token `before` places ahead of it.
    fn pack_with(&self, rows: impl IntoIterator<Item = usize>, before: usize) -> MicroBatch {
        let mut b = MicroBatch { q_segments: vec![0], ..MicroBatch::default() };
        for row in rows {
            let (ids, labels) = self.row(row);
            let at = b.input_ids.len() as i32;
            b.input_ids.extend_from_slice(ids);
            b.positions.extend(0..ids.len() as i32);
            b.q_segments.push(at + ids.len() as i32);
            b.kv_start.push(at);
            b.kv_len.push(ids.len() as i32);
            for (i, l) in labels.iter().enumerate().skip(before).filter(|(_, l)| **l != IGNORED) {
                b.rows.push(at + (i - before) as i32);
                b.labels.push(*l);
            }
        }
        b
    }
}

/// FNV-1a, 64 bits.
pub(crate) fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The integer inputs of a run of `accumulate` or `evaluate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// `[T]`.
    pub input_ids: Vec<i32>,
    /// `[T]`, from 0 in every row.
    pub positions: Vec<i32>,
    /// `[S + 1]`, where rows begin, and the end.
    pub q_segments: Vec<i32>,
    /// `[S]`.
    pub kv_start: Vec<i32>,
    /// `[S]`.
    pub kv_len: Vec<i32>,
    /// `[L]`: places of tokens whose next token is a counted target.
    pub rows: Vec<i32>,
    /// `[L]`: those targets.
    pub labels: Vec<i32>,
}

/// Rows in the order of training: place 0, 1, 2, … for ever.
#[derive(Clone, Debug)]
pub struct Order {
    n: usize,
    seed: Option<u64>,
    /// The epoch whose permutation is at hand.
    epoch: u64,
    permutation: Vec<u32>,
}

/// Keeps the draws of the shuffle apart from all others of the same seed.
const SHUFFLE: u32 = 0x7368_7566;

impl Order {
    /// The order of `n` rows: as given, or shuffled anew for every epoch by a seed.
    pub fn new(n: usize, seed: Option<u64>) -> Order {
        Order { n, seed, epoch: u64::MAX, permutation: vec![] }
    }

    /// The row at a place. There must be rows.
    pub fn at(&mut self, place: u64) -> usize {
        let n = self.n.max(1) as u64;
        let (epoch, i) = (place / n, (place % n) as usize);
        let Some(seed) = self.seed else { return i };
        if self.epoch != epoch {
            self.permutation = permutation(self.n, seed, epoch);
            self.epoch = epoch;
        }
        self.permutation[i] as usize
    }
}

/// The permutation of an epoch: Fisher and Yates, from the end, one draw per exchange.
fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut p: Vec<u32> = (0..n as u32).collect();
    let random = Philox::new(seed);
    for i in (1..n).rev() {
        let w = random.at([i as u32, epoch as u32, (epoch >> 32) as u32, SHUFFLE]);
        let draw = u128::from(u64::from(w[0]) << 32 | u64::from(w[1]));
        p.swap(i, ((draw * (i as u128 + 1)) >> 64) as usize);
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_are_cut_dropped_and_counted() {
        let mut r = Rows::default();
        r.push(&[5, 6, 7, 8], None, 3);
        r.push(&[], None, 3);
        r.push(&[9], None, 3);
        r.push(&[1, 2, 3], Some(&[1, IGNORED, 3]), 3);
        let want =
            RowReport { rows: 3, tokens: 7, targets: 3, cut: 1, cut_tokens: 1, dropped: 1, uncounted: 1, longest: 3 };
        assert_eq!(*r.report(), want);
        let b = r.pack([2, 0, 1]);
        assert_eq!(b.input_ids, [1, 2, 3, 5, 6, 7, 9]);
        assert_eq!(b.positions, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(
            (&b.q_segments[..], &b.kv_start[..], &b.kv_len[..]),
            (&[0, 3, 6, 7][..], &[0, 3, 6][..], &[3, 3, 1][..])
        );
        // Place 1 predicts the label at place 2; places 3 and 4 predict 6 and 7.
        assert_eq!((&b.rows[..], &b.labels[..]), (&[1, 3, 4][..], &[3, 6, 7][..]));
        let own = r.pack_labelled([2, 0, 1]);
        assert_eq!((&own.rows[..], &own.labels[..]), (&[0, 2, 3, 4, 5, 6][..], &[1, 3, 5, 6, 7, 9][..]));
        assert_eq!((own.input_ids, own.q_segments), (b.input_ids, b.q_segments));
    }

    proptest! {
        #[test]
        fn an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(n in 1usize..200, seed: u64, epoch in 0u64..1000) {
            let mut p = permutation(n, seed, epoch);
            prop_assert_eq!(&p, &permutation(n, seed, epoch));
            p.sort_unstable();
            prop_assert!(p.iter().enumerate().all(|(i, x)| i == *x as usize));
        }

        #[test]
        fn places_may_be_asked_in_any_order(n in 1usize..30, seed: u64, places in prop::collection::vec(0u64..100, 1..20)) {
            let mut forward = Order::new(n, Some(seed));
            let all: Vec<usize> = (0..100).map(|i| forward.at(i)).collect();
            let mut o = Order::new(n, Some(seed));
            for p in places {
                prop_assert_eq!(o.at(p), all[p as usize]);
            }
        }

        #[test]
        fn packing_loses_and_invents_nothing(
            list in prop::collection::vec(prop::collection::vec((0i32..50, any::<bool>()), 0..12), 1..8),
            max in 1usize..10,
        ) {
            let mut rows = Rows::default();
            let mut targets = vec![];
            for row in &list {
                let ids: Vec<i32> = row.iter().map(|x| x.0).collect();
                let labels: Vec<i32> = row.iter().map(|x| if x.1 { x.0 } else { IGNORED }).collect();
                rows.push(&ids, Some(&labels), max);
                // As a causal language model's loss takes them: logits[..-1] against labels[1..].
                targets.extend(labels.iter().take(max).skip(1).copied().filter(|l| *l != IGNORED));
            }
            let b = rows.pack(0..rows.len());
            prop_assert_eq!(b.input_ids.len() as u64, rows.report().tokens);
            prop_assert_eq!(&b.labels, &targets);
            prop_assert_eq!(rows.report().targets as usize, targets.len());
            for (r, l) in b.rows.iter().zip(&b.labels) {
                prop_assert_eq!(b.input_ids[*r as usize + 1], *l);
                prop_assert!(!b.q_segments.contains(&(r + 1)));
            }
            let given = list.iter().filter(|r| !r.is_empty()).count();
            prop_assert_eq!(rows.len(), given);
        }
    }

    #[test]
    fn shuffles_stay_the_same_from_version_to_version() {
        assert_eq!(permutation(8, 0, 0), permutation(8, 0, 0));
        assert_ne!(permutation(64, 0, 0), permutation(64, 0, 1));
        assert_ne!(permutation(64, 0, 0), permutation(64, 1, 0));
    }
}
