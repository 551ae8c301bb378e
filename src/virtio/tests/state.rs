//! The state of every device: written, read back, and refused where no driver could have made it.

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::VirtIOSocket;
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};
use vmm_sys_util::eventfd::EventFd;

use super::balloon;
use super::block::{Image, block};
use super::driver::{TestHal, TestTransport, ram};
use super::hostile::{BUFFERS, Raw, RawDriver, WRITE, disk};
use super::net::{Driver, cable};
use crate::bus::BusDevice;
use crate::config::{BalloonConfig, BlockConfig, MacAddress, RateLimit, VsockConfig};
use crate::console::{Console, ConsoleSink};
use crate::devices::{LegacyState, Serial};
use crate::disk::DiskError;
use crate::exit::ExitLatch;
use crate::virtio::state::TransportState;
use crate::virtio::{
    Balloon, DeviceHandle, DeviceState, Interrupt, Rng, Served, VirtioDevice, Vsock,
};

fn rng() -> Rng {
    Rng::new(RateLimit::default()).unwrap()
}

pub(super) fn vsock() -> Vsock {
    Vsock::new(&VsockConfig::default(), ExitLatch::default().descriptor().unwrap()).unwrap()
}

/// What a device is after a driver has worked with it, through JSON.
fn through_json(state: &TransportState) -> TransportState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// Pauses a device that was used, restores its state into a new one, and compares.
fn is_the_identity<D: VirtioDevice + 'static>(used: &DeviceHandle<D>, new: D) -> TransportState {
    used.pause();
    let state = used.state();
    let (_transport, restored) = TestTransport::with_handle(new);
    restored.restore(&through_json(&state)).unwrap();
    assert_eq!(restored.state(), state);
    assert!(restored.resume(), "a restored device is paused");
    state
}

fn used_disk() {
    let (transport, block) = TestTransport::with_handle(disk());
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    driver.write_blocks(3, &[7; 1024]).unwrap();
    let state = is_the_identity(&block, disk());
    assert_eq!(state.queues[0].next_used, 1);
}

fn used_entropy() {
    let (transport, rng) = TestTransport::with_handle(rng());
    let mut driver = VirtIORng::<TestHal, _>::new(transport).unwrap();
    driver.request_entropy(&mut [0; 16]).unwrap();
    is_the_identity(&rng, self::rng());
}

fn used_vsock() {
    let (transport, used) = TestTransport::with_handle(vsock());
    let _driver = VirtIOSocket::<TestHal, _>::new(transport).unwrap();
    used.call(|device, _| Ok(device.open(1).unwrap())).unwrap();
    let state = is_the_identity(&used, vsock());
    assert_eq!(state.device, DeviceState::Vsock { last_port: 1 << 30 });
}

fn used_network() {
    let (net, _peer) = cable(None);
    let (transport, handle) = TestTransport::with_handle(net);
    let driver = Driver::new(transport).unwrap();
    let (other, _its_peer) = cable(None);
    let state = is_the_identity(&handle, other);
    let DeviceState::Net { mac, link_up: true } = state.device else { panic!("{state:?}") };
    assert_eq!(mac.0, driver.mac_address(), "the address is the one that the driver knows");
}

fn used_balloon() {
    let new = || Balloon::new(BalloonConfig::default());
    let mut driver = balloon::Driver::new(BalloonConfig::default(), 0b10, &[2]);
    driver.host.reconfigure(|balloon| balloon.set_target(77));
    driver.transport.write_config_space(4, 33u32).unwrap();
    // SAFETY: the buffer is a copy in the test's RAM, by TestHal, and static.
    unsafe { driver.queues[0].add(&[b"\x04\0abcdefgh"], &mut []) }.unwrap();
    driver.transport.notify(2);
    let state = is_the_identity(&driver.host, new());
    let DeviceState::Balloon { num_pages: 77, actual: 33, stats_buffer: Some(0), stats } =
        state.device
    else {
        panic!("{:?}", state.device);
    };
    assert_eq!(stats.unwrap().memfree, Some(u64::from_le_bytes(*b"abcdefgh")));
}

