//! The link to a VM's agent: who answers when it calls, and says who the VM is.
//!
//! A task of the runtime that first asked keeps it: it accepts what the guest opens, until the VM
//! is over. Where that runtime is gone, the next one that asks begins again, and so does the
//! agent, which sees its connection end.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OnceCell, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::AgentError;
use super::calls::Calls;
use super::connection::{Connection, lost, to_async};
use super::patience::within;
use super::pulse::Rhythm;
use super::relay::{Caller, pass_on};
use crate::config::{AgentConfig, HostService, InterfaceConfig};
use crate::error::Error;
use crate::microvm::{CloneIdentity, MicroVm, Running};
use crate::protocol::{
    Failure, FailureKind, Hello, Identity, Opening, RESERVED_PORTS, Renewal, Reply, VERSION,
    Welcome,
};
use crate::random::random;
use crate::vsock::{VsockListener, VsockStream};

/// How long whoever connects may take to say what for.
const OPENING: Duration = Duration::from_secs(10);
/// How long the agent may take to become who it shall be.
const RENEWAL: Duration = Duration::from_secs(60);
/// Connections of the guest at a time, to services and to say hello.
const MAX_CONNECTIONS: usize = 512;
/// More of them, for what comes from where only the agent does.
const AGENT_PLACES: usize = 8;

/// What is known of the agent.
#[derive(Clone, Debug)]
pub(super) enum Knowledge {
    /// It has not called, or is about to call again.
    Nothing,
    Ready,
    /// It cannot make the guest ready.
    Fault(Failure),
    Version(u32),
}

/// The link to a VM's agent.
#[derive(Debug)]
pub(super) struct Link {
    calls: Calls,
    config: AgentConfig,
    /// What makes a clone another VM; the same however often its agent calls.
    renewal: Option<Renewal>,
    knowledge: watch::Receiver<Knowledge>,
    keeper: JoinHandle<()>,
    /// What a VM that slept does once.
    woken: Option<OnceCell<()>>,
}

impl Link {
    /// The VM's one.
    pub(super) fn of(vm: &MicroVm<Running>) -> Result<Arc<Self>, Error> {
        let config = vm.agent_config().ok_or(AgentError::NotConfigured)?;
        let slot = vm.agent_slot();
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let link = kept.clone().and_then(|link| link.downcast::<Self>().ok());
        let renewal = match link {
            Some(link) if !link.keeper.is_finished() => return Ok(link),
            Some(link) => link.renewal.clone(),
            None => renewal(vm)?,
        };
        // The old one gives the listener back first.
        *kept = None;
        let new = Arc::new(Self::new(vm, config, renewal)?);
        *kept = Some(Arc::clone(&new) as Arc<dyn Any + Send + Sync>);
        Ok(new)
    }

