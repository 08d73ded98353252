//! Resident sessions: right answers on every path and tier, the rules of the queue, and what
//! happens when something fails.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes lists short enough for
//! compute-sanitizer and opens every session `bounded`. `KASMINA_TEST_SOAK` is the number of items
//! of the soak, by default 20,000 on the CPU and 200,000 on a GPU.

#[path = "persistent/awaited.rs"]
mod awaited;
#[path = "persistent/faults.rs"]
mod faults;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "persistent/queue.rs"]
mod queue;
#[path = "support/random.rs"]
mod random;
#[path = "persistent/reference.rs"]
mod reference;
#[path = "persistent/soak.rs"]
mod soak;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use gpu::Gpu;
use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, Error, KasminaLayer, KernelConfig, LinearConfig, PlanFault,
    SessionFault, StreamConfig, StreamPath, StreamSession, Tensor, Tier, WeightLayout,
};
use libtest_mimic::{Arguments, Failed, Trial};
use random::seed;
use reference::{Poison, Stack, batch, bits};

type Check = fn(&Device, Tier) -> Result<(), Failed>;

const TIMEOUT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    if let Some(outcome) = faults::child() {
        return outcome;
    }
    let gpu = Gpu::find();
    let mut trials = Vec::new();
    for (name, check) in claims(Tier::Cpu) {
        trials.push(Trial::test(name, move || check(&Device::cpu(), Tier::Cpu)));
    }
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    let mut tiers = vec![Tier::Portable, Tier::Hopper];
    // No requirement can give a GPU what it lacks.
    tiers.retain(|tier| capability.is_none_or(|gpu| tier.runs_on(gpu.major, gpu.minor)));
    for &tier in &tiers {
        for (name, check) in claims(tier) {
            trials.push(gpu.trial(name, move |device| check(device, tier)));
        }
        trials.push(gpu.trial(format!("{tier}_bf16_soak_loses_nothing"), move |device| {
            soak::run(device, tier, 200_000)
        }));
    }
    trials.push(Trial::test("cpu_bf16_soak_loses_nothing", || {
        soak::run(&Device::cpu(), Tier::Cpu, 20_000)
    }));
    trials.extend(faults::on_cpu());
    trials.extend([
        gpu.trial("work_beside_a_session_completes", beside),
        gpu.trial("memory_freed_beside_a_session_does_not_wait_for_it", freed_beside),
        gpu.trial("a_kernel_that_would_be_loaded_beside_a_session_is_refused", loaded_beside),
        gpu.trial("sessions_may_be_open_side_by_side", two_sessions),
        gpu.trial("what_cannot_stay_falls_back_or_says_why", fallback),
        gpu.trial("a_bounded_session_gives_the_bits_of_one_that_stays", bounded),
    ]);
    // Last, as one of them may leave the GPU busy until its lease is over.
    trials.extend(tiers.into_iter().flat_map(|tier| faults::trials(&gpu, tier)));

    // One at a time: sessions hold multiprocessors, and faults are timed.
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let conclusion = libtest_mimic::run(&arguments, trials);
    println!("seed {}", seed());
    conclusion.exit_code()
}

