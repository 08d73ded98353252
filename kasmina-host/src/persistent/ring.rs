//! The host's half of the ring: which slots and sequences are in use, and by whom.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kasmina_kernels::persistent::protocol::{
    self, COMMAND, Command, Descriptor, HEARTBEAT, Layout, Payload, Status, Words,
};

use crate::element::Element;
use crate::error::{Error, Result, SessionFault};
use crate::gpu::{PinnedSlot, PinnedWords};

/// The ring's words, wherever the consumers can see them.
pub(super) enum RingWords {
    Host(Box<[AtomicU64]>),
    Pinned(PinnedWords),
}

impl RingWords {
    fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Host(words) => words,
            Self::Pinned(words) => words.words(),
        }
    }
}

impl Words for RingWords {
    fn load(&self, word: u32) -> u64 {
        self.words()[word as usize].load(Ordering::Acquire)
    }
    fn load_pair(&self, word: u32) -> [u64; 2] {
        [self.load(word), self.load(word + 1)]
    }
    fn store(&self, word: u32, value: u64) {
        self.words()[word as usize].store(value, Ordering::Release);
    }
}

/// Room for one payload. There is one value for each slot.
pub(super) enum Slot<T> {
    Host { index: u16, memory: Arc<[Mutex<HostPayload<T>>]> },
    Pinned(PinnedSlot),
}

/// A payload in ordinary memory, for consumers that are threads.
pub(super) struct HostPayload<T> {
    pub(super) input: Vec<T>,
    pub(super) output: Vec<T>,
}

impl<T: Element> Slot<T> {
    pub(super) fn index(&self) -> u16 {
        match self {
            Self::Host { index, .. } => *index,
            Self::Pinned(slot) => slot.index(),
        }
    }

    /// Whether what is there says so of itself. Host memory has no need of that.
    fn is_clear(&self) -> bool {
        match self {
            Self::Host { .. } => true,
            Self::Pinned(slot) => slot.is_clear(),
        }
    }

    fn write(&mut self, values: &[T]) {
        match self {
            Self::Host { index, memory } => {
                let mut payload = lock(&memory[usize::from(*index)]);
                payload.input.clear();
                payload.input.extend_from_slice(values);
            }
            Self::Pinned(slot) => {
                slot.clear_output();
                slot.write(bytemuck::cast_slice(values));
            }
        }
    }

    /// Takes the result of a unit that is done.
    pub(super) fn take(&mut self, values: &mut [T]) {
        match self {
            Self::Host { index, memory } => {
                values.copy_from_slice(&lock(&memory[usize::from(*index)]).output);
            }
            Self::Pinned(slot) => slot.take(bytemuck::cast_slice_mut(values)),
        }
    }
}

/// A unit of work that was submitted, with the slot it holds.
pub(super) struct Part<T> {
    pub(super) slot: Slot<T>,
    pub(super) sequence: u64,
    pub(super) rows: usize,
    /// Whether the payload is read as it arrives, and so may follow its descriptor.
    pub(super) arrives: bool,
    /// Bytes of a result that says itself that it is there, 0 of one that does not, and how many of
    /// them are there.
    awaited: usize,
    present: usize,
}

impl<T: Element> Part<T> {
    /// Makes the result be looked for from its beginning.
    pub(super) const fn forget_present(&mut self) {
        self.present = 0;
    }

    /// Writes the payload.
    pub(super) fn write(&mut self, values: &[T]) {
        match &mut self.slot {
            Slot::Pinned(slot) if self.arrives => slot.write_arriving(bytemuck::cast_slice(values)),
            slot => slot.write(values),
        }
    }
}

/// What one batch needs of the ring.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) op: &'static str,
    pub(super) rows: usize,
    /// Rows of each part; `None` to spread the batch over the consumers that have nothing to do.
    pub(super) part_rows: Option<u32>,
    /// The logical stream.
    pub(super) stream: usize,
    /// Values in a row of a result that is to lie in its slot; 0 if it is to lie elsewhere.
    pub(super) columns: usize,
}

pub(super) struct Ring<T> {
    pub(super) layout: Layout,
    words: RingWords,
    /// The most parts that may hold a slot.
    capacity: usize,
    /// Whether the consumers read payloads as they arrive.
    arriving: bool,
    state: Mutex<State<T>>,
}

