//! What the handles and tickets of a session share: the ring and those who serve it.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::persistent::protocol::{Command, Layout, Status};
use kasmina_kernels::persistent::{LayerShape, PART_ROWS, PlanFault, StackPlan, kernel, part_rows};

use super::answer::Wakers;
use super::config::{MAX_SLOTS, StreamConfig};
use super::ring::{HostPayload, Ring, RingWords, Slot, lock};
use super::stack::Parameters;
use super::statistics::Histogram;
use super::workers::Workers;
use super::{OP, StreamPath};
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result, SessionFault};
use crate::gpu::{PinnedSlot, PinnedWords, Resident, Setup, Stream as GpuStream, check_device};
use crate::layer::KasminaLayer;
use crate::shape::Shape;

/// Heartbeats per lease.
const BEATS: u32 = 10;
/// How long a kernel that was told to stop may take before the lease is left to end it.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);
/// Between two looks at whether the session has ended.
const NAP: Duration = Duration::from_micros(50);
/// Blocks of a resident grid, at most: their polls delay each other, and four answer a batch of 32
/// rows sooner than eight, and one row as soon as one does.
const BLOCKS: u32 = 4;
/// Express slots. With twice as many as there are blocks, batches one at a time find theirs clear;
/// more would be further away, as caches go.
const EXPRESS: u32 = 8;
/// Slots begin on lines.
const SLOT_ALIGN: usize = 64;

pub(super) struct Shared<T: Element> {
    pub(super) ring: Arc<Ring<T>>,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    /// The layers' shapes, which no update changes.
    shapes: Vec<LayerShape>,
    pub(super) device: Device,
    pub(super) tier: Tier,
    pub(super) config: StreamConfig,
    pub(super) submitted: AtomicU64,
    histogram: Mutex<Arc<Histogram>>,
    /// Tasks that wait for answers.
    pub(super) wakers: Arc<Wakers>,
    /// For one update at a time.
    updates: Mutex<()>,
    backend: Backend<T>,
}

enum Backend<T: Element> {
    Threads { workers: Workers<T>, device: Device },
    Resident(Box<Residence>),
}

/// A resident grid, what it was planned for, and what keeps it alive.
struct Residence {
    grid: Mutex<Grid>,
    plan: StackPlan,
    heartbeat: Mutex<Option<Heartbeat>>,
}

/// The grid, and the sequence up to which it was launched.
struct Grid {
    resident: Resident,
    launched: u64,
}

impl<T: Element> Shared<T> {
    pub(super) fn open(layers: &[&KasminaLayer], config: StreamConfig) -> Result<Self> {
        config.check()?;
        let parameters = Parameters::of::<T>(layers, OP)?;
        let shapes = parameters.shapes();
        let (Some(first), Some(last)) = (layers.first(), layers.last()) else {
            let fault = SessionFault::Stack(PlanFault::Layers(0));
            return Err(Error::Session { op: OP, fault });
        };
        // What no path can serve; the rest of the plan's rules are the resident path's own.
        for (layer, pair) in (1..).zip(shapes.windows(2)) {
            let (expected, got) = (pair[0].out_features, pair[1].in_features);
            if got != expected {
                let fault = SessionFault::Stack(PlanFault::Chain { layer, expected, got });
                return Err(Error::Session { op: OP, fault });
            }
        }
        let device = first.device();
        let parts = |config: StreamConfig| Parts {
            parameters: &parameters,
            device,
            in_features: first.in_features(),
            out_features: last.out_features(),
            config,
        };
        let Some(stream) = device.stream().gpu() else {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            let threads = config.blocks.unwrap_or_else(|| (cores / 2).clamp(1, 4) as u32);
            return parts(config).on_threads(threads, device.clone(), Tier::Cpu);
        };
        let tier = resident_tier::<T>(first)?;
        let resident = StackPlan::new(tier, T::DTYPE, &shapes, smem_limit(tier, stream))
            .map_err(|fault| Error::Session { op: OP, fault: SessionFault::Stack(fault) })
            .and_then(|plan| parts(config.clone()).resident(first, stream, tier, plan));
        match resident {
            Err(Error::Session { fault, .. }) if config.fallback => {
                tracing::warn!(%fault, "no kernel can stay resident: a launch per batch instead");
                parts(config).on_threads(1, device.on_new_stream()?, device.tier())
            }
            outcome => outcome,
        }
    }

    pub(super) const fn path(&self) -> StreamPath {
        match &self.backend {
            Backend::Resident(_) => StreamPath::Resident,
            Backend::Threads { .. } if matches!(self.tier, Tier::Cpu) => StreamPath::Threads,
            Backend::Threads { .. } => StreamPath::LaunchPerBatch,
        }
    }

    pub(super) fn histogram(&self) -> Arc<Histogram> {
        Arc::clone(&lock(&self.histogram))
    }

