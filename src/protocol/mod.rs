//! What the host and the agent in its guest say to each other: the one description, compiled into
//! both. It imports nothing but the standard library, since the agent is built without any other.
//!
//! The transport is vsock, and every call has a connection to itself, which vsock multiplexes, and
//! to which it gives its own flow control:
//!
//! - The agent connects to the host's port [`HOST_PORT`] when it is up, and again whenever that
//!   connection ends, as it does in a VM that was restored. It comes from one of [`RESERVED_PORTS`], which
//!   no program but root's can have, so that none else passes for it. It says [`Hello`]; the host answers
//!   [`Welcome`], with who this VM is now; the agent makes it so, and says [`Reply::Done`]. The
//!   connection stays open as long as both live. On it the host may ask whether the agent is alive
//!   ([`Line`]); nothing else is said.
//! - The host connects to the guest's port [`AGENT_PORT`] and says a [`Call`], in a frame of a channel of its
//!   own. What comes then, and in which direction, is written at each call. Either side ends a call by
//!   closing. Where a call has come to its end, the host may say the next one on the same connection, which spares
//!   both a new one. The agent does not close one that waits for that; what the host said before it knew of
//!   the end, such as input of a program that is no more, the agent reads up to the call, and throws away.
//! - A program of the guest that connects to a port of its loopback which stands for a service of
//!   the host is passed on by the agent, on a connection to [`HOST_PORT`] that begins with
//!   [`Opening::Service`]. After the answer it carries the bytes of both.
//!
//! Bytes are cut into frames ([`Frame`]), and messages are written as [`Wire`] says. Both sides take
//! what comes for hostile: lengths are bounded before anything is allocated, and what cannot be
//! read is [`Malformed`], which ends the connection.
//!
//! A change of any message changes [`VERSION`]. [`Hello`] and [`Welcome`] alone begin the same way
//! in all versions, so that two that do not fit can say so: those from version 7 on, which say hello from
//! [`RESERVED_PORTS`].

#![allow(dead_code, unused_imports, reason = "each side uses its half")]

mod frame;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod messages;
mod wire;

#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

pub(crate) use self::frame::{
    Channel, Decoder, Frame, HEADER_BYTES, MAX_DATA_BYTES, MAX_FAILURE_BYTES, MAX_MESSAGE_BYTES,
    MAX_OPENING_BYTES,
};
pub(crate) use self::messages::*;
pub(crate) use self::wire::{Bytes, Malformed, Wire};

/// The version of everything here.
pub(crate) const VERSION: u32 = 7;

/// The port of the host at which agents call. Below 1,024, as the agent's own, so that nobody but
/// the guest's root can take it.
pub(crate) const HOST_PORT: u32 = 1000;

/// The port of the guest at which the agent is called.
pub(crate) const AGENT_PORT: u32 = 1000;

/// Ports of the guest that Linux gives nobody but those who have CAP_NET_BIND_SERVICE.
pub(crate) const RESERVED_PORTS: RangeInclusive<u32> = 1..=1023;

/// Where the agent finds its [`Setup`] in its initramfs, as a [`Wire`] message without a frame.
pub(crate) const SETUP_PATH: &str = "/dormouse/setup";

/// Where it finds the modules of its kernel: files that it loads in the order of their names.
pub(crate) const MODULES_PATH: &str = "/dormouse/modules";

/// How much of a stream may be under way, unless its reader says that it has taken some
/// ([`Control::Credit`]).
pub(crate) const WINDOW_BYTES: usize = 256 << 10;

/// How much more of a program's output comes when the program has ended, whether its reader takes any or not:
/// what a pipe holds. So a program that is killed while it waits for its reader has an end.
pub(crate) const LAST_BYTES: usize = 64 << 10;
