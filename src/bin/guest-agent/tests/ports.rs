use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use crate::host::{call, failure};
use crate::ports::pass_on;
use crate::protocol::{Call, FailureKind, Reply};

/// For a program that does not read.
const PATIENCE: Duration = Duration::from_secs(1);

fn connect(port: u16) -> UnixStream {
    let mut connection = call(&Call::Connect(port));
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    connection.into_stream()
}

/// Reads all, then says how much it was.
fn count(mut stream: TcpStream) {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    write!(stream, "{} bytes", all.len()).unwrap();
}

#[test]
fn half_a_connection_is_closed_as_half_of_the_other() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let guest = thread::spawn(move || count(listener.accept().unwrap().0));
    let mut stream = connect(port);
    stream.write_all(&vec![7; 3_000_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, "3000000 bytes");
    guest.join().unwrap();
}

#[test]
fn what_the_guest_closes_first_the_host_may_still_answer() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let guest = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(&vec![1; 1_000_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let mut stream = connect(port);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 1_000_000);
    stream.write_all(b"thanks").unwrap();
    drop(stream);
    assert_eq!(guest.join().unwrap(), b"thanks");
}

#[test]
fn a_host_that_has_gone_is_not_kept_for_a_server_that_never_answers() {
    let ((mut host, theirs), (mut server, ours)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE));
    host.write_all(b"request").unwrap();
    drop(host);
    passing.join().unwrap().unwrap();
    let mut request = String::new();
    server.read_to_string(&mut request).unwrap();
    assert_eq!(request, "request");
}

#[test]
fn a_host_that_goes_after_it_has_said_all_is_not_kept_either() {
    let ((mut host, theirs), (mut server, ours)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE));
    host.write_all(b"request").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut request = String::new();
    server.read_to_string(&mut request).unwrap();
    assert_eq!(request, "request");
    // By now it waits for the answer.
    thread::sleep(Duration::from_millis(50));
    drop(host);
    passing.join().unwrap().unwrap();
}

#[test]
fn a_host_that_has_gone_is_not_kept_for_a_program_that_does_not_read() {
    let ((mut host, theirs), (mut program, ours)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let going = host.try_clone().unwrap();
    let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE));
    // More than is on its way at once.
    let writer = thread::spawn(move || {
        let _ = host.write_all(&vec![7; 4 << 20]);
    });
    // One that reads gets all.
    let mut half = vec![0; 2 << 20];
    for part in half.chunks_mut(256 << 10) {
        program.read_exact(part).unwrap();
        thread::sleep(PATIENCE / 8);
    }
    // The host goes, whatever it still had to say.
    going.shutdown(Shutdown::Both).unwrap();
    writer.join().unwrap();
    drop(going);
    passing.join().unwrap().unwrap();
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert!(half.len() + rest.len() < 4 << 20);
}

#[test]
fn a_stream_that_is_given_up_is_reset_and_not_at_its_end() {
    let ((mut program, mut ours), (mut host, theirs)) = (program(), UnixStream::pair().unwrap());
    // TCP takes no more.
    ours.set_nonblocking(true).unwrap();
    for _ in 0..2 {
        while ours.write(&[7; 4096]).is_ok() {}
        thread::sleep(Duration::from_millis(50));
    }
    host.write_all(&[7; 100_000]).unwrap();
    host.shutdown(Shutdown::Both).unwrap();
    pass_on(theirs, ours, PATIENCE).unwrap();
    let error = program.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A program's TCP stream, and the agent's end of it.
fn program() -> (TcpStream, UnixStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (program, _) = listener.accept().unwrap();
    (program, UnixStream::from(OwnedFd::from(ours)))
}

#[test]
fn an_answer_that_came_before_all_was_read_reaches_the_host() {
    let ((mut program, mut ours), (mut host, theirs)) = (program(), UnixStream::pair().unwrap());
    // It closes with something unread, which resets the stream: before any of it is passed on.
    ours.write_all(b"some").unwrap();
    program.write_all(b"too large").unwrap();
    drop(program);
    host.write_all(&vec![7; 100_000]).unwrap();
    thread::sleep(Duration::from_millis(50));
    // The host looks when it is over: then its end may not be a reset either.
    pass_on(theirs, ours, PATIENCE).unwrap();
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "too large");
}

#[test]
fn what_a_host_said_before_it_went_reaches_a_program_that_talks() {
    let ((mut program, ours), (mut host, theirs)) = (program(), UnixStream::pair().unwrap());
    host.write_all(&vec![7; 100_000]).unwrap();
    drop(host);
    // Nobody hears this.
    program.write_all(b"hello").unwrap();
    thread::sleep(Duration::from_millis(50));
    let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE));
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 100_000);
    passing.join().unwrap().unwrap();
}

#[test]
fn a_host_that_was_cut_off_is_not_at_its_end() {
    let ((mut program, ours), (mut host, theirs)) = (program(), UnixStream::pair().unwrap());
    let mut unread = theirs.try_clone().unwrap();
    host.write_all(b"half").unwrap();
    unread.write_all(b"unread").unwrap();
    // Its end closes with something unread: a reset.
    drop(host);
    let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE));
    let error = program.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    passing.join().unwrap().unwrap();
}

#[test]
fn a_program_that_has_said_all_is_waited_for_while_the_host_is_there_and_not_longer() {
    for is_there in [true, false] {
        let ((mut host, theirs), (mut program, ours)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let passing = thread::spawn(move || pass_on(theirs, ours, PATIENCE / 2));
        program.shutdown(Shutdown::Write).unwrap();
        let going = host.try_clone().unwrap();
        let writer = thread::spawn(move || host.write_all(&vec![7; 4 << 20]));
        thread::sleep(PATIENCE * 2);
        assert!(!passing.is_finished());
        if is_there {
            let mut all = vec![0; 4 << 20];
            program.read_exact(&mut all).unwrap();
            writer.join().unwrap().unwrap();
            drop(going);
        } else {
            going.shutdown(Shutdown::Both).unwrap();
            let _ = writer.join().unwrap();
        }
        passing.join().unwrap().unwrap();
    }
}

#[test]
fn nobody_at_a_port_is_said_so_and_ipv6_is_tried() {
    // The port of one that does not listen: nobody else gets it meanwhile.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let port = connected.local_addr().unwrap().port();
    let refused = failure(call(&Call::Connect(port)).receive_message().unwrap());
    assert_eq!(refused.kind, FailureKind::Refused);
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else { return };
    let port = listener.local_addr().unwrap().port();
    let guest = thread::spawn(move || count(listener.accept().unwrap().0));
    let stream = connect(port);
    stream.shutdown(Shutdown::Write).unwrap();
    guest.join().unwrap();
}

#[test]
fn both_ways_at_once_neither_waits_for_the_other() {
    let ((mut a, theirs_a), (mut b, theirs_b)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let passing = thread::spawn(move || pass_on(theirs_a, theirs_b, PATIENCE));
    let write = |mut stream: UnixStream| {
        thread::spawn(move || {
            stream.write_all(&vec![5; 5_000_000]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let writers = [write(a.try_clone().unwrap()), write(b.try_clone().unwrap())];
    // Nothing is read until the pipe between them is full in both directions.
    thread::sleep(std::time::Duration::from_millis(50));
    let read = |stream: &mut UnixStream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    };
    let reader = thread::spawn(move || read(&mut b));
    assert_eq!(read(&mut a), 5_000_000);
    assert_eq!(reader.join().unwrap(), 5_000_000);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    passing.join().unwrap().unwrap();
}