    pub(super) fn reset_statistics(&self) {
        *lock(&self.histogram) = Arc::new(Histogram::new());
    }

    pub(super) const fn drain_timeout(&self) -> Duration {
        self.config.drain_timeout
    }

    /// Launches the grid for what was submitted, if it is of the kind that does not stay.
    pub(super) fn begin_bounded_work(&self) -> Result<()> {
        let Backend::Resident(residence) = &self.backend else { return Ok(()) };
        if !self.config.bounded {
            return Ok(());
        }
        let mut grid = lock(&residence.grid);
        let limit = self.ring.submitted();
        if limit > grid.launched && !grid.resident.is_running()? {
            let first = grid.launched;
            grid.resident.launch(first, limit)?;
            grid.launched = limit;
        }
        Ok(())
    }

    /// Fails the session if its kernel failed, or ended before it was closed.
    pub(super) fn check_health(&self) {
        let Backend::Resident(residence) = &self.backend else { return };
        // From then on the kernel is to end.
        let closed = self.ring.fault() == Some(SessionFault::Closed);
        let expired =
            || !closed && self.ring.statuses().any(|status| status == Status::LeaseExpired);
        if expired() {
            self.ring.fail(SessionFault::LeaseExpired { lease: self.config.lease });
            // Those of the grid that had work when the others gave up.
            self.ring.command(Command::Stop);
            return;
        }
        let running = lock(&residence.grid).resident.is_running();
        match running {
            Ok(true) => {}
            Ok(false) if self.config.bounded || closed => {}
            Ok(false) if expired() => {
                self.ring.fail(SessionFault::LeaseExpired { lease: self.config.lease });
            }
            // Unless it was closed since, which tells the kernel to end.
            Ok(false) if self.ring.fault().is_none() => self.ring.fail(SessionFault::Ended),
            Ok(false) => {}
            Err(Error::Driver { code, name, .. }) => {
                self.ring.fail(SessionFault::Kernel { code, name });
            }
            Err(error) => {
                tracing::error!(%error, "the state of a resident kernel is unknown");
                self.ring.fail(SessionFault::Ended);
            }
        }
    }

    /// Why waiting for a batch that is not complete has no end, if so: asked before the batch is
    /// looked at for the last time. A session that is closing still does what is in flight.
    pub(super) fn futile(&self) -> Option<SessionFault> {
        match self.ring.fault()? {
            SessionFault::Closed => {
                matches!(self.has_ended(), Ok(true)).then_some(SessionFault::Closed)
            }
            fault => Some(fault),
        }
    }

    /// Whether those who serve the session, having been told to end, have done so.
    pub(super) fn has_ended(&self) -> Result<bool> {
        match &self.backend {
            Backend::Threads { workers, .. } => Ok(workers.have_ended()),
            Backend::Resident(residence) => {
                let mut grid = lock(&residence.grid);
                // A bounded grid may have to be launched once more.
                let launched = grid.launched >= self.ring.submitted();
                Ok(!grid.resident.is_running()? && launched)
            }
        }
    }

    /// Waits until they have; false after `timeout`. Nothing is locked between two looks, so that
    /// others who wait keep to their own time.
    fn wait_for_end(&self, timeout: Duration) -> Result<bool> {
        let start = Instant::now();
        loop {
            self.begin_bounded_work()?;
            if self.has_ended()? {
                return Ok(true);
            }
            if start.elapsed() >= timeout {
                return Ok(false);
            }
            thread::sleep(NAP);
        }
    }

    /// Puts new parameters in the place of those that no batch in flight uses, for batches from
    /// now on.
    pub(super) fn update(&self, layers: &[&KasminaLayer], timeout: Duration) -> Result<()> {
        let op = "StreamSession::update";
        let parameters = Parameters::of::<T>(layers, op)?;
        let shape_of = |shapes: &[LayerShape], layer: usize| {
            let features = shapes.get(layer).map(|shape| [shape.in_features, shape.out_features]);
            Shape::from(features.unwrap_or([0, 0]).map(|width| width as usize))
        };
        let shapes = parameters.shapes();
        for layer in 0..shapes.len().max(self.shapes.len()) {
            // The activation is the session's too.
            if shapes.get(layer) != self.shapes.get(layer) {
                let (expected, got) = (shape_of(&self.shapes, layer), shape_of(&shapes, layer));
                return Err(Error::Shape { op, operand: "layer", expected, got });
            }
        }
        let _one = lock(&self.updates);
        let start = Instant::now();
        while !self.ring.may_update() {
            self.begin_bounded_work()?;
            self.check_health();
            if let Some(fault) = self.ring.fault() {
                return Err(Error::Session { op, fault });
            }
            if start.elapsed() >= timeout {
                return Err(Error::Timeout { op, after: timeout });
            }
            thread::yield_now();
        }
        let version = self.ring.version().wrapping_add(1);
        match &self.backend {
            Backend::Threads { workers, device } => {
                workers.replace(version, parameters.stack(device)?);
            }
            Backend::Resident(residence) => {
                let packed = parameters.pack::<T>(&residence.plan);
                lock(&residence.grid).resident.upload(version, &packed)?;
            }
        }
        self.ring.set_version(version);
        Ok(())
    }

