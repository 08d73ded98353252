//! One GPU of this process: its primary context and what is kept for it.

use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use cust::context::Context;
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaResult;
use kasmina_driver::cust_raw::{CUdevice_attribute, CUfunction};
use kasmina_driver::{DriverVersion, Unavailable};
use kasmina_kernels::abi::{Kernel, KernelParams, MODULES, TensorMap, Tier};

use super::module_cache::{ModuleCache, required_driver};
use super::pinned::Release;
use super::{Stream, driver, failed, tensor_map};
use crate::device::Capability;
use crate::error::{Error, Obstacle, Result, SessionFault};
use crate::tensor_map::{TensorMapCache, TensorMapKey};

/// One GPU. It is opened once and kept for the life of the process, as the CUDA runtime does with
/// its contexts: loading modules again would cost far more than they hold.
pub(crate) struct Gpu {
    ordinal: u32,
    name: String,
    capability: Capability,
    context: Context,
    /// By position in `Tier::ALL`.
    obstacles: [Option<Obstacle>; Tier::ALL.len()],
    modules: ModuleCache,
    tensor_maps: Mutex<TensorMapCache>,
    default_stream: Mutex<Weak<Stream>>,
    /// For giving memory back when one of them runs out.
    streams: Mutex<Vec<Weak<Stream>>>,
    /// Grids that stay. Held for reading by what none may begin to stay beside: modules are loaded
    /// and memory is freed at the same time, but the driver would wait for such a grid.
    resident: RwLock<u32>,
    /// What is to be freed once no grid stays.
    released: Mutex<Vec<Release>>,
    /// Blocks of all those grids.
    resident_blocks: AtomicU32,
}

