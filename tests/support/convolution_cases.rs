//! The convolutions that every tier is tried on.

use std::env;

use kasmina::conv1d::Window;
use kasmina::{Activation, FilterLayout, Padding, SequenceLayout};

use super::convolution::Shape;

/// One convolution with how its operands lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) shape: Shape,
    /// Of x, y, dz and dx.
    pub(crate) layouts: [SequenceLayout; 4],
    pub(crate) filter_layout: FilterLayout,
    pub(crate) activation: Activation,
    pub(crate) bias: bool,
    /// Whether rows have gaps between them.
    pub(crate) gaps: bool,
    /// Whether the parameters' gradients are added to what is there.
    pub(crate) accumulate: bool,
}

/// Cases of these shapes whose filter fits; layouts, activation, bias and accumulation go round.
pub(crate) fn cases(shapes: impl IntoIterator<Item = Shape>) -> Vec<Case> {
    let layout = |bit: usize| SequenceLayout::ALL[bit % 2];
    shapes
        .into_iter()
        .filter(|shape| shape.output().is_some())
        .enumerate()
        .map(|(number, shape)| Case {
            shape,
            layouts: [
                layout(number),
                layout(number / 2 + number),
                layout(number / 4),
                layout(number / 8 + number),
            ],
            filter_layout: FilterLayout::ALL[number / 3 % 2],
            activation: Activation::ALL[number % Activation::ALL.len()],
            bias: number % 3 != 0,
            gaps: false,
            accumulate: number % 4 == 1,
        })
        .collect()
}

pub(crate) fn reduced() -> bool {
    env::var_os("KASMINA_TEST_REDUCED").is_some_and(|value| value == "1")
}

/// The list, or every so-manieth of it.
pub(crate) fn thinned<T: Copy>(list: Vec<T>, step: usize) -> Vec<T> {
    list.into_iter().step_by(step).collect()
}

/// The list, or a few of it in a reduced run.
pub(crate) fn shortened<T: Copy>(list: Vec<T>) -> Vec<T> {
    // An odd step meets every value of what goes round in pairs and fours.
    let step = if reduced() { list.len().div_ceil(8) | 1 } else { 1 };
    thinned(list, step)
}

pub(crate) fn explicit(left: u32, right: u32) -> Padding {
    Padding::Explicit { left, right }
}

/// Every stride with every dilation, padding, kernel size and kind of groups; the lengths go round.
pub(crate) fn crossed_cases() -> Vec<Case> {
    const LENGTHS: [usize; 9] = [40, 1, 131, 17, 64, 300, 33, 8, 97];
    const CHANNELS: [([usize; 2], usize); 6] =
        [([5, 7], 1), ([8, 16], 1), ([6, 9], 3), ([4, 4], 4), ([3, 6], 3), ([16, 8], 2)];
    let mut shapes = Vec::new();
    for stride in [1, 2, 3, 5] {
        for dilation in [1, 2, 3] {
            for padding in [Padding::Valid, Padding::Same, explicit(2, 0), explicit(1, 19)] {
                for taps in [1, 2, 3, 4, 5, 7, 8, 9, 12, 17] {
                    let number = shapes.len() + shapes.len() / 9;
                    let (channels, groups) = CHANNELS[number % CHANNELS.len()];
                    let window = Window { stride, dilation, padding, groups };
                    let (batch, length) = (1 + number % 3, LENGTHS[number % LENGTHS.len()]);
                    shapes.push(Shape { batch, channels, length, taps, window });
                }
            }
        }
    }
    shortened(cases(shapes))
}

/// Sequences from one position on, under filters that reach far beyond them.
pub(crate) fn short_cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    for length in [1, 2, 3, 5, 16, 31] {
        for taps in [1, 3, 17] {
            for (stride, dilation) in [(1, 1), (2, 1), (1, 4), (4, 6), (7, 3)] {
                let padding = if taps == 1 { Padding::Valid } else { Padding::Same };
                let window = Window { stride, dilation, padding, groups: 1 };
                shapes.push(Shape { batch: 9, channels: [12, 10], length, taps, window });
            }
        }
    }
    // More padding than input and filter together: results of bias alone, and gradients of none.
    for (left, right) in [(9, 9), (40, 0), (0, 40)] {
        let window = Window { padding: explicit(left, right), ..Window::default() };
        shapes.push(Shape { batch: 2, channels: [3, 4], length: 2, taps: 3, window });
    }
    // Strides beyond the input, and far dilations.
    for (stride, dilation) in [(300, 1), (1, 290), (300, 70), (6, 290)] {
        let window = Window { stride, dilation, padding: explicit(300, 300), groups: 2 };
        shapes.push(Shape { batch: 3, channels: [10, 6], length: 200, taps: 3, window });
    }
    shortened(cases(shapes))
}

