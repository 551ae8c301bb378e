//! A guest that has not been started yet can be started, and nothing else.

use dormouse::{Created, MicroVm};

async fn created(vm: MicroVm<Created>) {
    let _ = vm.pause();
    let _ = vm.resume();
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
