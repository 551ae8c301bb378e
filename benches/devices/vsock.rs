//! A stream between a guest and this process, beside one between two of its threads.
//!
//! As with networks, the guest polls and has a CPU for itself; the device thread and the program
//! share the rest.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use dormouse::VsockConfig;

use crate::report::{Bar, Metric, Unit, micros};
use crate::vsock_guest::{self, MESSAGE, PORT, Work};
use crate::{Guest, ROUNDS, WARM_UP, rates};

const MESSAGES: u64 = 1 << 10;
const ROUND_TRIPS: u64 = 2 << 10;

pub fn metrics() -> Vec<Metric> {
    let mut metrics = vec![
        stream("vsock, messages of 64 KiB from the guest", Work::Send, receive),
        stream("vsock, messages of 64 KiB to the guest", Work::Receive, send),
    ];
    metrics.extend(round_trips());
    metrics
}

/// The guest works at its end of a connection, and the host at its own meanwhile.
fn stream(name: &str, work: Work, host: fn(&mut UnixStream)) -> Metric {
    let (mut guest, mut socket) = connected(work, MESSAGES);
    let ours = || guest.batch(|| host(&mut socket));
    let (mut from, mut to) = UnixStream::pair().expect("a pair of sockets");
    let floor = || {
        let begin = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| send(&mut from));
            receive(&mut to);
        });
        begin.elapsed()
    };
    let mib = (MESSAGES * u64::from(MESSAGE)) as f64 / 1048576.0;
    rates(name, Unit::MibPerSecond, mib, Some(Bar::AtLeast(0.5)), ours, floor)
}

/// A byte to the guest and back. It is compared with twice such a round trip between two threads, since the device
/// thread is between, and two exits of the guest. That is no floor: the two threads wake one another on two processors,
/// where the guest polls, and the device thread and the host share what it leaves them.
fn round_trips() -> [Metric; 3] {
    let (mut guest, mut socket) = connected(Work::Echo, ROUND_TRIPS);
    let (mut idle, _socket) = connected(Work::Exit, ROUND_TRIPS);
    let [mut ours, mut threads, mut exits] = [const { Vec::new() }; 3];
    for round in 0..WARM_UP + ROUNDS {
        let each = |duration: Duration| micros(duration) / ROUND_TRIPS as f64;
        let through = each(guest.batch(|| ping(&mut socket)));
        let (between, exit) = (each(between_threads()), each(idle.batch(|| ())));
        if round >= WARM_UP {
            ours.push(through);
            threads.push(between);
            exits.push(exit);
        }
    }
    let pairs = threads.iter().zip(&exits);
    let compared = pairs.map(|(between, exit)| 2.0 * between + 2.0 * exit).collect();
    let metric = |name: &str, ours, floor, bar| Metric {
        name: name.to_owned(),
        unit: Unit::Micros,
        ours,
        floor,
        bar,
    };
    [
        metric(
            "vsock, round trip of 1 byte, compared with two between threads and two exits",
            ours,
            compared,
            Some(Bar::AtMost(1.0)),
        ),
        metric("a round trip of 1 byte between threads", threads, Vec::new(), None),
        metric("an exit of the guest", exits, Vec::new(), None),
    ]
}

/// A guest that has connected to the host.
fn connected(work: Work, batch: u64) -> (Guest, UnixStream) {
    let driver = vsock_guest::image(work, batch);
    let configure = |config: dormouse::VmConfig| config.vsock(VsockConfig::default());
    let (mut guest, listener) =
        Guest::prepared(driver, configure, |vm| vm.listen(PORT).expect("a listener"));
    guest.batch(|| ());
    let stream = listener.accept().expect("the guest's connection");
    (guest, stream.into())
}

/// A system call for each message.
fn send(socket: &mut UnixStream) {
    let message = vec![1; MESSAGE as usize];
    for _ in 0..MESSAGES {
        socket.write_all(&message).expect("a message");
    }
}

/// As much at once as there is of a message.
fn receive(socket: &mut UnixStream) {
    let mut buffer = vec![0; MESSAGE as usize];
    let mut left = MESSAGES * u64::from(MESSAGE);
    while left > 0 {
        let read = socket.read(&mut buffer).expect("messages");
        assert!(read > 0, "the stream ended");
        left -= read as u64;
    }
}

fn between_threads() -> Duration {
    let (mut one, mut other) = UnixStream::pair().expect("a pair of sockets");
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut byte = [0];
            for _ in 0..ROUND_TRIPS {
                other.read_exact(&mut byte).expect("a byte");
                other.write_all(&byte).expect("a byte");
            }
        });
        let begin = Instant::now();
        ping(&mut one);
        begin.elapsed()
    })
}

fn ping(socket: &mut UnixStream) {
    let mut byte = [1];
    for _ in 0..ROUND_TRIPS {
        socket.write_all(&byte).expect("a byte");
        socket.read_exact(&mut byte).expect("a byte");
    }
}
