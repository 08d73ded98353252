//! What a forward pass costs on the host, beside the bare driver calls, and what the first one
//! costs in a new process.
//!
//! The shape is small, so that the GPU never makes the host wait.

use std::ffi::c_void;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use capture::Capture;
use criterion::Criterion;
use half::bf16;
use kasmina::{
    Activation, DType, Device, KernelConfig, LinearConfig, Tensor, Tier, WeightLayout, gemm,
};
use kasmina_driver::cust_raw::{CUDA_KERNEL_NODE_PARAMS, CUgraphNode, CUstream};
use kasmina_driver::{
    self as driver, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill,
    CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle, check,
};
use statistics::Summary;

#[path = "measure/capture.rs"]
mod capture;
#[path = "measure/statistics.rs"]
mod statistics;

const M: usize = 32;
const N: usize = 256;
const K: usize = 256;
/// Calls between two waits; the driver's queue holds over a thousand.
const BATCH: u64 = 64;
/// Batches behind the median of a comparison.
const BATCHES: usize = 200;
/// More operands than the cache of tensor maps holds, so that in turn each is met as new.
const NEW_OPERANDS: usize = 2048;

/// Set in the child process that makes a first forward pass.
const FIRST_FORWARD: &str = "KASMINA_BENCH_FIRST_FORWARD";

fn main() -> anyhow::Result<ExitCode> {
    if std::env::var_os(FIRST_FORWARD).is_some() {
        println!("{}", first_forward()?.as_secs_f64());
        return Ok(ExitCode::SUCCESS);
    }
    // A stream of its own can be captured.
    let device = match Device::cuda(0).and_then(|device| device.on_new_stream()) {
        Ok(device) => device,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    println!("{}, {} tier: {}", device.name(), device.tier(), device.tier_reason());
    let pass = Pass::new(&device)?;
    let bare = BareLaunch::of(&device, &pass)?;
    let mut criterion = Criterion::default().configure_from_args();
    compare_calls(&mut criterion, &device, &pass, &bare);
    criterion.final_summary();
    report_ratio(&device, &pass, &bare)?;
    report_first_forward()?;
    Ok(ExitCode::SUCCESS)
}

fn compare_calls(criterion: &mut Criterion, device: &Device, pass: &Pass, bare: &BareLaunch<'_>) {
    let mut group = criterion.benchmark_group("host");
    if device.tier() == Tier::Hopper {
        let x = pass.x[0].as_device_ptr();
        group
            .bench_function("tensor map, encoded", |bencher| bencher.iter(|| encode(black_box(x))));
    }
    group.bench_function("bare cuLaunchKernel", |bencher| {
        bencher.iter_custom(|calls| enqueued(device, calls, |_| bare.launch()));
    });
    let mut y = pass.new_y(device);
    group.bench_function("forward, tensor maps cached", |bencher| {
        bencher.iter_custom(|calls| enqueued(device, calls, |_| pass.forward(0, &mut y)));
    });
    group.bench_function("forward, X's tensor map new", |bencher| {
        bencher.iter_custom(|calls| enqueued(device, calls, |call| pass.forward(call, &mut y)));
    });
    group.finish();
}

/// Host time of `calls` enqueued calls; the GPU is waited for outside of it.
///
/// Criterion gives no way to return an error, and there is none to recover from.
fn enqueued(
    device: &Device,
    calls: u64,
    mut enqueue: impl FnMut(usize) -> anyhow::Result<()>,
) -> Duration {
    let mut total = Duration::ZERO;
    let mut done = 0;
    while done < calls {
        let batch = BATCH.min(calls - done);
        let start = Instant::now();
        for call in done..done + batch {
            enqueue(call as usize).expect("the call worked before");
        }
        total += start.elapsed();
        device.synchronize().expect("the call worked before");
        done += batch;
    }
    total
}

/// Batches of both by turns, so that both see the same machine.
fn report_ratio(device: &Device, pass: &Pass, bare: &BareLaunch<'_>) -> anyhow::Result<()> {
    let mut y = pass.new_y(device);
    let [mut forward_times, mut bare_times] = [Vec::new(), Vec::new()];
    for _ in 0..BATCHES {
        let per_call = |time: Duration| time.as_secs_f64() * 1e6 / BATCH as f64;
        bare_times.push(per_call(enqueued(device, BATCH, |_| bare.launch())));
        forward_times.push(per_call(enqueued(device, BATCH, |_| pass.forward(0, &mut y))));
    }
    let [forward, bare] = [forward_times, bare_times].map(Summary::new);
    println!(
        "\n| host time per call | batches | median µs | p10 | p90 | mean |\n|---|---|---|---|---|---|"
    );
    for (name, summary) in [("forward", forward), ("bare cuLaunchKernel", bare)] {
        let Summary { samples, median, p10, p90, mean } = summary;
        println!("| {name} | {samples} | {median:.3} | {p10:.3} | {p90:.3} | {mean:.3} |");
    }
    println!("\nforward / bare = {:.2}", forward.median / bare.median);
    Ok(())
}

/// A forward pass over many inputs.
struct Pass {
    /// Views at different addresses.
    x: Vec<Tensor<bf16>>,
    w: Tensor<bf16>,
    bias: Tensor<bf16>,
    config: KernelConfig,
}

impl Pass {
    fn new(device: &Device) -> anyhow::Result<Self> {
        let all = Tensor::zeros(device, [NEW_OPERANDS + M, K])?;
        let views = (0..NEW_OPERANDS).map(|first| all.rows(first..first + M));
        let pass = Self {
            x: views.collect::<Result<_, _>>()?,
            w: Tensor::zeros(device, [N, K])?,
            bias: Tensor::zeros(device, [N])?,
            config: KernelConfig::default(),
        };
        // Loads the kernel.
        pass.forward(0, &mut Tensor::zeros(device, [M, N])?)?;
        device.synchronize()?;
        Ok(pass)
    }

    fn new_y(&self, device: &Device) -> Tensor<bf16> {
        Tensor::zeros(device, [M, N]).expect("a tensor of this size was allocated before")
    }

    /// Enqueues the pass over input `call`.
    fn forward(&self, call: usize, y: &mut Tensor<bf16>) -> anyhow::Result<()> {
        let forward = gemm::Forward {
            x: &self.x[call % self.x.len()],
            w: &self.w,
            bias: Some(&self.bias),
            layout: WeightLayout::OutIn,
            activation: Activation::Relu,
        };
        forward.run(y, &self.config)?;
        Ok(())
    }
}

/// The kernel of a [`Pass`] with parameters that are ready, as a captured graph holds them.
struct BareLaunch<'a> {
    stream: CUstream,
    node: CUDA_KERNEL_NODE_PARAMS,
    /// Own the parameters and the memory they point to.
    _capture: Capture,
    _pass: &'a Pass,
    _y: Tensor<bf16>,
}

