//! Element types with a value that nothing computes, for memory that is to be written.

use half::{bf16, f16};
use kasmina::Element;

/// An element type with a bit pattern that no computation leaves behind.
pub(crate) trait Poison: Element {
    /// A NaN whose bytes are all 0xFF.
    const POISON: Self;
    fn bits(self) -> u32;
}

impl Poison for f32 {
    const POISON: Self = f32::from_bits(u32::MAX);
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Poison for f16 {
    const POISON: Self = f16::from_bits(u16::MAX);
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Poison for bf16 {
    const POISON: Self = bf16::from_bits(u16::MAX);
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// The bits of every element, which compare where NaN does not.
pub(crate) fn bits<T: Poison>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}
