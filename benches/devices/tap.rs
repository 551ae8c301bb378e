//! Frames from a guest to a tap, beside the same frames written to a tap by one thread, from as
//! many buffers.
//!
//! The taps are in a network of this process's own, up, and nobody takes the frames.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use dormouse::NetConfig;

use crate::report::{Bar, Metric, Unit};
use crate::virtio_guest::{Driver, Work};
use crate::{Guest, rates};

/// `struct virtio_net_hdr` of a frame that is finished.
const HEADER: [u8; 12] = [0; 12];
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// Moves this process, which has one thread yet, to a network of its own. Where that is forbidden
/// there are no taps to measure.
pub fn enter_network() -> io::Result<()> {
    // SAFETY: neither call has memory arguments.
    let entered = unsafe {
        libc::unshare(libc::CLONE_NEWNET) == 0
            || libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) == 0
    };
    if entered { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub fn metrics() -> io::Result<Vec<Metric>> {
    let sizes = [("1,500 B", 1500, 16 << 10), ("64 KiB", 65_500, 1 << 10)];
    sizes.into_iter().map(|(name, bytes, batch)| metric(name, bytes, batch)).collect()
}

fn metric(name: &str, bytes: u32, batch: u64) -> io::Result<Metric> {
    let name = format!("tap, frames of {name} from the guest");
    let work = Work::Send { queue: 1, header: &HEADER };
    let driver = Driver { device: 0, work, buffer_bytes: bytes, depth: 128, batch };
    let (ours, alone) = (tap("guest0")?, tap("alone0")?);
    let mut guest = Guest::new(&driver, |config| config.network(NetConfig::tap_fd(ours)));
    let mut alone = File::from(alone);
    let mut frame = HEADER.to_vec();
    frame.resize(HEADER.len() + bytes as usize, 0);
    let frames = vec![frame; usize::from(driver.depth)];
    let mib = (batch * u64::from(bytes)) as f64 / 1048576.0;
    Ok(rates(
        &name,
        Unit::MibPerSecond,
        mib,
        Some(Bar::AtLeast(0.6)),
        || guest.batch(|| ()),
        || {
            let begin = Instant::now();
            for frame in frames.iter().cycle().take(batch as usize) {
                assert_eq!(alone.write(frame).expect("a frame"), frame.len());
            }
            begin.elapsed()
        },
    ))
}

/// A new tap that is up.
fn tap(name: &str) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero is an ifreq of no interface.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let check = |result: libc::c_int| match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let header = HEADER.len() as libc::c_int;
    // SAFETY: the arguments are an ifreq and an int, borrowed for their calls.
    unsafe {
        check(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &request))?;
        check(libc::ioctl(tun.as_raw_fd(), TUNSETVNETHDRSZ as _, &header))?;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the descriptor is new, and the argument an ifreq.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        let socket = OwnedFd::from_raw_fd(socket);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
    }
    Ok(tun.into())
}
