//! The devices of a machine: made as the configuration says, put on the bus, their interrupts
//! and doorbells connected.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, disk_io};
use crate::arch::layout;
use crate::bus::{Bus, BusDevice, BusError, SharedDevice};
use crate::config::{BlockConfig, ConfigError, MachineConfig, NetBackend, NetConfig};
use crate::console::ConsoleSink;
use crate::devices::{I8042, Power, Pvpanic, Serial, SerialInput, VmGenId};
use crate::disk::Disk;
use crate::error::Error;
use crate::event_loop::{Answered, Subscription, Wake, Watch};
use crate::exit::ExitLatch;
use crate::kvm::Vm;
use crate::memory::FileIo;
use crate::metrics::DeviceMetrics;
use crate::tap::{Tap, TapError};
use crate::virtio::{
    self, Backend, Backlog, Balloon, Block, DeviceHandle, Interrupt, MmioTransport, Net,
    QUEUE_NOTIFY, RestoreError, Rng, Served, Stream, TransportState, VirtioDevice,
};
use crate::vsock::{BACKLOG, Vsock};

/// The devices on their bus, and what the machine keeps of them.
pub(super) struct Devices {
    pub(super) bus: Bus,
    pub(super) serial_input: SerialInput,
    pub(super) generation: VmGenId,
    /// The virtio devices, in the order in which the guest finds them.
    pub(super) virtio: Vec<VirtioSlot>,
    pub(super) vsock: Option<Vsock>,
    /// Connections of the guest's agent.
    pub(super) agent_calls: Option<Arc<Backlog>>,
    pub(super) controls: Controls,
}

/// The devices that the host has something to say to.
#[derive(Debug, Default)]
pub(crate) struct Controls {
    /// In the order of the configuration.
    pub(crate) disks: Vec<DeviceHandle<Block>>,
    /// In the order of the configuration.
    pub(crate) networks: Vec<DeviceHandle<Net>>,
    pub(crate) entropy: Option<DeviceHandle<Rng>>,
    pub(crate) balloon: Option<DeviceHandle<Balloon>>,
}

impl Devices {
    pub(super) fn new(
        config: &MachineConfig,
        vm: &Vm,
        exit: &Arc<ExitLatch>,
        console: ConsoleSink,
    ) -> Result<Self, Error> {
        let mut bus = Bus::default();
        let said = console.console();
        let serial_input = legacy(&mut bus, vm, exit, console)?;
        let event = event_fd()?;
        vm.register_irqfd(&event, layout::EVENT_IRQ)?;
        let generation = VmGenId::new(vm.ram(), event);
        let mut virtio = Assembly { bus: &mut bus, vm, slots: Vec::new() };
        let mut controls = Controls::default();
        for block in &config.blocks {
            controls.disks.push(virtio.add(disk(block)?)?);
        }
        for network in &config.networks {
            controls.networks.push(virtio.add(interface(network)?)?);
        }
        if config.entropy {
            let rng = Rng::new(config.entropy_rate_limit).map_err(MachineError::Entropy)?;
            controls.entropy = Some(virtio.add(rng)?);
        }
        if let Some(balloon) = config.balloon {
            controls.balloon = Some(virtio.add(Balloon::new(balloon))?);
        }
        let (mut vsock, mut agent_calls) = (None, None);
        if let Some(vsock_config) = &config.vsock() {
            let ended = exit.descriptor().map_err(MachineError::EventFd)?;
            let mut device = virtio::Vsock::new(vsock_config, ended).map_err(|source| {
                MachineError::Vsock { path: vsock_config.unix_socket.clone(), source }
            })?;
            if let Some(port) = config.agent_port() {
                // From before the guest's first instruction on: its agent is never refused.
                let backlog = device.keep(port, BACKLOG).map_err(MachineError::EventFd)?;
                agent_calls = Some(backlog);
            }
            let device = virtio.add(device)?.downgrade();
            vsock = Some(Vsock::new(device, Arc::clone(exit), said));
        }
        let slots = virtio.slots;
        Ok(Self { bus, serial_input, generation, virtio: slots, vsock, agent_calls, controls })
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

fn disk(config: &BlockConfig) -> Result<Block, Error> {
    let disk = Disk::open(config)?;
    let io = FileIo::new(&disk_io::queue()?).map_err(MachineError::EventFd)?;
    Ok(Block::new(disk, io, config).map_err(MachineError::EventFd)?)
}

fn interface(config: &NetConfig) -> Result<Net, Error> {
    let backend = match &config.backend {
        NetBackend::Tap(name) => Backend::Tap(Tap::open(name)?),
        NetBackend::TapFd(fd) => {
            let fd = fd.try_clone().map_err(TapError::Clone)?;
            Backend::Tap(Tap::from_fd(fd)?)
        }
        NetBackend::Missing => return Err(ConfigError::NoBackend.into()),
        NetBackend::User(network) => Backend::passt(network, config.mtu)?,
        NetBackend::Socket(cable) => {
            Backend::Stream(Stream::on(cable).map_err(MachineError::Socket)?)
        }
    };
    Ok(Net::new(backend, config).map_err(MachineError::Entropy)?)
}

/// The virtio devices so far, in the order in which the guest finds them.
struct Assembly<'a> {
    bus: &'a mut Bus,
    vm: &'a Vm,
    slots: Vec<VirtioSlot>,
}

impl Assembly<'_> {
    /// Puts a virtio device on the bus, and what wakes it into the device thread's care.
    fn add<D: VirtioDevice + 'static>(&mut self, device: D) -> Result<DeviceHandle<D>, Error> {
        let id = self.slots.len() as u32;
        let line = event_fd()?;
        self.vm.register_irqfd(&line, layout::virtio_irq(id))?;
        let sources = device.sources().map_err(MachineError::EventFd)?;
        let handle = DeviceHandle::new(device, self.vm.ram(), Arc::new(Interrupt::new(line)))
            .map_err(MachineError::Queue)?;

