//! f32 on tensor cores: the Hopper tier, which is forced.

use kasmina::conv1d::Window;
use kasmina::{Activation, Device, KernelConfig, Padding, SequenceLayout, Tier};
use libtest_mimic::Failed;

use crate::convolution::{Convolution, Shape, Sum};
use crate::convolution_cases::{
    Case, cases, crossed_cases, edge_cases, explicit, short_cases, tensor_core_cases, thinned,
    view_cases,
};
use crate::poison::bits;
use crate::{HopperCheck, Results, compare, require, run};

/// What is claimed of it.
pub(crate) fn claims() -> [(&'static str, HopperCheck); 6] {
    [
        ("conv1d_on_tensor_cores_matches_reference_and_gives_the_same_bits_twice", aligned),
        ("conv1d_of_any_channels_and_lengths_matches_reference", ragged),
        ("conv1d_of_views_matches_reference_and_leaves_gaps_alone", views),
        ("conv1d_errs_by_at_most_3e_7_in_the_relative_l2_norm", accuracy),
        ("conv1d_of_what_parts_cannot_express_has_the_bits_of_plain_f32", repaired),
        ("conv1d_is_left_to_the_portable_tier_where_little_is_multiplied", small),
    ]
}

/// Runs a case with the Hopper tier forced.
fn on_hopper(
    device: &Device,
    convolution: &Convolution<f32>,
    case: &Case,
) -> Result<Results<f32>, String> {
    run(device, &KernelConfig::default().tier(Tier::Hopper), convolution, case)
}

fn compared_twice(device: &Device, cases: impl IntoIterator<Item = Case>) -> Result<(), Failed> {
    for case in cases {
        let told = |fault: String| format!("{case:?}: {fault}");
        let convolution = Convolution::<f32>::random(case.shape).ok_or("the filter fits")?;
        let got = on_hopper(device, &convolution, &case).map_err(told)?;
        compare(&convolution, &case, Tier::Hopper, &got).map_err(told)?;
        let again = on_hopper(device, &convolution, &case).map_err(told)?;
        require(got.bits() == again.bits(), || format!("{case:?}: the bits differ"))?;
    }
    Ok(())
}

fn aligned(device: &Device) -> Result<(), Failed> {
    compared_twice(device, tensor_core_cases())
}

/// Whether it serves a case: not single channels, nor positions further apart than TMA steps.
fn is_served(case: &Case) -> bool {
    let Shape { channels, window, .. } = case.shape;
    let single = window.groups > 1 && channels == [window.groups; 2];
    !single && window.stride <= 8
}

fn ragged(device: &Device) -> Result<(), Failed> {
    let cases = thinned(crossed_cases(), 2).into_iter().chain(short_cases()).chain(edge_cases());
    compared_twice(device, cases.filter(is_served))
}

fn views(device: &Device) -> Result<(), Failed> {
    let gaps = |case| Case { gaps: true, ..case };
    let cases =
        view_cases().into_iter().chain(thinned(tensor_core_cases(), 9).into_iter().map(gaps));
    compared_twice(device, cases.filter(is_served))
}

/// ‖got − expected‖ / ‖expected‖
fn distance(expected: &[Sum], got: &[f32]) -> f64 {
    let square = |value: f64| value * value;
    let error: f64 =
        expected.iter().zip(got).map(|(sum, got)| square(f64::from(*got) - sum.value)).sum();
    (error / expected.iter().map(|sum| square(sum.value)).sum::<f64>()).sqrt()
}

fn accuracy(device: &Device) -> Result<(), Failed> {
    let window = Window { padding: Padding::Same, ..Window::default() };
    let shape = Shape { batch: 1, channels: [256; 2], length: 136, taps: 3, window };
    let convolution = Convolution::<f32>::random(shape).ok_or("the filter fits")?;
    for layout in SequenceLayout::ALL {
        let case = Case {
            layouts: [layout; 4],
            bias: false,
            activation: Activation::None,
            accumulate: false,
            ..cases([shape])[0]
        };
        let got = on_hopper(device, &convolution, &case)?;
        for (name, expected, got) in [
            ("y", &convolution.z, &got.y),
            ("dx", &convolution.dx, &got.dx),
            ("dw", &convolution.dw, &got.dw),
            ("db", &convolution.db, &got.db),
        ] {
            let distance = distance(expected, got);
            println!("{layout:?} {name}: {distance:.2e}");
            require(distance <= 3e-7, || format!("{layout:?} {name}: {distance:e}"))?;
        }
    }
    Ok(())
}

/// Infinities, NaN, what overflows in a product, and what underflows beside large elements; and
/// after each of them operands without, which nothing of it may reach.
fn repaired(device: &Device) -> Result<(), Failed> {
    let window = Window { padding: explicit(1, 2), dilation: 2, ..Window::default() };
    let shapes = [
        Shape { batch: 2, channels: [40, 72], length: 300, taps: 3, window },
        Shape {
            batch: 2,
            channels: [48, 24],
            length: 130,
            taps: 4,
            window: Window { stride: 2, groups: 2, ..window },
        },
    ];
    let portable = KernelConfig::default().tier(Tier::Portable);
    for shape in shapes {
        let clean = Convolution::<f32>::random(shape).ok_or("the filter fits")?;
        for (special, large) in [
            (f32::NAN, 1.0),
            (f32::INFINITY, 1.0),
            (f32::NEG_INFINITY, 1.0),
            (f32::MAX, 1.0),
            (1e20, 1e20),
            (1.234_567e-38, 3e38),
            (3e38, 1.234_567e-38),
        ] {
            let mut operands = [&clean.x, &clean.w, &clean.bias, &clean.dz].map(Vec::clone);
            let [x, w, _, dz] = &mut operands;
            (x[411], dz[97], w[31]) = (special, special, large);
            let mixed = Convolution::of(shape, operands);
            for (number, layout) in SequenceLayout::ALL.into_iter().enumerate() {
                let case = Case {
                    layouts: [layout, SequenceLayout::ALL[1 - number], layout, layout],
                    accumulate: number == 1,
                    ..cases([shape])[0]
                };
                for convolution in [&mixed, &clean] {
                    let got = on_hopper(device, convolution, &case)?;
                    if std::ptr::eq(convolution, &clean) {
                        compare(convolution, &case, Tier::Hopper, &got)?;
                        continue;
                    }
                    let expected = run(device, &portable, convolution, &case)?;
                    for (name, got, expected) in [
                        ("y", &got.y, &expected.y),
                        ("dx", &got.dx, &expected.dx),
                        ("dw", &got.dw, &expected.dw),
                        ("db", &got.db, &expected.db),
                    ] {
                        // Of dz and x alone, without w, small elements meet no large ones.
                        if ["dw", "db"].contains(&name) && special.abs() < 1.0 {
                            continue;
                        }
                        require(bits(got) == bits(expected), || {
                            format!("{special:e}, {large:e}, {case:?}: the bits of {name} differ")
                        })?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// The tier that is chosen where none is forced.
fn small(device: &Device) -> Result<(), Failed> {
    let window = Window { padding: Padding::Same, ..Window::default() };
    for (channels, length, tier) in [([4, 4], 64, Tier::Portable), ([256, 256], 1024, Tier::Hopper)]
    {
        let shape = Shape { batch: 4, channels, length, taps: 3, window };
        let case = cases([shape])[0];
        let [input, out] = channels;
        let zeros = |count: usize| vec![0.0; count];
        let operands = [
            zeros(4 * input * length),
            zeros(out * input * 3),
            zeros(out),
            zeros(4 * out * length),
        ];
        let convolution = Convolution::without_results(length, operands);
        let got = run(device, &KernelConfig::default(), &convolution, &case)?;
        require(got.tiers == [Some(tier); 3], || {
            format!("{channels:?}: served by {:?}", got.tiers)
        })?;
    }
    Ok(())
}
