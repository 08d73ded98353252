//! f32 on Hopper's tensor cores: as accurate as plain f32, and the same where bf16 parts cannot
//! express the operands.
//!
//! `tests/gemm.rs` compares it with float64 over shapes, layouts and epilogues; here it is the
//! data that is difficult.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/random.rs"]
mod random;

use std::process::ExitCode;

use gpu::Gpu;
use kasmina::{
    Activation, Device, F32Products, KernelConfig, LinearConfig, Tensor, Tier, WeightLayout, gemm,
};
use libtest_mimic::{Arguments, Failed};
use random::{Random, seed};

/// A NaN that no computation leaves behind.
const POISON: f32 = f32::from_bits(u32::MAX);
/// The roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    let lacking = capability.is_some_and(|gpu| !Tier::Hopper.runs_on(gpu.major, gpu.minor));
    let mut trials = Vec::new();
    if !lacking {
        for direct in [false, true] {
            let how = if direct { "in_one_launch" } else { "after_a_split" };
            type Claim = fn(&Device, &KernelConfig) -> Result<(), Failed>;
            let claims: [(&str, Claim); 8] = [
                ("six_products_of_like_numbers_err_no_more_than_plain_f32", no_less_accurate),
                ("six_products_of_wide_exponents_err_at_most_twice_plain_f32", wide_exponents),
                ("six_products_that_cancel_match_reference", |device, config| {
                    matches(device, config, &cancelling(96, 136, 300))
                }),
                ("six_products_near_the_largest_number_match_reference", |device, config| {
                    matches(device, config, &near_the_top(96, 136, 300))
                }),
                ("six_products_of_tiny_numbers_miss_what_underflows", |device, config| {
                    matches(device, config, &scaled(96, 136, 300, 1e-36, 1.0))?;
                    matches(device, config, &scaled(96, 136, 300, 1e-39, 1e3))
                }),
                ("what_parts_cannot_express_has_the_bits_of_plain_f32", repaired),
                ("a_repaired_product_leaves_the_next_one_alone", repair_is_forgotten),
                ("six_products_give_the_same_bits_twice_and_on_another_stream", repeats),
            ];
            for (claim, check) in claims {
                trials.push(gpu.trial(format!("{claim}_{how}"), move |device| {
                    check(device, &hopper().hopper_direct(direct))
                }));
            }
        }
        trials.extend([
            gpu.trial("three_products_leave_out_what_they_say", three),
            gpu.trial("tensor_cores_are_taken_where_they_pay", chosen),
        ]);
    }
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("seed {}", seed());
    conclusion.exit_code()
}

/// Operands of `X·W`.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    /// `[k, n]`
    w: Vec<f32>,
}

impl Product {
    /// `f(i, j)` for every element of the result, given its row of X and its column of W.
    fn elements<'a, R>(
        &'a self,
        mut f: impl FnMut(&mut dyn Iterator<Item = (f64, f64)>) -> R + 'a,
    ) -> impl Iterator<Item = R> + 'a {
        let &Self { m, n, k, ref x, ref w } = self;
        (0..m * n).map(move |element| {
            let (i, j) = (element / n, element % n);
            f(&mut (0..k).map(|l| (f64::from(x[i * k + l]), f64::from(w[l * n + j]))))
        })
    }

    fn reference(&self) -> Vec<f64> {
        self.elements(|pairs| pairs.map(|(x, w)| x * w).sum()).collect()
    }

    fn run(&self, device: &Device, config: &KernelConfig) -> Result<Vec<f32>, Failed> {
        let &Self { m, n, k, ref x, ref w } = self;
        let x = Tensor::from_slice(device, x, [m, k])?;
        let w = Tensor::from_slice(device, w, [k, n])?;
        let mut y = Tensor::full(device, [m, n], POISON)?;
        let (layout, activation) = (WeightLayout::InOut, Activation::None);
        let forward = gemm::Forward { x: &x, w: &w, bias: None, layout, activation };
        let served = forward.run(&mut y, config)?;
        if config.forced_tier().is_some_and(|tier| tier != served) {
            return Err(format!("served by {served}").into());
        }
        Ok(y.to_vec()?)
    }
}

