//! Device side of the statistics of wide chunks of columns: a block summarises a band of one.

use super::slots::{put, store_result};
use super::*;
use crate::reduce::{BAND_BLOCKS_PER_MULTIPROCESSOR, BandParams};

/// A thread's rows of its band.
#[derive(Clone, Copy)]
struct Place {
    /// Address of the thread's vector in the first of its rows.
    address: u64,
    /// Bytes from one of its rows to the next.
    step: u64,
    /// How many of them are left.
    left: u32,
    aligned: bool,
}

impl Place {
    /// As far as they exist, the vectors of the next four rows.
    ///
    /// # Safety
    /// The rows are readable, and nothing writes them while the kernel runs.
    #[inline(always)]
    unsafe fn load<E: Element>(&self) -> Vectors {
        let at = |v: u32| {
            let valid = if v < self.left { E::WIDTH as i32 } else { 0 };
            (self.address + u64::from(v) * self.step, valid)
        };
        // SAFETY: as many exist.
        unsafe { load_vectors::<E>([at(0), at(1), at(2), at(3)], self.aligned) }
    }

    /// The place four rows on.
    #[inline(always)]
    fn next(&self) -> Self {
        Self { address: self.address + 4 * self.step, left: self.left - 4, ..*self }
    }
}

/// The statistics of each part.
///
/// # Safety
/// The elements are readable, slots, counters and results writable, and nothing else writes any of
/// them while the kernel runs; the counters are 0; the grid is that of the bands.
#[inline(always)]
pub(in crate::reduce) unsafe fn bands<E: Element>(params: &BandParams) {
    start::<THREADS, BAND_BLOCKS_PER_MULTIPROCESSOR>();
    let (cut, rule) = (params.bands, params.rule());
    let (warp, lane) = warp_and_lane();
    let band = ptx::block_index() / cut.parts;
    let part = ptx::block_index() - band * cut.parts.get();
    let rows = cut.rows_of(band);
    let x = ((warp * 32) & ((1 << cut.log2_across) - 1)) + lane;
    let y = (warp * 32) >> cut.log2_across;
    let start = params.data
        + (u64::from(part) * u64::from(cut.width) << E::LOG2_SIZE)
        + u64::from(band * cut.band) * params.row_stride;
    let place = Place {
        address: start + u64::from(x * 16) + u64::from(y) * params.row_stride,
        step: u64::from(THREADS >> cut.log2_across) * params.row_stride,
        left: cut.rows_of_warp(rows, warp),
        aligned: (params.data | params.row_stride) % 16 == 0,
    };
    wait_for_predecessors();
    // SAFETY: the caller's contract; the whole block.
    let accumulator = unsafe { sums_of_thread::<E>(place, rule) };
    let smem = ptx::dynamic_smem();
    // SAFETY: whole warps; each warp has a place of its own, and the barrier is between. One lane
    // writes the slot, then counts the block in; whoever is last has acquired what all others
    // released, and hands it on to its warp.
    unsafe {
        // All lanes of a warp have its pivot.
        let node = Node::of(&accumulator).over::<Summary, 32>();
        if lane == 0 {
            node.put(smem + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp != 0 {
            return;
        }
        let other = lane % WARPS;
        let node = Node::get(smem + other * WARP_BYTES);
        let count = cut.rows_of_warp(rows, other) * 32 * E::WIDTH - node.skipped;
        let node = node.rebased_to_first_lane(count).over::<Summary, 8>();
        let elements = rows * cut.width;
        let partial = partial_of::<Summary>(&node, elements);
        let result = params.results + u64::from(part) * size_of::<Moments>() as u64;
        if cut.bands == 1 {
            if ptx::opaque_u32(lane) == 0 {
                store_result(result, &alone::<Summary>(&partial, u64::from(elements)));
            }
            return;
        }
        let slots =
            params.partials + u64::from(part) * u64::from(cut.bands) * size_of::<Partial>() as u64;
        let mut last = 0;
        if ptx::opaque_u32(lane) == 0 {
            put(slots, band, &partial);
            let counter = params.arrived + u64::from(part) * 4;
            last = u32::from(ptx::atom_add_acq_rel_gpu_u32(counter, 1) == cut.bands - 1);
            if last == 1 {
                ptx::st_global_u32(counter, 0);
            }
        }
        if ptx::shfl_sync_idx_first(last) == 0 {
            return;
        }
        ptx::bar_warp_sync();
        let usual = cut.band * cut.width;
        merge_slots::<1>(result, slots, cut.bands, usual, |band| cut.rows_of(band) * cut.width);
    }
}

/// Sums of a thread's elements relative to a mean of its warp's first batch.
///
/// # Safety
/// The rows are readable, and nothing writes them while the kernel runs; whole warps execute it, in
/// which all have the same number of rows.
#[inline(always)]
unsafe fn sums_of_thread<E: Element>(mut place: Place, rule: Rule) -> Accumulator {
    let mut measure = Measure::new::<E, Summary>(rule);
    // SAFETY: the caller's contract.
    let mut vectors = unsafe { place.load::<E>() };
    let first = if place.left < VECTORS { place.left } else { VECTORS };
    // SAFETY: whole warps.
    measure.pivot = unsafe { mean_of_warp(pivot::<E>(&vectors, first * E::WIDTH)) };
    let mut accumulator = Accumulator::new(number_or_zero(measure.pivot));
    while place.left > 0 {
        ptx::nounroll();
        let (mut sums, mut pairs) = (Batch::EMPTY, E::NO_PAIRS);
        let following = place.next();
        let mut loaded = false;
        if place.left >= VECTORS {
            loaded = place.aligned && place.left >= 2 * VECTORS;
            unroll!(v: u32 in [0 1 2 3] {
                add_whole::<E, Summary>(&mut sums, &mut pairs, vectors[v as usize], measure);
                if loaded {
                    // SAFETY: the next four rows exist.
                    vectors[v as usize] = unsafe {
                        ptx::ld_global_v4_u32(following.address + u64::from(v) * place.step)
                    };
                }
            });
            if E::PAIRED {
                E::add_pairs(pairs, &mut sums);
            }
        } else {
            let mut left = place.left;
            each_vector(&mut vectors, |vector| {
                if left > 0 {
                    add_some::<E, Summary>(&mut sums, *vector, E::WIDTH as i32, measure);
                    left -= 1;
                }
            });
        }
        if !loaded && place.left > VECTORS {
            // SAFETY: only rows that exist are loaded.
            vectors = unsafe { following.load::<E>() };
        }
        if !take::<Summary>(&mut accumulator, &sums, rule) {
            let mut v = 0;
            while v < VECTORS && v < place.left {
                ptx::nounroll();
                let address = place.address + u64::from(v) * place.step;
                // SAFETY: the row exists.
                unsafe { add_exactly::<E>(&mut accumulator, address, E::WIDTH as i32, rule) };
                v += 1;
            }
        }
        if place.left <= VECTORS {
            break;
        }
        place = following;
    }
    accumulator
}

/// The mean of what the lanes have; NaN if that is not finite.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
unsafe fn mean_of_warp(value: f32) -> f32 {
    let mut mean = value / 32.0;
    unroll!(mask: u32 in [16 8 4 2 1] {
        // SAFETY: whole warps. Both lanes add the same two numbers, so all get the same bits.
        mean += f32::from_bits(unsafe { ptx::shfl_sync_bfly_by(mean.to_bits(), mask) });
    });
    if mean.is_finite() { mean } else { f32::NAN }
}
