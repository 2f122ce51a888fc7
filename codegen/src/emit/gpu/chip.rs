//! What each chip has: the numbers that tiles are chosen by, and the operators it can run.

/// A GPU that code is made for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GpuChip {
    /// Compute capability 8.0 and every later one.
    Sm80,
    /// Compute capability 9.0 and no other: warpgroup products and tensor copies.
    Sm90a,
}

/// Numbers of a chip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    /// Multiprocessors of the usual board.
    pub(crate) multiprocessors: u32,
    /// Shared memory of a block, and of a multiprocessor, bytes.
    pub(crate) shared_block: u32,
    pub(crate) shared_sm: u32,
    /// Bytes that a multiprocessor gets from the second-level cache in a cycle, all of them reading.
    pub(crate) cache_bytes_per_cycle: u32,
    /// Products of warpgroups, tensor copies, barriers that count bytes.
    pub(crate) warpgroups: bool,
}

impl GpuChip {
    /// Every chip.
    pub const ALL: [GpuChip; 2] = [GpuChip::Sm80, GpuChip::Sm90a];

    /// The name that `ptxas` knows.
    pub fn name(self) -> &'static str {
        match self {
            GpuChip::Sm80 => "sm_80",
            GpuChip::Sm90a => "sm_90a",
        }
    }

    /// The chip of that name.
    pub fn from_name(name: &str) -> Option<GpuChip> {
        GpuChip::ALL.into_iter().find(|c| c.name() == name)
    }

    /// Its numbers: those of an A100 and an H100 or H200 (NVIDIA's tuning guides for Ampere and Hopper).
    pub(crate) fn limits(self) -> Limits {
        match self {
            GpuChip::Sm80 => Limits {
                multiprocessors: 108,
                shared_block: 166_912,
                shared_sm: 167_936,
                cache_bytes_per_cycle: 40,
                warpgroups: false,
            },
            GpuChip::Sm90a => Limits {
                multiprocessors: 132,
                shared_block: 232_448,
                shared_sm: 233_472,
                cache_bytes_per_cycle: 36,
                warpgroups: true,
            },
        }
    }
}

/// Operators of the texts, by the beginning of their name, with the first chip that has them. What is not here is refused.
const OPERATORS: &[(&str, GpuChip)] = &[
    ("nvvm.read.ptx.sreg.", GpuChip::Sm80),
    ("nvvm.barrier", GpuChip::Sm80),
    ("nvvm.bar.warp.sync", GpuChip::Sm80),
    ("nvvm.shfl.sync", GpuChip::Sm80),
    ("nvvm.vote.sync", GpuChip::Sm80),
    ("nvvm.cp.async.shared.global", GpuChip::Sm80),
    ("nvvm.cp.async.commit.group", GpuChip::Sm80),
    ("nvvm.cp.async.wait.group", GpuChip::Sm80),
    ("nvvm.ldmatrix", GpuChip::Sm80),
    ("nvvm.mma.sync", GpuChip::Sm80),
    ("nvvm.rcp.approx", GpuChip::Sm80),
    ("nvvm.convert.", GpuChip::Sm80),
    ("nvvm.elect.sync", GpuChip::Sm90a),
    ("nvvm.mbarrier.", GpuChip::Sm90a),
    ("nvvm.fence.", GpuChip::Sm90a),
    ("nvvm.prefetch", GpuChip::Sm90a),
    ("nvvm.cp.async.bulk.", GpuChip::Sm90a),
    ("nvvm.wgmma.", GpuChip::Sm90a),
    ("nvvm.setmaxregister", GpuChip::Sm90a),
    ("nvvm.stmatrix", GpuChip::Sm90a),
];

/// Attributes and types of the nvvm dialect, which stand behind `#` or in lists of attributes.
const ATTRIBUTES: &[&str] =
    &["nvvm.kernel", "nvvm.maxntid", "nvvm.minctasm", "nvvm.grid_constant", "nvvm.reqntid", "nvvm.maxnreg"];

/// The first operator of a text that a chip lacks: LLVM would abort.
pub(crate) fn lacking(text: &str, chip: GpuChip) -> Option<String> {
    let mut rest = text;
    while let Some(i) = rest.find("nvvm.") {
        let before = rest[..i].chars().next_back();
        let name: String =
            rest[i..].chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_')).collect();
        rest = &rest[i + 5..];
        // `#nvvm.shape` is an attribute, `llvm.nvvm.ex2…` an intrinsic of every chip.
        if matches!(before, Some('#' | '.')) || ATTRIBUTES.contains(&name.as_str()) {
            continue;
        }
        let found = OPERATORS.iter().find(|(n, _)| name.starts_with(n));
        if found.is_none_or(|(_, first)| *first > chip) {
            return Some(name);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_are_looked_up() {
        let text = "%1 = nvvm.elect.sync -> i1\n nvvm.barrier0\n #nvvm.shape<m = 8> llvm.nvvm.ex2";
        assert_eq!(lacking(text, GpuChip::Sm90a), None);
        assert_eq!(lacking(text, GpuChip::Sm80).as_deref(), Some("nvvm.elect.sync"));
        assert_eq!(lacking("nvvm.frob.x 1", GpuChip::Sm90a).as_deref(), Some("nvvm.frob.x"));
    }
}
