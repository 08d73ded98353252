//! Where tensors live and operations run.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use kasmina_kernels::abi::Tier;

use crate::config::KernelConfig;
use crate::error::{Error, Obstacle, Result};
use crate::gpu;
use crate::stream::Stream;

/// A GPU with one [`Stream`], or the CPU.
///
/// A handle is cheap to clone, and its clones share the stream. It can be used from any thread:
/// every operation makes the GPU's primary context current on the calling thread and leaves it so.
/// The context and the modules loaded into it stay for the life of the process; a stream and the
/// memory cached for it go with the last handle or tensor that uses them.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    id: DeviceId,
    name: String,
    stream: Stream,
    tier: Tier,
    tier_reason: String,
    /// What the environment asked for when the handle was opened.
    defaults: KernelConfig,
}

/// Which device: all handles of one GPU have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// The CPU.
    Cpu,
    /// The GPU of this ordinal.
    Cuda(u32),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What a GPU and its driver can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Compute capability, major number.
    pub major: u32,
    /// Compute capability, minor number.
    pub minor: u32,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: u64,
    /// Bytes of shared memory that one block may ask for.
    pub smem_per_block: u32,
    /// Bytes of device memory.
    pub total_memory: u64,
    /// The CUDA version the driver supports, major and minor.
    pub driver: (u32, u32),
}

/// Device memory held through one stream. All zero on the CPU, whose memory the system's allocator
/// manages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes that tensors, results and workspaces hold, rounded up to the sizes in which blocks are
    /// kept.
    pub in_use: u64,
    /// Bytes kept for the next tensors; [`Device::trim`] gives them back.
    pub cached: u64,
    /// The largest `in_use` so far.
    pub peak_in_use: u64,
    /// How often the driver was asked for memory: constant once a loop has warmed up.
    pub driver_allocations: u64,
}

impl Device {
    /// GPU 0 if there is one, else the CPU; [`tier_reason`](Self::tier_reason) says why, and so
    /// does the log (`tracing`, level info).
    ///
    /// `KASMINA_TIER=cpu` gives the CPU. Any other forced tier never falls back to it.
    ///
    /// # Errors
    /// As [`Device::cuda`], except that a missing driver or GPU, or one too old for every tier,
    /// gives the CPU.
    pub fn auto() -> Result<Self> {
        let defaults = KernelConfig::from_env()?;
        let forced = defaults.forced_tier();
        if forced == Some(Tier::Cpu) {
            return Ok(Self::cpu_because("KASMINA_TIER=cpu".to_owned()));
        }
        Self::open(0, defaults).or_else(|error| match why_cpu(&error) {
            Some(reason) if forced.is_none() => Ok(Self::cpu_because(reason)),
            _ => Err(error),
        })
    }