    fn new(
        vm: &MicroVm<Running>,
        config: &AgentConfig,
        renewal: Option<Renewal>,
    ) -> Result<Self, Error> {
        check_runtime()?;
        let listener = Descriptor(vm.agent_listener()?);
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe; this descriptor is owned, and stays the same"
        )]
        let listener = AsyncFd::new(listener).map_err(AgentError::Socket)?;
        let calls = Calls::new(vm.vsock()?);
        let (report, knowledge) = watch::channel(Knowledge::Nothing);
        let host = Arc::new(Host {
            calls: calls.clone(),
            config: config.clone(),
            renewal: renewal.clone(),
            identity: vm.clone_identity().cloned(),
            greeted: AtomicBool::new(false),
            report,
        });
        let keeper = tokio::spawn(keep(listener, host));
        Ok(Self {
            calls,
            config: config.clone(),
            renewal,
            knowledge,
            keeper,
            woken: vm.is_woken().then(OnceCell::new),
        })
    }

    pub(super) fn calls(&self) -> &Calls {
        &self.calls
    }

    pub(super) fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// Does what a VM does that slept and woke; once.
    pub(super) async fn on_waking(
        &self,
        hook: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        match &self.woken {
            Some(done) => done.get_or_try_init(|| hook).await.copied(),
            None => Ok(()),
        }
    }

    /// Waits until the VM is over.
    pub(super) async fn over(&self) {
        let mut knowledge = self.knowledge.clone();
        while knowledge.changed().await.is_ok() {}
    }

    /// Waits until the agent is ready, or never will be.
    pub(super) async fn ready(&self) -> Result<(), Error> {
        let mut knowledge = self.knowledge.clone();
        let known = knowledge.wait_for(|known| !matches!(known, Knowledge::Nothing)).await;
        match known.as_deref() {
            Ok(Knowledge::Ready) => Ok(()),
            Ok(Knowledge::Fault(failure)) => Err(AgentError::Setup(failure.clone()).into()),
            Ok(Knowledge::Version(theirs)) => Err(AgentError::Version { theirs: *theirs }.into()),
            Ok(Knowledge::Nothing) | Err(_) => Err(lost(self.calls.vsock())),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// That this is within a runtime.
pub(super) fn check_runtime() -> Result<(), AgentError> {
    tokio::runtime::Handle::try_current().map(drop).map_err(|_| AgentError::NoRuntime)
}

/// Who a clone is from now on; none for a VM that is the same as before.
fn renewal(vm: &MicroVm<Running>) -> Result<Option<Renewal>, Error> {
    let Some(clone) = vm.clone_identity() else { return Ok(None) };
    Ok(Some(Renewal {
        machine_id: random().map_err(AgentError::Socket)?,
        hostname: clone.hostname.clone(),
        interfaces: clone.interfaces.iter().map(InterfaceConfig::to_wire).collect(),
    }))
}

fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

struct Descriptor(VsockListener);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Accepts what the guest opens, until the VM is over.
async fn keep(listener: AsyncFd<Descriptor>, host: Arc<Host>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(mut ready) = listener.readable().await else { return };
        match ready.get_inner().0.try_accept_from() {
            Ok(None) => ready.clear_ready(),
            // One more than there may be is closed at once; some places are kept for the agent, whoever has all others.
            Ok(Some((_, port))) if connections.len() >= room(port) => {}
            Ok(Some((stream, port))) => {
                connections.spawn(Arc::clone(&host).answer(stream, port));
            }
            Err(_) => return,
        }
    }
}

/// As many connections as there may be before one from this port.
fn room(port: u32) -> usize {
    let for_agent = if RESERVED_PORTS.contains(&port) { AGENT_PLACES } else { 0 };
    MAX_CONNECTIONS + for_agent
}

/// A connection to a service.
trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl Duplex for TcpStream {}
impl Duplex for UnixStream {}

/// The host, for what the guest opens.
struct Host {
    calls: Calls,
    config: AgentConfig,
    renewal: Option<Renewal>,
    /// Who wants to know that the clone has been told.
    identity: Option<Arc<CloneIdentity>>,
    /// An agent holds the line: who else says hello is none.
    greeted: AtomicBool,
    report: watch::Sender<Knowledge>,
}

impl Host {
    /// What comes from this port of the guest.
    async fn answer(self: Arc<Self>, stream: VsockStream, port: u32) {
        let Ok(socket) = to_async(stream.into()) else { return };
        let mut connection = Connection::opened(socket);
        let opening = within(OPENING, connection.reader.message::<Opening>()).await;
        // What says nothing that is understood is closed.
        match opening {
            Some(Ok(Some(Opening::Hello(hello)))) if RESERVED_PORTS.contains(&port) => {
                self.hello(&hello, connection).await;
            }
            Some(Ok(Some(Opening::Service(name)))) => self.service(&name, connection).await,
            _ => {}
        }
    }

    /// Tells the agent who it is, and holds the line.
    async fn hello(&self, hello: &Hello, mut connection: Connection) {
        if self.greeted.swap(true, Ordering::AcqRel) {
            return;
        }
        let known = self.greet(hello, &mut connection).await;
        if let Some(known) = &known {
            self.report.send_replace(known.clone());
        }
        match known {
            Some(Knowledge::Ready) => {
                if let Some(identity) = &self.identity {
                    identity.set_told();
                }
                let calls = &self.calls;
                let is_paused = || calls.vsock().is_paused();
                calls.pulse().hold(&mut connection, Rhythm::USUAL, is_paused).await;
                // Of a VM that has ended, or of an agent that does not answer.
                calls.forget();
                self.report.send_replace(Knowledge::Nothing);
            }
            // It would call again at once, and say the same.
            Some(Knowledge::Fault(_)) => drop(connection.reader.next().await),
            Some(Knowledge::Version(_) | Knowledge::Nothing) | None => {}
        }
        self.greeted.store(false, Ordering::Release);
    }

    async fn greet(&self, hello: &Hello, connection: &mut Connection) -> Option<Knowledge> {
        let identity = Identity {
            wall_clock_ns: wall_clock_ns(),
            seed: random().ok()?,
            renewal: self.renewal.clone(),
        };
        let welcome = Welcome { version: VERSION, identity };
        connection.writer.message(&welcome).await.ok()?;
        if hello.version != VERSION {
            return Some(Knowledge::Version(hello.version));
        }
        let answer = within(RENEWAL, connection.reader.message::<Reply>()).await;
        match (answer, &hello.fault) {
            (Some(Ok(Some(Reply::Done))), None) => Some(Knowledge::Ready),
            (Some(Ok(Some(Reply::Done))), Some(fault)) => Some(Knowledge::Fault(fault.clone())),
            (Some(Ok(Some(Reply::Failed(failure)))), _) => Some(Knowledge::Fault(failure)),
            _ => None,
        }
    }

    /// Whether the guest has become who it is now, which is waited for. Before that the programs of a clone speak
    /// for another VM.
    async fn is_renewed(&self) -> bool {
        let mut knowledge = self.report.subscribe();
        let known = knowledge.wait_for(|known| !matches!(known, Knowledge::Nothing));
        match within(RENEWAL, known).await.as_ref().map(|known| known.as_deref()) {
            Some(Ok(Knowledge::Ready)) => true,
            // What it lacks is something else.
            Some(Ok(Knowledge::Fault(_))) => self.renewal.is_none(),
            _ => false,
        }
    }

    /// Passes a program of the guest on to a service that it may use.
    async fn service(&self, name: &str, mut connection: Connection) {
        if !self.is_renewed().await {
            return;
        }
        let opened = match self.config.services.get(name).map(|port| &port.service) {
            Some(HostService::Tcp(address)) => {
                TcpStream::connect(address).await.map(|stream| Box::new(stream) as Box<dyn Duplex>)
            }
            Some(HostService::Unix(path)) => {
                UnixStream::connect(path).await.map(|stream| Box::new(stream) as Box<dyn Duplex>)
            }
            None => Err(io::ErrorKind::PermissionDenied.into()),
        };
        match opened {
            Ok(mut service) => {
                if connection.writer.message(&Reply::Done).await.is_ok()
                    && let Ok((mut guest, _)) = connection.into_stream()
                {
                    pass_on(&mut guest, &mut service, Caller::Heard).await;
                }
            }
            Err(error) => {
                let kind = match error.kind() {
                    io::ErrorKind::PermissionDenied => FailureKind::NotAllowed,
                    _ => FailureKind::Refused,
                };
                let errno = error.raw_os_error().unwrap_or(0);
                let what = "the service of the host".to_owned();
                let failed = Reply::Failed(Failure { kind, errno, what });
                let _ = connection.writer.message(&failed).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