    /// Refuses new work, lets that in flight finish, and ends whoever serves it.
    pub(super) fn close(&self, timeout: Duration) -> Result<()> {
        let op = "StreamSession::close";
        // What ended the session before now is the reason that counts.
        self.check_health();
        self.ring.fail(SessionFault::Closed);
        self.ring.command(Command::Drain(self.ring.submitted()));
        let mut ended = self.wait_for_end(timeout);
        if let Backend::Resident(residence) = &self.backend {
            if !matches!(ended, Ok(true)) {
                self.ring.command(Command::Stop);
                ended = self.wait_for_end(STOP_TIMEOUT);
            }
            // Without it the lease ends the grid.
            drop(lock(&residence.heartbeat).take());
            if !matches!(ended, Ok(true)) {
                ended = self.wait_for_end(self.config.lease + STOP_TIMEOUT);
            }
        }
        if ended? && self.ring.all_complete() {
            return Ok(());
        }
        let fault = match self.ring.fault() {
            Some(fault) if fault != SessionFault::Closed => fault,
            _ => SessionFault::NotDrained { after: timeout },
        };
        Err(Error::Session { op, fault })
    }
}

impl<T: Element> Drop for Shared<T> {
    fn drop(&mut self) {
        if let Err(error) = self.close(self.config.drain_timeout) {
            tracing::warn!(%error, "a stream session was dropped with work undone");
        }
        if let Backend::Resident(residence) = &self.backend
            && !matches!(lock(&residence.grid).resident.is_running(), Ok(false))
        {
            // The grid may still write to its memory.
            std::mem::forget(Arc::clone(&self.ring));
        }
    }
}

/// What a session is made from.
struct Parts<'a> {
    parameters: &'a Parameters,
    device: &'a Device,
    in_features: usize,
    out_features: usize,
    config: StreamConfig,
}

impl Parts<'_> {
    /// Slots: as many as `depth` batches need of those that are cut into the most parts, and one
    /// more per consumer. `idle` is for how many consumers a batch is cut unless the config says
    /// otherwise: 1 for a resident grid, which cuts more finely only to occupy idle blocks.
    fn slots(&self, consumers: u32, idle: u32) -> u32 {
        let cut = self.config.cut();
        let parts_of = |rows: u32| rows.div_ceil(cut.unwrap_or_else(|| part_rows(rows, idle)));
        let most = self.config.max_batch as u32;
        let parts = (1..=most).map(parts_of).max().unwrap_or(1) as usize;
        let slots = self.config.depth * parts;
        slots.min(MAX_SLOTS) as u32 + consumers
    }

    fn on_threads<T: Element>(self, threads: u32, device: Device, tier: Tier) -> Result<Shared<T>> {
        let stack = self.parameters.stack::<T>(&device)?;
        let layout = Layout::new(threads, self.slots(threads, threads));
        let words = (0..layout.words()).map(|_| AtomicU64::new(0)).collect();
        let payloads: Arc<[Mutex<HostPayload<T>>]> = (0..layout.slots)
            .map(|_| Mutex::new(HostPayload { input: Vec::new(), output: Vec::new() }))
            .collect();
        let slots = (0..layout.slots as u16)
            .map(|index| Slot::Host { index, memory: Arc::clone(&payloads) })
            .collect();
        let streams = self.config.num_streams;
        let ring = Arc::new(Ring::new(layout, RingWords::Host(words), slots, streams, false));
        let workers = Workers::new(&ring, payloads, stack);
        Ok(self.share(ring, tier, Backend::Threads { workers, device }))
    }

    fn resident<T: Element>(
        self,
        layer: &KasminaLayer,
        stream: &GpuStream,
        tier: Tier,
        plan: StackPlan,
    ) -> Result<Shared<T>> {
        if !self.config.bounded {
            check_device(stream, OP)?;
        }
        let Some(kernel) = kernel(tier, T::DTYPE) else {
            let reason = Obstacle::DType(T::DTYPE);
            return Err(Error::Unsupported { op: OP, tier, reason });
        };
        let quarter = (stream.gpu().capability().sm_count / 4).max(1);
        let blocks = self.config.blocks.unwrap_or_else(|| quarter.min(BLOCKS));
        // A bounded grid is launched after its batches were written.
        let arriving = plan.takes_arriving() && !self.config.bounded;
        let mut layout = Layout::new(blocks, self.slots(blocks, 1));
        if arriving {
            layout = layout.with_express(EXPRESS);
        }
        let words = PinnedWords::new(stream, layout.words() as usize)?;
        let slot_bytes = [self.in_features, self.out_features].map(|features| {
            (features * PART_ROWS as usize * T::DTYPE.size()).next_multiple_of(SLOT_ALIGN)
        });
        let (slots, addresses) =
            PinnedSlot::new(stream, layout.slots as u16, slot_bytes[0], slot_bytes[1])?;
        let overridden = layer.kernel_config().ptx_override();
        let setup = Setup {
            kernel,
            ptx_dir: overridden.or(self.device.defaults().ptx_override()),
            plan: &plan,
            layout,
            words: words.address(),
            slots: addresses,
            slot_bytes: slot_bytes.map(|bytes| bytes as u32),
            lease: self.config.lease,
            packed: &self.parameters.pack::<T>(&plan),
        };
        let resident = Resident::new(stream, &setup, OP)?;
        let slots = slots.into_iter().map(Slot::Pinned).collect();
        let streams = self.config.num_streams;
        let words = RingWords::Pinned(words);
        let ring = Arc::new(Ring::new(layout, words, slots, streams, arriving));
        let heartbeat = Heartbeat::start(&ring, self.config.lease / BEATS);
        let (start_timeout, bounded) = (self.config.start_timeout, self.config.bounded);
        let backend = Backend::Resident(Box::new(Residence {
            grid: Mutex::new(Grid { resident, launched: 0 }),
            plan,
            heartbeat: Mutex::new(Some(heartbeat)),
        }));
        // From here on dropping the session ends the grid, in whatever state it is.
        let shared = self.share(ring, tier, backend);
        if !bounded {
            shared.start(start_timeout)?;
        }
        Ok(shared)
    }

    fn share<T: Element>(self, ring: Arc<Ring<T>>, tier: Tier, backend: Backend<T>) -> Shared<T> {
        Shared {
            ring,
            in_features: self.in_features,
            out_features: self.out_features,
            shapes: self.parameters.shapes(),
            device: self.device.clone(),
            tier,
            config: self.config,
            submitted: AtomicU64::new(0),
            histogram: Mutex::new(Arc::new(Histogram::new())),
            wakers: Arc::default(),
            updates: Mutex::new(()),
            backend,
        }
    }
}