/// The bits of every element, which compare where NaN does not.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn hopper() -> KernelConfig {
    KernelConfig::default().tier(Tier::Hopper)
}

fn portable() -> KernelConfig {
    KernelConfig::default().tier(Tier::Portable)
}

fn normal(m: usize, n: usize, k: usize) -> Product {
    scaled(m, n, k, 1.0, 1.0)
}

fn scaled(m: usize, n: usize, k: usize, x_scale: f32, w_scale: f32) -> Product {
    let mut random = Random::of(&format!("f32 {m} {n} {k} {x_scale} {w_scale}"));
    let mut take = |count: usize, scale: f32| -> Vec<f32> {
        random.normal(count).into_iter().map(|value| value * scale).collect()
    };
    let (x, w) = (take(m * k, x_scale), take(k * n, w_scale));
    Product { m, n, k, x, w }
}

/// All of one sign, so that sums grow with k and truncation errors add up.
fn positive(m: usize, n: usize, k: usize) -> Product {
    let product = normal(m, n, k);
    let positive = |values: Vec<f32>| values.into_iter().map(|value: f32| value.abs()).collect();
    Product { x: positive(product.x), w: positive(product.w), ..product }
}

/// Exponents from −30 to 30, in both operands.
fn wide(m: usize, n: usize, k: usize) -> Product {
    let product = normal(m, n, k);
    let mut random = Random::of("wide");
    let mut spread = |values: Vec<f32>| -> Vec<f32> {
        let power = |random: &mut Random| 2.0f32.powi(random.below(61) as i32 - 30);
        values.into_iter().map(|value| value * power(&mut random)).collect()
    };
    let (x, w) = (spread(product.x), spread(product.w));
    Product { x, w, ..product }
}

/// Every second k is the negative of the one before, but for a millionth.
fn cancelling(m: usize, n: usize, k: usize) -> Product {
    let mut product = normal(m, n, k);
    for row in product.x.chunks_mut(k) {
        for pair in row.chunks_exact_mut(2) {
            pair[1] = -pair[0] * (1.0 + 1e-6);
        }
    }
    for l in (1..k).step_by(2) {
        let (before, this) = product.w.split_at_mut(l * n);
        this[..n].copy_from_slice(&before[(l - 1) * n..]);
    }
    product
}

/// Elements up to the largest f32, times weights that keep the sums below it.
fn near_the_top(m: usize, n: usize, k: usize) -> Product {
    let mut product = scaled(m, n, k, 3e37, 1e-3);
    for row in product.x.chunks_mut(k) {
        row[0] = f32::MAX;
        row[k / 2] = -f32::MAX;
        row[k - 1] = f32::from_bits(f32::MAX.to_bits() - 0x8000);
    }
    product
}

/// Relative L2 error.
fn l2_error(got: &[f32], reference: &[f64]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &reference) in got.iter().zip(reference) {
        error += (f64::from(got) - reference).powi(2);
        norm += reference.powi(2);
    }
    (error / norm).sqrt()
}

fn no_less_accurate(device: &Device, config: &KernelConfig) -> Result<(), Failed> {
    type Operands = fn(usize, usize, usize) -> Product;
    let kinds: [(&str, Operands); 2] = [("normal", normal), ("positive", positive)];
    for (name, operands) in kinds {
        for [m, n, k] in
            [[512, 512, 16], [200, 131, 33], [129, 257, 100], [128, 128, 1000], [64, 64, 4096]]
        {
            let [ours, plain] = l2_errors(device, config, &operands(m, n, k))?;
            println!("{name} {m}x{n}x{k}: relative L2 error {ours:.2e}, plain f32 {plain:.2e}");
            require(ours <= plain, || format!("{name} {m}×{n}×{k}: {ours:e} > {plain:e}"))?;
        }
    }
    Ok(())
}

