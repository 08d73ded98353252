//! The ring between a producer, the host, and consumers, blocks of a resident kernel or threads.
//!
//! Everything is a word of 64 bits that one side writes and the other reads; there is no
//! read-modify-write across the bus, which PCIe does not make atomic. A word that announces other
//! memory is stored with release and loaded with acquire; one that announces nothing else is stored
//! relaxed ([`Words::store_alone`]). Units of work are numbered by a *sequence* that never repeats.
//!
//! ```text
//! line 0              command, heartbeat                        host → device
//! lines 1 ..          status, one line per block                device → host
//! descriptors         one line per position of the ring,        host → device
//!                     two words of which are used
//! completions         one line per position: the last sequence  device → host
//!                     that was done there, plus 1
//! addresses           one line per slot, two words of it        host → device
//! ```
//!
//! A descriptor is committed by its tags: each of its two words carries the lap of the ring in
//! which it was written, so a consumer that finds both tags of the lap it is in has both words, and
//! nothing is ever cleared. Payloads lie in *slots*, which are numbered apart from positions: a
//! result that nobody fetches holds its slot and not the ring.
//!
//! # Results say themselves that they are there
//! Where a kernel writes results to pinned memory, a release after them costs as much as a trip over
//! the bus: the fence waits until the bus has taken what was written. So each element of such a
//! result is stored on its own account, in no order, and tells that it is there by not being
//! [`ABSENT`] any more, which the host has made it before it submitted, and which no kernel stores.
//! What the kernel has read of the input it has read before it can store what it computed from it,
//! so with its result complete a slot is the host's again. The completion word of such a unit comes
//! without a release; it says that the position is vacant and the unit's weights are no longer used.
//! Of other units, those without rows and those whose payload lies elsewhere, it is the answer.
//!
//! # Payloads may do the same
//! A descriptor that follows its payload is found a poll after the payload was written, and the
//! payload is fetched a trip over the bus after that. One that goes ahead of it
//! ([`Payload::Arriving`]) is found while the host still writes. The slot's input was made
//! [`ABSENT`] before, when the host had nothing else to do, and the kernel reads each element until
//! it is there; an element that the user gives as that NaN is written as another ([`arriving`]).
//! Nothing orders descriptor and payload, as each element tells of itself alone.
//!
//! # Payloads may be found before their descriptor
//! The first slots are *express*: a unit that takes one takes that of its sequence's number
//! ([`Layout::express_slot`]), so a kernel that holds a sequence knows where the payload will be if
//! the unit is such a one, and saves a trip over the bus by looking there as it looks for the
//! descriptor. What it finds there may be what the slot's last unit left. But once it has found
//! elements absent, what it finds in their place later is of its own unit: the host gives the slot
//! to a sequence only if no consumer can have taken that sequence before the last unit's payload
//! was there, as consumers hold no more than one sequence each that was not given out.
//!
//! Consumers take sequences from a counter of their own, each once, and wait for the descriptor at
//! that position. So several may wait at a time, each for another position, and work is taken in
//! the order of submission by whoever is free.

/// Words in a line of 64 bytes: what different writers write lies on different lines.
pub const LINE: u32 = 8;

/// Each byte of a result's element that is not there yet: as a number, a NaN with its sign set,
/// which arithmetic on a GPU never gives.
pub const ABSENT: u8 = 0xFF;

/// Whether one of the two 16-bit elements of a word is not there yet.
#[must_use]
#[inline(always)]
pub const fn is_absent_in_pair(pair: u32) -> bool {
    // An element of the inverse is zero; a borrow begins only at one that is.
    let inverse = !pair;
    inverse.wrapping_sub(0x0001_0001) & pair & 0x8000_8000 != 0
}

/// A 16-bit element as it is written to a slot from which it is read as it arrives: of the NaN that
/// means that nothing is there, the one without the sign.
#[must_use]
#[inline(always)]
pub const fn arriving(bits: u16) -> u16 {
    if bits == u16::MAX { bits >> 1 } else { bits }
}

