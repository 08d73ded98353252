//! The epilogue of kernels that write f32.
//!
//! Each warp has 16 rows, with which no other has to do. It stages 32 columns at a time in shared
//! memory and stores them in whole lines, with ordinary stores, so that rows of Y may have any
//! length and any stride.

use super::WARPGROUP;
use crate::activation::Activation;
use crate::ptx;

/// Columns that are staged at a time.
const STAGED_N: u32 = 32;
/// What a warp stages.
const STAGED_BYTES: u32 = 16 * STAGED_N * 4;
const _: () = assert!(4 * STAGED_BYTES == super::SLAB_BYTES);

/// Where the results go, and what is done with them first.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    /// Device address of the bias, `[n]`; 0 for none.
    pub(crate) bias: u64,
    pub(crate) y: u64,
    /// From row to row of Y, in elements.
    pub(crate) y_stride: u64,
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) activation: u32,
    /// 1 to add to what Y holds.
    pub(crate) accumulate: u32,
}

/// One warp's side.
#[derive(Clone, Copy)]
pub(crate) struct F32Epilogue {
    lane: u32,
    /// The warp's rows in the tile, from and to.
    rows: [u32; 2],
    /// Address of the warp's share of shared memory.
    staged: u32,
    output: Output,
}

impl F32Epilogue {
    /// That of this thread's warp: `staged` is the address of the shares of the block's consumers,
    /// `consumer` which of them this is.
    #[inline(always)]
    pub(crate) fn new(staged: u32, consumer: u32, output: Output) -> Self {
        let thread = ptx::thread_index() % WARPGROUP;
        let warp = consumer * 4 + thread / 32;
        let staged = staged + warp * STAGED_BYTES;
        Self { lane: thread % 32, rows: [16 * warp, 16 * warp + 16], staged, output }
    }

    /// The same, but of the warp's 16 rows only those of block `rank` of `blocks` are stored.
    #[inline(always)]
    pub(crate) fn shared_by(mut self, rank: u32, blocks: u32) -> Self {
        let [first, end] = self.rows;
        let own = 64 / blocks * rank;
        let own_end = own + 64 / blocks;
        self.rows =
            [if first > own { first } else { own }, if end < own_end { end } else { own_end }];
        self
    }

    /// Stages 16 columns: registers `8·group ..` of the tile, as
    /// `smem_layout::accumulator_position` places them.
    ///
    /// # Safety
    /// The whole warp calls it, after `store` of the columns staged before.
    #[inline(always)]
    pub(crate) unsafe fn stage(self, group: u32, sums: [f32; 8]) {
        let (row, column) = (self.lane / 4, 16 * (group % 2) + 2 * (self.lane % 4));
        // SAFETY: this thread's places among the warp's rows.
        unsafe {
            let at = |row, column| self.staged + staged_offset(row, column);
            ptx::st_shared_v2_f32(at(row, column), sums[0], sums[1]);
            ptx::st_shared_v2_f32(at(row + 8, column), sums[2], sums[3]);
            ptx::st_shared_v2_f32(at(row, column + 8), sums[4], sums[5]);
            ptx::st_shared_v2_f32(at(row + 8, column + 8), sums[6], sums[7]);
        }
    }

    /// Stores what is staged, after `finish` has had its way with the four sums from a row and a
    /// column of Y on; then adds the bias and applies the activation. The tile's first row is `m`,
    /// the first staged column `n`.
    ///
    /// # Safety
    /// The whole warp calls it, after two groups have been staged.
    #[inline(always)]
    pub(crate) unsafe fn store(
        self,
        m: u32,
        n: u32,
        finish: impl Fn(u32, u32, [f32; 4]) -> [f32; 4],
    ) {
        let Output { bias, y, y_stride, activation, accumulate, .. } = self.output;
        // Eight lanes to a row, four columns to a lane.
        let offset = self.lane % 8 * 4;
        let column = n + offset;
        let left = self.output.n.saturating_sub(column);
        // SAFETY: elements of the bias's n; the host checks its length.
        let bias =
            unsafe { load_some(bias + 4 * u64::from(column), if bias == 0 { 0 } else { left }) };
        let activation = Activation::from_code(activation);
        let whole = left >= 4 && y % 16 == 0 && y_stride % 4 == 0;
        // SAFETY: the whole warp.
        unsafe { ptx::bar_warp_sync() };
        let [first, end] = self.rows;
        let mut step = self.lane / 8;
        while step < 16 {
            ptx::nounroll();
            // SAFETY: inside the warp's rows, staged before the barrier above.
            let sums = unsafe { ptx::ld_shared_v4_f32(self.staged + staged_offset(step, offset)) };
            let in_tile = first / 16 * 16 + step;
            let row = m + in_tile;
            if in_tile >= first && in_tile < end && row < self.output.m && left > 0 {
                let sums = finish(row, column, sums);
                let address = y + 4 * (u64::from(row) * y_stride + u64::from(column));
                let mut values = [
                    activation.apply(sums[0] + bias[0]),
                    activation.apply(sums[1] + bias[1]),
                    activation.apply(sums[2] + bias[2]),
                    activation.apply(sums[3] + bias[3]),
                ];
                if accumulate != 0 {
                    // SAFETY: elements of Y, which no other thread accesses.
                    let before = unsafe { load_some(address, left) };
                    values = [
                        values[0] + before[0],
                        values[1] + before[1],
                        values[2] + before[2],
                        values[3] + before[3],
                    ];
                }
                let bits = values.map(f32::to_bits);
                // SAFETY: elements of Y, which no other thread writes; 16 bytes at once only where
                // address and stride allow it.
                unsafe {
                    if whole {
                        ptx::st_global_v4_u32(address, bits);
                    } else {
                        store_some(address, left, bits);
                    }
                }
            }
            step += 4;
        }
        // SAFETY: the whole warp. What is staged next overwrites what was read here.
        unsafe { ptx::bar_warp_sync() };
    }
}

