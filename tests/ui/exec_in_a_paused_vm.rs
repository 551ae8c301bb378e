//! A paused guest runs nothing.

use dormouse::{MicroVm, Paused};

async fn example(vm: MicroVm<Paused>) {
    let _ = vm.agent().await;
}

fn main() {}
