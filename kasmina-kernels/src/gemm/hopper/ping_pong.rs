//! Forward kernels whose consumers take turns: each computes a whole tile, and stores it while the
//! other multiplies. Where k is short, storing takes as long as multiplying.
//!
//! ```text
//! producer    loads tile 0 ─ loads tile 1 ─ loads tile 2 ─ …       through one ring
//! consumer 0  k … k ┬ store tile 0 ─┐           k … k ┬ store tile 2
//! consumer 1        └ its turn ─ k … k ┬ store tile 1 └ …
//! ```
//! A consumer of 128 threads holds a tile of 128×128 in 128 registers a thread, as two products of
//! 64 rows. It hands the turn over once its last batch is issued, so that the tensor cores have work
//! queued. Turns also keep the ring's parity unambiguous: a consumer looks at a stage only when all
//! that the other's tile took have landed, which is less than a lap ahead.
//!
//! # Shape contract
//! - As `hopper.rs`.

use super::{BLOCK_K, HopperKernel, Problem, Tile};
use crate::abi::{DType, hopper_kernel};
use crate::gemm::WeightLayout;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Bytes of the barriers that hand the turn over, one for each consumer.
const TURN_BYTES: u32 = 16;

impl Tile {
    /// Where the barriers of the turns lie.
    const fn turn_offset(self) -> u32 {
        self.smem_bytes()
    }

    const fn ping_pong_smem_bytes(self) -> u32 {
        self.turn_offset() + TURN_BYTES
    }

    /// Estimated cycles of the busiest multiprocessor where consumers take turns: as `cost`, but
    /// only the last tile's epilogue takes time of its own, that of four steps since one consumer
    /// stores all of it, unless two tiles have fewer steps together than one has with its epilogue.
    pub(super) const fn cost_in_turns(self, problem: Problem, multiprocessors: u32) -> u64 {
        let (waves, step) = self.waves_and_step(problem, multiprocessors);
        let steps = problem.k.div_ceil(BLOCK_K) as u64;
        let alone = (steps + 4).div_ceil(2);
        (waves * if steps > alone { steps } else { alone } + 4) * step as u64
    }
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $layout:ident $w_major:ident,
        $num_stages:literal stages;)+) => {
        /// Every kernel whose consumers take turns.
        pub static KERNELS: [HopperKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new(128, 128, $num_stages);
            HopperKernel {
                dtype: DType::$element,
                layout: WeightLayout::$layout,
                tile,
                ping_pong: true,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.ping_pong_smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $element, $ptx_type, $w_major, $num_stages);
        )+
    };
}

kernels! {
    gemm_bf16_kn_128x128x64_pp: BF16 "bf16", InOut MN, 6 stages;
    gemm_bf16_nk_128x128x64_pp: BF16 "bf16", OutIn K, 6 stages;
    gemm_f16_kn_128x128x64_pp: F16 "f16", InOut MN, 6 stages;
    gemm_f16_nk_128x128x64_pp: F16 "f16", OutIn K, 6 stages;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::RingPosition;

    #[test]
    fn barriers_of_the_turns_follow_those_of_the_ring() {
        for row in &KERNELS {
            assert!(row.tile.turn_offset().is_multiple_of(8));
            assert_eq!(row.kernel.smem_bytes, row.tile.turn_offset() + TURN_BYTES);
        }
    }

    #[test]
    fn consumers_that_skip_each_others_tiles_visit_every_stage_once_and_in_order() {
        const STAGES: u32 = 6;
        for k_steps in [1, 2, 4, 5, 6, 7, 12, 13, 64] {
            let mut positions = [0, 1].map(|c| RingPosition::START.after(c * k_steps, STAGES));
            let mut producer = RingPosition::START;
            for tile in 0..20 {
                let position = &mut positions[tile % 2];
                for _ in 0..k_steps {
                    assert_eq!(*position, producer);
                    (*position, producer) = (position.next(STAGES), producer.next(STAGES));
                }
                *position = position.after(k_steps, STAGES);
            }
        }
    }
}
