//! Narrow places of the forward half: where little crosses from what was computed to what is still to come.
//!
//! Building values again saves memory only if the backward half can do it piece by piece. A minimum cut does not see that:
//! where every value is dear to keep it builds all of them again from the inputs, and then all of them live at once.
//! So the forward half is cut into parts at *stops*; what crosses a stop is kept, and each part is built again from that.
//!
//! A narrow place is a valley of the live bytes: on either side they reach twice as many before they fall below. In a chain
//! of layers those are the places where one tensor carries everything, the residual stream. Nothing here knows layers.

use super::{cut, saved};
use crate::options::Options;
use pleach_ir::{Entry, RootKind, ValueId};

/// Live bytes on either side of a narrow place are at least this many times those at it.
const RISE: u64 = 2;

/// The forward half in the order of a chain: what a result needs, operands first and depth first.
pub(super) struct Forward {
    /// Per value: its place, and the last place where it is read.
    span: Vec<Option<(usize, usize)>>,
    /// Bytes live after each place.
    live: Vec<u64>,
}

impl Forward {
    /// `forward` tells which values belong to the forward half and are needed by a result of it.
    pub(super) fn new(e: &Entry, forward: &[bool], opts: &Options) -> Forward {
        let order = depth_first(e, forward);
        let tokens = opts.tokens(&e.name);
        let mut span: Vec<Option<(usize, usize)>> = vec![None; e.nodes.len()];
        for (at, v) in order.iter().enumerate() {
            if saved::base(e, *v) == *v && !e.node(*v).op.is_leaf() {
                span[v.index()] = Some((at, at));
            }
            for i in &e.node(*v).inputs {
                if let Some(s) = &mut span[saved::base(e, *i).index()] {
                    s.1 = at;
                }
            }
        }
        let mut change = vec![0i128; order.len() + 1];
        for (v, s) in span.iter().enumerate() {
            if let Some((first, last)) = s {
                let bytes = i128::from(cut::bytes(e.ty(ValueId(v as u32)), tokens));
                change[*first] += bytes;
                change[*last] -= bytes;
            }
        }
        let mut sum = 0i128;
        let live = change[..order.len()]
            .iter()
            .map(|c| {
                sum += c;
                sum as u64
            })
            .collect();
        Forward { span, live }
    }

    /// The narrow places in order.
    fn valleys(&self) -> Vec<usize> {
        let mut out = vec![];
        let (mut high, mut low): (u64, Option<(u64, usize)>) = (0, None);
        for (at, bytes) in self.live.iter().copied().enumerate() {
            match low {
                None if bytes.saturating_mul(RISE) <= high => low = Some((bytes, at)),
                None => high = high.max(bytes),
                Some((least, _)) if bytes <= least => low = Some((bytes, at)),
                Some((least, place)) if bytes >= least.saturating_mul(RISE) => {
                    out.push(place);
                    (high, low) = (bytes, None);
                }
                Some(_) => {}
            }
        }
        out
    }

    /// Which values cross a stop, when every `every`-th narrow place is one, counted from the last. `every` 0: none.
    pub(super) fn crossing(&self, every: usize) -> Vec<bool> {
        let mut out = vec![false; self.span.len()];
        if every == 0 {
            return out;
        }
        let stops: Vec<usize> = self.valleys().into_iter().rev().step_by(every).collect();
        for (v, s) in self.span.iter().enumerate() {
            out[v] = s.is_some_and(|(first, last)| stops.iter().any(|at| first <= *at && *at < last));
        }
        out
    }
}

