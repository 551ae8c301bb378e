//! What the agent says on the console: one plain line for what went wrong.

use std::fs::OpenOptions;
use std::io::Write;

use crate::protocol::Failure;

/// Writes a line to the kernel's log, which shows it on the console.
pub(crate) fn say(line: &str) {
    // As an error, since a kernel that boots quietly shows no less.
    let text = format!("<3>dormouse: {line}\n");
    let logged = OpenOptions::new().write(true).open("/dev/kmsg");
    if logged.and_then(|mut log| log.write_all(text.as_bytes())).is_ok() {
        return;
    }
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(&text.as_bytes()[3..]);
    }
}

/// What could not be done while the guest was set up: all of it on the console, the first of it for
/// the host.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) first: Option<Failure>,
}

impl Faults {
    /// The value, unless there is none.
    pub(crate) fn note<T>(&mut self, result: Result<T, Failure>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(failure) => {
                say(&describe(&failure));
                self.first.get_or_insert(failure);
                None
            }
        }
    }
}

pub(crate) fn describe(failure: &Failure) -> String {
    match failure.errno {
        0 => format!("cannot {}", failure.what),
        errno => {
            let error = std::io::Error::from_raw_os_error(errno);
            format!("cannot {}: {error}", failure.what)
        }
    }
}
