//! What a measured reduction leaves behind: a JSON line and a row of a table.

use std::fmt::Write as _;

use kasmina::{DType, Tier};
use serde::Serialize;

use crate::measure::record::{Peer, Provenance, Times};
use crate::measure::regime::Regime;
use crate::measure::statistics::Summary;

/// What is computed of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// The sum alone.
    Sum,
    /// All statistics in one pass.
    Summary,
    /// All statistics of each of 16 chunks of the columns.
    Chunks,
    /// All statistics of each column.
    Columns,
    /// The sum by the single-stage kernel.
    Naive,
}

impl Operation {
    pub(crate) const ALL: [Self; 5] =
        [Self::Sum, Self::Summary, Self::Chunks, Self::Columns, Self::Naive];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Summary => "summary",
            Self::Chunks => "chunks",
            Self::Columns => "columns",
            Self::Naive => "naive",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) operation: Operation,
    /// Number of elements.
    pub(crate) len: usize,
    pub(crate) dtype: DType,
    /// The tier that runs it.
    pub(crate) tier: Tier,
    pub(crate) regime: Regime,
}

/// One side of a comparison.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timing {
    #[serde(flatten)]
    times: Times,
    tbps: f64,
    max_error: f64,
}

impl Timing {
    pub(crate) fn new(case: &Case, summary: &Summary, max_error: f64) -> Self {
        let bytes = (case.len * case.dtype.size()) as f64;
        let tbps = bytes / case.regime.representative(summary) * 1e-6;
        Self { times: summary.into(), tbps, max_error }
    }
}

/// One line of `benches/results`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    operation: &'static str,
    len: usize,
    dtype: &'static str,
    tier: &'static str,
    regime: &'static str,
    #[serde(flatten)]
    timing: Timing,
    peer: Option<Peer<Timing>>,
    ratio: Option<f64>,
}

impl Record {
    pub(crate) fn new(
        provenance: &Provenance,
        case: &Case,
        timing: Timing,
        peer: Option<Peer<Timing>>,
    ) -> Self {
        Self {
            provenance: provenance.clone(),
            operation: case.operation.name(),
            len: case.len,
            dtype: case.dtype.name(),
            tier: case.tier.name(),
            regime: case.regime.name(),
            ratio: peer.as_ref().map(|peer| timing.tbps / peer.timing.tbps),
            timing,
            peer,
        }
    }
}

/// The records as a Markdown table.
pub(crate) fn table(records: &[Record]) -> String {
    let mut table = String::from(
        "| operation | elements | dtype | tier | regime | µs (p10–p90) | TB/s | peer µs | \
         peer TB/s | ratio | max error (peer) |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for record in records {
        let Timing { times, tbps, max_error } = record.timing;
        let Times { median_us, p10_us, p90_us, .. } = times;
        let [peer_us, peer_tbps, ratio, peer_error] = match (&record.peer, record.ratio) {
            (Some(Peer { timing, .. }), Some(ratio)) => [
                format!("{:.2}", timing.times.median_us),
                format!("{:.3}", timing.tbps),
                format!("{ratio:.3}"),
                format!("{:.1e}", timing.max_error),
            ],
            _ => ["–"; 4].map(str::to_owned),
        };
        let elements = match record.len {
            len if len.is_power_of_two() => format!("2^{}", len.ilog2()),
            len => len.to_string(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} | {elements} | {} | {} | {} | {median_us:.2} ({p10_us:.2}–{p90_us:.2}) | \
             {tbps:.3} | {peer_us} | {peer_tbps} | {ratio} | {max_error:.1e} ({peer_error}) |",
            record.operation, record.dtype, record.tier, record.regime,
        );
    }
    table
}
