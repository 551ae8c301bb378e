//! The guest's boot, from the kernel's first process on: one step after the other, each of which may
//! fail without the others.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use crate::console::{Faults, describe, say};
use crate::protocol::{AGENT_PORT, Failure, FailureKind, MODULES_PATH, SETUP_PATH, Setup, Wire};
use crate::sys::{self, VsockListener};
use crate::{cgroup, entrypoint, identity, mounts, network, ports, shutdown};

/// How long other processes have to end when the entrypoint has, and the guest with it.
const GRACE: Duration = Duration::from_secs(5);

/// How long the device by which the guest reaches the host may take to be found.
const PATIENCE: Duration = Duration::from_secs(5);

/// A guest that is up, as far as it could be.
pub(crate) struct Booted {
    pub(crate) setup: Setup,
    pub(crate) fault: Option<Failure>,
    /// Where the host calls.
    pub(crate) listener: VsockListener,
}

/// Does what there is to do before the agent is ready.
pub(crate) fn boot() -> Booted {
    let mut faults = Faults::default();
    for failure in mounts::mount_kernels_own() {
        faults.note::<()>(Err(failure));
    }
    let _ = sys::raise_the_limit_of_open_files();
    // Without the agent nobody could say why memory was out.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    load_modules(&mut faults);
    let setup = faults.note(read_setup()).unwrap_or_else(empty_setup);
    // Early: the host may call already, and waits until the agent is ready.
    let listener = VsockListener::bind(AGENT_PORT).and_then(|listener| {
        wait_for_the_way_to_the_host()?;
        Ok(listener)
    });
    let listener = listener.unwrap_or_else(|error| end_unreached(&error));
    faults.note(network::set_loopback_up());
    let is_rooted = match &setup.root {
        Some(root) => faults.note(mounts::switch_root(root)).is_some(),
        None => true,
    };
    if let Err(error) = cgroup::make() {
        say(&format!("no cgroups of version 2, without which no snapshot is consistent: {error}"));
    }
    for mount in &setup.mounts {
        faults.note(mounts::mount_other(mount));
    }
    if let Some(name) = &setup.hostname {
        faults.note(identity::set_hostname(name));
    } else {
        identity::take_hostname(Path::new("/etc/hostname"));
    }
    faults.note(network::configure(&setup.interfaces, &[]));
    faults.note(write_nameservers(&setup.nameservers));
    faults.note(ports::serve(setup.services.clone()));
    if let Some(program) = setup.entrypoint.as_ref().filter(|_| is_rooted) {
        let ends_with_it = setup.end_with_entrypoint;
        let at_its_end = move || {
            if ends_with_it {
                let _ = shutdown::shut_down(GRACE);
            }
        };
        faults.note(entrypoint::start(program, setup.stop_signal, at_its_end));
    }
    Booted { setup, fault: faults.first, listener }
}

/// A driver may find its device a little later than it is loaded.
fn wait_for_the_way_to_the_host() -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    // A kernel that does not say has it, or shows otherwise that it has not.
    while sys::guest_cid().is_ok_and(|cid| cid.is_none()) {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Ends a guest that the host cannot reach, so that nobody waits for it.
fn end_unreached(error: &io::Error) -> ! {
    say(&describe(&Failure::of("listen for the host", error)));
    say(
        "this kernel has no vsock, or none over virtio, which the agent needs: name its modules with \
         AgentConfig::modules_dir, or take one that has it built in",
    );
    let _ = shutdown::shut_down(Duration::ZERO);
    // The kernel panics with its first process.
    process::exit(1)
}

fn empty_setup() -> Setup {
    Setup {
        root: None,
        mounts: Vec::new(),
        hostname: None,
        interfaces: Vec::new(),
        nameservers: Vec::new(),
        services: Vec::new(),
        entrypoint: None,
        stop_signal: None,
        end_with_entrypoint: false,
    }
}

fn read_setup() -> Result<Setup, Failure> {
    let bytes = fs::read(SETUP_PATH);
    let bytes = bytes.map_err(|e| Failure::of_path("read", Path::new(SETUP_PATH), &e))?;
    Setup::from_bytes(&bytes).map_err(|malformed| {
        Failure::new(FailureKind::Invalid, format!("read {SETUP_PATH}: {malformed}"))
    })
}

/// Loads the kernel's modules in the order of their names, and frees their files.
fn load_modules(faults: &mut Faults) {
    let entries = fs::read_dir(MODULES_PATH).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let loaded = File::open(&path).and_then(|module| sys::load_module(&module));
        match loaded {
            // Built into the kernel, or loaded as another's dependency.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => {
                faults.note(result.map_err(|e| Failure::of_path("load", &path, &e)));
            }
        }
        let _ = fs::remove_file(&path);
    }
}

fn write_nameservers(addresses: &[String]) -> Result<(), Failure> {
    if addresses.is_empty() {
        return Ok(());
    }
    let path = Path::new("/etc/resolv.conf");
    let _ = fs::create_dir("/etc");
    let lines: String = addresses.iter().map(|ip| format!("nameserver {ip}\n")).collect();
    mounts::replace_file(path, &lines).map_err(|e| Failure::of_path("write", path, &e))
}
