//! A port at which connections wait before anybody listens, and between two who do.

use std::io::Read;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::error::ErrorKind;
use crate::exit::ExitStatus;
use crate::virtio::Backlog;
use crate::vsock::VsockListener;

struct Kept {
    guest: RawGuest,
    vsock: Vsock,
    exit: Arc<ExitLatch>,
    backlog: Arc<Backlog>,
    _handle: DeviceHandle<virtio::Vsock>,
}

impl Kept {
    /// A device with a port 9 that is kept for two connections.
    fn new() -> Self {
        let exit = Arc::new(ExitLatch::default());
        let config = VsockConfig::default();
        let mut device = virtio::Vsock::new(&config, exit.descriptor().unwrap()).unwrap();
        let backlog = device.keep(9, 2).unwrap();
        let (transport, handle) = TestTransport::with_handle(device);
        let vsock = Vsock::new(handle.downgrade(), Arc::clone(&exit), Console::new(0));
        Self { guest: RawGuest::new(transport), vsock, exit, backlog, _handle: handle }
    }

    fn listener(&self) -> VsockListener {
        VsockListener::kept(Arc::clone(&self.backlog), 9, self.vsock.clone())
    }
}

fn is_readable(listener: &VsockListener) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&now)).unwrap() == 1
}

#[test]
fn connections_wait_for_the_first_who_listens_and_for_the_next() {
    let mut kept = Kept::new();
    kept.guest.connect(1, 9);
    kept.guest.send(&Packet::data(1, 9, b"early"));
    assert_eq!(kept.vsock.listen(9).unwrap_err().kind(), &ErrorKind::PortInUse);

    let listener = kept.listener();
    assert!(is_readable(&listener));
    let mut stream = listener.try_accept().unwrap().unwrap();
    let mut text = [0; 5];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"early");
    assert!(!is_readable(&listener));
    assert!(listener.try_accept().unwrap().is_none());

    drop(listener);
    kept.guest.connect(2, 9);
    let listener = kept.listener();
    assert!(listener.try_accept().unwrap().is_some());
    assert_eq!(kept.vsock.listen(9).unwrap_err().kind(), &ErrorKind::PortInUse);
}

#[test]
fn no_more_wait_than_there_is_room_for() {
    let mut kept = Kept::new();
    kept.guest.connect(1, 9);
    kept.guest.connect(2, 9);
    kept.guest.send(&Packet::of_guest(3, 9, REQUEST));
    kept.guest.expect(RST);
}

#[test]
fn what_was_said_before_the_end_can_be_read_after_it() {
    let mut kept = Kept::new();
    kept.guest.connect(1, 9);
    kept.guest.send(&Packet::data(1, 9, b"why"));
    kept.exit.report(ExitStatus::PoweredOff);
    kept.vsock.close();
    let listener = kept.listener();
    assert!(is_readable(&listener));
    let mut text = String::new();
    listener.try_accept().unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "why");
    assert!(is_readable(&listener), "the end is to be seen as well");
    let error = listener.try_accept().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff));
}
