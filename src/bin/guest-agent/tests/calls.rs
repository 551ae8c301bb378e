use std::io::{Read, Write};

use crate::connection::Connection;
use crate::exec::tests::{begin, code, finish, sh};
use crate::host::{ask, data, dial, exec, failure};
use crate::protocol::{Bytes, Call, Channel, Control, Credit, FailureKind, Frame, Reply};

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
            assert!(usage.resident_bytes > 100_000, "{usage:?}");
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
fn calls_follow_each_other_on_a_connection_and_take_nothing_of_the_one_before() {
    let mut cat = exec(&["cat"]);
    cat.stdin = true;
    let (mut connection, _) = begin(sh("echo first"));
    for round in 0..20 {
        let ran = finish(&mut connection);
        assert_eq!(code(&ran), 0, "{round}");
        assert_eq!(ran.stdout, if round % 2 == 0 { &b"first\n"[..] } else { b"typed" });
        // What a host may say that has not yet heard of the end: in pieces, some with the call.
        data(&mut connection, b"late");
        connection.queue(&Control::Signal(9)).unwrap();
        connection.queue(&Control::Credit(Credit { channel: 1, bytes: 7 })).unwrap();
        connection.queue_end().unwrap();
        connection.flush().unwrap();
        let next = if round % 2 == 0 { cat.clone() } else { sh("echo first") };
        let mut stream = connection.into_stream();
        stream.write_all(&Frame::call(&Call::Exec(next))).unwrap();
        connection = Connection::new(stream);
        assert!(matches!(connection.receive_message().unwrap(), Reply::Started(_)));
        if round % 2 == 0 {
            data(&mut connection, b"typed");
            connection.queue_end().unwrap();
            connection.flush().unwrap();
        }
    }
    // One that cannot be run, and others, leave the connection as it was.
    finish(&mut connection);
    let mut stream = connection.into_stream();
    for call in [Call::Exec(exec(&["/no/such/program"])), Call::Stat(Bytes::from("/")), Call::Thaw]
    {
        stream.write_all(&Frame::call(&call)).unwrap();
    }
    let mut connection = Connection::new(stream);
    assert!(matches!(connection.receive_message().unwrap(), Reply::Failed(_)));
    assert!(matches!(connection.receive_message().unwrap(), Reply::Stat(_)));
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
}
