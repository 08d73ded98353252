//! A grid that stays: what it needs of the device, its launch and its end.

use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use kasmina_driver::cust_raw::{CUdevice_attribute as Attribute, CUfunction};
use kasmina_driver::{CUlaunchAttribute, CUlaunchConfig};
use kasmina_kernels::abi::Kernel;
use kasmina_kernels::persistent::protocol::Layout;
use kasmina_kernels::persistent::{LayerPlan, MAX_LAYERS, PersistentParams, StackPlan};

use super::{Buffer, Stream, driver, failed};
use crate::error::{Error, Result, SessionFault};
use crate::tensor::Region;

/// The operation that errors of a launch name.
const OP: &str = "StreamSession";
/// `CU_COMPUTEMODE_EXCLUSIVE_PROCESS`. Where contexts are prohibited, no device was opened.
const EXCLUSIVE_PROCESS: i32 = 3;
/// Where in device memory the plans lie; the counter lies before them.
const PLANS_AT: usize = 128;

/// A launched or launchable resident grid with its device memory.
pub(crate) struct Resident {
    /// The grid's own stream, which it occupies.
    stream: ManuallyDrop<Arc<Stream>>,
    /// For copies beside the grid.
    copies: ManuallyDrop<Arc<Stream>>,
    /// Counter and plans, of `stream`.
    control: ManuallyDrop<Buffer>,
    /// Packed weights of even and of odd versions, of `copies`.
    weights: [ManuallyDrop<Buffer>; 2],
    function: usize,
    blocks: u32,
    threads: u32,
    smem_bytes: u32,
    params: PersistentParams,
    /// Blocks that one multiprocessor holds.
    per_multiprocessor: u32,
    /// Whether it was launched at all, and whether to stay.
    launched: bool,
    stays: bool,
}

/// What a grid is made of.
pub(crate) struct Setup<'a> {
    pub(crate) kernel: &'static Kernel<PersistentParams>,
    pub(crate) ptx_dir: Option<&'a Path>,
    pub(crate) plan: &'a StackPlan,
    pub(crate) layout: Layout,
    /// Device addresses of the ring's words, the input slots and the output slots.
    pub(crate) words: u64,
    pub(crate) slots: [u64; 2],
    pub(crate) slot_bytes: [u32; 2],
    pub(crate) lease: Duration,
    pub(crate) packed: &'a [u8],
}

/// Whether a device of this stream can keep a grid at all.
pub(crate) fn check_device(stream: &Stream, op: &'static str) -> Result<()> {
    let refused = |fault| Err(Error::Session { op, fault });
    if std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value == "1") {
        return refused(SessionFault::LaunchBlocking);
    }
    let gpu = stream.gpu();
    gpu.bind()?;
    let value_of = |attribute| {
        let mut value = 0;
        let device = gpu.ordinal().cast_signed();
        // SAFETY: the pointer is valid for writing one `int`. A device's handle is its ordinal.
        unsafe { driver!(cuDeviceGetAttribute(&raw mut value, attribute, device)) }
            .map_err(failed)?;
        Ok(value)
    };
    unfit(value_of)?.map_or(Ok(()), refused)
}

/// Why a device with these attributes cannot keep a grid. Whether it is shared in time slices is
/// none of them: there the grid may not begin in time.
fn unfit(value_of: impl Fn(Attribute) -> Result<i32>) -> Result<Option<SessionFault>> {
    for (attribute, lacks, wanted) in [
        (Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, "mapped host memory", true),
        (Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, "unified addressing", true),
        (Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, "cooperative launches", true),
        (
            Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT,
            "kernels without a time limit, which a display sets",
            false,
        ),
    ] {
        if (value_of(attribute)? != 0) != wanted {
            return Ok(Some(SessionFault::Device { lacks }));
        }
    }
    let mode = value_of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE)?;
    Ok((mode == EXCLUSIVE_PROCESS).then_some(SessionFault::Exclusive))
}

impl Resident {
    /// Allocates and loads everything; enqueues nothing that stays.
    pub(crate) fn new(device: &Stream, setup: &Setup<'_>, op: &'static str) -> Result<Self> {
        let (stream, copies) = (device.another()?, device.another()?);
        let gpu = stream.gpu();
        gpu.bind()?;
        let function = gpu.function(setup.kernel, setup.ptx_dir)?;
        let (blocks, smem_bytes) = (setup.layout.consumers, setup.plan.smem_bytes);
        let per_multiprocessor = occupancy(function, setup.kernel.block_dim, smem_bytes)?;
        gpu.check_room(blocks, per_multiprocessor, op)?;
        let plan_bytes = MAX_LAYERS * size_of::<LayerPlan>();
        let control = stream.allocate(PLANS_AT + plan_bytes)?;
        let packed = setup.plan.packed_bytes as usize;
        let weights = [copies.allocate(packed)?, copies.allocate(packed)?];
        let params = PersistentParams {
            words: setup.words,
            inputs: setup.slots[0],
            outputs: setup.slots[1],
            weights: [weights[0].address(), weights[1].address()],
            plans: control.address() + PLANS_AT as u64,
            counter: control.address(),
            limit: u64::MAX,
            lease_ns: u64::try_from(setup.lease.as_nanos()).unwrap_or(u64::MAX),
            layout: setup.layout,
            input_slot_bytes: setup.slot_bytes[0],
            output_slot_bytes: setup.slot_bytes[1],
            row_bytes: setup.plan.row_bytes,
            layers: setup.plan.layers().len() as u32,
        };
        let resident = Self {
            stream: ManuallyDrop::new(stream),
            copies: ManuallyDrop::new(copies),
            control: ManuallyDrop::new(control),
            weights: weights.map(ManuallyDrop::new),
            function: function.expose_provenance(),
            blocks,
            threads: setup.kernel.block_dim,
            smem_bytes,
            params,
            per_multiprocessor,
            launched: false,
            stays: false,
        };
        let mut plans = vec![0u8; plan_bytes];
        for (place, plan) in plans.chunks_exact_mut(size_of::<LayerPlan>()).zip(setup.plan.layers())
        {
            place.copy_from_slice(bytemuck::cast_slice(&plan.words()));
        }
        resident.control.write(region(PLANS_AT, plan_bytes), &plans)?;
        resident.upload(0, setup.packed)?;
        Ok(resident)
    }