/// What is claimed of a tier, for each element type that it has kernels for.
fn claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Poison>() -> Vec<(&'static str, Check)> {
        vec![
            ("batches_of_every_size_match_reference", batches::<T>),
            ("widths_around_every_edge_match_reference", widths::<T>),
            ("every_activation_and_layout_matches_reference", epilogues::<T>),
            ("stacks_match_reference", stacks::<T>),
            ("bits_do_not_depend_on_parts_or_repetition", repeats::<T>),
            ("tensors_are_used_where_they_are", tensors::<T>),
            ("nan_and_infinities_stay_in_their_row", non_finite::<T>),
            ("nan_of_all_bits_passes_where_it_says_that_nothing_is_there", all_ones::<T>),
            ("new_parameters_are_used_from_the_next_batch_on", updates::<T>),
        ]
    }
    fn once() -> Vec<(&'static str, Check)> {
        vec![
            ("results_come_in_the_order_of_batches", queue::pipelined),
            ("a_pipeline_deeper_than_the_queue_goes_on", queue::deep_pipeline),
            ("a_refused_batch_of_a_pipeline_keeps_its_place", queue::refused_in_pipeline),
            ("the_largest_batch_fits_however_it_is_cut", queue::cut),
            ("tickets_are_taken_as_they_were_given", queue::wrong_tickets),
            ("a_full_queue_says_so_and_recovers", queue::full),
            ("logical_streams_share_the_slots", queue::fair),
            ("dropped_tickets_give_their_slots_back", queue::dropped),
            ("a_result_is_given_once", queue::once_only),
            ("tasks_are_woken_for_their_answers", awaited::answers),
            ("tasks_are_refused_what_others_are", awaited::refusals),
            ("wrong_batches_are_refused", refusals),
            ("statistics_count_what_was_done", statistics),
            ("a_closed_session_refuses_and_the_layer_works_on", closed),
            ("dropping_a_session_with_work_in_flight_ends", dropped_session),
        ]
    }
    let mut claims = Vec::new();
    let mut add = |dtype: DType, list: Vec<(&'static str, Check)>| {
        for (claim, check) in list {
            claims.push((format!("{tier}_{dtype}_{claim}"), check));
        }
    };
    if tier != Tier::Hopper {
        add(DType::F32, of::<f32>());
    }
    add(DType::F16, of::<f16>());
    add(DType::BF16, of::<bf16>());
    add(DType::BF16, once());
    claims
}

fn reduced() -> bool {
    env::var_os("KASMINA_TEST_REDUCED").is_some_and(|value| value == "1")
}

/// Where a trial runs: on this tier and, on a GPU, resident.
fn config() -> StreamConfig {
    let config = StreamConfig::default().lease(Duration::from_secs(2)).fallback(false);
    config.bounded(reduced())
}

fn linear(tier: Tier, dtype: DType, widths: [usize; 2]) -> LinearConfig {
    let kernel_config = KernelConfig::default().tier(tier);
    LinearConfig::new(widths[0], widths[1])
        .dtype(dtype)
        .activation(Activation::Relu)
        .seed(7)
        .kernel_config(kernel_config)
}

fn open<T: Poison>(
    layers: &[&KasminaLayer],
    tier: Tier,
    config: StreamConfig,
) -> Result<StreamSession<T>, Failed> {
    let session = StreamSession::of_stack(layers, config)?;
    let path = if tier == Tier::Cpu { StreamPath::Threads } else { StreamPath::Resident };
    require(session.path() == path && session.tier() == tier, || format!("{session:?}"))?;
    Ok(session)
}

/// Submits a batch with poison where its result is to be, and compares every element.
fn compare<T: Poison>(
    session: &StreamSession<T>,
    stack: &Stack,
    rows: usize,
) -> Result<(), Failed> {
    let x = batch::<T>(rows, stack.in_features());
    let mut y = vec![T::POISON; rows * stack.out_features()];
    let mut ticket = session.submit(&x)?;
    session.wait_into(&mut ticket, &mut y, TIMEOUT)?;
    stack.compare(&x, &y, session.tier()).map_err(|error| format!("{rows} rows: {error}").into())
}

fn batches<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = linear(tier, T::DTYPE, [256, 256]).build(device)?;
    let stack = Stack::of(&[&layer])?;
    let session = open::<T>(&[&layer], tier, config())?;
    let sizes: &[usize] = if reduced() {
        &[1, 9, 33]
    } else {
        &[1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 128, 200, 255, 256]
    };
    for &rows in sizes {
        compare(&session, &stack, rows)?;
    }
    Ok(())
}

