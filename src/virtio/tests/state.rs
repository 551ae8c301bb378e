//! The state of every device: written, read back, and refused where no driver could have made it.

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::rng::VirtIORng;

use super::driver::{TestHal, TestTransport};
use super::hostile::disk;
use super::net::{Driver, cable};
use crate::virtio::state::{DeviceState, TransportState};
use crate::virtio::{DeviceHandle, Rng, VirtioDevice};

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

    let (transport, rng) = TestTransport::with_handle(Rng::new().unwrap());
    let mut driver = VirtIORng::<TestHal, _>::new(transport).unwrap();
    driver.request_entropy(&mut [0; 16]).unwrap();
    is_the_identity(&rng, Rng::new().unwrap());

    let (net, _peer) = cable(None);
    let (transport, handle) = TestTransport::with_handle(net);
    let driver = Driver::new(transport).unwrap();
    let (other, _its_peer) = cable(None);
    let state = is_the_identity(&handle, other);
    let DeviceState::Net { mac, link_up: true } = state.device else { panic!("{state:?}") };
    assert_eq!(mac.0, driver.mac_address(), "the address is the one that the driver knows");

    let (transport, rng) = TestTransport::with_handle(Rng::new().unwrap());
    rng.restore(&TransportState { device: state.device, ..rng.state() }).unwrap_err();
    drop(transport);
}

#[test]
fn states_that_no_driver_could_have_made_are_refused() {
    let (transport, used) = TestTransport::with_handle(Rng::new().unwrap());
    let _driver = VirtIORng::<TestHal, _>::new(transport).unwrap();
    let good = used.state();
    let changes: [fn(&mut TransportState); 7] = [
        |state| state.queues.clear(),
        |state| state.queues.push(state.queues[0]),
        |state| state.queues[0].size = 3,
        |state| state.queues[0].size = 512,
        |state| state.queues[0].used_ring = u64::MAX & !3,
        |state| state.queues[0].descriptor_table = 1 << 40,
        |state| state.registers.driver_features |= 1 << 60,
    ];
    for change in changes {
        let mut state = good.clone();
        change(&mut state);
        let (_transport, restored) = TestTransport::with_handle(Rng::new().unwrap());
        restored.restore(&state).unwrap_err();
    }
}