    /// Puts packed weights where those of `version` lie, beside the running grid.
    pub(crate) fn upload(&self, version: u32, packed: &[u8]) -> Result<()> {
        self.weights[version as usize % 2].write(region(0, packed.len()), packed)
    }

    /// Launches the grid for the sequences from `first` up to `limit`, or to stay if that is
    /// `u64::MAX`. It does not run now.
    pub(crate) fn launch(&mut self, first: u64, limit: u64) -> Result<()> {
        let gpu = self.stream.gpu();
        gpu.bind()?;
        self.control.write(region(0, size_of::<u64>()), &first.to_le_bytes())?;
        self.params.limit = limit;
        let mut arguments = [ptr::from_mut(&mut self.params).cast()];
        let mut cooperative = CUlaunchAttribute::cooperative(true);
        let (grid, block) = ([self.blocks, 1, 1], [self.threads, 1, 1]);
        let mut config = CUlaunchConfig::new(grid, block, self.smem_bytes, self.stream.raw());
        config.attributes = &raw mut cooperative;
        config.attribute_count = 1;
        let function: CUfunction = ptr::with_exposed_provenance_mut(self.function);
        // Again, as another grid may have begun to stay since: this one would wait for its end.
        if limit < u64::MAX {
            gpu.check_room(self.blocks, self.per_multiprocessor, OP)?;
        } else if !self.stays {
            gpu.stay(self.blocks, self.per_multiprocessor, OP)?;
            self.stays = true;
        }
        self.launched = true;
        // SAFETY: the function takes one `PersistentParams` by value, which the driver copies; what
        // it names lives until the grid has ended: buffers here, pinned memory in the session,
        // which keeps it for good if it cannot tell that the grid has ended.
        unsafe {
            driver!(cuLaunchKernelEx(
                &raw const config,
                function,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            ))
        }
        .map_err(failed)
    }

    /// Whether the grid runs. After an error nobody knows: it may still run. Once it has ended,
    /// its room is free and kernels can be loaded again.
    pub(crate) fn is_running(&mut self) -> Result<bool> {
        let ended = self.stream.is_idle()?;
        if ended && std::mem::take(&mut self.stays) {
            self.stream.gpu().leave(self.blocks);
        }
        Ok(!ended)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        if self.launched && !matches!(self.is_running(), Ok(false)) {
            // The grid may still use all of it, and freeing any of it would wait for the grid.
            tracing::error!("a resident grid is not known to have ended: its memory is kept");
            return;
        }
        // SAFETY: each is dropped once, buffers before their streams.
        unsafe {
            ManuallyDrop::drop(&mut self.control);
            for weights in &mut self.weights {
                ManuallyDrop::drop(weights);
            }
            ManuallyDrop::drop(&mut self.copies);
            ManuallyDrop::drop(&mut self.stream);
        }
    }
}

const fn region(offset: usize, bytes: usize) -> Region {
    Region { offset, rows: 1, row_bytes: bytes, row_stride: bytes }
}

/// Blocks of this size that a multiprocessor runs at the same time when it runs nothing else.
fn occupancy(function: CUfunction, threads: u32, smem_bytes: u32) -> Result<u32> {
    let mut blocks = 0;
    // SAFETY: the pointer is valid for writing one `int`; the function was found in this context.
    unsafe {
        driver!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
            &raw mut blocks,
            function,
            threads.cast_signed(),
            smem_bytes as usize,
        ))
    }
    .map_err(failed)?;
    Ok(blocks.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that can keep a grid, but for one attribute.
    fn but(changed: Option<(Attribute, i32)>) -> Option<SessionFault> {
        let value_of = |attribute| {
            Ok(match attribute {
                _ if changed.is_some_and(|(but, _)| but == attribute) => changed.unwrap().1,
                Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT
                | Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE => 0,
                _ => 1,
            })
        };
        unfit(value_of).unwrap()
    }

    #[test]
    fn a_device_without_what_a_grid_needs_is_refused_by_what_it_lacks() {
        assert_eq!(but(None), None);
        for (attribute, value, named) in [
            (Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 0, "mapped"),
            (Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 0, "unified"),
            (Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 0, "cooperative"),
            (Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT, 1, "time limit"),
        ] {
            let fault = but(Some((attribute, value)));
            let named = |lacks: &str| lacks.contains(named);
            let typed = matches!(fault, Some(SessionFault::Device { lacks }) if named(lacks));
            assert!(typed, "{fault:?}");
        }
    }

    #[test]
    fn a_device_in_exclusive_mode_is_refused() {
        let fault = but(Some((Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, EXCLUSIVE_PROCESS)));
        assert_eq!(fault, Some(SessionFault::Exclusive));
    }

    #[test]
    fn an_attribute_that_cannot_be_asked_for_is_an_error() {
        let driver_error = || {
            let (call, name) = ("cuDeviceGetAttribute", "CUDA_ERROR_INVALID_VALUE");
            Error::Driver { call, code: 1, name, detail: String::new(), op: None }
        };
        assert!(matches!(unfit(|_| Err(driver_error())), Err(Error::Driver { code: 1, .. })));
    }
}