fn widths<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let cases: &[[usize; 2]] = if reduced() {
        &[[1, 1], [33, 7], [40, 64]]
    } else {
        &[
            [1, 1],
            [1, 33],
            [31, 32],
            [32, 31],
            [33, 65],
            [7, 255],
            [255, 8],
            [8, 257],
            [97, 101],
            [128, 520],
            [520, 128],
            [1023, 3],
            [1024, 40],
        ]
    };
    for &case in cases {
        // Their activations alone need more than the 64 KiB that the portable tier asks for.
        if tier == Tier::Portable && case[0].max(case[1]) > 900 {
            continue;
        }
        let layer = linear(tier, T::DTYPE, case).build(device)?;
        let stack = Stack::of(&[&layer])?;
        let session = open::<T>(&[&layer], tier, config())?;
        for rows in [1, 5, 13, 32] {
            compare(&session, &stack, rows).map_err(|error| {
                Failed::from(format!("{case:?}: {}", error.message().unwrap_or_default()))
            })?;
        }
    }
    Ok(())
}

fn epilogues<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    for activation in Activation::ALL {
        for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
            let config_of = linear(tier, T::DTYPE, [48, 40]).activation(activation);
            let bias = layout == WeightLayout::InOut;
            let layer = config_of.weight_layout(layout).bias(bias).build(device)?;
            let session = open::<T>(&[&layer], tier, config())?;
            compare(&session, &Stack::of(&[&layer])?, 19)?;
        }
    }
    Ok(())
}

fn stacks<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let cases: &[&[usize]] =
        if reduced() { &[&[33, 17, 40]] } else { &[&[256, 256, 256, 64], &[33, 17, 40, 5, 64]] };
    for &case in cases {
        let layers = (0..case.len() - 1)
            .map(|i| {
                let config = linear(tier, T::DTYPE, [case[i], case[i + 1]]).seed(i as u64);
                config.activation(Activation::ALL[i % 5]).build(device)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let layers: Vec<&KasminaLayer> = layers.iter().collect();
        let session = open::<T>(&layers, tier, config())?;
        let stack = Stack::of(&layers)?;
        for rows in [1, 8, 21, 64] {
            compare(&session, &stack, rows)?;
        }
    }
    Ok(())
}

fn repeats<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = linear(tier, T::DTYPE, [100, 60]).build(device)?;
    let x = batch::<T>(77, 100);
    let mut expected: Option<Vec<u32>> = None;
    for part_rows in [None, Some(8), Some(16), Some(24), Some(32)] {
        let config = part_rows.map_or(config(), |rows| config().part_rows(rows));
        let session = open::<T>(&[&layer], tier, config)?;
        if tier == Tier::Cpu {
            // Its product library blocks rows by their number.
            expected = None;
        }
        for repetition in 0..if reduced() { 1 } else { 20 } {
            // However busy the blocks or threads are.
            let beside = (0..repetition % 4).map(|_| session.submit(&x));
            let beside = beside.collect::<Result<Vec<_>, _>>()?;
            let got = bits(&session.submit_and_wait(&x, TIMEOUT)?);
            drop(beside);
            let expected = expected.get_or_insert_with(|| got.clone());
            require(got == *expected, || format!("parts of {part_rows:?} rows give other bits"))?;
        }
    }
    Ok(())
}

fn tensors<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = linear(tier, T::DTYPE, [36, 44]).build(device)?;
    let stack = Stack::of(&[&layer])?;
    let session = open::<T>(&[&layer], tier, config())?;
    // The second is one element off every alignment but its own.
    for offset in [0, 1] {
        for rows in [1, 40] {
            let x = batch::<T>(rows, 36);
            let mut padded = vec![T::POISON; offset];
            padded.extend(&x);
            let all = Tensor::from_slice(device, &padded, [padded.len()])?;
            let x_view = all.columns(offset..padded.len())?;
            let poison = vec![T::POISON; rows * 44];
            let mut y = Tensor::from_slice(device, &poison, [rows, 44])?;
            if rows == 1 {
                let x_row = x_view.rows(0..1)?;
                let mut ticket = session.submit_tensors(&x_row, &mut y)?;
                session.wait_tensors(&mut ticket, TIMEOUT)?;
            } else if offset == 0 {
                let x_tensor = Tensor::from_slice(device, &x, [rows, 36])?;
                let mut ticket = session.submit_tensors(&x_tensor, &mut y)?;
                session.wait_tensors(&mut ticket, TIMEOUT)?;
                let strided = Tensor::<T>::zeros(device, [rows, 40])?.columns(0..36)?;
                let refused = session.submit_tensors(&strided, &mut y).err();
                let typed = matches!(refused, Some(Error::Strided { .. }));
                require(typed, || format!("{refused:?}"))?;
            } else {
                continue;
            }
            stack.compare(&x, &y.to_vec()?, tier)?;
        }
    }
    Ok(())
}