fn used_serial_port() {
    let port = || {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Serial::new(line, ConsoleSink::new(Console::new(0), None))
    };
    let mut used = port();
    used.write(1, &[1]);
    assert!(used.input().feed(&[7; 1000]));
    let state = LegacyState { serial: used.input().state() };
    let text = serde_json::to_string(&state).unwrap();
    let again: LegacyState = serde_json::from_str(&text).unwrap();
    let restored = port().input();
    restored.restore(&again.serial).unwrap();
    assert_eq!(LegacyState { serial: restored.state() }, state);
}

#[test]
fn restore_of_state_is_the_identity_for_every_device() {
    let devices: [fn(); 6] =
        [used_disk, used_entropy, used_vsock, used_network, used_balloon, used_serial_port];
    for device in devices {
        device();
    }
}

#[test]
fn the_disk_of_a_paused_device_is_saved_and_both_go_on() {
    let image = Image::new("saved", 64 * 512);
    let config = BlockConfig::new(&image.0).discard_writes();
    let (transport, used) = TestTransport::with_handle(block(&config));
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    driver.write_blocks(3, &[7; 1024]).unwrap();
    used.pause();
    let path = image.0.with_extension("delta");
    // The device thread may look at the device meanwhile.
    let mut go_on = |_| {
        used.ready(0);
        ControlFlow::Continue(())
    };
    let saved = used.save(&path, None, &mut go_on).unwrap();
    let state = used.state();
    used.resume();
    driver.write_blocks(3, &[8; 512]).unwrap();

    let clone = block(&saved.config(&config, &path, None));
    fs::remove_file(&path).unwrap();
    let (transport, restored) = TestTransport::with_handle(clone);
    restored.restore(&state).unwrap();
    restored.resume();
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    let mut sectors = [0; 1024];
    driver.read_blocks(3, &mut sectors).unwrap();
    assert_eq!(sectors, [7; 1024]);
    used.close();
    assert!(matches!(used.save(&path, None, &mut go_on), Err(DiskError::Over)));
}

/// Requests that a driver rang for, and that the device did not take because it was over its
/// rate, are served by a device that was restored, without another ring.
#[test]
fn requests_that_were_put_back_are_served_after_a_restore() {
    let limit = RateLimit::default().bytes_per_second(1).burst_bytes(1);
    let (transport, used) = TestTransport::with_handle(Rng::new(limit).unwrap());
    let mut driver = RawDriver::over(transport, 0);
    // The first one passes on credit, and leaves a debt of an hour.
    driver.submit(&[Raw(BUFFERS, 4096, WRITE, 0)]);
    assert_eq!(driver.used(), 1);
    driver.submit(&[Raw(BUFFERS, 16, WRITE, 0)]);
    assert_eq!(driver.used(), 1);
    used.pause();
    let state = used.state();

    let (_transport, restored) = TestTransport::with_handle(rng());
    restored.restore(&state).unwrap();
    assert_eq!(restored.serve(0), Served::All);
    assert_eq!(driver.used(), 1, "nothing is served before it goes on");
    assert!(restored.resume(), "its doorbells are rung");
    restored.serve(0);
    assert_eq!(driver.used(), 2);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again_after_a_restore() {
    let (transport, used) = TestTransport::with_handle(rng());
    let mut driver = RawDriver::over(transport, 0);
    driver.submit(&[Raw(BUFFERS, 16, WRITE, 0)]);
    used.pause();
    for acknowledged in [false, true] {
        if acknowledged {
            driver.transport.write(0x64, 1);
        }
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap()));
        let restored = DeviceHandle::new(rng(), &ram(), interrupt).unwrap();
        restored.restore(&used.state()).unwrap();
        restored.resume();
        assert_eq!(line.read().is_err(), acknowledged);
    }
}

