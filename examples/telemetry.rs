//! Watches the activations of a `KasminaLayer` while batches of handwritten digits pass through
//! it, and shows what telemetry is for: the images fade slowly, and once a pixel is NaN.
//!
//! ```text
//! cargo run --release --example telemetry [plot.svg]
//! ```
//!
//! The forward pass itself summarises chunks of the features, where a kernel for that serves it, and
//! one more launch summarises all activations. The results stay on the device until the next batch is
//! on its way, so that watching never makes the GPU wait.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use kasmina::{
    Activation, DType, Device, LayerTelemetry, LinearConfig, PendingSummary, ReducerConfig,
    Summary, TelemetryReducer, Tensor, f16,
};

const PIXELS: usize = 64;
const FEATURES: usize = 1024;
/// Chunks of the features that are watched each by itself.
const CHUNKS: usize = 16;
/// Images per batch.
const BATCH: usize = 128;
const BATCHES: usize = 120;
/// The batch from which on the images fade.
const FADING: usize = 40;
/// The batch with a pixel that is NaN.
const BROKEN: usize = 90;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).map_or("target/telemetry.svg".into(), PathBuf::from);
    let device = Device::auto()?;
    println!("device    {}", device.name());
    println!("tier      {}: {}", device.tier(), device.tier_reason());

    let images = parse(include_str!("data/optdigits.txt"))?;
    let layer = LinearConfig::new(PIXELS, FEATURES)
        .activation(Activation::Relu)
        .dtype(DType::F16)
        .seed(7)
        .build(&device)?;
    let reducer = TelemetryReducer::with_config(&device, ReducerConfig::default().epsilon(1e-3))?;

    println!("\nbatch     mean      std  max |x|   dead    SNR  non-finite");
    let mut summaries = Vec::with_capacity(BATCHES);
    let mut chunks = Vec::with_capacity(BATCHES);
    let mut pending: Option<(PendingSummary, LayerTelemetry)> = None;
    for batch in 0..BATCHES {
        let x = Tensor::from_slice(&device, &pixels(&images, batch), [BATCH, PIXELS])?;
        let (y, each) = layer.forward_with_telemetry(&x, &reducer, CHUNKS)?;
        let whole = reducer.summary_async(&y)?;
        // Those of the batch before, while the GPU works on this one.
        if let Some((whole, each)) = pending.replace((whole, each)) {
            report(&mut summaries, whole.read()?);
            chunks.push(each.read()?);
        }
    }
    if let Some((whole, each)) = pending {
        report(&mut summaries, whole.read()?);
        chunks.push(each.read()?);
    }
    print_chunks(&chunks[BATCHES - 1]);

    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, plot(&summaries, &chunks))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nplot      {}", path.display());

    let suspects: Vec<usize> =
        (0..BATCHES).filter(|&batch| summaries[batch].non_finite() > 0).collect();
    println!("broken    batch {suspects:?}");
    ensure!(suspects == [BROKEN], "batch {BROKEN} and no other has a pixel that is NaN");
    ensure!(
        summaries[BATCHES - 1].abs_max() < summaries[0].abs_max(),
        "faded images must show in the largest activation"
    );
    Ok(())
}

/// The images, one row of [`PIXELS`] values from 0 to 2 each.
fn parse(text: &str) -> anyhow::Result<Vec<f32>> {
    let mut images = Vec::new();
    for line in text.lines() {
        let (image, _) = line.split_once(' ').context("a line is an image and a label")?;
        ensure!(image.len() == PIXELS, "an image has {PIXELS} pixels, not {}", image.len());
        for pixel in image.chars() {
            let value = pixel.to_digit(17).context("a pixel is a base-17 digit")?;
            images.push(value as f32 / 8.0);
        }
    }
    Ok(images)
}

/// The pixels of a batch, as a camera delivers them whose lens gets dirty.
fn pixels(images: &[f32], batch: usize) -> Vec<f16> {
    let fading = batch.saturating_sub(FADING) as f32 / (BATCHES - FADING) as f32;
    let brightness = 1.0 - 0.8 * fading;
    let first = batch * BATCH * PIXELS;
    let mut pixels: Vec<f16> = (first..first + BATCH * PIXELS)
        .map(|pixel| f16::from_f32(images[pixel % images.len()] * brightness))
        .collect();
    if batch == BROKEN {
        pixels[PIXELS / 2] = f16::NAN;
    }
    pixels
}

/// Keeps a summary, and prints every tenth and those that are not all finite.
fn report(summaries: &mut Vec<Summary>, summary: Summary) {
    let batch = summaries.len();
    if batch.is_multiple_of(10) || summary.non_finite() > 0 {
        let mut row = format!("{batch:>5}");
        for (_, quantity) in QUANTITIES {
            // Writing to a string cannot fail.
            let _ = write!(row, "  {:7.4}", quantity(&summary));
        }
        println!("{row}  {:>10}", summary.non_finite());
    }
    summaries.push(summary);
}

