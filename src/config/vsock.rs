//! The vsock device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Sockets between the guest and the host (AF_VSOCK): streams that need no network.
///
/// The host is the guest's CID 2. This process connects to the guest's ports, and listens at
/// those of the host, by [`Vsock`](crate::Vsock); other processes by a UNIX socket.
///
/// Source: virtio 1.2 §5.10.
///
/// ```
/// use dormouse::VsockConfig;
///
/// let vsock = VsockConfig::default().unix_socket("/run/vm.sock");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VsockConfig {
    pub(crate) guest_cid: u32,
    pub(crate) max_connections: usize,
    pub(crate) unix_socket: Option<PathBuf>,
}

impl Default for VsockConfig {
    /// CID 3, up to 4,096 connections, no UNIX socket.
    fn default() -> Self {
        Self { guest_cid: 3, max_connections: 4096, unix_socket: None }
    }
}

impl VsockConfig {
    /// The guest's address: 3 (unless set) to 4,294,967,294. VMs may share one: each has a host of
    /// its own.
    #[must_use]
    pub fn guest_cid(mut self, cid: u32) -> Self {
        self.guest_cid = cid;
        self
    }

    /// How many connections there may be at a time: 1 to 65,536; 4,096 unless set. One more is
    /// refused. Each takes two descriptors of this process (one where its other end is another
    /// process's), and up to 128 KiB of memory, beside the kernel's buffers, while the host does
    /// not read what the guest sent.
    #[must_use]
    pub fn max_connections(mut self, count: usize) -> Self {
        self.max_connections = count;
        self
    }

    /// Makes a UNIX stream socket at this path, where there must be none yet, as Firecracker
    /// does. It is removed with the VM.
    ///
    /// A program that connects to it writes `CONNECT 1234\n`, with a port of the guest, and reads
    /// `OK 1073741824\n`, with some port of the host, when the guest has accepted; where it
    /// refuses, the socket is closed. A guest that connects to a port of the host, at which
    /// nobody in this process listens, is connected to the socket at the path with an underscore
    /// and the port behind it: `/run/vm.sock_1234`.
    #[must_use]
    pub fn unix_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.unix_socket = Some(path.into());
        self
    }
}