#[test]
fn a_clone_may_get_another_address_and_its_driver_is_told() {
    let (net, _peer) = cable(None);
    let (transport, handle) = TestTransport::with_handle(net);
    let _driver = Driver::new(transport).unwrap();
    handle.pause();
    let state = handle.state();

    let mac = MacAddress([2, 9, 9, 9, 9, 9]);
    let (net, _its_peer) = cable(Some(mac));
    let (mut transport, restored) = TestTransport::with_handle(net);
    restored.restore(&state).unwrap();
    assert_eq!(transport.read_config_space::<[u8; 6]>(0), Ok(mac.0));
    assert_eq!(transport.read_config_generation(), state.registers.config_generation + 1);
    assert!(transport.ack_interrupt().contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT));

    // One whose cable is cut finds its link down.
    let (net, its_peer) = cable(None);
    drop(its_peer);
    let (transport, restored) = TestTransport::with_handle(net);
    restored.restore(&state).unwrap();
    restored.resume();
    restored.serve(0);
    assert_eq!(transport.read_config_space::<u16>(6), Ok(0));
}

#[test]
fn features_that_a_driver_only_tried_do_not_make_its_snapshot_useless() {
    let (mut transport, used) = TestTransport::with_handle(rng());
    transport.write_driver_features(u64::MAX);
    used.pause();
    is_the_identity(&used, rng());
    // Nor does one begin that has chosen none, or choose anew when it has begun.
    let (mut transport, used) = TestTransport::with_handle(rng());
    transport
        .set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::DRIVER_OK);
    assert!(!transport.get_status().contains(DeviceStatus::DRIVER_OK));
    transport.write_driver_features(u64::MAX);
    used.pause();
    is_the_identity(&used, rng());
}

#[test]
fn a_balloon_that_no_guest_of_this_size_has_is_refused() {
    let driver = balloon::Driver::new(BalloonConfig::default(), 0b10, &[2]);
    let state = driver.host.state();
    let good = DeviceState::Balloon { num_pages: 0, actual: 0, stats_buffer: None, stats: None };
    assert_eq!(state.device, good);
    for bad in [
        DeviceState::Balloon {
            num_pages: (ram().bytes() >> 12) as u32 + 1,
            actual: 0,
            stats_buffer: None,
            stats: None,
        },
        DeviceState::Balloon { num_pages: 0, actual: 0, stats_buffer: Some(128), stats: None },
    ] {
        let (_transport, restored) =
            TestTransport::with_handle(Balloon::new(BalloonConfig::default()));
        restored.restore(&TransportState { device: bad, ..state.clone() }).unwrap_err();
    }
}

#[test]
fn a_state_of_another_kind_of_device_is_refused() {
    let (_transport, vsock) = TestTransport::with_handle(vsock());
    let state = TransportState { device: DeviceState::Stateless, ..vsock.state() };
    vsock.restore(&state).unwrap_err();
    let (_transport, rng) = TestTransport::with_handle(Rng::new(RateLimit::default()).unwrap());
    let device = DeviceState::Vsock { last_port: 1 };
    rng.restore(&TransportState { device, ..rng.state() }).unwrap_err();
}

#[test]
fn states_that_no_driver_could_have_made_are_refused() {
    let (transport, used) = TestTransport::with_handle(Rng::new(RateLimit::default()).unwrap());
    let _driver = VirtIORng::<TestHal, _>::new(transport).unwrap();
    let good = used.state();
    let changes: [fn(&mut TransportState); 11] = [
        |state| {
            state.device =
                DeviceState::Balloon { num_pages: 0, actual: 0, stats_buffer: None, stats: None }
        },
        |state| state.queues.clear(),
        |state| state.queues.push(state.queues[0]),
        |state| state.queues[0].size = 0,
        |state| state.queues[0].size = 3,
        |state| state.queues[0].size = 512,
        |state| state.queues[0].used_ring = !3,
        |state| state.queues[0].descriptor_table = 1 << 40,
        |state| state.queues[0].available_ring = u64::MAX - 1,
        |state| state.registers.driver_features |= 1 << 60,
        |state| state.registers.driver_features = 0,
    ];
    for change in changes {
        let mut state = good.clone();
        change(&mut state);
        let (_transport, restored) =
            TestTransport::with_handle(Rng::new(RateLimit::default()).unwrap());
        restored.restore(&state).unwrap_err();
    }
}
