//! The forward pass against a float64 reference, on every tier.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes a list short enough for
//! compute-sanitizer.

mod support;

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, Error, KernelConfig, LinearConfig, Obstacle, Tensor, Tier,
    WeightLayout, Without, gemm,
};
use libtest_mimic::{Arguments, Failed, Trial};
use support::gpu::Gpu;
use support::linear::Linear;
use support::operand::{Placed, Placement, Poison, bits};
use support::random::seed;
use support::reduced::{reduced, shortened};

type Check = fn(&Device, Tier) -> Result<(), Failed>;

/// Cases that were compared in this run.
static COMPARED: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials =
        vec![Trial::test("case_lists_of_the_gpu_tiers_hold_at_least_500_cases", enough_cases)];
    for (name, check) in claims(Tier::Cpu) {
        trials.push(Trial::test(name, move || check(&Device::cpu(), Tier::Cpu)));
    }
    for tier in [Tier::Portable, Tier::Hopper] {
        for (name, check) in claims(tier).into_iter().filter(|_| !gpu_lacks(tier)) {
            trials.push(gpu.trial(name, move |device| check(device, tier)));
        }
    }
    if !gpu_lacks(Tier::Hopper) {
        trials.extend([
            gpu.trial(
                "operands_that_tma_cannot_address_stay_and_f32_of_small_k_goes_to_portable",
                hands_over,
            ),
            gpu.trial("forced_hopper_refuses_what_it_cannot_serve", hopper_refuses),
            gpu.trial("hopper_bf16_gemm_without_a_part_matches_reference", |device| {
                without_a_part(device, Tier::Hopper)
            }),
        ]);
    }
    trials.extend([
        gpu.trial("forced_cpu_refuses_gpu_memory", cpu_refuses),
        gpu.trial("streams_are_ordered_around_a_tensor_they_share", streams_are_ordered),
        gpu.trial("two_streams_give_the_bits_of_one", streams_agree),
    ]);

    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("{} cases compared, seed {}", COMPARED.load(Ordering::Relaxed), seed());
    conclusion.exit_code()
}

/// Whether there is a GPU that lacks what `tier` needs, which no requirement can change.
fn gpu_lacks(tier: Tier) -> bool {
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    capability.is_some_and(|gpu| !tier.runs_on(gpu.major, gpu.minor))
}

/// What is claimed of a tier, for each of its element types.
fn claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Poison>() -> Vec<(&'static str, Check)> {
        vec![
            ("gemm_at_tile_edges_matches_reference", |d, t| each::<T>(d, t, &edge_cases())),
            ("gemm_with_ragged_k_matches_reference", |d, t| each::<T>(d, t, &ragged_k_cases())),
            ("gemm_with_prime_extents_matches_reference", |d, t| each::<T>(d, t, &prime_cases())),
            ("gemm_with_extreme_aspects_matches_reference", |d, t| each::<T>(d, t, &thin_cases())),
            ("gemm_with_every_epilogue_matches_reference", |d, t| {
                each::<T>(d, t, &epilogue_cases())
            }),
            ("gemm_with_more_tiles_than_multiprocessors_matches_reference", |d, t| {
                each::<T>(d, t, &large_cases(t))
            }),
            ("gemm_of_no_rows_is_empty", no_rows::<T>),
            ("gemm_propagates_nan_and_infinities", non_finite::<T>),
            ("gemm_gives_the_same_bits_twice", repeats::<T>),
            ("layer_matches_reference", layer::<T>),
        ]
    }
    let mut claims = Vec::new();
    for dtype in DType::ALL {
        let mut of_dtype = match dtype {
            DType::F32 => of::<f32>(),
            DType::F16 => of::<f16>(),
            _ => of::<bf16>(),
        };
        if tier == Tier::Hopper {
            of_dtype.push(match dtype {
                DType::F32 => ("gemm_with_every_tile_matches_reference", every_tile::<f32>),
                DType::F16 => ("gemm_with_every_tile_matches_reference", every_tile::<f16>),
                _ => ("gemm_with_every_tile_matches_reference", every_tile::<bf16>),
            });
        }
        if tier != Tier::Cpu {
            of_dtype.push(match dtype {
                DType::F32 => ("gemm_of_misaligned_views_matches_reference", misaligned::<f32>),
                DType::F16 => ("gemm_of_misaligned_views_matches_reference", misaligned::<f16>),
                _ => ("gemm_of_misaligned_views_matches_reference", misaligned::<bf16>),
            });
        }
        if tier == Tier::Hopper && dtype != DType::F32 {
            let name = "gemm_of_unaligned_rows_with_every_tile_matches_reference";
            of_dtype.push(match dtype {
                DType::F16 => (name, every_tile_unaligned::<f16>),
                _ => (name, every_tile_unaligned::<bf16>),
            });
        }
        let name = |sentence| format!("{tier}_{dtype}_{sentence}");
        claims.extend(of_dtype.into_iter().map(|(sentence, check)| (name(sentence), check)));
    }
    claims
}

