use super::*;
use crate::conv1d::{Conv1dExtents, Conv1dShape, Padding};
use std::collections::HashSet;

fn shape(stride: usize) -> Conv1dShape {
    let extents = Conv1dExtents {
        batch: 3,
        in_channels: 96,
        out_channels: 320,
        in_length: 500,
        kernel_size: 5,
        stride,
        dilation: 2,
        padding: Padding::Same,
        groups: 1,
    };
    Conv1dShape::new(&extents).expect("a shape")
}

#[test]
fn tiles_cover_every_position_and_channel_once() {
    let shape = shape(1);
    for row in KERNELS.iter().chain(&halo::KERNELS) {
        let walk = Walk::new(&shape.forward_gather(), [96, 320], row);
        let tiles = walk.scheduler(row, 3, 2);
        let mut seen = HashSet::new();
        for index in 0..tiles.num_tiles() {
            let (m, n) = tiles.tile(index);
            let (positions, channels) = if row.channels_are_rows() { (n, m) } else { (m, n) };
            let place = walk.place(positions, channels, row.extents());
            assert!(place.sequence < 3 && place.position < 500);
            assert!(place.group < 2 && place.channel < 320);
            assert!(place.position.is_multiple_of(row.extents()[0]));
            assert!(seen.insert((place.sequence, place.position, place.group, place.channel)));
        }
        let per_group = 500u32.div_ceil(row.extents()[0]) * 320u32.div_ceil(row.extents()[1]);
        assert_eq!(seen.len() as u32, 6 * per_group);
    }
}

#[test]
fn a_walk_without_taps_meets_only_zeros() {
    let gather = Gather { taps: 0, ..shape(1).forward_gather() };
    for row in KERNELS.iter().chain(&halo::KERNELS) {
        let walk = Walk::new(&gather, [96, 320], row);
        assert_eq!(walk.taps, 1);
        // The last row of the last tile, at most a box beyond the last position.
        let last = i64::from(MAX_POSITIONS) + i64::from(halo::ROWS) + 256;
        assert!(i64::from(walk.in_first) + last * i64::from(walk.in_step) < 0);
    }
}

#[test]
fn inputs_of_16_bit_types_are_served_channels_first_only_where_taps_are_near() {
    let problem = Problem::new(&shape(1).forward_gather(), [1, 1], [8, 8]);
    let (nlc, ncl) = (SequenceLayout::Nlc, SequenceLayout::Ncl);
    for output in SequenceLayout::ALL {
        for dtype in [DType::F16, DType::BF16] {
            let row = select(dtype, [nlc, output], &problem, 132).expect("a kernel");
            assert_eq!((row.dtype, row.input, row.output), (dtype, nlc, output));
            let near = Problem { reach: u64::from(halo::MAX_REACH_NCL), ..problem };
            let row = select(dtype, [ncl, output], &near, 132).expect("a kernel");
            assert_eq!((row.dtype, row.input, row.output), (dtype, ncl, output));
            let beyond = Problem { reach: near.reach + 1, ..near };
            assert!(select(dtype, [ncl, output], &beyond, 132).is_none());
            let strided = Problem { in_step: 2, ..near };
            assert!(select(dtype, [ncl, output], &strided, 132).is_none());
        }
        assert!(select(DType::F32, [nlc, output], &problem, 132).is_none());
    }
    let far = Problem { in_step: MAX_STEP + 1, ..problem };
    assert!(select(DType::BF16, [nlc; 2], &far, 132).is_none());
}

#[test]
fn entry_names_say_what_the_kernel_serves() {
    for row in &KERNELS {
        let Cut::PerTap { tile, .. } = row.cut else { panic!("a kernel without a halo") };
        let expected = std::format!(
            "conv1d_{}_{}_{}_{}x{}x{BLOCK_K}",
            row.dtype,
            row.input.name(),
            row.output.name(),
            tile.block_m,
            tile.block_n,
        );
        assert_eq!(row.kernel.entry, expected);
        assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
    }
}

/// `[positions, channels]` of a tile, and whether it has a halo, for an output laid out as the input.
fn selected(
    layout: SequenceLayout,
    [batch, positions]: [u32; 2],
    [in_channels, out_channels]: [u32; 2],
    taps: u32,
    dilation: u64,
) -> ([u32; 2], bool) {
    let reach = (u64::from(taps) - 1) * dilation;
    let problem =
        Problem { batch, positions, groups: 1, in_channels, out_channels, taps, reach, in_step: 1 };
    let row = select(DType::BF16, [layout; 2], &problem, 132).expect("a kernel");
    (row.extents(), matches!(row.cut, Cut::Haloed(_)))
}

/// Batch and positions, input and output channels, and taps of the passes that were timed.
const TIMED: [([u32; 2], [u32; 2], u32); 7] = [
    ([32, 4096], [256, 256], 3),
    ([32, 2048], [512, 512], 5),
    ([16, 16384], [64, 64], 7),
    ([64, 8192], [32, 32], 3),
    ([8, 1024], [1024, 1024], 3),
    ([16, 4096], [256, 128], 9),
    ([4, 65536], [128, 128], 3),
];

#[test]
fn a_halo_serves_taps_that_are_near_each_other() {
    let nlc = SequenceLayout::Nlc;
    assert!(selected(nlc, [4, 65536], [128, 128], 3, 8).1);
    assert!(!selected(nlc, [4, 65536], [128, 128], 3, 9).1);
}

/// In µs on an H200, dgrad of channels-last bf16 with a halo, and the best without: 71.3 and 82.9,
/// 207.6 and 225.0, 26.7 and 42.6, 42.0 and 72.7, 66.3 and 69.5, 51.3 and 57.1, 45.1 and 55.5.
#[test]
fn timed_channels_last_shapes_get_a_halo_which_was_fastest() {
    for (extents, channels, taps) in TIMED {
        assert_eq!(selected(SequenceLayout::Nlc, extents, channels, taps, 1), ([256, 64], true));
    }
}

/// In µs on an H200, dgrad of channels-first bf16 with tiles of 128 channels and of 64: 92.5 and
/// 143.2, 224.5 and 262.7, only 64 (33.9), only 64 (44.8), 81.9 and 124.8, 56.0 and 55.9, 58.5 and
/// 84.0.
#[test]
fn timed_channels_first_shapes_get_the_tile_that_was_fastest() {
    let expected = [128, 128, 64, 64, 128, 64, 128];
    for ((extents, channels, taps), expected) in TIMED.into_iter().zip(expected) {
        let got = selected(SequenceLayout::Ncl, extents, channels, taps, 1);
        assert_eq!(got, ([256, expected], true));
    }
}

/// Timed on an H200, each was the fastest of the three without a halo.
#[test]
fn timed_shapes_get_the_tile_without_a_halo_that_was_fastest() {
    let expected =
        [[128, 256], [128, 256], [128, 64], [128, 64], [128, 256], [128, 128], [128, 128]];
    for ((extents, channels, taps), expected) in TIMED.into_iter().zip(expected) {
        // Taps too far from each other for a halo.
        let got = selected(SequenceLayout::Nlc, extents, channels, taps, 100);
        assert_eq!(got, (expected, false));
    }
}
