//! Lifecycle, ends, leaks and limits, with bare-metal guests: any /dev/kvm will do.

#[cfg(feature = "agent")]
mod agent;
mod bad_input;
mod blocking;
mod crash;
mod doorbells;
mod golden;
mod guest;
mod hostile;
mod lifecycle;
mod limits;
mod memory;
mod network;
mod overrides;
mod pool;
mod prepared;
mod process;
mod rate_limits;
mod resources;
mod saving;
mod scratch;
mod seccomp;
#[cfg(feature = "session")]
mod session;
mod sleeper;
mod snapshot;
mod tracer;
#[allow(dead_code, reason = "benchmarks use more of it")]
mod virtio_guest;
mod vsock;
#[allow(dead_code, reason = "benchmarks use more of it")]
mod vsock_guest;
mod whole;

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use dormouse::{Created, Kernel, MicroVm, VmConfig};
use guest::Program;

/// Long enough for a busy machine; only a test that fails waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A small VM with this guest.
pub fn config(program: &Program) -> VmConfig {
    VmConfig::new(Kernel::bytes(guest::elf(program))).memory_mib(32)
}

/// A VM with this guest, and its console output as it comes.
pub fn create(program: &Program) -> (MicroVm<Created>, Output) {
    let (writer, output) = output();
    let vm = MicroVm::create(config(program).console(writer)).expect("a payload guest");
    (vm, output)
}

/// What a guest writes, byte for byte.
pub struct Output(Receiver<u8>);

/// The writing end of an [`Output`].
pub struct Writer(Sender<u8>);

pub fn output() -> (Writer, Output) {
    let (sender, receiver) = channel();
    (Writer(sender), Output(receiver))
}

impl Output {
    /// The next byte, waiting for it.
    pub fn next(&self) -> u8 {
        self.0.recv_timeout(PATIENCE).expect("the guest writes")
    }

    /// What has come so far, without waiting.
    pub fn so_far(&self) -> Vec<u8> {
        self.0.try_iter().collect()
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            // A test that has seen enough does not listen any more.
            let _ = self.0.send(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
