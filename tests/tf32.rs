//! f32 in TF32 on Hopper's tensor cores.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes a list short enough for
//! compute-sanitizer.
//!
//! # Tolerance
//! Let `A = Σ |x·w|` over the k products of an element. Rounding to 10 bits of fraction, to nearest,
//! changes a factor by at most 2⁻¹¹ of itself and a product by 2⁻¹⁰ + 2⁻²². Tensor cores add eight
//! products at a time to the sum, cutting off below the 23rd bit of the largest: each time an error
//! of at most 2⁻²² of what there is, itself at most `A`. Then come the blocks that share a tile,
//! the bias, the activation, whose slope is at most 1.13, and its own roundings:
//!
//! ```text
//! sum = (2⁻¹⁰ + 2⁻²² + (⌈k / 8⌉ + 8)·2⁻²²)·(A + |b|)
//! tolerance = 1.13·sum + 2⁻²⁰·(|S| + |act(S)|)
//! ```
//! Operands that TF32 holds exactly lose nothing: for them the first two terms fall away.

#[path = "support/activation.rs"]
mod activation;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/operand.rs"]
mod operand;
#[path = "support/poison.rs"]
mod poison;
#[path = "support/random.rs"]
mod random;
#[path = "support/reduced.rs"]
mod reduced;

use std::process::ExitCode;

use activation::apply;
use gpu::Gpu;
use kasmina::{
    Activation, Device, Error, F32Products, KernelConfig, LinearConfig, Obstacle, Tensor, Tier,
    WeightLayout, gemm,
};
use libtest_mimic::{Arguments, Failed};
use operand::{Placed, Placement, bits};
use random::{Random, seed};
use reduced::shortened;

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    let lacking = capability.is_some_and(|gpu| !Tier::Hopper.runs_on(gpu.major, gpu.minor));
    let mut trials = Vec::new();
    if !lacking {
        trials.extend([
            gpu.trial("tf32_at_tile_edges_matches_reference", |device| {
                each(device, &tf32(), &edge_shapes())
            }),
            gpu.trial("tf32_with_ragged_k_matches_reference", |device| {
                let depths = vec![1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 257, 1000];
                let shapes: Vec<_> =
                    shortened(depths, 3).into_iter().map(|k| [130, 264, k]).collect();
                each(device, &tf32(), &shapes)
            }),
            gpu.trial("tf32_with_prime_and_thin_extents_matches_reference", |device| {
                let shapes = vec![
                    [61, 67, 71],
                    [2, 3, 5],
                    [251, 263, 257],
                    [509, 31, 17],
                    [17, 509, 31],
                    [1, 1, 4096],
                    [1, 2048, 64],
                    [2048, 1, 33],
                    [3, 1000, 1],
                ];
                each(device, &tf32(), &shortened(shapes, 2))
            }),
            gpu.trial("tf32_with_every_tile_matches_reference", every_tile),
            gpu.trial("tf32_loses_nothing_of_operands_that_it_holds", exact),
            gpu.trial("operands_are_rounded_to_the_nearest_tf32", rounded),
            gpu.trial("tf32_propagates_nan_and_infinities", non_finite),
            gpu.trial("tf32_gives_the_same_bits_twice_and_on_another_stream", repeats),
            gpu.trial("tf32_of_no_rows_is_empty", no_rows),
            gpu.trial("what_tma_cannot_address_has_the_bits_of_six_products", misaligned),
            gpu.trial("tf32_is_taken_in_the_gradient_of_the_input_alone", gradients),
            gpu.trial("tf32_is_taken_only_where_it_is_asked_for", chosen),
            gpu.trial("tiles_that_tf32_lacks_are_refused", refused),
        ]);
    }
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("seed {}", seed());
    conclusion.exit_code()
}

fn tf32() -> KernelConfig {
    KernelConfig::default().tier(Tier::Hopper).f32_products(F32Products::Tf32)
}

fn edge_shapes() -> Vec<[usize; 3]> {
    const EDGES: [usize; 10] = [65, 129, 255, 64, 1, 127, 257, 63, 128, 256];
    let of = |i: usize| EDGES[i % EDGES.len()];
    let mut shapes: Vec<_> =
        (0..20).map(|i| [of(i), of(i + 1 + i / 10), of(i + 4 + i / 10)]).collect();
    // More tiles than multiprocessors.
    shapes.push([2180, 2312, 72]);
    shortened(shapes, 2)
}

