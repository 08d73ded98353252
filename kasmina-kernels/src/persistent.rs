//! Layers that stay resident: `Y = act(X·W + b)`, or a stack of several such layers, for small
//! batches that arrive one by one, answered without a launch.
//!
//! A grid of a few blocks is launched once and keeps the weights. The host puts a batch into a slot
//! of pinned memory and commits a descriptor in a ring ([`protocol`]); a block takes it, computes
//! and writes the result to the slot's output, where the host finds it element by element.
//!
//! ```text
//! thread 0   takes a sequence from the grid's counter, polls its descriptor ┐
//!            reads the control line every few polls: command, lease         │ per unit
//! block      mailbox in shared memory                                  bar  │
//! block      input, unless it came already → shared memory             bar  │
//! block      layer after layer, between two buffers of shared memory   bar* │
//! block      shared memory → output                                    bar  │
//! thread 0   completion word: a release if the result lies elsewhere        ┘
//! ```
//!
//! Every block that has nothing to do polls the position of the sequence it holds, which is another
//! one for each: the next unit is seen by a block that can begin with it at once. A single poller
//! that hands units on through device memory would add a trip through the L2 cache to each. What
//! polling costs is one read of 16 bytes per idle block and trip over the bus. No block has more
//! than one poll of a place under way: reads of one place follow each other at 0.6 µs (H200), so
//! that a second poller delays both. For the same reason a grid has few blocks.
//!
//! A block whose last unit had few rows and came in an *express* slot expects another such: while
//! thread 0 polls the descriptor, as many threads as the last unit had vectors of 16 bytes poll the
//! express slot of the sequence. So descriptor and payload come with one trip over the bus and not
//! with two. After a millisecond without a unit, or one of another kind, thread 0 polls alone again.
//!
//! A batch is cut into *parts* of rows, each a unit of its own ([`part_rows`]): rows do not depend on
//! each other, so several blocks share a batch without talking to each other, and the bits of a
//! row do not depend on how it was cut.
//!
//! # Layout
//! Shared memory of a block, in bytes:
//!
//! ```text
//! 0    .. 64    the mailbox: what thread 0 tells the block
//! 64   .. 704   the layers' plans
//! 704  ..       two buffers of activations, rows `row_bytes` apart
//!      ..       biases in f32, then the matrices that fit ([`StackPlan`])
//! ```
//!
//! The tensor-core tier computes `Yᵀ = act(Wᵀ·Xᵀ + b)` with `mma.m16n8k16`: outputs are the rows of
//! the product and eight rows of the batch its columns, so that a batch of one wastes seven
//! eighths of a fragment and not fifteen sixteenths. A warp has 32 outputs at a time. The portable tier widens to
//! f32, each thread an output, eight rows of the batch at a time. Both sum in f32 in the order of k,
//! and round between layers as separate layers would.
//!
//! # Shape contract
//! - 1 to [`MAX_LAYERS`] layers of 1 to [`MAX_WIDTH`] inputs and outputs; at most [`PART_ROWS`] rows.
//! - 16-byte accesses are used for inputs or outputs whose address and row length are multiples of
//!   16 bytes, else elements one by one.
//! - Inputs are not read through the read-only path: the host writes them while the grid runs.
//!
//! # What is bounded
//! A block waits only in the poll loop, there no longer than the lease after the heartbeat's last
//! change, and for a payload that arrives, no longer than the lease. So the grid ends by itself if
//! the host stops, whatever it was doing.

#[cfg(target_arch = "nvptx64")]
mod device;
mod plan;
pub mod protocol;

pub use plan::{LayerPlan, LayerShape, PlanFault, StackPlan};

use crate::abi::{DType, Kernel, KernelParams, Module, Tier, module};
use protocol::Layout;

/// Layers in a stack, at most.
pub const MAX_LAYERS: usize = 8;
/// Inputs or outputs of a layer, at most.
pub const MAX_WIDTH: u32 = 1024;
/// Rows of one unit of work, at most.
pub const PART_ROWS: u32 = 32;
/// Rows that the portable tier computes at a time.
const PORTABLE_ROWS: u32 = 8;
/// Between rows of activations, so that neighbouring rows start in different banks.
const ROW_PAD_BYTES: u32 = 16;
/// Bytes of the mailbox.
const MAILBOX_BYTES: u32 = 64;
/// Bytes of mailbox and plans.
const SCRATCH_BYTES: u32 = MAILBOX_BYTES + (MAX_LAYERS * size_of::<LayerPlan>()) as u32;
/// Threads per block.
const THREADS: u32 = 256;
/// Steps of 32 inputs whose weights a warp of the tensor-core tier loads before their input comes.
const AHEAD_STEPS: u32 = 8;
/// Shared memory that every GPU of the portable tier has.
const PORTABLE_SMEM_BYTES: u32 = 64 << 10;

/// Rows of each part when `rows` are cut for `idle` blocks: a multiple of 8, the number of rows of
/// an `mma`, and as few as occupy all of them.
#[must_use]
pub const fn part_rows(rows: u32, idle: u32) -> u32 {
    let idle = if idle == 0 { 1 } else { idle };
    let even = rows.div_ceil(idle).next_multiple_of(8);
    if even < 8 {
        8
    } else if even > PART_ROWS {
        PART_ROWS
    } else {
        even
    }
}

