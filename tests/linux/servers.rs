//! Servers in container images, from where images come from to the answer of a guest.

use dormouse::{Cmdline, Image, VmConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::{Guest, block_on};
use crate::{Release, debian_image};

/// A guest of this image, in which its program is started.
async fn guest(release: Release, image: &Image) -> Guest {
    let config = VmConfig::new(release.kernel())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .memory_mib(256);
    Guest::boot(image.configure(config)).await
}

/// What the server says about `path`, as soon as there is one.
async fn get(guest: &Guest, port: u16, path: &str) -> String {
    let mut stream = guest.connect(port).await;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn pythons_server_answers_from_an_image_of_debians_packages() {
    block_on(async {
        let image = debian_image::unpacked("python").await;
        let guest = guest(Release::Linux6_12, &image).await;
        let answer = get(&guest, 8000, "/").await;
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with("served by Python\n"), "{answer}");
        // What other tests want of it.
        let modules =
            "python3 -c 'import grpc, websockets; print(grpc.__name__, websockets.__name__)'";
        assert_eq!(guest.sh(modules).await, "grpc websockets\n");
    });
}