struct State<T> {
    next_sequence: u64,
    /// Parts that hold a slot.
    held: usize,
    free: Vec<Slot<T>>,
    /// Free as well, but not clear.
    used: Vec<Slot<T>>,
    /// Those that sequences take by their numbers; none if no payload is read as it arrives.
    express: Vec<Express<T>>,
    /// Parts whose tickets were dropped before they completed.
    abandoned: Vec<(usize, Part<T>)>,
    /// For each logical stream, whether there is one and how many slots it holds.
    streams: Vec<Option<usize>>,
    open_streams: usize,
    version: u32,
    /// The first sequence of that version.
    version_since: u64,
    fault: Option<SessionFault>,
    /// Whether the consumers were told to stop.
    stopped: bool,
}

/// An express slot.
struct Express<T> {
    /// While nobody holds it.
    slot: Option<Slot<T>>,
    /// The first sequence that may take it: a consumer that holds an earlier one may have found
    /// what the slot's last unit left there, after it had found nothing.
    since: u64,
}

impl<T: Element> State<T> {
    /// Slots for any sequence that nobody holds.
    const fn available(&self) -> usize {
        self.free.len() + self.used.len()
    }

    fn take(&mut self) -> Option<Slot<T>> {
        self.free.pop().or_else(|| self.used.pop())
    }

    /// The express slot of a sequence, if it can be had.
    fn take_express(&mut self, sequence: u64) -> Option<Slot<T>> {
        let number = self.express.len().checked_sub(1)? & sequence as usize;
        let express = self.express.get_mut(number)?;
        let is_fit = sequence >= express.since;
        express.slot.take_if(|slot| is_fit && slot.is_clear())
    }

    /// Keeps a slot that was held, for one of so many consumers.
    fn keep(&mut self, slot: Slot<T>, consumers: u32) {
        self.held -= 1;
        if let Some(express) = self.express.get_mut(usize::from(slot.index())) {
            // Consumers hold one each of the sequences that were not given out.
            express.since = self.next_sequence + u64::from(consumers);
            express.slot = Some(slot);
            return;
        }
        let room = if slot.is_clear() { &mut self.free } else { &mut self.used };
        room.push(slot);
    }
}

impl<T: Element> Ring<T> {
    pub(super) fn new(
        layout: Layout,
        words: RingWords,
        slots: Vec<Slot<T>>,
        num_streams: usize,
        arriving: bool,
    ) -> Self {
        words.store(COMMAND, Command::Run.encode());
        let mut slots = slots;
        let ordinary = slots.split_off(layout.express as usize);
        let express =
            slots.into_iter().map(|slot| Express { slot: Some(slot), since: 0 }).collect();
        let state = State {
            next_sequence: 0,
            held: 0,
            express,
            abandoned: Vec::new(),
            streams: vec![None; num_streams],
            open_streams: 0,
            version: 0,
            version_since: 0,
            fault: None,
            stopped: false,
            free: ordinary,
            used: Vec::new(),
        };
        let capacity = state.free.len();
        Self { layout, words, capacity, arriving, state: Mutex::new(state) }
    }

    pub(super) const fn words(&self) -> &RingWords {
        &self.words
    }

    pub(super) const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Slots that are held.
    pub(super) fn depth(&self) -> usize {
        lock(&self.state).held
    }

    /// The sequence after the last one that was given out.
    pub(super) fn submitted(&self) -> u64 {
        lock(&self.state).next_sequence
    }

    /// Commands the consumers, unless they were told to stop: somebody else who closes the session
    /// behind it does not make them go on.
    pub(super) fn command(&self, command: Command) {
        let mut state = lock(&self.state);
        if !state.stopped {
            state.stopped = command == Command::Stop;
            self.words.store(COMMAND, command.encode());
        }
    }

    pub(super) fn beat(&self, number: u64) {
        self.words.store(HEARTBEAT, number);
    }

