//! Philox4x32-10 counter-based random numbers (Salmon et al., SC'11): a pure function of (seed, site, step, index),
//! so the CPU, WGSL and CUDA kernels draw the same bits and a resumed run has no generator state to restore.

/// The four words of one Philox4x32-10 block.
#[inline]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        let (n0, n2) = ((p1 >> 32) as u32 ^ c1 ^ k0, (p0 >> 32) as u32 ^ c3 ^ k1);
        (c0, c1, c2, c3) = (n0, p1 as u32, n2, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Where a stream of numbers is drawn: `seed` of the run, `site` (which dropout, which initialiser), `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    pub seed: u64,
    pub site: u32,
    pub step: u32,
}

impl Site {
    /// Word `index` of the stream. Element i of a tensor takes word i & 3 of block i >> 2.
    #[inline]
    pub fn word(&self, index: u32) -> u32 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        philox([index >> 2, 0, self.site, self.step], key)[(index & 3) as usize]
    }

    /// Uniform in [0, 1) with 24 random bits: exact in f32, equal on every device.
    #[inline]
    pub fn uniform(&self, index: u32) -> f32 {
        (self.word(index) >> 8) as f32 * (1.0 / 16_777_216.0)
    }
}

/// Sequential host-side draws for initialisers, shuffles and test inputs.
#[derive(Clone, Debug)]
pub struct Stream {
    site: Site,
    next: u32,
}

impl Stream {
    pub fn new(seed: u64, site: u32) -> Self {
        Self { site: Site { seed, site, step: 0 }, next: 0 }
    }

    pub fn word(&mut self) -> u32 {
        let w = self.site.word(self.next);
        self.next = self.next.wrapping_add(1);
        if self.next == 0 {
            self.site.step = self.site.step.wrapping_add(1);
        }
        w
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        let (hi, lo) = (u64::from(self.word()), u64::from(self.word()));
        (((hi << 32) | lo) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller (1958).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Uniform integer in 0..n; 0 when n is 0. The bias of the multiply-shift is below n / 2^32.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// Fisher-Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32-10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normal_has_unit_moments() {
        let mut s = Stream::new(7, 0);
        let draws: Vec<f64> = (0..20_000).map(|_| s.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
    }
}
