//! A connection to a registry: TCP, and TLS but on this machine itself.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::RegistryError;

/// Where to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) is_tls: bool,
    /// Without the brackets of an address of IPv6.
    pub(super) host: String,
    pub(super) port: u16,
}

impl Place {
    /// For the eyes of a person.
    pub(super) fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub(super) async fn connect(
        &self,
        tls: &Tls,
        patience: Duration,
    ) -> Result<Connection, RegistryError> {
        let fault = |source| RegistryError::Connect { host: self.name(), source };
        let connect = async {
            let stream =
                TcpStream::connect((self.host.as_str(), self.port)).await.map_err(fault)?;
            if !self.is_tls {
                return Ok(Connection::Plain(stream));
            }
            let name = ServerName::try_from(self.host.clone());
            let name = name.map_err(|error| fault(io::Error::other(error)))?;
            let connector = tls.connector().ok_or(RegistryError::NoRoots { host: self.name() })?;
            let stream = connector.connect(name, stream).await.map_err(fault)?;
            Ok(Connection::Tls(Box::new(stream)))
        };
        let silent = || RegistryError::Silent {
            host: self.name(),
            what: "let itself be connected to",
            patience,
        };
        timeout(patience, connect).await.map_err(|_| silent())?
    }
}

/// Whom this machine trusts. It is read when the first connection needs it.
#[derive(Clone, Default)]
pub(super) struct Tls(Arc<std::sync::OnceLock<Option<TlsConnector>>>);

impl Tls {
    fn connector(&self) -> Option<&TlsConnector> {
        self.0.get_or_init(load).as_ref()
    }
}

fn load() -> Option<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let (added, _) =
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if added == 0 {
        return None;
    }
    // Named here: the process's own default is the caller's.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().ok()?;
    let config = config.with_root_certificates(roots).with_no_client_auth();
    Some(TlsConnector::from(Arc::new(config)))
}

pub(super) enum Connection {
    Plain(TcpStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
