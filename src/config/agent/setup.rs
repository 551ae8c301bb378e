//! The part of the configuration that the agent itself reads.

use super::signal::signal;
use super::{AgentConfig, Entrypoint, InterfaceConfig, MountConfig, Overlay, RootDisk};
use crate::protocol::{self, Bytes, Interface, Mount, Program, Root, Service, Setup};

/// PATH of a program that is given none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl AgentConfig {
    /// What the agent has to do before it is ready.
    pub(crate) fn setup(&self) -> Setup {
        let services = self.services.iter();
        Setup {
            root: self.root.as_ref().map(RootDisk::to_wire),
            mounts: self.mounts.iter().map(MountConfig::to_wire).collect(),
            hostname: self.hostname.clone(),
            interfaces: self.interfaces.iter().map(InterfaceConfig::to_wire).collect(),
            nameservers: self.nameservers.clone(),
            services: services
                .map(|(name, service)| Service { name: name.clone(), port: service.port })
                .collect(),
            entrypoint: self.entrypoint.as_ref().map(Entrypoint::to_wire),
            stop_signal: self.entrypoint.as_ref().and_then(Entrypoint::stop_signal_number),
            end_with_entrypoint: self.end_with_entrypoint,
        }
    }
}

/// The number of a disk that there is.
fn number(disk: usize) -> u32 {
    u32::try_from(disk).unwrap_or(u32::MAX)
}

impl RootDisk {
    fn to_wire(&self) -> Root {
        let overlay = match self.overlay {
            Overlay::None => protocol::Overlay::None,
            Overlay::ReadOnly => protocol::Overlay::ReadOnly,
            Overlay::Memory(bytes) => protocol::Overlay::Memory(bytes),
            Overlay::Disk(disk) => protocol::Overlay::Disk(number(disk)),
        };
        Root { disk: number(self.disk), fs_type: self.fs_type.clone(), overlay }
    }
}

impl MountConfig {
    fn to_wire(&self) -> Mount {
        let Self { disk, path, fs_type, read_only } = self;
        let path = Bytes::from(path.as_str());
        Mount { disk: number(*disk), path, fs_type: fs_type.clone(), read_only: *read_only }
    }
}

impl InterfaceConfig {
    /// As the agent is told of it.
    pub(crate) fn to_wire(&self) -> Interface {
        Interface { addresses: self.addresses.clone(), gateways: self.gateways.clone() }
    }
}

impl Entrypoint {
    fn stop_signal_number(&self) -> Option<i32> {
        self.stop_signal.as_deref().and_then(signal)
    }

    fn to_wire(&self) -> Program {
        let bytes = |text: &String| Bytes::from(text.as_str());
        let mut env: Vec<_> =
            self.env.iter().map(|(name, value)| (bytes(name), bytes(value))).collect();
        if !self.env.contains_key("PATH") {
            env.push((Bytes::from("PATH"), Bytes::from(DEFAULT_PATH)));
        }
        Program {
            argv: self.argv.iter().map(bytes).collect(),
            env,
            home: true,
            cwd: self.cwd.as_ref().map(bytes),
            user: self.user.clone(),
        }
    }
}
