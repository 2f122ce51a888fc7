//! What host code is compiled for.

use crate::emit::HostIsa;

/// A class of processors. Code is compiled for the class, not for the one at hand, so the same input gives the same
/// bytes on every machine of the class.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostTarget {
    /// LLVM's processor name.
    pub cpu: String,
    /// LLVM's feature string, such as `+avx512f,-sse4a`.
    pub features: String,
    /// Vectors that kernels are written with.
    pub isa: HostIsa,
    /// avx512_bf16: products of pairs of bf16 and rounding to bf16 are instructions.
    pub bf16: bool,
}

impl HostTarget {
    /// x86-64-v4: AVX-512 F, BW, CD, DQ, VL. Vectors of 512 bits are used throughout.
    pub fn avx512() -> HostTarget {
        HostTarget { cpu: "x86-64-v4".into(), features: "-prefer-256-bit".into(), isa: HostIsa::Avx512, bf16: false }
    }

    /// x86-64-v4 with avx512_bf16.
    pub fn avx512_bf16() -> HostTarget {
        HostTarget { features: "-prefer-256-bit,+avx512bf16".into(), bf16: true, ..HostTarget::avx512() }
    }

    /// x86-64-v3: AVX2 and FMA.
    pub fn avx2() -> HostTarget {
        HostTarget { cpu: "x86-64-v3".into(), features: String::new(), isa: HostIsa::Avx2, bf16: false }
    }

    /// The best class that this machine belongs to; `None` below x86-64-v3.
    pub fn detect() -> Option<HostTarget> {
        #[cfg(target_arch = "x86_64")]
        {
            let v3 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("movbe");
            let v4 = v3
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if v4 && is_x86_feature_detected!("avx512bf16") {
                return Some(HostTarget::avx512_bf16());
            }
            if v4 {
                return Some(HostTarget::avx512());
            }
            if v3 {
                return Some(HostTarget::avx2());
            }
        }
        None
    }

    /// This class and those below it, best first: what a machine of this class runs.
    pub fn and_below(&self) -> Vec<HostTarget> {
        let all = [HostTarget::avx512_bf16(), HostTarget::avx512(), HostTarget::avx2()];
        all.into_iter().skip_while(|t| t != self).collect()
    }

    /// The class of that name: `avx512-bf16`, `avx512`, `avx2`, or `native`.
    pub fn from_name(name: &str) -> Option<HostTarget> {
        match name {
            "avx512-bf16" => Some(HostTarget::avx512_bf16()),
            "avx512" => Some(HostTarget::avx512()),
            "avx2" => Some(HostTarget::avx2()),
            "native" => HostTarget::detect(),
            _ => None,
        }
    }

    /// Processor features that the code needs, as Rust's `is_x86_feature_detected` names them.
    pub fn required_features(&self) -> Vec<&'static str> {
        let mut v = vec!["avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe"];
        if self.isa == HostIsa::Avx512 {
            v.extend(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]);
        }
        if self.bf16 {
            v.insert(v.len() - 4, "avx512bf16");
        }
        v
    }
}