impl<'a> BareLaunch<'a> {
    fn of(device: &Device, pass: &'a Pass) -> anyhow::Result<Self> {
        let stream = device.stream().as_raw() as CUstream;
        let mut y = Tensor::zeros(device, [M, N])?;
        device.synchronize()?;
        let capture = Capture::new(device, || pass.forward(0, &mut y))?;
        let mut node: CUgraphNode = ptr::null_mut();
        let mut count = 1;
        // SAFETY: `node` has room for `count` nodes.
        check("cuGraphGetNodes", unsafe {
            driver::cuGraphGetNodes(capture.graph(), &raw mut node, &raw mut count)
        })?;
        ensure!(count == 1, "a forward pass is one kernel, not {count} operations");
        // SAFETY: a struct of integers and pointers, for which all zeros are valid.
        let mut params: CUDA_KERNEL_NODE_PARAMS = unsafe { std::mem::zeroed() };
        // SAFETY: the graph's only node is the kernel, and `params` is where the result goes.
        check("cuGraphKernelNodeGetParams", unsafe {
            driver::cuGraphKernelNodeGetParams(node, &raw mut params)
        })?;
        Ok(Self { stream, node: params, _capture: capture, _pass: pass, _y: y })
    }

    fn launch(&self) -> anyhow::Result<()> {
        let node = &self.node;
        // SAFETY: geometry and parameters are those of a forward pass that was captured; the
        // capture owns the parameters, and the tensors they point to are kept alive by `self`.
        let launched = unsafe {
            driver::cuLaunchKernel(
                node.func,
                node.gridDimX,
                node.gridDimY,
                node.gridDimZ,
                node.blockDimX,
                node.blockDimY,
                node.blockDimZ,
                node.sharedMemBytes,
                self.stream,
                node.kernelParams,
                ptr::null_mut(),
            )
        };
        Ok(check("cuLaunchKernel", launched)?)
    }
}

/// A tensor map like that of the pass's X, at `address`.
fn encode(address: u64) -> CUtensorMap {
    let mut map = CUtensorMap::default();
    let extents = [K as u64, M as u64];
    let row_stride = [(K * size_of::<bf16>()) as u64];
    let box_extents = [64, M as u32];
    // SAFETY: the arrays have as many entries as a matrix needs, and the driver reads them during
    // the call.
    let encoded = unsafe {
        driver::cuTensorMapEncodeTiled(
            &raw mut map,
            CUtensorMapDataType::Bfloat16,
            2,
            address as *mut c_void,
            extents.as_ptr(),
            row_stride.as_ptr(),
            box_extents.as_ptr(),
            [1, 1].as_ptr(),
            CUtensorMapInterleave::None,
            CUtensorMapSwizzle::Bytes128,
            CUtensorMapL2promotion::Bytes256,
            CUtensorMapFloatOOBfill::Zeros,
        )
    };
    check("cuTensorMapEncodeTiled", encoded).expect("the operands of the pass fit TMA");
    map
}

/// Time of a first forward pass, the layer's construction included, from an open device.
fn first_forward() -> anyhow::Result<Duration> {
    let device = Device::cuda(0)?;
    device.synchronize()?;
    let start = Instant::now();
    let layer =
        LinearConfig::new(K, N).activation(Activation::Relu).dtype(DType::BF16).build(&device)?;
    let x = Tensor::<bf16>::zeros(&device, [M, K])?;
    layer.forward(&x)?;
    device.synchronize()?;
    Ok(start.elapsed())
}

/// First forward passes of two new processes: one that finds the driver's compilation cache empty
/// and one that finds what the first left there.
fn report_first_forward() -> anyhow::Result<()> {
    let cache = std::env::temp_dir().join(format!("kasmina-launch-{}", std::process::id()));
    println!("\n| first forward pass of a process | s |\n|---|---|");
    let measured = ["cold JIT cache", "warm JIT cache"].into_iter().try_for_each(|name| {
        let output = Command::new(std::env::current_exe()?)
            .env(FIRST_FORWARD, "1")
            .env("CUDA_CACHE_PATH", &cache)
            .env("CUDA_CACHE_DISABLE", "0")
            .output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the first forward pass failed: {stderr}");
        let seconds: f64 = String::from_utf8(output.stdout)?
            .trim()
            .parse()
            .context("the child process prints its seconds")?;
        println!("| {name} | {seconds:.3} |");
        Ok(())
    });
    // Nothing is there if the driver keeps no cache.
    let _ = std::fs::remove_dir_all(&cache);
    measured
}
