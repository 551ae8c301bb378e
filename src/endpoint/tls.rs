//! TLS to clients: a certificate that is given, or one that is made here for clients that are told to trust it.

use std::fmt;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WantsServerCert;
use tokio_rustls::rustls::{ConfigBuilder, ServerConfig};

use super::authority::Authority;
use super::error::EndpointError;
use crate::error::Error;

/// What an endpoint shows itself by to clients that come by TLS. `Debug` does not show its key.
#[derive(Clone)]
pub struct TlsIdentity {
    config: Arc<ServerConfig>,
    certificate: String,
}

impl TlsIdentity {
    /// A chain of certificates, the endpoint's own first, and its private key, in PEM.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where they are no such thing, or do not belong together.
    pub fn from_pem(certificates: &str, key: &str) -> Result<Self, Error> {
        let fault = |what: String| EndpointError::Certificate { what };
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(certificates.as_bytes()).collect();
        let chain = chain.map_err(|error| fault(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
        let key = key.map_err(|error| fault(error.to_string()))?;
        let config = builder()?.with_single_cert(chain, key);
        let config = config.map_err(|error| fault(error.to_string()))?;
        Ok(Self::new(config, certificates.to_owned()))
    }

    fn new(mut config: ServerConfig, certificate: String) -> Self {
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { config: Arc::new(config), certificate }
    }

    /// An authority that is made now, and certificates of it as they are asked for: for a domain, each name one level below it, and
    /// the addresses 127.0.0.1 and ::1. Nobody trusts it who was not given [`certificate_pem`](Self::certificate_pem), and
    /// who was does not trust it for anything else.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where the domain is none.
    pub fn self_signed(domain: &str) -> Result<Self, Error> {
        let (authority, certificate) = Authority::new(domain)?;
        Ok(Self::new(builder()?.with_cert_resolver(Arc::new(authority)), certificate))
    }

    /// The certificates, or that of the authority, for clients to trust.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.config))
    }
}

/// With a cryptography of its own: the process's default is the caller's.
fn builder() -> Result<ConfigBuilder<ServerConfig, WantsServerCert>, EndpointError> {
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions();
    let config = config.map_err(|error| EndpointError::Certificate { what: error.to_string() })?;
    Ok(config.with_no_client_auth())
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsIdentity")
    }
}
