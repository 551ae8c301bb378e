//! One cache, several processes.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dormouse::{Image, ImageCache};

use crate::{Scratch, debian_image, unpacked};

/// Where this program, as a process of a test, has its cache.
const CACHE: &str = "DORMOUSE_TEST_CACHE";

/// What a process of these tests does: it is one of them, for whoever calls without the variable.
#[test]
fn a_process_unpacks_an_image() {
    let Some(cache) = env::var_os(CACHE) else { return };
    let image = Image::open(debian_image::layout()).name("nginx");
    println!("root: {}", unpacked(image, cache).unwrap().path().display());
}

fn process(cache: &Path) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "processes::a_process_unpacks_an_image", "--nocapture"])
        .env(CACHE, cache)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn processes_that_want_the_same_image_make_it_once_and_one_that_is_killed_leaves_nothing() {
    let scratch = Scratch::new("processes");
    let cache = scratch.0.join("cache");
    ImageCache::open(&cache).unwrap();
    // Killed as soon as it writes.
    let mut killed = process(&cache);
    while files(&cache.join("partial")).is_empty() && files(&cache.join("roots")).is_empty() {
        assert!(killed.try_wait().unwrap().is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(files(&cache.join("roots")), [""; 0]);
    let processes: Vec<_> = (0..3).map(|_| process(&cache)).collect();
    let mut said: Vec<String> = processes
        .into_iter()
        .map(|process| {
            let output = process.wait_with_output().unwrap();
            assert!(output.status.success());
            let text = String::from_utf8(output.stdout).unwrap();
            let begin = text.find("root: ").expect("a root");
            text[begin..].lines().next().unwrap().to_owned()
        })
        .collect();
    said.dedup();
    assert_eq!(said.len(), 1, "{said:?}");
    assert_eq!(files(&cache.join("roots")).len(), 1);
    assert_eq!(files(&cache.join("partial")), [""; 0]);
    let alone = Image::open(debian_image::layout()).name("nginx");
    let alone = unpacked(alone, scratch.0.join("alone")).unwrap();
    let shared = cache.join("roots").join(&files(&cache.join("roots"))[0]);
    assert!(fs::read(alone.path()).unwrap() == fs::read(shared).unwrap());
}
