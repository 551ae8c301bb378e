//! Pools under those who all want a VM at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use dormouse::{ErrorKind, Pool, PoolOptions, RestoreOptions};

use crate::resources::{self, alone};
use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::{PATIENCE, output};

#[test]
fn those_who_come_when_all_are_in_use_get_one_that_others_give_back() {
    const MAX: usize = 2;
    let scratch = Scratch::new();
    let guest = Guest::boot();
    guest.write(10, 1);
    let snapshot = guest.pause().0.snapshot(scratch.join("base")).unwrap();
    let options = PoolOptions::new().min(1).max(MAX).timeout(PATIENCE);
    let pool = Pool::new(snapshot, options).unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let vm = pool.acquire().unwrap();
                    assert!(pool.in_use() <= MAX);
                    let vm = vm.resume().unwrap();
                    vm.console_input("q").unwrap();
                    let ended = vm.wait_timeout(PATIENCE);
                    assert!(ended.unwrap().exit_status().is_clean());
                }
            });
        }
    });
    assert_eq!(pool.in_use(), 0);
}

/// Whether somebody waits for a place of the pool, as it says itself where it is shown.
fn is_waited_for(pool: &Pool) -> bool {
    let shown = format!("{pool:?}");
    shown.contains("waiting: [") && !shown.contains("waiting: []")
}

#[test]
fn who_comes_first_has_the_first_place_though_others_ask_all_the_time() {
    let scratch = Scratch::new();
    let snapshot = Guest::boot().pause().0.snapshot(scratch.join("base")).unwrap();
    let options = PoolOptions::new().max(1).timeout(PATIENCE);
    let pool = Pool::new(snapshot, options).unwrap();
    let served = AtomicBool::new(false);
    let vm = pool.acquire().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _vm = pool.acquire().unwrap();
            served.store(true, Ordering::SeqCst);
        });
        let begin = Instant::now();
        while !is_waited_for(&pool) {
            assert!(begin.elapsed() < PATIENCE, "nobody waits: {pool:?}");
            thread::yield_now();
        }
        drop(vm);
        let _vm = pool.acquire().unwrap();
        assert!(served.load(Ordering::SeqCst), "it was passed over");
    });
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn a_pool_that_cannot_make_vms_says_why_and_makes_them_when_it_can() {
    let scratch = Scratch::new();
    let guest = Guest::boot();
    guest.write(10, 1);
    let (vm, _output) = guest.pause();
    let snapshot = vm.snapshot(scratch.join("base")).unwrap();
    // Nobody has this device.
    let options = RestoreOptions::new().kvm_device(scratch.join("kvm"));
    let pool = Pool::new(snapshot, PoolOptions::new().min(2).restore(options)).unwrap();
    for _ in 0..2 {
        let error = pool.acquire().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::KvmMissing, "{error:?}");
        assert_eq!((pool.ready(), pool.in_use()), (0, 0));
    }
    std::os::unix::fs::symlink("/dev/kvm", scratch.join("kvm")).unwrap();
    drop(pool.acquire().unwrap());
}

#[test]
fn a_pool_leaves_nothing_behind() {
    if !alone("pool::a_pool_leaves_nothing_behind") {
        return;
    }
    let scratch = Scratch::new();
    let (writer, _said) = output();
    let options = RestoreOptions::new().console(writer);
    let snapshot = Guest::boot().pause().0.snapshot(scratch.join("base")).unwrap();
    drop(snapshot.restore().unwrap());
    let before = resources::settled();
    for round in 0..30 {
        let options = PoolOptions::new().min(round % 4).restore(options.clone());
        let pool = Pool::new(snapshot.clone(), options).unwrap();
        let vms: Vec<_> = (0..round % 3).map(|_| pool.acquire().unwrap()).collect();
        // Before its thread is done, or after; and before those that are in use, or after.
        if round % 2 == 0 {
            drop(pool);
            drop(vms);
        }
    }
    resources::assert_back_to(&before);
}
