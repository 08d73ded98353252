//! Device side of the kernels in TF32.

use super::*;
use crate::gemm::hopper::device::{Operands, Stage};
use crate::ptx;
use crate::smem_layout::Major;

pub(super) use crate::gemm::hopper::device::{
    Block, CONSUMER_REGISTERS, Exchange, F32Epilogue, Output, PRODUCER_REGISTERS,
    TransposedEpilogue, Work, cluster_marker, needs_registers, produce, wait_for_predecessors,
};

/// Two matrices of f32, of which the second, `w`, is K-major.
#[derive(Clone, Copy)]
pub(super) struct Matrices {
    pub(super) x_map: u64,
    pub(super) w_map: u64,
    pub(super) x_major: Major,
}

/// Bytes of a slab of an MN-major operand.
const SLAB_BYTES: u32 = SLAB_N * BLOCK_K * 4;

/// Address in a consumer's two slabs of 32 of an MN-major operand of this thread's first element of
/// the fragment of a k8; the others are at [`fragment`].
#[inline(always)]
pub(super) fn fragment_base(stage: u32) -> u32 {
    let thread = ptx::thread_index() % 128;
    let (warp, row, k) = (thread / 32, thread % 32 / 4, thread % 4);
    stage + warp / 2 * SLAB_BYTES + k * 128 + ((warp % 2 * 64 + row * 4) ^ (k * 16))
}

/// The fragment of the `k8`th eight depths (PTX ISA, "Register Fragments for
/// wgmma.mma_async.m64nNk8"): rows `r` and `r + 8`, then the same four depths on.
///
/// # Safety
/// `base` is [`fragment_base`] of a stage that has landed.
#[inline(always)]
pub(super) unsafe fn fragment(base: u32, k8: u32) -> [f32; 4] {
    let at = base + k8 * 1024;
    // SAFETY: the caller's contract.
    unsafe {
        [
            ptx::ld_shared_f32(at),
            ptx::ld_shared_f32(at ^ 32),
            ptx::ld_shared_f32((at ^ 64) + 512),
            ptx::ld_shared_f32((at ^ 96) + 512),
        ]
    }
}

