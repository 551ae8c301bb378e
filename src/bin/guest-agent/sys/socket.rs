//! Sockets of families that the standard library does not know: vsock and netlink.

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use super::{checked, ioctl, owned};

/// The host's address (`VMADDR_CID_HOST`).
pub(crate) const CID_HOST: u32 = 2;

const CID_ANY: u32 = u32::MAX;
const AF_VSOCK: u16 = 40;
const AF_NETLINK: c_int = 16;
const SOCK_STREAM: c_int = 1;
const SOCK_RAW: c_int = 3;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const NETLINK_ROUTE: c_int = 0;
const MSG_NOSIGNAL: c_int = 0x4000;
const SOL_SOCKET: c_int = 1;
const SO_LINGER: c_int = 13;
const IOCTL_VM_SOCKETS_GET_LOCAL_CID: c_ulong = 0x7b9;

/// `struct sockaddr_vm` (vsock(7)).
#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

/// `struct linger` (socket(7)).
#[repr(C)]
struct Linger {
    is_on: c_int,
    seconds: c_int,
}

const SOCKADDR_BYTES: u32 = size_of::<SockaddrVm>() as u32;

impl SockaddrVm {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AF_VSOCK, reserved: 0, port, cid, zero: [0; 4] }
    }
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const SockaddrVm, length: u32) -> c_int;
    fn connect(socket: c_int, address: *const SockaddrVm, length: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn send(socket: c_int, bytes: *const c_void, length: usize, flags: c_int) -> isize;
    fn setsockopt(
        socket: c_int,
        level: c_int,
        name: c_int,
        value: *const c_void,
        length: u32,
    ) -> c_int;
    fn accept4(socket: c_int, address: *mut SockaddrVm, length: *mut u32, flags: c_int) -> c_int;
}

fn vsock() -> io::Result<OwnedFd> {
    // SAFETY: it takes integers, and gives a new descriptor.
    owned(unsafe { socket(c_int::from(AF_VSOCK), SOCK_STREAM | SOCK_CLOEXEC, 0) })
}

/// Connects to a port of the host. The stream is no UNIX socket, but reads, writes and shuts down
/// as one.
pub(crate) fn connect_vsock(cid: u32, port: u32) -> io::Result<UnixStream> {
    connect_socket(vsock()?, cid, port)
}

/// As [`connect_vsock`], from this port of the guest.
pub(crate) fn connect_vsock_from(own_port: u32, cid: u32, port: u32) -> io::Result<UnixStream> {
    let socket = vsock()?;
    bind_socket(&socket, own_port)?;
    connect_socket(socket, cid, port)
}

fn bind_socket(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let address = SockaddrVm::new(CID_ANY, port);
    // SAFETY: the kernel reads the address, which is as long as is said.
    checked(unsafe { bind(socket.as_raw_fd(), &address, SOCKADDR_BYTES) })?;
    Ok(())
}

fn connect_socket(socket: OwnedFd, cid: u32, port: u32) -> io::Result<UnixStream> {
    let address = SockaddrVm::new(cid, port);
    // SAFETY: the kernel reads the address, which is as long as is said.
    checked(unsafe { connect(socket.as_raw_fd(), &address, SOCKADDR_BYTES) })?;
    Ok(UnixStream::from(socket))
}

/// The guest's own address, by which the host knows it: none where no device leads to the host. With vsock's
/// loopback alone a connection to the host would end in the guest itself.
///
/// # Errors
///
/// The kernel does not say.
pub(crate) fn guest_cid() -> io::Result<Option<u32>> {
    let vsock = File::open("/dev/vsock")?;
    let mut cid: c_uint = CID_ANY;
    // SAFETY: the kernel writes one integer.
    checked(unsafe { ioctl(vsock.as_raw_fd(), IOCTL_VM_SOCKETS_GET_LOCAL_CID, &mut cid) })?;
    Ok((CID_HOST + 1..CID_ANY).contains(&cid).then_some(cid))
}

/// Whether the other side of a stream has closed it for what this one sends, too.
pub(crate) fn takes_no_more(stream: impl AsFd) -> bool {
    // SAFETY: no byte is read.
    unsafe { send(stream.as_fd().as_raw_fd(), ptr::null(), 0, MSG_NOSIGNAL) < 0 }
}

/// Has a TCP stream end with a reset when it is closed: what was sent is not all.
pub(crate) fn reset_when_closed(stream: impl AsFd) {
    let linger = Linger { is_on: 1, seconds: 0 };
    let (fd, bytes) = (stream.as_fd().as_raw_fd(), size_of::<Linger>() as u32);
    // SAFETY: the kernel reads the structure, which is as long as is said.
    unsafe { setsockopt(fd, SOL_SOCKET, SO_LINGER, (&raw const linger).cast(), bytes) };
}

pub(crate) struct VsockListener(OwnedFd);

impl VsockListener {
    pub(crate) fn bind(port: u32) -> io::Result<Self> {
        let socket = vsock()?;
        bind_socket(&socket, port)?;
        // SAFETY: it takes integers.
        checked(unsafe { listen(socket.as_raw_fd(), 1024) })?;
        Ok(Self(socket))
    }

    /// The next connection, and the CID that it comes from.
    pub(crate) fn accept(&self) -> io::Result<(UnixStream, u32)> {
        let mut address = SockaddrVm::new(0, 0);
        let mut length = SOCKADDR_BYTES;
        // SAFETY: the kernel writes at most `length` bytes of the address.
        let socket =
            owned(unsafe { accept4(self.0.as_raw_fd(), &mut address, &mut length, SOCK_CLOEXEC) })?;
        Ok((UnixStream::from(socket), address.cid))
    }
}

/// The kernel's configuration of networks (rtnetlink(7)): requests are written, answers are read.
pub(crate) struct NetlinkSocket(pub(crate) File);

impl NetlinkSocket {
    pub(crate) fn open() -> io::Result<Self> {
        // SAFETY: it takes integers, and gives a new descriptor.
        let socket = owned(unsafe { socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE) })?;
        Ok(Self(File::from(socket)))
    }
}
