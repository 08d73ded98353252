//! Where things lie in shared memory: the 128-byte swizzle, wgmma's matrix descriptors and the
//! positions of accumulator registers.

/// Bytes of a row of a 128-byte-swizzled tile: 64 elements of a 16-bit type.
pub const SWIZZLE_ROW_BYTES: u32 = 128;

/// Offset at which TMA places the byte at `(row, byte)` of a tile of 128-byte rows whose base is
/// 1024-aligned: 16-byte chunks are permuted by an XOR with the row modulo 8.
#[must_use]
#[inline(always)]
pub const fn swizzle_128b(row: u32, byte: u32) -> u32 {
    row * SWIZZLE_ROW_BYTES + (byte ^ ((row % 8) * 16))
}

/// Which index of a wgmma operand moves fastest in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Major {
    /// k: rows of 64 k.
    K,
    /// m or n: slabs of 64 m (or n), each `BLOCK_K` rows of 128 bytes.
    MN,
}

/// wgmma's descriptor of a 128-byte-swizzled operand with 64 k per stage (PTX ISA, "Matrix
/// Descriptor Format"): address in bits 0–13, leading offset in 16–29, stride offset in 32–45, all
/// in 16-byte units, and the swizzle mode in 62–63 (1 = 128 bytes).
#[must_use]
#[inline(always)]
pub const fn wgmma_descriptor(address: u32, major: Major) -> u64 {
    match major {
        // The leading offset is not used; the next 8 rows follow after 1024 bytes.
        Major::K => descriptor(address, 1, 16, 1024),
        // The next slab follows after 64 rows; the next 8 k after 1024 bytes.
        Major::MN => descriptor(address, 1, 8192, 1024),
    }
}

/// As that of an MN-major operand, whose slabs overlap: each begins so many rows after the last.
#[must_use]
#[inline(always)]
pub const fn wgmma_descriptor_slabs(address: u32, rows: u32) -> u64 {
    descriptor(address, 1, (rows * SWIZZLE_ROW_BYTES) as u64, 1024)
}

/// As [`wgmma_descriptor`], with 32 k per stage: K-major rows have 64 bytes and a 64-byte swizzle
/// (mode 2), MN-major slabs 32 rows.
#[must_use]
#[inline(always)]
pub const fn wgmma_descriptor_k32(address: u32, major: Major) -> u64 {
    match major {
        Major::K => descriptor(address, 2, 16, 512),
        Major::MN => descriptor(address, 1, 4096, 1024),
    }
}

/// wgmma's descriptor of 16 k by 8 columns without a swizzle: two blocks of 8 columns by 8 k, 128
/// bytes each.
#[must_use]
#[inline(always)]
pub const fn wgmma_descriptor_plain(address: u32) -> u64 {
    descriptor(address, 0, 128, 256)
}

#[inline(always)]
const fn descriptor(address: u32, swizzle: u64, leading_bytes: u64, stride_bytes: u64) -> u64 {
    (swizzle << 62) | ((stride_bytes >> 4) << 32) | ((leading_bytes >> 4) << 16)
        // In a cluster the window of block r starts at r << 24: only 18 bits are the address.
        | ((address & 0x3_FFFF) >> 4) as u64
}

/// What to add to a descriptor to move 16 k along, in 16-byte units.
#[must_use]
pub const fn descriptor_step_k16(major: Major) -> u32 {
    match major {
        Major::K => 32 >> 4,
        Major::MN => (16 * SWIZZLE_ROW_BYTES) >> 4,
    }
}

/// `(row, column)` in the 64-row tile of accumulator `register` of `thread` in its warpgroup (PTX
/// ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
#[must_use]
#[inline(always)]
pub const fn accumulator_position(thread: u32, register: u32) -> (u32, u32) {
    let (warp, lane) = (thread / 32, thread % 32);
    let row = 16 * warp + lane / 4 + 8 * ((register >> 1) & 1);
    let column = 8 * (register >> 2) + 2 * (lane % 4) + (register & 1);
    (row, column)
}

/// Offset, in a 64×64 slab of a 16-bit type with 128-byte swizzle, to which `thread` of a
/// warpgroup points its `stmatrix.x4` for the `group`th 16 columns: the four matrices are then
/// registers 0–1, 2–3, 4–5 and 6–7 of the group, packed in pairs.
#[must_use]
#[inline(always)]
pub const fn stmatrix_offset(thread: u32, group: u32) -> u32 {
    let (warp, lane) = (thread / 32, thread % 32);
    swizzle_128b(16 * warp + lane % 16, (2 * group + lane / 16) * 16)
}

