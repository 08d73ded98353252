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
use super::protocol::{self, COMMAND, Command, HEARTBEAT, Layout, Lease, Status, Words};
use super::{LayerPlan, MAILBOX_BYTES, MAX_LAYERS, PersistentParams, THREADS};
use crate::ptx;

/// Polls between two looks at the control line, about 0.1 ms apart.
const POLLS: u32 = 64;
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

/// Answers units until told to exit.
///
/// # Safety
/// Every thread of the block calls it. The parameters name a ring of the layout, slots, packed
/// weights and plans of one [`StackPlan`](super::StackPlan), whose shared memory the block has.
#[inline(always)]
pub(super) unsafe fn resident<E: Stack>(params: &PersistentParams) {
    let grid = Grid { params, thread: ptx::thread_index(), smem: ptx::dynamic_smem() };
    let words = Mapped(params.words);
    let status = params.layout.status(ptx::block_index());
    // SAFETY: this contract; all threads take the same way through the loop, by what thread 0 puts
    // into the mailbox, and meet at each barrier.
    unsafe {
        grid.load_plans();
        grid.load_weights(0);
        let mut version = 0;
        ptx::bar_sync_all();
        let mut sequence = 0;
        let mut lease = Lease::new(0, ptx::globaltimer(), params.lease_ns);
        if grid.thread == 0 {
            words.store(status, Status::Running as u64);
            sequence = ptx::atom_add_relaxed_gpu_u64(params.counter, 1);
        }
        loop {
            ptx::nounroll();
            let mut slot = 0;
            if grid.thread == 0 {
                slot = grid.await_unit(&words, sequence, &mut lease, status);
            }
            ptx::bar_sync_all();
            let unit = grid.read_mailbox();
            if unit.rows == EXIT {
                return;
            }
            if unit.rows > 0 {
                if unit.version != version {
                    // The barrier above: nobody reads the old weights any more.
                    grid.load_weights(unit.version & 1);
                    version = unit.version;
                }
                E::compute(&grid, unit);
            }
            ptx::bar_sync_all();
            if grid.thread == 0 {
                if unit.rows > 0 {
                    protocol::complete(&words, &params.layout, slot as u16, sequence);
                } else {
                    protocol::acknowledge(&words, &params.layout, slot as u16, sequence);
                }
                sequence = ptx::atom_add_relaxed_gpu_u64(params.counter, 1);
            }
        }
    }
}

impl Grid<'_> {
    /// Waits for the unit of `sequence` and puts it into the mailbox, or that the block is to exit.
    /// Gives the unit's slot.
    ///
    /// # Safety
    /// Thread 0 alone, between two barriers of the block.
    #[inline(always)]
    unsafe fn await_unit(
        &self,
        words: &Mapped,
        sequence: u64,
        lease: &mut Lease,
        status: u32,
    ) -> u32 {
        let params = self.params;
        let mut end = (sequence >= params.limit).then_some(Status::Ended);
        let mut polls = 0;
        while end.is_none() {
            ptx::nounroll();
            if let Some(descriptor) = protocol::poll(words, &params.layout, sequence) {
                let slot = u32::from(descriptor.slot);
                let [input, output] = if descriptor.by_address {
                    protocol::load_addresses(words, &params.layout, descriptor.slot)
                } else {
                    [
                        params.inputs + u64::from(slot) * u64::from(params.input_slot_bytes),
                        params.outputs + u64::from(slot) * u64::from(params.output_slot_bytes),
                    ]
                };
                // SAFETY: this contract; the mailbox is the first 64 bytes of shared memory.
                unsafe {
                    let rows = u32::from(descriptor.rows);
                    let head = [rows, descriptor.version, 0, 0];
                    ptx::st_shared_v4_u32(self.smem, head);
                    let addresses =
                        [input as u32, (input >> 32) as u32, output as u32, (output >> 32) as u32];
                    ptx::st_shared_v4_u32(self.smem + 16, addresses);
                }
                return slot;
            }
            polls += 1;
            if polls == POLLS {
                polls = 0;
                let [command, heartbeat] = words.load_pair(COMMAND);
                if Command::decode(command).ends(sequence) {
                    end = Some(Status::Ended);
                } else if lease.is_over(heartbeat, ptx::globaltimer()) {
                    end = Some(Status::LeaseExpired);
                }
            }
        }
        words.store(status, end.unwrap_or(Status::Ended) as u64);
        // SAFETY: as above.
        unsafe { ptx::st_shared_v4_u32(self.smem, [EXIT, 0, 0, 0]) }
        0
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
