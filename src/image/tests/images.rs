//! Whole images, from files to the cache.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};

use super::tar::Tar;
use super::*;
use crate::{Error, ErrorKind, Image, ImageCache, ImageSource, ImageStage};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layout that is written blob by blob.
struct Layout {
    scratch: Scratch,
}

impl Layout {
    fn new() -> Self {
        let scratch = Scratch::new();
        scratch.file("layout/oci-layout", br#"{"imageLayoutVersion": "1.0.0"}"#);
        Self { scratch }
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        self.scratch.file(&format!("layout/blobs/sha256/{}", digest.hex()), bytes);
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    fn json(&self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    fn image(&self, layers: &[Vec<u8>], platform: (&str, &str)) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
        let config = json!({
            "os": platform.0, "architecture": platform.1,
            "config": {"Entrypoint": ["/app"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let layers: Vec<_> = layers.iter().map(|layer| self.blob(LAYER, layer)).collect();
        let config = self.json(CONFIG, &config);
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let mut descriptor = self.json(MANIFEST, &manifest);
        descriptor["platform"] = json!({"os": platform.0, "architecture": platform.1});
        descriptor
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.scratch.file("layout/index.json", index.to_string().as_bytes());
    }

    fn path(&self) -> PathBuf {
        self.scratch.0.join("layout")
    }

    fn cache(&self) -> ImageCache {
        ImageCache::open(self.scratch.0.join("cache")).unwrap()
    }

    fn unpack(&self) -> Result<Image, Error> {
        unpacked(Image::open(self.path()), &self.cache())
    }

    #[track_caller]
    fn refusal(&self) -> String {
        let error = self.unpack().expect_err("it is refused");
        assert_eq!(error.kind(), &ErrorKind::Image, "{error}");
        let kept: Vec<_> = ["roots", "partial"]
            .iter()
            .flat_map(|shelf| std::fs::read_dir(self.scratch.0.join("cache").join(shelf)).unwrap())
            .collect();
        assert!(kept.is_empty(), "{kept:?}");
        error.to_string()
    }
}

pub(super) fn unpacked(source: ImageSource, cache: &ImageCache) -> Result<Image, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(source.unpack(cache))
}

fn layer(text: &str) -> Vec<u8> {
    Tar::new().file("text", text).end()
}

fn text_of(image: &Image) -> String {
    Listing::read(&std::fs::read(image.path()).unwrap()).text("text").to_owned()
}

fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

#[test]
fn a_layout_becomes_a_root_that_is_made_once() {
    let layout = Layout::new();
    let image =
        layout.image(&[layer("one"), Tar::new().file("more", "").end()], ("linux", "amd64"));
    layout.index(std::slice::from_ref(&image));
    let stages = std::sync::Arc::new(Mutex::new(Vec::new()));
    let source = || {
        let stages = std::sync::Arc::clone(&stages);
        Image::open(layout.path()).progress(move |progress| {
            if matches!(progress.stage, ImageStage::Layer(_)) {
                assert!(progress.total_bytes.is_some_and(|total| progress.bytes <= total));
            }
            stages.lock().unwrap().push(progress.stage);
            ControlFlow::Continue(())
        })
    };
    let first = unpacked(source(), &layout.cache()).unwrap();
    assert_eq!(text_of(&first), "one");
    assert_eq!(first.digest().as_deref(), image["digest"].as_str());
    assert_eq!(first.config().entrypoint, ["/app"]);
    let seen = std::mem::take(&mut *stages.lock().unwrap());
    for stage in [ImageStage::Layer(0), ImageStage::Layer(1), ImageStage::Write, ImageStage::Ready]
    {
        assert!(seen.contains(&stage), "{stage:?} in {seen:?}");
    }
    // The second time no layer is read, nor has to be readable.
    for entry in std::fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if !bytes.starts_with(b"{") {
            std::fs::write(&path, vec![0; bytes.len()]).unwrap();
        }
    }
    let second = unpacked(source(), &layout.cache()).unwrap();
    assert_eq!(second.path(), first.path());
    assert_eq!(*stages.lock().unwrap(), [ImageStage::Find, ImageStage::Ready]);
}

#[test]
fn the_same_image_is_the_same_bytes_from_wherever_it_comes() {
    let layout = Layout::new();
    layout.index(&[layout.image(&[layer("one")], ("linux", "amd64"))]);
    let from_layout = layout.unpack().unwrap();
    let mut archive = Tar::new().dir("./").dir("./blobs");
    let mut add = |name: &str, path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        archive = archive.clone().entry(b'0', name.as_bytes(), |_| {}, &bytes);
    };
    for entry in std::fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        add(&format!("./blobs/sha256/{}", path.file_name().unwrap().to_str().unwrap()), &path);
    }
    add("./index.json", &layout.path().join("index.json"));
    let archive = layout.scratch.file("image.tar", &archive.end());
    let docker = docker_archive(&layout.scratch);
    for (number, path) in [archive, docker].into_iter().enumerate() {
        let cache = ImageCache::open(layout.scratch.0.join(format!("cache-{number}"))).unwrap();
        let image = unpacked(Image::open(path), &cache).unwrap();
        assert_eq!(image.path().file_name(), from_layout.path().file_name());
        let bytes = |image: &Image| std::fs::read(image.path()).unwrap();
        assert!(bytes(&image) == bytes(&from_layout));
    }
}

/// With two images, whose layers are links where they are the same, as older Dockers wrote them.
fn docker_archive(scratch: &Scratch) -> PathBuf {
    let layer = layer("one");
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": null,
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let config = config.to_string();
    let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    let manifest = json!([
        {"Config": name, "RepoTags": ["app:1", "example.org/app:1"], "Layers": ["b/layer.tar"]},
    ]);
    let tar = Tar::new()
        .file(&name, &config)
        .dir("a")
        .entry(b'0', b"a/layer.tar", |_| {}, &layer)
        .symlink("b/layer.tar", "../a/layer.tar")
        .file("manifest.json", &manifest.to_string());
    scratch.file("docker.tar", &tar.end())
}

#[test]
fn of_several_images_one_is_chosen_by_name_and_platform() {
    let layout = Layout::new();
    let old = named(layout.image(&[layer("old")], ("linux", "amd64")), "app:1");
    let arm = layout.image(&[layer("arm")], ("linux", "arm64"));
    let amd = layout.image(&[layer("amd")], ("linux", "amd64"));
    let mut attestation = layout.image(&[layer("no")], ("linux", "amd64"));
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let both = json!({"schemaVersion": 2, "manifests": [arm, attestation, amd]});
    let new = named(layout.json(INDEX, &both), "app:2");
    layout.index(&[old, new]);
    let cache = layout.cache();
    let named = |name: &str| unpacked(Image::open(layout.path()).name(name), &cache);
    assert_eq!(text_of(&named("app:1").unwrap()), "old");
    assert_eq!(text_of(&named("2").unwrap()), "amd");
    let arm = Image::open(layout.path()).name("app:2").platform("linux/arm64");
    assert_eq!(text_of(&unpacked(arm, &cache).unwrap()), "arm");
    let text = layout.unpack().unwrap_err().to_string();
    assert!(text.contains("several images: app:1, app:2; choose one"), "{text}");
    let text = named("3").unwrap_err().to_string();
    assert!(text.contains("no image named \"3\"; there are: app:1, app:2"), "{text}");
    let other = Image::open(layout.path()).name("app:2").platform("linux/riscv64");
    let text = unpacked(other, &cache).unwrap_err().to_string();
    assert!(text.contains("linux/riscv64; there are: linux/arm64, linux/amd64"), "{text}");
}

#[test]
fn an_image_for_another_platform_is_refused_although_its_index_does_not_say() {
    let layout = Layout::new();
    let mut image = layout.image(&[layer("x")], ("windows", "amd64"));
    image.as_object_mut().unwrap().remove("platform");
    layout.index(&[image]);
    assert!(layout.refusal().contains("no image for linux/amd64; there are: windows/amd64"));
}

#[test]
fn what_is_damaged_or_missing_is_named() {
    let spoil = |change: &dyn Fn(&Layout, &Value)| {
        let layout = Layout::new();
        let image = layout.image(&[layer("one")], ("linux", "amd64"));
        layout.index(std::slice::from_ref(&image));
        change(&layout, &image);
        layout.refusal()
    };
    let layer_file = format!("layout/blobs/sha256/{}", Digest::of(&layer("one")).hex());
    let text = spoil(&|layout, _| {
        let mut bytes = layer("one");
        bytes[1500] = 1;
        layout.scratch.file(&layer_file, &bytes);
    });
    assert!(text.contains("layer 1 of 1") && text.contains("digest"), "{text}");
    let text = spoil(&|layout, _| {
        layout.scratch.file(&layer_file, b"short");
    });
    assert!(text.contains("5 bytes instead of 2048"), "{text}");
    let text =
        spoil(&|layout, _| std::fs::remove_file(layout.scratch.0.join(&layer_file)).unwrap());
    assert!(text.contains("lacks blobs/sha256/"), "{text}");
    let text = spoil(&|layout, image| {
        let hex = image["digest"].as_str().unwrap().replace("sha256:", "");
        let path = format!("layout/blobs/sha256/{hex}");
        let size = image["size"].as_u64().unwrap() as usize;
        layout.scratch.file(&path, &vec![b' '; size]);
    });
    assert!(text.contains("the manifest has the digest"), "{text}");
    let text = spoil(&|layout, image| {
        let mut image = image.clone();
        image["digest"] = json!("sha512:00");
        layout.index(&[image]);
    });
    assert!(text.contains("\"sha512:00\" is no SHA-256 digest"), "{text}");
}

#[test]
fn what_is_not_known_is_refused_by_its_name() {
    let layout = Layout::new();
    let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}});
    let config = layout.json(CONFIG, &config);
    let strange = layout.blob("application/vnd.example.layer.rar", b"x");
    let refused = |manifest: Value, media_type: &str| {
        layout.index(&[layout.json(media_type, &manifest)]);
        layout.refusal()
    };
    let text =
        refused(json!({"schemaVersion": 2, "config": config, "layers": [strange]}), MANIFEST);
    assert!(
        text.contains("a layer has the media type \"application/vnd.example.layer.rar\""),
        "{text}"
    );
    let text = refused(json!({"schemaVersion": 2, "config": strange, "layers": []}), MANIFEST);
    assert!(text.contains("configuration has the media type"), "{text}");
    let text = refused(json!({"schemaVersion": 2}), "application/json");
    assert!(text.contains("\"application/json\""), "{text}");
    let text = refused(json!({"schemaVersion": 1, "config": config, "layers": []}), MANIFEST);
    assert!(text.contains("schema version 1"), "{text}");
    // One thing to one reader, another to another.
    let both = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [], "config": config, "layers": []});
    assert!(refused(both, MANIFEST).contains("manifest is"), "both");
    let layers = vec![layout.blob(LAYER, b"x"); 2];
    let text = refused(json!({"schemaVersion": 2, "config": config, "layers": layers}), MANIFEST);
    assert!(text.contains("2 layers, and the digests of 0"), "{text}");
}

