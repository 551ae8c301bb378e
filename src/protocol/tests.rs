use super::*;

fn calls() -> Vec<Call> {
    let program = Program {
        argv: vec![Bytes::from("sh"), Bytes::from(b"-c\xff")],
        env: vec![(Bytes::from("A"), Bytes::from("b"))],
        home: true,
        cwd: Some(Bytes::from("/tmp")),
        user: None,
    };
    let exec = Exec {
        program,
        stdin: true,
        terminal: Some(WindowSize { rows: 24, columns: 80 }),
        timeout_ms: Some(5),
    };
    let path = Bytes::from("/a");
    vec![
        Call::Exec(exec),
        Call::Write(Write {
            path: path.clone(),
            mode: Some(0o600),
            owner: Some((1, 2)),
            sync: true,
        }),
        Call::Connect(80),
        Call::Freeze,
        Call::Read(Read { path, offset: 1 << 40, length: None }),
    ]
}

#[test]
fn what_is_written_is_read_again() {
    for call in calls() {
        assert_eq!(Call::from_bytes(&call.to_bytes()), Ok(call));
    }
    let fault = Failure { kind: FailureKind::Other, errno: 5, what: "ä".into() };
    let hello = Hello { version: VERSION, fault: Some(fault) };
    let opening = Opening::Hello(hello);
    assert_eq!(Opening::from_bytes(&opening.to_bytes()), Ok(opening));
}

#[test]
fn what_is_cut_off_or_goes_on_is_malformed() {
    for call in calls() {
        let mut bytes = call.to_bytes();
        for end in 0..bytes.len() {
            Call::from_bytes(&bytes[..end]).unwrap_err();
        }
        bytes.push(0);
        let error = Call::from_bytes(&bytes).unwrap_err();
        assert_eq!(error.what, "the end");
    }
}

#[test]
fn a_length_beyond_the_message_is_refused_before_it_is_believed() {
    let error = Bytes::from_bytes(&[255, 255, 255, 255, 1]).unwrap_err();
    assert_eq!(error.to_string(), "a length expected at byte 4");
    Vec::<Vec<u64>>::from_bytes(&[4, 0, 0, 0, 0, 0, 0, 0]).unwrap_err();
    String::from_bytes(&[1, 0, 0, 0, 255]).unwrap_err();
    Option::<u8>::from_bytes(&[2, 0]).unwrap_err();
    Reply::from_bytes(&[77]).unwrap_err();
}

#[test]
fn other_versions_are_understood_so_far_that_they_can_be_named() {
    let hello = Hello { version: VERSION, fault: None };
    let mut bytes = hello.to_bytes();
    bytes[8] = 9;
    bytes.extend([1, 2, 3]);
    assert_eq!(Hello::from_bytes(&bytes).unwrap().version, 9);
    bytes[0] = b'D';
    Hello::from_bytes(&bytes).unwrap_err();
}

#[test]
fn frames_are_found_in_whatever_pieces_they_come() {
    let mut bytes = Frame::message(&Call::Freeze);
    bytes.extend(Frame::header(Channel::Data, 3));
    bytes.extend(b"abc");
    bytes.extend(Frame::header(Channel::Data, 0));
    bytes.extend(b"rest");
    for size in 1..=bytes.len() {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.feed(piece);
            while frames.len() < 3 {
                let Some(frame) = decoder.next().unwrap() else { break };
                frames.push((frame.channel, frame.bytes.to_vec()));
            }
        }
        assert_eq!(frames[0], (Channel::Message, Call::Freeze.to_bytes()));
        assert_eq!(frames[1], (Channel::Data, b"abc".to_vec()));
        assert_eq!(frames[2], (Channel::Data, Vec::new()));
        assert_eq!(decoder.into_rest(), b"rest");
    }
}

#[test]
fn a_frame_that_is_too_long_or_of_no_channel_is_refused_at_its_header() {
    for header in [[1, 0, 1, 0, 1], [1, 0, 16, 0, 0], [0, 0, 0, 0, 5], [1, 0, 16, 0, 4]] {
        let mut decoder = Decoder::default();
        decoder.feed(&header);
        decoder.next().unwrap_err();
    }
    let mut decoder = Decoder::default();
    decoder.feed(&[0, 0, 16, 0, 0]);
    assert_eq!(decoder.next(), Ok(None));
    assert!(!decoder.is_empty());
}