static OPEN: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU of this ordinal.
    pub(super) fn open(ordinal: u32) -> Result<&'static Self> {
        // Held while opening, so that threads that race here share one context.
        let mut open = lock(&OPEN);
        if let Some(gpu) = open.iter().find(|gpu| gpu.ordinal == ordinal) {
            return Ok(gpu);
        }
        let driver = kasmina_driver::init().map_err(|error| unavailable(error, ordinal))?;
        let available =
            kasmina_driver::device_count().map_err(|error| unavailable(error, ordinal))?;
        if ordinal >= available {
            return Err(Error::NoDevice { requested: ordinal, available });
        }
        let device = known(Device::get_device(ordinal), "cuDeviceGet")?;
        let capability = capability_of(device, driver)?;
        let gpu: &'static Self = Box::leak(Box::new(Self {
            ordinal,
            name: known(device.name(), "cuDeviceGetName")?,
            capability,
            context: known(Context::new(device), "cuDevicePrimaryCtxRetain")?,
            obstacles: Tier::ALL.map(|tier| obstacle(tier, &capability)),
            modules: ModuleCache::new(driver),
            tensor_maps: Mutex::new(TensorMapCache::new()),
            default_stream: Mutex::new(Weak::new()),
            streams: Mutex::new(Vec::new()),
            resident: RwLock::new(0),
            released: Mutex::new(Vec::new()),
            resident_blocks: AtomicU32::new(0),
        }));
        open.push(gpu);
        Ok(gpu)
    }

    pub(super) const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) const fn capability(&self) -> &Capability {
        &self.capability
    }

    /// Why this GPU or its driver cannot run a tier at all.
    pub(crate) fn obstacle(&self, tier: Tier) -> Option<Obstacle> {
        self.obstacles[tier as usize]
    }

    /// Makes the context current on this thread. Asked every time, because other libraries may
    /// have made theirs current since; asking takes nanoseconds.
    pub(super) fn bind(&self) -> Result<()> {
        let mut current = ptr::null_mut();
        // SAFETY: the pointer is valid for writing one handle during the call.
        unsafe { driver!(cuCtxGetCurrent(&raw mut current)) }.map_err(failed)?;
        if current != self.context.as_raw() {
            // SAFETY: `self.context` keeps the primary context retained.
            unsafe { driver!(cuCtxSetCurrent(self.context.as_raw())) }.map_err(failed)?;
        }
        Ok(())
    }

    /// Free bytes on the GPU, if the driver says.
    pub(super) fn free_memory(&self) -> Option<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are valid for writing one `usize` during the call.
        let asked = unsafe { driver!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) };
        asked.ok().map(|()| free as u64)
    }

    fn resident(&self) -> RwLockReadGuard<'_, u32> {
        self.resident.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn resident_mut(&self) -> RwLockWriteGuard<'_, u32> {
        self.resident.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives memory back to the driver, or keeps it for later while a grid stays on the GPU: the
    /// driver waits for every kernel before it frees.
    pub(super) fn release(&self, memory: Release) {
        let resident = self.resident();
        if *resident > 0 {
            lock(&self.released).push(memory);
        } else {
            self.free(memory);
        }
    }

    fn free(&self, memory: Release) {
        let freed = self.bind().and_then(|()| {
            match memory {
                // SAFETY: the memory came from the driver and is given back once, by its owner,
                // who no longer uses it.
                Release::Device(address) => unsafe { driver!(cuMemFree_v2(address)) },
                // SAFETY: as above.
                Release::Host(address) => unsafe {
                    driver!(cuMemFreeHost(ptr::with_exposed_provenance_mut(address)))
                },
            }
            .map_err(failed)
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "memory could not be given back");
        }
    }

    /// The function of a kernel, loaded on first use. The driver loads nothing while a kernel runs
    /// that does not end, so beside a grid that stays only what is loaded can be had. The context
    /// is current.
    pub(super) fn function<P: KernelParams>(
        &self,
        kernel: &'static Kernel<P>,
        ptx_dir: Option<&Path>,
    ) -> Result<CUfunction> {
        if self.modules.has(kernel, ptx_dir) {
            return self.modules.function(kernel, ptx_dir);
        }
        // Held while loading, so that no grid begins to stay meanwhile.
        let resident = self.resident();
        if *resident > 0 {
            let fault = SessionFault::LoadBeside { kernel: kernel.entry };
            return Err(Error::Session { op: "loading a kernel", fault });
        }
        self.modules.function(kernel, ptx_dir)
    }

    /// Whether a grid of so many blocks, of which a multiprocessor holds so many, can run beside
    /// the grids that stay: it would wait for them to end if not.
    pub(super) fn check_room(
        &self,
        blocks: u32,
        per_multiprocessor: u32,
        op: &'static str,
    ) -> Result<()> {
        let resident = self.resident_blocks.load(Ordering::Relaxed);
        let fit = room(self.capability.sm_count, resident, per_multiprocessor);
        if blocks > fit {
            let fault = SessionFault::NoRoom { blocks, fit };
            return Err(Error::Session { op, fault });
        }
        Ok(())
    }

    /// Notes that a grid of so many blocks stays on the GPU from now on, if there is room.
    pub(super) fn stay(
        &self,
        blocks: u32,
        per_multiprocessor: u32,
        op: &'static str,
    ) -> Result<()> {
        // Held from the look to the note, so that two grids do not take the same room.
        let mut resident = self.resident_mut();
        self.check_room(blocks, per_multiprocessor, op)?;
        *resident += 1;
        self.resident_blocks.fetch_add(blocks, Ordering::Relaxed);
        Ok(())
    }

    /// Multiprocessors that no grid which stays occupies, at least 1: a grid that takes its tiles
    /// in turns and had more blocks would wait for the last of them with all the others done.
    pub(crate) fn free_multiprocessors(&self) -> u32 {
        let resident = self.resident_blocks.load(Ordering::Relaxed);
        self.capability.sm_count.saturating_sub(resident).max(1)
    }

    /// Notes that a grid has ended; with the last of them, memory that waited for it is freed.
    pub(super) fn leave(&self, blocks: u32) {
        let mut resident = self.resident_mut();
        self.resident_blocks.fetch_sub(blocks, Ordering::Relaxed);
        *resident -= 1;
        if *resident == 0 {
            for memory in std::mem::take(&mut *lock(&self.released)) {
                self.free(memory);
            }
        }
    }

    /// The tensor maps of these keys, encoded on first use.
    pub(crate) fn tensor_maps<const N: usize>(
        &self,
        keys: &[TensorMapKey; N],
    ) -> Result<[TensorMap; N]> {
        let mut maps = [TensorMap([0; 16]); N];
        let mut cache = lock(&self.tensor_maps);
        for (map, key) in maps.iter_mut().zip(keys) {
            *map = cache.get_or_encode(key, tensor_map::encode)?;
        }
        Ok(maps)
    }

    /// The stream that handles share unless they ask for one of their own, made by `make` if no
    /// handle has it.
    pub(super) fn default_stream(
        &self,
        make: impl FnOnce() -> Result<Arc<Stream>>,
    ) -> Result<Arc<Stream>> {
        let mut default_stream = lock(&self.default_stream);
        if let Some(stream) = default_stream.upgrade() {
            return Ok(stream);
        }
        let stream = make()?;
        *default_stream = Arc::downgrade(&stream);
        Ok(stream)
    }

    pub(super) fn register(&self, stream: &Arc<Stream>) {
        let mut streams = lock(&self.streams);
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(stream));
    }

    /// The streams there are.
    pub(super) fn streams(&self) -> Vec<Arc<Stream>> {
        lock(&self.streams).iter().filter_map(Weak::upgrade).collect()
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("ordinal", &self.ordinal).finish_non_exhaustive()
    }
}

/// Nothing these locks guard is left half-changed by a panic, so poison is no reason to stop.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The result of a call that `cust` made, with the driver's own number: `CudaError` lacks some.
fn known<T>(result: CudaResult<T>, call: &'static str) -> Result<T> {
    result.map_err(|error| match kasmina_driver::last_error() {
        Some(error) => failed(error),
        None => {
            let (code, name) = (error as u32, "an error of cust's own");
            Error::Driver { call, code, name, detail: format!("{call}: {error:?}"), op: None }
        }
    })
}

