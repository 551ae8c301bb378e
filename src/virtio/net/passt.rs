//! passt: a child process that is the guest's way to the host's network, without rights.
//!
//! Source: passt(1). It is given one end of a socketpair, stays in the foreground, serves this one
//! guest, and ends when the socket closes; we end it all the same, and wait for it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use thiserror::Error as ThisError;

use super::stream::Stream;
use crate::config::UserNetwork;
use crate::error::{Error, ErrorKind};

/// Why there is no user-mode network.
#[derive(Debug, ThisError)]
pub(crate) enum PasstError {
    #[error("cannot find the program {}", program.display())]
    Missing { program: PathBuf },
    #[error("cannot start {}", program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("cannot make a socket for passt")]
    Socket(#[source] io::Error),
}

impl From<PasstError> for Error {
    fn from(error: PasstError) -> Self {
        match error {
            PasstError::Missing { .. } => Self::new(ErrorKind::Network, error)
                .fix("install passt (apt install passt), or say where it is"),
            PasstError::Start { .. } => Self::new(ErrorKind::Network, error),
            PasstError::Socket(_) => Self::new(ErrorKind::Resources, error)
                .fix("raise the limit of open files (ulimit -n)"),
        }
    }
}

/// The process.
#[derive(Debug)]
pub(crate) struct Passt {
    child: Child,
}

impl Passt {
    /// Starts it for a guest, whose end of the cable is the stream.
    pub(super) fn start(
        network: &UserNetwork,
        mtu: Option<u16>,
    ) -> Result<(Stream, Self), PasstError> {
        let program = find(network)
            .ok_or_else(|| PasstError::Missing { program: network.program.clone() })?;
        let (ours, theirs) = UnixStream::pair().map_err(PasstError::Socket)?;
        let stream = Stream::new(ours).map_err(PasstError::Socket)?;
        // A descriptor that is no standard one reaches a child by way of one: the shell makes it
        // the third and becomes passt, which has its own standard streams.
        let child = Command::new("/bin/sh")
            .arg("-c")
            .arg(r#"exec 3<&0 </dev/null; exec "$0" "$@""#)
            .arg(&program)
            .args(["--foreground", "--one-off", "--quiet", "--fd", "3"])
            .args(options(network, mtu))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| PasstError::Start { program, source })?;
        Ok((stream, Self { child }))
    }

    /// Ends the process, if it has not ended. Takes some 100 µs, once.
    pub(super) fn end(&mut self) {
        // The device thread may not wait for children; the end of the VM does it then.
        // One that has ended cannot be killed, and one that was waited for is not waited for
        // again: neither is a fault.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.end();
    }
}

/// The program's path, where it is one or is in PATH.
fn find(network: &UserNetwork) -> Option<PathBuf> {
    let program = &network.program;
    if network.is_at_a_path() {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn options(network: &UserNetwork, mtu: Option<u16>) -> Vec<String> {
    let mut options = Vec::new();
    let mut option = |name: &str, value: String| options.extend([name.to_owned(), value]);
    for (host, guest) in &network.tcp {
        option("--tcp-ports", format!("{host}:{guest}"));
    }
    for (host, guest) in &network.udp {
        option("--udp-ports", format!("{host}:{guest}"));
    }
    for server in &network.dns {
        option("--dns", server.to_string());
    }
    for address in &network.addresses {
        option("--address", address.to_string());
    }
    for address in &network.gateways {
        option("--gateway", address.to_string());
    }
    if let Some(mtu) = mtu {
        option("--mtu", mtu.to_string());
    }
    if !network.host_loopback {
        options.push("--no-map-gw".to_owned());
    }
    options
}

#[cfg(test)]
mod tests {
    use super::super::backend::Backend;
    use super::super::moved::Room;
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn options_are_those_of_the_manual() {
        let network = UserNetwork::new().forward_tcp(8080, 80).nameserver([9, 9, 9, 9]);
        let text = options(&network, Some(1500)).join(" ");
        assert_eq!(text, "--tcp-ports 8080:80 --dns 9.9.9.9 --mtu 1500 --no-map-gw");
        assert!(options(&UserNetwork::new().host_loopback(true), None).is_empty());
    }

    #[test]
    fn a_passt_that_is_not_there_is_an_error_with_the_fix() {
        for program in ["no-such-program", "/no/such/passt", "./passt"] {
            let network = UserNetwork::new().program(program);
            let error = Error::from(Passt::start(&network, None).unwrap_err());
            assert_eq!(error.kind(), &ErrorKind::Network);
            assert!(error.to_string().contains("apt install passt"), "{error}");
        }
    }

    /// A program that does `script` in passt's place, in a directory that goes with the test.
    fn stand_in(script: &str) -> (TempDir, UserNetwork) {
        let dir = TempDir::new().unwrap();
        let [text, path] = ["text", "passt"].map(|name| dir.as_path().join(name));
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // By another process: what is open for writing cannot be executed, and a process that another test starts has
        // a copy of all descriptors of this one.
        let made = Command::new("install").arg("-m755").args([&text, &path]).status().unwrap();
        assert!(made.success());
        let network = UserNetwork::new().program(&path);
        (dir, network)
    }

    fn parts(backend: &mut Backend) -> (&mut Stream, u32) {
        match backend {
            Backend::Passt(stream, process) => (stream, process.child.id()),
            other => panic!("{other:?}"),
        }
    }

    fn exists(pid: u32) -> bool {
        std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn the_process_has_the_socket_and_ends_with_the_vm() {
        // A frame of 14 bytes, then nothing for a long time.
        let script = r#"printf '\000\000\000\016abcdefghijklmn' >&"$5"; exec sleep 1000"#;
        let (_dir, network) = stand_in(script);
        let mut backend = Backend::passt(&network, None).unwrap();
        let (_, pid) = parts(&mut backend);
        let begin = std::time::Instant::now();
        while backend.next().unwrap() != Some(Room::Known(26)) {
            assert!(begin.elapsed().as_secs() < 30, "no frame");
        }
        assert!(exists(pid));
        drop(backend);
        assert!(!exists(pid), "it lives, or is a zombie");
    }

    #[test]
    fn a_process_that_ends_by_itself_takes_the_link_down_and_is_no_zombie() {
        let (_dir, network) = stand_in("exit 1");
        let mut backend = Backend::passt(&network, None).unwrap();
        let (_, pid) = parts(&mut backend);
        let begin = std::time::Instant::now();
        while backend.next().is_ok() {
            assert!(begin.elapsed().as_secs() < 30, "the link stays up");
        }
        assert!(!backend.is_up());
        assert!(!exists(pid), "it is a zombie");
    }
}