        let (address, len) = layout::virtio_registers(id);
        let mut watched = Vec::new();
        let mut doorbells = Vec::new();
        for queue in 0..handle.queue_count() {
            let doorbell = event_fd()?;
            self.vm.register_doorbell(&doorbell, address + QUEUE_NOTIFY, queue)?;
            watched.push(doorbell.try_clone().map_err(MachineError::EventFd)?);
            doorbells.push(doorbell);
        }
        let device = handle.erase();
        self.bus.mmio.insert(address, len, shared(MmioTransport::new(device.clone())))?;
        let answer = answer(device.clone());
        let watch = Watch::new(Subscription::new(watched, sources, answer))?;
        self.slots.push(VirtioSlot { watch: Some(watch), device, doorbells });
        Ok(handle)
    }
}

/// What the device thread does for a device. One that panics, which is a fault of ours, stops,
/// and takes nothing with it.
fn answer(device: DeviceHandle) -> Box<dyn FnMut(Wake) -> Answered + Send> {
    Box::new(move |wake| {
        let served = catch_unwind(AssertUnwindSafe(|| match wake {
            Wake::Doorbell(queue) => device.serve(queue),
            Wake::Source(source) => device.ready(source),
        }));
        match served {
            Ok(Served::All) => Answered::Done,
            Ok(Served::Some) => Answered::Again,
            Err(_) => {
                device.stop();
                Answered::Done
            }
        }
    })
}

/// A virtio device in its place: answered by the device thread until it is dropped, which closes
/// what it has of the host.
#[derive(Debug)]
pub(super) struct VirtioSlot {
    watch: Option<Watch>,
    device: DeviceHandle,
    doorbells: Vec<EventFd>,
}

impl Drop for VirtioSlot {
    fn drop(&mut self) {
        self.close();
    }
}

impl VirtioSlot {
    /// Returns when the device is at no request, and will take none.
    pub(super) fn pause(&self) {
        self.device.pause();
    }

    /// The VM is over: takes no request any more, and gives up those that have not begun.
    pub(super) fn give_up(&self) {
        self.device.give_up();
    }

    /// Returns when it is at no request, or it is too late.
    pub(super) fn drain(&self, until: Instant) {
        self.device.drain(until);
    }

    /// Lets go of what the device has of the host, which may take a while: no thread of others waits for that.
    pub(super) fn close(&mut self) {
        self.watch = None;
        self.device.close();
    }

    /// What a snapshot keeps of the device, which is paused.
    pub(super) fn state(&self) -> TransportState {
        self.device.state()
    }

    /// Goes on from a state, and is paused.
    pub(super) fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        self.device.restore(state)
    }

    /// What the device has done.
    pub(super) fn metrics(&self) -> DeviceMetrics {
        self.device.metrics()
    }

    /// Lets the device go on, first with what came meanwhile.
    pub(super) fn resume(&self) {
        if self.device.resume() {
            for doorbell in &self.doorbells {
                // A counter that is full rings as well.
                let _ = doorbell.write(1);
            }
        }
    }
}

fn event_fd() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::EventFd)
}

fn shared<T: BusDevice + 'static>(device: T) -> SharedDevice {
    Arc::new(Mutex::new(device))
}