/// Memory that both sides see, as words of 64 bits.
pub trait Words {
    /// The word, with everything written before it was stored.
    fn load(&self, word: u32) -> u64;
    /// Two neighbouring words from an even one on, each as [`load`](Self::load) does.
    fn load_pair(&self, word: u32) -> [u64; 2];
    /// Stores the word after everything written so far.
    fn store(&self, word: u32, value: u64);
    /// Stores a word that announces nothing else.
    fn store_alone(&self, word: u32, value: u64) {
        self.store(word, value);
    }
}

/// Where in the ring's memory everything lies.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Consumers: blocks of the kernel or threads.
    pub consumers: u32,
    /// log2 of the positions of the ring.
    pub log2_positions: u32,
    /// Payload slots, at most 65536.
    pub slots: u32,
    /// How many of them are express: a power of two, or none.
    pub express: u32,
}

impl Layout {
    /// A ring with as many positions as slots, rounded up to a power of two.
    #[must_use]
    pub const fn new(consumers: u32, slots: u32) -> Self {
        let log2_positions = slots.next_power_of_two().ilog2();
        Self { consumers, log2_positions, slots, express: 0 }
    }

    /// The same with express slots beside the others, a power of two of them.
    #[must_use]
    pub const fn with_express(self, express: u32) -> Self {
        Self { express, ..Self::new(self.consumers, self.slots + express) }
    }

    /// The express slot of a sequence, if there are any.
    #[must_use]
    #[inline(always)]
    pub const fn express_slot(&self, sequence: u64) -> u32 {
        sequence as u32 & self.express.wrapping_sub(1)
    }

    /// Words in all.
    #[must_use]
    pub const fn words(&self) -> u32 {
        self.addresses(self.slots)
    }

    /// Positions of the ring.
    #[must_use]
    #[inline(always)]
    pub const fn positions(&self) -> u32 {
        1 << self.log2_positions
    }

    /// The status word of a consumer.
    #[must_use]
    #[inline(always)]
    pub const fn status(&self, consumer: u32) -> u32 {
        (1 + consumer) * LINE
    }

    /// The first word of the descriptor of a sequence.
    #[must_use]
    #[inline(always)]
    pub const fn descriptor(&self, sequence: u64) -> u32 {
        (1 + self.consumers + (sequence as u32 & (self.positions() - 1))) * LINE
    }

    /// The completion word of the position of a sequence.
    #[must_use]
    #[inline(always)]
    pub const fn completion(&self, sequence: u64) -> u32 {
        self.descriptor(sequence) + self.positions() * LINE
    }

    /// The first of the two address words of a slot.
    #[must_use]
    #[inline(always)]
    pub const fn addresses(&self, slot: u32) -> u32 {
        (1 + self.consumers + self.positions() * 2 + slot) * LINE
    }

    /// The lap's number as a tag. Memory that was never written holds none of the first lap's.
    #[inline(always)]
    const fn tag(&self, sequence: u64) -> u32 {
        ((sequence >> self.log2_positions) as u32).wrapping_add(1)
    }
}

/// The word of the command.
pub const COMMAND: u32 = 0;
/// The word of the heartbeat, whose changes say that the host is alive.
pub const HEARTBEAT: u32 = 1;

/// What consumers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Wait for work.
    Run,
    /// Do what is below this sequence, then exit.
    Drain(u64),
    /// Exit.
    Stop,
}

impl Command {
    /// As it lies in [`COMMAND`].
    #[must_use]
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Run => 0,
            Self::Drain(sequence) => sequence << 2 | 1,
            Self::Stop => 2,
        }
    }

    /// The command of a word.
    #[must_use]
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        match word & 3 {
            0 => Self::Run,
            1 => Self::Drain(word >> 2),
            _ => Self::Stop,
        }
    }

    /// Whether a consumer that holds `sequence`, for which nothing is there yet, is to exit.
    #[must_use]
    #[inline(always)]
    pub const fn ends(self, sequence: u64) -> bool {
        match self {
            Self::Run => false,
            Self::Drain(limit) => sequence >= limit,
            Self::Stop => true,
        }
    }
}