/// The values marked that an output is made of, operands before their readers: those of the first operand first.
fn depth_first(e: &Entry, marked: &[bool]) -> Vec<ValueId> {
    let mut seen = vec![false; e.nodes.len()];
    let mut out = vec![];
    for root in e.roots.iter().filter(|r| matches!(r.kind, RootKind::Output(_))) {
        let mut stack = vec![(root.value, false)];
        while let Some((v, done)) = stack.pop() {
            if done {
                out.extend(marked[v.index()].then_some(v));
            } else if !std::mem::replace(&mut seen[v.index()], true) {
                stack.push((v, true));
                stack.extend(e.node(v).inputs.iter().rev().map(|i| (*i, false)));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recompute::{Price, gradients, saved as kept};
    use crate::testing::same_results;
    use crate::{Pipeline, run};
    use pleach_ir::Graph;
    use pleach_ir::text::parse;

    /// Blocks that widen a stream of 8 columns, bend it, narrow it again, and add the result to the stream (`skip`) or take its
    /// place; then the gradient of the stream's sum back through them. Also the values of the stream after each block.
    fn blocks(count: usize, width: u64, skip: bool) -> (Graph, Vec<ValueId>) {
        blocks_and(count, width, skip, false)
    }

    /// The same; `normed`: the gradient's square is a result too, and the backward half computes slopes from what is bent.
    fn blocks_and(count: usize, width: u64, skip: bool, normed: bool) -> (Graph, Vec<ValueId>) {
        let (wide, thin) = (format!("f32[T,{width}]"), "f32[T,8]");
        let mut text = format!(
            "graph core\nparam @0 \"up\" f32[8,{width}] frozen checkpoint(\"up\")\n\
             param @1 \"down\" f32[{width},8] frozen checkpoint(\"down\")\n\
             param @2 \"g\" f32[8,8] state zeros\nentry \"accumulate\" {{\n\
             %0 = input \"x\" : {thin}\n%1 = input \"loss_scale\" : f32[]\n%2 = param @0 : f32[8,{width}]\n\
             %3 = param @1 : f32[{width},8]\n%4 = param @2 : f32[8,8]\n%5 = neg(%0) : {thin}\n"
        );
        let (mut n, mut stream, mut streams, mut bent) = (6, 5, vec![], vec![]);
        let mut push = |line: String| {
            text += &format!("%{n} = {line}\n");
            n += 1;
            n - 1
        };
        for _ in 0..count {
            let up = push(format!("matmul(%{stream}, %2) : {wide}"));
            let exp = push(format!("sigmoid(%{up}) : {wide}"));
            let down = push(format!("matmul(%{exp}, %3) : {thin}"));
            stream = if skip { push(format!("add(%{stream}, %{down}) : {thin}")) } else { down };
            streams.push(ValueId(stream));
            bent.push(exp);
        }
        let rows = push(format!("reduce_sum(%{stream}) {{axis = 1}} : f32[T]"));
        let sum = push(format!("reduce_sum(%{rows}) {{axis = 0}} : f32[]"));
        let loss = push(format!("mul(%1, %{sum}) : f32[]"));
        let mut dy = push(format!("broadcast(%1) {{axes = []}} : {thin}"));
        for exp in bent.iter().rev() {
            let dexp = push(format!("matmul(%{dy}, %3) {{tb}} : {wide}"));
            let slope = if normed { push(format!("mul(%{exp}, %{exp}) : {wide}")) } else { *exp };
            let dup = push(format!("mul(%{dexp}, %{slope}) : {wide}"));
            let dx = push(format!("matmul(%{dup}, %2) {{tb}} : {thin}"));
            dy = if skip { push(format!("add(%{dy}, %{dx}) : {thin}")) } else { dx };
        }
        let dw = push(format!("matmul(%0, %{dy}) {{ta}} : f32[8,8]"));
        let g = push(format!("add(%4, %{dw}) : f32[8,8]"));
        let norm = normed.then(|| {
            let squares = push(format!("mul(%{dw}, %{dw}) : f32[8,8]"));
            let rows = push(format!("reduce_sum(%{squares}) {{axis = 1}} : f32[8]"));
            push(format!("reduce_sum(%{rows}) {{axis = 0}} : f32[]"))
        });
        let norm = norm.map(|n| format!("output \"grad_norm\" %{n}\n")).unwrap_or_default();
        text += &format!("output \"loss\" %{loss}\n{norm}assign @2 %{g}\n}}\n");
        (parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")), streams)
    }

    fn chain(count: usize, width: u64) -> (Graph, Vec<ValueId>) {
        blocks(count, width, true)
    }

    fn crossing(g: &Graph, every: usize) -> Vec<ValueId> {
        let e = &g.entries[0];
        let forward = cut::forward(e, &gradients(e));
        let marked = Forward::new(e, &forward, &Options::default()).crossing(every);
        e.values().filter(|v| marked[v.index()]).collect()
    }

    #[test]
    fn the_stream_between_blocks_is_what_crosses() {
        let (g, streams) = chain(5, 64);
        assert_eq!(crossing(&g, 1), streams[..4], "one place between two blocks, none after the last");
        // counted from the last
        assert_eq!(crossing(&g, 2), [streams[1], streams[3]]);
        assert_eq!(crossing(&g, 4), [streams[3]]);
        assert_eq!(crossing(&g, 0), []);
    }

    #[test]
    fn what_a_gradients_norm_is_made_of_crosses_nothing() {
        let (g, streams) = blocks_and(5, 64, true, true);
        assert_eq!(crossing(&g, 1), streams[..4]);
    }

    #[test]
    fn where_live_bytes_do_not_double_nothing_is_narrow() {
        // without a skip one value is live at a time: 8 columns between blocks, 12 or 16 within
        assert_eq!(crossing(&blocks(5, 12, false).0, 1), []);
        let (g, streams) = blocks(5, 16, false);
        assert_eq!(crossing(&g, 1), streams[..4]);
        // with one, both terms of the sum live beside each other, however thin the block is
        let (g, streams) = blocks(5, 2, true);
        assert_eq!(crossing(&g, 1), streams[..4]);
    }

    #[test]
    fn a_single_block_has_no_place_between_two() {
        assert_eq!(crossing(&chain(1, 64).0, 1), []);
    }

    #[test]
    fn at_a_high_price_what_crosses_a_stop_is_kept_and_nothing_else() {
        let (g, streams) = chain(5, 64);
        let wanted = |every: usize, streams: &[ValueId]| {
            let opts = Options { recompute: Some(Price { every, ..Price::flat(1e6) }), ..Options::default() };
            let out = run(&g, &Pipeline::of(&["recompute"]), &opts).unwrap_or_else(|e| panic!("{e}"));
            same_results(&g, &out.graph, 1e-5);
            let e = &out.graph.entries[0];
            let list = kept(&out.graph, e, &opts);
            assert!(list.iter().all(|s| s.ty == *g.entries[0].ty(streams[0])), "{list:?}");
            assert_eq!(list.len(), streams.len(), "{list:?}");
        };
        wanted(1, &streams[..4]);
        wanted(2, &[streams[1], streams[3]]);
    }
}
