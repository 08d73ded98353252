//! The memory in which a reduction of a whole tensor leaves what it knows of the chunks.
#![forbid(unsafe_code)]

use std::sync::Arc;

use kasmina_kernels::reduce::Partial;

use crate::error::Result;
use crate::gpu::{Buffer, Stream as GpuStream};

/// Where the slots of a workspace start; the counters lie before them, on a cache line of their own.
pub(super) const SLOTS_AT: u64 = 128;

/// Memory that launches on one stream use one after the other.
pub(super) struct Workspace {
    /// The counters, which every launch leaves at 0, and from [`SLOTS_AT`] on the slots, which it
    /// leaves unwritten.
    pub(super) buffer: Buffer,
    pub(super) slots: u32,
}

impl Workspace {
    pub(super) fn new(stream: &Arc<GpuStream>, slots: u32) -> Result<Self> {
        let buffer = stream.allocate(Self::bytes(slots) as usize)?;
        let unwritten = Partial::UNWRITTEN as u32;
        buffer.fill(&unwritten.to_ne_bytes(), Self::bytes(slots) as usize / size_of::<u32>())?;
        buffer.fill(&0u32.to_ne_bytes(), SLOTS_AT as usize / size_of::<u32>())?;
        Ok(Self { buffer, slots })
    }

    pub(super) const fn bytes(slots: u32) -> u64 {
        SLOTS_AT + slots as u64 * size_of::<Partial>() as u64
    }
}

#[cfg(test)]
mod tests {
    use kasmina_kernels::abi::DType;
    use kasmina_kernels::reduce::Chunks;

    use super::*;

    #[test]
    fn workspaces_of_whole_tensors_keep_to_the_bound_that_is_documented() {
        for dtype in DType::ALL {
            let most = (64 << 30) / dtype.size() as u64;
            // 64 lengths in every octave.
            let lengths = (6..36).flat_map(|log2| (64..128).map(move |n: u64| n << (log2 - 6)));
            let edges = lengths.flat_map(|length| [length - 1, length, length + 1]);
            for length in edges.filter(|&length| length <= most) {
                let rows = Chunks::rows(length, dtype).map_or(0, |chunks| chunks.count);
                let slots = Chunks::of(length, dtype).count.max(rows);
                assert!(Workspace::bytes(slots) <= 1_100_000, "{length} of {dtype}: {slots} slots");
            }
        }
    }
}