/// What a consumer says of itself in its status word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Status {
    /// It has not begun.
    Absent = 0,
    /// It takes work.
    Running = 1,
    /// It ended because it was told to, or had done as many units as it was to do.
    Ended = 2,
    /// It ended because the heartbeat stopped.
    LeaseExpired = 3,
}

impl Status {
    /// The status of a word.
    #[must_use]
    pub const fn decode(word: u64) -> Self {
        match word {
            0 => Self::Absent,
            1 => Self::Running,
            2 => Self::Ended,
            _ => Self::LeaseExpired,
        }
    }
}

/// One unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Rows of the payload, at most [`PART_ROWS`](super::PART_ROWS); none ask for nothing but an
    /// answer.
    pub rows: u16,
    /// The payload's slot.
    pub slot: u16,
    /// Which weights to use: their number, modulo 2³⁰.
    pub version: u32,
    /// Where the payload is.
    pub payload: Payload,
}

/// Where the payload of a unit is when its descriptor is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// In the slot.
    Present,
    /// On its way to the slot, whose input was [`ABSENT`] before.
    Arriving,
    /// At the slot's addresses.
    Elsewhere,
}

impl Descriptor {
    #[inline(always)]
    const fn encode(self, tag: u32) -> [u64; 2] {
        let payload = match self.payload {
            Payload::Present => 0,
            Payload::Arriving => 1,
            Payload::Elsewhere => 2,
        };
        let second = self.version << 2 | payload;
        [
            tag as u64 | (self.rows as u64) << 32 | (self.slot as u64) << 48,
            tag as u64 | (second as u64) << 32,
        ]
    }

    #[inline(always)]
    const fn decode([first, second]: [u64; 2], tag: u32) -> Option<Self> {
        if first as u32 != tag || second as u32 != tag {
            return None;
        }
        Some(Self {
            rows: (first >> 32) as u16,
            slot: (first >> 48) as u16,
            version: (second >> 34) as u32,
            payload: match second >> 32 & 3 {
                0 => Payload::Present,
                1 => Payload::Arriving,
                _ => Payload::Elsewhere,
            },
        })
    }
}

/// Commits a descriptor. What its payload holds has been written, and the descriptor that was at
/// its position one lap ago has completed.
#[inline(always)]
pub fn publish(words: &impl Words, layout: &Layout, sequence: u64, descriptor: Descriptor) {
    let word = layout.descriptor(sequence);
    let [first, second] = descriptor.encode(layout.tag(sequence));
    words.store(word + 1, second);
    words.store(word, first);
}

/// The descriptor of a sequence, once it is committed.
#[inline(always)]
pub fn poll(words: &impl Words, layout: &Layout, sequence: u64) -> Option<Descriptor> {
    Descriptor::decode(words.load_pair(layout.descriptor(sequence)), layout.tag(sequence))
}

/// Says that the unit is done. Its result has been written.
#[inline(always)]
pub fn complete(words: &impl Words, layout: &Layout, sequence: u64) {
    words.store(layout.completion(sequence), sequence + 1);
}

/// As [`complete`], for a unit without a result, or with one that says itself that it is there.
#[inline(always)]
pub fn acknowledge(words: &impl Words, layout: &Layout, sequence: u64) {
    words.store_alone(layout.completion(sequence), sequence + 1);
}

/// Whether the unit is done.
#[inline(always)]
pub fn is_complete(words: &impl Words, layout: &Layout, sequence: u64) -> bool {
    words.load(layout.completion(sequence)) > sequence
}

/// Whether the descriptor of a sequence may be published: the one before it at its position, one
/// lap ago, is done.
#[inline(always)]
pub fn is_vacant(words: &impl Words, layout: &Layout, sequence: u64) -> bool {
    match sequence.checked_sub(layout.positions() as u64) {
        Some(before) => is_complete(words, layout, before),
        None => true,
    }
}

