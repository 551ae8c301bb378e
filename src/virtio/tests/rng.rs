use virtio_drivers::device::rng::VirtIORng;

use super::driver::{TestHal, TestTransport};
use crate::config::RateLimit;
use crate::virtio::Rng;

#[test]
fn entropy_differs_and_is_limited() {
    let transport = TestTransport::new(Rng::new(RateLimit::default()).unwrap());
    let mut rng = VirtIORng::<TestHal, _>::new(transport).unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..1000 {
        let mut bytes = [0; 32];
        assert_eq!(rng.request_entropy(&mut bytes).unwrap(), 32);
        assert!(seen.insert(bytes));
    }
    let mut much = vec![0; 1 << 20];
    assert_eq!(rng.request_entropy(&mut much).unwrap(), 64 << 10);
}

#[test]
fn a_limited_device_gives_what_its_rate_allows_and_goes_on_by_itself() {
    // 64 KiB at once, and then nothing for an hour, but for what the host changes.
    let limit = RateLimit::default().bytes_per_second(1).burst_bytes(64 << 10);
    let (transport, host) = TestTransport::with_handle(Rng::new(limit).unwrap());
    let mut rng = VirtIORng::<TestHal, _>::new(transport).unwrap();
    let mut much = vec![0; 64 << 10];
    assert_eq!(rng.request_entropy(&mut much).unwrap(), 64 << 10);

    let later = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let fast = RateLimit::default().bytes_per_second(100 << 20).burst_bytes(64 << 10);
        host.with(|rng| rng.set_rate_limit(fast));
        host
    });
    // Each waits for the device's own timer: the driver rings once.
    for _ in 0..20 {
        assert_eq!(rng.request_entropy(&mut much).unwrap(), 64 << 10);
    }
    let crate::metrics::DeviceMetrics::Entropy(metrics) = later.join().unwrap().metrics() else {
        panic!("another device");
    };
    assert_eq!((metrics.requests, metrics.bytes), (21, 21 << 16));
}
