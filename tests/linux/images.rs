//! Container images as the roots of guests, beside what umoci makes of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dormouse::{AgentConfig, Cmdline, Image, ImageCache, VmConfig};

use crate::agent::{Guest, block_on};
use crate::{Release, Scratch, guest_root, guest_tool, programs};

/// Runs a program of the testbed to its end.
#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
}

fn umoci(scratch: &Scratch, args: &[&str]) {
    run(programs::command("umoci").current_dir(&scratch.0).args(args));
}

/// The capability to bind to any port, of version 2.
const CAPABILITY: &str = "01000002 00040000 00000000 00000000 00000000";

fn set_xattr(file: &Path, name: &str, hex: &str) {
    run(Command::new(guest_tool()).arg("set-xattr").arg(file).args([name, hex]));
}

/// An image of busybox in two layers, made by umoci, in an OCI layout. It is made as root, as an image is.
fn busybox_image(scratch: &Scratch) -> PathBuf {
    umoci(scratch, &["init", "--layout", "layout"]);
    umoci(scratch, &["new", "--image", "layout:box"]);
    umoci(scratch, &["unpack", "--image", "layout:box", "one"]);
    let root = scratch.0.join("one/rootfs");
    for directory in ["bin", "etc", "usr/share", "tmp", "var/lib/app", "opt/old"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy(guest_root().join("bin/busybox"), root.join("bin/busybox")).unwrap();
    fs::copy(guest_tool(), root.join("bin/guest-tool")).unwrap();
    let files = [
        ("etc/passwd", "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/var/lib/app:/bin/sh\n"),
        ("etc/group", "root:x:0:\nweb:x:1001:\nlog:x:4:web\n"),
        ("opt/old/file", "hidden by the upper layer"),
        ("usr/share/text", "from the lower layer\n"),
    ];
    for (path, text) in files {
        fs::write(root.join(path), text).unwrap();
    }
    let script = "set -e; cd \"$1\"; b=bin/busybox; chmod 755 $b; \
         for name in sh cat id ls stat env sha256sum find sort httpd sleep printf; do ln -s busybox bin/$name; done; \
         $b ln usr/share/text usr/share/same; $b chmod 1777 tmp; $b chown 1000:1001 var/lib/app; \
         $b chmod 4711 usr/share/text; $b mkfifo var/fifo; $b mknod var/null c 1 3; \
         $b touch -d '2001-02-03 04:05:06' etc/passwd; $b ln -s /etc/passwd usr/absolute";
    let busybox = guest_root().join("bin/busybox");
    run(Command::new(&busybox).args(["sh", "-c", script, "sh"]).arg(&root));
    // cap_net_bind_service, as setcap(8) writes it; and rights of one more user, as setfacl(1) does.
    set_xattr(&root.join("bin/cat"), "security.capability", CAPABILITY);
    set_xattr(&root.join("usr/share/text"), "security.capability", CAPABILITY);
    set_xattr(&root.join("var/lib/app"), "user.made-by", "6d65");
    set_xattr(&root.join("opt/old"), "user.hidden", "00");
    let access = "02000000 01000600ffffffff 02000400e9030000 04000400ffffffff 10000600ffffffff 20000400ffffffff";
    set_xattr(&root.join("etc/group"), "system.posix_acl_access", access);
    umoci(scratch, &["repack", "--image", "layout:box", "one"]);
    umoci(scratch, &["unpack", "--image", "layout:box", "two"]);
    let root = scratch.0.join("two/rootfs");
    fs::remove_dir_all(root.join("opt")).unwrap();
    fs::write(root.join("etc/added"), "by the upper layer\n").unwrap();
    fs::write(root.join("usr/share/large"), vec![b'x'; 300_000]).unwrap();
    set_xattr(&root.join("etc/added"), "user.long", &"a5".repeat(3000));
    umoci(scratch, &["repack", "--image", "layout:box", "two"]);
    umoci(
        scratch,
        &[
            "config",
            "--image",
            "layout:box",
            "--config.entrypoint=/bin/sh",
            "--config.entrypoint=-c",
            "--config.cmd=id >/tmp/who; env | sort >/tmp/env; exec sleep 1000",
            "--config.env=MODE=test",
            "--config.user=web:log",
            "--config.workingdir=/var/lib/app",
            "--os=linux",
            "--architecture=amd64",
        ],
    );
    scratch.0.join("layout")
}

/// Everything below a directory, one line each: type and mode, owner, links, size, time and content.
const LIST: &str = "cd $ROOT && find . -xdev \\( -path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./dormouse-\\* \
     -o -path ./etc/machine-id \\) -prune \
     -o -print | sort | while read -r f; do \
     if [ -d \"$f\" ]; then stat -c '%n %A %u:%g' \"$f\"; else stat -c '%N %A %u:%g %h %s %Y %t:%T' \"$f\"; fi; \
     if [ -f \"$f\" ] && [ ! -L \"$f\" ]; then sha256sum <\"$f\"; fi; done";

/// Its extended attributes.
const XATTRS: &str = "/bin/guest-tool xattrs $ROOT proc sys dev run etc/machine-id";

/// What umoci makes of the image, as busybox lists it, and its attributes.
fn unpacked_by_umoci(scratch: &Scratch) -> (String, String) {
    umoci(scratch, &["unpack", "--image", "layout:box", "bundle"]);
    let root = scratch.0.join("bundle/rootfs");
    let tool = Command::new(guest_tool()).arg("xattrs").arg(&root).output().unwrap();
    (list(&root), String::from_utf8(tool.stdout).unwrap())
}

fn list(root: &Path) -> String {
    let busybox = guest_root().join("bin/busybox");
    let script = LIST.replace("$ROOT", root.to_str().unwrap());
    // Its own applets, not those of this machine.
    let links = root.join("bin");
    let output =
        Command::new(busybox).args(["sh", "-c", &script]).env("PATH", links).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn vm_config(release: Release, image: &Image) -> VmConfig {
    let agent = AgentConfig::new()
        .root(image.root(0))
        .entrypoint(image.config().entrypoint().expect("an entrypoint"));
    VmConfig::new(release.kernel())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .block(image.disk())
        .agent(agent)
}

async fn boots(release: Release) {
    // Not on an overlay, whose directories may have the inode numbers of files: umoci takes those for
    // hard links.
    let name = format!("image-{}", release.prefix());
    let scratch = Scratch::below(Path::new("/dev/shm"), &name);
    let layout = busybox_image(&scratch);
    let cache = ImageCache::open(scratch.0.join("cache")).unwrap();
    let image = Image::open(&layout).unpack(&cache).await.unwrap();
    let guest = Guest::boot(vm_config(release, &image)).await;
    let started = "while [ ! -s /tmp/env ]; do sleep 0.1; done; cat /tmp/who /tmp/env";
    let text = guest.sh(started).await;
    assert!(text.starts_with("uid=1000(web) gid=4(log)"), "{text}");
    assert!(text.contains("MODE=test\n") && text.contains("PWD=/var/lib/app\n"), "{text}");
    guest.sh("busybox rm -f /tmp/who /tmp/env; echo written >/etc/new; cat /etc/new; busybox rm /etc/new").await;
    // What the agent makes, directories of mounts and the machine-id, is left out on both sides.
    let (files, attributes) = unpacked_by_umoci(&scratch);
    assert_eq!(guest.sh(&LIST.replace("$ROOT", "/")).await, files);
    for name in ["security.capability", "system.posix_acl_access", "user.made-by", "user.long"] {
        assert!(attributes.contains(name), "{name} in {attributes}");
    }
    assert_eq!(guest.sh(&XATTRS.replace("$ROOT", "/")).await, attributes);
    assert!(guest.sh("cat /proc/mounts").await.contains(" / overlay "), "an overlay");
}

#[test]
fn an_image_is_a_guests_root_as_umoci_would_make_it_under_linux_6_1() {
    block_on(boots(Release::Linux6_1));
}

#[test]
fn an_image_is_a_guests_root_as_umoci_would_make_it_under_linux_6_12() {
    block_on(boots(Release::Linux6_12));
}
