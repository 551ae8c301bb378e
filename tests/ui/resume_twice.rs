use dormouse::{Error, MicroVm, Suspended};

fn main() {}

fn resume(vm: MicroVm<Suspended>) -> Result<(), Error> {
    let first = vm.resume()?;
    let second = vm.resume()?;
    drop((first, second));
    Ok(())
}