/// One forward pass to compare.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// m, n, k.
    shape: [usize; 3],
    layout: WeightLayout,
    activation: Activation,
    bias: bool,
    placement: Placement,
}

impl Case {
    /// Makes rows of the output whole pieces of 16 bytes, and those of all operands start at one.
    fn align(&mut self) {
        let [_, n, k] = &mut self.shape;
        *n = n.next_multiple_of(8);
        if !k.is_multiple_of(8) && self.placement == Placement::Contiguous {
            self.placement = Placement::Aligned;
        }
    }
}

/// Both layouts of each shape; activation, bias and placement go round.
fn cases(shapes: impl IntoIterator<Item = [usize; 3]>) -> Vec<Case> {
    let mut number = 0;
    let mut cases = Vec::new();
    for shape in shapes {
        for layout in WeightLayout::ALL {
            cases.push(Case {
                shape,
                layout,
                activation: Activation::ALL[number % Activation::ALL.len()],
                bias: number % 3 != 0,
                placement: [Placement::Contiguous, Placement::Aligned][number / 2 % 2],
            });
            number += 1;
        }
    }
    cases
}

fn edge_cases() -> Vec<Case> {
    const EDGES: [usize; 10] = [65, 129, 255, 64, 1, 127, 257, 63, 128, 256];
    let of = |i: usize| EDGES[i % EDGES.len()];
    let shapes = (0..30).map(|i| [of(i), of(i + 1 + i / 10), of(i + 4 + i / 10)]).collect();
    cases(shortened(shapes, 2))
}

fn ragged_k_cases() -> Vec<Case> {
    let depths = vec![17, 1, 65, 2, 7, 8, 9, 15, 16, 31, 32, 33, 63, 72, 100, 129, 193, 1000];
    cases(shortened(depths, 3).into_iter().map(|k| [130, 264, k]))
}

fn prime_cases() -> Vec<Case> {
    let shapes = vec![
        [61, 67, 71],
        [2, 3, 5],
        [7, 11, 13],
        [31, 37, 41],
        [97, 101, 103],
        [127, 131, 137],
        [251, 263, 257],
        [509, 31, 17],
        [17, 509, 31],
        [31, 17, 509],
    ];
    cases(shortened(shapes, 1))
}

fn thin_cases() -> Vec<Case> {
    let shapes = vec![[1, 1, 4096], [1, 2048, 64], [2048, 1, 33], [3, 1000, 1], [1000, 8, 8]];
    cases(shortened(shapes, 1))
}

/// More tiles than an H200 has multiprocessors, so that persistent blocks take several and the
/// last group of tile rows is not full. Fewer on the CPU, which has no tiles of that kind.
fn large_cases(tier: Tier) -> Vec<Case> {
    let shape = if tier == Tier::Cpu { [300, 520, 600] } else { [2180, 2312, 72] };
    cases(shortened(vec![shape], 0))
}

fn epilogue_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in [[70, 200, 72], [129, 130, 30]] {
        for layout in WeightLayout::ALL {
            for activation in Activation::ALL {
                for bias in [false, true] {
                    let placement = Placement::Contiguous;
                    cases.push(Case { shape, layout, activation, bias, placement });
                }
            }
        }
    }
    shortened(cases, 10)
}

fn enough_cases() -> Result<(), Failed> {
    let of_tier = |tier| {
        let lists = [
            edge_cases(),
            ragged_k_cases(),
            prime_cases(),
            thin_cases(),
            epilogue_cases(),
            large_cases(tier),
        ];
        lists.iter().map(Vec::len).sum::<usize>()
    };
    let cases = 3 * of_tier(Tier::Portable) + 3 * of_tier(Tier::Hopper);
    require(cases >= 500 || reduced(), || format!("there are only {cases}"))
}

