//! The kernel's body, for every element type and layout.

use super::*;
use crate::activation::Activation;
pub(super) use crate::gemm::element::{BF16, Element, F16, F32};
use crate::gemm::parts::{needs_repair, of_block};
use crate::ptx;
use crate::unroll::unroll;

/// Which axis of an operand is contiguous.
pub(super) trait Axis {
    const K_MAJOR: bool;
    /// Where a thread's eight elements start in a tile, as `(index, k)`.
    fn share(thread: u32) -> (u32, u32);
}
pub(super) struct KMajor;
pub(super) struct NMajor;
impl Axis for KMajor {
    const K_MAJOR: bool = true;
    #[inline(always)]
    fn share(thread: u32) -> (u32, u32) {
        k_major_share(thread)
    }
}
impl Axis for NMajor {
    const K_MAJOR: bool = false;
    #[inline(always)]
    fn share(thread: u32) -> (u32, u32) {
        n_major_share(thread)
    }
}
/// W as `[k, n]`.
pub(super) type InOut = NMajor;
/// W as `[n, k]`.
pub(super) type OutIn = KMajor;
/// X as `[m, k]`.
pub(super) type Plain = KMajor;
/// X as `[k, m]`.
pub(super) type Transposed = NMajor;

/// From a row of the tile's first half to that of its second, in bytes of a stage.
const OTHER_HALF: u32 = BLOCK_M / 2 * 4;

/// Index of the thread, in a form that tells the compiler its range.
#[inline(always)]
fn thread() -> u32 {
    ptx::thread_index() % THREADS
}

/// A thread's eight elements of an operand's tile between global and shared memory: 32 bytes,
/// of which a 16-bit type uses the first half.
type Staged = [u32; 8];

/// One of them as f32.
#[inline(always)]
fn widened<E: Element>(staged: &Staged, index: u32) -> f32 {
    let byte = index * E::SIZE;
    E::widen(staged[(byte / 4) as usize] >> (byte % 4 * 8))
}

/// Walks one operand along k.
///
/// Few of its fields are held in registers: all but two follow from the parameters, or lie in
/// shared memory. More beside 64 sums would spill.
struct Loader {
    /// Where this thread's elements of the next tile are; used if `vector`.
    address: u64,
    /// 1 if a full tile of k can be loaded in vectors of 16 bytes, else 0.
    vector: u32,
    /// Address of the operand.
    base: u64,
    /// From row to row, in elements.
    stride: u64,
    /// Rows of the operand (columns of W).
    extent: u32,
    /// Length of k.
    k: u32,
    /// Where in shared memory the tile's first row (or column) is.
    first_at: u32,
}

impl Loader {
    /// The tile whose first row (or column of W) is `first`.
    #[inline(always)]
    fn new<E: Element, A: Axis>(
        [base, stride]: [u64; 2],
        [extent, k]: [u32; 2],
        first: u32,
        first_at: u32,
    ) -> Self {
        let vector = (base | (stride * u64::from(E::SIZE))) % 16 == 0
            && (A::K_MAJOR || extent - first >= BLOCK_N);
        let vector = ptx::opaque_u32(u32::from(vector));
        let mut loader = Self { address: 0, vector, base, stride, extent, k, first_at };
        loader.address = ptx::opaque_u64(loader.address_of::<E, A>(thread(), first, 0));
        loader
    }

    /// Where a thread's elements are in the tile from `first` and `first_k`. A row beyond the last
    /// is the last.
    #[inline(always)]
    fn address_of<E: Element, A: Axis>(&self, thread: u32, first: u32, first_k: u32) -> u64 {
        let (index, k) = A::share(thread);
        let k = u64::from(first_k) + u64::from(k);
        let element = if A::K_MAJOR {
            let last = self.extent - first - 1;
            let row = first + if index < last { index } else { last };
            u64::from(row) * self.stride + k
        } else {
            k * self.stride + (u64::from(first) + u64::from(index))
        };
        self.base + element * u64::from(E::SIZE)
    }

