//! A VM that is over.

use super::{MicroVm, Terminated};
use crate::exit::ExitStatus;

impl MicroVm<Terminated> {
    /// How the guest ended.
    pub fn exit_status(&self) -> &ExitStatus {
        &self.state.status
    }
}