/// Compares cases, which are sorted by shape, as TMA can address them where it reads and writes the
/// operands themselves.
fn each<T: Poison>(device: &Device, tier: Tier, cases: &[Case]) -> Result<(), Failed> {
    let mut cases = cases.to_vec();
    if tier == Tier::Hopper && T::DTYPE == DType::F32 {
        // What the call would not get by itself, too.
        for direct in [false, true] {
            let config = KernelConfig::default().hopper_direct(direct);
            each_with::<T>(device, tier, &config, &cases)?;
        }
        return Ok(());
    }
    if tier == Tier::Hopper {
        cases.iter_mut().for_each(Case::align);
    }
    each_with::<T>(device, tier, &KernelConfig::default(), &cases)
}

/// As [`each`], with more asked of the kernel than a tier.
fn each_with<T: Poison>(
    device: &Device,
    tier: Tier,
    config: &KernelConfig,
    cases: &[Case],
) -> Result<(), Failed> {
    let mut worst: f64 = 0.0;
    for cases in cases.chunk_by(|a, b| a.shape == b.shape) {
        let linear = Linear::<T>::random(cases[0].shape);
        for case in cases {
            let (got, _) =
                run(device, tier, config, &linear, case).map_err(|e| format!("{case:?}: {e}"))?;
            let error = linear.compare(&got, case.bias, case.activation, tier);
            worst = worst.max(error.map_err(|error| format!("{case:?}: {error}"))?);
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    require(worst <= 1.0, || format!("the largest error is {worst} tolerances"))
}

/// Tiles of kernels that split f32 on its way, and how many blocks share one.
const DIRECT_TILES: [([u32; 2], u32); 5] =
    [([64, 64], 1), ([32, 64], 1), ([32, 64], 2), ([32, 64], 4), ([32, 64], 8)];

/// Every tile on shapes of which some would not get it by themselves.
fn every_tile<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    // The first, all that a sanitizer sees, is deep enough for rings to go round, and its rows of f32
    // begin at any multiple of 4 bytes. The last gives blocks of every tile several in a row, with
    // little to do between stores. Of a tile that blocks share each has 1 to 10 steps of k; the fifth
    // gives them several tiles in a row.
    let shapes = vec![
        [65, 72, 1101],
        [65, 72, 65],
        [129, 264, 200],
        [255, 130, 520],
        [600, 1160, 1096],
        [33, 200, 4100],
        [1, 8, 1],
        [2180, 2312, 72],
    ];
    let mut cases = cases(shortened(shapes, 1));
    if T::DTYPE != DType::F32 {
        cases.iter_mut().for_each(Case::align);
    }
    each_kernel::<T>(device, tier, &cases)
}

/// Every tile with operands and results that TMA cannot address, or that end inside a piece: every
/// distance from a multiple of 16 bytes, edges inside a tile and at its last column.
fn every_tile_unaligned<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = vec![
        [65, 71, 65],
        [129, 257, 201],
        [255, 130, 519],
        [600, 1159, 1097],
        [33, 196, 4099],
        [1, 3, 1],
        [70, 63, 62],
        [2180, 2311, 71],
    ];
    let mut cases = cases(shortened(shapes, 1));
    for case in cases.iter_mut().filter(|case| case.placement == Placement::Aligned) {
        case.placement = Placement::Misaligned;
    }
    each_kernel::<T>(device, tier, &cases)
}

/// The cases with every kernel: tile, blocks that share it, blocks that W is loaded into, whether
/// consumers take turns.
fn each_kernel<T: Poison>(device: &Device, tier: Tier, cases: &[Case]) -> Result<(), Failed> {
    let default = KernelConfig::default();
    let kernels: Vec<KernelConfig> = match T::DTYPE {
        DType::F32 => {
            let before = [[128, 128], [64, 128]].map(|tile| default.clone().hopper_tile(tile));
            let direct = DIRECT_TILES.map(|(tile, blocks)| {
                default.clone().hopper_direct(true).hopper_tile(tile).hopper_split_k(blocks)
            });
            before.into_iter().chain(direct).collect()
        }
        _ => [
            ([128, 256], 1, 1, false),
            ([128, 128], 1, 1, false),
            ([128, 128], 1, 1, true),
            ([64, 128], 1, 1, false),
            ([64, 64], 1, 1, false),
            ([64, 128], 1, 2, false),
            ([64, 64], 2, 1, false),
            ([64, 64], 4, 1, false),
            ([64, 64], 8, 1, false),
        ]
        .map(|(tile, split_k, multicast, ping_pong)| {
            let config = default.clone().hopper_tile(tile).hopper_ping_pong(ping_pong);
            config.hopper_split_k(split_k).hopper_multicast(multicast)
        })
        .into(),
    };
    for config in kernels {
        each_with::<T>(device, tier, &config, cases)
            .map_err(|error| format!("{config:?}: {}", error.message().unwrap_or("no message")))?;
    }
    Ok(())
}

