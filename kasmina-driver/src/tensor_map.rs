//! Types of `cuTensorMapEncodeTiled`, which came with CUDA 12.0.

/// `CUtensorMap`: how TMA walks a tensor, in an encoding only the driver knows.
///
/// The driver asks for 64-byte alignment and cuda.h declares 128.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CUtensorMap {
    /// The encoded words.
    pub words: [u64; 16],
}

const _: () = assert!(size_of::<CUtensorMap>() == 128);

/// `CUtensorMapDataType`: the elements of a tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CUtensorMapDataType {
    /// Unsigned, 1 byte.
    Uint8 = 0,
    /// Unsigned, 2 bytes.
    Uint16 = 1,
    /// Unsigned, 4 bytes.
    Uint32 = 2,
    /// Signed, 4 bytes.
    Int32 = 3,
    /// Unsigned, 8 bytes.
    Uint64 = 4,
    /// Signed, 8 bytes.
    Int64 = 5,
    /// IEEE binary16.
    Float16 = 6,
    /// IEEE binary32.
    Float32 = 7,
    /// IEEE binary64.
    Float64 = 8,
    /// bfloat16.
    Bfloat16 = 9,
    /// IEEE binary32, subnormals flushed to zero.
    Float32Ftz = 10,
    /// TF32 in 4 bytes.
    Tfloat32 = 11,
    /// TF32 in 4 bytes, subnormals flushed to zero.
    Tfloat32Ftz = 12,
}

/// `CUtensorMapInterleave`: whether channels lie in groups, as in NC/8HWC8.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CUtensorMapInterleave {
    /// Channels are contiguous.
    #[default]
    None = 0,
    /// Groups of 16 bytes.
    Bytes16 = 1,
    /// Groups of 32 bytes.
    Bytes32 = 2,
}

/// `CUtensorMapSwizzle`: how 16-byte chunks are permuted in shared memory against bank conflicts.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CUtensorMapSwizzle {
    /// As in global memory.
    #[default]
    None = 0,
    /// Within spans of 32 bytes.
    Bytes32 = 1,
    /// Within spans of 64 bytes.
    Bytes64 = 2,
    /// Within spans of 128 bytes.
    Bytes128 = 3,
}

/// `CUtensorMapL2promotion`: how much a load brings into the L2 cache at least.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CUtensorMapL2promotion {
    /// What is asked for.
    #[default]
    None = 0,
    /// 64 bytes.
    Bytes64 = 1,
    /// 128 bytes.
    Bytes128 = 2,
    /// 256 bytes.
    Bytes256 = 3,
}

/// `CUtensorMapFloatOOBfill`: what a load finds beyond the tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CUtensorMapFloatOOBfill {
    /// Zeros.
    #[default]
    Zeros = 0,
    /// A NaN that fused multiply-adds treat as zero.
    NanRequestZeroFma = 1,
}
