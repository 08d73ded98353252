//! Forward and dgrad with one haloed tile of the input for all taps.
//!
//! Shared memory holds positions `first ..= last + reach` of a tile and 64 channels as rows of 128
//! bytes, swizzled. A tap's operand begins a few rows further on: the swizzle follows the address,
//! so a descriptor may start on any row (confirmed on an H200; its base offset stays 0).
//!
//! A channels-last input arrives so by TMA. A channels-first one cannot start on any position, as
//! TMA wants the contiguous coordinate in multiples of 16 bytes (confirmed: anything else is an
//! illegal instruction); it arrives from the multiple of 8 before, in slabs of 64 channels × 64
//! positions, and three warps transpose these once for all taps.
//!
//! ```text
//! producer   one thread: TMA of the haloed input, then of the filter's taps
//! warps 1–3  channels first: slabs ─ ldmatrix.trans ─ stmatrix ─ haloed tile, two in turn
//! consumers  for every tap: wgmma from the shifted tile and the tap's matrix
//! ```

use super::{GatherKernel, GatherParams};
use crate::abi::{DType, Kernel, Module, module};
use crate::conv1d::SequenceLayout;
use crate::gemm::hopper::Tile;
use crate::pipeline::RingBarriers;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Haloed tiles that are filled in turn.
const BUFFERS: u32 = 2;
/// The barriers of the haloed tiles, and those of the slabs from which they are transposed.
const BARRIER_BYTES: u32 = RingBarriers::bytes(BUFFERS) + RingBarriers::bytes(1);

/// Positions beyond those of a tile, where the stages of a `Tile` leave room for them.
const fn halo(input: SequenceLayout, output: SequenceLayout) -> u32 {
    match (input, output) {
        (SequenceLayout::Ncl, SequenceLayout::Nlc) => 32,
        _ => 64,
    }
}

/// Positions and channels of a tile.
const fn extents(output: SequenceLayout, tile: Tile) -> [u32; 2] {
    match output {
        SequenceLayout::Nlc => [tile.block_m, tile.block_n],
        SequenceLayout::Ncl => [tile.block_n, tile.block_m],
    }
}

/// Whether the haloed tiles, and the slabs of one, fit where the stages of the input would be.
const fn fits(input: SequenceLayout, output: SequenceLayout, tile: Tile) -> bool {
    let [positions, _] = extents(output, tile);
    let rows = positions + halo(input, output);
    let slabs = match input {
        SequenceLayout::Nlc => 0,
        SequenceLayout::Ncl => rows.next_multiple_of(64),
    };
    let loaded = match input {
        SequenceLayout::Nlc => rows.next_multiple_of(64),
        SequenceLayout::Ncl => rows,
    };
    BUFFERS * loaded + slabs <= tile.num_stages * positions && rows.is_multiple_of(8)
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $input:ident to $output:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages,
        $blocks:literal per multiprocessor;)+) => {
        /// Every kernel with a halo, for each element type and pair of layouts from the largest
        /// tile to the smallest.
        pub static KERNELS: [GatherKernel; [$(stringify!($entry)),+].len()] = [$({
            static MODULE: Module = module!(Hopper, "hopper", stringify!($entry), [stringify!($entry)]);
            let tile = Tile { block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: 1 };
            let (input, output) = (SequenceLayout::$input, SequenceLayout::$output);
            assert!(fits(input, output, tile));
            GatherKernel {
                dtype: DType::$element,
                input,
                output,
                tile,
                blocks_per_multiprocessor: $blocks,
                halo: halo(input, output),
                kernel: Kernel::new(
                    &MODULE, stringify!($entry), tile.block_dim(),
                    tile.smem_bytes() + BARRIER_BYTES,
                )
                .waiting_for_predecessors(),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $input, $output, $block_m, $block_n, $num_stages,
                $blocks
            );
        )+
    };
}

kernels! {
    conv1d_halo_bf16_ncl_ncl_128x256x64: BF16 "bf16", Ncl to Ncl, 128 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_bf16_ncl_ncl_64x256x64: BF16 "bf16", Ncl to Ncl, 64 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_bf16_ncl_nlc_128x256x64: BF16 "bf16", Ncl to Nlc, 128 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_bf16_ncl_nlc_128x128x64: BF16 "bf16", Ncl to Nlc, 128 x 128, 4 stages, 1 per multiprocessor;
    conv1d_halo_bf16_nlc_nlc_128x64x64: BF16 "bf16", Nlc to Nlc, 128 x 64, 4 stages, 2 per multiprocessor;
    conv1d_halo_f16_ncl_ncl_128x256x64: F16 "f16", Ncl to Ncl, 128 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_f16_ncl_ncl_64x256x64: F16 "f16", Ncl to Ncl, 64 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_f16_ncl_nlc_128x256x64: F16 "f16", Ncl to Nlc, 128 x 256, 4 stages, 1 per multiprocessor;
    conv1d_halo_f16_ncl_nlc_128x128x64: F16 "f16", Ncl to Nlc, 128 x 128, 4 stages, 1 per multiprocessor;
    conv1d_halo_f16_nlc_nlc_128x64x64: F16 "f16", Nlc to Nlc, 128 x 64, 4 stages, 2 per multiprocessor;
}