/// Every kernel that goes without a part, and the calls that none of them serves.
fn without_a_part(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = vec![[65, 72, 65], [129, 264, 200], [255, 130, 520], [1, 8, 1], [2180, 2312, 72]];
    let mut cases = cases(shortened(shapes, 1));
    cases.iter_mut().for_each(Case::align);
    let (served, refused): (Vec<_>, Vec<_>) =
        cases.into_iter().partition(|case| case.layout == WeightLayout::InOut);
    for without in Without::ALL {
        for tile in [[128, 256], [64, 64]] {
            let config = KernelConfig::default().hopper_tile(tile).hopper_without(without);
            each_with::<bf16>(device, tier, &config, &served).map_err(|error| {
                let message = error.message().unwrap_or("no message");
                format!("tile {tile:?} without {without}: {message}")
            })?;
        }
    }
    let case = refused[0];
    let config = KernelConfig::default().hopper_without(Without::TmaLoads);
    match run(device, tier, &config, &Linear::<bf16>::random(case.shape), &case) {
        Err(message) if message.contains("without TMA loads") => Ok(()),
        other => Err(format!("W as [out, in]: {:?}", other.err()).into()),
    }
}

/// Runs a case on the tier into poisoned memory and gives the result and its tensor.
fn run<T: Poison>(
    device: &Device,
    tier: Tier,
    config: &KernelConfig,
    linear: &Linear<T>,
    case: &Case,
) -> Result<(Vec<T>, Placed<T>), String> {
    let told = |error: Error| error.to_string();
    let &Linear { m, n, k, ref x, ref bias, .. } = linear;
    let (w, w_shape) = linear.weight(case.layout);
    let x = Placed::new(device, x, [m, k], case.placement).map_err(told)?;
    let w = Placed::new(device, &w, w_shape, case.placement).map_err(told)?;
    let bias = Tensor::from_slice(device, bias, [n]).map_err(told)?;
    let mut y = Placed::poisoned(device, [m, n], case.placement).map_err(told)?;
    let forward = gemm::Forward {
        x: &x.view,
        w: &w.view,
        bias: case.bias.then_some(&bias),
        layout: case.layout,
        activation: case.activation,
    };
    let served = forward.run(&mut y.view, &config.clone().tier(tier)).map_err(told)?;
    if served != tier {
        return Err(format!("served by {served} where {tier} was forced"));
    }
    Ok((y.read()?, y))
}

fn misaligned<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = shortened(vec![[130, 140, 50], [1, 1, 1], [128, 128, 64], [257, 65, 31]], 1);
    let cases: Vec<_> = cases(shapes)
        .into_iter()
        .map(|case| Case { placement: Placement::Misaligned, ..case })
        .collect();
    each_with::<T>(device, tier, &KernelConfig::default(), &cases)
}

fn no_rows<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let x = Tensor::<T>::zeros(device, [0, 16])?;
    let w = Tensor::<T>::zeros(device, [24, 16])?;
    let mut y = Tensor::<T>::zeros(device, [0, 24])?;
    let forward = gemm::Forward {
        x: &x,
        w: &w,
        bias: None,
        layout: WeightLayout::OutIn,
        activation: Activation::None,
    };
    let served = forward.run(&mut y, &KernelConfig::default().tier(tier))?;
    let values = y.to_vec()?;
    require(served == tier && values.is_empty(), || format!("{served}: {values:?}"))
}

