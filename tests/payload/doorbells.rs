//! A guest that does nothing but ring the doorbell of a device.

use std::fs;

use dormouse::{BlockConfig, MicroVm};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::virtio_guest::{Driver, Order, REGISTERS, Work};
use crate::{config, output};

/// `mov rax, QueueNotify; again: mov dword ptr [rax], 0; jmp again`.
fn storm() -> Vec<u8> {
    let doorbell = (REGISTERS + 0x50).to_le_bytes();
    [&[0x48, 0xb8][..], &doorbell, &[0xc7, 0, 0, 0, 0, 0, 0xeb, 0xf8]].concat()
}

#[test]
fn a_storm_of_doorbells_in_one_vm_leaves_the_disk_of_another_at_work() {
    let scratch = Scratch::new();
    let image = scratch.join("image");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let storms: Vec<_> = (0..2)
        .map(|_| {
            let (writer, output) = output();
            let config = config(&Program::Driver(storm())).entropy(true).console(writer);
            let vm = MicroVm::create(config).unwrap().start().unwrap();
            assert_eq!(output.next(), b'B');
            vm
        })
        .collect();

    let work = Work::BlockRead { sectors: 2048, order: Order::Random };
    let driver = Driver { device: 0, work, buffer_bytes: 4096, depth: 8, batch: 1000 };
    let (writer, output) = output();
    let config = config(&Program::Driver(driver.image())).block(BlockConfig::new(&image));
    let vm = MicroVm::create(config.memory_mib(64).console(writer)).unwrap().start().unwrap();
    assert_eq!(output.next(), b'B');
    for _ in 0..3 {
        vm.console_input(b".").unwrap();
        assert_eq!([output.next(), output.next()], *b"()");
    }
    assert!(storms.iter().all(|vm| vm.exit_status().is_none()), "a storm is no crime");
}
