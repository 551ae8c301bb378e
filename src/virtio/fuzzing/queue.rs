//! A virtqueue in RAM that holds anything.

use vm_memory::GuestAddress;

use super::guest::interrupt;
use super::input::Input;
use super::queue_state;
use super::ram::{RAM, ram};
use crate::virtio::VirtQueue;

/// Any rings and descriptors: chains that come out are inside of RAM, and no longer than they
/// may be.
pub fn virtqueue(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (ram, max_size) = (ram(), 1 << (input.byte() & 15));
    let mut queue = VirtQueue::new(max_size, interrupt()).expect("a power of two");
    let state = queue_state(&mut input);
    if !queue.restore(&state, &ram) {
        return;
    }
    assert!(queue.size() <= max_size);
    // A ring that is not ready is never served.
    if !state.ready {
        return;
    }
    let ram_bytes: usize = RAM.iter().map(|(_, len)| len).sum();
    let mut taken = Vec::new();
    while !input.is_empty() {
        let broken = match input.byte() % 8 {
            0..=2 => {
                let (address, len) = (input.address(), input.byte().into());
                let _ = ram.write(input.bytes(len), GuestAddress(address));
                false
            }
            3 | 4 => match queue.next(&ram) {
                Ok(Some(chain)) => {
                    // A descriptor's buffer is inside of RAM; there are at most `size` of them.
                    let most = u64::from(queue.size()) * ram_bytes as u64;
                    assert!(chain.readable.len() + chain.writable.len() <= most);
                    let mut copy = vec![0; 300];
                    let (readable, writable) = (chain.readable.len(), chain.writable.len());
                    assert_eq!(chain.readable.copy_to(&mut copy) as u64, readable.min(300));
                    assert_eq!(chain.writable.copy_from(&copy) as u64, writable.min(300));
                    let at = u64::from(input.u16());
                    match chain.readable.split_at(at) {
                        Some((left, right)) => {
                            assert_eq!((left.len(), right.len()), (at, readable - at));
                        }
                        None => assert!(at > readable),
                    }
                    taken.push(chain.head);
                    false
                }
                Ok(None) => false,
                Err(_) => true,
            },
            5 => {
                let at = usize::from(input.byte());
                let head = if at < taken.len() { taken.swap_remove(at) } else { at as u16 };
                queue.add_used(&ram, head, input.u32()).is_err()
            }
            6 => {
                if taken.pop().is_some() {
                    queue.put_back();
                }
                false
            }
            _ => queue.wait_for_more(&ram).is_err() || queue.signal(&ram).is_err(),
        };
        // As the transport does: it asks for a reset, and goes no further.
        if broken {
            return;
        }
        let _ = queue.state();
    }
}
