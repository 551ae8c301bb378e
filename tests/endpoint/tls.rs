//! TLS to clients: who is shown what, and which version of HTTP is agreed on.

use std::sync::Arc;

use dormouse::{ErrorKind, TlsIdentity};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::client::{exchange, read, request};
use crate::{Setup, open, run};

/// Connects, with trust in this certificate.
async fn connect(
    setup: &Setup,
    trusted: &str,
    name: &'static str,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(trusted.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(setup.endpoint.address()).await?;
    TlsConnector::from(Arc::new(config)).connect(name.try_into().unwrap(), stream).await
}

#[test]
fn clients_agree_on_http_2_or_http_1_by_tls() {
    run(async {
        let identity = TlsIdentity::self_signed("localhost").unwrap();
        let setup = Setup::new(open().tls(identity.clone())).await;
        assert!(setup.endpoint.url("one").starts_with("https://one.localhost:"));
        let trusted = identity.certificate_pem();
        for protocols in [&["h2", "http/1.1"][..], &["h2"]] {
            let stream = connect(&setup, trusted, "one.localhost", protocols).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            let builder = http2::Builder::new(TokioExecutor::new());
            let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let answer = sender.send_request(request("https://one.localhost/hello")).await;
            assert_eq!(read(answer.unwrap()).await.1, "hello\n");
        }
        for protocols in [&["http/1.1"][..], &[]] {
            let stream = connect(&setup, trusted, "127.0.0.1", protocols).await.unwrap();
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let (_, seen) = read(sender.send_request(request("/seen")).await.unwrap()).await;
            let seen: Value = serde_json::from_slice(&seen).unwrap();
            assert_eq!(seen["headers"]["x-forwarded-proto"], "https");
        }
        assert!(connect(&setup, trusted, "one.localhost", &["spdy/3"]).await.is_err());
        assert!(connect(&setup, trusted, "one.example", &[]).await.is_err());
        let other = TlsIdentity::self_signed("localhost").unwrap();
        assert!(connect(&setup, other.certificate_pem(), "one.localhost", &[]).await.is_err());
        // Without TLS, nobody is served.
        let plain =
            exchange(setup.endpoint.address(), "GET / HTTP/1.1\r\nHost: one.localhost\r\n\r\n");
        assert!(!plain.await.contains("HTTP/1.1"));
        let stream = connect(&setup, trusted, "one.localhost", &[]).await;
        assert!(stream.is_ok());
    });
}

#[test]
fn an_endpoint_shows_the_certificate_that_it_was_given() {
    run(async {
        let names = vec!["*.vms.example".to_owned(), "vms.example".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let identity = TlsIdentity::from_pem(&certificate, &key).unwrap();
        assert_eq!(format!("{identity:?}"), "TlsIdentity");
        let setup = Setup::new(open().domain("vms.example").tls(identity)).await;
        let stream = connect(&setup, &certificate, "one.vms.example", &[]).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = request("/hello");
        request.headers_mut().insert("host", "one.vms.example".parse().unwrap());
        assert_eq!(read(sender.send_request(request).await.unwrap()).await.1, "hello\n");

        let other = rcgen::generate_simple_self_signed(vec!["a".to_owned()]).unwrap();
        let other_key = other.signing_key.serialize_pem();
        for (certificate, key) in
            [("", key.as_str()), (&certificate, ""), ("x", "y"), (&certificate, &other_key)]
        {
            let error = TlsIdentity::from_pem(certificate, key).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Config);
        }
    });
}
