use dormouse::{Created, Error, MicroVm};

fn main() {}

fn suspend(vm: MicroVm<Created>) -> Result<(), Error> {
    drop(vm.suspend("vm.d")?);
    Ok(())
}
