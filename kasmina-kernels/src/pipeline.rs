//! The full/empty ring between the producer and the consumers of a warp-specialised kernel.
//!
//! ```text
//! producer   wait empty[s] ─ expect bytes on full[s] ─ TMA into stage s ─ next s
//! consumers  wait full[s]  ─ wgmma from stage s      ─ arrive empty[s]  ─ next s
//! ```
//! Each barrier completes one phase per lap of the ring. A consumer waits for the parity of its
//! lap, the producer for the opposite one: on the first lap that phase counts as completed, so the
//! empty ring needs no initial arrivals.

/// Where one side stands in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPosition {
    /// The stage, below the number of stages.
    pub stage: u32,
    /// Parity of the lap.
    pub parity: u32,
}

impl RingPosition {
    /// The first stage of the first lap.
    pub const START: Self = Self { stage: 0, parity: 0 };

    /// The stage after this one in a ring of `num_stages`.
    #[must_use]
    #[inline(always)]
    pub const fn next(self, num_stages: u32) -> Self {
        if self.stage + 1 == num_stages {
            Self { stage: 0, parity: self.parity ^ 1 }
        } else {
            Self { stage: self.stage + 1, parity: self.parity }
        }
    }

    /// So many stages further on.
    #[must_use]
    #[inline(always)]
    pub const fn after(self, stages: u32, num_stages: u32) -> Self {
        let stage = self.stage.wrapping_add(stages);
        // Not `/`, which would leave a panic function in the module.
        let laps = match stage.checked_div(num_stages) {
            Some(laps) => laps,
            None => 0,
        };
        let stage = stage.wrapping_sub(laps.wrapping_mul(num_stages));
        Self { stage, parity: self.parity ^ (laps & 1) }
    }
}

/// The barriers of a ring: `full[0..num_stages]`, then `empty[0..num_stages]`, 8 bytes each.
#[derive(Clone, Copy, Debug)]
pub struct RingBarriers {
    /// Shared-memory address of the first barrier.
    pub base: u32,
    /// Stages of the ring.
    pub num_stages: u32,
}

impl RingBarriers {
    /// Bytes the barriers of a ring take.
    #[must_use]
    pub const fn bytes(num_stages: u32) -> u32 {
        16 * num_stages
    }

    /// Address of the barrier that completes when the stage's bytes have landed.
    #[must_use]
    #[inline(always)]
    pub const fn full(self, stage: u32) -> u32 {
        self.base + 8 * stage
    }

    /// Address of the barrier that completes when every consumer has released the stage.
    #[must_use]
    #[inline(always)]
    pub const fn empty(self, stage: u32) -> u32 {
        self.base + 8 * self.num_stages + 8 * stage
    }
}

#[cfg(target_arch = "nvptx64")]
mod device {
    use super::{RingBarriers, RingPosition};
    use crate::ptx;

    impl RingBarriers {
        /// Initialises every barrier: `producers` arrivals to fill a stage, besides the bytes it
        /// expects, and `consumers` to release it.
        ///
        /// # Safety
        /// One thread of the block calls it, and a block barrier follows before any other use;
        /// `base` is 8-aligned and `bytes` long inside the block's shared memory.
        #[inline(always)]
        pub unsafe fn init(self, producers: u32, consumers: u32) {
            let mut stage = 0;
            while stage < self.num_stages {
                // SAFETY: inside the ring, before first use, by the caller's contract.
                unsafe {
                    ptx::mbarrier_init(self.full(stage), producers);
                    ptx::mbarrier_init(self.empty(stage), consumers);
                }
                stage += 1;
            }
            ptx::fence_mbarrier_init();
        }

        /// Waits until the stage's bytes have landed.
        ///
        /// # Safety
        /// The barriers are initialised; `position` is a consumer's.
        #[inline(always)]
        pub unsafe fn wait_full(self, position: RingPosition) {
            // SAFETY: an initialised barrier, by the caller's contract.
            while !unsafe {
                ptx::mbarrier_try_wait_parity(self.full(position.stage), position.parity)
            } {}
        }

        /// Waits until the consumers have released the stage; at once on the first lap.
        ///
        /// # Safety
        /// The barriers are initialised; `position` is the producer's.
        #[inline(always)]
        pub unsafe fn wait_empty(self, position: RingPosition) {
            // SAFETY: an initialised barrier, by the caller's contract.
            while !unsafe {
                ptx::mbarrier_try_wait_parity(self.empty(position.stage), position.parity ^ 1)
            } {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_visits_the_stages_in_order_and_flips_parity_on_each_lap() {
        let mut position = RingPosition::START;
        for step in 0..40 {
            assert_eq!(position, RingPosition { stage: step % 4, parity: step / 4 % 2 });
            position = position.next(4);
            assert_eq!(position, RingPosition::START.after(step + 1, 4));
        }
    }

    #[test]
    fn barriers_do_not_overlap_and_fill_the_space_they_claim() {
        let ring = RingBarriers { base: 64, num_stages: 5 };
        let mut addresses: std::vec::Vec<_> =
            (0..5).flat_map(|stage| [ring.full(stage), ring.empty(stage)]).collect();
        addresses.sort_unstable();
        let expected: std::vec::Vec<_> = (0..10).map(|barrier| 64 + 8 * barrier).collect();
        assert_eq!(addresses, expected);
        assert_eq!(RingBarriers::bytes(5), 80);
    }

    /// Producer and two consumers take turns at random; each barrier follows the hardware's rule.
    #[test]
    fn ring_never_overwrites_a_stage_that_is_being_read() {
        const STAGES: u32 = 3;
        #[derive(Clone, Copy)]
        struct Barrier {
            phase: u32,
            pending: u32,
            count: u32,
        }
        impl Barrier {
            fn arrive(&mut self) {
                self.pending -= 1;
                if self.pending == 0 {
                    self.phase ^= 1;
                    self.pending = self.count;
                }
            }
            /// True if the phase of `parity` has completed: the current one has the other parity.
            fn completed(&self, parity: u32) -> bool {
                self.phase != parity
            }
        }
        let mut full = [Barrier { phase: 0, pending: 1, count: 1 }; STAGES as usize];
        let mut empty = [Barrier { phase: 0, pending: 2, count: 2 }; STAGES as usize];
        let mut contents = [u32::MAX; STAGES as usize];
        let mut producer = (RingPosition::START, 0u32);
        let mut consumers = [(RingPosition::START, 0u32); 2];
        let mut random = 12345u32;
        while consumers.iter().any(|&(_, item)| item < 1000) {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match (random >> 16) % 3 {
                0 => {
                    let (position, item) = producer;
                    let stage = position.stage as usize;
                    if item < 1000 && empty[stage].completed(position.parity ^ 1) {
                        contents[stage] = item;
                        full[stage].arrive();
                        producer = (position.next(STAGES), item + 1);
                    }
                }
                consumer => {
                    let (position, item) = consumers[consumer as usize - 1];
                    let stage = position.stage as usize;
                    if item < 1000 && full[stage].completed(position.parity) {
                        assert_eq!(contents[stage], item);
                        empty[stage].arrive();
                        consumers[consumer as usize - 1] = (position.next(STAGES), item + 1);
                    }
                }
            }
        }
    }
}
