use super::plan::gather_values;
use super::*;
use crate::conv1d::{Conv1dExtents, Padding};
use std::collections::HashSet;
use std::vec::Vec;

/// Shapes of every kind: long and short, of many channels and of one, with wide halos.
fn shapes() -> Vec<Conv1dShape> {
    let mut shapes = Vec::new();
    for in_length in [1, 5, 100, 4096] {
        for (in_channels, out_channels, groups) in
            [(1, 1, 1), (6, 4, 2), (256, 256, 1), (64, 1, 1), (1, 70, 1), (40, 80, 40)]
        {
            for kernel_size in [1, 3, 17, 40] {
                for (stride, dilation) in [(1, 1), (2, 1), (1, 5), (7, 3), (1000, 1), (1, 1000)] {
                    for batch in [0, 1, 5] {
                        let extents = Conv1dExtents {
                            batch,
                            in_channels,
                            out_channels,
                            in_length,
                            kernel_size,
                            stride,
                            dilation,
                            padding: Padding::Same,
                            groups,
                        };
                        shapes.push(Conv1dShape::new(&extents).unwrap());
                    }
                }
            }
        }
    }
    shapes
}

#[test]
fn threads_of_a_tile_own_every_result_once() {
    for log2_row_warps in 0..=3 {
        let tile = Tile { log2_row_warps };
        let results: HashSet<_> = (0..THREADS)
            .flat_map(|thread| {
                let (row, column) = tile.thread(thread);
                (0..64).map(move |i| (row + i / 8, column + i % 8 * 32))
            })
            .collect();
        assert_eq!(results.len() as u32, tile.rows() * tile.columns());
        assert!(results.iter().all(|&(row, column)| row < tile.rows() && column < tile.columns()));
        assert_eq!(tile.rows() * tile.columns(), THREADS * 64);
        assert_eq!(1 << tile.log2_rows(), tile.rows());
    }
}

#[test]
fn a_tile_covers_the_rows_unless_there_are_more_than_it_can_have() {
    for rows in 1..200 {
        let tile = Tile::covering(rows);
        assert!(tile.rows() >= rows.min(64));
        assert!(tile.log2_row_warps == 0 || tile.rows() / 2 < rows);
    }
}

#[test]
fn stages_of_gathers_fit_shared_memory_and_cover_the_pass() {
    for shape in shapes() {
        for direction in [Direction::Forward, Direction::Dgrad] {
            let plan = GatherPlan::new(&shape, direction);
            let values = gather_values(plan.tile, plan.span, plan.taps, plan.log2_depth);
            assert!(values <= u64::from(SMEM_VALUES), "{shape:?} {plan:?}");
            let (rows, walks): (_, Vec<_>) = match direction {
                Direction::Forward => (shape.group_out(), [shape.forward_gather()].into()),
                Direction::Dgrad => {
                    let residues = 0..shape.residues();
                    (shape.group_in(), residues.map(|r| shape.dgrad_gather(r)).collect())
                }
            };
            assert_eq!(plan.residues as usize, walks.len());
            assert!(plan.row_tiles * plan.tile.rows() >= rows);
            for walk in walks {
                let columns = plan.column_tiles * plan.tile.columns();
                if plan.flat == 1 {
                    assert!(columns >= walk.out_count * shape.batch, "{shape:?} {plan:?}");
                    assert_eq!((plan.taps, plan.span), (1, plan.tile.columns()));
                } else {
                    assert!(columns >= walk.out_count, "{shape:?} {plan:?}");
                    let last =
                        (plan.tile.columns() - 1) * walk.in_step + (plan.taps - 1) * walk.tap_step;
                    assert!(last < plan.span, "{shape:?} {plan:?}");
                }
            }
        }
    }
}

#[test]
fn stages_of_wgrad_fit_shared_memory_and_cover_the_pass() {
    for shape in shapes() {
        let plan = WgradPlan::new(&shape, 132);
        let positions = 1u32 << plan.log2_depth;
        let values = plan.channels * plan.pitch + positions * (plan.tile.rows() + ROW_PAD);
        assert!(values <= SMEM_VALUES && plan.span <= plan.pitch, "{shape:?} {plan:?}");
        assert!(plan.channels * plan.taps <= plan.tile.columns(), "{shape:?} {plan:?}");
        assert!(plan.row_tiles * plan.tile.rows() >= shape.group_out());
        assert!(plan.channel_tiles * plan.channels >= shape.group_in());
        assert!(plan.tap_tiles * plan.taps >= shape.kernel_size);
        let reached = if plan.flat == 1 {
            positions - 1
        } else {
            (positions - 1) * shape.stride + (plan.taps - 1) * shape.dilation
        };
        assert!(reached < plan.span, "{shape:?} {plan:?}");
        // Every split has a stage, as the kernel's loop expects, and together they have all.
        if shape.batch > 0 {
            assert!((plan.splits - 1) * plan.stages_per_split < plan.stages);
            assert!(plan.splits * plan.stages_per_split >= plan.stages);
            assert!(plan.stages * positions >= shape.out_length * shape.batch);
        }
    }
}

#[test]
fn columns_of_neighbouring_lanes_lie_on_different_banks() {
    for shape in shapes().into_iter().filter(|shape| shape.dilation == 1 && shape.batch == 5) {
        let plan = WgradPlan::new(&shape, 132);
        let banks: Vec<_> = (0..32)
            .filter(|lane| lane / plan.taps < plan.channels)
            .map(|lane| (lane / plan.taps * plan.pitch + lane % plan.taps) % 32)
            .collect();
        let distinct: HashSet<_> = banks.iter().collect();
        assert_eq!(distinct.len(), banks.len(), "{plan:?}");
    }
}

#[test]
fn every_kernel_is_in_the_module_of_its_dtype_under_its_own_name() {
    for dtype in DType::ALL {
        let kernels = kernels(dtype);
        let entries = [
            (kernels.gather.entry, kernels.gather.module, "gather"),
            (kernels.direct.entry, kernels.direct.module, "direct"),
            (kernels.wgrad.entry, kernels.wgrad.module, "wgrad"),
            (kernels.wgrad_final.entry, kernels.wgrad_final.module, "wgrad_final"),
            (kernels.activation_grad.entry, kernels.activation_grad.module, "activation_grad"),
            (kernels.depthwise_ncl.entry, kernels.depthwise_ncl.module, "depthwise_ncl"),
            (kernels.depthwise_nlc.entry, kernels.depthwise_nlc.module, "depthwise_nlc"),
            (kernels.depthwise_wgrad.entry, kernels.depthwise_wgrad.module, "depthwise_wgrad"),
        ];
        for (entry, module, name) in entries {
            assert_eq!(entry, std::format!("conv1d_{dtype}_{name}"));
            assert!(module.entries.contains(&entry));
            assert_eq!(module.name, std::format!("conv1d_{dtype}"));
        }
    }
}
