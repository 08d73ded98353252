use std::collections::BTreeSet;
use std::vec::Vec;

use super::*;

const MULTIPROCESSORS: u32 = 132;

/// Where the eight lanes that the hardware serves together read 16 bytes, for all such groups.
fn groups(place: impl Fn(u32) -> u32) -> Vec<BTreeSet<u32>> {
    (0..4)
        .map(|group| (8 * group..8 * group + 8).map(|lane| place(lane) / 16 % 8).collect())
        .collect()
}

fn meet_on_no_bank(place: impl Fn(u32) -> u32) {
    for banks in groups(place) {
        assert_eq!(banks.len(), 8);
    }
}

#[test]
fn fragments_are_read_without_bank_conflicts() {
    for extent in [WARP_M, WARP_N] {
        for row in 0..extent / 8 {
            for k16 in 0..2 {
                meet_on_no_bank(|lane| {
                    let (g, t) = (lane / 4, lane % 4);
                    k_major_place(extent, extent / 8 * g + row, 2 * t + k16)
                });
            }
        }
        for k in 0..8 {
            for half in 0..extent / 32 {
                meet_on_no_bank(|lane| {
                    let (g, t) = (lane / 4, lane % 4);
                    mn_major_place(extent, 8 * t + k, extent / 32 * g + half)
                });
            }
        }
    }
}

#[test]
fn every_piece_of_a_stage_has_a_place_of_its_own() {
    for extent in [WARP_M, WARP_N] {
        let rows = (0..extent).flat_map(|row| (0..8).map(move |chunk| (row, chunk)));
        let places: BTreeSet<u32> =
            rows.map(|(row, chunk)| k_major_place(extent, row, chunk)).collect();
        assert_eq!(places, (0..extent * 8).map(|piece| piece * 16).collect());
        let rows = (0..BLOCK_K).flat_map(|k| (0..extent / 4).map(move |chunk| (k, chunk)));
        let places: BTreeSet<u32> =
            rows.map(|(k, chunk)| mn_major_place(extent, k, chunk)).collect();
        assert_eq!(places, (0..extent * 8).map(|piece| piece * 16).collect());
    }
}

#[test]
fn elements_of_rows_longer_than_four_gigabytes_are_found() {
    assert_eq!(row_offset(0, 15), 240);
    assert_eq!(row_offset(1 << 30, 1), (1 << 32) + 16);
    assert_eq!(row_offset(u32::MAX - 31, 7), 4 * (u64::from(u32::MAX) - 3));
}

#[test]
fn sums_of_a_tile_have_places_of_their_own_without_bank_conflicts() {
    for row in &KERNELS {
        let tile = row.tile;
        let chunks = tile.block_n() / 4;
        let all = (0..tile.block_m()).flat_map(|row| (0..chunks).map(move |chunk| (row, chunk)));
        let places: BTreeSet<u32> = all.map(|(row, chunk)| sums_place(tile, row, chunk)).collect();
        assert_eq!(places, (0..tile.sums_bytes() / 16).map(|piece| piece * 16).collect());
        // As lanes put them, and as neighbouring threads read them.
        for four in 0..4 {
            for i in 0..4 {
                meet_on_no_bank(|lane| {
                    let (g, t) = (lane / 4, lane % 4);
                    sums_place(tile, 4 * g + i, 4 * t + four)
                });
            }
        }
        meet_on_no_bank(|lane| sums_place(tile, lane / chunks, lane % chunks));
    }
}

#[test]
fn threads_of_a_slice_load_whole_rows_of_a_stage() {
    for row in &KERNELS {
        let tile = row.tile;
        let threads = tile.warps_m * tile.warps_n * 32;
        for (shares, extent) in [(tile.warps_m, WARP_M), (tile.warps_n, WARP_N)] {
            for per_row in [BLOCK_K / 4, shares * extent / 4] {
                assert!(threads.is_multiple_of(per_row), "{tile:?}");
            }
            assert!((shares * extent * BLOCK_K / 4).is_multiple_of(threads), "{tile:?}");
        }
    }
}

#[test]
fn blocks_that_share_a_tile_do_each_step_of_k_once() {
    for row in &KERNELS {
        for k in [1, 31, 32, 33, 64, 65, 100, 4096, u32::MAX] {
            let mut next = 0;
            for rank in 0..row.tile.split_k {
                let (first, end) = row.tile.steps(rank, k);
                assert_eq!(first, next);
                assert!(end >= first);
                next = end;
            }
            assert_eq!(next, k.div_ceil(BLOCK_K));
        }
    }
}

#[test]
fn every_layout_has_a_kernel_for_every_tile_and_number_of_blocks() {
    let tiles = |x_layout, layout| -> Vec<_> {
        of_layouts(x_layout, layout).map(|row| (row.tile.extents(), row.tile.split_k)).collect()
    };
    let of_forward = tiles(InputLayout::Plain, WeightLayout::InOut);
    assert_eq!(of_forward, tiles(InputLayout::Plain, WeightLayout::OutIn));
    for (tile, split_k) in of_forward {
        let forced = Forced { tile: Some(tile), split_k: Some(split_k), ..Forced::default() };
        for layout in WeightLayout::ALL {
            assert!(exists(InputLayout::Plain, layout, forced));
            let row = select(InputLayout::Plain, layout, [1; 3], MULTIPROCESSORS, forced);
            let row = row.expect("a kernel");
            assert_eq!((row.tile.extents(), row.tile.split_k, row.layout), (tile, split_k, layout));
        }
    }
    let other = Forced { tile: Some([128, 256]), ..Forced::default() };
    assert!(!exists(InputLayout::Plain, WeightLayout::InOut, other));
}

/// The tile and the blocks that share one; `None` where parts are made before.
fn chosen(layout: WeightLayout, shape: [u32; 3]) -> Option<([u32; 2], u32)> {
    let row = select(InputLayout::Plain, layout, shape, MULTIPROCESSORS, Forced::default());
    let row = row.filter(|row| beats_split(row, shape, MULTIPROCESSORS));
    row.map(|row| (row.tile.extents(), row.tile.split_k))
}

#[test]
fn what_was_fastest_on_an_h200_is_chosen() {
    for layout in WeightLayout::ALL {
        for (shape, expected) in [
            ([256; 3], Some(([32, 64], 1))),
            ([512; 3], Some(([32, 64], 1))),
            ([32, 4096, 4096], Some(([32, 64], 2))),
            ([1, 4096, 4096], Some(([32, 64], 2))),
            ([128, 4096, 4096], Some(([64, 64], 1))),
            ([1000; 3], None),
            ([1024; 3], None),
            ([2048; 3], None),
            ([8192, 1024, 256], None),
        ] {
            assert_eq!(chosen(layout, shape), expected, "{layout:?} {shape:?}");
        }
    }
}

#[test]
fn plain_f32_is_taken_where_k_is_small() {
    let pays = |shape| {
        let forced = Forced::default();
        let row = select(InputLayout::Plain, WeightLayout::InOut, shape, MULTIPROCESSORS, forced);
        pays(row.expect("a kernel"), shape, MULTIPROCESSORS)
    };
    assert!(pays([40, 64, 48]) && pays([1, 1, 4096]) && pays([512; 3]));
    assert!(!pays([40, 64, 16]) && !pays([1; 3]) && !pays([1024, 1024, 31]));
}
