//! The nearest name by edit distance, for messages that say what was probably meant.

/// The candidate with the smallest Levenshtein distance to `name`, if it is close enough to be worth naming
/// (at most half of the longer name differs). Ties go to the candidate that comes first.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let limit = best.map_or(usize::MAX, |(distance, _)| distance);
        if candidate.len().abs_diff(name.len()) >= limit {
            continue;
        }
        let distance = edit_distance(name.as_bytes(), candidate.as_bytes());
        if distance < limit {
            best = Some((distance, candidate));
        }
    }
    best.filter(|&(distance, candidate)| distance * 2 <= name.len().max(candidate.len())).map(|(_, c)| c)
}

/// "; nearest is `x`", or nothing: the tail of a message about an unknown name.
pub(crate) fn nearest_hint<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, candidates).map(|n| format!("; the nearest name is `{n}`")).unwrap_or_default()
}

fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(edit_distance(b"kitten", b"sitting"), 3);
        assert_eq!(edit_distance(b"", b"abc"), 3);
        assert_eq!(edit_distance(b"same", b"same"), 0);
    }

    #[test]
    fn picks_the_nearest_and_stays_silent_when_nothing_is_near() {
        assert_eq!(nearest("q_porj", ["k_proj", "q_proj", "lm_head"]), Some("q_proj"));
        assert_eq!(nearest("zzz", ["model.layers.0.self_attn.q_proj"]), None);
    }
}
