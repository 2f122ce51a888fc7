//! A PQ-tree: all orders of some items in which given sets of them stand side by side (Booth and Lueker, 1976).
//!
//! The children of a free node stand in any order, those of a fixed node in the given one or its reverse. Trees are small
//! here, so a reduction walks the whole tree instead of keeping the pointers of the linear algorithm.

/// A tree of items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// An item.
    Leaf(u32),
    /// Subtrees, and whether their order is fixed.
    Node(bool, Vec<Tree>),
}

/// A run of items that was taken out, and what tells its direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The subtrees of the run in order.
    pub(super) trees: Vec<Tree>,
    /// An item beside the run, and whether it stands before it; without one either direction will do.
    pub(super) beside: Option<(u32, bool)>,
}

/// How much of a subtree belongs to a set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Share {
    None,
    Part,
    All,
}

impl Tree {
    /// Some subtrees in any order.
    pub(super) fn free(mut kids: Vec<Tree>) -> Tree {
        match kids.pop() {
            Some(only) if kids.is_empty() => only,
            last => {
                kids.extend(last);
                Tree::Node(false, kids)
            }
        }
    }

    /// Some subtrees in this order.
    fn fixed(kids: Vec<Tree>) -> Tree {
        // Two have one order, up to reversal.
        if kids.len() <= 2 { Tree::free(kids) } else { Tree::Node(true, kids) }
    }

    /// Appends the items in one of the orders.
    pub(super) fn items(&self, out: &mut Vec<u32>) {
        match self {
            Tree::Leaf(i) => out.push(*i),
            Tree::Node(_, kids) => kids.iter().for_each(|k| k.items(out)),
        }
    }

    fn any(&self) -> u32 {
        match self {
            Tree::Leaf(i) => *i,
            Tree::Node(_, kids) => kids[0].any(),
        }
    }

    /// Puts another item in the place of one.
    pub(super) fn rename(&mut self, from: u32, to: u32) -> bool {
        match self {
            Tree::Leaf(i) => {
                let found = *i == from;
                if found {
                    *i = to;
                }
                found
            }
            Tree::Node(_, kids) => kids.iter_mut().any(|k| k.rename(from, to)),
        }
    }

    fn share(&self, set: &[bool]) -> Share {
        match self {
            Tree::Leaf(i) => match set[*i as usize] {
                true => Share::All,
                false => Share::None,
            },
            Tree::Node(_, kids) => {
                let first = kids[0].share(set);
                let same = first != Share::Part && kids[1..].iter().all(|k| k.share(set) == first);
                if same { first } else { Share::Part }
            }
        }
    }

    /// Makes the items of a set, which has so many and is not empty, stand side by side and puts `new` in their place. `None` if they
    /// cannot.
    pub(super) fn replace(mut self, set: &[bool], count: usize, new: Tree) -> Option<(Tree, Run)> {
        let mut path = vec![];
        self.path(set, count, &mut path);
        let mut at = &mut self;
        for k in path.into_iter().rev() {
            let Tree::Node(_, kids) = at else { break };
            at = &mut kids[k];
        }
        let (tree, run) = std::mem::replace(at, Tree::Leaf(0)).replace_here(set, new)?;
        *at = tree;
        Some((self, run))
    }

    /// How many items of a set there are, up to all; the way to the lowest subtree with all of them, from its end.
    fn path(&self, set: &[bool], count: usize, path: &mut Vec<usize>) -> usize {
        let Tree::Node(_, kids) = self else {
            let Tree::Leaf(i) = self else { return 0 };
            return usize::from(set[*i as usize]);
        };
        let mut sum = 0;
        for (k, kid) in kids.iter().enumerate() {
            let found = kid.path(set, count, path);
            if found == count {
                path.push(k);
                return count;
            }
            sum += found;
            if sum == count {
                break;
            }
        }
        sum
    }

