//! Device side of the kernels that split f32 on the way into the tensor cores.

use super::*;
use crate::activation::Activation;
use crate::gemm::hopper::device::{load_some, store_some};
use crate::gemm::parts::{PARTS, W_SHIFT, needs_repair, packed_findings};
use crate::ptx;
use crate::ptx::mma::mma_m16n8k16_bf16;
use crate::unroll::unroll;

mod operand;

pub(super) use crate::gemm::hopper::device::cluster_marker;
use operand::Operand;

/// A lane's elements of a k16: of four rows or columns, four k.
type Fragment = [[f32; 4]; 4];
/// A lane's sums, of eight groups of columns and two groups of rows.
type Sums = [[[f32; 4]; 2]; 8];

/// Which axis of an operand is contiguous.
pub(super) trait Axis {
    const K_MAJOR: bool;

    /// A lane's elements of a `k16`, 0 or 1, from the `chunk`th four rows or columns of a warp's
    /// share of `extent`.
    ///
    /// # Safety
    /// `at` is a warp's share of a stage that has landed.
    unsafe fn fragment(at: u32, extent: u32, lane: u32, chunk: u32, k16: u32) -> Fragment;
}

/// `[m, k]` and `[n, k]`.
pub(super) struct K;
/// `[k, m]` and `[k, n]`.
pub(super) struct MN;

impl Axis for K {
    const K_MAJOR: bool = true;

    #[inline(always)]
    unsafe fn fragment(at: u32, extent: u32, lane: u32, chunk: u32, k16: u32) -> Fragment {
        let row = |i: u32| {
            let place = k_major_place(extent, 4 * chunk + i, 2 * (lane % 4) + k16);
            // SAFETY: the caller's contract; 16-aligned.
            unsafe { ptx::ld_shared_v4_f32(at + place) }
        };
        [row(0), row(1), row(2), row(3)]
    }
}

impl Axis for MN {
    const K_MAJOR: bool = false;

    #[inline(always)]
    unsafe fn fragment(at: u32, extent: u32, lane: u32, chunk: u32, k16: u32) -> Fragment {
        let mut fragment = [[0.0; 4]; 4];
        unroll!(k: usize in [0 1 2 3] {
            let place = mn_major_place(extent, 8 * (lane % 4) + 4 * k16 + k as u32, chunk);
            // SAFETY: the caller's contract; 16-aligned.
            let four = unsafe { ptx::ld_shared_v4_f32(at + place) };
            unroll!(i: usize in [0 1 2 3] {
                fragment[i][k] = four[i];
            });
        });
        fragment
    }
}

/// What a thread has noticed about an operand; see `packed_findings`.
#[derive(Clone, Copy)]
struct Noticed {
    largest: u32,
    left_over: u32,
}

/// The parts of two neighbours in k, each pair packed as fragments are.
#[inline(always)]
fn split_pair(low: f32, high: f32, noticed: &mut Noticed) -> [u32; PARTS] {
    let rest = |low: f32, high: f32, part: u32| {
        (low - f32::from_bits(part << 16), high - f32::from_bits(part & 0xFFFF_0000))
    };
    let first = ptx::cvt_rn_bf16x2_f32(high, low);
    noticed.largest = ptx::max_nan_abs_bf16x2(noticed.largest, first);
    let (low, high) = rest(low, high, first);
    let second = ptx::cvt_rn_bf16x2_f32(high, low);
    let (low, high) = rest(low, high, second);
    noticed.left_over |= low.to_bits() | high.to_bits();
    [first, second, ptx::cvt_rn_bf16x2_f32(high, low)]
}

