//! Types of scalars and vectors as text.

/// Type of a vector of `lanes` elements; one lane is the scalar type itself.
pub fn vty(lanes: usize, elem: &str) -> String {
    if lanes == 1 { elem.to_string() } else { format!("vector<{lanes}x{elem}>") }
}

/// Alignment of one element of a scalar or vector type, in bytes.
pub(super) fn align_of(ty: &str) -> u32 {
    let elem = ty.strip_prefix("vector<").and_then(|t| t.split('x').nth(1)).map_or(ty, |t| t.trim_end_matches('>'));
    match elem {
        "f32" | "i32" => 4,
        "bf16" | "f16" | "i16" => 2,
        "i64" | "!llvm.ptr" => 8,
        _ => 1,
    }
}