/// The chunks of one batch, one row each.
fn print_chunks(chunks: &[Summary]) {
    println!("\nchunk     mean      std  max |x|   dead    SNR  of the last batch");
    for (chunk, summary) in chunks.iter().enumerate() {
        let mut row = format!("{chunk:>5}");
        for (_, quantity) in QUANTITIES {
            // Writing to a string cannot fail.
            let _ = write!(row, "  {:7.4}", quantity(summary));
        }
        println!("{row}");
    }
}

type Quantity = fn(&Summary) -> f64;

/// What is plotted; a summary of a batch has elements, so no quantity is missing.
const QUANTITIES: [(&str, Quantity); 5] = [
    ("mean", |summary| summary.mean().unwrap_or(f64::NAN)),
    ("standard deviation", |summary| summary.variance().unwrap_or(f64::NAN).sqrt()),
    ("largest |x|", |summary| summary.abs_max().map_or(f64::NAN, f64::from)),
    ("dead ratio", |summary| summary.dead_ratio().unwrap_or(f64::NAN)),
    ("signal-to-noise ratio", |summary| summary.signal_to_noise().unwrap_or(f64::NAN)),
];

const WIDTH: f64 = 760.0;
const PANEL: f64 = 110.0;
const MARGIN: f64 = 40.0;

/// One panel per quantity over the batches, as an SVG, red where an activation was not finite; then
/// the dead ratio of each chunk of features.
fn plot(summaries: &[Summary], chunks: &[Vec<Summary>]) -> String {
    let height = MARGIN + (QUANTITIES.len() + 1) as f64 * PANEL;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        WIDTH + 2.0 * MARGIN
    );
    for (panel, (name, quantity)) in QUANTITIES.into_iter().enumerate() {
        draw_panel(&mut svg, MARGIN + panel as f64 * PANEL, name, summaries, quantity);
    }
    draw_chunks(&mut svg, MARGIN + QUANTITIES.len() as f64 * PANEL, chunks);
    svg.push_str("</svg>\n");
    svg
}

/// A row for each chunk and a column for each batch, the darker the more of it is dead.
fn draw_chunks(svg: &mut String, top: f64, chunks: &[Vec<Summary>]) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<text x=\"{MARGIN}\" y=\"{}\">dead ratio of {CHUNKS} chunks of features: white 0, black \
         1; red: not finite</text>",
        top - 6.0
    );
    let (width, height) = (WIDTH / chunks.len() as f64, (PANEL - MARGIN) / CHUNKS as f64);
    for (batch, each) in chunks.iter().enumerate() {
        for (chunk, summary) in each.iter().enumerate() {
            let (x, y) = (MARGIN + batch as f64 * width, top + chunk as f64 * height);
            let dead = summary.dead_ratio().unwrap_or(f64::NAN);
            let grey = (255.0 * (1.0 - dead)).round();
            let colour = if summary.non_finite() > 0 {
                "#c0392b".to_owned()
            } else {
                format!("rgb({grey},{grey},{grey})")
            };
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.2}\" \
                 fill=\"{colour}\"/>"
            );
        }
    }
}

fn draw_panel(svg: &mut String, top: f64, name: &str, summaries: &[Summary], quantity: Quantity) {
    let values: Vec<f64> = summaries.iter().map(quantity).collect();
    let finite = || values.iter().copied().filter(|value| value.is_finite());
    let (low, high) = (finite().fold(f64::MAX, f64::min), finite().fold(f64::MIN, f64::max));
    let height = PANEL - MARGIN;
    let x = |batch: usize| MARGIN + batch as f64 / (values.len().max(2) - 1) as f64 * WIDTH;
    let y = |value: f64| top + (1.0 - (value - low) / (high - low).max(f64::MIN_POSITIVE)) * height;

    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<text x=\"{MARGIN}\" y=\"{}\">{name}: {low:.4} to {high:.4}</text>\n\
         <rect x=\"{MARGIN}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{height}\" fill=\"none\" \
         stroke=\"#ccc\"/>",
        top - 6.0,
    );
    // A line ends where a value is not finite and another begins after it.
    let batches: Vec<usize> = (0..values.len()).collect();
    for run in batches.split(|&batch| !values[batch].is_finite()) {
        let points = run.iter().fold(String::new(), |mut points, &batch| {
            let _ = write!(points, "{:.1},{:.1} ", x(batch), y(values[batch]));
            points
        });
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#1f6f8b\" stroke-width=\"1.5\"/>",
            points.trim_end()
        );
    }
    for (batch, _) in summaries.iter().enumerate().filter(|(_, summary)| summary.non_finite() > 0) {
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1} {top}v{height}\" stroke=\"#c0392b\" stroke-dasharray=\"4 3\"/>",
            x(batch)
        );
    }
}
