//! A driver that keeps to the rules, as a model: whatever it and a device do in whatever order, each
//! request is answered once, as it was made, and nobody waits for a notification that never comes.
//! They take turns, but for requests that the driver adds in the middle of the device's.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::queue::{Answer, Queues, Served, VirtQueue};
use crate::virtio::state::QueueState;
use crate::virtio::{Interrupt, QueueError};

const MAX_SIZE: u16 = 32768;

/// Where things are in RAM.
const TABLE: u64 = 0;
const AVAIL: u64 = 0x10_0000;
const USED: u64 = 0x20_0000;
/// For each descriptor, an indirect table of four.
const INDIRECT: u64 = 0x30_0000;
/// For each descriptor, 16 bytes to read and 16 bytes to write.
const BUFFERS: u64 = 0x60_0000;
const RAM_BYTES: usize = 0x100_0000;

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes requests available: of two to four buffers each, or as indirect tables.
    Add { count: u8, buffers: u8, indirect: bool },
    /// The driver takes what is used, and waits for an interrupt after that.
    Doze,
    /// The device gets its turn if a doorbell rang, and does this with the requests.
    Serve(Vec<u8>),
    /// A request that is done elsewhere is done.
    Complete(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..40u8, 2..=4u8, any::<bool>()).prop_map(|(count, buffers, indirect)| Step::Add {
            count,
            buffers,
            indirect
        }),
        Just(Step::Doze),
        vec(0..8u8, 0..20).prop_map(Step::Serve),
        any::<u8>().prop_map(Step::Complete),
    ]
}

/// A request as the driver made it.
#[derive(Clone, Debug)]
struct Request {
    number: u64,
    descriptors: Vec<u16>,
    buffers: u8,
}

struct Driver {
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    pending: BTreeMap<u16, Request>,
    made: u64,
    answered: u64,
    available: u16,
    taken: u16,
    dozes: bool,
}

struct Model {
    driver: Driver,
    queue: VirtQueue,
    doorbell: bool,
    in_flight: Vec<(u16, u32)>,
}

