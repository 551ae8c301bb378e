//! Servers in container images, from where images come from to the answer of a guest.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Output;

use dormouse::{
    AgentConfig, Cmdline, Image, ImageCache, OverlayDisk, Ready, TemplateOptions, VmConfig,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::{Guest, block_on};
use crate::registry::{NAME, Registry, SESAME, skopeo_copy};
use crate::{PATIENCE, Release, Scratch, debian_image, programs};

fn config(release: Release) -> VmConfig {
    VmConfig::new(release.kernel())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .memory_mib(256)
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

fn e2fsck(disk: &Path, options: &[&str]) -> Output {
    programs::command("e2fsck").args(options).arg(disk).output().unwrap()
}

#[test]
fn pythons_server_answers_from_an_archive() {
    block_on(async {
        let scratch = Scratch::new("python");
        let archive = scratch.0.join("python.tar");
        let from = format!("oci:{}:python", debian_image::layout().display());
        skopeo_copy(&from, &format!("oci-archive:{}", archive.display()), &[]);
        // Of the same layers as others, so that they are unpacked once.
        let cache = ImageCache::open(debian_image::cache()).unwrap();
        let image = Image::open(archive).unpack(&cache).await.unwrap();
        assert_eq!(image.path(), debian_image::unpacked("python").await.path());
        // What it writes goes to a disk of its own.
        let own = OverlayDisk::create(scratch.0.join("own"), 1 << 30).unwrap();
        let agent = AgentConfig::new().root(image.root(1).overlay_disk(0));
        let config = config(Release::Linux6_12).block(own).agent(agent);
        let guest = Guest::boot(image.configure(config)).await;
        let answer = get(&guest, 8000, "/").await;
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with("served by Python\n"), "{answer}");
        let room = guest.sh("df -m / | tail -n 1 | busybox awk '{ print $2 }'").await;
        assert!((900..=1024).contains(&room.trim().parse::<u32>().unwrap()), "{room}");
        guest.sh("dd if=/dev/zero of=/srv/more bs=1M count=40 && sync").await;
        let own = scratch.0.join("own");
        let written = std::fs::metadata(&own).unwrap().blocks() * 512;
        assert!((40 << 20..100 << 20).contains(&written), "{written}");
        // One that is ended in the middle leaves a journal, which makes the disk right again.
        guest.sh("(while true; do echo more >>/srv/log; done) & sleep 1; sync").await;
        guest.kill();
        let replayed = e2fsck(&own, &["-p"]);
        assert!(matches!(replayed.status.code(), Some(0 | 1)), "{replayed:?}");
        assert!(String::from_utf8_lossy(&replayed.stdout).contains("recovering journal"));
        let checked = e2fsck(&own, &["-f", "-n"]);
        assert!(checked.status.success(), "{checked:?}");
    });
}

#[test]
fn nginx_answers_from_a_registry_and_from_a_template_of_it() {
    block_on(async {
        let scratch = Scratch::new("nginx");
        let registry = Registry::start(&scratch.0.join("registry"), true);
        registry.push(&format!("oci:{}:nginx", debian_image::layout().display()), "nginx:1", &[]);
        let cache = ImageCache::open(scratch.0.join("cache")).unwrap();
        let image = Image::pull(format!("{}/nginx:1", registry.host))
            .login(NAME, SESAME)
            .unpack(&cache)
            .await
            .unwrap();
        let guest = Guest::boot(image.configure(config(Release::Linux6_1))).await;
        let answer = get(&guest, 80, "/").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\nServer: nginx/"), "{answer}");
        assert!(answer.contains("<h1>Welcome to nginx!</h1>"), "{answer}");
        let options = TemplateOptions::new(scratch.0.join("templates"))
            .timeout(PATIENCE)
            .ready(Ready::Port(80));
        let template = image.template(config(Release::Linux6_1), &options).await.unwrap();
        let vm = template.start().await.unwrap();
        let guest = Guest::of(vm).await;
        assert_eq!(without_date(&get(&guest, 80, "/").await), without_date(&answer));
    });
}

fn without_date(answer: &str) -> Vec<&str> {
    answer.lines().filter(|line| !line.starts_with("Date:")).collect()
}
