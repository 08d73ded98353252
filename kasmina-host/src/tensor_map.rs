//! Tensor maps that were encoded before, by what they describe.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::{DType, TensorMap};

use crate::error::Result as KasminaResult;

/// What a tensor map of a row-major matrix describes. Columns come before rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorMapKey {
    pub(crate) address: u64,
    pub(crate) row_stride_bytes: u64,
    pub(crate) extents: [u32; 2],
    pub(crate) box_extents: [u32; 2],
    pub(crate) dtype: DType,
    /// Whether f32 is rounded to TF32 on its way into shared memory.
    pub(crate) rounds_to_tf32: bool,
    pub(crate) promotion: Promotion,
}

/// How much a load brings into the L2 cache at least, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Promotion {
    /// A line, and so nothing that was not asked for.
    Bytes128,
    /// Two lines.
    #[default]
    Bytes256,
}

impl TensorMapKey {
    /// The same with this promotion.
    pub(crate) const fn promoted(self, promotion: Promotion) -> Self {
        Self { promotion, ..self }
    }

    /// Where in the table it goes. Addresses and strides are multiples of 16 bytes and usually of
    /// more, so their upper bits must reach the lower ones.
    const fn slot(&self) -> usize {
        // Odd constants of high weight (from SplitMix64); the top bits of a product depend on all.
        let mut hash = self.address.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        hash ^= self.row_stride_bytes.wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let [columns, rows] = self.extents;
        hash ^= (columns as u64 | (rows as u64) << 32).wrapping_mul(0x94D0_49BB_1331_11EB);
        let [box_columns, box_rows] = self.box_extents;
        hash ^= box_columns as u64 | (box_rows as u64) << 16 | (self.dtype as u64) << 32;
        hash ^= (self.promotion as u64) << 40 | (self.rounds_to_tf32 as u64) << 48;
        (hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - SLOT_BITS)) as usize
    }
}

/// What a tensor map of sequences describes: four axes, the contiguous one first. Such maps are
/// encoded anew for every call, which takes about 0.1 µs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SequenceMap {
    pub(crate) address: u64,
    pub(crate) extents: [u32; 4],
    /// From index to index of the outer three axes.
    pub(crate) strides_bytes: [u64; 3],
    /// Extents of a box on the inner two axes, with what it steps over; 1 on the others.
    pub(crate) boxes: [u32; 2],
    /// Steps inside a box on the inner two axes.
    pub(crate) steps: [u32; 2],
    pub(crate) dtype: DType,
    /// Whether rows of a box, of 64 or 128 bytes, are swizzled over so many; else they follow each
    /// other.
    pub(crate) swizzled: bool,
}

impl SequenceMap {
    /// The map, with zeros beyond the edges.
    pub(crate) fn encode(&self) -> KasminaResult<TensorMap> {
        crate::gpu::encode_sequence_map(self)
    }
}

const SLOT_BITS: u32 = 8;
const NUM_SLOTS: usize = 1 << SLOT_BITS;

/// A table with one place for each hash: a new entry replaces the old one there, so it never grows.
///
/// An entry stays right when its memory is freed, because it says nothing but its key.
pub(crate) struct TensorMapCache {
    slots: Vec<Option<(TensorMapKey, TensorMap)>>,
}

impl TensorMapCache {
    pub(crate) fn new() -> Self {
        Self { slots: vec![None; NUM_SLOTS] }
    }

    /// The map of this key, encoded now if it is not in the table. A failure leaves no entry.
    pub(crate) fn get_or_encode<E>(
        &mut self,
        key: &TensorMapKey,
        encode: impl FnOnce(&TensorMapKey) -> Result<TensorMap, E>,
    ) -> Result<TensorMap, E> {
        let slot = &mut self.slots[key.slot()];
        if let Some((held, map)) = slot
            && held == key
        {
            return Ok(*map);
        }
        let map = encode(key)?;
        *slot = Some((*key, map));
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const KEY: TensorMapKey = TensorMapKey {
        address: 0x7f00_0000_0000,
        row_stride_bytes: 8192,
        extents: [4096, 1024],
        box_extents: [64, 128],
        dtype: DType::BF16,
        rounds_to_tf32: false,
        promotion: Promotion::Bytes256,
    };

    fn encode(key: &TensorMapKey) -> Result<TensorMap, ()> {
        Ok(TensorMap([key.address; 16]))
    }

    #[test]
    fn a_map_is_encoded_once_while_it_stays_in_the_table() {
        let mut cache = TensorMapCache::new();
        assert_eq!(cache.get_or_encode(&KEY, encode), encode(&KEY));
        assert_eq!(cache.get_or_encode(&KEY, |_| Err(())), encode(&KEY));
    }

    #[test]
    fn keys_that_differ_in_any_field_get_their_own_map() {
        let others = [
            TensorMapKey { address: KEY.address + 16, ..KEY },
            TensorMapKey { row_stride_bytes: 8208, ..KEY },
            TensorMapKey { extents: [1024, 4096], ..KEY },
            TensorMapKey { box_extents: [64, 64], ..KEY },
            TensorMapKey { dtype: DType::F16, ..KEY },
            TensorMapKey { rounds_to_tf32: true, ..KEY },
            KEY.promoted(Promotion::Bytes128),
        ];
        let mut cache = TensorMapCache::new();
        cache.get_or_encode(&KEY, encode).unwrap();
        for other in others {
            let fresh = TensorMap([1; 16]);
            assert_eq!(cache.get_or_encode(&other, |_| Ok::<_, ()>(fresh)), Ok(fresh));
        }
    }

    #[test]
    fn a_map_that_cannot_be_encoded_is_not_remembered() {
        let mut cache = TensorMapCache::new();
        assert_eq!(cache.get_or_encode(&KEY, |_| Err(())), Err(()));
        assert_eq!(cache.get_or_encode(&KEY, encode), encode(&KEY));
    }

    #[test]
    fn the_table_is_bounded_and_holds_any_number_of_keys_correctly() {
        let mut cache = TensorMapCache::new();
        for index in 0..10_000 {
            let key = TensorMapKey { address: KEY.address + index * 2048, ..KEY };
            assert_eq!(cache.get_or_encode(&key, encode), encode(&key));
        }
        assert_eq!(cache.slots.len(), NUM_SLOTS);
    }

    #[test]
    fn blocks_at_regular_distances_spread_over_the_table() {
        for step in [512, 1 << 20, 2 << 20, 32 << 20] {
            let slots: HashSet<_> = (0..128)
                .map(|index| TensorMapKey { address: KEY.address + index * step, ..KEY }.slot())
                .collect();
            // 128 random keys fill 101 of 256 places on average.
            assert!(slots.len() >= 80, "step {step}: {} slots", slots.len());
        }
    }
}
