//! The connection to the host: on it the agent says that it is there, and learns who its guest is.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::connection::Connection;
use crate::console::{describe, say};
use crate::protocol::{
    Failure, HOST_PORT, Hello, Interface, Line, Opening, RESERVED_PORTS, VERSION, Welcome,
};
use crate::sys::{self, CID_HOST};
use crate::{cgroup, identity};

/// How long to wait for a host that is not there, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long to wait for another host, if this one cannot be understood.
const PAUSE_OF_VERSIONS: Duration = Duration::from_secs(10);

/// What the agent says of itself.
pub(crate) struct Control {
    fault: Option<Failure>,
    /// What the guest's addresses are now.
    interfaces: Vec<Interface>,
}

/// How a connection ended.
enum End {
    /// Nobody was there, or it broke before the host had answered.
    Unheard,
    /// The host was there, and left: this VM was restored, or the host's process is another.
    Left,
    /// The host says what this agent does not know.
    Misunderstood,
}

impl Control {
    pub(crate) fn new(fault: Option<Failure>, interfaces: Vec<Interface>) -> Self {
        Self { fault, interfaces }
    }

    /// Keeps a connection to the host, for ever.
    pub(crate) fn run(mut self) -> ! {
        let mut pause = FIRST_PAUSE;
        let mut is_known = false;
        loop {
            match self.connect() {
                End::Left => {
                    pause = FIRST_PAUSE;
                    continue;
                }
                End::Unheard => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                End::Misunderstood => {
                    if !is_known {
                        say(&format!(
                            "the host speaks another version of the protocol than {VERSION}: \
                             start this guest with the version of dormouse that it was made with"
                        ));
                        is_known = true;
                    }
                    thread::sleep(PAUSE_OF_VERSIONS);
                }
            }
        }
    }

    fn connect(&mut self) -> End {
        let Ok(stream) = connect() else { return End::Unheard };
        let mut connection = Connection::new(stream);
        match self.welcome(&mut connection) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return End::Misunderstood,
            Err(_) => return End::Unheard,
        }
        // Its end, or what a host of ours does not say.
        while let Ok(Line::Ping) = connection.receive_message() {
            if connection.answer(Ok(())).is_err() {
                break;
            }
        }
        End::Left
    }

    /// Says hello, and becomes who the host says that this guest is.
    fn welcome(&mut self, connection: &mut Connection) -> io::Result<()> {
        let hello = Hello { version: VERSION, fault: self.fault.clone() };
        connection.send(&Opening::Hello(hello))?;
        let welcome: Welcome = connection.receive_message()?;
        let applied = identity::apply(&welcome.identity, &mut self.interfaces);
        if let Err(failure) = &applied {
            say(&describe(failure));
        }
        // Whatever went wrong: a guest that stands still helps nobody.
        let thawed = cgroup::thaw();
        connection.answer(applied.and(thawed))
    }
}

/// Connects to the host from a port that no program but root's can have.
fn connect() -> io::Result<UnixStream> {
    // One after the other: the host may not know yet that the last connection is over.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for _ in RESERVED_PORTS {
        let port =
            RESERVED_PORTS.end() - COUNT.fetch_add(1, Ordering::Relaxed) % RESERVED_PORTS.end();
        result = sys::connect_vsock_from(port, CID_HOST, HOST_PORT);
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::protocol::{Frame, Identity};

    #[test]
    fn a_host_of_another_version_is_told_apart_before_anything_is_done_that_it_says() {
        let (ours, mut host) = UnixStream::pair().unwrap();
        let identity = Identity { wall_clock_ns: 0, seed: [0; 32], renewal: None };
        let mut welcome = Frame::message(&Welcome { version: VERSION, identity });
        // Behind the header of the frame and `dormouse`.
        welcome[13..17].copy_from_slice(&(VERSION + 1).to_le_bytes());
        host.write_all(&welcome).unwrap();
        let mut control = Control::new(None, Vec::new());
        let error = control.welcome(&mut Connection::new(ours)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let said = Connection::new(host).receive_message::<Opening>().unwrap();
        let Opening::Hello(hello) = said else { panic!("{said:?}") };
        assert_eq!(hello.version, VERSION);
    }
}