/// Multiplies a stage into a warp's sums.
///
/// # Safety
/// The whole warp calls it with its shares of a stage that has landed.
#[inline(always)]
unsafe fn multiply<X: Axis, W: Axis>(
    x_at: u32,
    w_at: u32,
    lane: u32,
    sums: &mut Sums,
    [of_x, of_w]: &mut [Noticed; 2],
) {
    // A loop, so that the assembler does not load and split more at once than it has registers for.
    let mut k16 = 0;
    while k16 < 2 {
        ptx::nounroll();
        // SAFETY: the caller's contract.
        let x = unsafe { X::fragment(x_at, WARP_M, lane, lane / 4, k16) };
        // By part and group of rows.
        let mut a = [[[0; 4]; 2]; PARTS];
        unroll!(rows: usize in [0 1] {
            unroll!(i: usize in [0 1 2 3] {
                let (row, k) = (2 * rows + i % 2, i / 2 * 2);
                let [first, second, third] = split_pair(x[row][k], x[row][k + 1], of_x);
                a[0][rows][i] = first;
                a[1][rows][i] = second;
                a[2][rows][i] = third;
            });
        });
        unroll!(half: usize in [0 1] {
            // SAFETY: the caller's contract.
            let w =
                unsafe { W::fragment(w_at, WARP_N, lane, lane / 4 * 2 + half as u32, k16) };
            unroll!(column: usize in [0 1 2 3] {
                let [b0, b1, b2, b3] = w[column];
                let (low, high) = (split_pair(b0, b1, of_w), split_pair(b2, b3, of_w));
                let mut c = [[0.0f32; 4]; 2];
                macro_rules! products {
                    ($(($of_x:literal $of_w:literal))+) => {
                        $(unroll!(rows: usize in [0 1] {
                            let (a, b) = (a[$of_x][rows], [low[$of_w], high[$of_w]]);
                            // SAFETY: the whole warp, by the caller's contract.
                            unsafe { mma_m16n8k16_bf16(&mut c[rows], a, b) };
                        });)+
                    };
                }
                products!((2 0) (0 2) (1 1) (1 0) (0 1) (0 0));
                unroll!(rows: usize in [0 1] {
                    unroll!(i: usize in [0 1 2 3] {
                        sums[4 * half + column][rows][i] += c[rows][i];
                    });
                });
            });
        });
        k16 += 1;
    }
}

/// Puts a warp's sums in shared memory; `at` is its slice's tile, whose `row` and `column` are the
/// warp's first.
///
/// # Safety
/// Nobody accesses the slice's tile until a barrier.
#[inline(always)]
unsafe fn put(at: u32, tile: DirectTile, row: u32, column: u32, lane: u32, sums: &Sums) {
    let (g, t) = (lane / 4, lane % 4);
    unroll!(i: usize in [0 1 2 3] {
        unroll!(four: usize in [0 1 2 3] {
            let first = four % 2 * 4;
            let (rows, sum) = (i / 2, i % 2 * 2 + four / 2);
            let values = [
                sums[first][rows][sum],
                sums[first + 1][rows][sum],
                sums[first + 2][rows][sum],
                sums[first + 3][rows][sum],
            ];
            let (row, chunk) = (row + 4 * g + i as u32, column / 4 + 4 * t + four as u32);
            // SAFETY: this lane's places in the slice's tile.
            unsafe {
                let place = at + sums_place(tile, row, chunk);
                ptx::st_shared_v4_f32(place, values);
            }
        });
    });
}

/// Four neighbours of a row of the product, in plain f32, of which `left` exist; the bits of the
/// portable kernel.
///
/// # Safety
/// The operands are readable; the row exists.
#[inline(always)]
unsafe fn plain<X: Axis, W: Axis>(
    params: &PortableGemmParams,
    row: u32,
    column: u32,
    left: u32,
) -> [f32; 4] {
    let address = |k_major: bool, base: u64, stride: u64, index: u32, k: u32| {
        let (row, column) = if k_major { (index, k) } else { (k, index) };
        base + 4 * (u64::from(row) * stride + u64::from(column))
    };
    let mut sums = [0.0; 4];
    let mut k = 0;
    while k < params.k {
        ptx::nounroll();
        let x = address(X::K_MAJOR, params.x, params.x_stride, row, k);
        // SAFETY: elements of the operands; a column that does not exist is the first.
        unsafe {
            let x = f32::from_bits(ptx::ld_global_u32(x));
            unroll!(i: usize in [0 1 2 3] {
                let column = if (i as u32) < left { column + i as u32 } else { column };
                let w = address(W::K_MAJOR, params.w, params.w_stride, column, k);
                let w = f32::from_bits(ptx::ld_global_u32(w));
                sums[i] = ptx::fma_rn_f32(x, w, sums[i]);
            });
        }
        k += 1;
    }
    sums
}

