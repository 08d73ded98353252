//! The ring's protocol under every interleaving that the memory model allows, by loom: what host
//! and device run, over loom's atomics, with payloads whose unsynchronised access loom reports.

use kasmina_kernels::persistent::protocol::{
    self, ABSENT, COMMAND, Command, Descriptor, Layout, Payload, Words,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// The words that the model uses; a full layout would only cost time.
struct Model {
    words: Vec<AtomicU64>,
    counter: AtomicU64,
    inputs: Vec<UnsafeCell<u64>>,
    outputs: Vec<UnsafeCell<u64>>,
    in_band: Vec<AtomicU64>,
}

const ABSENT_VALUE: u64 = u64::from_ne_bytes([ABSENT; 8]);

// SAFETY: the cells are accessed under the protocol's rules, which is what loom checks.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Words for Model {
    fn load(&self, word: u32) -> u64 {
        self.words[word as usize].load(Ordering::Acquire)
    }
    fn load_pair(&self, word: u32) -> [u64; 2] {
        [self.load(word), self.load(word + 1)]
    }
    fn store(&self, word: u32, value: u64) {
        self.words[word as usize].store(value, Ordering::Release);
    }
    fn store_alone(&self, word: u32, value: u64) {
        self.words[word as usize].store(value, Ordering::Relaxed);
    }
}

impl Model {
    fn new(layout: &Layout) -> Self {
        let cells = || (0..layout.slots).map(|_| UnsafeCell::new(0)).collect();
        Self {
            words: (0..layout.words()).map(|_| AtomicU64::new(0)).collect(),
            counter: AtomicU64::new(0),
            inputs: cells(),
            outputs: cells(),
            in_band: (0..layout.slots).map(|_| AtomicU64::new(ABSENT_VALUE)).collect(),
        }
    }

    fn submit(&self, layout: &Layout, sequence: u64, slot: u16, value: u64) {
        // SAFETY: the slot is the producer's until the descriptor is published.
        self.inputs[usize::from(slot)].with_mut(|input| unsafe { *input = value });
        let descriptor = Descriptor { rows: 1, slot, version: 0, payload: Payload::Present };
        protocol::publish(self, layout, sequence, descriptor);
    }

    fn await_descriptor(&self, layout: &Layout, sequence: u64) -> Descriptor {
        loop {
            if let Some(descriptor) = protocol::poll(self, layout, sequence) {
                return descriptor;
            }
            thread::yield_now();
        }
    }

    /// As a kernel's results in pinned memory come: they say themselves that they are there.
    fn result_in_band(&self, slot: u16) -> u64 {
        let own = &self.in_band[usize::from(slot)];
        loop {
            let value = own.load(Ordering::Relaxed);
            if value != ABSENT_VALUE {
                own.store(ABSENT_VALUE, Ordering::Relaxed);
                return value;
            }
            thread::yield_now();
        }
    }

    fn result(&self, layout: &Layout, sequence: u64, slot: u16) -> u64 {
        while !protocol::is_complete(self, layout, sequence) {
            thread::yield_now();
        }
        // SAFETY: the unit has completed, so the slot is the producer's again.
        self.outputs[usize::from(slot)].with(|output| unsafe { *output })
    }

    /// A consumer's life, as `persistent/device.rs` has it.
    fn consume(&self, layout: &Layout) -> u64 {
        let mut done = 0;
        loop {
            let sequence = self.counter.fetch_add(1, Ordering::Relaxed);
            let descriptor = loop {
                if let Some(descriptor) = protocol::poll(self, layout, sequence) {
                    break descriptor;
                }
                if Command::decode(self.load(COMMAND)).ends(sequence) {
                    return done;
                }
                thread::yield_now();
            };
            let slot = usize::from(descriptor.slot);
            // SAFETY: from the descriptor to the completion the slot is the consumer's.
            let input = self.inputs[slot].with(|input| unsafe { *input });
            // SAFETY: as above.
            self.outputs[slot].with_mut(|output| unsafe { *output = input * 10 });
            protocol::complete(self, layout, sequence);
            done += 1;
        }
    }
}

fn bounded(preemptions: usize) -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder
}

#[test]
fn one_consumer_answers_each_unit_with_its_own_payload() {
    bounded(3).check(|| {
        let layout = Layout::new(1, 1);
        let model = Arc::new(Model::new(&layout));
        let consumer = {
            let model = Arc::clone(&model);
            thread::spawn(move || model.consume(&layout))
        };
        // The second lap takes the same position and the same slot.
        for sequence in 0..2 {
            model.submit(&layout, sequence, 0, sequence + 1);
            assert_eq!(model.result(&layout, sequence, 0), (sequence + 1) * 10);
        }
        model.store(COMMAND, Command::Drain(2).encode());
        assert_eq!(consumer.join().unwrap(), 2);
    });
}

#[test]
fn two_consumers_share_units_and_each_is_done_once() {
    bounded(2).check(|| {
        let layout = Layout::new(2, 2);
        let model = Arc::new(Model::new(&layout));
        // Slots in another order than positions. All is submitted before: loom gives up on two
        // threads that wait in turns; waiting is the matter of the test above.
        model.submit(&layout, 0, 1, 1);
        model.submit(&layout, 1, 0, 2);
        model.store(COMMAND, Command::Drain(2).encode());
        let consumers = [(); 2].map(|()| {
            let model = Arc::clone(&model);
            thread::spawn(move || model.consume(&layout))
        });
        let done: u64 = consumers.map(|consumer| consumer.join().unwrap()).into_iter().sum();
        assert_eq!(done, 2);
        assert_eq!([model.result(&layout, 0, 1), model.result(&layout, 1, 0)], [10, 20]);
    });
}

