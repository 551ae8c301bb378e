//! What whoever talks to the guest's agent needs of the VM: where the agent calls, who the VM is, and a
//! place for what they say to each other.
//!
//! A VM that was restored from a snapshot is a clone: it has to become another one than those that come
//! from the same memory. One that slept, and was woken by [`Suspended`](super::Suspended), is the VM that it was.

#![cfg_attr(
    not(feature = "agent"),
    allow(dead_code, reason = "without the feature, nobody talks to one")
)]

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{MicroVm, Running};
use crate::config::{AgentConfig, InterfaceConfig, RestoreOptions};
use crate::error::Error;
use crate::snapshot::CloneNames;
use crate::vsock::VsockListener;

/// Where the connection to the agent is kept, whatever that is: all handles of a VM share it, it stays over
/// a pause, and is empty in a VM that was restored or woken.
pub(crate) type AgentSlot = Mutex<Option<Arc<dyn Any + Send + Sync>>>;

/// What a VM keeps for the conversation with its agent.
#[derive(Debug, Default)]
pub(super) struct AgentContact {
    slot: Arc<AgentSlot>,
    identity: Option<Arc<CloneIdentity>>,
}

/// What a clone does not share with the VM that it comes from.
#[derive(Debug)]
pub(crate) struct CloneIdentity {
    /// None: as it was.
    pub(crate) hostname: Option<String>,
    /// Addresses in place of all those of before; none: as they were.
    pub(crate) interfaces: Vec<InterfaceConfig>,
    told: AtomicBool,
}

impl CloneIdentity {
    /// One that the guest does not know yet.
    pub(super) fn new(CloneNames { hostname, interfaces }: CloneNames) -> Self {
        Self { hostname, interfaces, told: AtomicBool::new(false) }
    }

    /// Whether the guest has made it its own: it must not be told to become another one again.
    pub(crate) fn is_told(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// The guest has made it its own. From now on the VM is nobody's clone: one that sleeps and is woken
    /// stays who it is.
    pub(crate) fn set_told(&self) {
        self.told.store(true, Ordering::Release);
    }
}

impl AgentContact {
    /// That of a VM that was restored.
    pub(super) fn of_clone(options: &RestoreOptions) -> Self {
        let (hostname, interfaces) = (options.hostname.clone(), options.interfaces.clone());
        let identity = CloneIdentity::new(CloneNames { hostname, interfaces });
        Self { slot: Arc::default(), identity: Some(Arc::new(identity)) }
    }

    /// That of a VM that slept.
    pub(super) fn woken(identity: Option<Arc<CloneIdentity>>) -> Self {
        Self { slot: Arc::default(), identity }
    }

    /// Who it is, where it is a clone that went to sleep before its guest knew.
    pub(super) fn into_untold(self) -> Option<Arc<CloneIdentity>> {
        self.identity.filter(|identity| !identity.is_told())
    }

    /// The same, for the files that it sleeps in.
    pub(super) fn untold_names(&self) -> Option<CloneNames> {
        let untold = self.identity.as_ref().filter(|identity| !identity.is_told())?;
        let (hostname, interfaces) = (untold.hostname.clone(), untold.interfaces.clone());
        Some(CloneNames { hostname, interfaces })
    }
}

impl MicroVm<Running> {
    /// The agent's configuration, where the VM has one.
    pub(crate) fn agent_config(&self) -> Option<&AgentConfig> {
        self.state.machine.config().agent.as_ref()
    }

    /// Where the agent calls. Its calls wait, also those from before; a listener may be dropped and had
    /// again. It is ready when a connection waits, or the VM is over.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where the VM has no agent.
    pub(crate) fn agent_listener(&self) -> Result<VsockListener, Error> {
        self.state.machine.agent_listener()
    }

    /// The place for the connection to the agent.
    pub(crate) fn agent_slot(&self) -> &Arc<AgentSlot> {
        &self.state.origin.agent.slot
    }

    /// Who this VM is, where it was restored: it has to be told, once.
    pub(crate) fn clone_identity(&self) -> Option<&Arc<CloneIdentity>> {
        self.state.origin.agent.identity.as_ref()
    }

    /// Whether it slept and woke as the VM that it was.
    pub(crate) fn is_woken(&self) -> bool {
        self.state.origin.snapshot.is_some() && !self.is_clone()
    }

    /// Whether it is a clone, whose guest may or may not know.
    pub(crate) fn is_clone(&self) -> bool {
        self.clone_identity().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_that_slept_before_it_knew_is_still_one_and_has_an_empty_slot() {
        let mut options = RestoreOptions::new();
        options.hostname = Some("clone".into());
        let clone = AgentContact::of_clone(&options);
        *clone.slot.lock().unwrap() = Some(Arc::new(7));
        let woken = AgentContact::woken(clone.into_untold());
        assert!(woken.slot.lock().unwrap().is_none());
        let identity = woken.identity.as_ref().unwrap();
        assert_eq!(identity.hostname.as_deref(), Some("clone"));
        assert!(!identity.is_told());

        identity.set_told();
        assert!(AgentContact::woken(woken.into_untold()).identity.is_none());
    }

    #[test]
    fn a_vm_that_booted_is_nobodys_clone() {
        assert!(AgentContact::default().identity.is_none());
        assert!(AgentContact::default().into_untold().is_none());
    }
}
