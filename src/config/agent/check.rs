//! Checks every value.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use super::error::{
    AgentConfigError, MAX_COMMAND_BYTES, MAX_DEADLINE, MAX_FS_TYPE_BYTES, MAX_HOSTNAME_BYTES,
    MAX_MODULE_NAME_BYTES, MAX_MODULES, MAX_PATH_BYTES, MAX_SERVICE_NAME_BYTES,
    MAX_SOCKET_PATH_BYTES, MIN_DEADLINE,
};
use super::signal::signal;
use super::{
    AgentConfig, Entrypoint, Hook, HookAction, HookName, HostService, InterfaceConfig,
    MachineConfig, Overlay, ServicePort,
};
use crate::bounded::MOST_IN_LIST;
use crate::config::Writes;
use crate::protocol::{MAX_MESSAGE_BYTES, Wire};

type Checked = Result<(), AgentConfigError>;

impl AgentConfig {
    /// Checks every value, for an agent in this machine.
    pub(crate) fn check(&self, machine: &MachineConfig) -> Checked {
        self.check_disks(machine)?;
        self.check_network(machine)?;
        self.check_services()?;
        self.hooks.iter().try_for_each(|(name, hook)| hook.check(*name))?;
        match &self.entrypoint {
            Some(entrypoint) => entrypoint.check()?,
            None if self.end_with_entrypoint => return Err(AgentConfigError::NoEntrypoint),
            None => {}
        }
        let count = self.modules.len();
        if count > MAX_MODULES {
            return Err(AgentConfigError::Modules { count });
        }
        if let Some(name) =
            self.modules.iter().find(|name| !is_name(name, MAX_MODULE_NAME_BYTES, "-_"))
        {
            return Err(AgentConfigError::Module { name: name.clone() });
        }
        let bytes = self.setup().to_bytes().len();
        if bytes > MAX_MESSAGE_BYTES { Err(AgentConfigError::TooLarge { bytes }) } else { Ok(()) }
    }

