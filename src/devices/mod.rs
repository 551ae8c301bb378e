//! The few legacy devices of a PC that guests need: a serial port and ways to end the machine.
//!
//! Each answers the bus, owns its state, and knows nothing of KVM: an interrupt is an eventfd,
//! the end of the guest a report to its latch.

mod i8042;
mod power;
mod pvpanic;
mod serial;
mod state;
mod vmgenid;

pub(crate) use self::i8042::I8042;
pub(crate) use self::power::Power;
pub(crate) use self::pvpanic::Pvpanic;
pub(crate) use self::serial::{Serial, SerialInput};
pub(crate) use self::state::{LegacyError, LegacyState};
pub(crate) use self::vmgenid::{VmGenId, VmGenIdError};
