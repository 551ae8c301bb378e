use dormouse::{ExitStatus, MicroVm, Paused};

fn main() {}

fn status(vm: MicroVm<Paused>) -> ExitStatus {
    vm.exit_status().clone()
}
