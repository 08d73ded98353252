//! How a block waits for work: threads that poll the descriptor, a thread that watches the host's
//! commands and heartbeat, and the mailbox in shared memory through which they hand over units.
//!
//! ```text
//! mailbox  0   rows, version, whether by address, -             written by who holds the sequence
//!          16  input, output
//!          32  the sequence: BUSY, ENDED or the one to poll     compare-and-swap takes it
//!          40  the sequence that is being computed
//!          48  units handed over so far
//! ```
//!
//! One thread that polls sees a descriptor half a trip over the bus late on average, as it looks
//! again only when the look before has come back. So several poll, in warps of their own, at
//! different times; the first that finds the descriptor takes the sequence. It answers a unit
//! without rows itself, and hands over any other.

use super::{EXIT, Mapped};
use crate::persistent::protocol::{self, COMMAND, Command, Descriptor, Lease, Status, Words};
use crate::persistent::{POLLERS, PersistentParams};
use crate::ptx;

/// In place of a sequence: a unit is being computed, or the block has been told to exit.
const BUSY: u64 = u64::MAX;
const ENDED: u64 = u64::MAX - 1;
/// Between two looks at the control line.
const WATCH_NS: u32 = 10_000;
/// What a trip over the bus takes, about, over which the polls are spread.
const TRIP_NS: u32 = 1_600;

pub(super) struct Waiting<'a> {
    params: &'a PersistentParams,
    words: Mapped,
    /// Address of the mailbox.
    mailbox: u32,
    status: u32,
}

impl<'a> Waiting<'a> {
    #[inline(always)]
    pub(super) fn new(params: &'a PersistentParams, mailbox: u32) -> Self {
        let status = params.layout.status(ptx::block_index());
        Self { params, words: Mapped(params.words), mailbox, status }
    }

    /// # Safety
    /// One thread calls it, ahead of a barrier of the whole block.
    #[inline(always)]
    pub(super) unsafe fn initialise(&self) {
        // SAFETY: this contract; the mailbox is the first 64 bytes of shared memory.
        unsafe {
            ptx::st_release_cta_shared_u64(self.mailbox + 32, BUSY);
            ptx::st_release_cta_shared_u32(self.mailbox + 48, 0);
        }
    }

    /// Says that the block runs, and begins to wait.
    ///
    /// # Safety
    /// One thread calls it, once, when the block is ready for a unit.
    #[inline(always)]
    pub(super) unsafe fn begin(&self) {
        self.words.store(self.status, Status::Running as u64);
        // SAFETY: this contract; the sequence was `BUSY` before.
        unsafe { self.wait_for(ptx::atom_add_relaxed_gpu_u64(self.params.counter, 1)) }
    }

    /// The sequence after the one that is being computed.
    ///
    /// # Safety
    /// Who holds the sequence calls it, once for each.
    #[inline(always)]
    pub(super) unsafe fn next(&self) -> u64 {
        // SAFETY: the counter is the grid's.
        unsafe { ptx::atom_add_relaxed_gpu_u64(self.params.counter, 1) }
    }

    /// Waits until more than `units` have been handed over.
    ///
    /// # Safety
    /// The mailbox is initialised.
    #[inline(always)]
    pub(super) unsafe fn await_unit(&self, units: u32) {
        // SAFETY: this contract.
        while unsafe { ptx::ld_acquire_cta_shared_u32(self.mailbox + 48) } == units {
            ptx::nounroll();
        }
    }

    /// Answers the unit in the mailbox, and waits for the one of sequence `next`.
    ///
    /// # Safety
    /// One thread calls it, after a barrier at which every thread that computes has arrived with
    /// its results written.
    #[inline(always)]
    pub(super) unsafe fn finish(&self, next: u64) {
        // SAFETY: this contract.
        unsafe {
            let [_, _, by_address, _] = ptx::ld_shared_v4_u32(self.mailbox);
            let sequence = ptx::ld_relaxed_cta_shared_u64(self.mailbox + 40);
            let layout = &self.params.layout;
            if by_address != 0 {
                protocol::complete(&self.words, layout, sequence);
            } else {
                protocol::acknowledge(&self.words, layout, sequence);
            }
            self.wait_for(next);
        }
    }

    /// Makes the pollers wait for a sequence, or ends the block if it is not to be taken.
    ///
    /// # Safety
    /// By who holds the sequence.
    #[inline(always)]
    unsafe fn wait_for(&self, sequence: u64) {
        // SAFETY: this contract.
        unsafe {
            if sequence >= self.params.limit {
                self.end(Status::Ended);
            } else {
                ptx::st_release_cta_shared_u64(self.mailbox + 32, sequence);
            }
        }
    }

