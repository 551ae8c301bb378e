//! A paused guest does nothing, and so neither ends nor hears anybody.

use dormouse::{MicroVm, Paused};

async fn paused(vm: MicroVm<Paused>) {
    let _ = vm.start();
    let _ = vm.pause();
    let _ = vm.wait();
    let _ = vm.exit_status();
    let _ = vm.console_input("hello");
    let _ = vm.connect(80);
    let _ = vm.agent().await;
}

fn main() {}
