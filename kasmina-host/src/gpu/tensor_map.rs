//! Encodes tensor maps, which tell TMA how a tensor lies in memory.

use std::ptr;

use kasmina_driver::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use kasmina_kernels::abi::{DType, TensorMap};

use super::{driver, failed};
use crate::error::{Error, Result};
use crate::tensor_map::{Promotion, SequenceMap, TensorMapKey};

/// The map of this key: boxes of 64-byte or 128-byte rows, swizzled over as many bytes, zeros
/// beyond the edges.
pub(super) fn encode(key: &TensorMapKey) -> Result<TensorMap> {
    let data_type = match key.dtype {
        DType::F32 if key.rounds_to_tf32 => CUtensorMapDataType::Tfloat32,
        dtype => data_type(dtype)?,
    };
    let [box_columns, _] = key.box_extents;
    let swizzle = match box_columns as usize * key.dtype.size() {
        64 => CUtensorMapSwizzle::Bytes64,
        _ => CUtensorMapSwizzle::Bytes128,
    };
    let promotion = match key.promotion {
        Promotion::Bytes128 => CUtensorMapL2promotion::Bytes128,
        Promotion::Bytes256 => CUtensorMapL2promotion::Bytes256,
    };
    let extents = key.extents.map(u64::from);
    let element_strides = [1u32, 1];
    let mut map = CUtensorMap::default();
    // SAFETY: the driver writes one map and reads two extents, one stride (that of the columns is
    // implied), two box extents and two element strides, all of which outlive the call. It encodes
    // the address without reading from it.
    unsafe {
        driver!(cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            2,
            ptr::with_exposed_provenance_mut(key.address as usize),
            extents.as_ptr(),
            &raw const key.row_stride_bytes,
            key.box_extents.as_ptr(),
            element_strides.as_ptr(),
            CUtensorMapInterleave::None,
            swizzle,
            promotion,
            CUtensorMapFloatOOBfill::Zeros,
        ))
    }
    .map_err(failed)?;
    Ok(TensorMap(map.words))
}

/// The map of sequences, likewise.
pub(crate) fn encode_sequence_map(key: &SequenceMap) -> Result<TensorMap> {
    let data_type = data_type(key.dtype)?;
    let extents = key.extents.map(u64::from);
    let [box_inner, box_outer] = key.boxes;
    let box_extents = [box_inner, box_outer, 1, 1];
    let [inner_step, outer_step] = key.steps;
    let element_strides = [inner_step, outer_step, 1, 1];
    let swizzle = match box_inner as usize * key.dtype.size() {
        _ if !key.swizzled => CUtensorMapSwizzle::None,
        64 => CUtensorMapSwizzle::Bytes64,
        _ => CUtensorMapSwizzle::Bytes128,
    };
    let mut map = CUtensorMap::default();
    // SAFETY: the driver writes one map and reads four extents, three strides (that of the
    // contiguous axis is implied), four box extents and four element strides, all of which outlive
    // the call. It encodes the address without reading from it.
    unsafe {
        driver!(cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            4,
            ptr::with_exposed_provenance_mut(key.address as usize),
            extents.as_ptr(),
            key.strides_bytes.as_ptr(),
            box_extents.as_ptr(),
            element_strides.as_ptr(),
            CUtensorMapInterleave::None,
            swizzle,
            CUtensorMapL2promotion::Bytes256,
            CUtensorMapFloatOOBfill::Zeros,
        ))
    }
    .map_err(failed)?;
    Ok(TensorMap(map.words))
}

fn data_type(dtype: DType) -> Result<CUtensorMapDataType> {
    match dtype {
        DType::F16 => Ok(CUtensorMapDataType::Float16),
        DType::BF16 => Ok(CUtensorMapDataType::Bfloat16),
        DType::F32 => Ok(CUtensorMapDataType::Float32),
        got => Err(Error::DType { op: "tensor map", expected: DType::BF16, got }),
    }
}
