//! Bodies that are one body many times over: its code is needed once.
//!
//! What `join` puts side by side is seen here again. A block takes its share from the second axis of the grid and its buffers
//! from a table in memory.

use pleach_ir::{Entry, Kernel, Op, ValueId};

/// The part that repeats, and how often; `None` for a body that is no repetition.
pub(super) fn repeated(k: &Kernel) -> Option<(Kernel, usize)> {
    let nodes = k.body.nodes.len();
    let (operands, results) = (k.operands.len(), k.results.len());
    // Of the most parts: the shortest.
    let whole = |n: &usize| [nodes, operands, results].iter().all(|x| x.is_multiple_of(*n));
    (2..=results).rev().filter(whole).find_map(|n| {
        let one = Kernel {
            name: k.name.clone(),
            class: k.class,
            body: first(&k.body, nodes / n, results / n)?,
            operands: k.operands[..operands / n].to_vec(),
            results: k.results[..results / n].to_vec(),
            aliases: k.aliases[..results / n].to_vec(),
        };
        (1..n).all(|c| same(k, &one, c)).then_some((one, n))
    })
}

/// The first nodes and roots as a body; `None` where they need others.
fn first(body: &Entry, nodes: usize, results: usize) -> Option<Entry> {
    let mut out = Entry::new(&body.name);
    out.nodes = body.nodes[..nodes].to_vec();
    let inside = |v: &ValueId| v.index() < nodes;
    for (i, r) in body.roots[..results].iter().enumerate() {
        if !inside(&r.value) {
            return None;
        }
        out.output(format!("r{i}"), r.value);
    }
    Some(out)
}

/// Whether part `c` is the first one with other operands: those of its own number.
fn same(k: &Kernel, one: &Kernel, c: usize) -> bool {
    let (n, operands, results) = (one.body.nodes.len(), one.operands.len(), one.results.len());
    let number = |name: &str| name.strip_prefix('a').and_then(|x| x.parse::<usize>().ok());
    let nodes = one.body.nodes.iter().zip(&k.body.nodes[c * n..]).all(|(a, b)| {
        let op = match (&a.op, &b.op) {
            (Op::Input { name: x, .. }, Op::Input { name: y, .. }) => {
                number(x).zip(number(y)).is_some_and(|(x, y)| x < operands && y == x + c * operands)
            }
            (x, y) => x == y,
        };
        let inputs = a.inputs.len() == b.inputs.len()
            && a.inputs.iter().zip(&b.inputs).all(|(x, y)| x.index() + c * n == y.index());
        op && a.ty == b.ty && inputs
    });
    let roots = one.body.roots.iter().zip(&k.body.roots[c * results..]);
    let aliases = one.aliases.iter().zip(&k.aliases[c * results..]);
    nodes
        && roots.into_iter().all(|(x, y)| x.value.index() + c * n == y.value.index())
        && aliases.into_iter().all(|(x, y)| x.map(|x| x as usize + c * operands) == y.map(|y| y as usize))
        && k.operands[c * operands..][..operands] == one.operands[..]
        && k.results[c * results..][..results] == one.results[..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use pleach_ir::{Class, DType, Dim, Layout};

    #[test]
    fn finds_the_shortest_part() {
        let mut e = Entry::new("kernel");
        let mut out = vec![];
        for i in 0..3 {
            let shape = vec![Dim::Known(4)];
            let x = e.push(&[], Op::Input { name: format!("a{i}"), dtype: DType::F32, shape }, &[]).unwrap();
            out.push(e.push(&[], Op::Add, &[x, x]).unwrap());
        }
        out.iter().enumerate().for_each(|(i, v)| e.output(format!("r{i}"), *v));
        let list = vec![Layout::RowMajor; 3];
        let mut k = Kernel {
            name: "k".into(),
            class: Class::Row,
            body: e,
            operands: list.clone(),
            results: list,
            aliases: vec![None; 3],
        };
        let (one, n) = repeated(&k).unwrap();
        assert_eq!((n, one.body.nodes.len(), one.operands.len()), (3, 2, 1));
        // One part over its operand, the others not.
        k.aliases[1] = Some(1);
        assert!(repeated(&k).is_none());
    }
}
