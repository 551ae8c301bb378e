//! The state of every device: written, read back, and refused where no driver could have made it.

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::VirtIOSocket;
use virtio_drivers::transport::Transport;

use super::balloon;
use super::driver::{TestHal, TestTransport};
use super::hostile::disk;
use super::net::{Driver, cable};
use crate::config::{BalloonConfig, RateLimit, VsockConfig};
use crate::exit::ExitLatch;
use crate::virtio::state::TransportState;
use crate::virtio::{Balloon, DeviceHandle, DeviceState, Rng, VirtioDevice, Vsock};

fn vsock() -> Vsock {
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
    state
}

#[test]
fn restore_of_state_is_the_identity_for_every_device() {
    let (transport, block) = TestTransport::with_handle(disk());
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    driver.write_blocks(3, &[7; 1024]).unwrap();
    let state = is_the_identity(&block, disk());
    assert_eq!(state.queues[0].next_used, 1);

    let (transport, rng) = TestTransport::with_handle(Rng::new(RateLimit::default()).unwrap());
    let mut driver = VirtIORng::<TestHal, _>::new(transport).unwrap();
    driver.request_entropy(&mut [0; 16]).unwrap();
    is_the_identity(&rng, Rng::new(RateLimit::default()).unwrap());

    let (transport, used) = TestTransport::with_handle(vsock());
    let _driver = VirtIOSocket::<TestHal, _>::new(transport).unwrap();
    used.call(|device, _| Ok(device.open(1).unwrap())).unwrap();
    let state = is_the_identity(&used, vsock());
    assert_eq!(state.device, DeviceState::Vsock { last_port: 1 << 30 });

    let (net, _peer) = cable(None);
    let (transport, handle) = TestTransport::with_handle(net);
    let driver = Driver::new(transport).unwrap();
    let (other, _its_peer) = cable(None);
    let state = is_the_identity(&handle, other);
    let DeviceState::Net { mac, link_up: true } = state.device else { panic!("{state:?}") };
    assert_eq!(mac.0, driver.mac_address(), "the address is the one that the driver knows");

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
    let changes: [fn(&mut TransportState); 8] = [
        |state| {
            state.device =
                DeviceState::Balloon { num_pages: 0, actual: 0, stats_buffer: None, stats: None }
        },
        |state| state.queues.clear(),
        |state| state.queues.push(state.queues[0]),
        |state| state.queues[0].size = 3,
        |state| state.queues[0].size = 512,
        |state| state.queues[0].used_ring = !3,
        |state| state.queues[0].descriptor_table = 1 << 40,
        |state| state.registers.driver_features |= 1 << 60,
    ];
    for change in changes {
        let mut state = good.clone();
        change(&mut state);
        let (_transport, restored) =
            TestTransport::with_handle(Rng::new(RateLimit::default()).unwrap());
        restored.restore(&state).unwrap_err();
    }
}