/// One off the edges of tiles of 8 to 64 rows, 256 to 2048 columns, and depths of 16.
pub(crate) fn edge_cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    let plain = Window { padding: Padding::Same, ..Window::default() };
    for channels in [[1, 8], [9, 1], [15, 16], [17, 31], [33, 63], [64, 65], [65, 129]] {
        for length in [255, 256, 257] {
            shapes.push(Shape { batch: 2, channels, length, taps: 3, window: plain });
        }
    }
    for length in [2047, 2048, 2049, 4100] {
        shapes.push(Shape { batch: 1, channels: [4, 5], length, taps: 5, window: plain });
        let window = Window { stride: 2, ..plain };
        shapes.push(Shape { batch: 1, channels: [7, 40], length, taps: 4, window });
    }
    for taps in [15, 16, 17, 33] {
        let window = Window { groups: 2, ..plain };
        shapes.push(Shape { batch: 2, channels: [32, 80], length: 100, taps, window });
    }
    // Lengths that split into stages of 32 with one left or missing.
    for length in [31, 32, 33, 63, 65] {
        shapes.push(Shape { batch: 3, channels: [24, 72], length, taps: 2, window: plain });
    }
    shortened(cases(shapes))
}

/// A filter for every channel: the walks over aligned vectors, and what they cannot serve.
pub(crate) fn depthwise_cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    for taps in 1..=9 {
        for (length, channels) in [(64, 6), (8, 64), (72, 70), (1000, 3), (2056, 2), (67, 66)] {
            let left = (taps * 3 / 2) as u32 % 11;
            for padding in [Padding::Same, explicit(left, taps as u32), explicit(0, 16)] {
                let window = Window { padding, groups: channels, ..Window::default() };
                let channels = [channels; 2];
                shapes.push(Shape { batch: 2, channels, length, taps, window });
            }
        }
    }
    for (stride, dilation) in [(2, 1), (1, 2), (3, 4)] {
        let window = Window { stride, dilation, padding: Padding::Same, groups: 34 };
        shapes.push(Shape { batch: 2, channels: [34; 2], length: 300, taps: 11, window });
    }
    let mut cases = cases(shapes);
    for (number, case) in cases.iter_mut().enumerate() {
        // Most with one layout for all, which the fast walks need.
        if number % 5 != 0 {
            case.layouts = [SequenceLayout::ALL[number % 2]; 4];
        }
    }
    shortened(cases)
}

pub(crate) fn view_cases() -> Vec<Case> {
    let cases = thinned(crossed_cases(), 13).into_iter().chain(thinned(depthwise_cases(), 7));
    cases.map(|case| Case { gaps: true, ..case }).collect()
}

/// Channels and lengths that TMA can address, one off the edges of tiles of 64 to 256, with every
/// kind of walk; every pair of layouts.
pub(crate) fn tensor_core_cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    let plain = Window { padding: Padding::Same, ..Window::default() };
    for (channels, lengths) in [
        ([64, 64], [56, 64, 72]),
        ([40, 72], [120, 128, 136]),
        ([256, 128], [248, 256, 264]),
        ([128, 320], [8, 200, 520]),
        ([8, 264], [16, 312, 24]),
    ] {
        for (length, taps) in lengths.into_iter().zip([3, 7, 1]) {
            shapes.push(Shape { batch: 3, channels, length, taps, window: plain });
        }
    }
    for (stride, dilation, taps) in
        [(2, 1, 3), (3, 2, 5), (8, 3, 7), (4, 1, 3), (1, 4, 9), (1, 30, 3)]
    {
        let window = Window { stride, dilation, ..plain };
        shapes.push(Shape { batch: 2, channels: [72, 136], length: 264, taps, window });
        let window = Window { padding: explicit(1, 6), ..window };
        shapes.push(Shape { batch: 2, channels: [64, 32], length: 520, taps, window });
    }
    for (channels, groups) in [([128, 128], 2), ([32, 64], 2), ([384, 64], 4)] {
        let window = Window { groups, ..plain };
        shapes.push(Shape { batch: 2, channels, length: 160, taps: 3, window });
    }
    // More padding than input and filter together, and many steps of positions.
    shapes.push(Shape {
        batch: 2,
        channels: [16, 24],
        length: 8,
        taps: 3,
        window: Window { padding: explicit(40, 6), ..plain },
    });
    shapes.push(Shape { batch: 70, channels: [64, 48], length: 328, taps: 3, window: plain });
    let with_layouts = |(number, case): (usize, Case)| {
        (0..4).map(move |pair: usize| {
            let layout = |bit: usize| SequenceLayout::ALL[bit % 2];
            let (x, y) = (layout(pair), layout(pair / 2));
            Case { layouts: [x, y, layout(pair + number), layout(pair / 2 + number)], ..case }
        })
    };
    let cases: Vec<_> = cases(shapes).into_iter().enumerate().flat_map(with_layouts).collect();
    shortened(cases)
}
