//! The network device over taps, in a network namespace that each test makes for itself.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use virtio_drivers::transport::Transport;
use vm_memory::GuestAddress;

use super::driver::{TestTransport, ram};
use super::hostile::{BUFFERS, Raw, RawDriver, WRITE};
use super::net::{Driver, HEADER, MAC, counters, frame, give, take, until};
use crate::config::NetConfig;
use crate::error::{Error, ErrorKind};
use crate::tap::Tap;
use crate::virtio::{Backend, Net};

/// An ethertype for experiments (IEEE 802): nothing else in the namespace sends it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `test`, the test of this name, in a new process with a network of its own, where this
/// user has all rights.
fn in_a_network_of_its_own(name: &str, test: impl FnOnce()) {
    const MARK: &str = "DORMOUSE_TEST_NAMESPACE";
    if std::env::var_os(MARK).is_some() {
        return test();
    }
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net"]);
        command
    };
    if !unshare().arg("true").status().is_ok_and(|status| status.success())
        || std::fs::File::options().write(true).open("/dev/net/tun").is_err()
    {
        eprintln!("not tested: this machine has no namespaces or no taps for this user");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let output = unshare()
        .arg(program)
        .args(["--exact", &format!("virtio::tests::tap::{name}"), "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

fn checked(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: three integers; the new descriptor is nobody else's.
    unsafe { OwnedFd::from_raw_fd(checked(libc::socket(family, kind, protocol))) }
}

/// The number of an interface, 0 where there is none.
fn index(name: &str) -> libc::c_uint {
    let name = CString::new(name).unwrap();
    // SAFETY: a string that lives as long as the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn set_up(name: &str, up: bool) {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    // SAFETY: all-zero is an ifreq, which the request takes.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = if up { libc::IFF_UP as libc::c_short } else { 0 };
        checked(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request));
    }
}

/// Removes an interface (RTM_DELLINK).
fn delete(name: &str) {
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // family, type
    message.extend(index(name).to_ne_bytes());
    message.extend([0; 8]); // flags, change
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    // SAFETY: the message is borrowed for the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    assert_eq!(sent, 32);
    assert_eq!(index(name), 0);
}

/// The host's side of an interface: what passes there.
struct Wire(OwnedFd);

impl Wire {
    fn new(name: &str) -> Self {
        let protocol = u16::from_ne_bytes(ETHERTYPE);
        let wire = socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
        // SAFETY: all-zero is an address of no interface; its length is given.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = index(name) as libc::c_int;
            let len = size_of_val(&address) as libc::socklen_t;
            checked(libc::bind(wire.as_raw_fd(), (&raw const address).cast(), len));
        }
        Self(wire)
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the frame is borrowed for the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }

    fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 1 << 16];
        // SAFETY: the buffer is borrowed for the call.
        let len =
            unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        frame.truncate(usize::try_from(len).unwrap());
        frame
    }
}

/// A frame of ours, to everybody.
fn marked(number: usize, len: usize) -> Vec<u8> {
    let mut frame = frame(number, len);
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&MAC.0);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame
}

fn is_marked(packet: &[u8]) -> bool {
    packet.get(HEADER + 12..HEADER + 14) == Some(&ETHERTYPE)
}

fn net(tap: Tap) -> Net {
    Net::new(Backend::Tap(tap), &NetConfig::tap("").mac(MAC.0)).unwrap()
}

#[test]
fn frames_pass_a_tap_whole_both_ways() {
    in_a_network_of_its_own("frames_pass_a_tap_whole_both_ways", || {
        let net = net(Tap::open("dm0").unwrap());
        set_up("dm0", true);
        let wire = Wire::new("dm0");
        let (transport, handle) = TestTransport::with_handle(net);
        let mut driver = Driver::new(transport).unwrap();
        let mut buffer = vec![0; 2048];
        let sizes = (14..80).chain((80..1500).step_by(13)).chain(1500..=1514);
        for (number, len) in sizes.enumerate() {
            let frame = marked(number, len);
            driver.send(&frame).unwrap();
            let mut received = wire.receive();
            while received[12..14] != ETHERTYPE {
                received = wire.receive();
            }
            assert_eq!(received, frame);
            wire.send(&frame);
            let packet = loop {
                let token = give(&mut driver, &mut buffer);
                let packet = take(&mut driver, token, &mut buffer);
                if is_marked(&packet) {
                    break packet;
                }
            };
            assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(packet[HEADER..], frame);
        }
        assert_eq!(counters(&handle).tx_dropped, 0);
        assert_ne!(index("dm0"), 0);
        drop(driver);
        drop(handle);
        assert_eq!(index("dm0"), 0, "a tap that we made stays");
    });
}

