//! Certificates for the names of sessions, made when a client asks for one.
//!
//! Source: RFC 5280; RFC 9525 §6.3. A single certificate for `*.localhost` would not do: clients do not take a wildcard with
//! but one label behind it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints,
};
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

use super::error::EndpointError;
use crate::session::is_label;

/// Names whose certificates are kept. Clients choose them, so there are as many as they like.
const MAX_KEPT: usize = 256;

/// Signs for one domain, and what is one level below it; no client that trusts it believes it for more.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    domain: String,
    /// For the domain itself, and this machine's own addresses.
    own: Arc<CertifiedKey>,
    made: Mutex<HashMap<String, Arc<CertifiedKey>>>,
}

impl Authority {
    /// A new one, and its certificate in PEM.
    pub(super) fn new(domain: &str) -> Result<(Self, String), EndpointError> {
        let domain = domain.to_ascii_lowercase();
        if !domain.split('.').all(is_label) {
            return Err(EndpointError::Domain { domain });
        }
        let key = KeyPair::generate().map_err(fault)?;
        let params = own_params(&domain);
        let certificate = params.self_signed(&key).map_err(fault)?.pem();
        let issuer = Issuer::new(params, key);
        let names = [domain.clone(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let own = certified(&issuer, names.to_vec())?;
        Ok((Self { issuer, domain, own, made: Mutex::default() }, certificate))
    }

    /// Takes some 100 µs for a name that is not known.
    fn for_name(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        let name = name.to_ascii_lowercase();
        if name == self.domain {
            return Some(Arc::clone(&self.own));
        }
        if !name
            .strip_suffix(&self.domain)
            .and_then(|name| name.strip_suffix('.'))
            .is_some_and(is_label)
        {
            return None;
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(certified) = made.get(&name) {
            return Some(Arc::clone(certified));
        }
        let certified = certified(&self.issuer, vec![name.clone()]);
        let certified = certified.inspect_err(|error| tracing::warn!(%error, name)).ok()?;
        if made.len() >= MAX_KEPT {
            made.clear();
        }
        made.insert(name, Arc::clone(&certified));
        Some(certified)
    }
}

impl ResolvesServerCert for Authority {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match client.server_name() {
            Some(name) => self.for_name(name),
            // It knows an address only.
            None => Some(Arc::clone(&self.own)),
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("domain", &self.domain).finish_non_exhaustive()
    }
}

fn own_params(domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("dormouse, for {domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ours = [
        GeneralSubtree::DnsName(domain.to_owned()),
        GeneralSubtree::IpAddress(CidrSubnet::from_v4_prefix([127, 0, 0, 0], 8)),
        GeneralSubtree::IpAddress(CidrSubnet::from_v6_prefix(1_u128.to_be_bytes(), 128)),
    ];
    params.name_constraints =
        Some(NameConstraints { permitted_subtrees: ours.to_vec(), excluded_subtrees: Vec::new() });
    params
}

fn certified(
    issuer: &Issuer<'_, KeyPair>,
    names: Vec<String>,
) -> Result<Arc<CertifiedKey>, EndpointError> {
    let common = names.first().cloned().unwrap_or_default();
    let mut params = CertificateParams::new(names).map_err(fault)?;
    params.distinguished_name.push(DnType::CommonName, common);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    // With a key of its own it also has a serial number of its own.
    let key = KeyPair::generate().map_err(fault)?;
    let certificate = params.signed_by(&key, issuer).map_err(fault)?;
    let key = PrivateKeyDer::try_from(key.serialize_der());
    let key = key.map_err(|what| EndpointError::SelfSigned { what: what.to_owned() })?;
    let key = any_supported_type(&key)
        .map_err(|error| EndpointError::SelfSigned { what: error.to_string() })?;
    Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key)))
}

fn fault(error: rcgen::Error) -> EndpointError {
    EndpointError::SelfSigned { what: error.to_string() }
}
