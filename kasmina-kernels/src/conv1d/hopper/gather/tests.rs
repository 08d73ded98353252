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
        let tiles = walk.scheduler(row.output, 3, 2);
        let mut seen = HashSet::new();
        for index in 0..tiles.num_tiles() {
            let (m, n) = tiles.tile(index);
            let (positions, channels) =
                if row.output == SequenceLayout::Nlc { (m, n) } else { (n, m) };
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
        let last = i64::from(MAX_POSITIONS) + 256;
        assert!(i64::from(walk.in_first) + last * i64::from(walk.in_step) < 0);
    }
}

#[test]
fn every_16_bit_type_and_pair_of_layouts_has_a_kernel_and_f32_has_none() {
    let problem = Problem::new(&shape(1).forward_gather(), [1, 1], [8, 8]);
    for input in SequenceLayout::ALL {
        for output in SequenceLayout::ALL {
            for dtype in [DType::F16, DType::BF16] {
                let row = select(dtype, [input, output], &problem, 132).expect("a kernel");
                assert_eq!((row.dtype, row.input, row.output), (dtype, input, output));
            }
            assert!(select(DType::F32, [input, output], &problem, 132).is_none());
        }
    }
}

#[test]
fn entry_names_say_what_the_kernel_serves() {
    for row in KERNELS.iter().chain(&halo::KERNELS) {
        let expected = std::format!(
            "conv1d_{}{}_{}_{}_{}x{}x{BLOCK_K}",
            if row.halo > 0 { "halo_" } else { "" },
            row.dtype,
            row.input.name(),
            row.output.name(),
            row.tile.block_m,
            row.tile.block_n,
        );
        assert_eq!(row.kernel.entry, expected);
        assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
    }
}

/// `[block_m, block_n]` for a pass of stride 1, with channels last and channels first.
fn selected(batch: u32, positions: u32, channels: [u32; 2], taps: u32) -> [[u32; 2]; 2] {
    SequenceLayout::ALL.map(|layout| {
        let [in_channels, out_channels] = channels;
        let problem = Problem {
            batch,
            positions,
            groups: 1,
            in_channels,
            out_channels,
            taps,
            reach: u64::from(taps) - 1,
            in_step: 1,
        };
        let row = select(DType::BF16, [layout; 2], &problem, 132).expect("a kernel");
        [row.tile.block_m, row.tile.block_n]
    })
}

#[test]
fn many_channels_get_the_tile_that_reads_least() {
    assert_eq!(selected(32, 4096, [256, 256], 3), [[128, 256]; 2]);
    assert_eq!(selected(8, 1024, [1024, 1024], 3), [[128, 256]; 2]);
}

#[test]
fn few_channels_get_a_tile_that_is_not_half_empty() {
    let [ncl, nlc] = selected(16, 16384, [64, 64], 7);
    assert_eq!(nlc, [128, 64]);
    assert_eq!(ncl[0], 64);
}

#[test]
fn taps_that_reach_beyond_the_halo_are_refused_channels_first_and_loaded_singly_channels_last() {
    let problem =
        |reach| Problem { reach, ..Problem::new(&shape(1).forward_gather(), [1, 1], [64, 64]) };
    let selected = |layout, reach| select(DType::BF16, [layout; 2], &problem(reach), 132);
    assert!(selected(SequenceLayout::Ncl, 57).is_some());
    assert!(selected(SequenceLayout::Ncl, 58).is_none());
    assert!(selected(SequenceLayout::Nlc, 1 << 20).is_some_and(|row| row.halo == 0));
    // A stride needs boxes that step over positions.
    let strided = Problem::new(&self::shape(2).forward_gather(), [1, 1], [64, 64]);
    let row = select(DType::BF16, [SequenceLayout::Nlc; 2], &strided, 132);
    assert!(row.is_some_and(|row| row.halo == 0));
    assert!(select(DType::BF16, [SequenceLayout::Ncl; 2], &strided, 132).is_none());
}
