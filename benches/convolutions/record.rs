//! What a measured convolution leaves behind: a JSON line and a row of a table.

use std::fmt::Write as _;

use kasmina::{DType, F32Products, FilterLayout, SequenceLayout, Tier};
use serde::Serialize;

use super::operands::{Convolution, Pass};
use crate::measure::options::products_of;
use crate::measure::record::{Peer, Provenance, Times};
use crate::measure::regime::Regime;
use crate::measure::statistics::Summary;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) convolution: Convolution,
    pub(crate) pass: Pass,
    pub(crate) dtype: DType,
    pub(crate) layout: SequenceLayout,
    pub(crate) filter_layout: FilterLayout,
    /// The tier that runs it.
    pub(crate) tier: Tier,
    /// Whether loads are reused.
    pub(crate) tiled: bool,
    pub(crate) regime: Regime,
}

/// One side of a comparison.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timing {
    #[serde(flatten)]
    times: Times,
    tflops: f64,
    /// Of the bytes that must be moved once.
    tbps: f64,
}

impl Timing {
    pub(crate) fn new(case: &Case, summary: &Summary) -> Self {
        let microseconds = case.regime.representative(summary);
        Self {
            times: summary.into(),
            tflops: case.convolution.flops() / microseconds * 1e-6,
            tbps: case.convolution.bytes(case.dtype.size()) / microseconds * 1e-6,
        }
    }
}

/// One line of `benches/results`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    operation: &'static str,
    batch: usize,
    in_channels: usize,
    out_channels: usize,
    length: usize,
    taps: usize,
    groups: usize,
    layout: &'static str,
    filter: &'static str,
    dtype: &'static str,
    tier: &'static str,
    /// For f32 on tensor cores, where convolutions know but one way.
    products: Option<&'static str>,
    tiled: bool,
    regime: &'static str,
    #[serde(flatten)]
    timing: Timing,
    peer: Option<Peer<Timing>>,
    ratio: Option<f64>,
    /// ‖ours − the peer's‖ / ‖the peer's‖ over the first sequence, or over the filter.
    difference: Option<f64>,
}

impl Record {
    pub(crate) fn new(
        provenance: &Provenance,
        case: &Case,
        timing: Timing,
        peer: Option<Peer<Timing>>,
        difference: Option<f64>,
    ) -> Self {
        let Convolution { batch, in_channels, out_channels, length, taps, groups } =
            case.convolution;
        Self {
            provenance: provenance.clone(),
            operation: match case.pass {
                Pass::Forward => "conv1d forward",
                Pass::Dgrad => "conv1d dgrad",
                Pass::Wgrad => "conv1d wgrad",
            },
            batch,
            in_channels,
            out_channels,
            length,
            taps,
            groups,
            layout: case.layout.name(),
            filter: case.filter_layout.name(),
            dtype: case.dtype.name(),
            tier: case.tier.name(),
            products: products_of(case.dtype, case.tier, F32Products::Six),
            tiled: case.tiled,
            regime: case.regime.name(),
            ratio: peer.as_ref().map(|peer| timing.tflops / peer.timing.tflops),
            timing,
            peer,
            difference,
        }
    }
}

/// The records as a Markdown table.
pub(crate) fn table(records: &[Record]) -> String {
    let mut table = String::from(
        "| pass | B×I×O×L×K/G | layout, filter | dtype | tier | regime | µs (p10–p90) | TFLOP/s | TB/s | \
         peer µs | ratio | difference |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for record in records {
        let Timing { times, tflops, tbps } = record.timing;
        let Times { median_us, p10_us, p90_us, .. } = times;
        let Record { batch, in_channels, out_channels, length, taps, groups, .. } = record;
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
        };
        let peer = record.peer.as_ref().map(|peer| peer.timing.times.median_us);
        let difference =
            record.difference.map_or_else(|| "–".to_owned(), |value| format!("{value:.1e}"));
        let tiled = if record.tiled { "" } else { ", untiled" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} | {batch}×{in_channels}×{out_channels}×{length}×{taps}/{groups} | {}, {} | {} | \
             {}{tiled} | {} | {median_us:.1} ({p10_us:.1}–{p90_us:.1}) | {tflops:.1} | \
             {tbps:.2} | {} | {} | {difference} |",
            record.operation,
            record.layout,
            record.filter,
            record.dtype,
            record.tier,
            record.regime,
            number(peer, 1),
            number(record.ratio, 2),
        );
    }
    table
}
