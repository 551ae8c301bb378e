//! MicroVMs inside your process.
//!
//! dormouse boots, suspends and clones Linux guests over KVM with a small VMM of its own, in the
//! process that calls it: no daemon, no build service, no file that was not asked for. A VM is a value
//! whose state is its type:
//!
//! ```text
//!                       start               pause                suspend
//!  create ─▶ Created ──────────▶ Running ◀─────────▶ Paused ──────────────▶ Suspended
//!                                 │  ▲     resume     │  ▲                   │     │
//!                                 │  └────────────────│──│──────── resume ───┘     │ into_snapshot
//!                           wait, │                   │  │ restore, fork           ▼
//!                       terminate ▼         terminate ▼  └──────────────────── Snapshot
//!                                    Terminated
//! ```
//!
//! | state | what there is of the VM | how it gets on |
//! | --- | --- | --- |
//! | [`Created`] | memory, devices, a loaded kernel; no instruction has run | [`start`](MicroVm::<Created>::start) |
//! | [`Running`] | threads that run the guest | [`pause`](MicroVm::<Running>::pause), [`suspend`](MicroVm::<Running>::suspend), [`wait`](MicroVm::<Running>::wait), [`shutdown`](MicroVm::<Running>::shutdown), [`terminate`](MicroVm::<Running>::terminate) |
//! | [`Paused`] | all of it, between two instructions | [`resume`](MicroVm::<Paused>::resume), [`snapshot`](MicroVm::<Paused>::snapshot), [`fork`](MicroVm::<Paused>::fork), [`suspend`](MicroVm::<Paused>::suspend), [`terminate`](MicroVm::<Paused>::terminate) |
//! | [`Suspended`] | files, or memory that no VM has: no thread, no descriptor of KVM | [`resume`](MicroVm::<Suspended>::resume), in this process or another; [`into_snapshot`](MicroVm::<Suspended>::into_snapshot), [`terminate`](MicroVm::<Suspended>::terminate) |
//! | [`Terminated`] | how it ended, and what its console said last | |
//!
//! Some arrows are not drawn: a running VM can be suspended at once, a paused one saved as a [`Snapshot`] and go on,
//! and a suspended one terminated.
//!
//! A call that does not fit the state does not compile. One that fails gives the VM back ([`TransitionError`]). A drop ends the
//! guest, but for one that sleeps in files. The whole story, of a guest that boots once and is then a hundred:
//!
//! ```no_run
//! use dormouse::{AgentConfig, Error, Initramfs, Kernel, MicroVm, Snapshot, Suspended, VmConfig};
//!
//! # #[cfg(feature = "agent")]
//! # async fn story() -> Result<(), Error> {
//! let files = Initramfs::builder()
//!     .host_file("bin/busybox", "/bin/busybox") // a static one (Debian: busybox-static)
//!     .symlink("bin/sh", "busybox");
//! let config = VmConfig::new(Kernel::installed()?) // the newest under /boot
//!     .initramfs(files.build()?)
//!     .memory_mib(256)
//!     .agent(AgentConfig::new());
//!
//! let vm = MicroVm::create(config)?.start()?;
//! let agent = vm.agent().await?; // the guest is ready, or here is why not
//! agent.write("/greeting", "hello").await?;
//! let output = agent.exec("busybox", ["cat", "/greeting"]).await?.check()?;
//! assert_eq!(output.text(), "hello");
//!
//! agent.freeze().await?; // clones are told apart before a process goes on
//! let mut base = vm.pause()?;
//! base.snapshot("base")?; // files, for later and for other processes
//! for clone in base.fork(100)? { // now, from memory that all share
//!     let clone = clone.resume()?;
//!     clone.agent().await?.exec("busybox", ["hostname"]).await?;
//! }
//!
//! base.resume()?.suspend("asleep")?; // it sleeps in files, and this handle of it is gone
//! let awake = MicroVm::<Suspended>::open("asleep")?.resume()?; // the VM that it was
//! let ended = awake.shutdown(std::time::Duration::from_secs(10)).await;
//! println!("{}", ended.exit_status());
//! let _another = Snapshot::open("base")?.restore()?.resume()?;
//! # Ok(())
//! # }
//! ```
//!
//! | to | see |
//! | --- | --- |
//! | choose a kernel | [`Kernel`], [`InstalledKernel`], [`BootProtocol`] |
//! | give the guest files and arguments | [`Initramfs`], [`Cmdline`] |
//! | size and shape the machine, give it disks | [`VmConfig`], [`BlockConfig`], [`RateLimit`], [`CpuTemplate`] |
//! | connect it | [`NetConfig`], [`UserNetwork`] |
//! | take memory back from it | [`BalloonConfig`], [`BalloonStatus`] |
//! | run it | [`MicroVm`], [`AnyMicroVm`], [`TransitionError`] |
//! | put it to sleep, and wake it | [`MicroVm::<Running>::suspend`], [`Suspended`], [`SnapshotOptions`], [`SaveProgress`] |
//! | make many of one | [`MicroVm::<Paused>::fork`], [`Snapshot`], [`RestoreOptions`], [`Clock`] |
//! | check, merge and pack snapshots | [`Snapshot::verify`], [`Snapshot::merge`], [`Snapshot::pack`], [`Snapshot::unpack`], [`SnapshotFacts`] |
//! | have one ready | [`Pool`], [`PoolOptions`], [`PreparedShell`] |
//! | have an agent in the guest | [`AgentConfig`], [`RootDisk`], [`Entrypoint`], [`Hook`], [`HostService`] |
//! | have a container image as its root | [`Image`], [`ImageSource`], [`ImageCache`], [`ImageConfig`], [`ImageLimits`], [`OverlayDisk`] |
//! | run commands in it, move its files, reach its ports | [`MicroVm::agent`], [`Agent`], [`Command`], [`Process`] |
//! | start with the application up | [`Template`], [`Ready`] |
//! | have it sleep when nobody needs it, and wake for a request | [`Sessions`], [`Session`], [`SessionPolicy`], [`Metering`] |
#![cfg_attr(
    feature = "endpoint",
    doc = "| serve its ports on the web | [`Endpoint`], [`EndpointOptions`], [`TokenKeys`] (feature `endpoint`) |"
)]
#![cfg_attr(
    not(feature = "endpoint"),
    doc = "| serve its ports on the web | `Endpoint`, `EndpointOptions`, `TokenKeys` (feature `endpoint`) |"
)]
//! | talk to its programs by sockets | [`VsockConfig`], [`Vsock`], [`VsockStream`], [`VsockListener`] |
//! | read what it says, and how it ended | [`Console`], [`ExitStatus`] |
//! | count what it does | [`MicroVm::metrics`], [`DeviceMetrics`], [`cpu_time`](MicroVm::<Running>::cpu_time) |
//! | know what went wrong, and what to do | [`Error`], [`ErrorKind`], [`Host::check`] |
//! | know what it cost | [`Timings`], [`Phase`], and `tracing` spans of the same names |
//!
//! # In someone else's process
//!
//! The library installs no signal handler, touches no terminal, writes to no standard stream,
//! never exits or aborts, and keeps nothing behind: descriptors, mappings and threads of a VM are
//! gone within milliseconds of its drop. One thing ends the process: a file of a [`Snapshot`] that somebody cuts short
//! while VMs stand on it (SIGBUS, as for every file that is mapped).
//!
//! What is async comes with a feature, and is to be called in a tokio runtime with I/O and time; so is
//! `Endpoint::serve`. All other calls need none, and block: microseconds to some milliseconds, but for those that move
//! a guest's memory or disks, unpack a kernel, or wait, which say so. In async code they belong in `spawn_blocking`: calls of
//! [`MicroVm`], [`Snapshot`], [`Pool`] (its drop too), [`Vsock`], [`Kernel`], [`Initramfs`], [`OverlayDisk`], `ImageCache` and
//! `Template`.
//!
//! A child of `fork` that executes no other program can use no VM, of its parent or of its own.
//!
//! Threads are named `dormouse-…`; seccomp confines those that guests reach (vCPUs, devices, disks), and what of yours
//! runs on them (see [`VmConfig::seccomp`]), but no other thread. SIGSTKFLT is sent to vCPU threads, which have it blocked: it is
//! never delivered. A process that uses that signal itself must not send it to the process as a whole.
//!
//! # Running what you do not trust
//!
//! A guest is taken for hostile, its kernel and root included: whatever it does to devices, queues and sockets is bounded in
//! memory and time, and harms no other VM. What is between it and this process is KVM, devices in safe Rust nearly
//! throughout, and seccomp on the threads that it reaches. There is no process of its own to jail, as Firecracker has: whoever
//! breaks out of a guest is this process. So run it as a user, and in a cgroup, that may little more than it has to.
//!
//! - A guest has what it is given. Without [`VmConfig::network`] it reaches no network; by vsock nothing of the host but what
//!   listens there, and the services that its agent was given.
//! - Memory is bounded by the configuration, disks by their size, and processor time by nothing but the cgroup, and by how
//!   long it is let run.
//! - What the agent says is the guest's word: root in it can make up an exit code or an output. It cannot make the host
//!   keep more than the limits of the call.
//! - A deadline is the host's to keep, as a guest's clock is the guest's, and children of a program may go on. Drop the
//!   call, and the VM:
//!
//! ```no_run
//! # #[cfg(feature = "agent")]
//! # mod example {
//! # use std::time::Duration;
//! # use dormouse::{Error, MicroVm, Output, Running};
//! /// Runs a script as nobody, for ten seconds at most; `None` where that did not suffice.
//! async fn sandboxed(vm: MicroVm<Running>, script: &str) -> Result<Option<Output>, Error> {
//!     let agent = vm.agent_timeout(Duration::from_secs(10)).await?;
//!     let command = agent.command("sh").arg("-c").arg(script).user("65534:65534");
//!     let command = command.output_limit(64 << 10).truncate_output(true);
//!     let output = tokio::time::timeout(Duration::from_secs(10), command.output()).await;
//!     drop(vm); // ends the guest, whatever goes on in it
//!     output.ok().transpose()
//! }
//! # }
//! ```
//!
//! # Features
//!
//! - `agent` (default): the agent in the guest, on tokio.
//! - `image` (default): [`Image`], container images as root file systems, and [`Template`], guests that are booted
//!   once and start with their application up.
//! - `session` (default): [`Session`], VMs that sleep when nobody needs them, and wake when somebody does.
//! - `registry`: `Image::pull`, images from registries. It brings TLS (rustls, ring), and so is not there by default.
//! - `endpoint`: `Endpoint`, an HTTP server in front of sessions, with tokens, and TLS where that is wanted. It brings hyper's
//!   server, rustls and PASETO.
//!
//! `image` and `session` bring `agent`, `registry` brings `image`, `endpoint` brings `session`. Without any, the crate
//! is its blocking core, and needs no async runtime.
//!
//! # Versions
//!
//! Semantic versioning; before 1.0 a minor version may break. The oldest compiler is that of `rust-version` in Cargo.toml, 1.95;
//! a newer one is a minor version. Types of tokio 1 and hyper 1 are in the API; a major version of theirs is one
//! of this crate's. What a snapshot's files say of their version, and which versions of the crate read which, is
//! in `docs/snapshot-format.md`.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_docs, unreachable_pub)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