    /// # Safety
    /// By who holds the sequence, and nobody computes.
    #[inline(always)]
    unsafe fn end(&self, status: Status) {
        self.words.store(self.status, status as u64);
        // SAFETY: this contract.
        unsafe {
            ptx::st_shared_v4_u32(self.mailbox, [EXIT, 0, 0, 0]);
            self.hand_over();
            ptx::st_release_cta_shared_u64(self.mailbox + 32, ENDED);
        }
    }

    /// # Safety
    /// By who holds the sequence and has written the mailbox.
    #[inline(always)]
    unsafe fn hand_over(&self) {
        // SAFETY: this contract: no other thread counts.
        unsafe {
            let units = ptx::ld_acquire_cta_shared_u32(self.mailbox + 48);
            ptx::st_release_cta_shared_u32(self.mailbox + 48, units.wrapping_add(1));
        }
    }

    /// Whether this thread holds the sequence from now on.
    ///
    /// # Safety
    /// The mailbox is initialised.
    #[inline(always)]
    unsafe fn take(&self, sequence: u64) -> bool {
        // SAFETY: this contract.
        unsafe {
            ptx::atom_cas_acq_rel_cta_shared_u64(self.mailbox + 32, sequence, BUSY) == sequence
        }
    }

    /// A thread that polls, the `number`th of `POLLERS`.
    ///
    /// # Safety
    /// The mailbox is initialised, and the block's other threads are in their roles.
    #[inline(always)]
    pub(super) unsafe fn poll(&self, number: u32) {
        ptx::nanosleep(number * (TRIP_NS / POLLERS));
        // SAFETY: this contract.
        unsafe {
            loop {
                ptx::nounroll();
                let sequence = ptx::ld_relaxed_cta_shared_u64(self.mailbox + 32);
                if sequence == ENDED {
                    return;
                }
                if sequence != BUSY
                    && let Some(descriptor) =
                        protocol::poll(&self.words, &self.params.layout, sequence)
                    && self.take(sequence)
                {
                    self.deliver(sequence, descriptor);
                }
            }
        }
    }

    /// # Safety
    /// By who holds the sequence, which the descriptor is of.
    #[inline(always)]
    unsafe fn deliver(&self, sequence: u64, descriptor: Descriptor) {
        let params = self.params;
        // SAFETY: this contract.
        unsafe {
            if descriptor.rows == 0 {
                protocol::acknowledge(&self.words, &params.layout, sequence);
                self.wait_for(self.next());
                return;
            }
            let slot = u32::from(descriptor.slot);
            let [input, output] = if descriptor.by_address {
                protocol::load_addresses(&self.words, &params.layout, descriptor.slot)
            } else {
                [
                    params.inputs + u64::from(slot) * u64::from(params.input_slot_bytes),
                    params.outputs + u64::from(slot) * u64::from(params.output_slot_bytes),
                ]
            };
            let by_address = u32::from(descriptor.by_address);
            let head = [u32::from(descriptor.rows), descriptor.version, by_address, 0];
            ptx::st_shared_v4_u32(self.mailbox, head);
            let addresses =
                [input as u32, (input >> 32) as u32, output as u32, (output >> 32) as u32];
            ptx::st_shared_v4_u32(self.mailbox + 16, addresses);
            ptx::st_release_cta_shared_u64(self.mailbox + 40, sequence);
            self.hand_over();
        }
    }

    /// The thread that ends the block when the host says so, or no longer says anything.
    ///
    /// # Safety
    /// As [`poll`](Self::poll).
    #[inline(always)]
    pub(super) unsafe fn watch(&self) {
        let mut lease = Lease::new(0, ptx::globaltimer(), self.params.lease_ns);
        // SAFETY: this contract.
        unsafe {
            loop {
                ptx::nounroll();
                let [command, heartbeat] = self.words.load_pair(COMMAND);
                let over = lease.is_over(heartbeat, ptx::globaltimer());
                let sequence = ptx::ld_relaxed_cta_shared_u64(self.mailbox + 32);
                if sequence == ENDED {
                    return;
                }
                let told = Command::decode(command).ends(sequence);
                if sequence != BUSY && (told || over) && self.take(sequence) {
                    self.end(if told { Status::Ended } else { Status::LeaseExpired });
                    return;
                }
                ptx::nanosleep(WATCH_NS);
            }
        }
    }
}
