//! What happens when something fails. Those that stop or kill a process, or lose a context, run in
//! a process of their own: this program again, told by a variable which part to play.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use kasmina::{
    DType, Device, Error, KasminaLayer, KernelConfig, LinearConfig, SessionFault, StreamConfig,
    StreamPath, Tensor, Tier,
};
use kasmina_kernels::persistent::kernel;
use libtest_mimic::{Failed, Trial};

use crate::gpu::Gpu;
use crate::reference::{Stack, batch};
use crate::{Check, TIMEOUT, compare, config, linear, open, reduced, require};

/// Names the part that a child plays.
const PART: &str = "KASMINA_TEST_PERSISTENT_PART";
/// Names the tier on which it plays that.
const TIER: &str = "KASMINA_TEST_PERSISTENT_TIER";
const LEASE: Duration = Duration::from_secs(1);
/// What a child prints once its kernel stays.
const READY: &str = "ready";
/// The longest that any child may take.
const CHILD_TIMEOUT: Duration = Duration::from_secs(30);

/// What fails in this process.
fn claims() -> [(&'static str, Check); 3] {
    [
        ("a_producer_that_panics_leaves_the_session_working", panicking_producer),
        ("a_wait_that_times_out_can_be_repeated", timed_out),
        ("a_session_dropped_with_work_in_flight_ends_in_time", dropped),
    ]
}

pub(crate) fn on_cpu() -> impl Iterator<Item = Trial> {
    let tier = Tier::Cpu;
    claims().into_iter().map(move |(sentence, check)| {
        Trial::test(format!("{tier}_fault_{sentence}"), move || check(&Device::cpu(), tier))
    })
}

pub(crate) fn trials(gpu: &Gpu, tier: Tier) -> impl Iterator<Item = Trial> {
    let others: [(&'static str, Check); 4] = [
        ("launch_blocking_is_detected", |_, tier| plays("launch-blocking", tier)),
        ("a_stopped_process_loses_its_session_and_nothing_else", |_, tier| stopped(tier)),
        ("after_a_kill_a_new_process_works_at_once", killed),
        ("a_failing_kernel_is_named", |_, tier| plays("failing-kernel", tier)),
    ];
    // Under a sanitizer nothing stays, so nothing of this can happen.
    let ignored = reduced() || !found();
    claims().into_iter().chain(others).map(move |(sentence, check)| {
        let name = format!("{tier}_fault_{sentence}");
        gpu.trial(name, move |device| check(device, tier)).with_ignored_flag(ignored)
    })
}

/// Whether there is a GPU to test on, or has to be.
fn found() -> bool {
    Device::cuda(0).is_ok() || env::var_os("KASMINA_REQUIRE_GPU").is_some_and(|value| value == "1")
}

/// Plays the part that this process was started for.
pub(crate) fn child() -> Option<ExitCode> {
    let part = env::var(PART).ok()?;
    let name = env::var(TIER).unwrap_or_default();
    let tier = Tier::ALL.into_iter().find(|tier| tier.name() == name).unwrap_or(Tier::Cpu);
    let outcome = match part.as_str() {
        "launch-blocking" => launch_blocking(tier),
        "hold" => hold(tier),
        "failing-kernel" => failing_kernel(tier),
        other => Err(format!("no part is called {other}").into()),
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{part}: {}", error.message().unwrap_or("failed"));
            ExitCode::FAILURE
        }
    })
}

fn start(part: &str, tier: Tier) -> Result<Child, Failed> {
    let mut command = Command::new(env::current_exe()?);
    command.env(PART, part).env(TIER, tier.name());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if part == "launch-blocking" {
        command.env("CUDA_LAUNCH_BLOCKING", "1");
    }
    Ok(command.spawn()?)
}