/// The number of 10 bits of fraction that is nearest; of two, the one further from 0.
fn to_tf32(value: f32) -> f32 {
    f32::from_bits((value.to_bits() + (1 << 12)) & !((1 << 13) - 1))
}

/// Operands of `X·W + b`.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    /// `[k, n]`
    w: Vec<f32>,
    bias: Vec<f32>,
}

/// What is done with a product.
#[derive(Clone, Copy, Debug)]
struct Call {
    layout: WeightLayout,
    activation: Activation,
    bias: bool,
    placement: Placement,
}

impl Call {
    fn plain(layout: WeightLayout) -> Self {
        let (activation, placement) = (Activation::None, Placement::Aligned);
        Self { layout, activation, bias: false, placement }
    }
}

impl Product {
    fn normal([m, n, k]: [usize; 3]) -> Self {
        let mut random = Random::of(&format!("tf32 {m} {n} {k}"));
        let (x, w, bias) = (random.normal(m * k), random.normal(k * n), random.normal(n));
        Self { m, n, k, x, w, bias }
    }

    /// The same of operands that TF32 holds.
    fn exact(shape: [usize; 3]) -> Self {
        let product = Self::normal(shape);
        let rounded = |values: Vec<f32>| values.into_iter().map(to_tf32).collect();
        Self { x: rounded(product.x), w: rounded(product.w), ..product }
    }

    fn weight(&self, layout: WeightLayout) -> (Vec<f32>, [usize; 2]) {
        let &Self { n, k, ref w, .. } = self;
        match layout {
            WeightLayout::InOut => (w.clone(), [k, n]),
            WeightLayout::OutIn => ((0..n * k).map(|at| w[at % k * n + at / k]).collect(), [n, k]),
        }
    }

    fn run(&self, device: &Device, config: &KernelConfig, call: Call) -> Result<Vec<f32>, Failed> {
        let &Self { m, n, k, ref x, ref bias, .. } = self;
        // TMA reads rows that are multiples of 16 bytes apart.
        let place = |columns: usize| match call.placement {
            Placement::Contiguous if !columns.is_multiple_of(4) => Placement::Aligned,
            placement => placement,
        };
        let (w, w_shape) = self.weight(call.layout);
        let x = Placed::new(device, x, [m, k], place(k))?;
        let w = Placed::new(device, &w, w_shape, place(w_shape[1]))?;
        let bias = Tensor::from_slice(device, bias, [n])?;
        let mut y = Placed::<f32>::poisoned(device, [m, n], call.placement)?;
        let Call { layout, activation, .. } = call;
        let bias = call.bias.then_some(&bias);
        let forward = gemm::Forward { x: &x.view, w: &w.view, bias, layout, activation };
        let served = forward.run(&mut y.view, config)?;
        require(config.forced_tier().is_none_or(|tier| tier == served), || {
            format!("served by {served}")
        })?;
        Ok(y.read()?)
    }

    /// Compares with float64; `rounding` is what a product may lose to the rounding of its factors.
    fn compare(&self, got: &[f32], call: Call, rounding: f64) -> Result<(), Failed> {
        let &Self { m, n, k, ref x, ref w, ref bias } = self;
        let steps = k.div_ceil(8) + 8;
        let relative = rounding + steps as f64 * 2.0f64.powi(-22);
        let (mut sums, mut magnitudes) = (vec![0.0; n], vec![0.0; n]);
        for i in 0..m {
            for j in 0..n {
                let bias = if call.bias { f64::from(bias[j]) } else { 0.0 };
                (sums[j], magnitudes[j]) = (bias, bias.abs());
            }
            for (&x, w) in x[i * k..][..k].iter().zip(w.chunks(n)) {
                for ((sum, magnitude), &w) in sums.iter_mut().zip(&mut magnitudes).zip(w) {
                    let product = f64::from(x) * f64::from(w);
                    *sum += product;
                    *magnitude += product.abs();
                }
            }
            for j in 0..n {
                let expected = apply(call.activation, sums[j]);
                let tolerance = 1.13 * relative * magnitudes[j]
                    + 2.0f64.powi(-20) * (sums[j].abs() + expected.abs());
                let got = f64::from(got[i * n + j]);
                require((got - expected).abs() <= tolerance, || {
                    format!(
                        "{call:?} ({i}, {j}): got {got:e}, expected {expected:e} ± {tolerance:e}"
                    )
                })?;
            }
        }
        Ok(())
    }
}

