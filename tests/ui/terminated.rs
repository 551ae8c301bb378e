//! A guest that has ended says how, and nothing else.

use dormouse::{MicroVm, Terminated};

async fn terminated(vm: MicroVm<Terminated>) {
    let _ = vm.start();
    let _ = vm.pause();
    let _ = vm.resume();
    let _ = vm.suspend("vm.asleep");
    let _ = vm.snapshot("base");
    let _ = vm.fork(2);
    let _ = vm.wait();
    let _ = vm.terminate();
    let _ = vm.console_input("hello");
    let _ = vm.connect(80);
    let _ = vm.agent().await;
}

fn main() {}