#[cfg(feature = "agent")]
mod agent;
mod arch;
mod boot;
mod bounded;
mod bus;
mod cmdline;
mod compression;
mod config;
mod console;
mod deb;
mod devices;
mod disk;
#[cfg(feature = "endpoint")]
mod endpoint;
mod error;
mod event_loop;
mod exit;
mod file_lock;
mod host;
#[cfg(feature = "image")]
mod image;
mod initramfs;
mod input_file;
mod kernel;
mod kvm;
mod machine;
mod memory;
mod metrics;
mod microvm;
mod modules;
mod phase;
mod pool;
mod protocol;
mod random;
mod seccomp;
#[cfg(feature = "session")]
mod session;
mod snapshot;
mod tap;
#[cfg(feature = "image")]
mod template;
mod timings;
mod virtio;
mod vsock;

#[cfg(feature = "agent")]
pub use agent::{
    Agent, Command, Copied, CopyLimits, DirEntry, FileReader, FileType, FileWriter, GuestStream,
    Metadata, Output, Process, ProcessInput, ProcessOutput, WriteOptions,
};
pub use cmdline::Cmdline;
#[cfg(feature = "agent")]
pub use config::{
    AgentConfig, Entrypoint, Hook, HookName, HostService, InterfaceConfig, MountConfig, RootDisk,
};
pub use config::{
    BalloonConfig, BlockConfig, Clock, CpuTemplate, CpuidRegister, NetConfig, RateLimit,
    RestoreOptions, UserNetwork, VmConfig, VsockConfig,
};
pub use console::Console;
#[cfg(feature = "endpoint")]
pub use endpoint::{
    Awake, Endpoint, EndpointLimits, EndpointOptions, TlsIdentity, Token, TokenClient, TokenKeys,
    TokenPorts, Upstream, UpstreamError, UpstreamFuture, UpstreamStream, Upstreams,
};
pub use error::{Error, ErrorKind};
pub use exit::{ExecFailure, ExitStatus, ProcessStatus};
pub use host::{Host, HostKernel, KvmStatus, Problem, Virtualization};
#[cfg(feature = "image")]
pub use image::{
    ExposedPort, Image, ImageCache, ImageConfig, ImageLimits, ImageProgress, ImageSource,
    ImageStage, OverlayDisk,
};
pub use initramfs::{Initramfs, InitramfsBuilder};
pub use kernel::{BootProtocol, InstalledKernel, Kernel};
pub use metrics::{
    BalloonMetrics, BalloonStats, BalloonStatus, BlockMetrics, DeviceMetrics, EntropyMetrics,
    NetMetrics, VsockMetrics,
};
pub use microvm::{
    AnyMicroVm, Created, MicroVm, Paused, PreparedShell, Running, State, Suspended, Terminated,
    TransitionError,
};
pub use phase::Phase;
pub use pool::{Pool, PoolOptions};
#[cfg(feature = "session")]
pub use session::{
    KeepAwake, Lost, Metering, Session, SessionBody, SessionEvent, SessionEvents, SessionOptions,
    SessionPolicy, SessionReason, SessionState, SessionStream, SessionWatch, Sessions,
};
pub use snapshot::{SaveProgress, SaveStage, Snapshot, SnapshotFacts, SnapshotOptions};
#[cfg(feature = "image")]
pub use template::{Ready, Template, TemplateOptions, TemplateProgress, TemplateStage};
pub use timings::{Timing, Timings};
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    #[cfg(feature = "agent")]
    pub use crate::agent::fuzzing::*;
    pub use crate::disk::fuzzing::*;
    #[cfg(feature = "endpoint")]
    pub use crate::endpoint::fuzzing::*;
    #[cfg(feature = "image")]
    pub use crate::image::fuzzing::*;
    pub use crate::protocol::fuzzing::*;
    pub use crate::snapshot::fuzzing::*;
    pub use crate::virtio::fuzzing::*;
}
pub use vsock::{Connecting, Vsock, VsockListener, VsockStream};

/// The README's code compiles. It shows what is no default, too.
#[cfg(all(doctest, feature = "endpoint"))]
#[doc = include_str!("../README.md")]
struct Readme;