    fn check_disks(&self, machine: &MachineConfig) -> Checked {
        let mut disks = Disks { machine, mounted: HashSet::new() };
        let mut fs_types = Vec::new();
        if let Some(root) = &self.root {
            let writes = root.overlay == Overlay::None;
            disks.mount("the root", root.disk, writes)?;
            match root.overlay {
                Overlay::Disk(disk) => disks.mount("the overlay", disk, true)?,
                Overlay::Memory(bytes) if bytes > machine.memory_bytes => {
                    let memory_bytes = machine.memory_bytes;
                    return Err(AgentConfigError::OverlayTooLarge { bytes, memory_bytes });
                }
                _ => {}
            }
            fs_types.extend(&root.fs_type);
        }
        let mut paths = HashSet::new();
        for mount in &self.mounts {
            disks.mount("a mounted disk", mount.disk, !mount.read_only)?;
            let path = &mount.path;
            if !is_path(path) || Path::new(path).components().count() == 1 {
                return Err(AgentConfigError::Path { what: "a mounted disk", path: path.clone() });
            }
            if !paths.insert(Path::new(path)) {
                return Err(AgentConfigError::PathTwice { path: path.clone() });
            }
            fs_types.extend(&mount.fs_type);
        }
        match fs_types.into_iter().find(|name| !is_name(name, MAX_FS_TYPE_BYTES, "-_.")) {
            Some(name) => Err(AgentConfigError::FsType { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn check_network(&self, machine: &MachineConfig) -> Checked {
        if let Some(name) = self.hostname.as_ref().filter(|name| !is_hostname(name)) {
            return Err(AgentConfigError::Hostname { name: name.clone() });
        }
        let (interfaces, networks) = (self.interfaces.len(), machine.networks.len());
        if interfaces > networks {
            return Err(AgentConfigError::Interfaces { interfaces, networks });
        }
        self.interfaces.iter().try_for_each(InterfaceConfig::check)?;
        check_count("name servers", &self.nameservers)?;
        self.nameservers.iter().try_for_each(|text| check_address("a name server", text))
    }

    fn check_services(&self) -> Checked {
        let mut ports = HashSet::new();
        for (name, ServicePort { port, service }) in &self.services {
            let printable = name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
            if !(1..=MAX_SERVICE_NAME_BYTES).contains(&name.len()) || !printable {
                return Err(AgentConfigError::ServiceName { name: name.clone() });
            }
            if *port == 0 {
                return Err(AgentConfigError::NoPort { what: format!("the service {name:?}") });
            }
            if !ports.insert(*port) {
                return Err(AgentConfigError::PortTwice { port: *port });
            }
            service.check(name)?;
        }
        Ok(())
    }
}

/// The disks that are mounted so far.
struct Disks<'a> {
    machine: &'a MachineConfig,
    mounted: HashSet<usize>,
}

impl Disks<'_> {
    fn mount(&mut self, what: &'static str, disk: usize, writes: bool) -> Checked {
        let blocks = &self.machine.blocks;
        let count = blocks.len();
        let block = blocks.get(disk).ok_or(AgentConfigError::NoDisk { what, disk, count })?;
        if writes && block.writes == Writes::Refused {
            return Err(AgentConfigError::ReadOnlyDisk { what, disk });
        }
        match self.mounted.insert(disk) {
            true => Ok(()),
            false => Err(AgentConfigError::DiskTwice { disk }),
        }
    }
}

impl InterfaceConfig {
    pub(super) fn check(&self) -> Checked {
        check_count("addresses of an interface", &self.addresses)?;
        check_count("gateways of an interface", &self.gateways)?;
        if let Some(text) = self.addresses.iter().find(|text| !is_address_with_prefix(text)) {
            return Err(AgentConfigError::InterfaceAddress { text: text.clone() });
        }
        self.gateways.iter().try_for_each(|text| check_address("a gateway", text))
    }
}

/// What is longer could be saved, and not be read again.
fn check_count(what: &'static str, list: &[String]) -> Checked {
    match list.len() {
        count if count > MOST_IN_LIST => Err(AgentConfigError::TooMany { what, count }),
        _ => Ok(()),
    }
}

impl HostService {
    fn check(&self, name: &str) -> Checked {
        match self {
            Self::Tcp(address) if address.port() == 0 => Err(AgentConfigError::NoPort {
                what: format!("what is behind the service {name:?}"),
            }),
            Self::Tcp(_) => Ok(()),
            Self::Unix(path) => {
                let bytes = path.as_os_str().as_bytes();
                let fits = bytes.len() <= MAX_SOCKET_PATH_BYTES && !bytes.contains(&0);
                match path.is_absolute() && fits {
                    true => Ok(()),
                    false => Err(AgentConfigError::Socket { path: path.clone() }),
                }
            }
        }
    }
}

impl Hook {
    fn check(&self, hook: HookName) -> Checked {
        let deadline = self.deadline;
        if !(MIN_DEADLINE..=MAX_DEADLINE).contains(&deadline) {
            return Err(AgentConfigError::Deadline { hook, deadline });
        }
        match &self.action {
            HookAction::Command(argv) => check_argv(&format!("the hook {}", hook.as_str()), argv),
            HookAction::Http { port: 0, .. } => {
                Err(AgentConfigError::NoPort { what: format!("the hook {}", hook.as_str()) })
            }
            HookAction::Http { path: Some(path), .. } => {
                let printable = path.bytes().all(|byte| byte.is_ascii_graphic());
                match path.starts_with('/') && printable && path.len() <= MAX_PATH_BYTES {
                    true => Ok(()),
                    false => Err(AgentConfigError::HookPath { hook, path: path.clone() }),
                }
            }
            HookAction::Http { path: None, .. } => Ok(()),
        }
    }
}

impl Entrypoint {
    fn check(&self) -> Checked {
        check_argv("the entrypoint", &self.argv)?;
        let bad = |(name, value): &(&String, &String)| {
            name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
        };
        if let Some((name, _)) = self.env.iter().find(bad) {
            return Err(AgentConfigError::Variable { name: name.clone() });
        }
        if let Some(path) = self.cwd.as_ref().filter(|path| !is_path(path)) {
            return Err(AgentConfigError::Path {
                what: "the working directory",
                path: path.clone(),
            });
        }
        if let Some(user) = self.user.as_ref().filter(|user| !is_user(user)) {
            return Err(AgentConfigError::User { user: user.clone() });
        }
        match self.stop_signal.as_ref().filter(|text| signal(text).is_none()) {
            Some(text) => Err(AgentConfigError::StopSignal { text: text.clone() }),
            None => Ok(()),
        }
    }
}

fn check_argv(what: &str, argv: &[String]) -> Checked {
    if argv.first().is_none_or(String::is_empty) {
        return Err(AgentConfigError::NoProgram { what: what.to_owned() });
    }
    let bytes: usize = argv.iter().map(|argument| argument.len() + 1).sum();
    match bytes > MAX_COMMAND_BYTES || argv.iter().any(|argument| argument.contains('\0')) {
        true => Err(AgentConfigError::Argument { what: what.to_owned() }),
        false => Ok(()),
    }
}

fn check_address(what: &'static str, text: &str) -> Checked {
    match text.parse::<IpAddr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(AgentConfigError::Address { what, text: text.to_owned() }),
    }
}

fn is_address_with_prefix(text: &str) -> bool {
    let Some((address, prefix)) = text.split_once('/') else { return false };
    // As a number is written: no sign, no zeros before it.
    let prefix = prefix.parse::<u8>().ok().filter(|bits| bits.to_string() == prefix);
    match (address.parse::<IpAddr>(), prefix) {
        (Ok(IpAddr::V4(_)), Some(bits)) => bits <= 32,
        (Ok(IpAddr::V6(_)), Some(bits)) => bits <= 128,
        _ => false,
    }
}

fn is_hostname(name: &str) -> bool {
    let good = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_HOSTNAME_BYTES && name.split('.').all(good)
}

/// ASCII letters, digits and these others.
fn is_name(name: &str, max_bytes: usize, others: &str) -> bool {
    (1..=max_bytes).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
}

fn is_path(path: &str) -> bool {
    let upwards = Path::new(path).components().any(|part| part == Component::ParentDir);
    path.starts_with('/') && path.len() <= MAX_PATH_BYTES && !path.contains('\0') && !upwards
}

fn is_user(user: &str) -> bool {
    let good = |name: &str| {
        !name.is_empty()
            && name.len() <= 256
            && !name.contains(|c: char| c.is_control() || c.is_whitespace())
    };
    let (user, group) =
        user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    good(user) && group.is_none_or(|group| good(group) && !group.contains(':'))
}
