//! Device side of the kernels whose consumers take turns.

use super::*;
use crate::gemm::hopper::device::Block;
use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
use crate::ptx;

/// Bytes of the rows of X that one product of 64 rows reads of a stage.
pub(super) const HALF_BYTES: u32 = CONSUMER_M * BLOCK_K * 2;

/// Warps of a consumer.
const WARPS: u32 = WARPGROUP / 32;

/// A consumer's side of the turns.
#[derive(Clone, Copy)]
pub(super) struct Turns {
    own: u32,
    other: u32,
    /// Of the consumer's next turn.
    parity: u32,
}

impl Turns {
    /// Starts the block with the barriers of its turns.
    ///
    /// # Safety
    /// As `Block::start`, with `tile.ping_pong_smem_bytes()`.
    #[inline(always)]
    pub(super) unsafe fn start(tile: Tile) -> Block {
        if ptx::thread_index() == 0 {
            let barriers = ptx::dynamic_smem() + tile.turn_offset();
            // SAFETY: one thread, before the block's barrier in `start_with`, inside its memory.
            unsafe {
                ptx::mbarrier_init(barriers, WARPS);
                ptx::mbarrier_init(barriers + 8, WARPS);
            }
        }
        // SAFETY: the caller's contract; one consumer alone releases a stage. The fence behind the
        // ring's barriers covers these.
        unsafe { Block::start_with(tile, 1, 1) }
    }

    /// Of consumer 0 or 1. The first turn is 0's: to it the phase before the first is complete.
    #[inline(always)]
    pub(super) fn new(tile: Tile, consumer: u32) -> Self {
        let barriers = ptx::dynamic_smem() + tile.turn_offset();
        Self {
            own: barriers + 8 * consumer,
            other: barriers + 8 * (1 - consumer),
            parity: 1 - consumer,
        }
    }

    /// Waits for the turn.
    #[inline(always)]
    pub(super) fn wait(&mut self) {
        // SAFETY: a barrier that `start` has initialised.
        while !unsafe { ptx::mbarrier_try_wait_parity(self.own, self.parity) } {}
        self.parity ^= 1;
    }

    /// Hands the turn over, once every warp has. A warp that lags behind the others has then seen
    /// the turn, and the stages of its tile.
    ///
    /// # Safety
    /// Every warp of the consumer calls it, once in its turn.
    #[inline(always)]
    pub(super) unsafe fn hand_over(self) {
        if ptx::thread_index() % 32 == 0 {
            // SAFETY: a barrier that `start` has initialised.
            unsafe { ptx::mbarrier_arrive(self.other) };
        }
    }
}

/// Defines the entry for one element type and major order of W.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $w_major:ident, $num_stages:literal) => {
        $crate::ptx::wgmma::with_accumulators! { 256, device::entry! {
            @body $entry, $element, $ptx_type, $w_major, $num_stages
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $w_major:ident, $num_stages:literal
     $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: crate::gemm::hopper::HopperGemmParams) {
            use crate::gemm::hopper::device::*;
            use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile::new(128, 128, $num_stages);
            const X_MAJOR: Major = Major::K;
            const W_MAJOR: Major = Major::$w_major;
            let x_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) x_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (w_map, y_map) = (x_map + 128, x_map + 256);
            let (tiles, k_blocks) = (params.tiles, params.k_blocks);
            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = Turns::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    if ptx::thread_index() == 0 {
                        let operands =
                            Matrices { x_map, w_map, x_major: X_MAJOR, w_major: W_MAJOR };
                        let stage_bytes = params.stage_bytes;
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                // SAFETY: whole consumer warpgroups; the producer frees what they take.
                unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                let consumer = warpgroup - 1;
                let epilogue = Epilogue::new(
                    block, consumer, y_map, params.bias, params.n, params.activation,
                )
                .storing(params.plain)
                .of_whole_tiles();
                let elected = block.releases();
                wait_for_predecessors();
                let mut turns = Turns::new(TILE, consumer);
                let mut position = RingPosition::START.after(consumer * k_blocks, TILE.num_stages);
                let mut tile = block.first_tile() + consumer * block.tile_step();
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    let (m, n) = block.corner(tiles, tile);
                    let bias = epilogue.load_bias(n);
                    turns.wait();
                    let mut previous = position.stage;
                    let mut k_block = 0u32;
                    while k_block < k_blocks {
                        let stage = position.stage;
                        let a = wgmma_descriptor(block.x_stage(stage), X_MAJOR);
                        let b = wgmma_descriptor(block.w_stage(stage), W_MAJOR);
                        // SAFETY: the stage has landed; the whole warpgroup executes it. The batch
                        // before is complete after it: its stage may be overwritten.
                        unsafe {
                            block.ring.wait_full(position);
                            ptx::wgmma::wgmma_two_k64!(
                                $ptx_type,
                                (X_MAJOR as u32), (W_MAJOR as u32),
                                (descriptor_step_k16(X_MAJOR)), (descriptor_step_k16(W_MAJOR)),
                                (HALF_BYTES / 16), a, b, k_block, $($($c)+)+
                            );
                            if elected && k_block > 0 {
                                block.release(previous);
                            }
                        }
                        previous = stage;
                        position = position.next(TILE.num_stages);
                        k_block += 1;
                    }
                    // SAFETY: the whole warpgroup; the last batch's stage is released after it.
                    unsafe {
                        turns.hand_over();
                        ptx::wgmma::wgmma_wait_all!(256, $($($c)+)+);
                        if elected {
                            block.release(previous);
                        }
                    }
                    position = position.after(k_blocks, TILE.num_stages);
                    tile += 2 * block.tile_step();
                    epilogue.publish_bias::<$element>(bias);
                    let mut group = 0;
                    $(
                        // The first eight groups are the columns of the upper rows.
                        let (half, column_group) = (group / 8, group % 8);
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                epilogue.begin_slab();
                            }
                            epilogue.columns::<$element>(column_group, [$($c),+]);
                            if group % 4 == 3 {
                                let m = m + half * CONSUMER_M;
                                epilogue.end_slab::<$element>(column_group / 4, m, n);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
