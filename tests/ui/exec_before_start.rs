use dormouse::{Created, MicroVm};

fn main() {}

fn exec(vm: MicroVm<Created>) {
    vm.exec("true", []);
}