#[test]
fn indexes_end_somewhere() {
    let layout = Layout::new();
    let mut inner = layout.image(&[layer("x")], ("linux", "amd64"));
    for _ in 0..8 {
        inner = layout.json(INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
    }
    layout.index(&[inner]);
    assert!(layout.refusal().contains("more than 5 deep"));
    layout.index(&[]);
    assert!(layout.refusal().contains("lacks images"));
    layout.scratch.file("layout/index.json", b"<html>");
    assert!(layout.refusal().contains("no JSON"));
    layout.scratch.file("layout/index.json", &vec![b' '; 5 << 20]);
    assert!(layout.refusal().contains("larger than 4194304 bytes"));
    layout.scratch.file("layout/index.json", "[".repeat(100_000).as_bytes());
    assert!(layout.refusal().contains("no JSON"));
    layout.scratch.file("layout/index.json", br#"{"schemaVersion": 2, "manifests": []}{}"#);
    assert!(layout.refusal().contains("no JSON"));
    // One that lists itself cannot have the digest that it says.
    let mut itself = layout.json(INDEX, &json!({}));
    let path = itself["digest"].as_str().unwrap().replace("sha256:", "layout/blobs/sha256/");
    for _ in 0..2 {
        let text = json!({"schemaVersion": 2, "manifests": [itself]}).to_string();
        itself["size"] = json!(text.len());
        layout.scratch.file(&path, text.as_bytes());
    }
    layout.index(&[itself]);
    assert!(layout.refusal().contains("the manifest has the digest"));
}

#[test]
fn an_archive_is_as_odd_as_it_likes_and_read_as_tar_would_unpack_it() {
    let layout = Layout::new();
    let image = layout.image(&[layer("one")], ("linux", "amd64"));
    let index = json!({"schemaVersion": 2, "manifests": [image]}).to_string();
    let blobs = |mut tar: Tar| {
        for entry in std::fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("/blobs/sha256/{}", path.file_name().unwrap().to_str().unwrap());
            tar = tar.entry(b'0', name.as_bytes(), |_| {}, &std::fs::read(&path).unwrap());
        }
        tar
    };
    let open = |tar: Vec<u8>| {
        unpacked(Image::open(layout.scratch.file("image.tar", &tar)), &layout.cache())
    };
    // The last of two counts; a name may be absolute, and lead through links.
    let tar = blobs(Tar::new().file("index.json", "{}").file("real", &index))
        .symlink("index.json", "./again")
        .hard_link("again", "real");
    assert_eq!(text_of(&open(tar.clone().end()).unwrap()), "one");
    let cut = tar.clone().cut();
    let text = open(cut[..cut.len() - 700].to_vec()).unwrap_err().to_string();
    assert!(text.contains("ends in the middle"), "{text}");
    // Links that lead to each other, and out of it.
    let circle = Tar::new().symlink("index.json", "a").symlink("a", "index.json");
    let text = open(circle.end()).unwrap_err().to_string();
    assert!(text.contains("lacks"), "{text}");
    let out = Tar::new().symlink("index.json", "../../../etc/passwd");
    let text = open(out.end()).unwrap_err().to_string();
    assert!(text.contains("neither index.json"), "{text}");
    let many = (0..70_000).fold(Tar::new(), |tar, n| tar.file(&n.to_string(), ""));
    let text = open(many.end()).unwrap_err().to_string();
    assert!(text.contains("more than 65536 files"), "{text}");
}

#[test]
fn files_that_are_no_images_are_refused_with_what_would_be_taken() {
    let layout = Layout::new();
    let refused = |path: PathBuf| unpacked(Image::open(path), &layout.cache()).unwrap_err();
    let text = refused(layout.scratch.file("x.tar", &Tar::new().file("a", "b").end())).to_string();
    assert!(
        text.contains("neither index.json nor manifest.json; it takes an OCI layout"),
        "{text}"
    );
    let text = refused(layout.scratch.file("x.gz", b"\x1f\x8b\x08\0\0\0\0")).to_string();
    assert!(text.contains("packed with gzip: unpack it first"), "{text}");
    let text = refused(layout.path()).to_string();
    assert!(text.contains("no index.json") && text.contains("`Image::directory`"), "{text}");
    let html = "<html>Not found</html>".repeat(40);
    let path = layout.scratch.file("page.tar", html.as_bytes());
    let text = refused(path.clone()).to_string();
    let archive = format!("the image's archive {}: a header in it", path.display());
    assert!(text.starts_with(&archive) && text.contains("it takes an OCI layout"), "{text}");
    let error = refused("/dev/zero".into());
    assert_eq!(error.kind(), &ErrorKind::File(std::io::ErrorKind::InvalidInput));
    let error = refused("/nowhere".into());
    assert_eq!(error.kind(), &ErrorKind::File(std::io::ErrorKind::NotFound));
}

#[test]
fn progress_that_says_so_ends_the_work() {
    let layout = Layout::new();
    layout.index(&[layout.image(&[layer("x")], ("linux", "amd64"))]);
    for stop in [ImageStage::Find, ImageStage::Layer(0), ImageStage::Write] {
        let source = Image::open(layout.path()).progress(move |progress| match progress.stage {
            stage if stage == stop => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        let error = unpacked(source, &layout.cache()).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Interrupted, "{stop:?}");
        assert_eq!(layout.cache().used_bytes().unwrap(), 0);
    }
}

#[test]
fn a_source_that_was_unpacked_or_given_up_is_unpacked_again() {
    let layout = Layout::new();
    layout.index(&[layout.image(&[layer("x")], ("linux", "amd64"))]);
    let source = Image::open(layout.path());
    drop(source.clone().unpack(&layout.cache()));
    for _ in 0..2 {
        assert_eq!(text_of(&unpacked(source.clone(), &layout.cache()).unwrap()), "x");
    }
}

#[test]
fn it_needs_a_runtime_and_says_so() {
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let future = std::pin::pin!(Image::open("x").unpack(&cache));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let std::task::Poll::Ready(Err(error)) = future.poll(&mut context) else { panic!("no error") };
    assert!(error.to_string().contains("no tokio runtime"), "{error}");
}

#[test]
fn a_directory_is_a_root_too() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let scratch = Scratch::new();
    let tree = scratch.0.join("tree");
    scratch.file("tree/text", b"first");
    scratch.file("tree/sub/file", b"x");
    symlink("../text", tree.join("sub/link")).unwrap();
    std::fs::hard_link(tree.join("text"), tree.join("hard")).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 2 << 20).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    let cache = ImageCache::open(scratch.0.join("cache")).unwrap();
    let last = std::sync::Arc::new(Mutex::new(None));
    let seen = std::sync::Arc::clone(&last);
    let source = Image::directory(&tree).progress(move |progress| {
        if progress.stage == ImageStage::Copy {
            *seen.lock().unwrap() = Some((progress.bytes, progress.total_bytes));
        }
        ControlFlow::Continue(())
    });
    let image = unpacked(source, &cache).unwrap();
    let bytes = (3 << 20) + 6;
    assert_eq!(*last.lock().unwrap(), Some((bytes, Some(bytes))));
    let root = Listing::read(&std::fs::read(image.path()).unwrap());
    assert_eq!(root.paths(), ["hard", "sparse", "sub", "sub/file", "sub/link", "text"]);
    assert_eq!((root.text("text"), root.text("sub/link")), ("first", "../text"));
    assert_eq!((root.at("text").uid, root.at("text").links), (0, 2));
    let sparse = &root.at("sparse").data;
    assert_eq!((sparse.len(), &sparse[2 << 20..][..13]), (3 << 20, &b"in the middle"[..]));
    assert!(std::fs::metadata(image.path()).unwrap().blocks() * 512 < 1 << 20);
    std::fs::write(tree.join("text"), "other").unwrap();
    let changed = unpacked(Image::directory(&tree), &cache).unwrap();
    assert_eq!(text_of(&changed), "other");
    assert_eq!(image.config().entrypoint(), None);
}

#[test]
fn a_directory_that_somebody_swaps_for_a_link_is_never_followed_out_of_the_tree() {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    let scratch = Scratch::new();
    scratch.file("secret/key", b"of the host");
    scratch.file("tree/sub/key", b"of the tree");
    scratch.file("tree/last", b"x");
    let cache = ImageCache::open(scratch.0.join("cache")).unwrap();
    let (sub, aside) = (scratch.0.join("tree/sub"), scratch.0.join("aside"));
    let link = scratch.0.join("link");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                symlink(scratch.0.join("secret"), &link).unwrap();
                std::fs::rename(&sub, &aside).unwrap();
                std::fs::rename(&link, &sub).unwrap();
                std::fs::remove_file(&sub).unwrap();
                std::fs::rename(&aside, &sub).unwrap();
            }
        });
        let tried: Vec<_> =
            (0..300).map(|_| unpacked(Image::directory(scratch.0.join("tree")), &cache)).collect();
        is_over.store(true, Ordering::Relaxed);
        for image in tried.into_iter().flatten() {
            let root = Listing::read(&std::fs::read(image.path()).unwrap());
            if root.paths().contains(&"sub/key") {
                assert_eq!(root.text("sub/key"), "of the tree");
            }
        }
    });
}
