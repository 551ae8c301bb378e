//! VMs of any state in one collection.

use super::{Created, MicroVm, Paused, Running, State, Suspended, Terminated};
use crate::console::Console;
use crate::timings::Timings;

/// A [`MicroVm`] in whatever state it is: for maps and queues, where one type is needed. A
/// `match` gives the typed VM back.
///
/// ```
/// use std::collections::HashMap;
/// use dormouse::AnyMicroVm;
///
/// fn pause_all(vms: &mut HashMap<String, AnyMicroVm>) {
///     for (name, vm) in std::mem::take(vms) {
///         let now = match vm {
///             AnyMicroVm::Running(vm) => match vm.pause() {
///                 Ok(paused) => paused.into(),
///                 Err(ended) => ended.vm.into(),
///             },
///             other => other,
///         };
///         vms.insert(name, now);
///     }
/// }
/// ```
#[derive(Debug)]
#[must_use = "dropping a `MicroVm` ends its guest, unless it sleeps in files"]
#[allow(missing_docs)]
pub enum AnyMicroVm {
    Created(MicroVm<Created>),
    Running(MicroVm<Running>),
    Paused(MicroVm<Paused>),
    Suspended(MicroVm<Suspended>),
    Terminated(MicroVm<Terminated>),
}

macro_rules! any {
    ($($state:ident)*) => {
        $(impl From<MicroVm<$state>> for AnyMicroVm {
            fn from(vm: MicroVm<$state>) -> Self {
                Self::$state(vm)
            }
        })*

        impl AnyMicroVm {
            /// The name of the state that the VM is in.
            pub fn state_name(&self) -> &'static str {
                match self { $(Self::$state(_) => $state::NAME,)* }
            }

            /// See [`MicroVm::console`].
            pub fn console(&self) -> &Console {
                match self { $(Self::$state(vm) => vm.console(),)* }
            }

            /// See [`MicroVm::timings`].
            pub fn timings(&self) -> Timings {
                match self { $(Self::$state(vm) => vm.timings(),)* }
            }
        }
    };
}

any! { Created Running Paused Suspended Terminated }