/// What the rounding of two factors may change in their product.
fn rounding() -> f64 {
    2.0f64.powi(-10) + 2.0f64.powi(-22)
}

/// Both layouts of each shape; activation, bias and placement go round.
fn each(device: &Device, config: &KernelConfig, shapes: &[[usize; 3]]) -> Result<(), Failed> {
    let mut number = 0;
    for &shape in shapes {
        let product = Product::normal(shape);
        for layout in WeightLayout::ALL {
            let call = Call {
                layout,
                activation: Activation::ALL[number % Activation::ALL.len()],
                bias: number % 3 != 0,
                placement: [Placement::Contiguous, Placement::Aligned][number / 2 % 2],
            };
            let got = product.run(device, config, call)?;
            let compared = product.compare(&got, call, rounding());
            compared.map_err(|error| in_context(&format!("{shape:?}"), &error))?;
            number += 1;
        }
    }
    Ok(())
}

fn in_context(context: &str, error: &Failed) -> Failed {
    format!("{context}: {}", error.message().unwrap_or("no message")).into()
}

/// Tile of Y or, where W is `[in, out]`, of Yᵀ, and blocks that share it.
const TILES: [([u32; 2], u32); 7] = [
    ([128, 256], 1),
    ([128, 128], 1),
    ([64, 128], 1),
    ([64, 64], 1),
    ([64, 64], 2),
    ([64, 64], 4),
    ([64, 64], 8),
];

fn forced(layout: WeightLayout, ([rows, columns], split_k): ([u32; 2], u32)) -> KernelConfig {
    let tile = match layout {
        WeightLayout::OutIn => [rows, columns],
        WeightLayout::InOut => [columns, rows],
    };
    tf32().hopper_tile(tile).hopper_split_k(split_k)
}

fn every_tile(device: &Device) -> Result<(), Failed> {
    // With few steps of k for many blocks, several tiles a block, and less than a tile.
    let shapes = vec![[65, 72, 65], [257, 131, 520], [600, 1160, 360], [33, 200, 4100], [1, 8, 1]];
    for shape in shortened(shapes, 1) {
        let product = Product::normal(shape);
        for layout in WeightLayout::ALL {
            for tile in TILES {
                let call = Call { activation: Activation::Gelu, bias: true, ..Call::plain(layout) };
                let got = product.run(device, &forced(layout, tile), call)?;
                product
                    .compare(&got, call, rounding())
                    .map_err(|error| in_context(&format!("{shape:?} {tile:?}"), &error))?;
            }
        }
    }
    Ok(())
}

fn exact(device: &Device) -> Result<(), Failed> {
    for shape in shortened(vec![[130, 140, 150], [64, 200, 1000], [257, 65, 33]], 1) {
        let product = Product::exact(shape);
        for layout in WeightLayout::ALL {
            for tile in TILES {
                let call = Call::plain(layout);
                let got = product.run(device, &forced(layout, tile), call)?;
                product
                    .compare(&got, call, 0.0)
                    .map_err(|error| in_context(&format!("{shape:?} {tile:?}"), &error))?;
            }
        }
    }
    Ok(())
}