fn non_finite<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = linear(tier, T::DTYPE, [50, 30]).build(device)?;
    let stack = Stack::of(&[&layer])?;
    let session = open::<T>(&[&layer], tier, config())?;
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = batch::<T>(20, 50);
        x[3 * 50 + 49] = T::from_f32(special);
        x[11 * 50] = T::from_f32(special);
        stack.compare(&x, &session.submit_and_wait(&x, TIMEOUT)?, tier)?;
        // The slot's next batch finds nothing of it.
        compare(&session, &stack, 3)?;
    }
    Ok(())
}

/// Payloads and results say by elements of all ones that they are not there.
fn all_ones<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let mut layer = linear(tier, T::DTYPE, [64, 40]).build(device)?;
    let session = open::<T>(&[&layer], tier, config())?;
    let stack = Stack::of(&[&layer])?;
    for special in [T::POISON, T::POISON_WITHOUT_SIGN] {
        for rows in [1, 8, 9, 32] {
            let mut x = batch::<T>(rows, 64);
            x[5] = special;
            x[rows * 64 - 1] = special;
            // In slots of every kind.
            for _ in 0..4 {
                stack.compare(&x, &session.submit_and_wait(&x, TIMEOUT)?, tier)?;
            }
            compare(&session, &stack, rows)?;
        }
    }
    let (weight, bias) = (layer.weight()?, [0.5; 40]);
    for special in [u32::MAX, u32::MAX >> 1].map(f32::from_bits) {
        let mut with_nan = weight.clone();
        with_nan[3] = special;
        layer.set_weight(&with_nan)?;
        session.update(&[&layer], TIMEOUT)?;
        compare(&session, &Stack::of(&[&layer])?, 9)?;
        layer.set_weight(&weight)?;
        let mut with_nan = bias;
        with_nan[39] = special;
        layer.set_bias(&with_nan)?;
        session.update(&[&layer], TIMEOUT)?;
        compare(&session, &Stack::of(&[&layer])?, 9)?;
    }
    Ok(())
}

fn updates<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let mut layer = linear(tier, T::DTYPE, [64, 48]).build(device)?;
    let session = open::<T>(&[&layer], tier, config())?;
    for version in 0..if reduced() { 2 } else { 6 } {
        let before = Stack::of(&[&layer])?;
        let x = batch::<T>(40, 64);
        let mut in_flight = session.submit(&x)?;
        let weight: Vec<f32> = layer.weight()?.iter().map(|w| 0.5 - w * 1.25).collect();
        layer.set_weight(&weight)?;
        layer.set_bias(&[version as f32; 48])?;
        session.update(&[&layer], TIMEOUT)?;
        before.compare(&x, &session.wait(&mut in_flight, TIMEOUT)?, tier)?;
        compare(&session, &Stack::of(&[&layer])?, 40)?;
    }
    let other = linear(tier, T::DTYPE, [64, 47]).build(device)?;
    let refused = session.update(&[&other], TIMEOUT).err();
    require(matches!(refused, Some(Error::Shape { .. })), || format!("{refused:?}"))
}

fn bf16_layer(device: &Device, tier: Tier) -> Result<KasminaLayer, Failed> {
    Ok(linear(tier, DType::BF16, [16, 16]).build(device)?)
}