#[test]
fn a_driver_with_room_for_usual_frames_alone_gets_them() {
    const MRG_RXBUF: u64 = 1 << 15;
    in_a_network_of_its_own("a_driver_with_room_for_usual_frames_alone_gets_them", || {
        let net = net(Tap::open("dm0").unwrap());
        set_up("dm0", true);
        let wire = Wire::new("dm0");
        let (transport, handle) = TestTransport::with_handle(net);
        let mut driver = RawDriver::over(transport.with_features(MRG_RXBUF), 0);
        let buffers: Vec<_> =
            (0..16).map(|place| Raw(BUFFERS + place * 2048, 2048, WRITE, 0)).collect();
        driver.write_descriptors(&buffers);
        (0..16).for_each(|head| driver.offer(head));
        driver.transport.write(0x50, 0);
        // It gives none back before it has several.
        (0..8).for_each(|number| wire.send(&marked(number, 1514)));
        until("the frames come", || counters(&handle).rx_frames >= 8);
    });
}

#[test]
fn a_tap_that_goes_down_comes_back_and_is_removed_takes_the_link_with_it() {
    in_a_network_of_its_own(
        "a_tap_that_goes_down_comes_back_and_is_removed_takes_the_link_with_it",
        || {
            // Its own messages would show, too, that the tap is up.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            let net = net(Tap::open("dm0").unwrap());
            let (transport, handle) = TestTransport::with_handle(net);
            let mut driver = Driver::new(transport).unwrap();
            let changes = |count| {
                until("the link is as it was", || counters(&handle).link_changes == count);
            };
            driver.send(&marked(0, 100)).unwrap();
            assert_eq!(counters(&handle).tx_dropped, 1, "nobody has set the tap up");
            for round in 0..3 {
                set_up("dm0", true);
                changes(2 * round + 1);
                let wire = Wire::new("dm0");
                driver.send(&marked(1, 100)).unwrap();
                assert_eq!(wire.receive(), marked(1, 100));
                set_up("dm0", false);
                driver.send(&marked(2, 100)).unwrap();
                changes(2 * round + 2);
                // A driver whose link is down may send no more.
                if round > 0 {
                    driver.send(&marked(3, 100)).unwrap();
                }
            }
            set_up("dm0", true);
            changes(7);
            delete("dm0");
            changes(8);
            for number in 0..100 {
                driver.send(&marked(number, 100)).unwrap();
            }
            let metrics = counters(&handle);
            assert_eq!((metrics.tx_frames, metrics.tx_dropped), (3, 106));
        },
    );
}

/// Whether the kernel leaves checksums of frames to the tap's reader (ETHTOOL_GTXCSUM).
fn leaves_checksums(name: &str) -> bool {
    const ETHTOOL_GTXCSUM: u32 = 0x16;
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    let mut value = [ETHTOOL_GTXCSUM, 0];
    // SAFETY: all-zero is an ifreq; the request writes to `value`, which is an ethtool_value.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        checked(libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::c_ulong, &request));
    }
    value[1] != 0
}

