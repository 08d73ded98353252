//! What a measured forward pass leaves behind: a JSON line and a row of a table.

use std::fmt::Write as _;

use kasmina::Tier;
use serde::Serialize;

use super::operands::Problem;
use crate::measure::options::layout_name;
use crate::measure::record::{Peer, Provenance, Times};
use crate::measure::regime::Regime;
use crate::measure::statistics::Summary;

/// One side of a comparison.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timing {
    #[serde(flatten)]
    times: Times,
    tflops: f64,
    max_error: f64,
}

impl Timing {
    pub(crate) fn new(
        problem: &Problem,
        regime: Regime,
        summary: &Summary,
        max_error: f64,
    ) -> Self {
        Self {
            times: summary.into(),
            tflops: problem.operations() / regime.representative(summary) * 1e-6,
            max_error,
        }
    }
}

/// One line of `benches/results`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
    layout: &'static str,
    activation: &'static str,
    tier: &'static str,
    /// For f32 on tensor cores: `six`, `three` or `tf32`.
    pub(crate) products: Option<&'static str>,
    /// What of the kernel was forced, if anything was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
    regime: &'static str,
    #[serde(flatten)]
    timing: Timing,
    peer: Option<Peer<Timing>>,
    ratio: Option<f64>,
}

impl Record {
    pub(crate) fn new(
        provenance: &Provenance,
        problem: &Problem,
        tier: Tier,
        regime: Regime,
        timing: Timing,
        peer: Option<Peer<Timing>>,
    ) -> Self {
        Self {
            provenance: provenance.clone(),
            m: problem.m,
            n: problem.n,
            k: problem.k,
            dtype: problem.dtype.name(),
            layout: layout_name(problem.layout),
            activation: problem.activation.name(),
            tier: tier.name(),
            products: None,
            variant: None,
            regime: regime.name(),
            ratio: peer.as_ref().map(|peer| timing.tflops / peer.timing.tflops),
            timing,
            peer,
        }
    }
}

/// The records as a Markdown table.
pub(crate) fn table(records: &[Record]) -> String {
    let mut table = String::from(
        "| m × n × k | dtype | W | act | tier | regime | µs (p10–p90) | TFLOP/s | peer µs | \
         peer TFLOP/s | ratio | max error (peer) |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for record in records {
        let Timing { times, tflops, max_error } = record.timing;
        let Times { median_us, p10_us, p90_us, .. } = times;
        let [peer_us, peer_tflops, ratio, peer_error] = match (&record.peer, record.ratio) {
            (Some(Peer { timing, .. }), Some(ratio)) => [
                format!("{:.2}", timing.times.median_us),
                format!("{:.1}", timing.tflops),
                format!("{ratio:.3}"),
                format!("{:.1e}", timing.max_error),
            ],
            _ => ["–"; 4].map(str::to_owned),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} × {} × {} | {} | {} | {} | {} | {} | {median_us:.2} ({p10_us:.2}–{p90_us:.2}) | \
             {tflops:.1} | {peer_us} | {peer_tflops} | {ratio} | {max_error:.1e} ({peer_error}) |",
            record.m,
            record.n,
            record.k,
            record.dtype,
            record.layout,
            record.activation,
            [
                record.tier,
                record.products.unwrap_or_default(),
                record.variant.as_deref().unwrap_or_default()
            ]
            .join(" ")
            .trim_end(),
            record.regime,
        );
    }
    table
}
