//! Random numbers, the same in every run.

use kasmina::Element;

/// Standard normal numbers, the same in every run: a pool that is gone around.
pub(crate) struct Normals {
    pool: Vec<f32>,
    next: usize,
}

impl Normals {
    /// A prime, so that no row length divides it and rows do not repeat each other.
    const POOL: usize = 4_194_301;

    pub(crate) fn new() -> Self {
        let mut random = SplitMix(0x006b_6173_6d69_6e61);
        let mut pool = Vec::with_capacity(Self::POOL + 1);
        while pool.len() < Self::POOL {
            let radius = (-2.0 * random.uniform().ln()).sqrt();
            let (sine, cosine) = (std::f32::consts::TAU * random.uniform()).sin_cos();
            pool.extend([radius * sine, radius * cosine]);
        }
        pool.truncate(Self::POOL);
        Self { pool, next: 0 }
    }

    /// `count` numbers with standard deviation `scale`, rounded to `T`.
    pub(crate) fn take<T: Element>(&mut self, count: usize, scale: f32) -> Vec<T> {
        let start = self.next;
        self.next = (start + count) % Self::POOL;
        let numbers = self.pool.iter().cycle().skip(start).take(count);
        numbers.map(|number| T::from_f32(number * scale)).collect()
    }
}

/// SplitMix64, from a seed.
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in 0 < u ≤ 1.
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) + 1) as f32 / (1 << 24) as f32
    }
}