    /// This thread's elements of the next tile, of which `depth` k exist; the rest are zero.
    ///
    /// # Safety
    /// The operand's memory is readable and nothing writes it while the kernel runs; a barrier
    /// has passed since the tile's first row was put at `first_at`; `depth` k are left.
    #[inline(always)]
    unsafe fn fetch<E: Element, A: Axis>(&mut self, depth: u32) -> Staged {
        let mut staged = [0; 8];
        if self.vector != 0 && depth >= BLOCK_K {
            // SAFETY: inside the operand, as its rows are clamped or the tile of n is full, and
            // the tile of k is; base, row stride and a thread's place are multiples of 16 bytes.
            unsafe {
                [staged[0], staged[1], staged[2], staged[3]] =
                    ptx::ld_global_nc_v4_u32(self.address);
                if E::SIZE == 4 {
                    [staged[4], staged[5], staged[6], staged[7]] =
                        ptx::ld_global_nc_v4_u32(self.address + 16);
                }
            }
        } else {
            // Opaque, so that what follows from it occupies no registers in the other case.
            let thread = ptx::opaque_u32(thread());
            // SAFETY: written before a barrier.
            let first = unsafe { ptx::ld_shared_u32(self.first_at) };
            let (index, k) = A::share(thread);
            let address = self.address_of::<E, A>(thread, first, self.k - depth);
            unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                let exists = if A::K_MAJOR {
                    k + i < depth
                } else {
                    k < depth && index + i < self.extent - first
                };
                if exists {
                    let byte = i * E::SIZE;
                    // SAFETY: the element lies inside the operand.
                    let bits = unsafe { E::load(address + u64::from(byte)) };
                    staged[(byte / 4) as usize] |= bits << (byte % 4 * 8);
                }
            });
        }
        let step = if A::K_MAJOR { 1 } else { ptx::opaque_u64(self.stride) };
        // Opaque, so that it is one pair of registers that is stepped, here.
        self.address = ptx::opaque_u64(self.address + step * u64::from(BLOCK_K * E::SIZE));
        staged
    }
}

/// Writes what [`Loader::fetch`] gave to the stage at `stage`, as f32.
///
/// # Safety
/// No thread reads that stage before the next barrier.
#[inline(always)]
unsafe fn put<E: Element, A: Axis>(stage: u32, staged: &Staged) {
    let (index, k) = A::share(thread());
    // The addresses of the second four elements follow from the first's, so that one is held:
    // k is a multiple of 8 where it is contiguous, `index` where that is.
    let address = stage + tile_offset(k, index);
    unroll!(four: u32 in [0 4] {
        let mut values = [0.0; 4];
        unroll!(i: u32 in [0 1 2 3] {
            values[i as usize] = widened::<E>(staged, four + i);
        });
        if A::K_MAJOR {
            let address = (address ^ swizzle(four)) + four * ROW_BYTES;
            unroll!(i: u32 in [0 1 2 3] {
                // SAFETY: inside the stage, a multiple of 4.
                unsafe { ptx::st_shared_f32(address + i * ROW_BYTES, values[i as usize]) };
            });
        } else {
            // SAFETY: inside the stage; four columns from a multiple of four are 16 aligned
            // bytes, which stay together.
            unsafe { ptx::st_shared_v4_f32(address ^ (four * 4), values) };
        }
    });
}

/// A thread's results.
type Sums = [[f32; 8]; 8];

/// A thread's eight rows of X and eight columns of W at one k.
type Operands = [[[f32; 4]; 2]; 2];

/// Reads them; `x` and `w` are the addresses of the thread's first row and column at k = 0.
///
/// # Safety
/// Both stages are written, and a barrier has passed since.
#[inline(always)]
unsafe fn load_operands(x: u32, w: u32, k: u32) -> Operands {
    // `tile_offset(k, first)`, split so that only four addresses of each are computed: the rest
    // is the immediate of the load.
    let x = (x ^ swizzle(k)) + k * ROW_BYTES;
    let w = (w ^ swizzle(k)) + k * ROW_BYTES;
    // SAFETY: inside the stage; row and column are multiples of four, so 16-aligned.
    unsafe {
        [
            [ptx::ld_shared_v4_f32(x), ptx::ld_shared_v4_f32(x + OTHER_HALF)],
            [ptx::ld_shared_v4_f32(w), ptx::ld_shared_v4_f32(w + OTHER_HALF)],
        ]
    }
}

/// Adds the product of half a stage of X and W, the eight k from `first_k`.
///
/// # Safety
/// As [`load_operands`].
#[inline(always)]
unsafe fn multiply_half(sums: &mut Sums, x: u32, w: u32, first_k: u32) {
    // SAFETY: the caller's contract.
    let mut operands = unsafe { load_operands(x, w, first_k) };
    unroll!(k: u32 in [0 1 2 3 4 5 6 7] {
        let [x_values, w_values] = operands;
        // One k ahead: without it ptxas moves more loads forward than it has registers for. The
        // last is the first again, which is dropped.
        // SAFETY: the caller's contract.
        operands = unsafe { load_operands(x, w, first_k + (k + 1) % 8) };
        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
            unroll!(j: usize in [0 1 2 3 4 5 6 7] {
                sums[i][j] =
                    ptx::fma_rn_f32(x_values[i / 4][i % 4], w_values[j / 4][j % 4], sums[i][j]);
            });
        });
    });
    _ = operands;
}