    /// What the consumers say of themselves.
    pub(super) fn statuses(&self) -> impl Iterator<Item = Status> + '_ {
        (0..self.layout.consumers)
            .map(|consumer| Status::decode(self.words.load(self.layout.status(consumer))))
    }

    /// Refuses everything from now on, for the first failure that is given; having been closed is
    /// none, and gives way to one.
    pub(super) fn fail(&self, fault: SessionFault) {
        let mut state = lock(&self.state);
        if matches!(state.fault, None | Some(SessionFault::Closed)) {
            state.fault = Some(fault);
        }
    }

    pub(super) fn fault(&self) -> Option<SessionFault> {
        lock(&self.state).fault
    }

    /// A new logical stream.
    pub(super) fn open_stream(&self, op: &'static str) -> Result<usize> {
        let mut state = lock(&self.state);
        let limit = state.streams.len();
        let free = state.streams.iter().position(Option::is_none);
        let fault = SessionFault::Streams { limit };
        let stream = free.ok_or(Error::Session { op, fault })?;
        state.streams[stream] = Some(0);
        state.open_streams += 1;
        Ok(stream)
    }

    /// Ends a logical stream. Slots it still holds come back as those of no stream.
    pub(super) fn close_stream(&self, stream: usize) {
        let mut state = lock(&self.state);
        state.open_streams -= usize::from(state.streams[stream].take().is_some());
        // Its number may be another's by the time they come back.
        for (of, _) in state.abandoned.iter_mut().filter(|(of, _)| *of == stream) {
            *of = usize::MAX;
        }
    }

    /// Slots and sequences for a batch, and the version of the weights it is to use.
    pub(super) fn reserve(&self, request: Request) -> Result<(Vec<Part<T>>, u32)> {
        let Request { op, rows, stream, columns, .. } = request;
        let mut state = lock(&self.state);
        if let Some(fault) = state.fault {
            return Err(Error::Session { op, fault });
        }
        self.reap(&mut state);
        let held = state.held;
        // As many slots for each logical stream, and no fewer than one batch may need.
        let share = self.capacity / state.open_streams.max(1);
        let own = state.streams[stream].unwrap_or(0);
        let part_rows = request.part_rows.unwrap_or_else(|| {
            let idle = self.layout.consumers.saturating_sub(held as u32);
            // Not into so many parts that the share would not hold them.
            let idle = idle.min(share.saturating_sub(own) as u32);
            kasmina_kernels::persistent::part_rows(rows as u32, idle)
        }) as usize;
        // A batch without rows is one part that asks for an answer.
        let parts = rows.div_ceil(part_rows).max(1);
        let share = share.max(parts);
        let next = state.next_sequence;
        let vacant = (next..next + parts as u64)
            .all(|sequence| protocol::is_vacant(&self.words, &self.layout, sequence));
        let has_room = held + parts <= self.capacity && parts <= state.available();
        if own + parts > share || !has_room || !vacant {
            return Err(Error::QueueFull { op, in_flight: own, capacity: share });
        }
        state.next_sequence += parts as u64;
        if let Some(own) = &mut state.streams[stream] {
            *own += parts;
        }
        let mut taken = Vec::with_capacity(parts);
        for part in 0..parts {
            let sequence = next + part as u64;
            let express = if columns > 0 { state.take_express(sequence) } else { None };
            let Some(slot) = express.or_else(|| state.take()) else { break };
            state.held += 1;
            let rows = part_rows.min(rows - part * part_rows);
            let pinned = matches!(slot, Slot::Pinned(_));
            let awaited = if pinned { rows * columns * size_of::<T>() } else { 0 };
            let arrives = self.arriving && awaited > 0 && slot.is_clear();
            taken.push(Part { slot, sequence, rows, arrives, awaited, present: 0 });
        }
        Ok((taken, state.version))
    }

    /// Commits a part whose payload has been written, or arrives.
    pub(super) fn publish(&self, part: &Part<T>, version: u32, addresses: Option<[u64; 2]>) {
        let slot = part.slot.index();
        let payload = match addresses {
            Some(addresses) => {
                protocol::store_addresses(&self.words, &self.layout, slot, addresses);
                Payload::Elsewhere
            }
            None if part.arrives => Payload::Arriving,
            None => Payload::Present,
        };
        let (rows, version) = (part.rows as u16, version & (u32::MAX >> 2));
        let descriptor = Descriptor { rows, slot, version, payload };
        protocol::publish(&self.words, &self.layout, part.sequence, descriptor);
    }

    /// Whether a unit is done; its result may still be on its way.
    pub(super) fn is_done(&self, sequence: u64) -> bool {
        protocol::is_complete(&self.words, &self.layout, sequence)
    }

    /// Whether a part is done and its result is there.
    pub(super) fn is_complete(&self, part: &mut Part<T>) -> bool {
        match &part.slot {
            Slot::Pinned(slot) if part.awaited > 0 => {
                part.present = slot.present(part.present, part.awaited, size_of::<T>());
                part.present == part.awaited
            }
            _ => self.is_done(part.sequence),
        }
    }

    /// As [`is_complete`](Self::is_complete), with as much of the result as is there copied to
    /// `values`, which have its size, and which were given for the part from the first time on.
    pub(super) fn receive(&self, part: &mut Part<T>, values: &mut [T]) -> bool {
        match &mut part.slot {
            Slot::Pinned(slot) if part.awaited > 0 => {
                let values = bytemuck::cast_slice_mut(values);
                part.present = slot.receive(part.present, values, size_of::<T>());
                part.present == part.awaited
            }
            slot => {
                let is_done = self.is_done(part.sequence);
                if is_done {
                    slot.take(values);
                }
                is_done
            }
        }
    }

    /// Takes back the slots of parts that have completed and been read.
    pub(super) fn give_back(&self, stream: usize, parts: &mut Vec<Part<T>>) {
        let mut state = lock(&self.state);
        if let Some(own) = &mut state.streams[stream] {
            *own = own.saturating_sub(parts.len());
        }
        for part in parts.drain(..) {
            state.keep(part.slot, self.layout.consumers);
        }
    }

    /// Clears a slot that nobody holds, if there is one. For whoever has nothing else to do.
    pub(super) fn clear_one(&self) -> bool {
        let mut state = lock(&self.state);
        let express = state
            .express
            .iter_mut()
            .find_map(|express| express.slot.take_if(|slot| !slot.is_clear()));
        let Some(mut slot) = express.or_else(|| state.used.pop()) else { return false };
        drop(state);
        if let Slot::Pinned(slot) = &mut slot {
            slot.clear();
        }
        let mut state = lock(&self.state);
        match state.express.get_mut(usize::from(slot.index())) {
            Some(express) => express.slot = Some(slot),
            None => state.free.push(slot),
        }
        true
    }

    /// Takes back the slots of parts that nobody will read, once they have completed.
    pub(super) fn abandon(&self, stream: usize, parts: &mut Vec<Part<T>>) {
        let mut state = lock(&self.state);
        state.abandoned.extend(parts.drain(..).map(|part| (stream, part)));
        self.reap(&mut state);
    }

    fn reap(&self, state: &mut State<T>) {
        let mut next = 0;
        while next < state.abandoned.len() {
            if self.is_complete(&mut state.abandoned[next].1) {
                let (stream, mut part) = state.abandoned.swap_remove(next);
                if let Slot::Pinned(slot) = &mut part.slot {
                    slot.forget(part.awaited);
                }
                if let Some(Some(own)) = state.streams.get_mut(stream) {
                    *own = own.saturating_sub(1);
                }
                state.keep(part.slot, self.layout.consumers);
            } else {
                next += 1;
            }
        }
    }

    /// Whether no descriptor of a version before the present one is still to be done, so that the
    /// next version may take the place of the one before.
    pub(super) fn may_update(&self) -> bool {
        let state = lock(&self.state);
        self.are_complete(&state, state.version_since)
    }

    /// Whether everything that was submitted has been done.
    pub(super) fn all_complete(&self) -> bool {
        let state = lock(&self.state);
        self.are_complete(&state, state.next_sequence)
    }

    /// Whether every sequence below `end` has been done. Those more than a lap ago have, as their
    /// positions were used again.
    fn are_complete(&self, state: &State<T>, end: u64) -> bool {
        let lap = u64::from(self.layout.positions());
        (state.next_sequence.saturating_sub(lap)..end).all(|sequence| self.is_done(sequence))
    }

    pub(super) fn version(&self) -> u32 {
        lock(&self.state).version
    }

    /// Makes batches from now on use this version.
    pub(super) fn set_version(&self, version: u32) {
        let mut state = lock(&self.state);
        state.version = version;
        state.version_since = state.next_sequence;
    }
}

/// Nothing these locks guard is left half-changed by a panic, so poison is no reason to stop.
pub(super) fn lock<U>(mutex: &Mutex<U>) -> MutexGuard<'_, U> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
