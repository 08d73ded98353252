//! Device side of the depthwise filter gradient.

use super::*;

/// What a thread sums: every `walkers`th position from `first + walker` to `last`, those of all
/// sequences numbered together, for the taps from `first_tap` on.
#[derive(Clone, Copy)]
struct Part<'a> {
    params: &'a DepthwiseWgradParams,
    channel: u32,
    first: u32,
    last: u32,
    walker: u32,
    walkers: u32,
    first_tap: u32,
}

/// Sums for up to eight taps, and that of dz.
type Sums = ([f32; WGRAD_TAPS as usize], f32);

impl Part<'_> {
    /// Address of the channel's first element in a sequence.
    #[inline(always)]
    fn row(&self, tensor: &Strided, batch: u32, size: u32) -> u64 {
        let at = u64::from(batch) * tensor.batch + u64::from(self.channel) * tensor.channel;
        tensor.address + at * u64::from(size)
    }

    /// Adds a position's products.
    ///
    /// # Safety
    /// The position exists, as does the channel; the tensors are as the strides say.
    #[inline(always)]
    unsafe fn add<E: Element>(&self, (sums, bias): &mut Sums, batch: u32, position: u32) {
        let (shape, size) = (&self.params.shape, u64::from(E::SIZE));
        let (x, dz) = (&self.params.x, &self.params.dz);
        let dz_at = self.row(dz, batch, E::SIZE) + u64::from(position) * dz.position * size;
        let x_row = self.row(x, batch, E::SIZE);
        // SAFETY: an existing element.
        let dz = E::widen(unsafe { E::load(dz_at) });
        let from = (position * shape.stride + self.first_tap * shape.dilation)
            .wrapping_sub(shape.padding_left);
        unroll!(t: u32 in [0 1 2 3 4 5 6 7] {
            let from = from.wrapping_add(t * shape.dilation);
            // As unsigned, a position before the first is beyond the last.
            if self.first_tap + t < shape.kernel_size && from < shape.in_length {
                let at = x_row + u64::from(from) * x.position * size;
                // SAFETY: an existing element.
                let x = E::widen(unsafe { E::load(at) });
                sums[t as usize] = ptx::fma_rn_f32(dz, x, sums[t as usize]);
            }
        });
        *bias += dz;
    }

    /// One position after the other.
    ///
    /// # Safety
    /// As [`wgrad`].
    #[inline(always)]
    unsafe fn walk<E: Element>(&self) -> Sums {
        let out_length = self.params.shape.out_length;
        let mut sums = ([0.0; WGRAD_TAPS as usize], 0.0);
        let mut at = self.first + self.walker;
        while at < self.last {
            let batch = div(at, out_length);
            // SAFETY: an existing position.
            unsafe { self.add::<E>(&mut sums, batch, at - batch * out_length) };
            at += self.walkers;
        }
        sums
    }

    /// Eight positions after the other: a vector of dz, and the three of x that its taps meet.
    ///
    /// # Safety
    /// As [`wgrad`]; [`DepthwiseWgradParams::by_vectors`] holds.
    #[inline(always)]
    unsafe fn walk_vectors<E: Element>(&self) -> Sums {
        let shape = &self.params.shape;
        let (in_vectors, out_vectors) = (shape.in_length / RUN, shape.out_length / RUN);
        let first = 0u32.wrapping_sub(shape.padding_left) as i32;
        let (ahead, shift) = ((first >> 3) as u32, first as u32 & 7);
        // Vectors from the first that is met to the last.
        let met = (shift + shape.kernel_size + RUN - 2) / RUN;
        let mut sums = ([0.0; WGRAD_TAPS as usize], 0.0);
        let mut at = self.first / RUN + self.walker;
        let end = self.last / RUN;
        // A vector of dz and the three of x, and where they are.
        let load = |at: u32| {
            let batch = div(at, out_vectors);
            let vector = at - batch * out_vectors;
            let x = vector.wrapping_add(ahead);
            let mut raw = [[0; 8]; 4];
            if at < end {
                let dz_row = self.row(&self.params.dz, batch, E::SIZE);
                let x_row = self.row(&self.params.x, batch, E::SIZE);
                // SAFETY: rows of existing sequences; by the caller's contract.
                unsafe {
                    raw[0] = load_vector::<E>(dz_row, vector, out_vectors);
                    raw[1] = load_vector::<E>(x_row, x, in_vectors);
                    raw[2] = load_vector::<E>(x_row, x.wrapping_add(1), in_vectors);
                    if met > 1 {
                        raw[3] = load_vector::<E>(x_row, x.wrapping_add(2), in_vectors);
                    }
                }
            }
            (batch, vector, raw)
        };
        let mut coming = load(at);
        while at < end {
            ptx::nounroll();
            let (batch, vector, raw) = coming;
            at += self.walkers;
            coming = load(at);
            let x = vector.wrapping_add(ahead);
            // Beyond the ends of x there are no products: that of an infinity with a zero would be
            // one.
            if x < in_vectors && x + met < in_vectors {
                macro_rules! by_shift {
                    ($($shift:literal)+) => {
                        match shift {
                            $($shift => correlate::<E, $shift>(shape.kernel_size, &raw, &mut sums),)+
                            _ => correlate::<E, 0>(shape.kernel_size, &raw, &mut sums),
                        }
                    };
                }
                by_shift!(1 2 3 4 5 6 7);
            } else {
                let mut position = vector * RUN;
                let end = position + RUN;
                while position < end {
                    ptx::nounroll();
                    // SAFETY: an existing position.
                    unsafe { self.add::<E>(&mut sums, batch, position) };
                    position += 1;
                }
            }
        }
        sums
    }
}

