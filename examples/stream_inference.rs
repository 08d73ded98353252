//! Streams handwritten digits, one by one at a chosen rate, through a resident network, and draws
//! how long its answers took beside those of a launch per batch and of a CUDA graph.
//!
//! ```text
//! cargo run --release --example stream_inference -- [images per second] [plot.svg]
//! ```
//!
//! The network is a layer of 512 random ReLU features and a linear readout of ten classes, which a
//! ridge regression finds from the first 1,347 images. The other 450 are streamed, over and over.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kasmina::{
    Activation, DType, Device, KasminaLayer, LinearConfig, StreamConfig, StreamSession, Tensor, f16,
};

const PIXELS: usize = 64;
const FEATURES: usize = 512;
const CLASSES: usize = 10;
/// Images to learn from; the rest of the 1,797 are streamed.
const TRAINING: usize = 1347;
const REQUIRED_ACCURACY: f64 = 0.93;
/// How long each contender is streamed to.
const DURATION: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let rate: f64 = std::env::args().nth(1).map_or(Ok(5000.0), |rate| rate.parse())?;
    ensure!(rate > 0.0, "the rate is a number of images per second");
    let path = std::env::args().nth(2).map_or("target/stream_inference.svg".into(), PathBuf::from);
    let device = Device::auto()?;
    println!("device      {}", device.name());

    let (images, labels) = parse(include_str!("data/optdigits.txt"))?;
    let (features, readout) = train(&device, &images, &labels)?;
    let held_out: Vec<&[f16]> = images.chunks(PIXELS).skip(TRAINING).collect();
    let stream = Digits { images: &held_out, labels: &labels[TRAINING..], rate };
    let advised = features.should_use_persistent(rate, 0.0);
    println!(
        "rate        {rate} images/s: a resident kernel is {}advised",
        if advised { "" } else { "not " }
    );

    // Kernels that are first used while a grid stays may have to wait for it.
    features.warmup(1)?;
    readout.warmup(1)?;
    let mut runs = vec![stream.run("launch per image", |image| {
        let x = Tensor::from_slice(&device, image, [1, PIXELS])?;
        Ok(readout.forward(&features.forward(&x)?)?.to_vec()?)
    })?];
    #[cfg(feature = "cuda")]
    if let Some(replay) = graph::Replay::new(&device, &features, &readout)? {
        runs.push(stream.run("CUDA graph per image", |image| replay.answer(image))?);
    }
    let session = StreamSession::<f16>::of_stack(&[&features, &readout], StreamConfig::default())?;
    println!("session     {:?} on the {} tier", session.path(), session.tier());
    let answer = |image: &[f16]| Ok(session.submit_and_wait(image, TIMEOUT)?);
    runs.push(stream.run("resident session", answer)?);
    println!("statistics  {:?}", session.statistics());

    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, plot(&runs)).with_context(|| format!("cannot write {}", path.display()))?;
    println!("plot        {}", path.display());
    for run in &runs {
        ensure!(
            run.accuracy > REQUIRED_ACCURACY,
            "{} recognises {:.1} %, less than {} %",
            run.name,
            run.accuracy * 100.0,
            REQUIRED_ACCURACY * 100.0
        );
    }
    Ok(())
}

/// The images, one row of pixels from −1 to 1 each, and their labels, shuffled.
fn parse(text: &str) -> anyhow::Result<(Vec<f16>, Vec<usize>)> {
    let mut lines: Vec<&str> = text.lines().collect();
    let mut state = 1998;
    for last in (1..lines.len()).rev() {
        lines.swap(last, (split_mix(&mut state) % (last as u64 + 1)) as usize);
    }
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for line in lines {
        let (image, label) = line.split_once(' ').context("a line is an image and a label")?;
        ensure!(image.len() == PIXELS, "an image has {PIXELS} pixels, not {}", image.len());
        for pixel in image.chars() {
            let value = pixel.to_digit(17).context("a pixel is a base-17 digit")?;
            images.push(f16::from_f32(value as f32 / 8.0 - 1.0));
        }
        labels.push(label.parse()?);
    }
    Ok((images, labels))
}

