//! Random bytes of the host.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Up to 256 bytes that nobody can guess. So few come whole, or not at all (getrandom(2)).
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    match getrandom(&mut bytes, GetRandomFlags::empty())? == N {
        true => Ok(bytes),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
