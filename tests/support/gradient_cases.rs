//! Backward passes to compare.

use kasmina::{Activation, Tier, WeightLayout};

use super::operand::Placement;
use super::reduced::shortened;

/// One backward pass to compare.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    /// m, n, k: rows, output features, input features.
    pub(crate) shape: [usize; 3],
    pub(crate) layout: WeightLayout,
    pub(crate) activation: Activation,
    /// Whether the pre-activation is given where the output would do.
    pub(crate) pre_activation: bool,
    pub(crate) accumulate: bool,
    pub(crate) placement: Placement,
}

/// Both layouts of each shape; everything else goes round.
pub(crate) fn cases(shapes: impl IntoIterator<Item = [usize; 3]>) -> Vec<Case> {
    let mut number = 0;
    let mut cases = Vec::new();
    for shape in shapes {
        for layout in WeightLayout::ALL {
            cases.push(Case {
                shape,
                layout,
                activation: Activation::ALL[number % Activation::ALL.len()],
                pre_activation: number % 4 < 2,
                accumulate: number % 3 == 0,
                placement: [Placement::Contiguous, Placement::Aligned][number / 2 % 2],
            });
            number += 1;
        }
    }
    cases
}

pub(crate) fn edge_cases() -> Vec<Case> {
    const EDGES: [usize; 10] = [65, 129, 255, 64, 1, 127, 257, 63, 128, 256];
    let of = |i: usize| EDGES[i % EDGES.len()];
    let shapes = (0..20).map(|i| [of(i), of(i + 1 + i / 10), of(i + 4 + i / 10)]).collect();
    cases(shortened(shapes, 2))
}

pub(crate) fn prime_cases() -> Vec<Case> {
    let shapes = vec![
        [2, 3, 5],
        [7, 11, 13],
        [31, 37, 41],
        [61, 67, 71],
        [97, 101, 103],
        [131, 127, 137],
        [509, 31, 17],
        [17, 509, 31],
        [31, 17, 509],
    ];
    cases(shortened(shapes, 1))
}

pub(crate) fn activation_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for layout in WeightLayout::ALL {
        for activation in Activation::ALL {
            for accumulate in [false, true] {
                for pre_activation in [false, true] {
                    let (shape, placement) = ([140, 136, 72], Placement::Contiguous);
                    cases.push(Case {
                        shape,
                        layout,
                        activation,
                        pre_activation,
                        accumulate,
                        placement,
                    });
                }
            }
        }
    }
    shortened(cases, 6)
}

/// Batches that are cut into chunks of rows and into parts, and more tiles than an H200 has
/// multiprocessors.
pub(crate) fn long_cases(tier: Tier) -> Vec<Case> {
    let mut shapes = vec![[4099, 72, 64], [2049, 40, 300], [1537, 264, 130]];
    if tier != Tier::Cpu {
        shapes.extend([[70_001, 16, 8], [129, 1544, 1032], [66, 2312, 2184]]);
    }
    // Three of each in both layouts, so that every shape meets every activation.
    let shapes = shortened(shapes, 1).into_iter().flat_map(|shape| [shape; 3]);
    cases(shapes)
}