/// Times the unit matrix, and the unit matrix times it: each element alone, rounded.
fn rounded(device: &Device) -> Result<(), Failed> {
    let extent = 96;
    let mut product = Product::normal([extent; 3]);
    for (at, x) in product.x.iter_mut().enumerate() {
        // Not halfway between two numbers of TF32: how that is rounded is not promised.
        let low = x.to_bits() & 0x1FFF;
        if low == 0x1000 {
            *x = f32::from_bits(x.to_bits() + 1);
        }
        // Also close to halfway, from both sides.
        match at % 7 {
            0 => *x = f32::from_bits(x.to_bits() & !0x1FFF | 0x1001),
            1 => *x = f32::from_bits(x.to_bits() & !0x1FFF | 0x0FFF),
            _ => {}
        }
    }
    let unit: Vec<f32> =
        (0..extent * extent).map(|at| f32::from(at / extent == at % extent)).collect();
    let expected: Vec<f32> = product.x.iter().copied().map(to_tf32).collect();
    let as_w = Product { x: unit.clone(), w: product.x.clone(), ..Product::normal([extent; 3]) };
    let as_x = Product { w: unit, ..product };
    for layout in WeightLayout::ALL {
        for (operand, product) in [("X", &as_x), ("W", &as_w)] {
            let got = product.run(device, &tf32(), Call::plain(layout))?;
            for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                require(got == expected, || {
                    format!("{layout:?}, element {at} of {operand}: {got:e}, not {expected:e}")
                })?;
            }
        }
    }
    Ok(())
}

fn non_finite(device: &Device) -> Result<(), Failed> {
    let (m, n, k) = (70, 136, 40);
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for layout in WeightLayout::ALL {
            let mut product = Product::normal([m, n, k]);
            let mut random = Random::of(&format!("tf32 {special} {layout:?}"));
            let (row, column) = (random.below(m), random.below(n));
            product.x[row * k + 5] = special;
            product.w[7 * n + column] = special;
            let got = product.run(device, &tf32(), Call::plain(layout))?;
            for (at, got) in got.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                // The sign is that of the factor which the special one meets.
                let met = (i == row).then(|| product.w[5 * n + j]);
                let met = met.into_iter().chain((j == column).then(|| product.x[i * k + 7]));
                let expected = met.fold(0.0, |sum, factor| sum + special * factor);
                let same = if expected == 0.0 {
                    got.is_finite()
                } else {
                    *got == expected || got.is_nan() && expected.is_nan()
                };
                require(same, || format!("{layout:?} ({i}, {j}): {got}, not {expected}"))?;
            }
        }
    }
    Ok(())
}

fn repeats(device: &Device) -> Result<(), Failed> {
    let product = Product::normal([300, 521, 265]);
    let other = device.on_new_stream()?;
    for layout in WeightLayout::ALL {
        for tile in TILES {
            let (config, call) = (forced(layout, tile), Call::plain(layout));
            let first = bits(&product.run(device, &config, call)?);
            let second = bits(&product.run(device, &config, call)?);
            let third = bits(&product.run(&other, &config, call)?);
            require(first == second && first == third, || {
                format!("{layout:?} {tile:?}: the bits differ")
            })?;
        }
    }
    Ok(())
}

fn no_rows(device: &Device) -> Result<(), Failed> {
    let (x, w) = (Tensor::<f32>::zeros(device, [0, 16])?, Tensor::zeros(device, [24, 16])?);
    let mut y = Tensor::<f32>::zeros(device, [0, 24])?;
    let (layout, activation) = (WeightLayout::OutIn, Activation::None);
    let forward = gemm::Forward { x: &x, w: &w, bias: None, layout, activation };
    let served = forward.run(&mut y, &tf32())?;
    require(served == Tier::Hopper && y.to_vec()?.is_empty(), || format!("served by {served}"))
}

fn misaligned(device: &Device) -> Result<(), Failed> {
    let six = KernelConfig::default().tier(Tier::Hopper);
    for shape in [[130, 140, 50], [1, 1, 1], [257, 65, 31]] {
        let product = Product::normal(shape);
        for layout in WeightLayout::ALL {
            let call = Call { placement: Placement::Misaligned, ..Call::plain(layout) };
            let got = bits(&product.run(device, &tf32(), call)?);
            let expected = bits(&product.run(device, &six, call)?);
            require(got == expected, || format!("{shape:?} {layout:?}: the bits differ"))?;
        }
    }
    Ok(())
}