fn non_finite<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = shortened(vec![[70, 136, 40], [129, 257, 65], [8, 8, 1]], 1);
    for (number, shape) in shapes.into_iter().enumerate() {
        let linear = Linear::<T>::with_non_finite_values(shape);
        for (i, activation) in Activation::ALL.into_iter().enumerate() {
            let layout = WeightLayout::ALL[(number + i) % 2];
            let placement = Placement::Aligned;
            let case = Case { shape, layout, activation, bias: true, placement };
            let (got, _) = run(device, tier, &KernelConfig::default(), &linear, &case)?;
            linear.compare(&got, true, activation, tier).map_err(|e| format!("{case:?}: {e}"))?;
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn repeats<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shape = [300, 520, 264];
    let linear = Linear::<T>::random(shape);
    for case in cases([shape]) {
        let (first, _first_output) = run(device, tier, &KernelConfig::default(), &linear, &case)?;
        // While the first output is held, the second lies elsewhere.
        let (second, _) = run(device, tier, &KernelConfig::default(), &linear, &case)?;
        require(bits(&first) == bits(&second), || format!("{case:?}: the bits differ"))?;
    }
    Ok(())
}

fn layer<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shape = [66, 144, 80];
    let [m, n, k] = shape;
    let linear = Linear::<T>::random(shape);
    let wide = |values: &[T]| -> Vec<f32> { values.iter().map(|value| value.to_f32()).collect() };
    let x = Tensor::from_slice(device, &linear.x, [2, m / 2, k])?;
    for layout in WeightLayout::ALL {
        let activation = Activation::Gelu;
        let mut layer = LinearConfig::new(k, n)
            .activation(activation)
            .dtype(T::DTYPE)
            .weight_layout(layout)
            .kernel_config(KernelConfig::default().tier(tier))
            .build(device)?;
        layer.set_weight(&wide(&linear.weight(layout).0))?;
        layer.set_bias(&wide(&linear.bias))?;
        require(layer.tier_for(m)? == tier, || "another tier would serve it".to_owned())?;
        let y = layer.forward(&x)?;
        require(y.shape().extents() == [2, m / 2, n], || format!("shape {}", y.shape()))?;
        let mut into = Tensor::full(device, [2, m / 2, n], T::POISON)?;
        layer.forward_into(&x, &mut into)?;
        for y in [y, into] {
            linear.compare(&y.to_vec()?, true, activation, tier)?;
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Without a forced tier: f32 goes to the portable tier where k is small; the rest
/// does not, whether TMA can address it or not.
fn hands_over(device: &Device) -> Result<(), Failed> {
    fn served<T: Poison>(device: &Device, placement: Placement, k: usize) -> Result<Tier, Failed> {
        let (shape, layout) = ([40, 64, k], WeightLayout::OutIn);
        let activation = Activation::Relu;
        let linear = Linear::<T>::random(shape);
        let (w, w_shape) = linear.weight(layout);
        let x = Placed::new(device, &linear.x, [linear.m, linear.k], placement)?;
        let w = Placed::new(device, &w, w_shape, placement)?;
        let mut y = Placed::<T>::poisoned(device, [linear.m, linear.n], placement)?;
        let forward = gemm::Forward { x: &x.view, w: &w.view, bias: None, layout, activation };
        let expected = forward.tier(&y.view, &KernelConfig::default())?;
        let tier = forward.run(&mut y.view, &KernelConfig::default())?;
        require(tier == expected, || format!("{expected} was foretold, {tier} served"))?;
        linear.compare(&y.read()?, false, activation, tier)?;
        COMPARED.fetch_add(1, Ordering::Relaxed);
        Ok(tier)
    }
    let got = [
        served::<bf16>(device, Placement::Contiguous, 48)?,
        served::<bf16>(device, Placement::Aligned, 48)?,
        served::<bf16>(device, Placement::Misaligned, 48)?,
        served::<f16>(device, Placement::Misaligned, 48)?,
        served::<f32>(device, Placement::Contiguous, 48)?,
        served::<f32>(device, Placement::Misaligned, 48)?,
        served::<f32>(device, Placement::Contiguous, 16)?,
    ];
    let expected = [
        Tier::Hopper,
        Tier::Hopper,
        Tier::Hopper,
        Tier::Hopper,
        Tier::Hopper,
        Tier::Hopper,
        Tier::Portable,
    ];
    require(got == expected, || format!("served by {got:?}, expected {expected:?}"))
}

/// A pass over zeros whose operands lie as `placement` says, on a forced tier.
fn forced<T: Poison>(device: &Device, tier: Tier, placement: Placement) -> Result<(), Error> {
    let [x, w, mut y] = [[8, 16], [24, 16], [8, 24]]
        .map(|shape| Placed::<T>::poisoned(device, shape, placement))
        .map(|placed| placed.map(|placed| placed.view));
    let (x, w, y) = (x?, w?, y.as_mut().expect("memory for three small matrices"));
    let layout = WeightLayout::OutIn;
    let forward = gemm::Forward { x: &x, w: &w, bias: None, layout, activation: Activation::None };
    forward.run(y, &KernelConfig::default().tier(tier)).map(drop)
}

fn hopper_refuses(device: &Device) -> Result<(), Failed> {
    let x = Tensor::<bf16>::zeros(device, [8, 16])?;
    let w = Tensor::<bf16>::zeros(device, [24, 16])?;
    let (layout, activation) = (WeightLayout::OutIn, Activation::None);
    let forward = gemm::Forward { x: &x, w: &w, bias: None, layout, activation };
    let mut y = Tensor::<bf16>::zeros(device, [8, 24])?;
    let config = KernelConfig::default().tier(Tier::Hopper).hopper_tile([64, 32]);
    match forward.run(&mut y, &config) {
        Err(Error::Unsupported { reason: Obstacle::Tile([64, 32]), .. }) => {}
        other => return Err(format!("a tile of 64×32: {other:?}").into()),
    }
    let config = KernelConfig::default().tier(Tier::Hopper).hopper_tile([128, 256]);
    match forward.run(&mut y, &config.hopper_split_k(2)) {
        Err(Error::Unsupported { reason: Obstacle::SplitK(2), .. }) => {}
        other => return Err(format!("two blocks for a tile of 128×256: {other:?}").into()),
    }
    let config = KernelConfig::default().tier(Tier::Hopper).hopper_split_k(4).hopper_multicast(2);
    match forward.run(&mut y, &config) {
        Err(Error::Unsupported { reason: Obstacle::Multicast(2), .. }) => {}
        other => return Err(format!("multicast and blocks that share a tile: {other:?}").into()),
    }
    let config = KernelConfig::default().tier(Tier::Hopper).hopper_tile([64, 64]);
    match forward.run(&mut y, &config.hopper_ping_pong(true)) {
        Err(Error::Unsupported { reason: Obstacle::PingPong, .. }) => Ok(()),
        other => Err(format!("consumers of a tile of 64×64 that take turns: {other:?}").into()),
    }
}

fn cpu_refuses(device: &Device) -> Result<(), Failed> {
    match forced::<f32>(device, Tier::Cpu, Placement::Contiguous) {
        Err(Error::Unsupported { tier: Tier::Cpu, reason: Obstacle::GpuMemory, .. }) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

/// `layer(layer(x))` with the two passes on streams of their own, often enough that a missing
/// order between the streams would show.
fn streams_are_ordered(device: &Device) -> Result<(), Failed> {
    let features = 256;
    let mut random = support::random::Random::of("streams");
    let values: Vec<_> = random.normal(600 * features).into_iter().map(f16::from_f32).collect();
    let layer_on = |device: &Device| {
        LinearConfig::new(features, features).dtype(DType::F16).seed(3).build(device)
    };
    let (first, second) = (layer_on(device)?, layer_on(&device.on_new_stream()?)?);
    let x = Tensor::from_slice(device, &values, [600, features])?;
    // compute-sanitizer's initcheck does not see what TMA stores: written before, nothing read
    // here is uninitialised in its eyes either.
    let output = || Tensor::full(device, [600, features], f16::POISON);
    let (mut middle, mut y) = (output()?, output()?);
    first.forward_into(&x, &mut middle)?;
    first.forward_into(&middle, &mut y)?;
    let expected = bits(&y.to_vec()?);
    for _ in 0..if reduced() { 2 } else { 50 } {
        let (mut middle, mut y) = (output()?, output()?);
        first.forward_into(&x, &mut middle)?;
        second.forward_into(&middle, &mut y)?;
        require(bits(&y.to_vec()?) == expected, || "the streams were not ordered".to_owned())?;
    }
    Ok(())
}

fn streams_agree(device: &Device) -> Result<(), Failed> {
    let shape = [200, 264, 136];
    let linear = Linear::<bf16>::random(shape);
    let other = device.on_new_stream()?;
    for case in cases([shape]) {
        let (first, _) = run(device, device.tier(), &KernelConfig::default(), &linear, &case)?;
        let (second, _) = run(&other, device.tier(), &KernelConfig::default(), &linear, &case)?;
        require(bits(&first) == bits(&second), || format!("{case:?}: the bits differ"))?;
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
