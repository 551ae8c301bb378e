use std::io::{Read, Write};
use std::sync::mpsc;

use crate::calls::{MAX_CALLS, spawn_bounded};
use crate::host::{ask, dial, failure};
use crate::protocol::{Call, Channel, FailureKind, Frame, Reply};

#[test]
fn what_is_no_call_ends_the_connection() {
    let too_long = [0, 0, 17, 0, 0].to_vec();
    let no_call = [&Frame::header(Channel::Message, 1)[..], &[99]].concat();
    let data = [&Frame::header(Channel::Data, 1)[..], &[0]].concat();
    let empty = Frame::header(Channel::Message, 0).to_vec();
    for bytes in [vec![0xff; 1000], too_long, no_call, data, empty] {
        let mut stream = dial();
        stream.write_all(&bytes).unwrap();
        let mut said = Vec::new();
        // Closed, or reset if it did not read all.
        let _ = stream.read_to_end(&mut said);
        assert!(said.is_empty(), "{said:?}");
    }
}

#[test]
fn usage_is_what_the_kernel_says() {
    match ask(&Call::Usage) {
        Reply::Usage(usage) => {
            assert!(usage.resident_bytes > 100_000 && usage.threads >= 2, "{usage:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_ordinary_process_is_neither_switched_off_nor_frozen() {
    assert_eq!(failure(ask(&Call::Shutdown(0))).kind, FailureKind::NotAllowed);
    failure(ask(&Call::Freeze));
    assert_eq!(ask(&Call::Thaw), Reply::Done);
}

#[test]
fn calls_are_bounded() {
    let (sender, receiver) = mpsc::channel::<()>();
    let receiver = std::sync::Arc::new(std::sync::Mutex::new(receiver));
    let mut began = 0;
    let refused = loop {
        let receiver = receiver.clone();
        let work = move || {
            let _ = receiver.lock().unwrap().recv();
        };
        match spawn_bounded(work) {
            Ok(()) => began += 1,
            Err(error) => break error,
        }
    };
    assert!(began <= MAX_CALLS, "{refused}");
    drop(sender);
    // Places become free again.
    while spawn_bounded(|| ()).is_err() {
        std::thread::yield_now();
    }
}
