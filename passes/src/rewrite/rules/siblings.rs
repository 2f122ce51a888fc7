//! Horizontal fusion: products that share their left operand become one.

use super::*;
use std::collections::BTreeMap;

/// Most members of a group.
const MEMBERS: usize = 24;

/// Left operand, flags of both, kind of the right one.
type Group = (Id, bool, bool, u8);

/// What a right operand is: only members of one kind are put side by side.
fn kind(w: &World, r: Id) -> Option<u8> {
    let has = |f: &dyn Fn(&Op) -> bool| w.nodes(r).iter().filter_map(ENode::op).any(f);
    let known = w.known(r);
    if !is_base_or_slot(known) {
        return None;
    }
    let slot = u8::from(known == Known::Slot);
    Some(match () {
        () if w.eg[r].data.leaf => slot,
        () if rounded(w, r).any(|y| w.eg[y.0].data.leaf) => 8 + slot,
        () if has(&|o| matches!(o, Op::Add | Op::Scatter { .. })) => 2 + slot,
        () if has(&|o| matches!(o, Op::Concat { .. })) => 4 + slot,
        () if w.nodes(r).iter().any(|n| as_diag(w, n).is_some()) => 6 + slot,
        () => return None,
    })
}

/// x·W₁, x·W₂, … = column slices of x·[W₁|W₂|…]: whole groups of one kind, ordered by parameter, never their subsets.
pub(super) fn fuse_siblings(w: &World, out: &mut Found) {
    let mut by: BTreeMap<Group, Vec<(Id, Id)>> = BTreeMap::new();
    for (id, n, _) in each(w) {
        let Some((a, b)) = as_product(w, n) else { continue };
        let Some(k) = kind(w, b.0) else { continue };
        // a scaled twin of a member or a part of one would put the same numbers side by side twice
        let twin = w.nodes(b.0).iter().any(|y| as_scale(w, y).is_some() || matches!(y.op(), Some(Op::Slice { .. })));
        if w.is_param(a.0) || twin || dims(w, b).1.known().is_none() {
            continue;
        }
        by.entry((a.0, a.1, b.1, k)).or_default().push((id, b.0));
    }
    for ((a, ta, tb, _), mut m) in by {
        m.sort_by_key(|e| e.1);
        m.dedup_by_key(|e| e.1);
        if m.len() < 2 || m.len() > MEMBERS || m.iter().any(|e| w.mixes(e.1, m[0].1)) {
            continue;
        }
        let cat = node(Op::Concat { axis: u8::from(!tb) }, m.iter().map(|e| class(e.1)).collect());
        let all = mm((class(a), ta), (cat, tb));
        let mut at = 0;
        for (id, r) in m {
            let n = size(dims(w, (r, tb)).1);
            out.push((id, node(Op::Slice { axis: 1, start: at, end: at + n }, vec![all.clone()])));
            at += n;
        }
    }
}
