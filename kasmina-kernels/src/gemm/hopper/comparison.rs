//! The Hopper forward kernel without one of its parts, to measure what that part gains.
//!
//! Nothing chooses these kernels unless they are asked for. They are the forward kernels of the
//! same tile, bf16 with W as `[k, n]`, but for one thing:
//!
//! - *pointers*: the producer's four warps copy both operands through pointers, 16 bytes at a time
//!   (`cp.async`), to where TMA would put them.
//! - *unspecialised*: there is no producer. A thread of the first consumer, between two batches of
//!   products, waits for the stage that the batch before has released, and issues its loads.
//!
//! Blocks that persist and multicast need no kernels of their own: in a grid of as many blocks as
//! tiles none persists, and clusters are a property of the forward kernels.
//!
//! # Shape contract
//! As the forward kernels'. Rows of X and W are read in pieces of 16 bytes as far as they exist.

use super::{HopperGemmParams, Tile};
use crate::abi::{Kernel, KernelParams, hopper_kernel};
use crate::names::displayed_by_name;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// What a kernel goes without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    /// TMA loads: operands come through pointers.
    TmaLoads,
    /// Warp specialisation: those that multiply also issue the loads.
    WarpSpecialization,
    /// Blocks that persist: each computes one tile. The forward kernel with another grid.
    PersistentBlocks,
}

impl Without {
    /// Every part.
    pub const ALL: [Self; 3] = [Self::TmaLoads, Self::WarpSpecialization, Self::PersistentBlocks];

    /// What a person calls the part.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TmaLoads => "TMA loads",
            Self::WarpSpecialization => "warp specialisation",
            Self::PersistentBlocks => "blocks that persist",
        }
    }
}

displayed_by_name!(Without);

/// A kernel for comparison: bf16, W as `[k, n]`.
pub struct ComparisonKernel {
    /// What it goes without.
    pub without: Without,
    /// How it cuts the problem up.
    pub tile: Tile,
    /// What to launch.
    pub kernel: Kernel<ComparisonParams>,
}

/// What a kernel for comparison takes: the forward kernel's parameters, and where the operands are.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ComparisonParams {
    /// As the forward kernel's.
    pub forward: HopperGemmParams,
    /// Device address of X, `[m, k]`.
    pub x: u64,
    /// Device address of W, `[k, n]`.
    pub w: u64,
    /// Bytes from a row of X to the next.
    pub x_stride: u64,
    /// Bytes from a row of W to the next.
    pub w_stride: u64,
    /// Rows of X.
    pub m: u32,
    /// Columns of X.
    pub k: u32,
}

// SAFETY: repr(C); the forward kernel's parameters, whose size is a multiple of 8, four u64 and two
// u32: no padding.
unsafe impl KernelParams for ComparisonParams {}
const _: () =
    assert!(size_of::<ComparisonParams>() == size_of::<HopperGemmParams>() + 4 * 8 + 2 * 4);

/// The kernel of a tile that goes without something, if there is one.
#[must_use]
pub fn kernel(without: Without, tile: [u32; 2]) -> Option<&'static ComparisonKernel> {
    KERNELS.iter().find(|row| row.without == without && row.tile.extents() == tile)
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $without:ident $warpgroups:literal,
        $block_m:literal x $block_n:tt, $num_stages:literal stages;)+) => {
        /// Every kernel for comparison.
        pub static KERNELS: [ComparisonKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new($block_m, $block_n, $num_stages);
            ComparisonKernel {
                without: Without::$without,
                tile,
                kernel: hopper_kernel!($entry, 128 * $warpgroups, tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $without, $warpgroups, $block_m, $block_n, $num_stages);
        )+
    };
}

kernels! {
    compare_pointers_128x256x64: TmaLoads 3, 128 x 256, 4 stages;
    compare_pointers_64x64x64: TmaLoads 2, 64 x 64, 8 stages;
    compare_unspecialised_128x256x64: WarpSpecialization 2, 128 x 256, 4 stages;
    compare_unspecialised_64x64x64: WarpSpecialization 1, 64 x 64, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::DType;
    use crate::gemm::WeightLayout;
    use crate::gemm::hopper;

    #[test]
    fn every_kernel_has_the_tile_of_a_forward_kernel_and_its_own_entry() {
        for row in &KERNELS {
            let same = |forward: &&hopper::HopperKernel| {
                (forward.dtype, forward.layout, forward.tile)
                    == (DType::BF16, WeightLayout::InOut, row.tile)
            };
            assert!(hopper::KERNELS.iter().find(same).is_some());
            let name = match row.without {
                Without::TmaLoads => "pointers",
                Without::WarpSpecialization => "unspecialised",
                Without::PersistentBlocks => unreachable!("it has no kernel of its own"),
            };
            let [block_m, block_n] = row.tile.extents();
            assert_eq!(row.kernel.entry, std::format!("compare_{name}_{block_m}x{block_n}x64"));
            let found = kernel(row.without, row.tile.extents()).expect("a kernel");
            assert_eq!(found.kernel.entry, row.kernel.entry);
        }
        assert!(kernel(Without::TmaLoads, [64, 128]).is_none());
    }
}
