//! Types of `cuLaunchKernelEx` and `cuFuncSetAttribute`, which came or grew after CUDA 11.4.

use core::ffi::c_int;
use core::ptr;

use cust_raw::{CUfunction_attribute, CUstream};

/// `CUlaunchConfig`: the shape of a launch and the attributes that qualify it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CUlaunchConfig {
    /// Blocks in x, y and z.
    pub grid_dim: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block_dim: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_mem_bytes: u32,
    /// The stream, null for the default one.
    pub stream: CUstream,
    /// The attributes; may be null where there are none.
    pub attributes: *mut CUlaunchAttribute,
    /// How many there are.
    pub attribute_count: u32,
}

impl CUlaunchConfig {
    /// A launch without attributes.
    #[must_use]
    pub const fn new(
        grid_dim: [u32; 3],
        block_dim: [u32; 3],
        shared_mem_bytes: u32,
        stream: CUstream,
    ) -> Self {
        Self {
            grid_dim,
            block_dim,
            shared_mem_bytes,
            stream,
            attributes: ptr::null_mut(),
            attribute_count: 0,
        }
    }
}

/// `CUlaunchAttribute`: one property of a launch.
///
/// The driver's union of values is 64 bytes; every attribute offered here sets its first words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CUlaunchAttribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

// cuda.h: a 4-byte id padded to 8, then the union, which is aligned to 8 for the pointers in it.
const _: () = assert!(size_of::<CUlaunchAttribute>() == 72);
const _: () = assert!(size_of::<CUlaunchConfig>() == 56);

impl CUlaunchAttribute {
    /// Lets the blocks synchronise as one grid; the launch fails unless all fit on the GPU at once.
    #[must_use]
    pub const fn cooperative(enabled: bool) -> Self {
        Self::new(2, [enabled as u32, 0, 0])
    }

    /// Blocks of a cluster in x, y and z; each must divide the grid.
    #[must_use]
    pub const fn cluster_dimension(blocks: [u32; 3]) -> Self {
        Self::new(4, blocks)
    }

    /// Lets the grid start before the one ahead of it in the stream has ended. The kernel must then
    /// wait with `griddepcontrol.wait` before it touches what that one writes.
    #[must_use]
    pub const fn programmatic_stream_serialization(allowed: bool) -> Self {
        Self::new(6, [allowed as u32, 0, 0])
    }

    const fn new(id: u32, words: [u32; 3]) -> Self {
        let mut value = [0; 16];
        value[0] = words[0];
        value[1] = words[1];
        value[2] = words[2];
        Self { id, padding: 0, value }
    }
}

/// `CUfunction_attribute`, open to values newer than `cust_raw`'s enum.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FunctionAttribute(c_int);

impl FunctionAttribute {
    /// The largest dynamic shared memory a launch may ask for, in bytes. More than 48 KiB has to be
    /// requested here first.
    pub const MAX_DYNAMIC_SHARED_SIZE_BYTES: Self = Self(8);
    /// 1 to allow clusters of more than 8 blocks, which only some GPUs run.
    pub const NON_PORTABLE_CLUSTER_SIZE_ALLOWED: Self = Self(14);
}

impl From<CUfunction_attribute> for FunctionAttribute {
    fn from(attribute: CUfunction_attribute) -> Self {
        Self(attribute as c_int)
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn the_launch_types_lie_in_memory_as_in_cuda_h() {
        assert_eq!(offset_of!(CUlaunchConfig, block_dim), 12);
        assert_eq!(offset_of!(CUlaunchConfig, shared_mem_bytes), 24);
        assert_eq!(offset_of!(CUlaunchConfig, stream), 32);
        assert_eq!(offset_of!(CUlaunchConfig, attributes), 40);
        assert_eq!(offset_of!(CUlaunchConfig, attribute_count), 48);
        assert_eq!(offset_of!(CUlaunchAttribute, value), 8);
        assert_eq!(align_of::<CUlaunchAttribute>(), 8);
    }

    #[test]
    fn attributes_carry_their_number_and_value() {
        let cluster = CUlaunchAttribute::cluster_dimension([2, 1, 1]);
        assert_eq!((cluster.id, &cluster.value[..4]), (4, &[2, 1, 1, 0][..]));
        let cooperative = CUlaunchAttribute::cooperative(true);
        assert_eq!((cooperative.id, cooperative.value[0]), (2, 1));
        let overlapping = CUlaunchAttribute::programmatic_stream_serialization(false);
        assert_eq!((overlapping.id, overlapping.value[0]), (6, 0));
    }

    #[test]
    fn the_shared_memory_attribute_is_that_of_cust_raw() {
        assert_eq!(
            FunctionAttribute::MAX_DYNAMIC_SHARED_SIZE_BYTES,
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.into()
        );
    }
}
