//! A chunk's batches, one after the other.

use core::marker::PhantomData;

use super::load::*;
use super::{Element, Statistic, thread_of_block};
use crate::ptx;
use crate::reduce::{Accumulator, Batch, Rule, THREADS, VECTORS, share};
use crate::unroll::unroll;

/// A thread's place: the batch it adds next, which is loaded or on its way.
pub(super) struct At<E> {
    /// Address of the thread's vector 0.
    address: u64,
    /// Elements of the chunk from the batch's first on.
    pub(super) left: u32,
    vectors: Vectors,
    aligned: bool,
    element: PhantomData<E>,
}

impl<E: Element> At<E> {
    /// Before the first batch of a chunk, whose vector 0 has this address and which has so many
    /// elements.
    ///
    /// # Safety
    /// They are readable, and nothing writes them while the kernel runs; the address is a multiple
    /// of 16 if `aligned`.
    #[inline(always)]
    pub(super) unsafe fn begin((address, left): (u64, u32), aligned: bool) -> Self {
        // SAFETY: the caller's contract.
        let vectors = unsafe { load::<E>(address, left, aligned) };
        Self { address, left, vectors, aligned, element: PhantomData }
    }

    /// What the elements of this chunk are measured from: a mean of the batch.
    #[inline(always)]
    pub(super) fn pivot(&self) -> f32 {
        let in_batch = if self.left < batch::<E>() { self.left } else { batch::<E>() };
        pivot::<E>(&self.vectors, share(in_batch, E::WIDTH, THREADS, thread_of_block()))
    }

    /// Adds the rest of the chunk, and goes on to the first batch of the chunk that follows, given
    /// as for [`begin`](Self::begin).
    ///
    /// # Safety
    /// As [`begin`](Self::begin), of both chunks.
    #[inline(always)]
    pub(super) unsafe fn add_chunk<S: Statistic>(
        &mut self,
        accumulator: &mut Accumulator,
        measure: Measure,
        rule: Rule,
        following: impl Fn() -> (u64, u32),
    ) {
        loop {
            let (address, left) = (self.address, self.left);
            let more = left > batch::<E>();
            let (next_address, next_left) = if more {
                (address + u64::from(batch::<E>() << E::LOG2_SIZE), left - batch::<E>())
            } else {
                following()
            };
            let (mut sums, mut pairs) = (Batch::EMPTY, E::NO_PAIRS);
            let mut loaded = false;
            // SAFETY: elements that are left are readable by the caller's contract.
            unsafe {
                if self.aligned && left >= batch::<E>() {
                    let next_too = next_left >= batch::<E>();
                    unroll!(v: u32 in [0 1 2 3] {
                        let vector = self.vectors[v as usize];
                        add_whole::<E, S>(&mut sums, &mut pairs, vector, measure);
                        if next_too {
                            let next = address_of(next_address, v);
                            self.vectors[v as usize] = ptx::ld_global_v4_u32(next);
                        }
                    });
                    if S::SQUARES && E::PAIRED {
                        E::add_pairs(pairs, &mut sums);
                    }
                    loaded = next_too;
                } else {
                    let mut valid = left_of_thread::<E>(left);
                    each_vector(&mut self.vectors, |vector| {
                        if valid > 0 {
                            add_some::<E, S>(&mut sums, *vector, valid, measure);
                        }
                        valid = left_of_vector::<E>(valid, 1);
                    });
                }
                if !loaded && next_left > 0 {
                    self.vectors = load::<E>(next_address, next_left, self.aligned);
                }
                if !take::<S>(accumulator, &sums, rule) {
                    let valid = left_of_thread::<E>(left);
                    let mut v = 0;
                    while v < VECTORS {
                        ptx::nounroll();
                        let valid = left_of_vector::<E>(valid, v);
                        add_exactly::<E>(accumulator, address_of(address, v), valid, rule);
                        v += 1;
                    }
                }
            }
            (self.address, self.left) = (next_address, next_left);
            if !more {
                break;
            }
        }
    }
}
