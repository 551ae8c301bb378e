//! A registry that the test is itself, and does as it likes.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

use super::super::tests::{Scratch, Tar};
use super::*;
use crate::{Error, ErrorKind, ImageCache, ImageLimits};

/// What is answered to a request: path and headers.
type Answer = dyn Fn(&str, &str) -> Vec<u8> + Send + Sync;

struct Fake {
    port: u16,
    /// Paths that were asked for, each with whether somebody said who he is.
    asked: Arc<Mutex<Vec<(String, bool)>>>,
}

/// How an answer is sent: so many bytes at once, and a pause behind each.
#[derive(Clone, Copy)]
struct Pace(usize, Duration);

impl Fake {
    fn new(answer: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::paced(answer, |_| Pace(usize::MAX, Duration::ZERO))
    }

    /// One that answers some paths slowly.
    fn paced(
        answer: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static,
        pace: impl Fn(&str) -> Pace + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer): (_, Arc<Answer>) = (Arc::clone(&asked), Arc::new(answer));
        let pace: Arc<dyn Fn(&str) -> Pace + Send + Sync> = Arc::new(pace);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                let pace = Arc::clone(&pace);
                thread::spawn(move || serve(stream.unwrap(), &seen, &*answer, &*pace));
            }
        });
        Self { port, asked }
    }

    fn source(&self) -> crate::ImageSource {
        Image::pull(format!("127.0.0.1:{}/app:1", self.port)).docker_config("/nowhere")
    }

    fn pull(&self, cache: &ImageCache, login: bool) -> Result<Image, Error> {
        let mut source = self.source();
        if login {
            source = source.login("me", "secret");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(source.unpack(cache))
    }

    #[track_caller]
    fn refusal(&self) -> String {
        let scratch = Scratch::new();
        let cache = ImageCache::open(&scratch.0).unwrap();
        let error = self.pull(&cache, false).expect_err("it is refused");
        assert_eq!(error.kind(), &ErrorKind::Image, "{error}");
        assert_eq!(cache.used_bytes().unwrap(), 0);
        error.to_string()
    }
}

fn serve(
    stream: TcpStream,
    seen: &Mutex<Vec<(String, bool)>>,
    answer: &Answer,
    pace: &dyn Fn(&str) -> Pace,
) {
    let mut lines = BufReader::new(&stream).lines();
    let Some(Ok(request)) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> =
        lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let headers = headers.join("\n").to_lowercase();
    seen.lock().unwrap().push((path.clone(), headers.contains("authorization:")));
    let Pace(piece, pause) = pace(&path);
    for piece in answer(&path, &headers).chunks(piece) {
        if (&stream).write_all(piece).is_err() {
            break;
        }
        thread::sleep(pause);
    }
}