/// SplitMix64: small, seeded, and the same numbers everywhere.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random features, and the readout that a ridge regression finds: with the features `F` of the
/// training images it solves `(FᵀF + λI)·A = FᵀT`, where `T` is 1 for an image's digit, else −1.
fn train(
    device: &Device,
    images: &[f16],
    labels: &[usize],
) -> anyhow::Result<(KasminaLayer, KasminaLayer)> {
    let features = LinearConfig::new(PIXELS, FEATURES)
        .activation(Activation::Relu)
        .dtype(DType::F16)
        .seed(11)
        .build(device)?;
    let x = Tensor::from_slice(device, &images[..TRAINING * PIXELS], [TRAINING, PIXELS])?;
    let values: Vec<f64> = features
        .forward(&x)?
        .to_vec()?
        .into_iter()
        .map(|value| f64::from(value.to_f32()))
        .collect();
    let rows: Vec<&[f64]> = values.chunks(FEATURES).collect();

    let mut gram = vec![vec![0.0; FEATURES]; FEATURES];
    let mut targets = vec![[0.0; CLASSES]; FEATURES];
    for (row, &label) in rows.iter().zip(labels) {
        for (i, &value) in row.iter().enumerate().filter(|(_, value)| **value != 0.0) {
            for (entry, other) in gram[i][..=i].iter_mut().zip(*row) {
                *entry += value * other;
            }
            for (class, target) in targets[i].iter_mut().enumerate() {
                *target += if class == label { value } else { -value };
            }
        }
    }
    let ridge = 1e-3 * (0..FEATURES).map(|i| gram[i][i]).sum::<f64>() / FEATURES as f64;
    // Cholesky in place: the lower triangle of FᵀF + λI becomes L.
    for i in 0..FEATURES {
        gram[i][i] += ridge;
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| gram[i][k] * gram[j][k]).sum();
            gram[i][j] =
                if i == j { (gram[i][i] - sum).sqrt() } else { (gram[i][j] - sum) / gram[j][j] };
        }
    }
    for i in 0..FEATURES {
        for j in 0..i {
            targets[i] = std::array::from_fn(|c| targets[i][c] - gram[i][j] * targets[j][c]);
        }
        targets[i] = targets[i].map(|value| value / gram[i][i]);
    }
    for i in (0..FEATURES).rev() {
        targets[i] = targets[i].map(|value| value / gram[i][i]);
        for j in 0..i {
            targets[j] = std::array::from_fn(|c| targets[j][c] - gram[i][j] * targets[i][c]);
        }
    }
    let mut readout =
        LinearConfig::new(FEATURES, CLASSES).bias(false).dtype(DType::F16).build(device)?;
    let weight: Vec<f32> =
        (0..CLASSES * FEATURES).map(|i| targets[i % FEATURES][i / FEATURES] as f32).collect();
    readout.set_weight(&weight)?;
    Ok((features, readout))
}

/// What is streamed, and how fast.
struct Digits<'a> {
    images: &'a [&'a [f16]],
    labels: &'a [usize],
    rate: f64,
}

/// What came of streaming to one contender.
struct Run {
    name: &'static str,
    accuracy: f64,
    /// Sorted.
    latencies: Vec<Duration>,
}

impl Run {
    fn quantile(&self, q: f64) -> f64 {
        let last = self.latencies.len() - 1;
        self.latencies[(q * last as f64).round() as usize].as_secs_f64() * 1e6
    }
}

impl Digits<'_> {
    /// Sends images at the rate, later ones at once where answers fell behind.
    fn run(
        &self,
        name: &'static str,
        mut answer: impl FnMut(&[f16]) -> anyhow::Result<Vec<f16>>,
    ) -> anyhow::Result<Run> {
        for image in self.images.iter().take(20) {
            answer(image)?;
        }
        let interval = Duration::from_secs_f64(1.0 / self.rate);
        let (mut latencies, mut correct) = (Vec::new(), 0);
        let start = Instant::now();
        let mut reported = Duration::ZERO;
        while start.elapsed() < DURATION {
            let due = interval.mul_f64(latencies.len() as f64);
            while start.elapsed() < due {
                std::hint::spin_loop();
            }
            let which = latencies.len() % self.images.len();
            let sent = Instant::now();
            let scores = answer(self.images[which])?;
            latencies.push(sent.elapsed());
            let best = (0..CLASSES).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            correct += usize::from(best == Some(self.labels[which]));
            if start.elapsed() > reported + DURATION / 4 {
                reported = start.elapsed();
                let run = Run::of(name, correct, latencies.clone());
                println!(
                    "{name:<22}{:>8} images, p50 {:>7.1} µs, p99 {:>7.1} µs, accuracy {:.2} %",
                    run.latencies.len(),
                    run.quantile(0.5),
                    run.quantile(0.99),
                    run.accuracy * 100.0
                );
            }
        }
        Ok(Run::of(name, correct, latencies))
    }
}

impl Run {
    fn of(name: &'static str, correct: usize, mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        Self { name, accuracy: correct as f64 / latencies.len() as f64, latencies }
    }
}

const WIDTH: f64 = 760.0;
const PANEL: f64 = 130.0;
const MARGIN: f64 = 40.0;
/// Bars per decade of latency.
const BARS: usize = 20;
/// 1 µs to 10 ms.
const DECADES: usize = 4;

