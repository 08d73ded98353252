//! The regimes in which two contenders are timed by turns.

use std::thread::sleep;
use std::time::Duration;

use super::cuda::{Clock, Graph};
use super::statistics::Summary;

/// How calls follow each other while they are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Regime {
    /// Single calls on a cool GPU with a cold L2 cache.
    Burst,
    /// Back to back for seconds, limited by power.
    Steady,
    /// In a CUDA graph over rotated buffers, for calls too short for events.
    Graph,
}

impl Regime {
    pub(crate) const ALL: [Self; 3] = [Self::Burst, Self::Steady, Self::Graph];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Burst => "burst",
            Self::Steady => "steady",
            Self::Graph => "graph",
        }
    }

    /// The time that the rate is computed from.
    pub(crate) const fn representative(self, summary: &Summary) -> f64 {
        match self {
            Self::Steady => summary.mean,
            Self::Burst | Self::Graph => summary.median,
        }
    }
}

/// Idle time before each burst sample, in which the GPU's power budget recovers.
const REST: Duration = Duration::from_millis(20);
/// Length of a steady slice and of one sample, in microseconds.
const SLICE: f64 = 0.5e6;
const CHUNK: f64 = 25.0e3;
/// Calls per graph.
pub(crate) const NODES: usize = 100;

/// Calls shorter than this, in microseconds, are timed in a graph.
const GRAPH_BELOW: f64 = 20.0;

/// How often calls are repeated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Repetitions {
    /// Samples in burst and graph.
    pub(crate) samples: usize,
    /// Total length of the steady regime per contender, in microseconds.
    pub(crate) steady: f64,
}

/// Something that is timed: enqueues its `i`-th call.
pub(crate) type Contender<'a> = &'a dyn Fn(usize) -> anyhow::Result<()>;

/// The time of one call after a warm-up, in microseconds: the median of a few, L2 flushed.
pub(crate) fn estimate(clock: &Clock, contender: Contender<'_>) -> anyhow::Result<f64> {
    contender(0)?;
    clock.synchronize()?;
    let mut samples = Vec::new();
    for call in 0..7 {
        clock.flush_l2()?;
        samples.push(clock.time(|| contender(call))?);
    }
    Ok(Summary::new(samples).median)
}

/// The regimes that suit calls of this length.
#[allow(dead_code, reason = "some benches know which")]
pub(crate) fn suited(clock: &Clock, contender: Contender<'_>) -> anyhow::Result<&'static [Regime]> {
    let short = estimate(clock, contender)? < GRAPH_BELOW;
    Ok(if short { &[Regime::Graph] } else { &[Regime::Burst, Regime::Steady] })
}

/// Times the contenders by turns in `regime`.
pub(crate) fn measure(
    clock: &Clock,
    regime: Regime,
    repetitions: Repetitions,
    contenders: &[Contender<'_>],
) -> anyhow::Result<Vec<Summary>> {
    let Repetitions { samples, steady: length } = repetitions;
    let times = match regime {
        Regime::Burst => burst(clock, samples, contenders)?,
        Regime::Steady => steady(clock, length, contenders)?,
        Regime::Graph => graph(clock, samples, contenders)?,
    };
    Ok(times.into_iter().map(Summary::new).collect())
}

/// The order of the contenders in round `round`: who goes first changes from round to round.
fn turns(contenders: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..contenders).map(move |turn| (turn + round) % contenders)
}

fn burst(
    clock: &Clock,
    samples: usize,
    contenders: &[Contender<'_>],
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut times = vec![Vec::with_capacity(samples); contenders.len()];
    for round in 0..samples {
        for turn in turns(contenders.len(), round) {
            sleep(REST);
            // The write is long enough for the call to be enqueued behind it, so no launch
            // latency comes between the events.
            clock.flush_l2()?;
            times[turn].push(clock.time(|| contenders[turn](round))?);
        }
    }
    Ok(times)
}

fn steady(
    clock: &Clock,
    length: f64,
    contenders: &[Contender<'_>],
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut calls_per_chunk = Vec::new();
    for contender in contenders {
        calls_per_chunk.push((CHUNK / estimate(clock, *contender)?).ceil().max(1.0) as usize);
    }
    let mut times = vec![Vec::new(); contenders.len()];
    let mut totals = vec![0.0; contenders.len()];
    for round in 0.. {
        for turn in turns(contenders.len(), round) {
            let calls = calls_per_chunk[turn];
            let chunks = slice(clock, calls, contenders[turn])?;
            // The first slice brings the GPU to the temperature that the others find.
            if round > 0 {
                totals[turn] += chunks.iter().sum::<f64>();
                times[turn].extend(chunks.iter().map(|chunk| chunk / calls as f64));
            }
        }
        if totals.iter().all(|&total| total >= length) {
            break;
        }
    }
    Ok(times)
}

/// Runs calls back to back for [`SLICE`]; the times of its chunks of `calls` calls each.
fn slice(clock: &Clock, calls: usize, contender: Contender<'_>) -> anyhow::Result<Vec<f64>> {
    let chunks = (SLICE / CHUNK) as usize;
    let mut events = Vec::with_capacity(chunks + 1);
    for _ in 0..=chunks {
        events.push(clock.event()?);
    }
    clock.record(&events[0])?;
    for (chunk, end) in events[1..].iter().enumerate() {
        for call in 0..calls {
            contender(chunk * calls + call)?;
        }
        clock.record(end)?;
    }
    clock.synchronize()?;
    events.windows(2).map(|pair| pair[0].microseconds_until(&pair[1])).collect()
}

fn graph(
    clock: &Clock,
    samples: usize,
    contenders: &[Contender<'_>],
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut graphs: Vec<Graph> = Vec::new();
    for contender in contenders {
        // Whatever a first call sets up must not happen inside the capture.
        contender(0)?;
        clock.synchronize()?;
        let graph = clock.capture(|| (0..NODES).try_for_each(contender))?;
        for _ in 0..3 {
            clock.launch(&graph)?;
        }
        clock.synchronize()?;
        graphs.push(graph);
    }
    let mut times = vec![Vec::with_capacity(samples); contenders.len()];
    for round in 0..samples {
        for turn in turns(contenders.len(), round) {
            // So that even buffers too small to displace each other are read from memory.
            clock.flush_l2()?;
            let time = clock.time(|| clock.launch(&graphs[turn]))?;
            times[turn].push(time / NODES as f64);
        }
    }
    Ok(times)
}
