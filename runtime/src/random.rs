//! Random numbers that are a function of a key and a counter: independent of order, threads and device.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

/// A keyed generator without state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox([u32; 2]);

impl Philox {
    /// The generator with this key.
    pub fn new(seed: u64) -> Philox {
        Philox([seed as u32, (seed >> 32) as u32])
    }

    /// Four random words for a counter.
    pub fn at(self, counter: [u32; 4]) -> [u32; 4] {
        let mul = |a: u32, b: u32| {
            let p = u64::from(a) * u64::from(b);
            ((p >> 32) as u32, p as u32)
        };
        let (mut c, mut k) = (counter, self.0);
        for round in 0..10 {
            if round > 0 {
                k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
            }
            let ((h0, l0), (h1, l1)) = (mul(0xD251_1F53, c[0]), mul(0xCD9E_8D57, c[2]));
            c = [h1 ^ c[1] ^ k[0], l1, h0 ^ c[3] ^ k[1], l0];
        }
        c
    }

    /// A number in `[0, 1)` with 53 random bits, for a stream (a sequence) and a step in it.
    pub fn uniform(self, stream: u64, step: u64) -> f64 {
        let w = self.at([step as u32, (step >> 32) as u32, stream as u32, (stream >> 32) as u32]);
        let bits = (u64::from(w[0]) << 32 | u64::from(w[1])) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_published_answers() {
        // The known answers published with the paper's library.
        assert_eq!(Philox::new(0).at([0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(Philox::new(u64::MAX).at([u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let key = 0x299f_31d0_a409_3822;
        let counter = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(Philox::new(key).at(counter), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn is_uniform_and_depends_on_everything() {
        let p = Philox::new(7);
        let mean = (0..10_000).map(|i| p.uniform(3, i)).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert!((0..1000).all(|i| (0.0..1.0).contains(&p.uniform(i, 0))));
        assert_ne!(p.uniform(0, 1), p.uniform(1, 0));
        assert_ne!(p.uniform(0, 1), Philox::new(8).uniform(0, 1));
    }
}