fn refusals(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config().max_batch(32))?;
    for length in [0, 1, 15, 17, 33 * 16] {
        let refused = session.submit(&vec![bf16::ONE; length]).err();
        let typed = matches!(refused, Some(Error::Shape { operand: "batch", .. }));
        require(typed, || format!("{length} values: {refused:?}"))?;
    }
    let refused = layer.persistent::<f32>(config()).err();
    require(matches!(refused, Some(Error::DType { .. })), || format!("{refused:?}"))?;
    let chain = linear(tier, DType::BF16, [17, 4]).build(device)?;
    let refused = StreamSession::<bf16>::of_stack(&[&layer, &chain], config()).err();
    let expected = PlanFault::Chain { layer: 1, expected: 16, got: 17 };
    let typed = matches!(refused, Some(Error::Session { fault: SessionFault::Stack(fault), .. })
        if fault == expected);
    require(typed, || format!("{refused:?}"))?;
    let refused = StreamSession::<bf16>::of_stack(&[], config()).err();
    require(matches!(refused, Some(Error::Session { .. })), || format!("{refused:?}"))?;
    compare(&session, &Stack::of(&[&layer])?, 32)
}

fn statistics(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    for _ in 0..5 {
        session.submit_and_wait(&batch::<bf16>(2, 16), TIMEOUT)?;
    }
    session.ping(TIMEOUT)?;
    let held = session.submit(&batch::<bf16>(2, 16))?;
    let statistics = session.statistics();
    let counts = (statistics.submitted, statistics.completed, statistics.depth);
    require(counts == (7, 6, 1), || format!("{statistics:?}"))?;
    let ordered = statistics.p50 <= statistics.p99 && statistics.p99 <= statistics.p999;
    let positive = statistics.p50 > Duration::ZERO && statistics.items_per_second > 0.0;
    require(ordered && positive, || format!("{statistics:?}"))?;
    drop(held);
    session.reset_statistics();
    require(session.statistics().completed == 0, || "not reset".to_owned())
}

fn closed(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let x = batch::<bf16>(9, 16);
    let mut ticket = session.submit(&x)?;
    session.close(TIMEOUT)?;
    let stack = Stack::of(&[&layer])?;
    stack.compare(&x, &session.wait(&mut ticket, TIMEOUT)?, tier)?;
    let refused = session.submit(&x).err();
    let typed = matches!(refused, Some(Error::Session { fault: SessionFault::Closed, .. }));
    require(typed, || format!("{refused:?}"))?;
    session.close(TIMEOUT)?;
    let y = layer.forward(&Tensor::from_slice(device, &x, [9, 16])?)?.to_vec()?;
    Ok(stack.compare(&x, &y, tier)?)
}

fn dropped_session(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let x = batch::<bf16>(32, 16);
    for _ in 0..3 {
        let session = open::<bf16>(&[&layer], tier, config())?;
        let tickets: Result<Vec<_>, _> = (0..20).map(|_| session.submit(&x)).collect();
        drop(session);
        // The tickets keep the session: now it ends, with their work in flight or done.
        drop(tickets?);
    }
    Ok(())
}

fn beside(device: &Device) -> Result<(), Failed> {
    let layer = linear(device.tier(), DType::BF16, [256, 256]).build(device)?;
    let large = LinearConfig::new(512, 1024).dtype(DType::BF16).build(device)?;
    large.warmup(512)?;
    let session = open::<bf16>(&[&layer], device.tier(), config())?;
    let x = Tensor::full(device, [512, 512], bf16::ONE)?;
    let expected = large.forward(&x)?.to_vec()?;
    let stack = Stack::of(&[&layer])?;
    for _ in 0..if reduced() { 2 } else { 50 } {
        compare(&session, &stack, 16)?;
        let y = large.forward(&x)?.to_vec()?;
        require(bits(&y) == bits(&expected), || "other bits beside a session".to_owned())?;
    }
    Ok(())
}