/// Waits for a child, which is killed if it hangs.
fn finish(mut child: Child) -> Result<String, Failed> {
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > CHILD_TIMEOUT {
            child.kill()?;
            child.wait()?;
            return Err("the child hangs".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(stderr) } else { Err(stderr.into()) }
}

fn plays(part: &str, tier: Tier) -> Result<(), Failed> {
    finish(start(part, tier)?).map(drop)
}

fn layer(device: &Device, tier: Tier) -> Result<KasminaLayer, Failed> {
    Ok(linear(tier, DType::BF16, [256, 256]).build(device)?)
}

fn leased() -> StreamConfig {
    config().lease(LEASE)
}

fn panicking_producer(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, leased().depth(2).max_batch(32))?;
    for _ in 0..50 {
        let stream = session.new_stream()?;
        let producer =
            thread::Builder::new().name("panics on purpose".into()).spawn(move || {
                let _ticket = stream.submit_blocking(&batch::<bf16>(32, 256), TIMEOUT);
                // Without the message of a panic that is wanted.
                std::panic::resume_unwind(Box::new(()));
            })?;
        require(producer.join().is_err(), || "the producer did not panic".to_owned())?;
    }
    compare(&session, &Stack::of(&[&layer])?, 32)
}

fn timed_out(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, leased().blocks(1))?;
    let x = batch::<bf16>(256, 256);
    let mut tickets = (0..20).map(|_| session.submit(&x)).collect::<Result<Vec<_>, _>>()?;
    let mut last = tickets.pop().ok_or("no ticket")?;
    let refused = session.wait(&mut last, Duration::ZERO).err();
    require(matches!(refused, Some(Error::Timeout { .. })), || format!("{refused:?}"))?;
    let stack = Stack::of(&[&layer])?;
    Ok(stack.compare(&x, &session.wait(&mut last, TIMEOUT)?, tier)?)
}

fn dropped(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = layer(device, tier)?;
    let x = batch::<bf16>(256, 256);
    let config = leased().blocks(1).drain_timeout(Duration::ZERO);
    let session = open::<bf16>(&[&layer], tier, config)?;
    let tickets = (0..40).map(|_| session.submit(&x)).collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    drop(tickets);
    drop(session);
    require(start.elapsed() < LEASE * 3, || format!("dropping took {:?}", start.elapsed()))?;
    // Nothing is left that the next one would wait for.
    let session = open::<bf16>(&[&layer], tier, leased())?;
    compare(&session, &Stack::of(&[&layer])?, 8)
}

fn launch_blocking(tier: Tier) -> Result<(), Failed> {
    let device = Device::cuda(0)?;
    let layer = layer(&device, tier)?;
    let refused = layer.persistent::<bf16>(leased()).err();
    let typed = matches!(refused, Some(Error::Session { fault: SessionFault::LaunchBlocking, .. }));
    require(typed, || format!("{refused:?}"))?;
    let session = layer.persistent::<bf16>(leased().fallback(true))?;
    require(session.path() == StreamPath::LaunchPerBatch, || format!("{session:?}"))?;
    let stack = Stack::of(&[&layer])?;
    compare(&session, &stack, 20)?;
    let session = layer.persistent::<bf16>(leased().bounded(true))?;
    compare(&session, &stack, 20)
}

/// Keeps a session, and says what became of it.
fn hold(tier: Tier) -> Result<(), Failed> {
    let device = Device::cuda(0)?;
    let layer = layer(&device, tier)?;
    let session = open::<bf16>(&[&layer], tier, leased())?;
    let stack = Stack::of(&[&layer])?;
    compare(&session, &stack, 8)?;
    println!("{READY}");
    let fault = loop {
        match session.submit_and_wait(&batch::<bf16>(8, 256), TIMEOUT) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => break error,
        }
    };
    let expected = SessionFault::LeaseExpired { lease: LEASE };
    let typed = matches!(fault, Error::Session { fault, .. } if fault == expected);
    require(typed, || fault.to_string())?;
    drop(session);
    // Only the session is lost.
    let x = batch::<bf16>(8, 256);
    let y = layer.forward(&Tensor::from_slice(&device, &x, [8, 256])?)?.to_vec()?;
    stack.compare(&x, &y, tier)?;
    let session = open::<bf16>(&[&layer], tier, leased())?;
    compare(&session, &stack, 8)
}

