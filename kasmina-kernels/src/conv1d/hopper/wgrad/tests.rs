use super::*;
use crate::conv1d::hopper::gather::halo::piece_in_tile;
use crate::conv1d::{Conv1dExtents, Padding};
use crate::smem_layout::swizzle_128b;
use std::collections::{HashMap, HashSet};
use std::vec;

fn shape(channels: [usize; 2], kernel_size: usize, groups: usize) -> Conv1dShape {
    let extents = Conv1dExtents {
        batch: 3,
        in_channels: channels[0],
        out_channels: channels[1],
        in_length: 500,
        kernel_size,
        stride: 1,
        dilation: 1,
        padding: Padding::Same,
        groups,
    };
    Conv1dShape::new(&extents).expect("a shape")
}

#[test]
fn parts_cover_every_step_once_and_find_the_slots_that_are_summed() {
    for (tiles, k_blocks, parts) in
        [(1, 1, 132), (6, 2048, 132), (40, 1024, 132), (96, 3, 7), (7, 1, 132), (3, 50, 1)]
    {
        let split = Split::new(tiles, k_blocks, parts).expect("few steps");
        assert!(split.num_parts() <= parts);
        let mut steps = vec![0; (tiles * k_blocks) as usize];
        let mut slots = HashMap::new();
        for part in 0..split.num_parts() {
            let (mut step, end) = split.range(part);
            assert!(step < end);
            while step < end {
                let segment = split.segment(part, step, end);
                assert!(segment.count > 0 && segment.slot < split.num_slots());
                assert!(slots.insert(segment.slot, segment.tile).is_none());
                for index in 0..segment.count {
                    steps[(segment.tile * k_blocks + segment.first + index) as usize] += 1;
                }
                step = segment.next;
            }
        }
        assert!(steps.iter().all(|&visits| visits == 1));
        let mut summed = HashMap::new();
        for tile in 0..tiles {
            let (first, count) = split.slots(tile);
            summed.extend((first..first + count).map(|slot| (slot, tile)));
        }
        assert_eq!(summed, slots);
    }
}

#[test]
fn steps_that_cannot_be_counted_are_refused() {
    assert!(Split::new(1 << 15, 1 << 15, 132).is_none());
    assert!(Split::new(1 << 14, 1 << 15, 132).is_some());
}

#[test]
fn tiles_that_fill_the_gpu_with_whole_parts_have_parts_of_their_own() {
    let split = |tiles, k_blocks| Split::new(tiles, k_blocks, 132).expect("few steps");
    for (tiles, k_blocks, per_part) in [(6, 2048, 94), (40, 1024, 342), (2, 4096, 63)] {
        assert_eq!(split(tiles, k_blocks).per_part, per_part);
        assert_eq!(split(tiles, k_blocks).tile_steps, k_blocks.next_multiple_of(per_part));
    }
    // 96 blocks of 132 would be idle for more than a quarter of the time.
    assert_eq!(split(96, 128).tile_steps, 128);
    assert_eq!(split(96, 128).per_part, 94);
}

#[test]
fn every_element_of_the_filter_has_a_place_of_its_own() {
    for (channels, taps, groups) in [([96, 200], 3, 1), ([32, 64], 5, 2), ([512, 256], 1, 1)] {
        let shape = shape(channels, taps, groups);
        for row in &KERNELS {
            let walk = Walk::new(&shape, row);
            let mut seen = HashSet::new();
            for channel in 0..shape.group_in() {
                for tap in 0..shape.kernel_size {
                    let (tile, column) = walk.column(channel, tap, row.tile.block_n);
                    assert!(tile < walk.tiles_n && column < row.tile.block_n);
                    assert!(seen.insert((tile, column)));
                }
            }
            for tile in 0..shape.groups * walk.tiles_m * walk.tiles_n {
                let place = walk.place(tile);
                assert!(place.group < shape.groups && place.row < walk.tiles_m);
                assert_eq!(walk.tile(place), tile);
            }
        }
    }
}

#[test]
fn few_output_channels_get_the_low_tile_and_many_the_tall_one() {
    let layouts = [SequenceLayout::Ncl; 2];
    let block_m = |channels| {
        let row = select(DType::BF16, layouts, &shape(channels, 3, 1)).expect("a kernel");
        row.tile.block_m
    };
    assert_eq!(block_m([32, 32]), 64);
    assert_eq!(block_m([256, 256]), 128);
}

#[test]
fn every_16_bit_type_and_pair_of_layouts_has_a_kernel_and_f32_has_none() {
    let shape = shape([8, 8], 3, 1);
    for dz in SequenceLayout::ALL {
        for x in SequenceLayout::ALL {
            for dtype in [DType::F16, DType::BF16] {
                let row = select(dtype, [dz, x], &shape).expect("a kernel");
                assert_eq!((row.dtype, row.dz, row.x), (dtype, dz, x));
            }
            assert!(select(DType::F32, [dz, x], &shape).is_none());
        }
    }
}