/// Where one product outweighs the others of its sum, plain f32 rounds that one and the sum once.
/// Tensor cores cut sums off instead of rounding them, which errs up to twice as much.
fn wide_exponents(device: &Device, config: &KernelConfig) -> Result<(), Failed> {
    matches(device, config, &wide(96, 136, 300))?;
    for [m, n, k] in [[512, 512, 16], [129, 257, 100], [64, 64, 4096]] {
        let [ours, plain] = l2_errors(device, config, &wide(m, n, k))?;
        println!("wide {m}x{n}x{k}: relative L2 error {ours:.2e}, plain f32 {plain:.2e}");
        require(ours <= 2.0 * plain, || format!("{m}×{n}×{k}: {ours:e} > 2·{plain:e}"))?;
    }
    Ok(())
}

/// Relative L2 errors of six products and of plain f32.
fn l2_errors(
    device: &Device,
    config: &KernelConfig,
    product: &Product,
) -> Result<[f64; 2], Failed> {
    let reference = product.reference();
    let ours = l2_error(&product.run(device, config)?, &reference);
    Ok([ours, l2_error(&product.run(device, &portable())?, &reference)])
}

/// Compares with float64, element by element: `2·(√k + 4)·u·A` for the sum as in `tests/gemm.rs`,
/// and what underflows: 2⁻¹³⁴ of each element, times its partner, and 2⁻¹⁴⁹ of each product.
fn matches(device: &Device, config: &KernelConfig, product: &Product) -> Result<(), Failed> {
    let got = product.run(device, config)?;
    agrees(product, &got)
}

/// As [`matches`]; elements that are not finite have to be so in the reference.
fn agrees(product: &Product, got: &[f32]) -> Result<(), Failed> {
    let reference = product.reference();
    let k = product.k as f64;
    let tolerances = product.elements(|pairs| {
        pairs.fold(0.0, |tolerance, (x, w)| {
            let relative = 2.0 * (k.sqrt() + 4.0) * U * (x * w).abs();
            let underflow = 2.0f64.powi(-134) * (x.abs() + w.abs()) + 2.0f64.powi(-149);
            tolerance + relative + underflow
        })
    });
    for (index, ((got, expected), tolerance)) in
        got.iter().zip(&reference).zip(tolerances).enumerate()
    {
        let error = (f64::from(*got) - expected).abs();
        require(error <= tolerance || !expected.is_finite() && !got.is_finite(), || {
            format!("element {index}: got {got:e}, expected {expected:e} ± {tolerance:e}")
        })?;
    }
    Ok(())
}

fn repaired(device: &Device, config: &KernelConfig) -> Result<(), Failed> {
    let (m, n, k) = (200, 264, 130);
    let with = |values: &[(usize, f32)], in_w: bool| {
        let mut product = normal(m, n, k);
        for &(at, value) in values {
            let operand = if in_w { &mut product.w } else { &mut product.x };
            operand[at] = value;
        }
        product
    };
    let products = [
        with(&[(3, f32::INFINITY)], false),
        // Exactly a bf16, so that its low parts are 0, beside infinities of both signs.
        with(&[(0, f32::INFINITY), (1, f32::NEG_INFINITY), (2, 1.0)], false),
        with(&[(m * k - 1, f32::NAN)], false),
        with(&[(k * n - 1, f32::NEG_INFINITY)], true),
        with(&[(7, f32::from_bits(0x7F80_0001))], true),
        // What underflows, times what makes it count.
        scaled(m, n, k, 1e-39, 1e20),
        scaled(m, n, k, 1e20, 1e-39),
        // Products that overflow, whose parts would be infinities of both signs.
        scaled(m, n, k, 1e30, 1e30),
        scaled(m, n, k, 1e38, 1e-3),
    ];
    for (number, product) in products.iter().enumerate() {
        let got = product.run(device, config)?;
        let plain = product.run(device, &portable())?;
        if config.forced_hopper_direct() == Some(false) {
            require(bits(&got) == bits(&plain), || format!("product {number}: the bits differ"))?;
            continue;
        }
        // Computed again is each tile whose operands call for it.
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let element = i * n + j;
            let of_row = product.x[i * k..][..k].iter();
            let of_both = of_row.chain(product.w[j..].iter().step_by(n));
            let concerned = of_both.into_iter().any(|&value| {
                !value.is_finite() || value.abs() >= 1e19 || value != 0.0 && value.abs() < 1e-37
            });
            require(!concerned || got[element].to_bits() == plain[element].to_bits(), || {
                format!("product {number}, element {element}: the bits differ")
            })?;
        }
        let is_whole = number >= 5;
        if !is_whole {
            agrees(product, &got)?;
        }
    }
    Ok(())
}

