//! Convolutions that are refused.

use kasmina::conv1d::{Backward, Forward, Gradients, Sequences, Window};
use kasmina::{
    Activation, Conv1dFault, Device, Error, FilterLayout, KernelConfig, Padding, SequenceLayout,
    Tensor, Tier,
};
use libtest_mimic::Failed;

/// What no kernel could compute is refused, and the device works on.
pub(crate) fn bad_input(device: &Device) -> Result<(), Failed> {
    let x = Tensor::<f32>::zeros(device, [2, 6, 10])?;
    let config = KernelConfig::default();
    let run = |x: &Tensor<f32>, w: [usize; 3], window: Window, y: [usize; 3]| {
        let (w, mut y) = (Tensor::zeros(device, w)?, Tensor::zeros(device, y)?);
        let forward = Forward {
            x: Sequences::new(x, SequenceLayout::Ncl),
            w: &w,
            filter_layout: FilterLayout::OutInTap,
            bias: None,
            window,
            activation: Activation::None,
        };
        forward.run(&mut y, SequenceLayout::Ncl, &config)
    };
    let plain = Window::default();
    let fault = |result: Result<Tier, Error>| match result {
        Err(Error::Convolution { fault, .. }) => Ok(fault),
        other => Err(Failed::from(format!("{other:?}"))),
    };
    let fits = |fault: Conv1dFault, expected: &str| {
        require(format!("{fault:?}").starts_with(expected), || format!("{fault:?}, not {expected}"))
    };
    let (w, y) = ([4, 6, 3], [2, 4, 8]);
    fits(fault(run(&x, w, Window { stride: 0, ..plain }, y))?, "Zero")?;
    fits(fault(run(&x, w, Window { dilation: 0, ..plain }, y))?, "Zero")?;
    fits(fault(run(&x, w, Window { groups: 0, ..plain }, y))?, "Zero")?;
    fits(fault(run(&x, [4, 6, 0], plain, y))?, "Zero")?;
    fits(fault(run(&x, w, Window { groups: 4, ..plain }, y))?, "Groups")?;
    fits(fault(run(&x, [5, 3, 3], Window { groups: 2, ..plain }, y))?, "Groups")?;
    fits(fault(run(&x, [4, 6, 11], plain, y))?, "KernelTooLong")?;
    fits(fault(run(&x, w, Window { dilation: 5, ..plain }, y))?, "KernelTooLong")?;
    let huge = Window { dilation: 1 << 31, padding: Padding::Same, ..plain };
    fits(fault(run(&x, w, huge, y))?, "Overflow")?;
    let wide = Window { padding: Padding::Explicit { left: u32::MAX, right: u32::MAX }, ..plain };
    fits(fault(run(&x, w, wide, y))?, "Overflow")?;

    let shape = |result: Result<Tier, Error>, name: &str| match result {
        Err(Error::Shape { operand, .. }) if operand == name => Ok(()),
        other => Err(Failed::from(format!("{name}: {other:?}"))),
    };
    shape(run(&x, [4, 5, 3], plain, y), "w")?;
    shape(run(&x, [4, 6, 3], Window { groups: 2, ..plain }, y), "w")?;
    shape(run(&x, w, plain, [2, 4, 9]), "y")?;
    shape(run(&x, w, plain, [1, 4, 8]), "y")?;
    let matrix = Tensor::<f32>::zeros(device, [6, 10])?;
    shape(run(&matrix, w, plain, y), "x")?;

    let (w, mut dx) = (Tensor::<f32>::zeros(device, w)?, Tensor::zeros(device, [2, 6, 10])?);
    let dz = Tensor::<f32>::zeros(device, y)?;
    let backward = |dz: &Tensor<f32>, gradients: Gradients<'_, f32>| {
        let backward = Backward {
            x: Sequences::new(&x, SequenceLayout::Ncl),
            w: &w,
            filter_layout: FilterLayout::OutInTap,
            dz: Sequences::new(dz, SequenceLayout::Ncl),
            window: plain,
        };
        backward.run(gradients, &config)
    };
    let short = Tensor::<f32>::zeros(device, [2, 4, 7])?;
    let wrong = backward(&short, of_input(&mut dx));
    require(matches!(wrong, Err(Error::Shape { operand: "dz", .. })), || format!("{wrong:?}"))?;
    let mut shared = x.clone();
    let overlap = backward(&dz, of_input(&mut shared));
    require(matches!(overlap, Err(Error::Overlap { operand: "x", .. })), || {
        format!("{overlap:?}")
    })?;
    let mut db = Tensor::<f32>::zeros(device, [5])?;
    let wrong = backward(&dz, Gradients { db: Some(&mut db), ..Gradients::default() });
    require(matches!(wrong, Err(Error::Shape { operand: "db", .. })), || format!("{wrong:?}"))?;
    // None of it left a trace.
    let served = backward(&dz, of_input(&mut dx))?;
    require(served.dx.is_some() && served.dw.is_none(), || format!("{served:?}"))?;
    require(dx.to_vec()?.iter().all(|&value| value == 0.0), || "dx of zeros".to_owned())
}

/// Only the input's gradient is wanted.
fn of_input(dx: &mut Tensor<f32>) -> Gradients<'_, f32> {
    Gradients { dx: Some((dx, SequenceLayout::Ncl)), ..Gradients::default() }
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
