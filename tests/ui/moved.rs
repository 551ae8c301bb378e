//! A transition takes the VM: who has the new state does not have the old one.

use dormouse::{Created, Error, MicroVm, Paused, Running, Suspended};

fn start(vm: MicroVm<Created>) -> Result<(), Error> {
    let running = vm.start()?;
    let again = vm.start()?;
    drop((running, again));
    Ok(())
}

fn pause(vm: MicroVm<Running>) -> Result<(), Error> {
    let paused = vm.pause()?;
    vm.console_input("hello")?;
    drop(paused);
    Ok(())
}

fn resume(vm: MicroVm<Suspended>) -> Result<(), Error> {
    let first = vm.resume()?;
    let second = vm.resume()?;
    drop((first, second));
    Ok(())
}

fn suspend(mut vm: MicroVm<Paused>) -> Result<(), Error> {
    let asleep = vm.suspend("vm.asleep")?;
    drop(vm.fork(2)?);
    drop(asleep);
    Ok(())
}

fn terminate(vm: MicroVm<Running>) -> Result<(), Error> {
    let ended = vm.terminate();
    vm.console_input("hello")?;
    println!("{}", ended.exit_status());
    Ok(())
}

fn main() {}