/// Where a block's results go.
#[derive(Clone, Copy)]
struct Output<'a> {
    params: &'a PortableGemmParams,
    tile: DirectTile,
    /// The tile's first row and column.
    m: u32,
    n: u32,
}

impl Output<'_> {
    /// Finishes and stores four neighbours of the tile, the `chunk`th, with their `sum` or, where
    /// parts could not express the operands, what plain f32 gives.
    ///
    /// # Safety
    /// As [`plain`] and [`finish`]; one thread calls it for each chunk.
    #[inline(always)]
    unsafe fn store<X: Axis, W: Axis>(self, chunk: u32, findings: u32, sum: impl Fn() -> [f32; 4]) {
        let per_row = self.tile.block_n() / 4;
        let (row, column) = (self.m + chunk / per_row, self.n + chunk % per_row * 4);
        let left = self.params.n.saturating_sub(column);
        if row < self.params.m && left > 0 {
            // SAFETY: an existing row; these elements are this thread's.
            unsafe {
                let sums = if needs_repair(findings) {
                    plain::<X, W>(self.params, row, column, left)
                } else {
                    sum()
                };
                finish(self.params, row, column, left, sums);
            }
        }
    }
}

/// Bias, activation and the store of four neighbours of a row of Y, of which `left` exist.
///
/// # Safety
/// The row exists, Y is writable, and no other thread accesses these elements; the bias is 0 or
/// readable.
#[inline(always)]
unsafe fn finish(params: &PortableGemmParams, row: u32, column: u32, left: u32, sums: [f32; 4]) {
    let activation = Activation::from_code(params.activation);
    let address = params.y + 4 * (u64::from(row) * params.y_stride + u64::from(column));
    // SAFETY: elements of the bias and of Y that exist.
    let (bias, before) = unsafe {
        let bias = params.bias + 4 * u64::from(column);
        (
            load_some(bias, if params.bias == 0 { 0 } else { left }),
            load_some(address, if params.accumulate == 0 { 0 } else { left }),
        )
    };
    let [a, b, c, d] = added(sums, bias);
    let mut values =
        [activation.apply(a), activation.apply(b), activation.apply(c), activation.apply(d)];
    if params.accumulate != 0 {
        values = added(values, before);
    }
    let [a, b, c, d] = values;
    let bits = [a.to_bits(), b.to_bits(), c.to_bits(), d.to_bits()];
    // SAFETY: elements of Y that exist; 16 bytes at once only where address and stride allow it.
    unsafe {
        if left >= 4 && params.y % 16 == 0 && params.y_stride % 4 == 0 {
            ptx::st_global_v4_u32(address, bits);
        } else {
            store_some(address, left, bits);
        }
    }
}

/// Where a thread's warp stands in its block.
struct Warp {
    warp: u32,
    slice: u32,
    /// Among the warps of the slice.
    warp_m: u32,
    warp_n: u32,
    lane: u32,
}

impl Warp {
    /// # Safety
    /// Every thread of the warp calls it, with its own index.
    #[inline(always)]
    unsafe fn of(tile: DirectTile, thread: u32) -> Self {
        // SAFETY: the whole warp.
        let warp = unsafe { ptx::shfl_sync_idx_first(thread / 32) };
        let warps = tile.warps_m * tile.warps_n;
        let (slice, warp_m) = (warp / warps, warp % warps % tile.warps_m);
        Self { warp, slice, warp_m, warp_n: warp % warps / tile.warps_m, lane: thread % 32 }
    }
}

/// What a block computes: the tile from row `m` and column `n`, or its share of the steps of k.
struct Part {
    rank: u32,
    m: u32,
    n: u32,
}

impl Part {
    #[inline(always)]
    fn of(params: &PortableGemmParams, tile: DirectTile, block: u32) -> Self {
        let (rank, index) = (block % tile.split_k, block / tile.split_k);
        let (tile_m, tile_n) = tile.scheduler(params.m, params.n).tile(index);
        Self { rank, m: tile_m * tile.block_m(), n: tile_n * tile.block_n() }
    }
}