/// Words from row to row of what a transposed epilogue stages: a warp's 32 stores of one register
/// meet on no bank.
const TRANSPOSED_STRIDE: u32 = 20;
const _: () = assert!(16 * TRANSPOSED_STRIDE * 4 <= STAGED_BYTES);

/// As [`F32Epilogue`], where the accumulators are those of `Yᵀ`: rows of the tile are columns of Y.
#[derive(Clone, Copy)]
pub(crate) struct TransposedEpilogue(F32Epilogue);

impl TransposedEpilogue {
    #[inline(always)]
    pub(crate) fn new(epilogue: F32Epilogue) -> Self {
        Self(epilogue)
    }

    /// Stores 16 columns of the accumulators, those from register `8·group` on, as rows of Y. The
    /// tile's first row of Y is `m`, its first column `n`.
    ///
    /// # Safety
    /// The whole warp calls it.
    #[inline(always)]
    pub(crate) unsafe fn store(self, m: u32, n: u32, group: u32, sums: [f32; 8]) {
        let F32Epilogue { lane, rows: [first, end], staged, output } = self.0;
        let (column, row) = (lane / 4, 2 * (lane % 4));
        let at = |row: u32, column: u32| staged + (row * TRANSPOSED_STRIDE + column) * 4;
        // SAFETY: this thread's places in the warp's share.
        unsafe {
            ptx::st_shared_f32(at(row, column), sums[0]);
            ptx::st_shared_f32(at(row + 1, column), sums[1]);
            ptx::st_shared_f32(at(row, column + 8), sums[2]);
            ptx::st_shared_f32(at(row + 1, column + 8), sums[3]);
            ptx::st_shared_f32(at(row + 8, column), sums[4]);
            ptx::st_shared_f32(at(row + 9, column), sums[5]);
            ptx::st_shared_f32(at(row + 8, column + 8), sums[6]);
            ptx::st_shared_f32(at(row + 9, column + 8), sums[7]);
            ptx::bar_warp_sync();
        }
        let Output { bias, y, y_stride, activation, .. } = output;
        let offset = lane % 4 * 4;
        let in_tile = first / 16 * 16 + offset;
        let column = n + in_tile;
        let left = output.n.saturating_sub(column);
        let left = if in_tile >= first && in_tile < end { left } else { 0 };
        // SAFETY: elements of the bias's n; the host checks its length.
        let bias =
            unsafe { load_some(bias + 4 * u64::from(column), if bias == 0 { 0 } else { left }) };
        let activation = Activation::from_code(activation);
        let whole = left >= 4 && y % 16 == 0 && y_stride % 4 == 0;
        let mut step = lane / 4;
        while step < 16 {
            ptx::nounroll();
            let row = m + 16 * group + step;
            // SAFETY: inside the warp's share, written before the barrier above; elements of Y, which
            // no other thread writes, 16 bytes at once only where address and stride allow it.
            unsafe {
                let sums = ptx::ld_shared_v4_f32(at(step, offset));
                let address = y + 4 * (u64::from(row) * y_stride + u64::from(column));
                let bits = [
                    activation.apply(sums[0] + bias[0]).to_bits(),
                    activation.apply(sums[1] + bias[1]).to_bits(),
                    activation.apply(sums[2] + bias[2]).to_bits(),
                    activation.apply(sums[3] + bias[3]).to_bits(),
                ];
                if row < output.m {
                    if whole {
                        ptx::st_global_v4_u32(address, bits);
                    } else {
                        store_some(address, left, bits);
                    }
                }
            }
            step += 8;
        }
        // SAFETY: the whole warp. What is staged next overwrites what was read here.
        unsafe { ptx::bar_warp_sync() };
    }
}

/// Offset of an element of the 16 staged rows. Groups of 8 columns change places from row to row,
/// so that the four rows that the hardware serves together meet on no bank.
#[inline(always)]
const fn staged_offset(row: u32, column: u32) -> u32 {
    (row * STAGED_N + (column ^ (row % 4 * 8))) * 4
}

/// Loads up to four elements, of which `left` exist; 0 for the others.
///
/// # Safety
/// `address` is that of `left` readable elements.
#[inline(always)]
pub(crate) unsafe fn load_some(address: u64, left: u32) -> [f32; 4] {
    let element = |i: u32| {
        // SAFETY: one of those that exist.
        let bits =
            if i < left { unsafe { ptx::ld_global_u32(address + 4 * u64::from(i)) } } else { 0 };
        f32::from_bits(bits)
    };
    [element(0), element(1), element(2), element(3)]
}

/// Stores the first `left` of four elements.
///
/// # Safety
/// `address` is that of `left` writable elements, which no other thread accesses.
#[inline(always)]
pub(crate) unsafe fn store_some(address: u64, left: u32, [a, b, c, d]: [u32; 4]) {
    let element = |i: u32, value: u32| {
        if i < left {
            // SAFETY: one of those that exist.
            unsafe { ptx::st_global_u32(address + 4 * u64::from(i), value) }
        }
    };
    element(0, a);
    element(1, b);
    element(2, c);
    element(3, d);
}
