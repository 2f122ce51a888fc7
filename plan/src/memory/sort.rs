//! Sorting numbers of requests: one piece of code for all lists. What the standard library makes of a sort for another closure is
//! some ten kilobytes, in every program that plans memory.

/// Sorts by a key of each, computed once; where keys are equal, the lower number comes first.
pub(super) fn by_key(list: &mut [u32], key: &dyn Fn(u32) -> (u128, u128)) {
    let mut keyed: Vec<(u128, u128, u32)> = list
        .iter()
        .map(|i| {
            let k = key(*i);
            (k.0, k.1, *i)
        })
        .collect();
    keyed.sort_unstable();
    list.iter_mut().zip(keyed).for_each(|(to, k)| *to = k.2);
}

/// Sorts by falling scores; where these are equal, the lower number comes first.
pub(super) fn falling(list: &mut [(f64, u32)]) {
    list.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_keys_keep_the_order_of_numbers() {
        let mut list = [4, 1, 3, 0, 2];
        by_key(&mut list, &|i| (u128::from(i % 2), 7));
        assert_eq!(list, [0, 2, 4, 1, 3]);
        let mut scores = [(1.0, 2), (2.0, 3), (1.0, 0)];
        falling(&mut scores);
        assert_eq!(scores, [(2.0, 3), (1.0, 0), (1.0, 2)]);
    }
}
