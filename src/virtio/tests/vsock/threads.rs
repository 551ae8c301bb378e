//! Threads that share a device.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::super::threads::SetAtEnd;
use super::*;
use crate::error::ErrorKind;

/// Of the guest's own.
const MAX_REQUESTS: u32 = 10_000;

#[test]
fn threads_connect_listen_and_drop_while_the_device_works() {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..6u32)
            .map(|id| {
                let vsock = vsock.clone();
                scope.spawn(move || match id % 3 {
                    // Connects, says something, and closes, or gives up at once.
                    0 => {
                        for round in 0..60u32 {
                            let connecting = vsock.begin_connect(100 + id).unwrap();
                            if round % 3 == 0 {
                                continue;
                            }
                            let mut stream = connecting.finish_timeout(PATIENCE).unwrap();
                            stream.set_read_timeout(Some(PATIENCE)).unwrap();
                            stream.write_all(&round.to_le_bytes()).unwrap();
                            let mut echo = [0; 4];
                            stream.read_exact(&mut echo).unwrap();
                            assert_eq!(echo, round.to_le_bytes());
                        }
                    }
                    // Listens and stops listening, while the guest connects.
                    1 => {
                        for _ in 0..60 {
                            let Ok(listener) = vsock.listen(200 + id) else { continue };
                            if let Ok(stream) = listener.accept_timeout(Duration::from_millis(2)) {
                                let _ = (&stream).write_all(b"hello");
                            }
                        }
                    }
                    // Takes what others have.
                    _ => {
                        for _ in 0..200 {
                            match vsock.listen(201) {
                                Ok(listener) => drop(listener),
                                Err(error) => assert_eq!(error.kind(), &ErrorKind::PortInUse),
                            }
                            let _ = vsock.connect_timeout(9999, Duration::from_micros(100));
                        }
                    }
                })
            })
            .collect();
        let (done, handle) = (&done, &handle);
        scope.spawn(move || {
            let _end = SetAtEnd(done);
            for thread in threads {
                if let Err(panic) = thread.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
        let mut port = 0;
        while !done.load(Ordering::SeqCst) {
            if let Some(packet) = guest.try_receive() {
                let (guest_port, host_port) = (packet.dst_port, packet.src_port);
                let reply = |op| Packet::of_guest(guest_port, host_port, op);
                match packet.op {
                    REQUEST if guest_port == 9999 => guest.send(&reply(RST)),
                    REQUEST => guest.send(&reply(RESPONSE)),
                    RW => guest.send(&Packet::data(guest_port, host_port, &packet.body)),
                    SHUTDOWN => guest.send(&reply(RST)),
                    _ => {}
                }
            }
            port += 1;
            // The test's RAM has room for so many, however long the threads take.
            if port % 50 == 0 && port <= 50 * MAX_REQUESTS {
                guest.send(&Packet::of_guest(port, 201 + 3 * (port / 50 % 2), REQUEST));
            }
            if port % 1000 == 0 {
                handle.pause();
                handle.resume();
                guest.transport.notify(0);
            }
        }
    });
    // The guest has been told of the end of all of them, but for those that it has not answered.
    until(|| {
        if let Some(packet) = guest.try_receive()
            && packet.op == REQUEST
        {
            guest.send(&Packet::of_guest(packet.dst_port, packet.src_port, RST));
        }
        (metrics(&handle).active == 0).then_some(())
    });
    assert!(!guest.needs_reset());
}