/// A histogram of each contender's latencies over a logarithmic axis, as an SVG.
fn plot(runs: &[Run]) -> String {
    let height = MARGIN + runs.len() as f64 * PANEL + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        WIDTH + 2.0 * MARGIN
    );
    let bar_width = WIDTH / (BARS * DECADES) as f64;
    for (panel, run) in runs.iter().enumerate() {
        let top = MARGIN + panel as f64 * PANEL;
        let bottom = top + PANEL - MARGIN;
        let mut counts = [0usize; BARS * DECADES];
        for latency in &run.latencies {
            let place = (latency.as_secs_f64() * 1e6).max(1.0).log10() * BARS as f64;
            counts[(place as usize).min(BARS * DECADES - 1)] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(1).max(1);
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{}\">{}: p50 {:.1} µs, p99 {:.1} µs, {:.2} % right</text>\n\
             <path d=\"M{MARGIN} {bottom}h{WIDTH}\" stroke=\"#999\"/>",
            top - 6.0,
            run.name,
            run.quantile(0.5),
            run.quantile(0.99),
            run.accuracy * 100.0
        );
        for (bar, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let length = count as f64 / most as f64 * (PANEL - MARGIN - 10.0);
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{length:.1}\" \
                 fill=\"#1f6f8b\"/>",
                MARGIN + bar as f64 * bar_width,
                bottom - length,
                bar_width - 1.0
            );
        }
        for decade in 0..=DECADES {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{} µs</text>",
                MARGIN + decade as f64 * WIDTH / DECADES as f64,
                bottom + 14.0,
                10u32.pow(decade as u32)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// The network as a CUDA graph of two kernels, replayed for every image.
#[cfg(feature = "cuda")]
mod graph {
    use std::cell::RefCell;
    use std::ptr;

    use kasmina::{Device, KasminaLayer, Tensor, f16};
    use kasmina_driver::cust_raw::{CUgraph, CUgraphExec, CUstream, CUstreamCaptureMode};
    use kasmina_driver::{self as driver, check};

    use super::{CLASSES, FEATURES, PIXELS};

    pub(super) struct Replay {
        executable: CUgraphExec,
        device: Device,
        x: RefCell<Tensor<f16>>,
        y: Tensor<f16>,
        _hidden: Tensor<f16>,
    }

    impl Replay {
        /// `None` on the CPU. Nothing else uses the device's stream while it is captured.
        pub(super) fn new(
            device: &Device,
            features: &KasminaLayer,
            readout: &KasminaLayer,
        ) -> anyhow::Result<Option<Self>> {
            if !device.is_cuda() {
                return Ok(None);
            }
            let x = Tensor::zeros(device, [1, PIXELS])?;
            let mut hidden = Tensor::zeros(device, [1, FEATURES])?;
            let mut y = Tensor::zeros(device, [1, CLASSES])?;
            features.forward_into(&x, &mut hidden)?;
            readout.forward_into(&hidden, &mut y)?;
            device.synchronize()?;
            let stream = device.stream().as_raw() as CUstream;
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            let mut graph: CUgraph = ptr::null_mut();
            let mut executable = ptr::null_mut();
            // SAFETY: the stream lives as long as its handle; the pointers are valid for one handle
            // each; the graph is complete when it is instantiated and destroyed once.
            unsafe {
                check("cuStreamBeginCapture_v2", driver::cuStreamBeginCapture_v2(stream, mode))?;
                let enqueued = features
                    .forward_into(&x, &mut hidden)
                    .and_then(|_| readout.forward_into(&hidden, &mut y));
                check("cuStreamEndCapture", driver::cuStreamEndCapture(stream, &raw mut graph))?;
                enqueued?;
                check(
                    "cuGraphInstantiateWithFlags",
                    driver::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0),
                )?;
                check("cuGraphDestroy", driver::cuGraphDestroy(graph))?;
            }
            let (device, x) = (device.clone(), RefCell::new(x));
            Ok(Some(Self { executable, device, x, y, _hidden: hidden }))
        }

        /// The scores of an image.
        pub(super) fn answer(&self, image: &[f16]) -> anyhow::Result<Vec<f16>> {
            self.x.borrow_mut().copy_from_slice(image)?;
            let stream = self.device.stream().as_raw() as CUstream;
            // SAFETY: the graph's tensors are alive, and it was captured in this context.
            check("cuGraphLaunch", unsafe { driver::cuGraphLaunch(self.executable, stream) })?;
            Ok(self.y.to_vec()?)
        }
    }

    impl Drop for Replay {
        fn drop(&mut self) {
            // SAFETY: instantiated by `new`, and destroyed once.
            unsafe { driver::cuGraphExecDestroy(self.executable) };
        }
    }
}