    /// The GPU of this ordinal. Handles of one GPU that are opened this way share its default
    /// stream; [`on_new_stream`](Self::on_new_stream) gives another.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::DriverTooOld`] or [`Error::NoDevice`] where there is no such
    /// GPU to use; [`Error::Unsupported`] if no tier, or not the one that `KASMINA_TIER` names,
    /// runs on it; [`Error::UnknownTier`] if that names none.
    pub fn cuda(ordinal: u32) -> Result<Self> {
        Self::open(ordinal, KernelConfig::from_env()?)
    }

    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self::cpu_because("the CPU was asked for".to_owned())
    }

    fn cpu_because(reason: String) -> Self {
        let name = format!("CPU ({} threads)", rayon::current_num_threads());
        tracing::info!(device = %name, tier = %Tier::Cpu, %reason, "device chosen");
        let inner = Inner {
            id: DeviceId::Cpu,
            name,
            stream: Stream::host(),
            tier: Tier::Cpu,
            tier_reason: reason,
            // KASMINA_TIER chooses among the tiers of a GPU, or the CPU instead of one.
            defaults: KernelConfig::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    fn open(ordinal: u32, defaults: KernelConfig) -> Result<Self> {
        let stream = gpu::Stream::open(ordinal)?;
        let gpu = stream.gpu();
        let (tier, tier_reason) = choose_tier(defaults.forced_tier(), |tier| gpu.obstacle(tier))?;
        tracing::info!(device = %gpu.name(), %tier, reason = %tier_reason, "device chosen");
        let inner = Inner {
            id: DeviceId::Cuda(ordinal),
            name: gpu.name().to_owned(),
            tier,
            tier_reason,
            defaults,
            stream: Stream::on_gpu(stream),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same GPU with a stream of its own: work on the two handles may overlap. A tensor may
    /// be used on either; the two streams are then ordered around that use.
    ///
    /// On the CPU this is a clone.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot make a stream.
    pub fn on_new_stream(&self) -> Result<Self> {
        let Some(stream) = self.inner.stream.gpu() else {
            return Ok(self.clone());
        };
        let inner = Inner {
            id: self.inner.id,
            name: self.inner.name.clone(),
            stream: Stream::on_gpu(stream.another()?),
            tier: self.inner.tier,
            tier_reason: self.inner.tier_reason.clone(),
            defaults: self.inner.defaults.clone(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The queue that operations on this handle go to.
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.inner.stream
    }

    /// Waits until everything enqueued on this handle's stream has run.
    ///
    /// # Errors
    /// As [`Stream::synchronize`].
    pub fn synchronize(&self) -> Result<()> {
        self.inner.stream.synchronize()
    }

    /// The GPU's name, such as `NVIDIA H200`, or `CPU (8 threads)`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Which device this is.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.inner.id
    }

    /// What the GPU can do; `None` for the CPU.
    #[must_use]
    pub fn capability(&self) -> Option<Capability> {
        self.inner.stream.gpu().map(|stream| *stream.gpu().capability())
    }

    /// The tier that calls get first; one that cannot serve a call hands it to the next.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.inner.tier
    }

    /// Why it is that tier.
    #[must_use]
    pub fn tier_reason(&self) -> &str {
        &self.inner.tier_reason
    }

    /// Whether this is a GPU.
    #[must_use]
    pub fn is_cuda(&self) -> bool {
        self.inner.stream.gpu().is_some()
    }

    /// The memory held through this handle's stream.
    #[must_use]
    pub fn memory(&self) -> MemoryStats {
        self.inner.stream.gpu().map_or_else(MemoryStats::default, |stream| stream.memory())
    }

    /// Gives cached memory of this handle's stream back to the driver, after waiting for the
    /// stream.
    ///
    /// Memory of dropped tensors is kept for the next ones of a similar size, without limit, until
    /// the device runs out (then every stream of the GPU is trimmed) or this is called.
    ///
    /// # Errors
    /// As [`Stream::synchronize`].
    pub fn trim(&self) -> Result<()> {
        self.inner.stream.gpu().map_or(Ok(()), |stream| stream.trim())
    }

    /// What the environment asked for when the handle was opened.
    pub(crate) fn defaults(&self) -> &KernelConfig {
        &self.inner.defaults
    }

    /// Why no call at all can run on this device with `tier`.
    pub(crate) fn obstacle(&self, tier: Tier) -> Option<Obstacle> {
        match (self.inner.stream.gpu(), tier) {
            (None, Tier::Cpu) => None,
            (None, _) => Some(Obstacle::HostMemory),
            (Some(_), Tier::Cpu) => Some(Obstacle::GpuMemory),
            (Some(stream), _) => stream.gpu().obstacle(tier),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.inner.id)
            .field("name", &self.inner.name)
            .field("tier", &self.inner.tier)
            .finish_non_exhaustive()
    }
}

const OPEN: &str = "Device::cuda";

/// Why `auto` takes the CPU, if the error says that there is no GPU to use.
fn why_cpu(error: &Error) -> Option<String> {
    match error {
        Error::NoDriver { reason } => Some(format!("no CUDA driver: {reason}")),
        Error::NoDevice { .. } => Some("the CUDA driver sees no GPU".to_owned()),
        Error::Unsupported { reason: reason @ Obstacle::Capability { .. }, .. } => {
            Some(format!("no tier for a GPU runs on GPU 0: {reason}"))
        }
        _ => None,
    }
}

/// The tier a GPU's calls get first, and why: the forced one or the most demanding one that runs.
fn choose_tier(
    forced: Option<Tier>,
    obstacle: impl Fn(Tier) -> Option<Obstacle>,
) -> Result<(Tier, String)> {
    if let Some(tier) = forced {
        let reason = if tier == Tier::Cpu { Some(Obstacle::GpuMemory) } else { obstacle(tier) };
        return match reason {
            None => Ok((tier, format!("KASMINA_TIER={tier}"))),
            Some(reason) => Err(reason.refuse(OPEN, tier)),
        };
    }
    let mut skipped = String::new();
    let mut last = Obstacle::GpuMemory;
    let mut lowest = Tier::Cpu;
    for tier in Tier::ALL.into_iter().rev().filter(|&tier| tier != Tier::Cpu) {
        match obstacle(tier) {
            None if skipped.is_empty() => {
                return Ok((tier, "the most demanding tier runs on this GPU".to_owned()));
            }
            None => return Ok((tier, format!("the best tier for this GPU{skipped}"))),
            Some(reason) => {
                skipped.push_str(&format!("; not {tier}: {reason}"));
                (last, lowest) = (reason, tier);
            }
        }
    }
    Err(last.refuse(OPEN, lowest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Obstacle = Obstacle::Capability { major: 6, minor: 1 };

    #[test]
    fn device_handles_are_send_and_sync() {
        fn send_sync<T: Send + Sync>() {}
        send_sync::<Device>();
    }

    #[test]
    fn the_most_demanding_tier_without_an_obstacle_is_chosen() {
        assert_eq!(choose_tier(None, |_| None).unwrap().0, Tier::Hopper);
        let (tier, reason) =
            choose_tier(None, |tier| (tier == Tier::Hopper).then_some(OLD)).unwrap();
        assert_eq!(tier, Tier::Portable);
        assert!(reason.contains("not hopper") && reason.contains("6.1"), "{reason}");
    }

    #[test]
    fn a_forced_tier_is_taken_or_refused_but_never_replaced() {
        assert_eq!(choose_tier(Some(Tier::Portable), |_| None).unwrap().0, Tier::Portable);
        let error = choose_tier(Some(Tier::Hopper), |_| Some(OLD)).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { tier: Tier::Hopper, reason, .. } if reason == OLD)
        );
        let error = choose_tier(Some(Tier::Cpu), |_| None).unwrap_err();
        assert!(matches!(error, Error::Unsupported { tier: Tier::Cpu, .. }));
    }

    #[test]
    fn a_gpu_too_old_for_every_tier_leaves_the_cpu_and_a_driver_error_does_not() {
        let too_old = choose_tier(None, |_| Some(OLD)).unwrap_err();
        assert!(why_cpu(&too_old).is_some_and(|reason| reason.contains("6.1")));
        let failed = Error::Driver {
            call: "cuInit",
            code: 999,
            name: "CUDA_ERROR_UNKNOWN",
            detail: String::new(),
            op: None,
        };
        assert_eq!(why_cpu(&failed), None);
    }

    #[test]
    fn a_driver_too_old_for_every_tier_is_an_error_of_its_own() {
        let obstacle = Obstacle::Driver { driver: (9, 2), required: (10, 0) };
        for forced in [None, Some(Tier::Hopper)] {
            let error = choose_tier(forced, |_| Some(obstacle)).unwrap_err();
            assert!(matches!(error, Error::DriverTooOld { driver: (9, 2), required: (10, 0), .. }));
            assert_eq!(why_cpu(&error), None);
        }
    }

    #[test]
    fn the_cpu_has_no_memory_pool_and_nothing_to_wait_for() {
        let device = Device::cpu();
        device.synchronize().unwrap();
        device.trim().unwrap();
        assert_eq!(device.memory(), MemoryStats::default());
        assert_eq!(device.id().to_string(), "cpu");
        assert_eq!(device.stream().as_raw(), 0);
        assert_eq!(device.obstacle(Tier::Hopper), Some(Obstacle::HostMemory));
    }
}