#[test]
fn a_restored_interface_has_its_offloads_on_another_tap() {
    in_a_network_of_its_own("a_restored_interface_has_its_offloads_on_another_tap", || {
        const F_GUEST_CSUM: u64 = 1 << 1;
        let first = net(Tap::open("dm0").unwrap());
        set_up("dm0", true);
        let (transport, used) = TestTransport::with_handle(first);
        let mut driver = RawDriver::over(transport.with_features(F_GUEST_CSUM), 1);
        assert!(leaves_checksums("dm0"));
        used.pause();
        let state = used.state();

        // The new tap is down when the state comes, and up when the guest goes on.
        let (transport, restored) = TestTransport::with_handle(net(Tap::open("dm1").unwrap()));
        assert!(!leaves_checksums("dm1"));
        restored.restore(&state).unwrap();
        assert!(leaves_checksums("dm1"));
        assert_eq!(transport.read_config_space::<u16>(6), Ok(0), "the link is down");
        driver.transport = transport;
        set_up("dm1", true);
        restored.resume();
        let wire = Wire::new("dm1");
        ram().write(&[0; 12], GuestAddress(BUFFERS)).unwrap();
        ram().write(&marked(7, 1000), GuestAddress(BUFFERS + 12)).unwrap();
        driver.submit(&[Raw(BUFFERS, 1012, 0, 0)]);
        assert_eq!(wire.receive(), marked(7, 1000));
        assert_eq!(driver.transport.read_config_space::<u16>(6), Ok(1), "the link is up");
    });
}

#[test]
fn headers_of_nonsense_are_refused_and_harm_nobody() {
    in_a_network_of_its_own("headers_of_nonsense_are_refused_and_harm_nobody", || {
        let tap = Tap::open("dm0").unwrap();
        set_up("dm0", true);
        let net = net(tap);
        let wire = Wire::new("dm0");
        let (transport, handle) = TestTransport::with_handle(net);
        let mut driver = RawDriver::over(transport, 1);
        let mut header = |header: [u8; 12]| {
            ram().write(&header, GuestAddress(BUFFERS)).unwrap();
            ram().write(&marked(7, 1000), GuestAddress(BUFFERS + 12)).unwrap();
            let used = driver.used();
            driver.submit(&[Raw(BUFFERS, 1012, 0, 0)]);
            assert_eq!(driver.used(), used + 1);
            assert!(!driver.needs_reset());
        };
        let bad = [
            [0, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // no such segmentation
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],    // segments of nothing
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], // a checksum outside
            [1, 4, 0xff, 0xff, 1, 0, 0xe0, 3, 0xff, 0xff, 0, 0], // all of it
            [0xff; 12],
        ];
        for nonsense in bad {
            header(nonsense);
        }
        assert_eq!(counters(&handle).tx_dropped, bad.len() as u64);
        header([0; 12]);
        assert_eq!(wire.receive(), marked(7, 1000));
        assert_eq!(counters(&handle).link_changes, 0);
    });
}

#[test]
fn a_tap_that_stays_is_kept_and_one_in_use_is_refused() {
    in_a_network_of_its_own("a_tap_that_stays_is_kept_and_one_in_use_is_refused", || {
        let tap = Tap::open("dm0").unwrap();
        let error = Error::from(Tap::open("dm0").unwrap_err());
        assert_eq!(error.kind(), &ErrorKind::Network);
        assert!(error.to_string().contains("a tap of its own"), "{error}");
        let error = Error::from(Tap::open("lo").unwrap_err());
        assert!(error.to_string().contains("no tap"), "{error}");
        let fd = tap.try_clone().unwrap();
        // SAFETY: TUNSETPERSIST takes an integer.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, 1) });
        drop((tap, fd));
        let tap = Tap::open("dm0").unwrap();
        // Another descriptor of the same tap does as well.
        drop(Tap::from_fd(tap.try_clone().unwrap()).unwrap());
        drop(tap);
        assert_ne!(index("dm0"), 0);
    });
}

#[test]
fn names_and_descriptors_that_are_no_tap_are_refused() {
    for name in ["", ".", "..", "a b", "a/b", "a:b", "tap%d", "sixteen-bytes-xx", "a\0b"] {
        let error = Error::from(Tap::open(name).unwrap_err());
        assert_eq!(error.kind(), &ErrorKind::Config, "{name:?}: {error}");
    }
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = Error::from(Tap::from_fd(file.into()).unwrap_err());
    assert_eq!(error.kind(), &ErrorKind::Network);
    assert!(error.to_string().contains("IFF_VNET_HDR"), "{error}");
}