/// A child that keeps a session.
fn holder(tier: Tier) -> Result<Child, Failed> {
    let mut child = start("hold", tier)?;
    let stdout = child.stdout.take().ok_or("the child has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() == READY {
        return Ok(child);
    }
    Err(finish(child).err().unwrap_or_else(|| "the child has ended".into()))
}

fn signal(child: &Child, name: &str) -> Result<(), Failed> {
    let status =
        Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status()?;
    require(status.success(), || format!("kill -{name} failed"))
}

fn stopped(tier: Tier) -> Result<(), Failed> {
    let child = holder(tier)?;
    signal(&child, "STOP")?;
    thread::sleep(LEASE * 2);
    signal(&child, "CONT")?;
    finish(child).map(drop)
}

fn killed(device: &Device, tier: Tier) -> Result<(), Failed> {
    let mut child = holder(tier)?;
    child.kill()?;
    child.wait()?;
    let start = Instant::now();
    // A new process, as a session of this one would prove less.
    let second = holder(tier)?;
    let taken = start.elapsed();
    let mut second = second;
    second.kill()?;
    second.wait()?;
    require(taken < CHILD_TIMEOUT / 3, || format!("the new process took {taken:?}"))?;
    let layer = layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, leased())?;
    compare(&session, &Stack::of(&[&layer])?, 8)
}

/// A session whose kernel ends with an error at once: its PTX is replaced by a trap.
fn failing_kernel(tier: Tier) -> Result<(), Failed> {
    let device = Device::cuda(0)?;
    let module = kernel(tier, DType::BF16).ok_or("no such kernel")?.module;
    let folder = env::temp_dir().join(format!("kasmina-trap-{}", std::process::id()));
    let file = PathBuf::from(module.tier.name()).join(format!("{}.ptx", module.name));
    let ptx = module.ptx();
    let entry = ptx.find(".entry").ok_or("the module has no entry")?;
    let body = entry + ptx[entry..].find('{').ok_or("the entry has no body")?;
    fs::create_dir_all(folder.join(module.tier.name()))?;
    // It begins as it should, so that the fault falls into the session's life.
    let begin = "st.volatile.global.u64";
    let text = trap_after_start(&ptx[..body], begin);
    fs::write(folder.join(&file), text)?;
    let kernel_config = KernelConfig::default().tier(tier).ptx_dir(&folder);
    let layer =
        LinearConfig::new(16, 16).dtype(DType::BF16).kernel_config(kernel_config).build(&device)?;
    let outcome = (|| {
        let session = layer.persistent::<bf16>(leased().blocks(1))?;
        session.submit_and_wait(&batch::<bf16>(1, 16), TIMEOUT)
    })();
    fs::remove_dir_all(&folder)?;
    let error = outcome.err().ok_or("a kernel that fails gave an answer")?;
    let named = matches!(
        error,
        Error::Session { fault: SessionFault::Kernel { .. }, .. } | Error::Driver { .. }
    );
    require(named, || error.to_string())
}

/// The entry's head with a body that says that block 0 runs, waits for the first descriptor and
/// then fails.
fn trap_after_start(head: &str, store: &str) -> String {
    let parameter = head.rsplit(".param").next().unwrap_or_default();
    let name = parameter
        .split_whitespace()
        .find(|word| word.contains("_param_0"))
        .and_then(|word| word.split('[').next())
        .unwrap_or_default();
    // Words: line 1 is block 0's status, line 2 holds the first descriptor.
    format!(
        "{head}{{\n.reg .b64 words, value;\n.reg .pred empty;\n\
         ld.param.u64 words, [{name}];\ncvta.to.global.u64 words, words;\n\
         {store} [words+64], 1;\n\
         wait:\nld.volatile.global.u64 value, [words+128];\n\
         setp.eq.u64 empty, value, 0;\n@empty bra wait;\ntrap;\n}}\n"
    )
}
