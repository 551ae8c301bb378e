//! A guest that runs has been started and is awake, and its memory changes.

use dormouse::{MicroVm, Running};

fn running(vm: MicroVm<Running>) {
    let _ = vm.start();
    let _ = vm.resume();
    let _ = vm.snapshot("base");
    let _ = vm.fork(2);
}

fn main() {}
