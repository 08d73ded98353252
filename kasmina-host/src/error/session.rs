//! What ends a stream session.

use std::time::Duration;

use kasmina_kernels::persistent::PlanFault;

/// Why a stream session cannot begin, or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionFault {
    /// A number of the config is out of its range.
    #[error("`{setting}` is {got}; ask for 1 to {limit}")]
    Setting {
        /// The method of `StreamConfig` that sets it.
        setting: &'static str,
        /// What was asked for.
        got: usize,
        /// The largest value.
        limit: usize,
    },
    /// The lease is out of its range.
    #[error("the `lease` is {got:?}; ask for one of {shortest:?} to {longest:?}")]
    Lease {
        /// What was asked for.
        got: Duration,
        /// The shortest one.
        shortest: Duration,
        /// The longest one.
        longest: Duration,
    },
    /// `CUDA_LAUNCH_BLOCKING=1`: the launch of a resident kernel would never return.
    #[error(
        "CUDA_LAUNCH_BLOCKING=1 would never let the launch of a resident kernel return; unset it, \
         or allow the fallback or `bounded`"
    )]
    LaunchBlocking,
    /// The device lacks what a resident kernel needs.
    #[error("the device has no {lacks}; allow the fallback")]
    Device {
        /// What it lacks.
        lacks: &'static str,
    },
    /// The GPU is in compute mode exclusive-process: set aside for one process at a time, or for MPS,
    /// whose clients a kernel that stays would keep off its multiprocessors.
    #[error(
        "the GPU is in compute mode exclusive-process, in which no kernel may stay; allow the \
         fallback, or set the default mode with `nvidia-smi -c DEFAULT`"
    )]
    Exclusive,
    /// The blocks cannot all be resident at the same time, beside those of other sessions.
    #[error(
        "{blocks} blocks are to be resident and {fit} fit; ask for fewer `blocks`, or close \
         another session"
    )]
    NoRoom {
        /// Blocks that were asked for.
        blocks: u32,
        /// Blocks that the GPU can hold on the multiprocessors that no other session occupies.
        fit: u32,
    },
    /// The blocks did not begin in time: other work holds the GPU, or another process shares it.
    #[error(
        "the resident kernel did not begin within {within:?}; other work holds the GPU, or it is \
         shared in time slices: wait for that work, or allow the fallback"
    )]
    NotStarted {
        /// The time it was given.
        within: Duration,
    },
    /// The stack of layers cannot stay resident.
    #[error("{0}; allow the fallback, or use `forward`")]
    Stack(PlanFault),
    /// The resident kernel ended because the process stood still for longer than the lease.
    #[error(
        "the process stood still for longer than the lease of {lease:?}, so the resident kernel \
         ended; open another session, with a longer `lease` if that happens"
    )]
    LeaseExpired {
        /// The lease.
        lease: Duration,
    },
    /// The resident kernel failed, and with it the GPU's context.
    #[error("the resident kernel failed with {name} ({code}); restart the process")]
    Kernel {
        /// The driver's code.
        code: u32,
        /// Its name.
        name: &'static str,
    },
    /// A kernel would have to be loaded beside a resident one, for which the driver would wait.
    #[error(
        "{kernel} is not loaded, and the driver loads nothing while a session's kernel is \
         resident; `warmup` the layer before the session is opened, or close the session"
    )]
    LoadBeside {
        /// The kernel.
        kernel: &'static str,
    },
    /// The resident kernel ended without having been told to.
    #[error("the resident kernel ended without having been told to; open another session")]
    Ended,
    /// A thread that computes a session's batches panicked.
    #[error("a worker thread of the session panicked; open another session")]
    WorkerPanicked,
    /// A batch could not be computed, which ends the session.
    #[error("a batch could not be computed: {cause}; remove the cause and open another session")]
    Batch {
        /// Why, in short; the log has the whole error.
        cause: &'static str,
    },
    /// The session was closed.
    #[error("the session was closed; open another")]
    Closed,
    /// The session did not do all its work in time. Memory that its kernel may still use is kept for
    /// as long as the process lives.
    #[error(
        "work was still in flight after {after:?}; what was not computed is lost, and memory that \
         a kernel may still use is kept: close with a longer timeout"
    )]
    NotDrained {
        /// The time it was given.
        after: Duration,
    },
    /// There are as many logical streams as the session may have.
    #[error("the session has its {limit} logical streams; drop one, or ask for more `num_streams`")]
    Streams {
        /// How many it may have.
        limit: usize,
    },
    /// The ticket's result has been taken.
    #[error("the ticket's result has been taken; a ticket gives it once")]
    Spent,
    /// The ticket was given by another session.
    #[error("the ticket is of another session; wait for it with the session that gave it")]
    OtherSession,
    /// The result of a ticket of `submit_tensors` goes to its tensor, that of another to the host.
    #[error("the result goes elsewhere; wait for this ticket with `{use_instead}`")]
    TicketKind {
        /// What takes such a ticket.
        use_instead: &'static str,
    },
}
