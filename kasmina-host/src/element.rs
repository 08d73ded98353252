//! The element types of tensors.
#![forbid(unsafe_code)]

use half::{bf16, f16};
use kasmina_kernels::abi::DType;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type that kernels exist for: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// The type as a value.
    const DTYPE: DType;

    /// The value in f32, exact.
    fn to_f32(self) -> f32;

    /// `value` rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtype_sizes_are_those_of_the_rust_types() {
        assert_eq!(f32::DTYPE.size(), size_of::<f32>());
        assert_eq!(f16::DTYPE.size(), size_of::<f16>());
        assert_eq!(bf16::DTYPE.size(), size_of::<bf16>());
    }
}
