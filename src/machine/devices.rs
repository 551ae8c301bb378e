//! The devices of a machine: made as the configuration says, put on the bus, their interrupts
//! and doorbells connected.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use crate::arch::layout;
use crate::bus::{Bus, BusDevice, BusError, SharedDevice};
use crate::config::MachineConfig;
use crate::console::ConsoleSink;
use crate::devices::{I8042, Power, Pvpanic, Serial, SerialInput};
use crate::error::Error;
use crate::event_loop::{Answered, Doorbells, Watch};
use crate::exit::ExitLatch;
use crate::kvm::Vm;
use crate::virtio::{
    Block, DeviceCore, Interrupt, MmioTransport, QUEUE_NOTIFY, Rng, Served, VirtioDevice,
};

/// The devices on their bus, and what the machine keeps of them.
pub(super) struct Devices {
    pub(super) bus: Bus,
    pub(super) serial_input: SerialInput,
    /// The virtio devices, in the order in which the guest finds them.
    pub(super) virtio: Vec<VirtioSlot>,
}

impl Devices {
    pub(super) fn new(
        config: &MachineConfig,
        vm: &Vm,
        exit: &Arc<ExitLatch>,
        console: ConsoleSink,
    ) -> Result<Self, Error> {
        let mut bus = Bus::default();
        let serial_input = legacy(&mut bus, vm, exit, console)?;
        let mut slots = Vec::new();
        for (id, device) in (0..).zip(virtio(config)?) {
            slots.push(connect(&mut bus, vm, id, device)?);
        }
        Ok(Self { bus, serial_input, virtio: slots })
    }
}

/// The serial port, and the ways to end the machine.
fn legacy(
    bus: &mut Bus,
    vm: &Vm,
    exit: &Arc<ExitLatch>,
    console: ConsoleSink,
) -> Result<SerialInput, Error> {
    let mut ports = |start: u16, count: u8, device: SharedDevice| -> Result<(), BusError> {
        bus.pio.insert(start.into(), count.into(), device)
    };
    let interrupt = event_fd()?;
    vm.register_irqfd(&interrupt, layout::SERIAL_IRQ)?;
    let serial = Serial::new(interrupt, console);
    let serial_input = serial.input();
    ports(layout::SERIAL_PORT, layout::SERIAL_PORT_COUNT, shared(serial))?;

    let i8042 = I8042::new(Arc::clone(exit));
    ports(layout::I8042_PORT, layout::I8042_PORT_COUNT, shared(i8042))?;
    ports(layout::PVPANIC_PORT, 1, shared(Pvpanic::new(Arc::clone(exit))))?;
    ports(layout::POWER_PORT, layout::POWER_PORT_COUNT, shared(Power::new(Arc::clone(exit))))?;
    Ok(serial_input)
}

/// The virtio devices of a configuration, in the order in which the guest finds them.
fn virtio(config: &MachineConfig) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for block in &config.blocks {
        let failed = |source| MachineError::Disk { path: block.path.clone(), source };
        let file = File::options().read(true).write(!block.read_only).open(&block.path);
        let disk = file.and_then(|file| Block::new(file, block.read_only, &block.id));
        devices.push(Box::new(disk.map_err(failed)?));
    }
    if config.entropy {
        devices.push(Box::new(Rng::new().map_err(MachineError::Entropy)?));
    }
    Ok(devices)
}

/// Puts a virtio device on the bus, and its doorbells into the device thread's care.
fn connect(
    bus: &mut Bus,
    vm: &Vm,
    id: u32,
    device: Box<dyn VirtioDevice>,
) -> Result<VirtioSlot, Error> {
    let line = event_fd()?;
    vm.register_irqfd(&line, layout::virtio_irq(id))?;
    let transport = MmioTransport::new(device, vm.ram(), Arc::new(Interrupt::new(line)))
        .map_err(MachineError::Queue)?;
    let core = Arc::clone(transport.core());

    let (address, len) = layout::virtio_registers(id);
    let mut events = Vec::new();
    let mut doorbells = Vec::new();
    for queue in 0..transport.queue_count() {
        let event = event_fd()?;
        vm.register_doorbell(&event, address + QUEUE_NOTIFY, queue)?;
        doorbells.push(event.try_clone().map_err(MachineError::EventFd)?);
        events.push(event);
    }
    bus.mmio.insert(address, len, shared(transport))?;

    let served = Arc::clone(&core);
    let answer = Box::new(move |queue| {
        match served.lock().unwrap_or_else(PoisonError::into_inner).serve(queue) {
            Served::All => Answered::Done,
            Served::Some => Answered::Again,
        }
    });
    let watch = Watch::new(Doorbells { events, answer })?;
    Ok(VirtioSlot { _watch: watch, core, doorbells })
}

/// A virtio device in its place: answered by the device thread until it is dropped.
#[derive(Debug)]
pub(super) struct VirtioSlot {
    _watch: Watch,
    core: Arc<Mutex<DeviceCore>>,
    doorbells: Vec<EventFd>,
}

impl VirtioSlot {
    /// Returns when the device is at no request, and will take none.
    pub(super) fn pause(&self) {
        self.lock().pause();
    }

    /// Lets the device go on, first with what came meanwhile.
    pub(super) fn resume(&self) {
        if self.lock().resume() {
            for doorbell in &self.doorbells {
                // A counter that is full rings as well.
                let _ = doorbell.write(1);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, DeviceCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn event_fd() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::EventFd)
}

fn shared<T: BusDevice + 'static>(device: T) -> SharedDevice {
    Arc::new(Mutex::new(device))
}