    /// As [`Tree::replace`], where no child has all items of the set.
    fn replace_here(self, set: &[bool], new: Tree) -> Option<(Tree, Run)> {
        let (fixed, mut kids) = match self {
            Tree::Node(fixed, kids) => (fixed, kids),
            leaf => return Some((new, Run { trees: vec![leaf], beside: None })),
        };
        let shares: Vec<Share> = kids.iter().map(|k| k.share(set)).collect();
        let touched: Vec<usize> = (0..kids.len()).filter(|k| shares[*k] != Share::None).collect();
        let (a, b) = (*touched.first()?, *touched.last()?);
        if touched.len() == kids.len() && shares.iter().all(|s| *s == Share::All) {
            return Some((new, Run { trees: vec![Tree::Node(fixed, kids)], beside: None }));
        }
        if fixed {
            if (a + 1..b).any(|k| shares[k] != Share::All) {
                return None;
            }
            let after = kids.split_off(b + 1);
            let mut middle = kids.split_off(a);
            let (mut before, mut run) = (kids, vec![]);
            let last = middle.pop()?;
            let mut middle = middle.into_iter();
            let (none, all) = middle.next()?.split(set)?;
            before.extend(none);
            run.extend(all);
            run.extend(middle);
            let (none, all) = last.split(set)?;
            run.extend(all.into_iter().rev());
            let mut rest: Vec<Tree> = none.into_iter().rev().collect();
            rest.extend(after);
            let (tree, run) = Tree::around(before, run, rest, new);
            return Some((tree, run));
        }
        let (mut none, mut all, mut part) = (vec![], vec![], vec![]);
        for (kid, share) in kids.into_iter().zip(shares) {
            match share {
                Share::None => none.push(kid),
                Share::All => all.push(kid),
                Share::Part => part.push(kid),
            }
        }
        if part.len() > 2 {
            return None;
        }
        if part.is_empty() {
            none.push(new);
            return Some((Tree::free(none), Run { trees: vec![Tree::free(all)], beside: None }));
        }
        let mut part = part.into_iter();
        let (before, mut run) = part.next()?.split(set)?;
        if !all.is_empty() {
            run.push(Tree::free(all));
        }
        let mut after = vec![];
        if let Some(p) = part.next() {
            let (n, a) = p.split(set)?;
            run.extend(a.into_iter().rev());
            after.extend(n.into_iter().rev());
        }
        let (tree, run) = Tree::around(before, run, after, new);
        none.push(tree);
        Some((Tree::free(none), run))
    }

    /// A fixed order with `new` in the place of a run.
    fn around(mut before: Vec<Tree>, run: Vec<Tree>, after: Vec<Tree>, new: Tree) -> (Tree, Run) {
        let left = before.last().map(|t| (t.any(), true));
        let beside = left.or_else(|| after.first().map(|t| (t.any(), false)));
        before.push(new);
        before.extend(after);
        (Tree::fixed(before), Run { trees: run, beside })
    }

    /// An order with all items outside the set first, then all inside: the subtrees of both. `None` if there is none.
    fn split(self, set: &[bool]) -> Option<(Vec<Tree>, Vec<Tree>)> {
        match self.share(set) {
            Share::None => return Some((vec![self], vec![])),
            Share::All => return Some((vec![], vec![self])),
            Share::Part => {}
        }
        let Tree::Node(fixed, mut kids) = self else { return None };
        let (mut none, mut all) = (vec![], vec![]);
        if fixed {
            let (first, last) = (kids.first()?.share(set), kids.last()?.share(set));
            if first == Share::All || last == Share::None {
                kids.reverse();
            }
            let mut part = 0;
            for kid in kids {
                match kid.share(set) {
                    Share::None if all.is_empty() => none.push(kid),
                    Share::Part if all.is_empty() && part == 0 => {
                        part += 1;
                        let (n, a) = kid.split(set)?;
                        none.extend(n);
                        all.extend(a);
                    }
                    Share::All => all.push(kid),
                    _ => return None,
                }
            }
            return Some((none, all));
        }
        let mut part = None;
        for kid in kids {
            match kid.share(set) {
                Share::None => none.push(kid),
                Share::All => all.push(kid),
                Share::Part if part.is_none() => part = Some(kid),
                Share::Part => return None,
            }
        }
        let mut before = if none.is_empty() { vec![] } else { vec![Tree::free(none)] };
        let mut after = vec![];
        if let Some(p) = part {
            let (n, a) = p.split(set)?;
            before.extend(n);
            after.extend(a);
        }
        if !all.is_empty() {
            after.push(Tree::free(all));
        }
        Some((before, after))
    }
}