/// Adds four and four.
#[inline(always)]
fn added([a, b, c, d]: [f32; 4], [e, f, g, h]: [f32; 4]) -> [f32; 4] {
    [a + e, b + f, c + g, d + h]
}

/// One tile of Y, or a block's part of it.
///
/// # Safety
/// As the entries': the operands are readable, Y is writable, nothing else writes them while the
/// kernel runs, and the block's index names a tile.
#[inline(always)]
pub(super) unsafe fn product<X: Axis, W: Axis>(params: &PortableGemmParams, tile: DirectTile) {
    let smem = ptx::dynamic_smem();
    let warps = tile.warps_m * tile.warps_n;
    // SAFETY: the whole block.
    let Warp { slice, warp_m, warp_n, lane, .. } = unsafe { Warp::of(tile, ptx::thread_index()) };
    let of_slice = [ptx::thread_index() % (32 * warps), 32 * warps];
    let Part { rank, m, n } = Part::of(params, tile, ptx::block_index());
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();

    let ring = smem + slice * tile.slice_bytes();
    let (first, end) = tile.steps(rank, params.k);
    let load = |stage: u32, step: u32| {
        let k = step * BLOCK_K;
        let left = params.k - k;
        // Opaque, so that these follow from the parameters each time and occupy no registers.
        let (m, n) = (ptx::opaque_u32(m), ptx::opaque_u32(n));
        let x = Operand::new::<X>(params.x, params.x_stride, params.m, m);
        let w = Operand::new::<W>(params.w, params.w_stride, params.n, n);
        // SAFETY: the operands are readable by the caller's contract; the stage is free.
        unsafe {
            x.load::<X>(stage, [tile.warps_m, WARP_M], [k, left], of_slice);
            let stage = stage + tile.warps_m * X_BYTES;
            w.load::<W>(stage, [tile.warps_n, WARP_N], [k, left], of_slice);
        }
    };
    let meet = || {
        // SAFETY: every warp of the slice, as often as it has steps.
        unsafe {
            if warps == 1 {
                ptx::bar_warp_sync();
            } else {
                ptx::bar_sync_of(1 + slice, 32 * warps);
            }
        }
    };
    let mut next = first + slice;
    let mut stage = 0;
    while stage < tile.num_stages {
        if next < end {
            load(ring + stage * tile.stage_bytes(), next);
        }
        ptx::cp_async_commit_group();
        next += tile.slices;
        stage += 1;
    }

    let mut sums: Sums = [[[0.0; 4]; 2]; 8];
    let mut noticed = [Noticed { largest: 0, left_over: 0 }; 2];
    let mut at = ring;
    let ahead = tile.num_stages * tile.slices;
    while next - ahead < end {
        ptx::nounroll();
        match tile.num_stages {
            2 => ptx::cp_async_wait_group::<1>(),
            3 => ptx::cp_async_wait_group::<2>(),
            _ => ptx::cp_async_wait_group::<3>(),
        }
        meet();
        // SAFETY: the whole warp; the stage has landed, and all have seen that.
        unsafe {
            let w_at = at + tile.warps_m * X_BYTES + warp_n * W_BYTES;
            multiply::<X, W>(at + warp_m * X_BYTES, w_at, lane, &mut sums, &mut noticed);
        }
        meet();
        if next < end {
            load(at, next);
        }
        ptx::cp_async_commit_group();
        next += tile.slices;
        at += tile.stage_bytes();
        at = if at == ring + tile.slice_bytes() { ring } else { at };
    }

    // Found anew, so that these occupy no registers beside the sums.
    let thread = ptx::opaque_u32(ptx::thread_index());
    // SAFETY: the whole block.
    let Warp { warp, slice, warp_m, warp_n, lane } = unsafe { Warp::of(tile, thread) };
    let Part { rank, m, n } = Part::of(params, tile, ptx::opaque_u32(ptx::block_index()));
    let words = smem + tile.findings_offset();
    let [of_x, of_w] = noticed;
    let of_x = packed_findings(of_x.largest, of_x.left_over);
    let of_w = packed_findings(of_w.largest, of_w.left_over);
    // SAFETY: the whole block comes here. Sums are put where no ring is in use any more, behind a
    // barrier, and read behind the next.
    let findings = unsafe {
        let findings = ptx::redux_sync_or_b32(of_x | of_w << W_SHIFT);
        ptx::bar_sync_all();
        let at = smem + slice * tile.sums_bytes();
        put(at, tile, warp_m * WARP_M, warp_n * WARP_N, lane, &sums);
        if lane == 0 {
            ptx::st_shared_u32(words + warp * 4, findings);
        }
        ptx::bar_sync_all();
        let mut all = 0;
        let mut warp = 0;
        while warp < tile.warps() {
            all |= ptx::ld_shared_u32(words + warp * 4);
            warp += 1;
        }
        all
    };

    let per_row = tile.block_n() / 4;
    let chunks = tile.block_m() * per_row;
    // Of the slices, in order.
    let sum_of = |chunk: u32| {
        let place = smem + sums_place(tile, chunk / per_row, chunk % per_row);
        // SAFETY: inside the tiles, written before the barrier.
        let mut sum = unsafe { ptx::ld_shared_v4_f32(place) };
        let mut slice = 1;
        while slice < tile.slices {
            // SAFETY: as above.
            let more = unsafe { ptx::ld_shared_v4_f32(place + slice * tile.sums_bytes()) };
            sum = added(sum, more);
            slice += 1;
        }
        sum
    };
    let output = Output { params, tile, m, n };
    if tile.split_k == 1 {
        let mut chunk = thread;
        while chunk < chunks {
            // SAFETY: the caller's contract; each chunk is one thread's.
            unsafe { output.store::<X, W>(chunk, findings, || sum_of(chunk)) };
            chunk += tile.block_dim();
        }
        return;
    }

    // SAFETY: every thread of the cluster comes here. What others read is written before the first
    // barrier and stays until the last.
    unsafe {
        let mut chunk = thread;
        while chunk < chunks {
            let place = smem + sums_place(tile, chunk / per_row, chunk % per_row);
            // No other thread reads the slices' sums of this chunk.
            ptx::st_shared_v4_f32(place, sum_of(chunk));
            chunk += tile.block_dim();
        }
        let word = words + tile.warps() * 4;
        if thread == 0 {
            ptx::st_shared_u32(word, findings);
        }
        ptx::barrier_cluster();
        let mut findings = 0;
        let mut other = 0;
        while other < tile.split_k {
            findings |= ptx::ld_shared_cluster_u32(ptx::mapa_shared_cluster(word, other));
            other += 1;
        }
        // Each block stores some of the tile's rows.
        let own = chunks / tile.split_k;
        let mut chunk = rank * own + thread;
        while chunk < (rank + 1) * own {
            output.store::<X, W>(chunk, findings, || {
                let place = smem + sums_place(tile, chunk / per_row, chunk % per_row);
                let mut sum = [0.0; 4];
                let mut other = 0;
                while other < tile.split_k {
                    let place = ptx::mapa_shared_cluster(place, other);
                    let more = ptx::ld_shared_cluster_v4_f32(place);
                    sum = added(sum, more);
                    other += 1;
                }
                sum
            });
            chunk += tile.block_dim();
        }
        ptx::barrier_cluster();
    }
}

/// Defines the entry for the layouts of X and W and a tile.
macro_rules! entry {
    ($entry:ident, $x:ident, $w:ident, $warps_m:literal, $warps_n:literal, $slices:literal,
     $num_stages:literal, $split_k:tt) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: PortableGemmParams) {
            const TILE: DirectTile = DirectTile {
                warps_m: $warps_m,
                warps_n: $warps_n,
                slices: $slices,
                num_stages: $num_stages,
                split_k: $split_k,
            };
            // SAFETY: comments for `cargo xtask ptx`; then the caller's contract.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    device::cluster_marker!($split_k 1),
                    threads = const TILE.block_dim(),
                    options(nomem, nostack, preserves_flags),
                );
                device::product::<device::$x, device::$w>(&params, TILE);
            }
        }
    };
}
pub(super) use entry;
