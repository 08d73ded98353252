//! The consumers' main loop.

/// Multiplies the next `$k_blocks` stages, at least one, into the accumulators and releases them.
/// `$position` moves behind them. Executed by a whole consumer warpgroup.
macro_rules! multiply_tile {
    ($ptx_type:literal, $block_n:tt, $tile:expr, $x_major:expr, $w_major:expr, $block:expr,
     $consumer:expr, $elected:expr, $position:ident, $k_blocks:expr, $($c:ident)+) => {
        let mut previous = $position.stage;
        let mut k_block = 0u32;
        while k_block < $k_blocks {
            let stage = $position.stage;
            // 64 rows of X, or one slab: as many bytes.
            let rows = $crate::gemm::hopper::CONSUMER_M * $crate::gemm::hopper::BLOCK_K * 2;
            let x = $block.x_stage(stage) + $consumer * rows;
            let a = $crate::smem_layout::wgmma_descriptor(x, $x_major);
            let b = $crate::smem_layout::wgmma_descriptor($block.w_stage(stage), $w_major);
            // SAFETY: the stage has landed; the whole warpgroup executes it.
            unsafe {
                $block.ring.wait_full($position);
                $crate::ptx::wgmma::wgmma_k64!(
                    $ptx_type, $block_n,
                    ($x_major as u32), ($w_major as u32),
                    ($crate::smem_layout::descriptor_step_k16($x_major)),
                    ($crate::smem_layout::descriptor_step_k16($w_major)),
                    a, b, k_block, $($c)+
                );
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
            $crate::ptx::wgmma::wgmma_wait_all!($block_n, $($c)+);
            if $elected {
                $block.release(previous);
            }
        }
    };
}
pub(crate) use multiply_tile;