impl Driver {
    /// A driver, and the queue that it shares with a device.
    fn new(power: u8, event_idx: bool, first: u16) -> (Self, VirtQueue) {
        let (ram, size) = (GuestRam::fresh(&[(GuestAddress(0), RAM_BYTES)]), 1u16 << power);
        let (ram, line) = (Arc::new(ram.unwrap()), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let interrupt = Arc::new(Interrupt::new(line));
        let mut queue = VirtQueue::new(MAX_SIZE, Arc::clone(&interrupt)).unwrap();
        // As after so many requests: the indices wrap around at 65,536.
        let state = QueueState {
            size,
            ready: true,
            event_idx,
            next_avail: first,
            next_used: first,
            descriptor_table: TABLE,
            available_ring: AVAIL,
            used_ring: USED,
        };
        assert!(queue.restore(&state, &ram));
        let driver = Self {
            ram,
            interrupt,
            size,
            event_idx,
            free: (0..size.min(64)).collect(),
            pending: BTreeMap::new(),
            made: 0,
            answered: 0,
            available: first,
            taken: first,
            dozes: false,
        };
        driver.put(AVAIL + 2, first);
        driver.put(USED + 2, first);
        driver.put(driver.used_event(), first);
        driver.put(driver.avail_event(), first);
        (driver, queue)
    }

    fn put(&self, address: u64, value: u16) {
        self.ram.write(&value.to_le_bytes(), GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64) -> u16 {
        self.ram.inner().read_obj(GuestAddress(address)).unwrap()
    }

    fn used_event(&self) -> u64 {
        AVAIL + 4 + u64::from(self.size) * 2
    }

    fn avail_event(&self) -> u64 {
        USED + 4 + u64::from(self.size) * 8
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write(&bytes, GuestAddress(at)).unwrap();
    }

    /// Requests whose first buffer is read and whose others are written, as far as there are
    /// descriptors. Whether the device wants the doorbell.
    fn add(&mut self, count: u8, buffers: u8, indirect: bool) -> bool {
        let old = self.available;
        // No chain is longer than the queue, with an indirect table neither (§2.7.5.3.1).
        let buffers = u16::from(buffers).min(self.size) as u8;
        for _ in 0..count {
            let needed = if indirect { 1 } else { buffers };
            if self.free.len() < needed.into() {
                break;
            }
            let descriptors = self.free.split_off(self.free.len() - usize::from(needed));
            let head = descriptors[0];
            let buffer = BUFFERS + u64::from(head) * 0x40;
            for at in 0..buffers {
                let last = at + 1 == buffers;
                let flags = u16::from(!last) | if at == 0 { 0 } else { 2 };
                let (address, len) = match at {
                    0 => (buffer, 8),
                    at => (buffer + 0x10 + u64::from(at) * 8, 8),
                };
                if indirect {
                    let place = INDIRECT + u64::from(head) * 64 + u64::from(at) * 16;
                    self.descriptor(place, address, len, flags, u16::from(at) + 1);
                } else {
                    let next = descriptors.get(usize::from(at) + 1).copied().unwrap_or(0);
                    let place = TABLE + u64::from(descriptors[usize::from(at)]) * 16;
                    self.descriptor(place, address, len, flags, next);
                }
            }
            if indirect {
                let table = INDIRECT + u64::from(head) * 64;
                self.descriptor(u64::from(head) * 16, table, u32::from(buffers) * 16, 4, 0);
            }
            self.ram.write(&self.made.to_le_bytes(), GuestAddress(buffer)).unwrap();
            self.ram.write(&[0; 0x20], GuestAddress(buffer + 0x10)).unwrap();
            self.put(AVAIL + 4 + u64::from(self.available % self.size) * 2, head);
            self.available = self.available.wrapping_add(1);
            let request = Request { number: self.made, descriptors, buffers };
            assert!(self.pending.insert(head, request).is_none());
            self.made += 1;
        }
        if self.available == old {
            return false;
        }
        self.put(AVAIL + 2, self.available);
        match self.event_idx {
            // vring_need_event (§2.7.7.2).
            true => {
                let event = self.get(self.avail_event());
                let new = self.available;
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            false => self.get(USED) & 1 == 0,
        }
    }

    /// Takes all that is used; each is a request that was made, and done as it was asked.
    fn take(&mut self) {
        while self.taken != self.get(USED + 2) {
            let element = USED + 4 + u64::from(self.taken % self.size) * 8;
            let head: u32 = self.ram.inner().read_obj(GuestAddress(element)).unwrap();
            let len: u32 = self.ram.inner().read_obj(GuestAddress(element + 4)).unwrap();
            let head = u16::try_from(head).unwrap();
            let request = self.pending.remove(&head).expect("a request that is not answered yet");
            let writable = 8 * (u32::from(request.buffers) - 1);
            assert_eq!(len, writable);
            let at = GuestAddress(BUFFERS + u64::from(head) * 0x40 + 0x18);
            let answer = self.ram.inner().read_obj::<u64>(at).unwrap();
            assert_eq!(answer, if writable == 0 { 0 } else { !request.number });
            self.free.extend(request.descriptors);
            self.taken = self.taken.wrapping_add(1);
            self.answered += 1;
        }
    }

    /// Sleeps until the next interrupt, after a last look (§2.7.14).
    fn doze(&mut self) {
        self.interrupt.acknowledge(u32::MAX);
        loop {
            self.take();
            self.put(self.used_event(), self.taken);
            if self.taken == self.get(USED + 2) {
                break;
            }
        }
        self.dozes = true;
    }

    /// A driver that sleeps was told of everything that is used.
    fn wake_if_told(&mut self) {
        if !self.dozes {
            return;
        }
        if self.interrupt.status() & 1 != 0 {
            self.dozes = false;
        } else {
            assert_eq!(self.taken, self.get(USED + 2), "the driver sleeps, and was not told");
        }
    }
}

impl Model {
    fn new(power: u8, event_idx: bool, first: u16) -> Self {
        let (driver, queue) = Driver::new(power, event_idx, first);
        Self { driver, queue, doorbell: false, in_flight: Vec::new() }
    }

    fn add(&mut self, count: u8, buffers: u8, indirect: bool) {
        self.doorbell |= self.driver.add(count, buffers, indirect);
    }

    /// The device's turn: what the doorbell asked for, by a script of what becomes of requests.
    fn serve(&mut self, script: &[u8]) -> Result<(), QueueError> {
        if !std::mem::take(&mut self.doorbell) {
            return Ok(());
        }
        let ram = Arc::clone(&self.driver.ram);
        let list = std::slice::from_mut(&mut self.queue);
        let mut script = script.iter();
        let (mut put_back, mut rung) = (false, false);
        let served = Queues::new(&ram, list).serve(0, |chain| {
            let (action, written) = (script.next(), chain.writable.len() as u32);
            if action == Some(&0) {
                put_back = true;
                return Answer::PutBack;
            }
            // The driver does not wait for the device's turn to end.
            if matches!(action, Some(1 | 5)) {
                rung |= self.driver.add(3, 2, true);
            }
            let mut number = [0; 8];
            assert_eq!(chain.readable.copy_to(&mut number), 8);
            assert_eq!(chain.readable.len(), 8);
            let answer = (!u64::from_le_bytes(number)).to_le_bytes();
            assert_eq!(chain.writable.copy_from(&answer), answer.len().min(written as usize));
            match action {
                Some(1..=3) => {
                    self.in_flight.push((chain.head, written));
                    Answer::InFlight
                }
                _ => Answer::Used(written),
            }
        })?;
        // A device that was asked to come again does; one that put a request back does so when it
        // can go on.
        self.doorbell = served == Served::Some || put_back || rung;
        if !self.doorbell {
            let next = self.queue.state().next_avail;
            assert_eq!(next, self.driver.available, "the device sleeps with requests before it");
        }
        Ok(())
    }

    fn complete(&mut self, which: u8) -> Result<(), QueueError> {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let which = usize::from(which) % self.in_flight.len();
        let (head, written) = self.in_flight.swap_remove(which);
        self.queue.add_used(&self.driver.ram, head, written)?;
        self.queue.signal(&self.driver.ram)
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add { count, buffers, indirect } => self.add(*count, *buffers, *indirect),
            Step::Doze => self.driver.doze(),
            Step::Serve(script) => self.serve(script).unwrap(),
            Step::Complete(which) => self.complete(*which).unwrap(),
        }
        self.driver.wake_if_told();
    }

    /// Lets the device do the rest: then everything is answered, and the driver knows.
    fn finish(mut self) {
        self.driver.doze();
        while self.doorbell {
            self.serve(&[]).unwrap();
            self.driver.wake_if_told();
        }
        while !self.in_flight.is_empty() {
            self.complete(0).unwrap();
            self.driver.wake_if_told();
        }
        self.driver.take();
        assert_eq!((self.driver.answered, self.driver.pending.len()), (self.driver.made, 0));
    }
}

proptest! {
    #[test]
    fn driver_and_device_agree_whatever_they_do_and_neither_waits_for_ever(
        power in 0..=15u8,
        event_idx: bool,
        first in prop_oneof![Just(0), 0xff00..=u16::MAX, any::<u16>()],
        steps in vec(step(), 0..120),
    ) {
        let mut model = Model::new(power, event_idx, first);
        for step in &steps {
            model.step(step);
        }
        model.finish();
    }
}

#[test]
fn more_requests_than_one_turn_takes_are_served_in_the_next_turns() {
    for event_idx in [false, true] {
        let mut model = Model::new(10, event_idx, 65_500);
        model.driver.free = (0..1000).collect();
        model.driver.doze();
        for _ in 0..25 {
            model.add(40, 2, true);
        }
        assert_eq!(model.driver.made, 1000);
        model.finish();
    }
}
