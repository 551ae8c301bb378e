//! Which values are refused, and within which bounds they are taken.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error as ThisError;

use super::HookName;
use crate::bounded::MOST_IN_LIST;
use crate::protocol::MAX_MESSAGE_BYTES;

/// HOST_NAME_MAX of Linux.
pub(super) const MAX_HOSTNAME_BYTES: usize = 64;
/// What the agent is told of a service.
pub(super) const MAX_SERVICE_NAME_BYTES: usize = 64;
/// `sun_path` without the terminating NUL.
pub(super) const MAX_SOCKET_PATH_BYTES: usize = 107;
/// PATH_MAX of Linux, without the terminating NUL.
pub(super) const MAX_PATH_BYTES: usize = 4095;
/// MODULE_NAME_LEN of Linux, without the terminating NUL.
pub(super) const MAX_MODULE_NAME_BYTES: usize = 55;
pub(super) const MAX_MODULES: usize = 64;
pub(super) const MAX_FS_TYPE_BYTES: usize = 32;
pub(super) const MAX_COMMAND_BYTES: usize = 128 << 10;
pub(super) const MIN_DEADLINE: Duration = Duration::from_secs(1);
pub(super) const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// Which value is refused, and what would be taken.
#[derive(Debug, PartialEq, Eq, ThisError)]
pub(crate) enum AgentConfigError {
    #[error("{what} is disk {disk}, counted from 0: the VM has {count}")]
    NoDisk { what: &'static str, disk: usize, count: usize },
    #[error("disk {disk} is mounted twice")]
    DiskTwice { disk: usize },
    #[error("{what}, disk {disk}, is one that the guest may only read")]
    ReadOnlyDisk { what: &'static str, disk: usize },
    #[error("an overlay of {bytes} bytes in a memory of {memory_bytes}")]
    OverlayTooLarge { bytes: u64, memory_bytes: u64 },
    #[error(
        "the file system {name:?}: it takes a name of up to {MAX_FS_TYPE_BYTES} letters, digits, `-`, `_` and `.`"
    )]
    FsType { name: String },
    #[error(
        "the path {path:?} of {what}: it takes an absolute one of up to {MAX_PATH_BYTES} bytes, without `..` and NUL"
    )]
    Path { what: &'static str, path: String },
    #[error("two disks are mounted at {path}")]
    PathTwice { path: String },
    #[error(
        "the hostname {name:?}: it takes up to {MAX_HOSTNAME_BYTES} letters, digits, hyphens, and dots \
         between them (RFC 1123)"
    )]
    Hostname { name: String },
    #[error(
        "the address {text:?} of an interface: it takes one with a prefix, like 10.0.0.2/24 or fd00::2/64"
    )]
    InterfaceAddress { text: String },
    #[error("the address {text:?} of {what}: it takes one like 10.0.0.1 or fd00::1")]
    Address { what: &'static str, text: String },
    #[error("{count} {what}: it takes up to {MOST_IN_LIST}")]
    TooMany { what: &'static str, count: usize },
    #[error("addresses of {interfaces} network interfaces: the VM has {networks}")]
    Interfaces { interfaces: usize, networks: usize },
    #[error(
        "the name {name:?} of a service: it takes 1 to {MAX_SERVICE_NAME_BYTES} bytes of printable ASCII"
    )]
    ServiceName { name: String },
    #[error("port 0 of {what}")]
    NoPort { what: String },
    #[error("two services at port {port} of the guest")]
    PortTwice { port: u16 },
    #[error(
        "the socket {path:?} of a service: it takes an absolute path of up to {MAX_SOCKET_PATH_BYTES} bytes"
    )]
    Socket { path: PathBuf },
    #[error("a deadline of {deadline:?} for the hook {}: it takes 1 s to 24 h", hook.as_str())]
    Deadline { hook: HookName, deadline: Duration },
    #[error("the path {path:?} of the hook {}: it begins with `/` and is printable ASCII", hook.as_str())]
    HookPath { hook: HookName, path: String },
    #[error("{what} is no program")]
    NoProgram { what: String },
    #[error("{what} holds a NUL byte, or is longer than {MAX_COMMAND_BYTES} bytes")]
    Argument { what: String },
    #[error("the variable {name:?} of the entrypoint's environment")]
    Variable { name: String },
    #[error(
        "the user {user:?} of the entrypoint: it takes `user`, `uid`, `user:group` or `uid:gid`"
    )]
    User { user: String },
    #[error(
        "the signal {text:?} that stops the entrypoint: it takes one like SIGQUIT, QUIT, 3 or SIGRTMIN+3"
    )]
    StopSignal { text: String },
    #[error("the guest is to end with its entrypoint, and has none")]
    NoEntrypoint,
    #[error(
        "the module {name:?}: it takes up to {MAX_MODULE_NAME_BYTES} letters, digits, `-` and `_`"
    )]
    Module { name: String },
    #[error("{count} extra modules: it takes up to {MAX_MODULES}")]
    Modules { count: usize },
    #[error("what the agent has to set up takes {bytes} bytes: it takes up to {MAX_MESSAGE_BYTES}")]
    TooLarge { bytes: usize },
}
