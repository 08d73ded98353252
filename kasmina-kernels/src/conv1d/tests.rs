use super::*;
use std::vec;
use std::vec::Vec;

const PLAIN: Conv1dExtents = Conv1dExtents {
    batch: 2,
    in_channels: 6,
    out_channels: 4,
    in_length: 10,
    kernel_size: 3,
    stride: 1,
    dilation: 1,
    padding: Padding::Valid,
    groups: 2,
};

#[test]
fn the_output_length_is_the_number_of_places_where_the_filter_fits() {
    for in_length in 1..20 {
        for kernel_size in 1..6 {
            for stride in 1..5 {
                for dilation in 1..4 {
                    for (left, right) in [(0, 0), (1, 0), (2, 3)] {
                        let padding = Padding::Explicit { left, right };
                        let extents = Conv1dExtents {
                            in_length,
                            kernel_size,
                            stride,
                            dilation,
                            padding,
                            ..PLAIN
                        };
                        let padded = in_length + (left + right) as usize;
                        let span = (kernel_size - 1) * dilation + 1;
                        let places =
                            (0..padded).step_by(stride).filter(|l| l + span <= padded).count();
                        match Conv1dShape::new(&extents) {
                            Ok(shape) => assert_eq!(shape.out_length as usize, places),
                            Err(fault) => {
                                let (span, padded) = (span as u64, padded as u64);
                                assert_eq!(fault, Conv1dFault::KernelTooLong { span, padded });
                                assert_eq!(places, 0);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn same_padding_gives_the_input_length_over_the_stride_rounded_up() {
    for in_length in 1..30 {
        for kernel_size in 1..18 {
            for stride in 1..5 {
                for dilation in 1..4 {
                    let padding = Padding::Same;
                    let extents = Conv1dExtents {
                        in_length,
                        kernel_size,
                        stride,
                        dilation,
                        padding,
                        ..PLAIN
                    };
                    let shape = Conv1dShape::new(&extents).unwrap();
                    assert_eq!(shape.out_length as usize, in_length.div_ceil(stride));
                    assert!(shape.padding_right - shape.padding_left <= 1);
                }
            }
        }
    }
}

#[test]
fn zeros_groups_that_do_not_divide_and_overflows_are_faults() {
    let fault = |extents: Conv1dExtents| Conv1dShape::new(&extents).unwrap_err();
    for extents in [
        Conv1dExtents { in_channels: 0, ..PLAIN },
        Conv1dExtents { out_channels: 0, ..PLAIN },
        Conv1dExtents { kernel_size: 0, ..PLAIN },
        Conv1dExtents { stride: 0, ..PLAIN },
        Conv1dExtents { dilation: 0, ..PLAIN },
        Conv1dExtents { groups: 0, ..PLAIN },
    ] {
        assert!(matches!(fault(extents), Conv1dFault::Zero { .. }), "{extents:?}");
    }
    for extents in [Conv1dExtents { groups: 4, ..PLAIN }, Conv1dExtents { groups: 3, ..PLAIN }] {
        assert!(matches!(fault(extents), Conv1dFault::Groups { .. }), "{extents:?}");
    }
    let huge = 1usize << 31;
    let wide = Padding::Explicit { left: u32::MAX, right: u32::MAX };
    for extents in [
        Conv1dExtents { in_length: huge, ..PLAIN },
        Conv1dExtents { batch: huge, ..PLAIN },
        Conv1dExtents { batch: 1 << 20, in_length: 1 << 12, ..PLAIN },
        Conv1dExtents { stride: huge, ..PLAIN },
        Conv1dExtents { dilation: huge, ..PLAIN },
        Conv1dExtents { padding: wide, ..PLAIN },
        Conv1dExtents { in_channels: huge, groups: 1, ..PLAIN },
        Conv1dExtents {
            in_channels: 1 << 20,
            kernel_size: 1 << 12,
            in_length: 1 << 13,
            groups: 1,
            ..PLAIN
        },
    ] {
        assert!(matches!(fault(extents), Conv1dFault::Overflow { .. }), "{extents:?}");
    }
}

/// The pairs (input position, output position, tap) of a gather whose input has `in_length`
/// positions.
fn meetings(gather: &Gather, in_length: u32) -> Vec<(u32, u32, u32)> {
    let mut meetings = vec![];
    for q in 0..gather.out_count {
        for t in 0..gather.taps {
            let at = gather.in_first + (q * gather.in_step) as i32 + (t * gather.tap_step) as i32;
            let tap = gather.first_tap as i32 + t as i32 * gather.tap_stride;
            if (0..in_length as i32).contains(&at) {
                meetings.push((at as u32, gather.out_first + q * gather.out_step, tap as u32));
            }
        }
    }
    meetings.sort_unstable();
    meetings
}

#[test]
fn gathers_of_both_directions_meet_exactly_where_the_definition_does() {
    for in_length in [1, 2, 5, 13] {
        for kernel_size in [1, 2, 3, 5, 8] {
            for stride in [1, 2, 3, 4, 6, 20] {
                for dilation in [1, 2, 3, 4, 6] {
                    for (left, right) in [(0, 0), (3, 1), (40, 7)] {
                        let padding = Padding::Explicit { left, right };
                        let extents = Conv1dExtents {
                            in_length,
                            kernel_size,
                            stride,
                            dilation,
                            padding,
                            ..PLAIN
                        };
                        let Ok(shape) = Conv1dShape::new(&extents) else { continue };
                        let mut defined = vec![];
                        for l in 0..shape.out_length {
                            for k in 0..shape.kernel_size {
                                let j = (l * shape.stride + k * shape.dilation) as i32
                                    - shape.padding_left as i32;
                                if (0..shape.in_length as i32).contains(&j) {
                                    defined.push((j as u32, l, k));
                                }
                            }
                        }
                        defined.sort_unstable();
                        assert_eq!(meetings(&shape.forward_gather(), shape.in_length), defined);

                        let mut written = vec![0; in_length];
                        let mut backward = vec![];
                        for residue in 0..shape.residues() {
                            let gather = shape.dgrad_gather(residue);
                            assert!(gather.taps <= shape.most_dgrad_taps());
                            for q in 0..gather.out_count {
                                written[(gather.out_first + q * gather.out_step) as usize] += 1;
                            }
                            let of_class = meetings(&gather, shape.out_length);
                            backward.extend(of_class.into_iter().map(|(l, j, k)| (j, l, k)));
                        }
                        backward.sort_unstable();
                        assert_eq!(backward, defined, "{shape:?}");
                        assert_eq!(written, vec![1; in_length], "{shape:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn layouts_agree_on_extents_and_strides() {
    let shape = Conv1dShape::new(&PLAIN).unwrap();
    for layout in SequenceLayout::ALL {
        let [_, rows, columns] = layout.extents(2, 6, 10);
        let [batch, channel, position] = layout.strides(6, 10, columns as u64 + 3);
        assert_eq!(batch, (rows * (columns + 3)) as u64);
        assert_eq!(channel.min(position), 1);
        assert_eq!(channel.max(position), columns as u64 + 3);
    }
    for layout in FilterLayout::ALL {
        let [first, second, last] = layout.extents(&shape);
        assert_eq!((first * second * last) as u64, shape.filter_elements());
        let [out, input, tap] = layout.strides(&shape, last as u64);
        let mut seen = vec![false; first * second * last];
        for o in 0..4 {
            for i in 0..3 {
                for k in 0..3 {
                    let at = (o * out + i * input + k * tap) as usize;
                    assert!(!std::mem::replace(&mut seen[at], true));
                }
            }
        }
    }
}
