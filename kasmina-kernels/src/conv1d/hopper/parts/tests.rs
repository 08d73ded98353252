use super::*;
use crate::conv1d::portable::{Strided, StridedFilter};
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
fn tiles_of_products_cover_every_position_and_channel_once() {
    let gather = shape(1).forward_gather();
    for cut in SequenceLayout::ALL.into_iter().flat_map(Cut::all) {
        let (extents, channels_are_rows) = (cut.extents(), cut.channels_are_rows);
        let walk = Walk::of_tiles(&gather, [96, 320], extents, BLOCK_K);
        assert_eq!(walk.k_blocks(), 3 * 5);
        let tiles = walk.tiles(channels_are_rows, 3, 2);
        let mut seen = HashSet::new();
        for index in 0..tiles.num_tiles() {
            let (m, n) = tiles.tile(index);
            let (positions, channels) = if channels_are_rows { (n, m) } else { (m, n) };
            let place = walk.place(positions, channels, extents);
            assert!(place.sequence < 3 && place.position < 500);
            assert!(place.group < 2 && place.channel < 320);
            assert!(seen.insert((place.sequence, place.position, place.group, place.channel)));
        }
        let per_group = 500u32.div_ceil(extents[0]) * 320u32.div_ceil(extents[1]);
        assert_eq!(seen.len() as u32, 6 * per_group);
    }
}

#[test]
fn boxes_of_strided_inputs_start_on_multiples_of_the_swizzle_s_period() {
    for cut in SequenceLayout::ALL.into_iter().flat_map(Cut::all) {
        for stride in 1..=8 {
            let gather = shape(stride).forward_gather();
            let walk = Walk::of_tiles(&gather, [96, 320], cut.extents(), BLOCK_K);
            // Rows of 64 bytes, whose swizzle repeats after 512.
            assert!((walk.box_positions * 64).is_multiple_of(512));
            assert!(cut.extents()[0].is_multiple_of(walk.box_positions));
        }
    }
}

#[test]
fn operands_fit_while_pieces_and_parts_can_be_counted() {
    assert!(fits([32, 4096], 3, 1, [256, 256]));
    assert!(fits([1, i32::MAX as u32], 1, 1, [8, 8]));
    assert!(!fits([1, i32::MAX as u32], 1, 1, [9, 8]));
    assert!(!fits([i32::MAX as u32 / 2, 1], 1, 1, [1, 1]));
    assert!(!fits([1, 1], i32::MAX as u32 / 2, 1, [1, 1]));
    assert!(!fits([1, 1], 1 << 16, 1, [1 << 15, 1 << 15]));
}

#[test]
fn tiles_that_most_channels_leave_empty_are_not_chosen() {
    let problem = |channels| Problem::new(&shape(1).forward_gather(), [64, 1], [64, channels]);
    let chosen = |channels, output| select(&problem(channels), output, 132).extents();
    assert_eq!(chosen(64, SequenceLayout::Ncl), [128, 64]);
    assert_eq!(chosen(64, SequenceLayout::Nlc), [128, 64]);
    assert_eq!(chosen(256, SequenceLayout::Ncl), [128, 128]);
    assert_eq!(chosen(256, SequenceLayout::Nlc), [128, 128]);
}

#[test]
fn entry_names_say_what_the_kernel_computes() {
    for row in &KERNELS {
        let expected = std::format!("conv1d_f32_six_{}x{BLOCK_N}x{BLOCK_K}", row.tile.block_m);
        assert_eq!(row.kernel.entry, expected);
        assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
    }
}

#[test]
fn a_workspace_holds_findings_and_parts_without_overlap_and_aligned() {
    let nowhere = Strided { address: 0, batch: 0, channel: 0, position: 0 };
    let split = SplitParams {
        input: nowhere,
        input_parts: 0,
        filter: StridedFilter { address: 0, out: 0, input: 0, tap: 0 },
        filter_parts: 0,
        findings: 0,
        sequences: 2,
        positions: 5,
        groups: 3,
        group_out: 7,
        group_in: 17,
        taps: 4,
        rows_are_out: 1,
        channels_last: 1,
        shift: 0,
        reserved: 0,
    };
    let at = Workspace::new(&split, 300);
    assert_eq!(at.input, 2048);
    // Ten positions of three groups of 17 channels, padded to 32, and three parts.
    assert_eq!(split.input_elements(), 10 * 3 * 32);
    assert_eq!(at.filter, 2048 + 6 * 1024);
    assert_eq!(at.bytes, at.filter + 4 * 3 * 7 * 32 * 6);
}