fn gradients(device: &Device) -> Result<(), Failed> {
    let (m, n, k) = (140, 264, 96);
    let product = Product::normal([m, n, k]);
    let dy: Vec<f32> = Random::of("tf32 dy").normal(m * n);
    for layout in WeightLayout::ALL {
        let (w, w_shape) = product.weight(layout);
        let x = Tensor::from_slice(device, &product.x, [m, k])?;
        let w = Tensor::from_slice(device, &w, w_shape)?;
        let dy_on_device = Tensor::from_slice(device, &dy, [m, n])?;
        let pass = gemm::Backward {
            x: &x,
            w: &w,
            dy: &dy_on_device,
            saved: gemm::Saved::Nothing,
            layout,
            activation: Activation::None,
        };
        let run = |config: &KernelConfig, with_dw: bool| -> Result<_, Failed> {
            let mut dx = Tensor::full(device, [m, k], f32::NAN)?;
            let mut dw = Tensor::full(device, w_shape, f32::NAN)?;
            let wanted = gemm::Gradients {
                dx: Some(&mut dx),
                dw: with_dw.then_some(&mut dw),
                ..Default::default()
            };
            let tiers = pass.run(wanted, config)?;
            Ok((tiers.dx, dx.to_vec()?, dw.to_vec()?))
        };
        let (tier, dx, dw) = run(&KernelConfig::default().f32_products(F32Products::Tf32), true)?;
        require(tier == Some(Tier::Hopper), || format!("dX was served by {tier:?}"))?;
        let (_, _, plain) = run(&KernelConfig::default(), true)?;
        require(bits(&dw) == bits(&plain), || format!("{layout:?}: dW is in TF32"))?;
        // dX = dY·Wᵀ.
        let transposed = (0..n * k).map(|at| product.w[at % k * n + at / k]).collect();
        let of_dx = Product { m, n: k, k: n, x: dy.clone(), w: transposed, bias: Vec::new() };
        of_dx.compare(&dx, Call::plain(layout), rounding())?;
        let (_, six, _) = run(&KernelConfig::default().tier(Tier::Hopper), false)?;
        require(bits(&dx) != bits(&six), || format!("{layout:?}: dX is not in TF32"))?;
    }
    Ok(())
}

fn chosen(device: &Device) -> Result<(), Failed> {
    let asked = KernelConfig::default().f32_products(F32Products::Tf32);
    let cases = [
        // Where six products do not pay, one does.
        (asked.clone(), Tier::Hopper),
        (asked.clone().enable_tma(false), Tier::Portable),
        (KernelConfig::default(), Tier::Portable),
    ];
    for (config, expected) in cases {
        let layer = LinearConfig::new(48, 64).kernel_config(config).build(device)?;
        let got = layer.tier_for(40)?;
        require(got == expected, || format!("served by {got}, not {expected}"))?;
    }
    // The bits tell which products a layer takes.
    let product = Product::normal([256; 3]);
    let call = Call::plain(WeightLayout::InOut);
    let by_default = bits(&product.run(device, &KernelConfig::default(), call)?);
    require(by_default != bits(&product.run(device, &asked, call)?), || {
        "TF32 is taken unasked, or not taken".to_owned()
    })
}

fn refused(device: &Device) -> Result<(), Failed> {
    let product = Product::normal([64; 3]);
    let refusal = |config: KernelConfig, layout| {
        let x = Tensor::from_slice(device, &product.x, [64, 64])?;
        let w = Tensor::from_slice(device, &product.w, [64, 64])?;
        let mut y = Tensor::zeros(device, [64, 64])?;
        let activation = Activation::None;
        gemm::Forward { x: &x, w: &w, bias: None, layout, activation }.run(&mut y, &config)
    };
    for (layout, tile) in [(WeightLayout::OutIn, [256, 128]), (WeightLayout::InOut, [128, 256])] {
        let got = refusal(tf32().hopper_tile(tile), layout);
        let named = matches!(
            got,
            Err(Error::Unsupported { reason: Obstacle::Tile(got), .. }) if got == tile
        );
        require(named, || format!("{layout:?} {tile:?}: {got:?}"))?;
        let got = refusal(tf32().hopper_tile([64, 64]).hopper_split_k(3), layout);
        let named = matches!(got, Err(Error::Unsupported { reason: Obstacle::SplitK(3), .. }));
        require(named, || format!("{layout:?}, three blocks: {got:?}"))?;
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