/// As [`stmatrix_offset`] for `stmatrix.x4.trans`, into a slab whose rows are the accumulators'
/// columns: the rows of the slab are then the `group`th 16.
#[must_use]
#[inline(always)]
pub const fn stmatrix_trans_offset(thread: u32, group: u32) -> u32 {
    let (warp, lane) = (thread / 32, thread % 32);
    let (matrix, row) = (lane / 8, lane % 8);
    swizzle_128b(16 * group + 8 * (matrix / 2) + row, (2 * warp + matrix % 2) * 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec;

    #[test]
    fn swizzle_is_a_permutation_of_the_tile() {
        let offsets: HashSet<_> =
            (0..64).flat_map(|row| (0..128).map(move |byte| swizzle_128b(row, byte))).collect();
        assert_eq!(offsets.len(), 64 * 128);
        assert!(offsets.iter().all(|&offset| offset < 64 * 128));
    }

    #[test]
    fn descriptors_equal_the_constants_that_ran_on_hardware() {
        assert_eq!(wgmma_descriptor(0, Major::K), 0x4000_0040_0001_0000);
        assert_eq!(wgmma_descriptor(0, Major::MN), 0x4000_0040_0200_0000);
        assert_eq!(wgmma_descriptor_slabs(0, 64), wgmma_descriptor(0, Major::MN));
        assert_eq!(wgmma_descriptor_slabs(0, 1), 0x4000_0040_0008_0000);
        assert_eq!(wgmma_descriptor(0x0100_0400, Major::K), 0x4000_0040_0001_0040);
        assert_eq!(wgmma_descriptor_k32(0, Major::K), 0x8000_0020_0001_0000);
        assert_eq!(wgmma_descriptor_k32(0x400, Major::MN), 0x4000_0040_0100_0040);
        assert_eq!(descriptor_step_k16(Major::K), 2);
        assert_eq!(descriptor_step_k16(Major::MN), 128);
    }

    #[test]
    fn accumulators_cover_the_tile_once() {
        let positions: HashSet<_> = (0..128)
            .flat_map(|thread| (0..128).map(move |register| accumulator_position(thread, register)))
            .collect();
        assert_eq!(positions.len(), 64 * 256);
        assert!(positions.iter().all(|&(row, column)| row < 64 && column < 256));
    }

    /// Plays `stmatrix` on the CPU: what lands where TMA will look for `(row, column)` must be the
    /// accumulator of that position.
    #[test]
    fn stmatrix_puts_every_accumulator_where_the_tma_store_reads_it() {
        let mut slab = vec![None; 64 * 64];
        for group in 0..4 {
            for warp in 0..4 {
                for matrix in 0..4u32 {
                    for row in 0..8u32 {
                        let address = stmatrix_offset(32 * warp + 8 * matrix + row, group);
                        for element in 0..8u32 {
                            let thread = 32 * warp + row * 4 + element / 2;
                            let register = 8 * group + 2 * matrix + element % 2;
                            slab[(address / 2 + element) as usize] = Some((thread, register));
                        }
                    }
                }
            }
        }
        for row in 0..64 {
            for column in 0..64 {
                let (thread, register) =
                    slab[(swizzle_128b(row, 2 * column) / 2) as usize].expect("written");
                assert_eq!(accumulator_position(thread, register), (row, column));
            }
        }
    }

    /// The same for `stmatrix.trans`, which stores columns of the fragments as rows.
    #[test]
    fn stmatrix_trans_puts_every_accumulator_where_the_tma_store_of_columns_reads_it() {
        let mut slab = vec![None; 64 * 64];
        for group in 0..4 {
            for warp in 0..4 {
                for matrix in 0..4u32 {
                    for column in 0..8u32 {
                        let address = stmatrix_trans_offset(32 * warp + 8 * matrix + column, group);
                        for row in 0..8u32 {
                            let thread = 32 * warp + row * 4 + column / 2;
                            let register = 8 * group + 2 * matrix + column % 2;
                            slab[(address / 2 + row) as usize] = Some((thread, register));
                        }
                    }
                }
            }
        }
        for row in 0..64 {
            for column in 0..64 {
                let (thread, register) =
                    slab[(swizzle_128b(column, 2 * row) / 2) as usize].expect("written");
                assert_eq!(accumulator_position(thread, register), (row, column));
            }
        }
    }

    #[test]
    fn stmatrix_has_no_bank_conflicts() {
        for group in 0..4 {
            for warp in 0..4 {
                // The hardware serves eight lanes, 128 bytes, at a time.
                for phase in 0..4 {
                    for offset in [stmatrix_offset, stmatrix_trans_offset] {
                        let chunks: HashSet<_> = (0..8)
                            .map(|lane| offset(32 * warp + 8 * phase + lane, group) % 128 / 16)
                            .collect();
                        assert_eq!(chunks.len(), 8);
                    }
                }
            }
        }
    }
}
