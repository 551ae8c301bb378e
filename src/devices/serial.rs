//! A 16550 serial port, the guest's console.
//!
//! Source: National Semiconductor PC16550D data sheet. The registers are vm-superio's; what is
//! added is an input queue that is larger than the port's 64 bytes, and that is fed by any
//! thread at any time without waiting for the guest, or for a console writer that blocks.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use super::state::{LegacyError, SerialState};
use crate::bus::BusDevice;
use crate::console::ConsoleSink;

/// Input that waits for the guest to read it: 64 KiB.
const MAX_INPUT_BYTES: usize = 64 << 10;
/// Input that is in the port: as much as a 16550 of vm-superio takes.
const MAX_FIFO_BYTES: usize = 64;
/// In the interrupt identification register: there is none.
const NO_INTERRUPT: u8 = 1;

/// The register that tells why the port raised its interrupt, and its values.
const INTERRUPT_IDENTIFICATION: u64 = 2;
const CAUSE: u8 = 0x0f;
const RECEIVED_DATA: u8 = 4;
/// In the line status: there is data. In the interrupt enable: data raises the interrupt.
const DATA_READY: u8 = 1;

/// The interrupt line of a device: an eventfd that KVM listens to.
#[derive(Clone)]
struct InterruptLine(Arc<EventFd>);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = vm_superio::Serial<InterruptLine, NoEvents, ConsoleSink>;

struct Port {
    uart: Mutex<Uart>,
    input: Mutex<VecDeque<u8>>,
}

impl Port {
    /// Moves input to the UART while both have room.
    ///
    /// Nobody waits for the UART here. Whoever finds it locked leaves the input to the holder,
    /// and every holder comes here again after it let go, so no input is left behind.
    fn pump(&self) {
        while !self.lock_input().is_empty() {
            let mut uart = match self.uart.try_lock() {
                Ok(uart) => uart,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            let mut input = self.lock_input();
            if input.is_empty() {
                // Somebody else moved it. Both locks are let go of before the next look, so that
                // what is fed between is not left with us.
                continue;
            }
            let room = uart.fifo_capacity().min(input.len());
            let chunk: Vec<u8> = input.iter().copied().take(room).collect();
            match uart.enqueue_raw_bytes(&chunk) {
                // The port is full, or in loopback mode: the guest's next access comes here.
                Ok(0) | Err(vm_superio::serial::Error::FullFifo) => return,
                // An interrupt that fails has left the bytes in the port.
                _ => drop(input.drain(..chunk.len())),
            }
        }
    }

    fn lock_input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The serial port as the guest sees it.
pub(crate) struct Serial {
    port: Arc<Port>,
}

impl Serial {
    /// A port that raises `interrupt` and writes to `console`.
    pub(crate) fn new(interrupt: EventFd, console: ConsoleSink) -> Self {
        let uart = Uart::new(InterruptLine(Arc::new(interrupt)), console);
        Self { port: Arc::new(Port { uart: Mutex::new(uart), input: Mutex::default() }) }
    }

    /// The end of the line that the host types into.
    pub(crate) fn input(&self) -> SerialInput {
        SerialInput { port: Arc::clone(&self.port) }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            let mut uart = self.port.lock_uart();
            *byte = uart.read(offset as u8);
            if offset == INTERRUPT_IDENTIFICATION && *byte & CAUSE == NO_INTERRUPT {
                // The UART forgets the cause when it is read. It has to stay while there is data:
                // Linux takes 256 bytes at most, and asks again.
                let state = uart.state();
                if state.interrupt_enable & state.line_status & DATA_READY != 0 {
                    *byte = *byte & !CAUSE | RECEIVED_DATA;
                }
            }
            drop(uart);
            self.port.pump();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // Neither a writer that fails nor an interrupt that cannot be raised is the guest's
            // business: it goes on as with a cable that nobody listens to.
            let _ = self.port.lock_uart().write(offset as u8, *byte);
            self.port.pump();
        }
    }
}

/// Feeds the serial port.
#[derive(Clone)]
pub(crate) struct SerialInput {
    port: Arc<Port>,
}

impl SerialInput {
    /// Queues all of `bytes` for the guest, or, where they do not fit, none. Never waits.
    pub(crate) fn feed(&self, bytes: &[u8]) -> bool {
        let mut input = self.port.lock_input();
        if input.len() + bytes.len() > MAX_INPUT_BYTES {
            return false;
        }
        input.extend(bytes);
        drop(input);
        self.port.pump();
        true
    }

