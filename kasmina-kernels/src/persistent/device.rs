//! The grid's life: the poll loop, the way of a unit through a block, and what is common to the
//! tiers. How a layer is computed is the tier's: `tensor` or `simt`.

#[cfg(kasmina_tier = "portable")]
mod simt;
#[cfg(kasmina_tier = "hopper")]
mod tensor;

#[cfg(kasmina_tier = "portable")]
pub(super) use simt::{BF16, F16, F32, Stack};
#[cfg(kasmina_tier = "hopper")]
pub(super) use tensor::{BF16, F16, Stack};

#[cfg(kasmina_tier = "portable")]
use super::EchoParams;
#[cfg(kasmina_tier = "portable")]
use super::protocol::LINE;
use super::protocol::{
    self, COMMAND, Command, Descriptor, HEARTBEAT, Layout, Lease, Status, Words,
};
use super::{LayerPlan, MAILBOX_BYTES, MAX_LAYERS, PersistentParams, THREADS};
use crate::ptx;

/// Polls between two looks at the control line, about a millisecond apart: a descriptor that comes
/// while the block looks there is seen a trip over the bus late.
const POLLS: u32 = 1024;
/// Bytes of a plan.
const PLAN_BYTES: u32 = size_of::<LayerPlan>() as u32;
/// In the mailbox in place of rows: the block is to exit.
const EXIT: u32 = u32::MAX;

/// The ring's words, by their device address.
struct Mapped(u64);

impl Words for Mapped {
    #[inline(always)]
    fn load(&self, word: u32) -> u64 {
        // SAFETY: a word of the ring, which `gpu/resident.rs` has allocated for this layout.
        unsafe { ptx::ld_acquire_sys_u64(self.0 + u64::from(word) * 8) }
    }
    #[inline(always)]
    fn load_pair(&self, word: u32) -> [u64; 2] {
        // SAFETY: as above; pairs start at even words of memory that is aligned to a page.
        unsafe { ptx::ld_acquire_sys_v2_u64(self.0 + u64::from(word) * 8) }
    }
    #[inline(always)]
    fn store(&self, word: u32, value: u64) {
        // SAFETY: as above.
        unsafe { ptx::st_release_sys_u64(self.0 + u64::from(word) * 8, value) }
    }
    /// Without the fence of a release, which waits until the bus has taken what was written.
    #[inline(always)]
    fn store_alone(&self, word: u32, value: u64) {
        // SAFETY: as above.
        unsafe { ptx::st_relaxed_sys_u64(self.0 + u64::from(word) * 8, value) }
    }
}

/// A unit of work as the block sees it.
#[derive(Clone, Copy)]
pub(in crate::persistent) struct Unit {
    rows: u32,
    version: u32,
    input: u64,
    output: u64,
}

/// What the parameters say, in registers.
#[derive(Clone, Copy)]
pub(in crate::persistent) struct Grid<'a> {
    params: &'a PersistentParams,
    thread: u32,
    /// Address of the dynamic shared memory.
    smem: u32,
}

/// What thread 0 alone knows of the grid's work.
struct Waiting {
    words: Mapped,
    status: u32,
    /// The sequence it waits for or computes.
    sequence: u64,
    lease: Lease,
    by_address: bool,
}

/// Answers units until told to exit.
///
/// # Safety
/// Every thread of the block calls it. The parameters name a ring of the layout, slots, packed
/// weights and plans of one [`StackPlan`](super::StackPlan), whose shared memory the block has.
#[inline(always)]
pub(super) unsafe fn resident<E: Stack>(params: &PersistentParams) {
    let grid = Grid { params, thread: ptx::thread_index(), smem: ptx::dynamic_smem() };
    let mut waiting = Waiting {
        words: Mapped(params.words),
        status: params.layout.status(ptx::block_index()),
        sequence: 0,
        lease: Lease::new(0, ptx::globaltimer(), params.lease_ns),
        by_address: false,
    };
    // SAFETY: this contract; all threads take the same way through the loop, by what thread 0 puts
    // into the mailbox, and meet at each barrier.
    unsafe {
        grid.load_plans();
        grid.load_weights(0);
        let mut version = 0;
        ptx::bar_sync_all();
        if grid.thread == 0 {
            waiting.words.store(waiting.status, Status::Running as u64);
            waiting.sequence = grid.take_sequence();
        }
        loop {
            ptx::nounroll();
            let mut ahead = E::ahead(&grid);
            if grid.thread == 0 {
                grid.await_unit(&mut waiting);
            }
            ptx::bar_sync_all();
            let unit = grid.read_mailbox();
            if unit.rows == EXIT {
                return;
            }
            if unit.version != version {
                // The barrier above: nobody reads the old weights any more.
                grid.load_weights(unit.version & 1);
                version = unit.version;
                ahead = E::ahead(&grid);
            }
            E::compute(&grid, unit, &ahead);
            // Taken ahead of the barrier, which hides some of the time.
            let next = if grid.thread == 0 { grid.take_sequence() } else { 0 };
            ptx::bar_sync_all();
            // The compiler, which does not know barriers, would take the branches on both sides of
            // this one together and give thread 0 a barrier of its own, at which the others of its
            // warp are not.
            if ptx::opaque_u32(grid.thread) == 0 {
                let Waiting { words, sequence, by_address, .. } = &waiting;
                if *by_address {
                    protocol::complete(words, &params.layout, *sequence);
                } else {
                    protocol::acknowledge(words, &params.layout, *sequence);
                }
                waiting.sequence = next;
            }
        }
    }
}

