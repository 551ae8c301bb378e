use virtio_drivers::device::rng::VirtIORng;

use super::driver::{TestHal, TestTransport};
use crate::virtio::Rng;

#[test]
fn entropy_differs_and_is_limited() {
    let transport = TestTransport::new(Rng::new().unwrap());
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