    /// All that a snapshot keeps of the port, while no vCPU runs. Input that is fed meanwhile is
    /// in it whole or not at all. Waits for a console writer that blocks.
    pub(crate) fn state(&self) -> SerialState {
        // In the order of `pump`, which moves bytes from one to the other.
        let uart = self.port.lock_uart();
        let input = self.port.lock_input();
        SerialState::new(uart.state(), input.iter().copied().collect())
    }

    /// Goes on from a state; input that was fed before comes after that of the state. A pending
    /// interrupt is raised with [`wake`](Self::wake), once the interrupt controllers are there.
    pub(crate) fn restore(&self, state: &SerialState) -> Result<(), LegacyError> {
        for (bytes, max) in [(&state.fifo, MAX_FIFO_BYTES), (&state.input, MAX_INPUT_BYTES)] {
            if bytes.len() > max {
                return Err(LegacyError::Input { found: bytes.len(), max });
            }
        }
        let mut uart = self.port.lock_uart();
        let line = uart.interrupt_evt().clone();
        let console = uart.writer().clone();
        let restored = Uart::from_state(&state.uart(), line, NoEvents, console);
        *uart = restored.map_err(|error| match error {
            vm_superio::serial::Error::Trigger(error)
            | vm_superio::serial::Error::IOError(error) => LegacyError::Interrupt(error),
            vm_superio::serial::Error::FullFifo => {
                LegacyError::Input { found: state.fifo.len(), max: MAX_FIFO_BYTES }
            }
        })?;
        let mut input = self.port.lock_input();
        for byte in state.input.iter().rev() {
            input.push_front(*byte);
        }
        Ok(())
    }

    /// Raises the interrupt again that the guest has not taken yet, for one that was lost with the
    /// line's edge, and moves input on. Where the guest has seen it, it sees a spurious one.
    pub(crate) fn wake(&self) {
        let uart = self.port.lock_uart();
        if uart.state().interrupt_identification & NO_INTERRUPT == 0 {
            // A counter that is full has been raised often enough.
            let _ = uart.interrupt_evt().trigger();
        }
        drop(uart);
        self.port.pump();
    }
}

impl std::fmt::Debug for SerialInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialInput")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Console;
    use std::io::Write;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const SCRATCH: u64 = 7;
    const LINE_STATUS: u64 = 5;

    fn serial(console: Console) -> Serial {
        serial_to(ConsoleSink::new(console, None))
    }

