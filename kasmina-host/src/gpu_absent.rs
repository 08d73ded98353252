//! Stands in for the GPU in a build without the feature `cuda`: the same items, none of which can
//! exist, so that nothing else in the crate depends on the feature.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kasmina_kernels::abi::{Kernel, KernelParams, TensorMap, Tier};
use kasmina_kernels::persistent::protocol::Layout;
use kasmina_kernels::persistent::{PersistentParams, StackPlan};

use crate::device::{Capability, MemoryStats};
use crate::error::{Error, Obstacle, Result};
use crate::stream::Operation;
use crate::tensor::Region;
use crate::tensor_map::{SequenceMap, TensorMapKey};

#[derive(Debug)]
pub(crate) enum Gpu {}

impl Gpu {
    pub(crate) fn name(&self) -> &str {
        match *self {}
    }

    pub(crate) fn capability(&self) -> &Capability {
        match *self {}
    }

    pub(crate) fn obstacle(&self, _: Tier) -> Option<Obstacle> {
        match *self {}
    }

    pub(crate) fn free_multiprocessors(&self) -> u32 {
        match *self {}
    }

    pub(crate) fn tensor_maps<const N: usize>(
        &self,
        _: &[TensorMapKey; N],
    ) -> Result<[TensorMap; N]> {
        match *self {}
    }
}

#[derive(Debug)]
pub(crate) enum Stream {}

impl Stream {
    pub(crate) fn open(_: u32) -> Result<Arc<Self>> {
        Err(Error::NoDriver { reason: "this build lacks the feature `cuda`".to_owned() })
    }

    pub(crate) fn another(&self) -> Result<Arc<Self>> {
        match *self {}
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        match *self {}
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn wait(&self, _: &Self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn as_raw(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn memory(&self) -> MemoryStats {
        match *self {}
    }

    pub(crate) fn trim(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn allocate(self: &Arc<Self>, _: usize) -> Result<Buffer> {
        match **self {}
    }
}

#[derive(Debug)]
pub(crate) struct Buffer {
    // Hidden in a field, so that the compiler does not call its users unreachable.
    never: Infallible,
}

impl Buffer {
    /// # Safety
    /// Cannot be called: there is no stream.
    pub(crate) unsafe fn foreign(
        stream: &Arc<Stream>,
        _: u64,
        _: usize,
        _: Arc<dyn std::any::Any + Send + Sync>,
    ) -> Self {
        match **stream {}
    }

    pub(crate) fn address(&self) -> u64 {
        match self.never {}
    }

    pub(crate) fn is_ready(&self) -> Result<bool> {
        match self.never {}
    }

    pub(crate) fn read(&self, _: Region, _: &mut [u8]) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn write(&self, _: Region, _: &[u8]) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn copy_from(&self, _: Region, _: &Self, _: Region) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn fill(&self, _: &[u8], _: usize) -> Result<()> {
        match self.never {}
    }
}

pub(crate) struct Launch<'a> {
    pub(crate) stream: &'a Stream,
    pub(crate) ptx_dir: Option<&'a Path>,
    pub(crate) operation: Operation,
}

impl Launch<'_> {
    pub(crate) fn prepare<P: KernelParams>(&self, _: &'static Kernel<P>) -> Result<()> {
        match *self.stream {}
    }

    pub(crate) fn run<P: KernelParams>(&self, _: &'static Kernel<P>, _: u32, _: &P) -> Result<()> {
        match *self.stream {}
    }
}

/// Pinned memory, of which there is none.
pub(crate) struct PinnedWords {
    never: Infallible,
}

impl PinnedWords {
    pub(crate) fn new(stream: &Stream, _: usize) -> Result<Self> {
        match *stream {}
    }

    pub(crate) fn address(&self) -> u64 {
        match self.never {}
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        match self.never {}
    }
}

pub(crate) struct PinnedSlot {
    never: Infallible,
}

impl PinnedSlot {
    pub(crate) fn new(
        stream: &Stream,
        _: u16,
        _: usize,
        _: usize,
    ) -> Result<(Vec<Self>, [u64; 2])> {
        match *stream {}
    }

    pub(crate) fn index(&self) -> u16 {
        match self.never {}
    }

    pub(crate) fn write(&mut self, _: &[u8]) {
        match self.never {}
    }

    pub(crate) fn is_clear(&self) -> bool {
        match self.never {}
    }

    pub(crate) fn clear(&mut self) {
        match self.never {}
    }

    pub(crate) fn clear_output(&mut self) {
        match self.never {}
    }

    pub(crate) fn write_arriving(&mut self, _: &[u16]) {
        match self.never {}
    }

    pub(crate) fn present(&self, _: usize, _: usize, _: usize) -> usize {
        match self.never {}
    }

    pub(crate) fn receive(&mut self, _: usize, _: &mut [u8], _: usize) -> usize {
        match self.never {}
    }

    pub(crate) fn take(&mut self, _: &mut [u8]) {
        match self.never {}
    }

    pub(crate) fn forget(&mut self, _: usize) {
        match self.never {}
    }
}

pub(crate) fn check_device(stream: &Stream, _: &'static str) -> Result<()> {
    match *stream {}
}

pub(crate) struct Setup<'a> {
    pub(crate) kernel: &'static Kernel<PersistentParams>,
    pub(crate) ptx_dir: Option<&'a Path>,
    pub(crate) plan: &'a StackPlan,
    pub(crate) layout: Layout,
    pub(crate) words: u64,
    pub(crate) slots: [u64; 2],
    pub(crate) slot_bytes: [u32; 2],
    pub(crate) lease: Duration,
    pub(crate) packed: &'a [u8],
}

pub(crate) struct Resident {
    never: Infallible,
}

impl Resident {
    pub(crate) fn new(stream: &Stream, _: &Setup<'_>, _: &'static str) -> Result<Self> {
        match *stream {}
    }

    pub(crate) fn upload(&self, _: u32, _: &[u8]) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn launch(&mut self, _: u64, _: u64) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        match self.never {}
    }

    pub(crate) fn wait_for_end(&mut self, _: Duration) -> Result<bool> {
        match self.never {}
    }
}

pub(crate) fn encode_sequence_map(_: &SequenceMap) -> Result<TensorMap> {
    Err(Error::NoDriver { reason: "this build lacks the feature `cuda`".to_owned() })
}
