//! What a snapshot keeps of the legacy devices, as plain data.
//!
//! The serial port is all. The keyboard controller's reset line, the power registers and pvpanic
//! remember nothing: what is written to them happens, or does not.

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

/// The legacy devices that have a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LegacyState {
    pub(crate) serial: SerialState,
}

/// Why a state cannot be restored: it comes from a file that anybody may have written.
#[derive(Debug, ThisError)]
pub(crate) enum LegacyError {
    #[error("the serial port has {found} bytes of input, of which {max} are possible")]
    Input { found: usize, max: usize },
    #[error("cannot raise the serial port's interrupt")]
    Interrupt(#[source] std::io::Error),
}

/// The serial port: its registers, the input in its FIFO, and the input that waits behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    pub(super) baud_divisor: u16,
    pub(super) interrupt_enable: u8,
    pub(super) interrupt_identification: u8,
    pub(super) line_control: u8,
    pub(super) line_status: u8,
    pub(super) modem_control: u8,
    pub(super) modem_status: u8,
    pub(super) scratch: u8,
    pub(super) fifo: Vec<u8>,
    pub(super) input: Vec<u8>,
}

impl SerialState {
    pub(super) fn new(uart: vm_superio::SerialState, input: Vec<u8>) -> Self {
        Self {
            baud_divisor: u16::from_le_bytes([uart.baud_divisor_low, uart.baud_divisor_high]),
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            input,
        }
    }

    /// The part that is the UART's.
    pub(super) fn uart(&self) -> vm_superio::SerialState {
        let [baud_divisor_low, baud_divisor_high] = self.baud_divisor.to_le_bytes();
        vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo.clone(),
        }
    }
}