/// Writes one half of a thread's results, `half` 0 or 1, to the half tile at `smem`.
///
/// # Safety
/// No thread accesses the half tile before the next barrier.
#[inline(always)]
unsafe fn put_results(smem: u32, sums: &Sums, half: usize) {
    // Opaque, as the same numbers held from before the product would take registers from it.
    let (row, column) = thread_tile(ptx::opaque_u32(thread()));
    unroll!(i: u32 in [0 1 2 3] {
        let [a, b, c, d, e, f, g, h] = sums[half * 4 + i as usize];
        let address = smem + result_offset(row + i, column);
        // SAFETY: inside the half tile; the column is a multiple of four, so 16-aligned.
        unsafe {
            ptx::st_shared_v4_f32(address, [a, b, c, d]);
            ptx::st_shared_v4_f32(address + OTHER_HALF, [e, f, g, h]);
        }
    });
}

/// The activation of four results, chosen once for all of them.
#[inline(always)]
fn activate(activation: Activation, values: [f32; 4]) -> [f32; 4] {
    macro_rules! each {
        ($($variant:ident)+) => {
            match activation {
                $(Activation::$variant => values.map(|v| Activation::$variant.apply(v)),)+
            }
        };
    }
    each!(None Relu Gelu GeluTanh Silu)
}

/// Bias, activation, rounding and the stores of the half tile at `smem`, whose first element
/// in Y is (`first_row`, `first_column`).
///
/// # Safety
/// The half tile is written and a barrier has passed since; Y is writable.
#[inline(always)]
unsafe fn store_half<E: Element, X: Axis>(
    params: &PortableGemmParams,
    smem: u32,
    first_row: u32,
    first_column: u32,
    bias: [f32; 4],
) {
    let thread = thread();
    let (warp, lane_column) = (thread / 32, thread % 32 * 4);
    let size = u64::from(E::SIZE);
    let activation = Activation::from_code(params.activation);
    let rows = params.m.saturating_sub(first_row);
    let columns = params.n - first_column;
    let aligned = (params.y | (params.y_stride * size)) % (4 * size) == 0;
    let column = u64::from(first_column) + u64::from(lane_column);
    let mut row = warp;
    while row < BLOCK_M / 2 && row < rows {
        // SAFETY: inside the half tile, a multiple of 16.
        let mut values = unsafe { ptx::ld_shared_v4_f32(smem + result_offset(row, lane_column)) };
        let y_row = u64::from(first_row) + u64::from(row);
        let address = params.y.wrapping_add((y_row * params.y_stride + column) * size);
        if X::K_MAJOR {
            unroll!(i: usize in [0 1 2 3] {
                values[i] += bias[i];
            });
            values = activate(activation, values);
        } else if params.accumulate != 0 {
            // SAFETY: the thread's own elements of Y.
            unsafe { add_previous::<E>(&mut values, address, columns.saturating_sub(lane_column)) };
        }
        let bits = values.map(E::round);
        if aligned && lane_column + 4 <= columns {
            // SAFETY: four existing columns of an existing row, aligned to their size.
            unsafe {
                if E::SIZE == 4 {
                    ptx::st_global_v4_u32(address, bits);
                } else {
                    let pairs = [bits[0] | (bits[1] << 16), bits[2] | (bits[3] << 16)];
                    ptx::st_global_v2_u32(address, pairs);
                }
            }
        } else {
            unroll!(i: u32 in [0 1 2 3] {
                if lane_column + i < columns {
                    // SAFETY: an existing column of an existing row.
                    unsafe { E::store(address + u64::from(i) * size, bits[i as usize]) };
                }
            });
        }
        row += THREADS / 32;
    }
}

/// The bias of the four columns this thread stores; zero for none and beyond n.
///
/// # Safety
/// The bias is 0 or readable.
#[inline(always)]
unsafe fn load_bias<E: Element>(params: &PortableGemmParams, first_column: u32) -> [f32; 4] {
    let lane_column = thread() % 32 * 4;
    let mut bias = [0.0; 4];
    unroll!(i: u32 in [0 1 2 3] {
        if params.bias != 0 && lane_column + i < params.n - first_column {
            let column = u64::from(first_column) + u64::from(lane_column + i);
            // SAFETY: an element of the bias.
            bias[i as usize] =
                E::widen(unsafe { E::load(params.bias + column * u64::from(E::SIZE)) });
        }
    });
    bias
}

/// Adds what four elements of Y held before.
///
/// # Safety
/// The first `columns` elements from `address` on are readable, and no other thread accesses them.
#[inline(always)]
unsafe fn add_previous<E: Element>(values: &mut [f32; 4], address: u64, columns: u32) {
    unroll!(i: u32 in [0 1 2 3] {
        if i < columns {
            let address = address + u64::from(i * E::SIZE);
            // SAFETY: an existing element. Not through the read-only path, as it is written next.
            let bits = unsafe {
                if E::SIZE == 4 {
                    ptx::ld_global_u32(address)
                } else {
                    u32::from(ptx::ld_global_u16(address))
                }
            };
            values[i as usize] += E::widen(bits);
        }
    });
}