/// Adds the products of a vector of dz with the positions that its taps meet in three of x, the
/// first tap of the first at element `SHIFT`.
#[inline(always)]
fn correlate<E: Element, const SHIFT: usize>(taps: u32, raw: &[Raw; 4], (sums, bias): &mut Sums) {
    unroll!(t: usize in [0 1 2 3 4 5 6 7] {
        if (t as u32) < taps {
            let mut sum = 0.0;
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                let at = SHIFT + t + i;
                let x = widened::<E>(&raw[1 + at / 8], at % 8);
                sum = ptx::fma_rn_f32(widened::<E>(&raw[0], i), x, sum);
            });
            sums[t] += sum;
        }
    });
    let mut sum = 0.0;
    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
        sum += widened::<E>(&raw[0], i);
    });
    *bias += sum;
}

/// Partial sums of the filter's and the bias's gradient.
///
/// # Safety
/// As the entries': the tensors are as the strides say, nothing writes them while the kernel runs,
/// and the partial sums have room.
#[inline(always)]
pub(in crate::conv1d) unsafe fn wgrad<E: Element>(params: &DepthwiseWgradParams) {
    // SAFETY: a comment for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            threads = const THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
    let shape = &params.shape;
    let smem = ptx::dynamic_smem();
    let thread = ptx::thread_index();
    let split = div(ptx::block_index(), shape.in_channels.div_ceil(params.channels_per_block()));
    let tile = ptx::block_index() - split * shape.in_channels.div_ceil(params.channels_per_block());
    // Threads along the positions, and how many there are.
    let (channel, walker, walkers) = if params.along_channels == 1 {
        (tile * 32 + thread % 32, thread / 32, THREADS / 32)
    } else {
        (tile, thread, THREADS)
    };
    let total = shape.batch * shape.out_length;
    let first = split * params.positions_per_split;
    let left = total - first;
    let last =
        first + if left < params.positions_per_split { left } else { params.positions_per_split };
    let last = if channel < shape.in_channels { last } else { first };
    let split_at = u64::from(split) * (shape.filter_elements() + u64::from(shape.out_channels));
    let partials = params.partials + split_at * 4;
    let by_vectors = params.by_vectors(E::SIZE);
    let mut first_tap = 0;
    while first_tap < shape.kernel_size {
        ptx::nounroll();
        let part = Part { params, channel, first, last, walker, walkers, first_tap };
        // SAFETY: the caller's contract; the part's channel exists where it has positions.
        let (sums, bias) =
            unsafe { if by_vectors { part.walk_vectors::<E>() } else { part.walk::<E>() } };
        // Every walker's sums, then their total in the order of the walkers, by halves.
        // SAFETY: places of the thread's own, and barriers between writes and reads. The loops
        // depend on the parameters alone, so all threads meet at each barrier.
        unsafe {
            unroll!(t: u32 in [0 1 2 3 4 5 6 7] {
                ptx::st_shared_f32(smem + (t * THREADS + thread) * 4, sums[t as usize]);
            });
            ptx::st_shared_f32(smem + (WGRAD_TAPS * THREADS + thread) * 4, bias);
            let lanes = THREADS / walkers;
            let mut half = walkers / 2;
            while half > 0 {
                ptx::nounroll();
                ptx::bar_sync::<0, THREADS>();
                if walker < half {
                    unroll!(t: u32 in [0 1 2 3 4 5 6 7 8] {
                        let at = smem + (t * THREADS + thread) * 4;
                        let sum = ptx::ld_shared_f32(at) + ptx::ld_shared_f32(at + half * lanes * 4);
                        ptx::st_shared_f32(at, sum);
                    });
                }
                half /= 2;
            }
            if walker == 0 && channel < shape.in_channels {
                let row = partials + u64::from(channel * shape.kernel_size + first_tap) * 4;
                unroll!(t: u32 in [0 1 2 3 4 5 6 7] {
                    if first_tap + t < shape.kernel_size {
                        let sum = ptx::ld_shared_f32(smem + (t * THREADS + thread) * 4);
                        ptx::st_global_u32(row + u64::from(t) * 4, sum.to_bits());
                    }
                });
                if first_tap == 0 {
                    let sum = ptx::ld_shared_f32(smem + (WGRAD_TAPS * THREADS + thread) * 4);
                    let at = partials + (shape.filter_elements() + u64::from(channel)) * 4;
                    ptx::st_global_u32(at, sum.to_bits());
                }
            }
            ptx::bar_sync::<0, THREADS>();
        }
        first_tap += WGRAD_TAPS;
    }
}