fn repair_is_forgotten(device: &Device, config: &KernelConfig) -> Result<(), Failed> {
    let clean = normal(130, 140, 150);
    let expected = bits(&clean.run(device, config)?);
    let mut dirty = normal(130, 140, 150);
    dirty.x[5] = f32::NAN;
    let broken = dirty.run(device, config)?;
    require(broken[..140].iter().all(|value| value.is_nan()), || "NaN was lost".to_owned())?;
    let again = bits(&clean.run(device, config)?);
    require(again == expected, || "the bits differ after a repair".to_owned())
}

fn three(device: &Device) -> Result<(), Failed> {
    let config = hopper().f32_products(F32Products::Three);
    for product in [normal(130, 257, 100), positive(64, 128, 1000), wide(70, 90, 65)] {
        let got = product.run(device, &config)?;
        let reference = product.reference();
        let k = product.k as f64;
        let magnitudes = product.elements(|pairs| pairs.map(|(x, w)| (x * w).abs()).sum::<f64>());
        for ((got, expected), magnitude) in got.iter().zip(&reference).zip(magnitudes) {
            let tolerance = (513.0 + 2.0 * (k.sqrt() + 4.0)) * U * magnitude;
            let error = (f64::from(*got) - expected).abs();
            require(error <= tolerance, || format!("got {got:e}, expected {expected:e}"))?;
        }
    }
    let product = normal(256, 256, 256);
    let error = l2_error(&product.run(device, &config)?, &product.reference());
    require((1e-6..1e-5).contains(&error), || format!("the relative L2 error is {error:e}"))
}

fn repeats(device: &Device, config: &KernelConfig) -> Result<(), Failed> {
    let product = normal(300, 521, 265);
    let first = product.run(device, config)?;
    let second = product.run(device, config)?;
    let third = product.run(&device.on_new_stream()?, config)?;
    let same = bits(&first) == bits(&second) && bits(&first) == bits(&third);
    require(same, || "the bits differ".to_owned())
}

fn chosen(device: &Device) -> Result<(), Failed> {
    let without_tma = KernelConfig::default().enable_tma(false);
    let cases = [
        ([256, 256, 256], KernelConfig::default(), Tier::Hopper),
        ([40, 64, 48], KernelConfig::default(), Tier::Hopper),
        ([40, 64, 16], KernelConfig::default(), Tier::Portable),
        ([256, 256, 256], without_tma, Tier::Portable),
        ([256, 256, 256], KernelConfig::default().hopper_tile([128, 256]), Tier::Portable),
        ([256, 256, 256], KernelConfig::default().hopper_tile([64, 128]), Tier::Hopper),
    ];
    for ([m, n, k], config, expected) in cases {
        let layer = LinearConfig::new(k, n).kernel_config(config.clone()).build(device)?;
        let x = Tensor::<f32>::zeros(device, [m, k])?;
        let y = Tensor::<f32>::zeros(device, [m, n])?;
        let w = Tensor::<f32>::zeros(device, [k, n])?;
        let (layout, activation) = (WeightLayout::InOut, Activation::None);
        let forward = gemm::Forward { x: &x, w: &w, bias: None, layout, activation };
        let got = [layer.tier_for(m)?, forward.tier(&y, &config)?];
        require(got == [expected; 2], || format!("{m}×{n}×{k}: {got:?}, not {expected}"))?;
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