#[test]
fn a_stopped_consumer_leaves_what_it_has_not_taken() {
    bounded(3).check(|| {
        let layout = Layout::new(1, 1);
        let model = Arc::new(Model::new(&layout));
        let consumer = {
            let model = Arc::clone(&model);
            thread::spawn(move || model.consume(&layout))
        };
        model.submit(&layout, 0, 0, 5);
        model.store(COMMAND, Command::Stop.encode());
        let done = consumer.join().unwrap();
        assert!(done <= 1);
        assert_eq!(protocol::is_complete(&*model, &layout, 0), done == 1);
    });
}

#[test]
fn results_that_say_themselves_that_they_are_there_are_of_their_unit() {
    bounded(3).check(|| {
        // Two slots and two positions, so that the third unit waits for a position and takes a slot
        // that was used before.
        let layout = Layout::new(1, 2);
        let model = Arc::new(Model::new(&layout));
        let consumer = {
            let model = Arc::clone(&model);
            thread::spawn(move || {
                for sequence in 0..3 {
                    let descriptor = model.await_descriptor(&layout, sequence);
                    // The payload of such a unit is its number here: an input's own race is not
                    // what this test is about.
                    let slot = usize::from(descriptor.slot);
                    let value = u64::from(descriptor.version) * 10;
                    model.in_band[slot].store(value, Ordering::Relaxed);
                    protocol::acknowledge(&*model, &layout, sequence);
                }
            })
        };
        for (sequence, slot) in [(0, 1), (1, 0), (2, 1)] {
            while !protocol::is_vacant(&*model, &layout, sequence) {
                thread::yield_now();
            }
            let version = sequence as u32 + 1;
            let descriptor = Descriptor { rows: 1, slot, version, payload: Payload::Present };
            protocol::publish(&*model, &layout, sequence, descriptor);
            assert_eq!(model.result_in_band(slot), u64::from(version) * 10);
        }
        consumer.join().unwrap();
    });
}

#[test]
fn payloads_that_arrive_behind_their_descriptor_are_of_their_unit() {
    bounded(3).check(|| {
        let layout = Layout::new(1, 1);
        let model = Arc::new(Arriving::new(1));
        let consumer = {
            let model = Arc::clone(&model);
            thread::spawn(move || {
                for sequence in 0..2 {
                    let descriptor = model.ring.await_descriptor(&layout, sequence);
                    let input = model.input_in_band(descriptor.slot);
                    model.answer(&layout, sequence, descriptor.slot, input);
                }
            })
        };
        // The second lap takes the slot that the first one's payload was cleared from.
        for sequence in 0..2 {
            model.submit(&layout, sequence, 0, sequence + 1);
            assert_eq!(model.result(0), (sequence + 1) * 10);
        }
        consumer.join().unwrap();
    });
}

#[test]
fn what_comes_to_an_express_slot_after_nothing_was_there_is_of_its_unit() {
    bounded(3).check(|| {
        let layout = Layout::new(1, 2).with_express(2);
        let model = Arc::new(Arriving::new(2));
        let consumer = {
            let model = Arc::clone(&model);
            thread::spawn(move || {
                for sequence in 0..3 {
                    let slot = layout.express_slot(sequence) as u16;
                    let mut was_absent = false;
                    let (descriptor, early) = loop {
                        let value = model.inputs[usize::from(slot)].load(Ordering::Relaxed);
                        let found = was_absent && value != ABSENT_VALUE;
                        was_absent |= value == ABSENT_VALUE;
                        if let Some(descriptor) = protocol::poll(&model.ring, &layout, sequence) {
                            break (descriptor, found.then_some(value));
                        }
                        thread::yield_now();
                    };
                    let input = early.unwrap_or_else(|| model.input_in_band(descriptor.slot));
                    model.answer(&layout, sequence, descriptor.slot, input);
                }
            })
        };
        // The third takes the slot of the first.
        for sequence in 0..3 {
            let slot = layout.express_slot(sequence) as u16;
            model.submit(&layout, sequence, slot, sequence + 1);
            assert_eq!(model.result(slot), (sequence + 1) * 10);
        }
        consumer.join().unwrap();
    });
}

/// A ring whose payloads and results both say themselves that they are there.
struct Arriving {
    ring: Model,
    inputs: Vec<AtomicU64>,
}

impl Arriving {
    fn new(slots: u32) -> Self {
        // Of the ring, only words and results are used.
        let ring = Model::new(&Layout::new(1, 2).with_express(2));
        Self { ring, inputs: (0..slots).map(|_| AtomicU64::new(ABSENT_VALUE)).collect() }
    }

    fn submit(&self, layout: &Layout, sequence: u64, slot: u16, value: u64) {
        while !protocol::is_vacant(&self.ring, layout, sequence) {
            thread::yield_now();
        }
        let descriptor = Descriptor { rows: 1, slot, version: 0, payload: Payload::Arriving };
        protocol::publish(&self.ring, layout, sequence, descriptor);
        self.inputs[usize::from(slot)].store(value, Ordering::Relaxed);
    }

    /// The result of the unit in the slot, which is left clear.
    fn result(&self, slot: u16) -> u64 {
        let value = self.ring.result_in_band(slot);
        self.inputs[usize::from(slot)].store(ABSENT_VALUE, Ordering::Relaxed);
        value
    }

    fn input_in_band(&self, slot: u16) -> u64 {
        loop {
            let value = self.inputs[usize::from(slot)].load(Ordering::Relaxed);
            if value != ABSENT_VALUE {
                return value;
            }
            thread::yield_now();
        }
    }

    fn answer(&self, layout: &Layout, sequence: u64, slot: u16, input: u64) {
        self.ring.in_band[usize::from(slot)].store(input * 10, Ordering::Relaxed);
        protocol::acknowledge(&self.ring, layout, sequence);
    }
}