/// One tile of Y.
///
/// # Safety
/// As the entries': the operands are readable, Y is writable, nothing else writes them while
/// the kernel runs, and the block's index names a tile.
#[inline(always)]
pub(super) unsafe fn product<E: Element, X: Axis, W: Axis>(params: &PortableGemmParams) {
    // Two blocks share a multiprocessor, which leaves 128 registers a thread.
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm 2",
            threads = const THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
    let (tile_row, tile_column) = tiles(params.m, params.n).tile(ptx::block_index());
    let (first_row, first_column) = (tile_row * BLOCK_M, tile_column * BLOCK_N);
    let smem = ptx::dynamic_smem();
    let (first_row_at, first_column_at) = (smem + PARKED, smem + PARKED + 4);
    let mut x_loader = Loader::new::<E, X>(
        [params.x, params.x_stride],
        [params.m, params.k],
        first_row,
        first_row_at,
    );
    let mut w_loader = Loader::new::<E, W>(
        [params.w, params.w_stride],
        [params.n, params.k],
        first_column,
        first_column_at,
    );
    let (x_smem, w_smem) = (smem, smem + 2 * STAGE_BYTES);
    let mut sums: Sums = [[0.0; 8]; 8];
    let mut stage = 0;
    let mut depth = params.k;

    // SAFETY: the operands are readable by the caller's contract. Each stage is written before
    // the barrier that precedes its reads, and read before the barrier that precedes the next
    // writes. Every thread runs the same number of iterations, so all meet at each barrier.
    unsafe {
        if thread() == 0 {
            ptx::st_shared_u32(first_row_at, first_row);
            ptx::st_shared_u32(first_column_at, first_column);
        }
        ptx::bar_sync::<0, THREADS>();
        let x_staged = x_loader.fetch::<E, X>(depth);
        let w_staged = w_loader.fetch::<E, W>(depth);
        put::<E, X>(x_smem, &x_staged);
        put::<E, W>(w_smem, &w_staged);
        ptx::bar_sync::<0, THREADS>();
        loop {
            // Opaque, so that this is found anew each time, ten instructions of a thousand: held, it
            // would make ptxas spill, for one GPU or another.
            let (row, column) = thread_tile(ptx::opaque_u32(thread()));
            let x_at = x_smem + stage + tile_offset(0, row);
            let w_at = w_smem + stage + tile_offset(0, column);
            stage ^= STAGE_BYTES;
            // Past the end zeros are put where nothing reads them, so that one copy of the
            // product serves all tiles. One operand at a time, as 16 registers in flight
            // beside 64 sums would spill.
            depth = depth.saturating_sub(BLOCK_K);
            let staged = x_loader.fetch::<E, X>(depth);
            multiply_half(&mut sums, x_at, w_at, 0);
            put::<E, X>(x_smem + stage, &staged);
            let staged = w_loader.fetch::<E, W>(depth);
            multiply_half(&mut sums, x_at, w_at, BLOCK_K / 2);
            put::<E, W>(w_smem + stage, &staged);
            if depth == 0 {
                break;
            }
            ptx::bar_sync::<0, THREADS>();
        }
    }

    // SAFETY: the half tile reuses the stages after a barrier that follows their last reads,
    // and the same holds between its two uses. The bias is 0 or readable, Y is writable.
    unsafe {
        let first_row = ptx::ld_shared_u32(first_row_at);
        let first_column = ptx::ld_shared_u32(first_column_at);
        let bias = if X::K_MAJOR { load_bias::<E>(params, first_column) } else { [0.0; 4] };
        let mut half = 0;
        while half < 2 {
            ptx::bar_sync::<0, THREADS>();
            if half == 0 {
                put_results(smem, &sums, 0);
            } else {
                put_results(smem, &sums, 1);
            }
            ptx::bar_sync::<0, THREADS>();
            let half_row = first_row + half * (BLOCK_M / 2);
            store_half::<E, X>(params, smem, half_row, first_column, bias);
            half += 1;
        }
    }
}

/// One tile of Y, if the findings call for it.
///
/// # Safety
/// As [`product`], and there are `num_findings` readable words of findings, which nothing writes
/// while the kernel runs.
#[inline(always)]
pub(super) unsafe fn repair<W: Axis>(params: &RepairParams) {
    let mut findings = 0;
    let mut index = thread();
    while index < params.num_findings {
        ptx::nounroll();
        // SAFETY: one of the words.
        findings |= unsafe { ptx::ld_global_nc_u32(params.findings + 4 * u64::from(index)) };
        index += THREADS;
    }
    // SAFETY: the whole block; then the caller's contract.
    unsafe {
        if needs_repair(of_block(findings)) {
            product::<F32, Plain, W>(&params.gemm);
        }
    }
}