impl Operands for Matrices {
    #[inline(always)]
    unsafe fn prefetch_maps(self) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.x_map);
            ptx::prefetch_tensormap(self.w_map);
        }
    }

    #[inline(always)]
    unsafe fn prefetch_x(self, tile: Tile, m: u32, k_block: u32) {
        let k = k_block * BLOCK_K;
        // SAFETY: a valid map by the caller's contract.
        unsafe {
            match self.x_major {
                Major::K => ptx::cp_async_bulk_prefetch_tensor_2d(self.x_map, k, m),
                Major::MN => {
                    let mut slab = 0;
                    while slab < tile.block_m / SLAB_N {
                        ptx::cp_async_bulk_prefetch_tensor_2d(self.x_map, m + slab * SLAB_N, k);
                        slab += 1;
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch_w(self, _: Tile, n: u32, k_block: u32) {
        // SAFETY: a valid map by the caller's contract.
        unsafe { ptx::cp_async_bulk_prefetch_tensor_2d(self.w_map, k_block * BLOCK_K, n) };
    }

    #[inline(always)]
    unsafe fn load(self, tile: Tile, stage: Stage, m: u32, n: u32, k_block: u32) {
        let k = k_block * BLOCK_K;
        let Stage { x, w, full } = stage;
        // SAFETY: the maps' boxes are those of `Tf32GemmParams`; a free stage, by the caller's
        // contract.
        unsafe {
            ptx::cp_async_bulk_tensor_2d_load(w, self.w_map, k, n, full);
            match self.x_major {
                Major::K => ptx::cp_async_bulk_tensor_2d_load(x, self.x_map, k, m, full),
                Major::MN => {
                    let mut slab = 0;
                    while slab < tile.block_m / SLAB_N {
                        let (x, m) = (x + slab * SLAB_BYTES, m + slab * SLAB_N);
                        ptx::cp_async_bulk_tensor_2d_load(x, self.x_map, m, k, full);
                        slab += 1;
                    }
                }
            }
        }
    }
}

/// Multiplies the next `$k_steps` stages, at least one, into the accumulators and releases them.
macro_rules! multiply {
    (K, $block_n:tt, $tile:ident, $block:ident, $consumer:ident, $elected:ident, $position:ident,
     $k_steps:ident, $($c:ident)+) => {
        let mut previous = $position.stage;
        let mut k_block = 0u32;
        while k_block < $k_steps {
            let stage = $position.stage;
            let x = $block.x_stage(stage) + $consumer * (64 * 128);
            let a = wgmma_descriptor(x, Major::K);
            let b = wgmma_descriptor($block.w_stage(stage), Major::K);
            // SAFETY: the stage has landed; the whole warpgroup executes it.
            unsafe {
                $block.ring.wait_full($position);
                ptx::wgmma::wgmma_tf32_k32!($block_n, a, b, k_block, $($c)+);
                // The batch before is complete: its stage may be overwritten.
                if $elected && k_block > 0 {
                    $block.release(previous);
                }
            }
            previous = stage;
            $position = $position.next($tile.num_stages);
            k_block += 1;
        }
        // SAFETY: the whole warpgroup; the last batch's stage is released after it.
        unsafe {
            ptx::wgmma::wgmma_wait_all!($block_n, $($c)+);
            if $elected {
                $block.release(previous);
            }
        }
    };
    (MN, $block_n:tt, $tile:ident, $block:ident, $consumer:ident, $elected:ident, $position:ident,
     $k_steps:ident, $($c:ident)+) => {
        let mut previous = $position.stage;
        let mut k_block = 0u32;
        // The fragments of the batch that is issued and of the one before.
        let (mut a0, mut a1, mut a2, mut a3): (f32, f32, f32, f32);
        let (mut a4, mut a5, mut a6, mut a7): (f32, f32, f32, f32);
        let (mut a8, mut a9, mut a10, mut a11): (f32, f32, f32, f32);
        let (mut a12, mut a13, mut a14, mut a15): (f32, f32, f32, f32);
        let [mut d0, mut d1, mut d2, mut d3] = [0.0f32; 4];
        let [mut d4, mut d5, mut d6, mut d7] = [0.0f32; 4];
        let [mut d8, mut d9, mut d10, mut d11] = [0.0f32; 4];
        let [mut d12, mut d13, mut d14, mut d15] = [0.0f32; 4];
        #[allow(unused_assignments, reason = "an instruction that only ties registers to it")]
        loop {
            device::batch! {
                $block_n, $tile, $block, $consumer, $elected, $position, previous, k_block,
                [a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a12 a13 a14 a15]
                [d0 d1 d2 d3 d4 d5 d6 d7 d8 d9 d10 d11 d12 d13 d14 d15] $($c)+
            }
            if k_block == $k_steps {
                break;
            }
            device::batch! {
                $block_n, $tile, $block, $consumer, $elected, $position, previous, k_block,
                [d0 d1 d2 d3 d4 d5 d6 d7 d8 d9 d10 d11 d12 d13 d14 d15]
                [a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a12 a13 a14 a15] $($c)+
            }
            if k_block == $k_steps {
                break;
            }
        }
        // SAFETY: the whole warpgroup; the last batch's stage is released after it.
        unsafe {
            ptx::wgmma::wgmma_wait_all!($block_n, $($c)+);
            if $elected {
                $block.release(previous);
            }
        }
    };
}
pub(super) use multiply;

/// Loads the fragments of a stage and issues its batch; that of the stage before is complete then.
macro_rules! batch {
    ($block_n:tt, $tile:ident, $block:ident, $consumer:ident, $elected:ident, $position:ident,
     $previous:ident, $k_block:ident,
     [$a0:ident $a1:ident $a2:ident $a3:ident $a4:ident $a5:ident $a6:ident $a7:ident
      $a8:ident $a9:ident $a10:ident $a11:ident $a12:ident $a13:ident $a14:ident $a15:ident]
     [$($done:ident)+] $($c:ident)+) => {
        let stage = $position.stage;
        let b = wgmma_descriptor($block.w_stage(stage), Major::K);
        // SAFETY: the stage has landed; the whole warpgroup executes it.
        unsafe {
            $block.ring.wait_full($position);
            let base = fragment_base($block.x_stage(stage) + $consumer * (64 * 128));
            [$a0, $a1, $a2, $a3] = fragment(base, 0);
            [$a4, $a5, $a6, $a7] = fragment(base, 1);
            [$a8, $a9, $a10, $a11] = fragment(base, 2);
            [$a12, $a13, $a14, $a15] = fragment(base, 3);
            ptx::wgmma::wgmma_tf32_registers_k32!(
                $block_n,
                [$a0 $a1 $a2 $a3 $a4 $a5 $a6 $a7 $a8 $a9 $a10 $a11 $a12 $a13 $a14 $a15],
                [$($done)+], b, $k_block, $($c)+
            );
            // The batch before is complete: its stage may be overwritten.
            if $elected && $k_block > 0 {
                $block.release($previous);
            }
        }
        $previous = stage;
        $position = $position.next($tile.num_stages);
        $k_block += 1;
    };
}
pub(super) use batch;

/// Finishes 16 columns of the accumulators. Where the first operand is MN-major it is W and the tile
/// one of Yᵀ.
macro_rules! finish {
    (K, $epilogue:ident, $group:ident, $m:ident, $n:ident, $c:expr) => {
        // SAFETY: the whole warp goes through the columns in order.
        unsafe {
            $epilogue.stage($group, $c);
            if $group % 2 == 1 {
                $epilogue.store($m, $n + $group / 2 * 32, |_, _, sums| sums);
            }
        }
    };
    (MN, $epilogue:ident, $group:ident, $m:ident, $n:ident, $c:expr) => {
        // SAFETY: the whole warp. Rows of the tile are columns of Y.
        unsafe { TransposedEpilogue::new($epilogue).store($n, $m, $group, $c) }
    };
}
pub(super) use finish;

/// Defines the entry for a tile.
macro_rules! entry {
    ($entry:ident, $order:ident, $block_m:literal, $block_n:tt, $num_stages:literal,
     $split_k:tt) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $order, $block_m, $block_n, $num_stages, $split_k
        } }
    };
    (@body $entry:ident, $order:ident, $block_m:literal, $block_n:tt, $num_stages:literal, $split_k:tt
     $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: Tf32GemmParams) {
            use crate::smem_layout::{Major, wgmma_descriptor};
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: $split_k,
                cluster_m: 1,
            };
            let x_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    cluster_marker!($split_k 1),
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) x_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (tiles, k_blocks) = (params.tiles, params.k_blocks);
            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = Block::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / 128))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let stage_bytes = params.stage_bytes;
                        let operands = Matrices { x_map, w_map: x_map + 128, x_major: Major::$order };
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let output = Output {
                    bias: params.bias,
                    y: params.y,
                    y_stride: params.y_stride,
                    m: params.m,
                    n: params.n,
                    activation: params.activation,
                    accumulate: 0,
                };
                let mut epilogue = F32Epilogue::new(block.epilogue(), consumer, output);
                if $split_k > 1 {
                    epilogue = epilogue.shared_by(block.rank_of_k(), $split_k);
                }
                let elected = block.releases();
                wait_for_predecessors();
                let k_steps = block.steps(k_blocks);
                let mut exchange = Exchange::new(block);
                let mut position = RingPosition::START;
                let mut tile = block.first_tile();
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    let (m, n) = block.corner(tiles, tile);
                    device::multiply! {
                        $order, $block_n, TILE, block, consumer, elected, position, k_steps,
                        $($($c)+)+
                    }
                    tile += block.tile_step();
                    let mut group = 0;
                    if $split_k > 1 {
                        // SAFETY: the whole warpgroup, on both sides of the exchange.
                        unsafe {
                            exchange.begin();
                            $(
                                exchange.put(group, [$($c),+]);
                                group += 1;
                            )+
                            exchange.swap();
                            group = 0;
                            $(
                                [$($c),+] = exchange.add(group, [$($c),+]);
                                group += 1;
                            )+
                            exchange.end(tile < tiles.num_tiles());
                        }
                        group = 0;
                    }
                    $(
                        device::finish!($order, epilogue, group, m, n, [$($c),+]);
                        group += 1;
                    )+
                    let _ = group;
                }
            }
            if $split_k > 1 {
                // SAFETY: every thread of the cluster, at the end. Until then others may be
                // reading what this block sends, out of its shared memory, or arrive there.
                unsafe { ptx::barrier_cluster() };
            }
        }
    };
}
pub(super) use entry;
