//! What is written down of a session, so that it is found again: `session.json` in its directory.
//!
//! It is written beside its place and renamed, so it is there whole. What it says of a state is what the guest may
//! have come to: "running" is written before the guest runs, "suspending" before it is saved.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock::Stamp;
use super::error::SessionError;
use super::metering::Metering;
use super::policy::SessionPolicy;
use super::state::{SessionEvent, SessionState};
use crate::input_file;

/// The version of the format. A later one is refused.
const VERSION: u32 = 1;
/// The file, and its next version while that is written.
const NAME: &str = "session.json";
const PART: &str = "session.json.part";
/// As much of it as is read.
const MAX_BYTES: u64 = 64 << 10;
/// As much of a message as is written.
pub(super) const MAX_MESSAGE_CHARS: usize = 2048;

/// What is written down of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// The state that its guest may be in.
    pub(super) state: SessionState,
    /// The last event.
    pub(super) event: SessionEvent,
    pub(super) policy: SessionPolicy,
    pub(super) metering: Metering,
    /// When all this was so.
    pub(super) stamp: Stamp,
    /// For how long it had been awake, or suspended, by then.
    pub(super) for_how_long: Duration,
    pub(super) lasting: Lasting,
}

/// What a session keeps over its states.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Lasting {
    /// The snapshot that it was suspended to the last time.
    pub(super) snapshot: Option<[u8; 16]>,
    /// Whether its guest has a hook `terminate`, for which it is woken at its end.
    pub(super) has_terminate_hook: bool,
    /// What the guest's processes get to end by themselves.
    pub(super) grace: Duration,
}

impl Record {
    pub(super) fn new(
        state: SessionState,
        event: SessionEvent,
        policy: SessionPolicy,
        (metering, for_how_long): (Metering, Duration),
        lasting: Lasting,
    ) -> Self {
        let stamp = Stamp::now();
        Self { version: VERSION, state, event, policy, metering, stamp, for_how_long, lasting }
    }

    /// Writes it to a session's directory; with `sync`, it also outlives a power cut.
    pub(super) fn write(&self, directory: &Path, sync: bool) -> Result<(), SessionError> {
        let part = directory.join(PART);
        let written = serde_json::to_vec_pretty(self).map_err(io::Error::from).and_then(|bytes| {
            let mut options = File::options();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&part)?;
            file.write_all(&bytes)?;
            if sync {
                file.sync_all()?;
            }
            fs::rename(&part, directory.join(NAME))?;
            if sync { File::open(directory)?.sync_all() } else { Ok(()) }
        });
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written.map_err(SessionError::io("write", &directory.join(NAME)))
    }

    /// Reads that of the session `id` from its directory.
    pub(super) fn read(directory: &Path, id: &str) -> Result<Self, SessionError> {
        let path = directory.join(NAME);
        let bytes = input_file::open(&path)
            .and_then(|file| input_file::read_bounded(file, MAX_BYTES))
            .map_err(SessionError::io("read", &path))?;
        let bytes = bytes.ok_or_else(|| damaged(format!("more than {} KiB", MAX_BYTES >> 10)))?;
        // The version first: another may have other fields.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let json = |error: serde_json::Error| damaged(error.to_string());
        let Version { version } = serde_json::from_slice(&bytes).map_err(json)?;
        if version != VERSION {
            return Err(damaged(format!("version {version}, not {VERSION}")));
        }
        let record: Self = serde_json::from_slice(&bytes).map_err(json)?;
        if record.event.session != id {
            return Err(damaged(format!("it is of the session {:?}", record.event.session)));
        }
        record.policy.check().map_err(|error| damaged(error.to_string()))?;
        Ok(record)
    }
}

fn damaged(what: String) -> SessionError {
    SessionError::Record { what }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::session::state::SessionReason;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("dormouse-{}-record-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn record() -> Record {
        let event = SessionEvent {
            session: "one".into(),
            number: 3,
            state: SessionState::Suspended,
            reason: SessionReason::Idle,
            message: None,
            at: SystemTime::UNIX_EPOCH,
            took: None,
        };
        let metering = Metering { requests: 9, ..Metering::default() };
        let lasting = Lasting { snapshot: Some([7; 16]), ..Lasting::default() };
        let policy = SessionPolicy::new().lifetime(Duration::from_secs(5));
        Record::new(SessionState::Suspended, event, policy, (metering, Duration::ZERO), lasting)
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_only_by_its_session() {
        let scratch = Scratch::new("same");
        record().write(&scratch.0, true).unwrap();
        let mut read = Record::read(&scratch.0, "one").unwrap();
        read.stamp = record().stamp;
        assert_eq!(Record { stamp: read.stamp.clone(), ..record() }, read);
        let text = Record::read(&scratch.0, "two").unwrap_err().to_string();
        assert!(text.contains("of the session \"one\""), "{text}");
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1);
    }

    #[test]
    fn a_record_that_is_damaged_of_another_version_or_too_long_says_so() {
        let scratch = Scratch::new("damaged");
        let path = scratch.0.join(NAME);
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Record::read(&scratch.0, "one").unwrap_err().to_string()
        };
        assert!(refused(b"").contains("cannot be read"));
        assert!(refused(br#"{"version": 2, "new": []}"#).contains("version 2, not 1"));
        assert!(refused(br#"{"version": 1}"#).contains("missing field"));
        assert!(refused(&vec![b' '; (64 << 10) + 1]).contains("more than 64 KiB"));
        let mut mad = record();
        mad.policy.busy_cpu = Some(-1.0);
        assert!(refused(&serde_json::to_vec(&mad).unwrap()).contains("-1"));
        fs::remove_file(&path).unwrap();
        assert!(Record::read(&scratch.0, "one").unwrap_err().to_string().contains(NAME));
    }

    proptest! {
        #[test]
        fn no_record_ends_in_a_panic(at in 0usize..900, byte: u8, cut in 0usize..1200) {
            let scratch = Scratch::new("any");
            let mut bytes = serde_json::to_vec(&record()).unwrap();
            let len = bytes.len();
            bytes[at % len] = byte;
            bytes.truncate(cut);
            fs::write(scratch.0.join(NAME), &bytes).unwrap();
            let _ = Record::read(&scratch.0, "one");
        }
    }
}
