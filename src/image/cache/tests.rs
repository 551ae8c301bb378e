use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::tests::Scratch;
use super::*;

/// A file that looks like a root of two blocks.
fn fill(reserved: &Reserved) {
    let mut bytes = vec![0; 8192];
    bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
    bytes[1060] = 2;
    reserved.file().unwrap().write_all_at(&bytes, 0).unwrap();
}

fn reserve(cache: &ImageCache, name: &str) -> Result<Cached, Reserved> {
    cache.reserve(Shelf::Roots, name, || Ok(())).unwrap()
}

fn make(cache: &ImageCache, name: &str) -> Cached {
    let reserved = reserve(cache, name).unwrap_err();
    fill(&reserved);
    reserved.commit(Shelf::Roots).unwrap()
}

#[test]
fn of_many_one_makes_a_file_and_all_have_it() {
    let scratch = Scratch::new();
    let (made, barrier) = (AtomicU32::new(0), Barrier::new(8));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                // As processes of their own have it.
                let cache = ImageCache::open(&scratch.0).unwrap();
                barrier.wait();
                match reserve(&cache, "root") {
                    Ok(found) => assert_eq!(found.file.metadata().unwrap().len(), 8192),
                    Err(reserved) => {
                        made.fetch_add(1, Ordering::Relaxed);
                        fill(&reserved);
                        thread::sleep(Duration::from_millis(50));
                        reserved.commit(Shelf::Roots).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(made.into_inner(), 1);
}

#[test]
fn what_was_not_finished_is_not_there_and_is_made_again() {
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    drop(reserve(&cache, "root").unwrap_err());
    assert_eq!(fs::read_dir(scratch.0.join("partial")).unwrap().count(), 0);
    // A process that was killed.
    fs::write(scratch.0.join("partial/roots-root"), "half").unwrap();
    make(&cache, "root");
    // A disk that lost its end.
    let path = scratch.0.join("roots/root");
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert!(cache.find(Shelf::Roots, "root").unwrap().is_none());
    // However many see that, one makes it anew, in its place.
    let _other = cache.find(Shelf::Roots, "root");
    make(&cache, "root");
    assert!(cache.find(Shelf::Roots, "root").unwrap().is_some());
}

#[test]
fn what_is_in_use_stays_and_the_rest_goes_by_age() {
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    // File systems keep times no finer than a tick of the kernel.
    let tick = || thread::sleep(Duration::from_millis(20));
    let used = make(&cache, "a");
    drop(make(&cache, "b"));
    tick();
    drop(make(&cache, "c"));
    tick();
    drop(cache.find(Shelf::Roots, "b").unwrap().unwrap());
    let all = cache.used_bytes().unwrap();
    assert!(all >= 3 * 4096, "{all}");
    // The oldest that nobody uses is c.
    let freed = cache.evict(all - 1).unwrap();
    assert_eq!(freed, all / 3);
    let names = |shelf: &str| {
        let entries = fs::read_dir(scratch.0.join(shelf)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("roots"), ["a", "b"]);
    fs::write(scratch.0.join("partial/roots-x"), "left").unwrap();
    let making = reserve(&cache, "y").unwrap_err();
    cache.evict(0).unwrap();
    assert_eq!(names("roots"), ["a"]);
    assert_eq!(names("partial"), ["roots-y"]);
    drop((used, making));
    cache.evict(0).unwrap();
    assert_eq!((names("roots").len(), names("partial").len()), (0, 0));
    assert!(cache.find(Shelf::Roots, "a").unwrap().is_none());
}

#[test]
fn use_does_not_change_the_time_of_change() {
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    let made = make(&cache, "root");
    let before = made.file.metadata().unwrap().modified().unwrap();
    thread::sleep(Duration::from_millis(20));
    let found = cache.find(Shelf::Roots, "root").unwrap().unwrap();
    assert_eq!(found.file.metadata().unwrap().modified().unwrap(), before);
}

#[test]
fn a_link_in_the_cache_is_not_followed() {
    let scratch = Scratch::new();
    let cache = ImageCache::open(&scratch.0).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", scratch.0.join("roots/root")).unwrap();
    assert!(cache.find(Shelf::Roots, "root").is_err());
}
