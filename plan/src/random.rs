//! Random numbers that are a function of a key and a counter: independent of order, threads and device.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and MT19937 of
//! Matsumoto and Nishimura, "Mersenne Twister" (1998), for tensors that adapter files name by a seed alone.

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

/// `n` numbers in `−bound..bound` for a tensor, keyed by a seed and the tensor's name.
pub fn uniform(seed: u64, name: &str, n: usize, bound: f32) -> Vec<f32> {
    let name = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let random = Philox::new(seed);
    (0..n as u64).map(|i| ((random.uniform(name, i) * 2.0 - 1.0) * f64::from(bound)) as f32).collect()
}

/// MT19937 as PyTorch's generator of the processor seeds and reads it.
#[derive(Clone, Debug)]
pub struct Twister {
    state: [u32; 624],
    at: usize,
}

impl Twister {
    /// The generator with this seed, of which the low 32 bits count.
    pub fn new(seed: u64) -> Twister {
        let mut state = [0; 624];
        state[0] = seed as u32;
        for i in 1..624 {
            let before: u32 = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ before >> 30).wrapping_add(i as u32);
        }
        Twister { state, at: 624 }
    }

    /// The next 32 bits.
    pub fn word(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % 624] & 0x7fff_ffff;
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ y >> 1 ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    /// `n` numbers in `−bound..bound`: PyTorch's `uniform_(-bound, bound)` on an f32 tensor, after `skip` earlier numbers.
    pub fn uniform(mut self, skip: u64, n: usize, bound: f32) -> Vec<f32> {
        (0..skip).for_each(|_| {
            self.word();
        });
        let width = f64::from(bound - -bound);
        let one = |t: &mut Twister| f64::from(t.word() & 0x00ff_ffff) / f64::from(1u32 << 24);
        (0..n).map(|_| (one(&mut self) * width - f64::from(bound)) as f32).collect()
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
    fn draws_what_pytorch_draws() {
        // torch.empty(4).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(7))
        let mut first = Twister::new(5489);
        assert_eq!([first.word(), first.word()], [3_499_211_612, 581_869_302]);
        assert_eq!(Twister::new(7).uniform(0, 4, 0.5), [0.034_922_54, -0.301_196_8, 0.159_211_7, 0.156_890_27]);
        assert_eq!(Twister::new(7).uniform(2, 2, 0.5), [0.159_211_7, 0.156_890_27]);
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
