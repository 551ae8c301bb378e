//! A tap: a network interface of the host whose frames a program reads and writes.
//!
//! Each frame has a `virtio_net_hdr` of 12 bytes before it, so that checksums and segmentation
//! can be left undone where both ends agree. Source: the kernel's
//! Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

const DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: libc::c_int = 12;
/// What a descriptor must be: frames, without a header of the kernel's own, but virtio's.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why there is no tap.
#[derive(Debug, ThisError)]
pub(crate) enum TapError {
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    #[error(
        "{name:?} is no name of a network interface: it takes 1 to 15 bytes without / and space"
    )]
    Name { name: String },
    #[error("cannot attach to the tap {name}")]
    Attach { name: String, source: io::Error },
    #[error("the descriptor is no tap")]
    NoTap(#[source] io::Error),
    #[error("the descriptor's tap has the flags {found:#x}, of which {FLAGS:#x} are needed")]
    Flags { found: libc::c_int },
    #[error("cannot duplicate the tap's descriptor")]
    Clone(#[source] io::Error),
    #[error("cannot set up the tap")]
    SetUp(#[source] io::Error),
}

impl From<TapError> for Error {
    fn from(error: TapError) -> Self {
        let fix = match &error {
            TapError::Open(cause) if cause.kind() == io::ErrorKind::NotFound => {
                "load the kernel's module (modprobe tun), or pass the device to the container"
                    .to_owned()
            }
            TapError::Open(_) => format!("give this user access to {DEVICE}"),
            TapError::Name { .. } => {
                return Self::new(ErrorKind::Config, error);
            }
            TapError::Attach { name, source } => match source.raw_os_error() {
                Some(libc::EPERM) => format!(
                    "make one for this user (ip tuntap add dev {name} mode tap user $(id -un)), or \
                     give this program CAP_NET_ADMIN"
                ),
                Some(libc::EBUSY) => {
                    "another program uses it: give each VM a tap of its own".into()
                }
                Some(libc::EINVAL) => {
                    format!("there is an interface {name} that is no tap, or one of many queues")
                }
                _ => "see whether the interface exists (ip link)".to_owned(),
            },
            TapError::NoTap(_) | TapError::Flags { .. } => {
                "open it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR".to_owned()
            }
            TapError::Clone(_) => "raise the limit of open files (ulimit -n)".to_owned(),
            TapError::SetUp(_) => "it takes Linux 3.9 or later".to_owned(),
        };
        Self::new(ErrorKind::Network, error).fix(fix)
    }
}

/// Whether frames can pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    Up,
    /// The interface is down, or gone.
    Down,
}

/// What may be left undone in frames to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    pub(crate) checksum: bool,
    pub(crate) tso4: bool,
    pub(crate) tso6: bool,
    pub(crate) ecn: bool,
}

/// An open tap. One that came into being by it goes with it.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to the tap of this name, and makes one where there is none.
    pub(crate) fn open(name: &str) -> Result<Self, TapError> {
        let is_name = |byte: u8| !byte.is_ascii_whitespace() && !matches!(byte, b'/' | b':' | 0);
        // A % would have the kernel choose a number.
        let good = (1..libc::IFNAMSIZ).contains(&name.len())
            && name.bytes().all(|byte| is_name(byte) && byte != b'%')
            && !matches!(name, "." | "..");
        if !good {
            return Err(TapError::Name { name: name.to_owned() });
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(DEVICE).map_err(TapError::Open)?;
        let mut request = interface_request();
        for (byte, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *byte = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        checked(result).map_err(|source| TapError::Attach { name: name.to_owned(), source })?;
        Self::set_up(file)
    }

    /// A tap that is open already.
    pub(crate) fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = interface_request();
        // SAFETY: TUNGETIFF writes an ifreq, which `request` is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &mut request) };
        checked(result).map_err(TapError::NoTap)?;
        // SAFETY: the kernel has written the flags, and any value is one of a short.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let found = libc::c_int::from(flags as u16);
        if found & FLAGS != FLAGS {
            return Err(TapError::Flags { found });
        }
        // SAFETY: F_GETFL and F_SETFL take and give integers.
        let result = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        checked(result).map_err(TapError::SetUp)?;
        Self::set_up(file)
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        // SAFETY: TUNSETVNETHDRSZ reads an integer.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &HEADER_BYTES) };
        checked(result).map_err(TapError::SetUp)?;
        // The kernel's default: a tap that is not writable is then one that is down.
        let unlimited = libc::c_int::MAX;
        // SAFETY: TUNSETSNDBUF reads an integer.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETSNDBUF, &unlimited) };
        checked(result).map_err(TapError::SetUp)?;
        let tap = Self { file };
        tap.set_offloads(Offloads::default()).map_err(TapError::SetUp)?;
        Ok(tap)
    }

    /// Says what the kernel may leave undone in frames that are read.
    ///
    /// # Errors
    ///
    /// The kernel does not know one of them, or the tap is gone.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bit = |on: bool, bit: libc::c_uint| if on { bit } else { 0 };
        let bits = bit(offloads.checksum, libc::TUN_F_CSUM)
            | bit(offloads.tso4, libc::TUN_F_TSO4)
            | bit(offloads.tso6, libc::TUN_F_TSO6)
            | bit(offloads.ecn, libc::TUN_F_TSO_ECN);
        // SAFETY: TUNSETOFFLOAD takes an integer.
        let result = unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits))
        };
        checked(result)
    }

    /// Whether frames can pass now. The descriptor becomes writable when they can again.
    pub(crate) fn carrier(&self) -> Carrier {
        let mut poll =
            libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, borrowed for the call, which does not wait.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        // A tap that is up takes frames without end; one that is gone is in error.
        if ready == 1 && poll.revents == libc::POLLOUT { Carrier::Up } else { Carrier::Down }
    }

    /// Another descriptor of the same tap.
    pub(crate) fn try_clone(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn interface_request() -> libc::ifreq {
    // SAFETY: all-zero is an ifreq of no interface.
    unsafe { std::mem::zeroed() }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