    fn serial_to(sink: ConsoleSink) -> Serial {
        Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), sink)
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0xff];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_goes_to_the_console() {
        let console = Console::new(100);
        let mut serial = serial(console.clone());
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(console.tail(), "hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let mut serial = serial(Console::new(0));
        let text: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        assert!(serial.input().feed(&text));
        let mut got = Vec::new();
        while read(&mut serial, LINE_STATUS) & DATA_READY != 0 {
            got.push(read(&mut serial, DATA));
        }
        assert_eq!(got, text);
    }

    /// As Linux does: it reads while there is data, 256 bytes at most, and comes back only while
    /// the port says why it should.
    #[test]
    fn the_cause_of_an_interrupt_stays_until_all_data_is_read() {
        let mut serial = serial(Console::new(0));
        assert_eq!(read(&mut serial, INTERRUPT_IDENTIFICATION) & CAUSE, NO_INTERRUPT);
        let text: Vec<u8> = (0..300u32).map(|n| n as u8).collect();
        assert!(serial.input().feed(&text));
        // The driver wants no interrupt yet.
        assert_eq!(read(&mut serial, INTERRUPT_IDENTIFICATION) & CAUSE, NO_INTERRUPT);
        serial.write(INTERRUPT_ENABLE, &[DATA_READY]);
        let mut got = Vec::new();
        while read(&mut serial, INTERRUPT_IDENTIFICATION) & CAUSE == RECEIVED_DATA {
            for _ in 0..256 {
                if read(&mut serial, LINE_STATUS) & DATA_READY == 0 {
                    break;
                }
                got.push(read(&mut serial, DATA));
            }
        }
        assert_eq!(got, text);
    }

    #[test]
    fn a_guest_that_reads_nothing_is_refused_input_not_waited_for() {
        let serial = serial(Console::new(0));
        let input = serial.input();
        assert!(input.feed(&[b'x'; MAX_INPUT_BYTES]));
        assert!(!input.feed(&[b'y'; MAX_INPUT_BYTES]));
    }

    #[test]
    fn a_console_writer_may_answer_the_guest() {
        struct Answer(Arc<Mutex<Option<SerialInput>>>);
        impl Write for Answer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let input = self.0.lock().unwrap().clone();
                assert!(input.unwrap().feed(b"!"));
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let slot = Arc::new(Mutex::new(None));
        let writer = Arc::new(Mutex::new(Answer(slot.clone())));
        let mut serial = serial_to(ConsoleSink::new(Console::new(0), Some(writer)));
        *slot.lock().unwrap() = Some(serial.input());
        serial.write(DATA, b"?");
        assert_eq!(read(&mut serial, DATA), b'!');
    }

    /// A port whose driver wants an interrupt for input, with more of that than the FIFO takes.
    fn used() -> (Serial, EventFd) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let sink = ConsoleSink::new(Console::new(100), None);
        let mut serial = Serial::new(line.try_clone().unwrap(), sink);
        serial.write(INTERRUPT_ENABLE, &[1]);
        serial.write(SCRATCH, &[0x5a]);
        assert!(serial.input().feed(&[b'a'; 100]));
        (serial, line)
    }

    #[test]
    fn restore_of_state_is_the_identity_and_loses_no_input_and_no_interrupt() {
        let (mut before, _line) = used();
        assert_eq!(read(&mut before, DATA), b'a');
        let state = before.input().state();
        let text = serde_json::to_string(&state).unwrap();

        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let console = Console::new(100);
        let sink = ConsoleSink::new(console.clone(), None);
        let mut after = Serial::new(line.try_clone().unwrap(), sink);
        after.input().restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(after.input().state(), state);

        let _ = line.read();
        after.input().wake();
        assert_eq!(line.read().unwrap(), 1, "input is pending");
        assert_eq!(read(&mut after, SCRATCH), 0x5a);
        let mut got = 0;
        while read(&mut after, LINE_STATUS) & DATA_READY != 0 {
            assert_eq!(read(&mut after, DATA), b'a');
            got += 1;
        }
        assert_eq!(got, 99);
        after.write(DATA, b"!");
        assert_eq!(console.tail(), "!", "it writes to its own console");
    }

    #[test]
    fn a_port_at_rest_wakes_without_an_interrupt() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let sink = ConsoleSink::new(Console::new(0), None);
        let serial = Serial::new(line.try_clone().unwrap(), sink);
        serial.input().restore(&serial.input().state()).unwrap();
        serial.input().wake();
        line.read().expect_err("nothing is pending");
    }

    #[test]
    fn states_with_more_input_than_there_is_room_for_are_refused() {
        let serial = serial(Console::new(0));
        let good = serial.input().state();
        let long = SerialState { input: vec![0; MAX_INPUT_BYTES + 1], ..good.clone() };
        serial.input().restore(&long).unwrap_err();
        let full = SerialState { fifo: vec![0; MAX_FIFO_BYTES + 1], ..good.clone() };
        serial.input().restore(&full).unwrap_err();
        assert_eq!(serial.input().state(), good, "a state that is refused changes nothing");
    }

    #[test]
    fn accesses_of_odd_sizes_do_nothing() {
        let console = Console::new(100);
        let mut serial = serial(console.clone());
        serial.write(DATA, b"ab");
        serial.write(DATA, b"");
        let mut wide = [0xff; 4];
        serial.read(DATA, &mut wide);
        assert_eq!(wide, [0xff; 4]);
        assert_eq!(console.tail(), "");
    }
}
