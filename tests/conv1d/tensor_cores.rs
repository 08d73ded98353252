//! What the Hopper tier serves where the GPU has it, against the reference and by bits.

use kasmina::conv1d::Window;
use kasmina::{Device, KernelConfig, Padding, SequenceLayout, Tier};
use libtest_mimic::Failed;

use crate::convolution::{Convolution, Shape};
use crate::convolution_cases::{Case, cases, explicit, shortened, tensor_core_cases};
use crate::poison::Poison;
use crate::{compare, require, run};

/// Compares a case with the reference and its bits with those of a second run; what ran forward,
/// dgrad and wgrad.
fn compared_twice<T: Poison>(device: &Device, case: &Case) -> Result<[Option<Tier>; 3], Failed> {
    let config = KernelConfig::default();
    let told = |fault: String| format!("{case:?}: {fault}");
    let convolution = Convolution::<T>::random(case.shape).ok_or("the filter fits")?;
    let got = run(device, &config, &convolution, case).map_err(told)?;
    compare(&convolution, case, Tier::Hopper, &got).map_err(told)?;
    let again = run(device, &config, &convolution, case).map_err(told)?;
    require(got.bits() == again.bits(), || format!("{case:?}: the bits differ"))?;
    Ok(got.tiers)
}

/// It is the tier that is chosen; what it leaves to the portable tier must be right too.
pub(crate) fn on_tensor_cores<T: Poison>(device: &Device) -> Result<(), Failed> {
    let mut served = [0; 3];
    let cases = tensor_core_cases();
    for case in &cases {
        for (count, tier) in served.iter_mut().zip(compared_twice::<T>(device, case)?) {
            *count += usize::from(tier == Some(Tier::Hopper));
        }
    }
    let enough = served.iter().all(|&count| count * 4 >= cases.len());
    require(enough, || {
        format!(
            "of {} cases, forward, dgrad and wgrad ran {served:?} times on tensor cores",
            cases.len()
        )
    })
}

/// Rows whose vectors of eight fill warps but for one, or need another one for the last, met by the
/// first tap on any element of a vector, vectors before the row too.
pub(crate) fn rows_of_single_channels<T: Poison>(device: &Device) -> Result<(), Failed> {
    let mut shapes = Vec::new();
    for vectors in [17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 289] {
        for taps in 1..=8 {
            for (left, more) in [(0, 0), (taps / 2, 0), (taps + 8, 16), (taps + 19, 24)] {
                // As many positions more as said, so that vectors of the output are whole too.
                let right = taps + more - 1 - left.min(taps + more - 1);
                let padding = explicit(left as u32, right as u32);
                let window = Window { padding, groups: 3, ..Window::default() };
                let length = 8 * vectors;
                shapes.push(Shape { batch: 2, channels: [3; 2], length, taps, window });
            }
        }
    }
    for case in shortened(cases(shapes)) {
        let case = Case { layouts: [SequenceLayout::Ncl; 4], ..case };
        let [forward, dgrad, _] = compared_twice::<T>(device, &case)?;
        let served = [forward, dgrad] == [Some(Tier::Hopper); 2];
        require(served, || format!("{case:?}: served by {forward:?} and {dgrad:?}"))?;
    }
    Ok(())
}

/// Channels-first inputs of which one box holds what all taps of a tile meet, up to the largest
/// dilation of which it does; beyond, filter gradients are left to the portable tier.
pub(crate) fn filter_gradients_of_dilated_taps<T: Poison>(device: &Device) -> Result<(), Failed> {
    for (dilation, served) in [(1, true), (2, true), (11, true), (12, true), (13, false)] {
        let padding = Padding::Same;
        let window = Window { dilation, padding, ..Window::default() };
        let shapes = [[64, 64], [72, 136], [128, 256]].map(|channels| Shape {
            batch: 2,
            channels,
            length: 200,
            taps: 3,
            window,
        });
        for case in cases(shapes) {
            for dz in SequenceLayout::ALL {
                let ncl = SequenceLayout::Ncl;
                let case = Case { layouts: [ncl, ncl, dz, ncl], ..case };
                let [_, _, wgrad] = compared_twice::<T>(device, &case)?;
                let expected = if served { Tier::Hopper } else { Tier::Portable };
                require(wgrad == Some(expected), || format!("{case:?}: served by {wgrad:?}"))?;
            }
        }
    }
    Ok(())
}