/// Puts the addresses of a payload that is [`Payload::Elsewhere`] where its descriptor says they are:
/// in the slot's line.
#[inline(always)]
pub fn store_addresses(words: &impl Words, layout: &Layout, slot: u16, addresses: [u64; 2]) {
    let word = layout.addresses(slot as u32);
    words.store(word, addresses[0]);
    words.store(word + 1, addresses[1]);
}

/// The payload's addresses, input and output.
#[inline(always)]
pub fn load_addresses(words: &impl Words, layout: &Layout, slot: u16) -> [u64; 2] {
    words.load_pair(layout.addresses(slot as u32))
}

/// A consumer's view of the host's life: how long ago the heartbeat changed.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    heartbeat: u64,
    since: u64,
    length: u64,
}

impl Lease {
    /// A lease of `length` that begins `now`, on any clock.
    #[must_use]
    #[inline(always)]
    pub const fn new(heartbeat: u64, now: u64, length: u64) -> Self {
        Self { heartbeat, since: now, length }
    }

    /// Whether the heartbeat has stood still for the lease's length.
    #[inline(always)]
    pub const fn is_over(&mut self, heartbeat: u64, now: u64) -> bool {
        if heartbeat != self.heartbeat {
            self.heartbeat = heartbeat;
            self.since = now;
            return false;
        }
        now.wrapping_sub(self.since) > self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::vec;
    use std::vec::Vec;

    struct Plain(RefCell<Vec<u64>>);

    impl Plain {
        fn of(layout: &Layout) -> Self {
            Self(RefCell::new(vec![0; layout.words() as usize]))
        }
    }

    impl Words for Plain {
        fn load(&self, word: u32) -> u64 {
            self.0.borrow()[word as usize]
        }
        fn load_pair(&self, word: u32) -> [u64; 2] {
            [self.load(word), self.load(word + 1)]
        }
        fn store(&self, word: u32, value: u64) {
            self.0.borrow_mut()[word as usize] = value;
        }
    }

    const fn descriptor(slot: u16) -> Descriptor {
        let payload = [Payload::Present, Payload::Arriving, Payload::Elsewhere][slot as usize % 3];
        Descriptor { rows: 32, slot, version: 0x3FFF_FFFF, payload }
    }

    #[test]
    fn no_two_things_share_a_word_and_writers_share_no_line() {
        for layout in [Layout::new(1, 1), Layout::new(3, 5), Layout::new(16, 256)] {
            let mut owner = vec![0u32; layout.words() as usize];
            let mut claim = |word: u32, side: u32| {
                assert_eq!(owner[word as usize], 0, "{layout:?}: word {word}");
                owner[word as usize] = side;
            };
            claim(COMMAND, 1);
            claim(HEARTBEAT, 1);
            for consumer in 0..layout.consumers {
                claim(layout.status(consumer), 2);
            }
            for position in 0..u64::from(layout.positions()) {
                let word = layout.descriptor(position);
                assert_eq!(word % 2, 0, "a pair is aligned to 16 bytes");
                claim(word, 1);
                claim(word + 1, 1);
                claim(layout.completion(position), 3);
            }
            for slot in 0..layout.slots {
                claim(layout.addresses(slot), 1);
                claim(layout.addresses(slot) + 1, 1);
            }
            for line in owner.chunks(LINE as usize) {
                let mut sides: Vec<u32> = line.iter().copied().filter(|&side| side > 0).collect();
                sides.dedup();
                assert!(sides.len() <= 1, "{layout:?}: two writers on a line");
            }
        }
    }

    #[test]
    fn a_descriptor_appears_at_its_sequence_and_at_no_other() {
        let layout = Layout::new(2, 4);
        let words = Plain::of(&layout);
        for sequence in 0..40 {
            assert_eq!(poll(&words, &layout, sequence), None);
            publish(&words, &layout, sequence, descriptor(sequence as u16 % 4));
            assert_eq!(poll(&words, &layout, sequence), Some(descriptor(sequence as u16 % 4)));
            assert_eq!(poll(&words, &layout, sequence + 4), None, "the next lap");
            if sequence >= 4 {
                assert_eq!(poll(&words, &layout, sequence - 4), None, "the last lap");
            }
        }
    }

    #[test]
    fn elements_of_all_ones_are_absent_and_are_written_as_another_nan() {
        for other in [0, 1, 0x7FFF, 0x8000, 0xFFFE, 0x0100] {
            for pair in [other << 16 | 0xFFFF, 0xFFFF_0000 | other] {
                assert!(is_absent_in_pair(pair), "{pair:#x}");
            }
            for second in [0, 1, 0x7FFF, 0x8000, 0xFFFE] {
                assert!(!is_absent_in_pair(second << 16 | other), "{second:#x} {other:#x}");
            }
            assert_eq!(arriving(other as u16), other as u16);
        }
        assert!(is_absent_in_pair(u32::MAX));
        assert_eq!(arriving(u16::from_ne_bytes([ABSENT; 2])), 0x7FFF);
    }

    #[test]
    fn half_a_descriptor_is_none() {
        let layout = Layout::new(1, 2);
        let words = Plain::of(&layout);
        let [first, second] = descriptor(1).encode(layout.tag(5));
        words.store(layout.descriptor(5) + 1, second);
        assert_eq!(poll(&words, &layout, 5), None);
        words.store(layout.descriptor(5), first);
        assert_eq!(poll(&words, &layout, 5), Some(descriptor(1)));
    }

    #[test]
    fn tags_survive_the_wrap_of_their_32_bits() {
        let layout = Layout::new(1, 2);
        let words = Plain::of(&layout);
        let last = u64::from(u32::MAX) * 2;
        for sequence in [last - 2, last, last + 2] {
            publish(&words, &layout, sequence, descriptor(0));
            assert_eq!(poll(&words, &layout, sequence), Some(descriptor(0)));
            assert_eq!(poll(&words, &layout, sequence + 2), None);
        }
    }

    #[test]
    fn completion_is_of_a_sequence_and_makes_its_position_vacant() {
        let layout = Layout::new(1, 2);
        let words = Plain::of(&layout);
        assert!(is_vacant(&words, &layout, 0) && is_vacant(&words, &layout, 1));
        assert!(!is_vacant(&words, &layout, 2));
        assert!(!is_complete(&words, &layout, 0));
        complete(&words, &layout, 0);
        assert!(is_complete(&words, &layout, 0) && is_vacant(&words, &layout, 2));
        assert!(!is_complete(&words, &layout, 1) && !is_vacant(&words, &layout, 3));
        assert!(!is_complete(&words, &layout, 2) && !is_vacant(&words, &layout, 4));
        acknowledge(&words, &layout, 2);
        assert!(is_complete(&words, &layout, 2) && is_vacant(&words, &layout, 4));
    }

    #[test]
    fn addresses_are_of_a_slot() {
        let layout = Layout::new(1, 2);
        let words = Plain::of(&layout);
        store_addresses(&words, &layout, 1, [10, 20]);
        store_addresses(&words, &layout, 0, [30, 40]);
        assert_eq!(load_addresses(&words, &layout, 1), [10, 20]);
        assert_eq!(load_addresses(&words, &layout, 0), [30, 40]);
    }

    #[test]
    fn commands_come_back_as_they_were_encoded() {
        for command in [Command::Run, Command::Drain(0), Command::Drain(1 << 50), Command::Stop] {
            assert_eq!(Command::decode(command.encode()), command);
        }
        assert!(Command::Drain(7).ends(7) && !Command::Drain(7).ends(6));
        assert!(Command::Stop.ends(0) && !Command::Run.ends(u64::MAX));
        for status in [Status::Absent, Status::Running, Status::Ended, Status::LeaseExpired] {
            assert_eq!(Status::decode(status as u64), status);
        }
    }

    #[test]
    fn a_lease_ends_when_the_heartbeat_stands_still_for_its_length() {
        let mut lease = Lease::new(0, 1000, 100);
        assert!(!lease.is_over(0, 1100));
        assert!(lease.is_over(0, 1101));
        assert!(!lease.is_over(1, 1101) && !lease.is_over(1, 1201));
        assert!(lease.is_over(1, 1202));
    }
}