fn unavailable(error: Unavailable, requested: u32) -> Error {
    match error {
        Unavailable::NoDriver { reason } => Error::NoDriver { reason },
        Unavailable::NoDevice => Error::NoDevice { requested, available: 0 },
        Unavailable::DriverTooOld { driver, required } => {
            Error::DriverTooOld { driver, required, what: "kasmina".to_owned() }
        }
        Unavailable::Failed { source } => failed(source),
        other => Error::NoDriver { reason: other.to_string() },
    }
}

fn capability_of(device: Device, driver: DriverVersion) -> Result<Capability> {
    let attribute = |attribute: DeviceAttribute| {
        let value = known(device.get_attribute(attribute), "cuDeviceGetAttribute")?;
        Ok::<u32, Error>(value.unsigned_abs())
    };
    let mut smem_per_block = 0;
    let optin = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: the pointer is valid for writing one `int`; the device is one the driver gave.
    unsafe { driver!(cuDeviceGetAttribute(&raw mut smem_per_block, optin, device.as_raw())) }
        .map_err(failed)?;
    Ok(Capability {
        major: attribute(DeviceAttribute::ComputeCapabilityMajor)?,
        minor: attribute(DeviceAttribute::ComputeCapabilityMinor)?,
        sm_count: attribute(DeviceAttribute::MultiprocessorCount)?,
        l2_bytes: u64::from(attribute(DeviceAttribute::L2CacheSize)?),
        smem_per_block: smem_per_block.unsigned_abs(),
        total_memory: known(device.total_memory(), "cuDeviceTotalMem_v2")? as u64,
        driver: (driver.major, driver.minor),
    })
}

/// Blocks, of which a multiprocessor holds so many, that have room beside `resident` others. Each
/// of those may lie on a multiprocessor of its own and leave no room there.
const fn room(sm_count: u32, resident: u32, per_multiprocessor: u32) -> u32 {
    sm_count.saturating_sub(resident).saturating_mul(per_multiprocessor)
}

/// Why a GPU of this capability cannot run a tier.
fn obstacle(tier: Tier, capability: &Capability) -> Option<Obstacle> {
    if tier == Tier::Cpu {
        return Some(Obstacle::GpuMemory);
    }
    let &Capability { major, minor, driver, .. } = capability;
    if !tier.runs_on(major, minor) {
        return Some(Obstacle::Capability { major, minor });
    }
    let modules = MODULES.iter().filter(|module| module.tier == tier);
    let required = modules.filter_map(|module| required_driver(&module.ptx_header())).max()?;
    let required = (required.major, required.minor);
    (driver < required).then_some(Obstacle::Driver { driver, required })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Capability = Capability {
        major: 9,
        minor: 0,
        sm_count: 132,
        l2_bytes: 50 << 20,
        smem_per_block: 232_448,
        total_memory: 141 << 30,
        driver: (13, 0),
    };

    #[test]
    fn a_current_driver_on_hopper_runs_every_gpu_tier() {
        assert_eq!(obstacle(Tier::Hopper, &H200), None);
        assert_eq!(obstacle(Tier::Portable, &H200), None);
        assert_eq!(obstacle(Tier::Cpu, &H200), Some(Obstacle::GpuMemory));
    }

    #[test]
    fn another_architecture_stands_in_the_way_of_hopper_alone() {
        let ampere = Capability { major: 8, ..H200 };
        let reason = Obstacle::Capability { major: 8, minor: 0 };
        assert_eq!(obstacle(Tier::Hopper, &ampere), Some(reason));
        assert_eq!(obstacle(Tier::Portable, &ampere), None);
    }

    #[test]
    fn a_driver_older_than_the_ptx_stands_in_the_way() {
        let old = Capability { driver: (11, 7), ..H200 };
        assert!(matches!(
            obstacle(Tier::Hopper, &old),
            Some(Obstacle::Driver { driver: (11, 7), required }) if required >= (11, 8)
        ));
    }

    #[test]
    fn blocks_that_stay_leave_the_other_multiprocessors() {
        assert_eq!(room(132, 0, 1), 132);
        assert_eq!(room(132, 8, 2), 248);
        assert_eq!(room(132, 132, 2), 0);
        assert_eq!(room(132, 200, 1), 0);
    }

    #[test]
    fn tiers_stand_in_their_list_in_the_order_of_their_numbers() {
        for (position, tier) in Tier::ALL.into_iter().enumerate() {
            assert_eq!(tier as usize, position);
        }
    }

    #[test]
    fn what_makes_the_driver_unavailable_keeps_its_kind() {
        let error = unavailable(Unavailable::NoDevice, 3);
        assert!(matches!(error, Error::NoDevice { requested: 3, available: 0 }));
        let error = unavailable(Unavailable::NoDriver { reason: "gone".into() }, 0);
        assert!(matches!(error, Error::NoDriver { reason } if reason == "gone"));
    }
}