impl Grid<'_> {
    /// The next sequence that nobody has.
    ///
    /// # Safety
    /// Thread 0 alone.
    #[inline(always)]
    unsafe fn take_sequence(&self) -> u64 {
        // SAFETY: the counter is the grid's.
        unsafe { ptx::atom_add_relaxed_gpu_u64(self.params.counter, 1) }
    }

    /// Waits for the unit of the sequence and puts it into the mailbox, or that the block is to
    /// exit. Units without rows are answered on the way.
    ///
    /// # Safety
    /// Thread 0 alone, between two barriers of the block.
    #[inline(always)]
    unsafe fn await_unit(&self, waiting: &mut Waiting) {
        let params = self.params;
        let mut polls = 0;
        let end = loop {
            ptx::nounroll();
            if waiting.sequence >= params.limit {
                break Status::Ended;
            }
            if let Some(descriptor) =
                protocol::poll(&waiting.words, &params.layout, waiting.sequence)
            {
                if descriptor.rows > 0 {
                    // SAFETY: this contract.
                    unsafe { self.write_mailbox(waiting, descriptor) }
                    return;
                }
                protocol::acknowledge(&waiting.words, &params.layout, waiting.sequence);
                // SAFETY: this contract.
                waiting.sequence = unsafe { self.take_sequence() };
            }
            polls += 1;
            if polls == POLLS {
                polls = 0;
                let [command, heartbeat] = waiting.words.load_pair(COMMAND);
                if Command::decode(command).ends(waiting.sequence) {
                    break Status::Ended;
                }
                if waiting.lease.is_over(heartbeat, ptx::globaltimer()) {
                    break Status::LeaseExpired;
                }
            }
        };
        waiting.words.store(waiting.status, end as u64);
        // SAFETY: the mailbox is the first 64 bytes of shared memory.
        unsafe { ptx::st_shared_v4_u32(self.smem, [EXIT, 0, 0, 0]) }
    }

    /// # Safety
    /// As [`await_unit`](Self::await_unit).
    #[inline(always)]
    unsafe fn write_mailbox(&self, waiting: &mut Waiting, descriptor: Descriptor) {
        let params = self.params;
        let slot = u32::from(descriptor.slot);
        waiting.by_address = descriptor.by_address;
        let [input, output] = if descriptor.by_address {
            protocol::load_addresses(&waiting.words, &params.layout, descriptor.slot)
        } else {
            [
                params.inputs + u64::from(slot) * u64::from(params.input_slot_bytes),
                params.outputs + u64::from(slot) * u64::from(params.output_slot_bytes),
            ]
        };
        let head = [u32::from(descriptor.rows), descriptor.version, 0, 0];
        let addresses = [input as u32, (input >> 32) as u32, output as u32, (output >> 32) as u32];
        // SAFETY: this contract; the mailbox is the first 64 bytes of shared memory.
        unsafe {
            ptx::st_shared_v4_u32(self.smem, head);
            ptx::st_shared_v4_u32(self.smem + 16, addresses);
        }
    }

    /// # Safety
    /// After a barrier that follows thread 0's writes, before one that precedes its next.
    #[inline(always)]
    unsafe fn read_mailbox(&self) -> Unit {
        // SAFETY: this contract.
        let ([rows, version, ..], [input, input_high, output, output_high]) =
            unsafe { (ptx::ld_shared_v4_u32(self.smem), ptx::ld_shared_v4_u32(self.smem + 16)) };
        Unit {
            rows,
            version,
            input: u64::from(input) | u64::from(input_high) << 32,
            output: u64::from(output) | u64::from(output_high) << 32,
        }
    }

    /// Copies the plans to shared memory.
    ///
    /// # Safety
    /// Every thread of the block calls it before a barrier.
    #[inline(always)]
    unsafe fn load_plans(&self) {
        // SAFETY: there are `MAX_LAYERS` plans on both sides.
        unsafe {
            self.copy_to_smem(
                self.params.plans,
                self.smem + MAILBOX_BYTES,
                MAX_LAYERS as u32 * PLAN_BYTES,
            );
        }
        // SAFETY: every thread of the block is here.
        unsafe { ptx::bar_sync_all() }
    }

    /// A word of a layer's plan.
    ///
    /// # Safety
    /// `layer` is below `MAX_LAYERS`, `word` below 20.
    #[inline(always)]
    unsafe fn plan(&self, layer: u32, word: u32) -> u32 {
        // SAFETY: this contract; plans are written once, before a barrier.
        unsafe { ptx::ld_shared_u32(self.smem + MAILBOX_BYTES + layer * PLAN_BYTES + word * 4) }
    }

    /// Copies biases, and the matrices that stay, to shared memory.
    ///
    /// # Safety
    /// Every thread of the block calls it, between two barriers; `version` is 0 or 1.
    #[inline(always)]
    unsafe fn load_weights(&self, version: u32) {
        let packed = self.packed(version);
        let mut layer = 0;
        while layer < self.params.layers {
            ptx::nounroll();
            // SAFETY: the plan's parts lie within the packed weights and within shared memory.
            unsafe {
                let [weight_at, weight_bytes, bias_at, bias_bytes, weight_smem, bias_smem] =
                    [2, 3, 4, 5, 6, 7].map(|word| self.plan(layer, word));
                let (bias, target) = (packed + u64::from(bias_at), self.smem + bias_smem);
                self.copy_to_smem(bias, target, bias_bytes);
                if weight_smem != LayerPlan::STREAMED {
                    let (weight, target) = (packed + u64::from(weight_at), self.smem + weight_smem);
                    self.copy_to_smem(weight, target, weight_bytes);
                }
            }
            layer += 1;
        }
        // SAFETY: every thread of the block is here.
        unsafe { ptx::bar_sync_all() }
    }

    /// The packed weights of a version.
    #[inline(always)]
    fn packed(&self, version: u32) -> u64 {
        if version & 1 == 0 { self.params.weights[0] } else { self.params.weights[1] }
    }

    /// Copies bytes, a multiple of 16, that the host may have written since the grid began.
    ///
    /// # Safety
    /// Every thread of the block calls it; both ends are 16-aligned and have so many bytes.
    #[inline(always)]
    unsafe fn copy_to_smem(&self, source: u64, target: u32, bytes: u32) {
        let mut at = self.thread * 16;
        while at < bytes {
            ptx::nounroll();
            // SAFETY: this contract.
            unsafe {
                let vector = ptx::ld_relaxed_sys_v4_u32(source + u64::from(at));
                ptx::st_shared_v4_u32(target + at, vector);
            }
            at += THREADS * 16;
        }
    }
}

/// Answers each number in the first line with itself in the second.
///
/// # Safety
/// The parameters name two lines of mapped pinned memory.
#[cfg(kasmina_tier = "portable")]
#[inline(always)]
pub(super) unsafe fn echo(params: &EchoParams) {
    if ptx::thread_index() != 0 {
        return;
    }
    let words = Mapped(params.words);
    let (mut seen, mut since) = (0, ptx::globaltimer());
    let mut polls = 0;
    loop {
        ptx::nounroll();
        let number = words.load(0);
        if number != seen {
            words.store_alone(LINE, number);
            seen = number;
            since = ptx::globaltimer();
            if number == params.last {
                return;
            }
        }
        polls += 1;
        if polls == POLLS {
            polls = 0;
            if ptx::globaltimer().wrapping_sub(since) > params.lease_ns {
                return;
            }
        }
    }
}

const _: () = assert!(HEARTBEAT == COMMAND + 1 && COMMAND.is_multiple_of(2));
const _: () = assert!(size_of::<Layout>() == 16);