#[test]
fn entry_names_say_what_the_kernel_serves() {
    for row in &KERNELS {
        let expected = std::format!(
            "conv1d_wgrad_{}{}_{}_{}_{}x{}x{BLOCK_K}",
            if row.tile_taps > 0 { "taps_" } else { "" },
            row.dtype,
            row.dz.name(),
            row.x.name(),
            row.tile.block_m,
            row.tile.block_n,
        );
        assert_eq!(row.kernel.entry, expected);
        assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
    }
}

#[test]
fn taps_that_are_near_each_other_share_boxes_where_that_wastes_few_columns() {
    let tile_taps = |channels, taps| {
        let layouts = [SequenceLayout::Nlc; 2];
        select(DType::BF16, layouts, &shape(channels, taps, 1)).expect("a kernel").tile_taps
    };
    assert_eq!(tile_taps([256, 256], 3), 3);
    assert_eq!(tile_taps([64, 64], 7), 4);
    assert_eq!(tile_taps([128, 256], 9), 3);
    // Two tiles of three taps are more than five slabs of four.
    assert_eq!(tile_taps([512, 512], 5), 0);
    assert_eq!(tile_taps([512, 512], 1), 0);
}

#[test]
fn boxes_that_taps_share_hold_what_the_last_of_them_meets() {
    for row in KERNELS.iter().filter(|row| row.tile_taps > 0) {
        assert_eq!(row.tile.block_n, row.tile_taps * SLAB_N);
        for dilation in 1..40 {
            let shape = Conv1dShape { dilation, ..shape([64, 64], 5, 1) };
            // A tile that is transposed may begin seven positions before the first.
            let lead = if row.transposes() { 7 } else { 0 };
            let needed = BLOCK_K + lead + (row.tile_taps - 1) * dilation;
            assert_eq!(row.serves(&shape), needed <= HALO_ROWS);
            if row.serves(&shape) {
                let rows = Walk::new(&shape, row).box_positions;
                assert!((needed..=HALO_ROWS).contains(&rows) && rows.is_multiple_of(8));
                let expected =
                    if row.transposes() { [raw_positions(rows), SLAB_N] } else { [SLAB_N, rows] };
                assert_eq!(row.boxes([1, dilation])[1], expected);
            }
        }
        let strided = Conv1dShape { stride: 2, ..shape([64, 64], 5, 1) };
        assert!(!row.serves(&strided));
    }
}

/// Plays TMA, `ldmatrix.trans` and `stmatrix` on the CPU: each position must hold its 64 channels
/// where wgmma looks for them.
#[test]
fn raw_boxes_become_tiles_with_positions_as_rows() {
    for rows in [72, 80, HALO_ROWS] {
        let positions = raw_positions(rows);
        assert!(positions * SLAB_N * 2 <= RAW_BYTES);
        let mut tile = vec![u32::MAX; (rows * SLAB_N) as usize];
        for piece in 0..rows / 4 {
            for matrix in 0..4 {
                let banks: HashSet<_> = (8 * matrix..8 * matrix + 8)
                    .map(|lane| piece_in_raw(piece, lane, positions) % 128 / 16)
                    .collect();
                assert_eq!(banks.len(), 8);
                for (row, column) in (0..8).flat_map(|row| (0..8).map(move |column| (row, column)))
                {
                    // Transposed on the way: row and column change places.
                    let from = piece_in_raw(piece, 8 * matrix + column, positions) / 2 + row;
                    let to = piece_in_tile(piece, 8 * matrix + row) / 2 + column;
                    tile[to as usize] = (from / positions) << 16 | (from % positions);
                }
            }
        }
        for (position, channel) in (0..rows).flat_map(|p| (0..SLAB_N).map(move |c| (p, c))) {
            let place = swizzle_128b(position, channel * 2) / 2;
            assert_eq!(tile[place as usize], channel << 16 | position);
        }
    }
}

#[test]
fn channels_first_taps_meet_whole_pieces_or_are_transposed() {
    let plain = KERNELS.iter().find(|row| row.x == SequenceLayout::Ncl && row.tile_taps == 0);
    let serves = |taps, dilation, padding_left| {
        let shape = Conv1dShape { dilation, padding_left, ..shape([64, 64], taps, 1) };
        plain.expect("a kernel").serves(&shape)
    };
    assert!(serves(1, 1, 0) && serves(3, 8, 16));
    assert!(!serves(3, 1, 0) && !serves(1, 1, 1));
}

#[cfg(feature = "ptx")]
#[test]
fn operands_are_transposed_as_their_layouts_say() {
    for row in &KERNELS {
        let [dz, x] = [row.dz, row.x].map(|layout| layout == SequenceLayout::Nlc);
        let [dz, x] = [dz, x || row.transposes()].map(u32::from);
        let expected = std::format!(", 1, 1, {dz}, {x};");
        let ptx = row.kernel.module.ptx();
        let products = ptx.lines().filter(|line| line.contains("wgmma.mma_async"));
        let ends: vec::Vec<_> = products.map(|line| line.ends_with(&expected)).collect();
        assert_eq!(ends, [true; 4], "{}", row.kernel.entry);
    }
}
