//! Convolution on Hopper as products of matrices that nobody writes out: TMA boxes take the
//! operands from the tensors as they lie, and what it fills with zeros beyond their ends is the
//! padding.
//!
//! | module | holds |
//! |---|---|
//! | [`gather`] | forward and dgrad: a walk over taps and channels for every tile of the output |
//! | [`wgrad`] | the gradients of filter and bias, split over batch and length |
//! | [`pack`] | the filter as a matrix for every tap |
//! | [`parts`] | all passes of f32, as sums of bf16 parts |
//! | [`depthwise`] | forward and dgrad of channels by themselves, which multiplies no matrices |
//!
//! Every tensor map has four axes, so that boxes end where a sequence or a group ends: channels
//! and positions in the order of the layout, then the sequence, then the group.

pub mod depthwise;
pub mod gather;
pub mod pack;
pub mod parts;
pub mod wgrad;

use crate::abi::DType;

pub use crate::gemm::hopper::{BLOCK_K, SLAB_N};

/// The largest step between positions that TMA takes from channels-last tensors.
pub const MAX_STEP: u32 = 8;

/// Whether there are kernels for this element type as it is: not for f32, which wgmma would round and
/// [`parts`] splits.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    crate::gemm::hopper::serves(dtype)
}

/// Cycles in which so many rows of 128 bytes arrive while every multiprocessor loads: 45 bytes a
/// cycle, fitted to timings on an H200 of all tiles and of both kinds of passes.
const fn load_cycles(rows: u32) -> u32 {
    rows * 20 / 7
}

/// Positions that one box of a channels-last tensor holds when they are `step` apart, of the
/// `wanted` ones, a power of two: the extent of a box counts what it steps over and is at most 256.
#[must_use]
pub const fn box_positions(wanted: u32, step: u32) -> u32 {
    let mut positions = wanted;
    while positions * step > 256 {
        positions /= 2;
    }
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_stay_within_the_limit_and_divide_what_is_wanted() {
        for wanted in [64, 128, 256] {
            for step in 1..=MAX_STEP {
                let positions = box_positions(wanted, step);
                assert!(positions * step <= 256 && positions >= 32);
                assert!(wanted.is_multiple_of(positions));
                // Swizzled boxes start on multiples of 1024 bytes, eight rows.
                assert!(positions.is_multiple_of(8));
            }
        }
        assert_eq!(box_positions(128, 1), 128);
        assert_eq!(box_positions(64, 3), 64);
        assert_eq!(box_positions(64, 8), 32);
    }
}
