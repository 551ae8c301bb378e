//! A guest that sleeps can be woken, become a snapshot, or be given up.

use dormouse::{MicroVm, Suspended};

async fn suspended(vm: MicroVm<Suspended>) {
    let _ = vm.start();
    let _ = vm.pause();
    let _ = vm.suspend("vm.asleep");
    let _ = vm.snapshot("base");
    let _ = vm.fork(2);
    let _ = vm.wait();
    let _ = vm.exit_status();
    let _ = vm.console_input("hello");
    let _ = vm.connect(80);
    let _ = vm.agent().await;
}

fn main() {}