fn ok(media_type: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn status(line: &str, header: &str) -> Vec<u8> {
    format!("HTTP/1.1 {line}\r\n{header}\r\ncontent-length: 0\r\n\r\n").into_bytes()
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image of one layer, as a registry has it.
#[derive(Clone)]
struct Served {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layer: Vec<u8>,
}

impl Served {
    fn new() -> Self {
        let layer = Tar::new().file("text", "from the registry").end();
        let (digest, size) = (Digest::of(&layer).to_string(), layer.len());
        Self { layer, ..Self::of(&[(digest, size)]) }
    }

    /// One that says that it has layers with these digests and lengths.
    fn of(layers: &[(String, usize)]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|(digest, _)| digest).collect();
        let config = json!({
            "os": "linux", "architecture": "amd64", "config": {"Cmd": ["/text"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let describe = |media_type: &str, digest: &str, size: usize| json!({"mediaType": media_type, "digest": digest, "size": size});
        let layers: Vec<_> =
            layers.iter().map(|(digest, size)| describe(LAYER, digest, *size)).collect();
        let digest = Digest::of(&config).to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "config": describe("application/vnd.oci.image.config.v1+json", &digest, config.len()),
            "layers": layers,
        });
        Self { manifest: manifest.to_string().into_bytes(), config, layer: Vec::new() }
    }

    fn answer(&self, path: &str) -> Vec<u8> {
        let blob = |bytes: &[u8]| format!("/v2/app/blobs/{}", Digest::of(bytes));
        match path {
            "/v2/app/manifests/1" => {
                ok("application/vnd.oci.image.manifest.v1+json", &self.manifest)
            }
            _ if path == blob(&self.config) => ok("application/octet-stream", &self.config),
            _ if path == blob(&self.layer) => ok("application/octet-stream", &self.layer),
            _ => status("404 Not Found", "x: y"),
        }
    }

    fn is_layer(&self, path: &str) -> bool {
        path.ends_with(&Digest::of(&self.layer).to_string())
    }
}

#[test]
fn an_image_is_brought_once() {
    let served = Served::new();
    let fake = Fake::new(move |path, _| served.answer(path));
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let first = fake.pull(&cache, false).unwrap();
    assert_eq!(first.config().cmd, ["/text"]);
    assert_eq!(fake.asked.lock().unwrap().len(), 3);
    let second = fake.pull(&cache, false).unwrap();
    assert_eq!(first.path(), second.path());
    assert_eq!(fake.asked.lock().unwrap().len(), 5, "no layer the second time");
}

#[test]
fn layers_that_are_too_much_together_are_not_brought() {
    let served = Served::of(&[0, 1, 2].map(|at| (format!("sha256:{at:064}"), 400)));
    let fake = Fake::new(move |path, _| served.answer(path));
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let source = fake.source().limits(ImageLimits::new().bytes(1000));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(source.unpack(&cache)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Image, "{error}");
    assert!(error.to_string().contains("the image is larger than 1000 bytes"), "{error}");
    let asked = fake.asked.lock().unwrap();
    assert!(!asked.iter().any(|(path, _)| path.contains("0000000")), "{asked:?}");
}

#[test]
fn a_runtime_with_one_thread_for_what_blocks_is_enough() {
    let served = Served::new();
    let fake = Fake::new(move |path, _| served.answer(path));
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let source = fake.source();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(1).build().unwrap();
    let pulled = async { tokio::time::timeout(2 * PATIENCE, source.unpack(&cache)).await };
    runtime.block_on(pulled).expect("an end").unwrap();
}

#[test]
fn a_token_is_got_for_a_login_and_shown_to_the_registry_alone() {
    let served = Served::new();
    let elsewhere = {
        let served = served.clone();
        Fake::new(move |path, _| served.answer(path))
    };
    let port = elsewhere.port;
    let fake = Fake::new(move |path, headers| {
        if path.starts_with("/token?") {
            assert!(path.contains("scope=repository%3Aapp%3Apull&service=here"), "{path}");
            // me:secret
            assert!(headers.contains("authorization: basic bwu6c2vjcmv0"), "{headers}");
            return ok("application/json", br#"{"token": "t0ken"}"#);
        }
        if !headers.contains("authorization: bearer t0ken") {
            let realm = headers.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
            let challenge =
                format!("www-authenticate: Bearer realm=\"http://{realm}/token\",service=\"here\"");
            return status("401 Unauthorized", &challenge);
        }
        match served.is_layer(path) {
            true => status(
                "307 Temporary Redirect",
                &format!("location: http://127.0.0.1:{port}{path}"),
            ),
            false => served.answer(path),
        }
    });
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    fake.pull(&cache, true).unwrap();
    let asked = elsewhere.asked.lock().unwrap();
    assert_eq!((asked.len(), asked[0].1), (1, false), "{asked:?}");
}

#[test]
fn a_login_is_shown_where_it_is_asked_for() {
    let served = Served::new();
    let fake = Fake::new(move |path, headers| {
        match headers.contains("authorization: basic bwu6c2vjcmv0") {
            true => served.answer(path),
            false => status("401 Unauthorized", "www-authenticate: Basic realm=\"x\""),
        }
    });
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    fake.pull(&cache, true).unwrap();
    let text = fake.refusal();
    assert!(text.contains("refuses the manifest") && text.contains("docker login"), "{text}");
}

#[test]
fn what_a_registry_should_not_say_is_told() {
    let html = Fake::new(|_, _| ok("text/html; charset=utf-8", b"<html>log in</html>"));
    assert!(html.refusal().contains("sends \"text/html\" instead of the manifest"));
    let missing = Fake::new(|_, _| status("404 Not Found", "x: y"));
    assert!(missing.refusal().contains("has not the manifest of 127.0.0.1"));
    let body = br#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow\u001b[2J down"}]}"#;
    let busy = Fake::new(|_, _| {
        let head =
            format!("HTTP/1.1 429 Too Many Requests\r\ncontent-length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    });
    let text = busy.refusal();
    assert!(text.contains("429: TOOMANYREQUESTS slow\u{fffd}[2J down"), "{text}");
    let circle = Fake::new(|path, _| status("302 Found", &format!("location: {path}")));
    assert!(circle.refusal().contains("more than 5 times"));
    let away = Fake::new(|_, _| status("302 Found", "location: http://192.0.2.1/x"));
    assert!(away.refusal().contains("not followed"));
    let strange = Fake::new(|_, _| status("401 Unauthorized", "www-authenticate: Negotiate x"));
    assert!(strange.refusal().contains("not understood"));
    let token = Fake::new(|path, headers| {
        let host = headers.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        match path.starts_with("/token") {
            true => ok("application/json", br#"{"token": "a\nb: c"}"#),
            false => status(
                "401 Unauthorized",
                &format!("www-authenticate: Bearer realm=\"http://{host}/token\""),
            ),
        }
    });
    assert!(token.refusal().contains("failed"));
    let endless = Fake::new(|_, _| ok("application/json", &vec![b' '; 5 << 20]));
    assert!(endless.refusal().contains("more than the 4194304 bytes"));
    let no_http = Fake::new(|_, _| b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    assert!(no_http.refusal().contains("failed"));
    let nothing = Fake::new(|_, _| Vec::new());
    assert!(nothing.refusal().contains("failed"));
}

#[test]
fn a_registry_that_stalls_is_not_waited_for_for_ever() {
    let served = Served::new();
    let layer = format!("/v2/app/blobs/{}", Digest::of(&served.layer));
    let long = Duration::from_secs(100);
    let at_layer = |other: Pace| {
        let layer = layer.clone();
        move |path: &str| if path == layer { other } else { Pace(usize::MAX, Duration::ZERO) }
    };
    let answer = |served: &Served| {
        let served = served.clone();
        move |path: &str, _: &str| served.answer(path)
    };
    let silent = |_: &str, _: &str| {
        thread::sleep(Duration::from_secs(100));
        Vec::new()
    };
    let cases = [
        ("did not answer", Fake::new(silent)),
        ("go on", Fake::paced(answer(&served), at_layer(Pace(1000, long)))),
        ("go on", Fake::paced(answer(&served), at_layer(Pace(150, Duration::from_secs(1))))),
        ("go on", Fake::paced(answer(&served), move |_| Pace(200, long))),
    ];
    let tried = |(expected, fake): (&str, Fake)| {
        let scratch = Scratch::new();
        let cache = ImageCache::open(&scratch.0).unwrap();
        let mut registry = Registry::new(format!("127.0.0.1:{}/app:1", fake.port));
        registry.docker_config = Some("/nowhere".into());
        registry.patience = Duration::from_secs(5);
        let source = crate::ImageSource::new(crate::image::Location::Registry(registry));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(source.unpack(&cache)).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Timeout, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(cache.used_bytes().unwrap(), 0);
    };
    thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || tried(case));
        }
    });
}

#[test]
fn html_and_indexes_that_list_themselves_are_refused_whatever_they_are_called() {
    let html = Fake::new(|_, _| ok("application/json", b"<html>log in</html>"));
    assert!(html.refusal().contains("no JSON"));
    let served = Served::new();
    let blobs = Fake::new(move |path, _| match path.contains("/blobs/") {
        true => ok("text/html", b"<html>log in</html>"),
        false => served.answer(path),
    });
    assert!(blobs.refusal().contains("sends \"text/html\" instead of the image's configuration"));
    let token = Fake::new(|path, headers| {
        let host = headers.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        let challenge = format!("www-authenticate: Bearer realm=\"http://{host}/token\"");
        match path.starts_with("/token") {
            true => ok("text/html", b"<html>log in</html>"),
            false => status("401 Unauthorized", &challenge),
        }
    });
    assert!(token.refusal().contains("\"no token\" instead of a token"));
    let listed = json!({"digest": Digest::of(b"itself").to_string(), "size": 1,
        "mediaType": "application/vnd.oci.image.index.v1+json"});
    let index = json!({"schemaVersion": 2, "manifests": [listed]}).to_string();
    let itself =
        Fake::new(move |_, _| ok("application/vnd.oci.image.index.v1+json", index.as_bytes()));
    assert!(itself.refusal().contains("the manifest has the digest"));
    assert_eq!(itself.asked.lock().unwrap().len(), 2);
}

#[test]
fn layers_of_another_length_or_content_are_refused() {
    let served = Served::new();
    let with_layer = |answer: fn(&[u8]) -> Vec<u8>| {
        let served = served.clone();
        let fake = Fake::new(move |path, _| match served.is_layer(path) {
            true => answer(&served.layer),
            false => served.answer(path),
        });
        fake.refusal()
    };
    let text = with_layer(|layer| ok("x/y", &layer[..1000]));
    assert!(text.contains("1000 bytes of a layer instead of 2048"), "{text}");
    let text = with_layer(|layer| ok("x/y", &[layer, layer].concat()));
    assert!(text.contains("4096 bytes of a layer instead of 2048"), "{text}");
    // Without a length, up to the end of the connection.
    let text = with_layer(|layer| [b"HTTP/1.1 200 OK\r\n\r\n", &layer[..1000]].concat());
    assert!(text.contains("1000 bytes of a layer instead of 2048"), "{text}");
    let text = with_layer(|layer| [b"HTTP/1.1 200 OK\r\n\r\n", layer, layer].concat());
    assert!(text.contains("bytes of a layer instead of 2048"), "{text}");
    // Less than was promised.
    let text = with_layer(|layer| {
        let whole = ok("x/y", layer);
        whole[..whole.len() - 100].to_vec()
    });
    assert!(text.contains("failed"), "{text}");
    let text = with_layer(|layer| ok("x/y", &vec![1; layer.len()]));
    assert!(text.contains("has the digest"), "{text}");
}

#[test]
fn a_manifest_that_was_asked_for_by_digest_has_it() {
    let served = Served::new();
    let fake = Fake::new(move |path, _| {
        served.answer(path.replace(&Digest::of(b"other").to_string(), "1").as_str())
    });
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let reference = format!("127.0.0.1:{}/app@{}", fake.port, Digest::of(b"other"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime
        .block_on(Image::pull(reference).docker_config("/nowhere").unpack(&cache))
        .unwrap_err();
    assert!(error.to_string().contains("the manifest has the digest"), "{error}");
}
