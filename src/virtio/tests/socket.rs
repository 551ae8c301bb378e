//! A socket that one device has after another, as that of a VM that slept.

use std::io::Write;
use std::time::Duration;

use super::driver::TestTransport;
use super::net::{Driver, HEADER, Peer, counters, frame, give, take, until};
use crate::config::{NetBackend, NetConfig};
use crate::virtio::{Backend, Net, Stream};

#[test]
fn who_has_a_socket_next_goes_on_in_the_middle_of_a_frame() {
    let (near, far) = NetConfig::pair().unwrap();
    let (NetBackend::Socket(near), NetBackend::Socket(far)) = (near.backend, far.backend) else {
        panic!("no sockets")
    };
    let mut peer = Peer(far.socket.try_clone().unwrap());
    let begin = || {
        let stream = Stream::on(&near).unwrap();
        let net = Net::new(Backend::Stream(stream), &NetConfig::tap("")).unwrap();
        let (transport, handle) = TestTransport::with_handle(net);
        (Driver::new(transport).unwrap(), handle)
    };
    let mut buffer = vec![0; 2048];
    // A frame, and half of another.
    let (mut driver, handle) = begin();
    let framed = |number| [&1000u32.to_be_bytes()[..], &frame(number, 1000)].concat();
    let both = [framed(1), framed(2)].concat();
    peer.0.write_all(&both[..1500]).unwrap();
    let token = give(&mut driver, &mut buffer);
    assert_eq!(take(&mut driver, token, &mut buffer)[HEADER..], frame(1, 1000));
    // And in the other direction more than the socket takes at once.
    let packets: Vec<_> =
        (0..20).map(|number| [&[0; HEADER][..], &frame(number, 60_000)].concat()).collect();
    for packet in &packets {
        // SAFETY: the packets outlive the device, which is closed below.
        unsafe { driver.transmit_begin(packet).unwrap() };
    }
    until("nothing is sent", || counters(&handle).tx_frames > 0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(counters(&handle).tx_frames < 20);
    handle.close();
    drop((driver, handle));

    let (mut driver, handle) = begin();
    peer.0.write_all(&both[1500..]).unwrap();
    peer.send(&frame(3, 500));
    for (number, len) in [(2, 1000), (3, 500)] {
        let token = give(&mut driver, &mut buffer);
        assert_eq!(take(&mut driver, token, &mut buffer)[HEADER..], frame(number, len));
    }
    let reading = std::thread::spawn(move || {
        // Each is one that was sent, and the one that was cut is whole.
        for number in 0.. {
            let got = peer.receive();
            if got == frame(99, 300) {
                return number;
            }
            assert!(got == frame(number, 60_000), "{number}");
        }
        unreachable!("numbers end")
    });
    driver.send(&frame(99, 300)).unwrap();
    assert!(reading.join().unwrap() > 1);
    assert_eq!(counters(&handle).link_changes, 0);
}