fn freed_beside(device: &Device) -> Result<(), Failed> {
    let layer = linear(device.tier(), DType::BF16, [64, 64]).build(device)?;
    let session = open::<bf16>(&[&layer], device.tier(), config())?;
    let other = device.on_new_stream()?;
    drop(Tensor::<f32>::zeros(&other, [1 << 20])?);
    other.trim()?;
    drop(Tensor::<f32>::zeros(&other, [3 << 20])?);
    drop(other);
    compare(&session, &Stack::of(&[&layer])?, 16)
}

fn loaded_beside(device: &Device) -> Result<(), Failed> {
    let layer = linear(device.tier(), DType::BF16, [64, 64]).build(device)?;
    let session = open::<bf16>(&[&layer], device.tier(), config().bounded(false))?;
    // No other trial uses a kernel from here.
    let copy = env::temp_dir().join(format!("kasmina-beside-{}", std::process::id()));
    let elsewhere = KernelConfig::default().tier(Tier::Portable).ptx_dir(&copy);
    let other = LinearConfig::new(8, 8).kernel_config(elsewhere).build(device)?;
    let refused = other.forward(&Tensor::full(device, [1, 8], 1.0f32)?).err();
    let fault = SessionFault::LoadBeside { kernel: "gemm_f32_nk_128x128x16" };
    let typed = matches!(refused, Some(Error::Session { fault: got, .. }) if got == fault);
    require(typed, || format!("{refused:?}"))?;
    compare(&session, &Stack::of(&[&layer])?, 8)
}

fn two_sessions(device: &Device) -> Result<(), Failed> {
    let first = linear(device.tier(), DType::BF16, [64, 64]).build(device)?;
    let second = linear(Tier::Portable, DType::F32, [40, 24]).build(device)?;
    // Its kernel cannot be loaded beside the first.
    drop(open::<f32>(&[&second], Tier::Portable, config())?);
    let a = open::<bf16>(&[&first], device.tier(), config())?;
    let b = open::<f32>(&[&second], Tier::Portable, config())?;
    let (first_stack, second_stack) = (Stack::of(&[&first])?, Stack::of(&[&second])?);
    for rows in [1, 30, 60] {
        compare(&a, &first_stack, rows)?;
        compare(&b, &second_stack, rows)?;
    }
    drop(a);
    compare(&b, &second_stack, 5)
}

fn fallback(device: &Device) -> Result<(), Failed> {
    let wide = LinearConfig::new(1500, 40).dtype(DType::BF16).build(device)?;
    let refused = wide.persistent::<bf16>(config()).err();
    let expected = SessionFault::Stack(PlanFault::Width(1500));
    let typed = matches!(refused, Some(Error::Session { fault, .. }) if fault == expected);
    require(typed, || format!("{refused:?}"))?;
    let session = wide.persistent::<bf16>(config().fallback(true))?;
    require(session.path() == StreamPath::LaunchPerBatch, || format!("{session:?}"))?;
    compare(&session, &Stack::of(&[&wide])?, 70)?;

    let layer = linear(device.tier(), DType::BF16, [256, 256]).build(device)?;
    let refused = layer.persistent::<bf16>(config().blocks(8192)).err();
    let typed = matches!(
        refused,
        Some(Error::Session { fault: SessionFault::NoRoom { blocks: 8192, .. }, .. })
    );
    require(typed, || format!("{refused:?}"))
}

fn bounded(device: &Device) -> Result<(), Failed> {
    let layer = linear(device.tier(), DType::BF16, [256, 256]).build(device)?;
    let x = batch::<bf16>(50, 256);
    let staying = open::<bf16>(&[&layer], device.tier(), config())?;
    let expected = bits(&staying.submit_and_wait(&x, TIMEOUT)?);
    drop(staying);
    let session = open::<bf16>(&[&layer], device.tier(), config().bounded(true))?;
    for _ in 0..3 {
        let mut tickets = vec![session.submit(&x)?, session.submit(&x)?];
        for ticket in &mut tickets {
            let got = bits(&session.wait(ticket, TIMEOUT)?);
            require(got == expected, || "other bits".to_owned())?;
        }
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
