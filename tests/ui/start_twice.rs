use dormouse::{Created, Error, MicroVm};

fn main() {}

fn start_twice(vm: MicroVm<Created>) -> Result<(), Error> {
    let running = vm.start()?;
    let again = vm.start()?;
    drop((running, again));
    Ok(())
}
