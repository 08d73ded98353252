use super::*;
use crate::conv1d::{Conv1dExtents, Padding};

fn shape(taps: usize, length: usize, channels: usize) -> Conv1dShape {
    Conv1dShape::new(&Conv1dExtents {
        batch: 2,
        in_channels: channels,
        out_channels: channels,
        in_length: length,
        kernel_size: taps,
        stride: 1,
        dilation: 1,
        padding: Padding::Same,
        groups: channels,
    })
    .unwrap()
}

fn params(row_stride: u64, [position, channel]: [u64; 2], length: u32) -> DepthwiseParams {
    let tensor = Strided { address: 4096, batch: 6 * row_stride, channel, position };
    DepthwiseParams {
        input: tensor,
        output: tensor,
        filter: 4096,
        filter_channel: 3,
        filter_tap: 1,
        bias: 0,
        batch: 2,
        channels: 6,
        in_length: length,
        out_length: length,
        first: -1,
        taps: 3,
        activation: 0,
        log2_row_threads: log2_row_threads(length),
    }
}

#[test]
fn only_few_taps_of_single_channels_take_the_fast_walks() {
    assert!(serves(&shape(8, 64, 6)));
    assert!(!serves(&shape(9, 64, 6)));
    assert!(!serves(&Conv1dShape { stride: 2, ..shape(3, 64, 6) }));
    assert!(!serves(&Conv1dShape { dilation: 2, ..shape(3, 64, 6) }));
    assert!(!serves(&Conv1dShape { groups: 3, ..shape(3, 64, 6) }));
}

#[test]
fn the_walk_over_positions_needs_whole_aligned_vectors() {
    let good = params(64, [1, 64], 64);
    assert!(serves_ncl(&good, DType::BF16) && serves_ncl(&good, DType::F32));
    assert!(!serves_ncl(&params(63, [1, 63], 63), DType::F32));
    assert!(!serves_ncl(&params(68, [1, 68], 64), DType::BF16));
    assert!(serves_ncl(&params(68, [1, 68], 64), DType::F32));
    assert!(!serves_ncl(&params(6, [6, 1], 64), DType::F32));
    let input = Strided { address: 4098, ..good.input };
    assert!(!serves_ncl(&DepthwiseParams { input, ..good }, DType::BF16));
}

#[test]
fn the_walk_over_channels_needs_aligned_pairs() {
    let good = params(6, [6, 1], 63);
    assert!(serves_nlc(&good, DType::BF16));
    assert!(!serves_nlc(&DepthwiseParams { channels: 5, ..good }, DType::BF16));
    assert!(!serves_nlc(&params(7, [7, 1], 63), DType::BF16));
    assert!(!serves_nlc(&params(64, [1, 64], 64), DType::BF16));
}

#[test]
fn blocks_cover_every_row_and_every_run() {
    for length in [8, 16, 2040, 2048, 8192] {
        let params = params(u64::from(length), [1, u64::from(length)], length);
        let rows_per_block = THREADS >> params.log2_row_threads;
        assert!(ncl_blocks(&params) * u64::from(rows_per_block) >= 12, "{length}");
        assert!((ncl_blocks(&params) - 1) * u64::from(rows_per_block) < 12, "{length}");
        let runs = 2 * u64::from(length.div_ceil(POSITIONS));
        assert_eq!(nlc_blocks(&params), runs.div_ceil(8), "{length}");
    }
}

#[test]
fn splits_cover_all_positions_and_none_is_empty() {
    for (length, channels) in [(1, 1), (64, 3), (8192, 1024), (1 << 20, 2)] {
        for along_channels in [false, true] {
            let shape = shape(3, length, channels);
            let [splits, per_split] = wgrad_splits(&shape, along_channels, 132);
            let positions = 2 * length as u64;
            assert!(u64::from(splits) * u64::from(per_split) >= positions);
            assert!(u64::from(splits - 1) * u64::from(per_split) < positions);
        }
    }
}