impl<T: Element> Shared<T> {
    /// Launches the grid that stays, and waits until every block has said that it runs.
    fn start(&self, timeout: Duration) -> Result<()> {
        let Backend::Resident(residence) = &self.backend else { return Ok(()) };
        let mut grid = lock(&residence.grid);
        grid.resident.launch(0, u64::MAX)?;
        grid.launched = u64::MAX;
        let start = Instant::now();
        while self.ring.statuses().any(|status| status == Status::Absent) {
            // Asking also makes the driver send the launch off.
            if !grid.resident.is_running()? || start.elapsed() >= timeout {
                let fault = SessionFault::NotStarted { within: timeout };
                return Err(Error::Session { op: OP, fault });
            }
            thread::yield_now();
        }
        Ok(())
    }
}

/// The thread that says that the process is alive.
struct Heartbeat {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    fn start<T: Element>(ring: &Arc<Ring<T>>, interval: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, ring) = (Arc::clone(&stop), Arc::clone(ring));
        let thread = thread::spawn(move || {
            let mut number = 0;
            while !stopped.load(Ordering::Acquire) {
                number += 1;
                ring.beat(number);
                thread::park_timeout(interval);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does not panic, and there would be nothing to do about it.
            let _ = thread.join();
        }
    }
}

/// The tier whose resident kernel serves a layer.
fn resident_tier<T: Element>(layer: &KasminaLayer) -> Result<Tier> {
    let device = layer.device();
    let config = layer.kernel_config();
    let forced = config.forced_tier().or(device.defaults().forced_tier());
    let reason_against = |tier| {
        let no_kernel = kernel(tier, T::DTYPE).is_none().then_some(Obstacle::DType(T::DTYPE));
        device.obstacle(tier).or(no_kernel)
    };
    if let Some(tier) = forced {
        return reason_against(tier).map_or(Ok(tier), |reason| Err(reason.refuse(OP, tier)));
    }
    let best = Tier::ALL.into_iter().rev().find(|&tier| reason_against(tier).is_none());
    Ok(best.unwrap_or(Tier::Portable))
}

/// Shared memory that a block of a tier's kernel has on this GPU.
fn smem_limit(tier: Tier, stream: &GpuStream) -> u32 {
    let kernel = kernel(tier, DType::BF16).map_or(0, |kernel| kernel.smem_bytes);
    kernel.min(stream.gpu().capability().smem_per_block)
}