impl Run {
    /// Puts the run into the place of an item, as children of its fixed parent where it has one.
    pub(super) fn restore(&self, tree: &mut Tree, item: u32) {
        let Tree::Node(fixed, kids) = tree else {
            if *tree == Tree::Leaf(item) {
                *tree = Tree::fixed(self.trees.clone());
            }
            return;
        };
        match kids.iter().position(|k| *k == Tree::Leaf(item)) {
            Some(at) if self.trees.len() == 1 && !*fixed => kids[at] = self.trees[0].clone(),
            Some(at) => {
                kids.splice(at..=at, self.trees.iter().cloned());
                *fixed |= self.trees.len() > 1 && kids.len() > 2;
            }
            None => kids.iter_mut().for_each(|k| self.restore(k, item)),
        }
    }

    /// Puts the run in the place of `new`, which stand side by side in an order.
    pub(super) fn put_back(&self, order: &mut Vec<u32>, new: &[u32]) {
        let mut items = vec![];
        self.trees.iter().for_each(|t| t.items(&mut items));
        let at = order.iter().position(|i| new.contains(i)).unwrap_or(0);
        if let Some((item, before)) = self.beside {
            let stands = order.iter().position(|i| *i == item).is_some_and(|p| p < at);
            if stands != before {
                items.reverse();
            }
        }
        let end = (at + new.len()).min(order.len());
        order.splice(at..end, items);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All orders of a tree.
    fn orders(tree: &Tree) -> Vec<Vec<u32>> {
        let Tree::Node(fixed, kids) = tree else {
            let Tree::Leaf(i) = tree else { unreachable!() };
            return vec![vec![*i]];
        };
        let mut turns: Vec<Vec<usize>> = vec![(0..kids.len()).collect()];
        if *fixed {
            turns.push((0..kids.len()).rev().collect());
        } else {
            turns = permutations(kids.len());
        }
        let mut out = vec![];
        for turn in turns {
            let mut part: Vec<Vec<u32>> = vec![vec![]];
            for k in turn {
                let below = orders(&kids[k]);
                part = part.iter().flat_map(|p| below.iter().map(|b| [p.clone(), b.clone()].concat())).collect();
            }
            out.extend(part);
        }
        out.sort();
        out.dedup();
        out
    }

    fn permutations(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let mut out = vec![];
        for p in permutations(n - 1) {
            for at in 0..n {
                let mut q = p.clone();
                q.insert(at, n - 1);
                out.push(q);
            }
        }
        out
    }

    #[test]
    fn reductions_keep_exactly_the_orders_that_suit() {
        let mut seed = 12345u64;
        let mut below = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let (mut kept, mut refused) = (0, 0);
        for _ in 0..400 {
            let n = 6;
            let mut tree = Tree::free((0..n).map(Tree::Leaf).collect());
            let mut suit: Vec<Vec<u32>> =
                permutations(n as usize).into_iter().map(|p| p.into_iter().map(|x| x as u32).collect()).collect();
            for _ in 0..4 {
                let set: Vec<bool> = (0..8).map(|i| i < n && below(2) == 0).collect();
                let size = set.iter().filter(|s| **s).count();
                if size < 2 {
                    continue;
                }
                let beside = |o: &Vec<u32>| o.windows(size).any(|w| w.iter().all(|i| set[*i as usize]));
                suit.retain(beside);
                let reduced = tree.clone().replace(&set, size, Tree::Leaf(7));
                assert_eq!(reduced.is_some(), !suit.is_empty());
                let Some((without, run)) = reduced else {
                    refused += 1;
                    break;
                };
                // Each order left puts the run back into one that suits.
                let mut found = vec![];
                for mut o in orders(&without) {
                    run.put_back(&mut o, &[7]);
                    assert!(suit.contains(&o), "{o:?} from {tree:?}");
                    found.push(o);
                }
                assert!(!found.is_empty());
                kept += 1;
                // The reduced tree itself, with the run as it stood.
                let mut whole = without;
                run.restore(&mut whole, 7);
                tree = whole;
                assert_eq!(orders(&tree), {
                    let mut s = suit.clone();
                    s.sort();
                    s
                });
            }
        }
        assert!(kept > 300 && refused > 50, "{kept} {refused}");
    }
}