/// What a resident kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PersistentParams {
    /// Device address of the ring's words, in pinned host memory.
    pub words: u64,
    /// Device address of the input slots.
    pub inputs: u64,
    /// Device address of the output slots.
    pub outputs: u64,
    /// Device addresses of the packed weights of even and of odd versions.
    pub weights: [u64; 2],
    /// Device address of [`MAX_LAYERS`] plans.
    pub plans: u64,
    /// Device address of the counter of sequences, 0 before.
    pub counter: u64,
    /// Sequences from this one on are not taken.
    pub limit: u64,
    /// Nanoseconds the grid lives after the last heartbeat.
    pub lease_ns: u64,
    /// The ring.
    pub layout: Layout,
    /// Bytes from one input slot to the next.
    pub input_slot_bytes: u32,
    /// Bytes from one output slot to the next.
    pub output_slot_bytes: u32,
    /// Bytes between rows of activations in shared memory.
    pub row_bytes: u32,
    /// Number of layers.
    pub layers: u32,
}

// SAFETY: repr(C); nine u64 in eight fields, then eight u32: no padding.
unsafe impl KernelParams for PersistentParams {}
const _: () = assert!(size_of::<PersistentParams>() == 104);

/// What the echo kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EchoParams {
    /// Device address of two lines in pinned host memory: the host counts up in the first, the
    /// kernel answers in the second.
    pub words: u64,
    /// The number after whose answer it ends.
    pub last: u64,
    /// Nanoseconds it waits for a number.
    pub lease_ns: u64,
}

// SAFETY: repr(C); three u64.
unsafe impl KernelParams for EchoParams {}

/// One row per kernel: the module, what the host launches and the entry on the device.
macro_rules! kernels {
    ($($tier:ident $folder:literal $module:ident $dtype:ident $name:literal $entry:ident
        $smem:expr;)+) => {
        $(
            /// The resident kernel of this element type and tier.
            pub static $module: Module = module!($tier, $folder, $name, [stringify!($entry)]);
        )+

        /// The kernel for a tier and an element type; `None` where there is none.
        #[must_use]
        pub fn kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<PersistentParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<PersistentParams> =
                        Kernel::new(&$module, stringify!($entry), THREADS, $smem);
                    Some(&KERNEL)
                })+
                _ => None,
            }
        }

        $(
            /// # Safety
            /// What the parameters name is as the plan says (`gpu/resident.rs` on the host).
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = $folder))]
            #[unsafe(no_mangle)]
            unsafe extern "ptx-kernel" fn $entry(params: PersistentParams) {
                // SAFETY: this contract.
                unsafe { device::resident::<device::$dtype>(&params) }
            }
        )+
    };
}

kernels! {
    Portable "portable" PORTABLE_F32 F32 "persistent_f32" persistent_f32 PORTABLE_SMEM_BYTES;
    Portable "portable" PORTABLE_F16 F16 "persistent_f16" persistent_f16 PORTABLE_SMEM_BYTES;
    Portable "portable" PORTABLE_BF16 BF16 "persistent_bf16" persistent_bf16 PORTABLE_SMEM_BYTES;
    Hopper "hopper" HOPPER_F16 F16 "persistent_f16" persistent_f16 crate::abi::MAX_SMEM_BYTES;
    Hopper "hopper" HOPPER_BF16 BF16 "persistent_bf16" persistent_bf16 crate::abi::MAX_SMEM_BYTES;
}

/// The module of [`ECHO`].
pub static PORTABLE_ECHO: Module =
    module!(Portable, "portable", "persistent_echo", ["persistent_echo"]);

/// One thread that answers numbers in pinned memory: the floor under every resident kernel.
pub static ECHO: Kernel<EchoParams> = Kernel::new(&PORTABLE_ECHO, "persistent_echo", 32, 0);

/// # Safety
/// The parameters name two lines of mapped pinned memory.
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
#[unsafe(no_mangle)]
unsafe extern "ptx-kernel" fn persistent_echo(params: EchoParams) {
    // SAFETY: as above.
    unsafe { device::echo(&params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_fragments_that_occupy_idle_blocks() {
        for (rows, idle, expected) in [
            (1, 8, 8),
            (8, 8, 8),
            (9, 8, 8),
            (32, 8, 8),
            (32, 4, 8),
            (32, 2, 16),
            (32, 1, 32),
            (33, 1, 32),
            (256, 0, 32),
            (256, 16, 16),
            (256, 11, 24),
        ] {
            assert_eq!(part_rows(rows, idle), expected, "{rows} rows, {idle} idle");
        }
    }

    #[test]
    fn kernels_exist_for_every_type_where_the_tier_has_it() {
        for dtype in DType::ALL {
            assert!(kernel(Tier::Portable, dtype).is_some());
            assert_eq!(kernel(Tier::Hopper, dtype).is_some(), dtype != DType::F32);
            assert!(kernel(Tier::Cpu, dtype).is_none());
        }
    }
}
