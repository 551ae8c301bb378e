use dormouse::{Created, Error, MicroVm};

fn main() {}

fn type_into(vm: MicroVm<Created>) -> Result<(), Error> {
    vm.console_input("hello")
}
