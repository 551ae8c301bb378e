use dormouse::{Created, Error, MicroVm};

fn main() {}

fn resume(vm: MicroVm<Created>) -> Result<(), Error> {
    drop(vm.resume()?);
    Ok(())
}
