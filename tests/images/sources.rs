//! The same image is the same root, byte for byte, wherever it comes from and however it is packed.

use std::fs;
use std::ops::ControlFlow;
use std::process::Command;
use std::sync::{Arc, Mutex};

use dormouse::{ErrorKind, Image, ImageStage};

use crate::registry::{NAME, Registry, SESAME, skopeo_copy};
use crate::{Scratch, debian_image, guest_root, unpacked};

fn oci(tag: &str) -> String {
    format!("oci:{}:{tag}", debian_image::layout().display())
}

fn bytes(image: &Image) -> Vec<u8> {
    fs::read(image.path()).unwrap()
}

#[track_caller]
fn assert_same(image: &Image, other: &Image) {
    assert_eq!(image.path().file_name(), other.path().file_name());
    assert!(bytes(image) == bytes(other), "other bytes");
    assert_eq!(image.config(), other.config());
}

#[test]
fn an_image_is_the_same_in_a_layout_in_archives_and_in_a_registry() {
    let scratch = Scratch::new("sources");
    let from_layout = Image::open(debian_image::layout()).name("nginx");
    let from_layout = unpacked(from_layout, scratch.0.join("cache")).unwrap();
    assert_eq!(from_layout.config().stop_signal, Some(3));
    assert_eq!(from_layout.config().exposed_ports[0].port, 80);
    let (archive, docker) = (scratch.text("oci.tar"), scratch.text("docker.tar"));
    skopeo_copy(&oci("nginx"), &format!("oci-archive:{archive}"), &[]);
    skopeo_copy(&oci("nginx"), &format!("docker-archive:{docker}:nginx:1"), &[]);
    let whole = scratch.text("layout.tar");
    let tar = Command::new(guest_root().join("bin/busybox"))
        .args(["tar", "-cf", &whole, "-C"])
        .arg(debian_image::layout())
        .arg(".")
        .status();
    assert!(tar.unwrap().success());
    let registry = Registry::start(&scratch.0.join("registry"), false);
    registry.push(&oci("nginx"), "web/nginx:1", &[]);
    // As Docker's tools push it, and with layers in zstd.
    registry.push(&oci("nginx"), "web/nginx:docker", &["--format", "v2s2"]);
    let zstd = ["--dest-compress-format", "zstd", "--format", "oci"];
    registry.push(&format!("docker-archive:{docker}"), "web/nginx:zstd", &zstd);
    let pull = |tag: &str| {
        Image::pull(format!("{}/web/nginx:{tag}", registry.host)).docker_config("/nowhere")
    };
    let pulled = unpacked(pull("1"), scratch.0.join("pulled")).unwrap();
    assert_eq!(pulled.digest(), from_layout.digest());
    assert_same(&pulled, &from_layout);
    let by_digest = format!("{}/web/nginx@{}", registry.host, pulled.digest().unwrap());
    let others = [
        Image::open(archive),
        Image::open(&docker).name("nginx:1"),
        Image::open(whole).name("nginx"),
        pull("docker"),
        pull("zstd"),
        Image::pull(by_digest).docker_config("/nowhere"),
    ];
    for (number, source) in others.into_iter().enumerate() {
        let image = unpacked(source, scratch.0.join(format!("cache-{number}"))).unwrap();
        assert_same(&image, &from_layout);
    }
}

#[test]
fn one_root_serves_images_of_the_same_layers() {
    let scratch = Scratch::new("shared");
    let open = |tag: &str| Image::open(debian_image::layout()).name(tag);
    let nginx = unpacked(open("nginx"), scratch.0.join("cache")).unwrap();
    let python = unpacked(open("python"), scratch.0.join("cache")).unwrap();
    assert_eq!(nginx.path(), python.path());
    assert_ne!(nginx.config(), python.config());
    assert_eq!(python.config().working_dir.as_deref(), Some("/srv"));
}

#[test]
fn a_registry_that_asks_who_it_is_gets_the_login_in_dockers_configuration() {
    let scratch = Scratch::new("login");
    let registry = Registry::start(&scratch.0.join("registry"), true);
    registry.push(&oci("busybox"), "busybox:1", &[]);
    let docker_config = |auth: &str| {
        let path = scratch.0.join("config.json");
        fs::write(&path, format!(r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#, registry.host))
            .unwrap();
        path
    };
    let source = || Image::pull(format!("{}/busybox:1", registry.host));
    let cache = scratch.0.join("cache");
    // ali:close sesame
    let wrong = unpacked(source().docker_config(docker_config("YWxpOmNsb3NlIHNlc2FtZQ==")), &cache);
    let error = wrong.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Image);
    assert!(error.to_string().contains("docker login"), "{error}");
    assert!(unpacked(source().docker_config("/nowhere"), &cache).is_err());
    // ali:open sesame
    let path = docker_config("YWxpOm9wZW4gc2VzYW1l");
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let watched = source().docker_config(path).progress(move |progress| {
        seen.lock().unwrap().push(progress);
        ControlFlow::Continue(())
    });
    let image = unpacked(watched, &cache).unwrap();
    assert_eq!(image.config().cmd, ["sh"]);
    // How far a layer is, of how much.
    let stages = stages.lock().unwrap();
    let last = stages.iter().rfind(|progress| progress.stage == ImageStage::Download(0)).unwrap();
    assert_eq!(Some(last.bytes), last.total_bytes);
    assert!(last.bytes > 500_000, "{last:?}");
    let login = source().docker_config("/nowhere").login(NAME, SESAME);
    assert_same(&unpacked(login, scratch.0.join("other")).unwrap(), &image);
}
