//! TCP ports of the guest's loopback: those of its programs, that the host reaches, and those that
//! stand for services of the host.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::connection::Connection;
use crate::console::say;
use crate::protocol::{Failure, HOST_PORT, Opening, Reply, Service};
use crate::sys::{self, CID_HOST, POLLIN, POLLOUT, PollFd};
use crate::threads::{self, Threads};

/// How much of each direction is on its way.
const BUFFER_BYTES: usize = 64 << 10;

/// Reads and writes of one direction before it is the other's turn.
const MAX_STEPS: usize = 64;

/// How often a host that is not read from is asked whether it is still there: to poll(2) a vsock stream that is closed
/// looks like one that is closed by half.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How long what a host has said that is gone waits for a program that does not read it: longer than a program is mostly
/// stopped for.
const UNREAD_PATIENCE: Duration = Duration::from_secs(600);

/// Connections of programs to services of the host. However many those open, the host's calls have threads of
/// their own.
static SERVED: Threads = Threads::at_most(512);

/// Connections of the host to ports.
pub(crate) const MAX_CONNECTIONS: usize = 1024;
static CONNECTED: Threads = Threads::at_most(MAX_CONNECTIONS);

/// How long a program may take to be connected to. One that hangs lets more wait than it accepts, and the kernel would
/// try it for two minutes.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Connects the host to a port, and passes on what both say.
pub(crate) fn connect(mut connection: Connection, port: u16) -> io::Result<()> {
    let _place = match CONNECTED.place() {
        Ok(place) => place,
        Err(error) => {
            return connection.answer(Err(Failure::of("open one more connection", &error)));
        }
    };
    let loopback =
        |address: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_TIME);
    let connected = match loopback(Ipv4Addr::LOCALHOST.into()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            loopback(Ipv6Addr::LOCALHOST.into()).map_err(|_| error)
        }
        result => result,
    };
    match connected {
        Err(error) => {
            connection.answer(Err(Failure::of(format!("connect to port {port}"), &error)))
        }
        Ok(stream) => {
            connection.answer(Ok(()))?;
            let _ = stream.set_nodelay(true);
            let stream = UnixStream::from(OwnedFd::from(stream));
            pass_on(connection.into_stream(), stream, UNREAD_PATIENCE)
        }
    }
}

/// Passes on what the host and a program say, until both have ended, or one is closed for both directions. What the host
/// has said before it closed waits for as long as the program reads some of it once in `patience`; a program that does
/// not, or whose host did not come to its end, finds its stream reset, not at its end. What a program has said before it
/// closed is passed on, whatever it did not read.
pub(crate) fn pass_on(host: UnixStream, program: UnixStream, patience: Duration) -> io::Result<()> {
    host.set_nonblocking(true)?;
    program.set_nonblocking(true)?;
    let (mut there, mut back) = (Flow::default(), Flow::default());
    // By steps: the guest may stand still in between, and its clock goes on.
    let (mut unread, mut before) = (Duration::ZERO, Instant::now());
    while !(there.is_over && back.is_over) {
        let mut fds = [
            PollFd::new(there.wants_to_read().then(|| host.as_fd()), POLLIN),
            PollFd::new(there.wants_to_write().then(|| program.as_fd()), POLLOUT),
            PollFd::new(back.wants_to_read().then(|| program.as_fd()), POLLIN),
            PollFd::new(back.wants_to_write().then(|| host.as_fd()), POLLOUT),
        ];
        sys::poll(&mut fds, (!there.wants_to_read()).then_some(ASK_EVERY))?;
        let (written, had_said_all) = (there.written, back.is_over);
        // The host did not come to the end of what it had to say.
        if there.advance(&host, &program).is_err() {
            sys::reset_when_closed(&program);
            break;
        }
        if back.advance(&program, &host).is_err() {
            break;
        }
        if there.is_unheard && back.is_over {
            break;
        }
        let now = Instant::now();
        let step = now.saturating_duration_since(mem::replace(&mut before, now)).min(ASK_EVERY);
        let is_stuck = there.wants_to_write() && there.written == written;
        unread = match is_stuck && had_said_all == back.is_over {
            true => unread + step,
            false => Duration::ZERO,
        };
        // Who wants no answer either is gone: what does not answer, or read, would be waited for in vain. Where the
        // program has said all, it is we who send no more, and the host's end shows in the socket's.
        let is_gone = || match back.is_over {
            true => sys::has_hung_up(&host),
            false => sys::takes_no_more(&host),
        };
        if (there.is_over || unread > patience) && is_gone() {
            if !there.is_over {
                sys::reset_when_closed(&program);
            }
            break;
        }
    }
    Ok(())
}

/// One direction.
#[derive(Default)]
struct Flow {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
    /// All that was written so far.
    written: u64,
    is_over: bool,
    /// Who it goes to takes no more. What that one has said before is still the other's; what is read goes nowhere, and
    /// not unread, or the other would find its stream reset.
    is_unheard: bool,
}

impl Flow {
    fn wants_to_read(&self) -> bool {
        !self.is_over && self.begin == self.end
    }

    fn wants_to_write(&self) -> bool {
        self.begin < self.end
    }

    /// Reads and writes while that does not wait, for a turn; the end of the one becomes that of the other. An error is one
    /// of who is read from.
    fn advance(&mut self, mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
        for _ in 0..MAX_STEPS {
            if self.is_over {
                break;
            }
            let writes = self.wants_to_write();
            let result = if writes {
                to.write(&self.buffer[self.begin..self.end]).map(|count| {
                    self.begin += count;
                    self.written += count as u64;
                })
            } else {
                self.buffer.resize(BUFFER_BYTES, 0);
                from.read(&mut self.buffer).map(|count| {
                    (self.begin, self.end) = (0, if self.is_unheard { 0 } else { count });
                    self.is_over = count == 0;
                })
            };
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if writes => (self.begin, self.is_unheard) = (self.end, true),
                Err(error) => return Err(error),
            }
            if self.is_over {
                self.buffer = Vec::new();
                // The other may have closed already.
                let _ = to.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }
}

/// Listens for the guest's programs, in place of services of the host.
pub(crate) fn serve(services: Vec<Service>) -> Result<(), Failure> {
    for service in services {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, service.port)));
        let serving =
            listener.and_then(|listener| threads::spawn(move || accept(&listener, &service)));
        serving.map_err(|error| Failure::of("listen for a service of the host", &error))?;
    }
    Ok(())
}

fn accept(listener: &TcpListener, service: &Service) {
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, or of memory: not for long.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let name = service.name.clone();
        // Without a thread the stream is closed, as it is without a host.
        let _ = SERVED.spawn(move || {
            if let Err(error) = reach(&name, stream) {
                say(&format!("cannot reach the host's service {name}: {error}"));
            }
        });
    }
}

fn reach(name: &str, stream: TcpStream) -> io::Result<()> {
    let mut connection = Connection::new(sys::connect_vsock(CID_HOST, HOST_PORT)?);
    connection.send(&Opening::Service(name.to_owned()))?;
    match connection.receive_message()? {
        Reply::Done => {}
        _ => return Err(io::ErrorKind::ConnectionRefused.into()),
    }
    let _ = stream.set_nodelay(true);
    // How it ends is the two's own matter.
    let stream = UnixStream::from(OwnedFd::from(stream));
    let _ = pass_on(connection.into_stream(), stream, UNREAD_PATIENCE);
    Ok(())
}

#[cfg(test)]
#[path = "tests/ports.rs"]
mod tests;
