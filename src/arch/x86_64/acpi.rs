//! The ACPI tables: processors, interrupt controllers, devices, and how to switch the machine
//! off.
//!
//! The machine is "hardware-reduced" (ACPI 6.5 §4.1): no PM timer, no SCI, no fixed registers,
//! but a sleep control and a reset register at ports of ours. That is what modern guests expect
//! of a virtual machine, and it spares us a PIC, a PIT and an RTC.

use acpi_tables::Aml;
use acpi_tables::aml::{self, EISAName, IO, Interrupt, Memory32Fixed, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::layout;

const OEM_ID: [u8; 6] = *b"DORMSE";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Length of the header that every table but the RSDP begins with.
const TABLE_HEADER_BYTES: u32 = 36;

/// What the guest writes to the reset register (FADT, RESET_VALUE).
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of S5, "soft off", in the package `_S5`.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

/// The device that has the VM's generation, and what it is notified with when that changed.
const GENERATION: &str = "VGEN";
const GENERATION_CHANGED: u8 = 0x80;

/// IA-PC boot architecture flags (ACPI 6.5 table 5.11): what a guest must not look for. The bits
/// for legacy devices and for a keyboard controller stay clear.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// The tables of a machine with `vcpus` processors and so many virtio devices, to be written at
/// [`layout::ACPI`] as they are: they hold their own addresses.
pub(crate) fn tables(vcpus: u8, virtio_devices: u32) -> Vec<u8> {
    let mut blob = Blob { bytes: vec![0; RSDP_SPACE], start: layout::ACPI.0 };
    let dsdt = blob.append(&dsdt(vcpus, virtio_devices));
    let fadt = blob.append(&fadt(dsdt));
    let madt = blob.append(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = blob.append(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    blob.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    blob.bytes
}

/// The RSDP comes first, where a guest that scans for it finds it; it is 36 bytes long.
const RSDP_SPACE: usize = 64;

/// Tables one after the other, each at a multiple of 16.
struct Blob {
    bytes: Vec<u8>,
    start: u64,
}

impl Blob {
    /// Appends a table and returns its guest physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let register =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means absent: there is no power button and no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = register(layout::POWER_PORT);
    fadt.sleep_status_reg = register(layout::POWER_PORT + 1);
    fadt.reset_reg = register(layout::RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(vcpus: u8, virtio_devices: u32) -> Sdt {
    // Not in the table yet, which sums itself up anew at each byte.
    let mut objects = Vec::new();

    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let serial_ports = ports(layout::SERIAL_PORT, layout::SERIAL_PORT_COUNT);
    let serial = ResourceTemplate::new(vec![&interrupt, &serial_ports]);
    let serial_id = EISAName::new("PNP0501");
    device(&mut objects, "COM1", &[("_HID", &serial_id), ("_UID", &aml::ZERO), ("_CRS", &serial)]);

    let pvpanic_port = ports(layout::PVPANIC_PORT, 1);
    let pvpanic = ResourceTemplate::new(vec![&pvpanic_port]);
    device(&mut objects, "PEVT", &[("_HID", &"QEMU0001"), ("_CRS", &pvpanic)]);

    for id in 0..virtio_devices {
        let (address, len) = layout::virtio_registers(id);
        let registers = Memory32Fixed::new(true, address as u32, len as u32);
        let interrupt = Interrupt::new(true, true, false, false, layout::virtio_irq(id));
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        let named: [(&str, &dyn Aml); 3] =
            [("_HID", &"LNRO0005"), ("_UID", &id), ("_CRS", &resources)];
        device(&mut objects, &format!("V{id:03X}"), &named);
    }

    generation(&mut objects);

    // ACPI 6.5 §8.4: the MADT's entry of the same _UID has the processor's APIC id.
    for id in 0..vcpus {
        device(&mut objects, &format!("C{id:03X}"), &[("_HID", &"ACPI0007"), ("_UID", &id)]);
    }

    let s5 = aml::Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5]);
    aml::Name::new("_S5_".into(), &s5).to_aml_bytes(&mut objects);

    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&objects);
    dsdt
}

/// The VM's generation, and the event that says that it changed. Sources: "Virtual Machine
/// Generation ID" (Microsoft, 2012); ACPI 6.5 §5.6.9, interrupt-signalled events.
fn generation(table: &mut Vec<u8>) {
    let address = layout::VM_GENERATION.0;
    let address = (address as u32, (address >> 32) as u32);
    let address = aml::Package::new(vec![&address.0, &address.1]);
    // The paper's name, by which guests find it; Linux knows both.
    let compatible = aml::Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let objects: [(&str, &dyn Aml); 4] = [
        ("_HID", &"DORM0001"),
        ("_CID", &compatible),
        ("_DDN", &"VM_Gen_Counter"),
        ("ADDR", &address),
    ];
    device(table, GENERATION, &objects);

    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_IRQ);
    let interrupt = ResourceTemplate::new(vec![&interrupt]);
    let generation = aml::Path::new(GENERATION);
    let notify = aml::Notify::new(&generation, &GENERATION_CHANGED);
    let (event, ours) = (aml::Arg(0), layout::EVENT_IRQ);
    let is_ours = aml::Equal::new(&event, &ours);
    let when_ours = aml::If::new(&is_ours, vec![&notify]);
    let handler = aml::Method::new("_EVT".into(), 1, true, vec![&when_ours]);
    let objects: [(&str, &dyn Aml); 3] =
        [("_HID", &"ACPI0013"), ("_UID", &aml::ZERO), ("_CRS", &interrupt)];
    device_with(table, "EVNT", &objects, &[&handler]);
}

/// Adds a device under `\_SB` with these named objects.
fn device(table: &mut Vec<u8>, name: &str, objects: &[(&str, &dyn Aml)]) {
    device_with(table, name, objects, &[]);
}

/// The same, with methods.
fn device_with(
    table: &mut Vec<u8>,
    name: &str,
    objects: &[(&str, &dyn Aml)],
    methods: &[&dyn Aml],
) {
    let objects: Vec<aml::Name> =
        objects.iter().map(|(name, value)| aml::Name::new((*name).into(), *value)).collect();
    let objects = objects.iter().map(|object| object as &dyn Aml);
    let objects = objects.chain(methods.iter().copied()).collect();
    let device = aml::Device::new(name.into(), objects);
    aml::Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(table);
}

fn ports(start: u16, count: u8) -> IO {
    IO::new(start, start, 1, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let blob = tables(32, 19);
        assert!(blob.len() < 0x2_0000, "they end before the first MiB does");
        let at = |address: u64| &blob[(address - layout::ACPI.0) as usize..];
        let u64_at = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let table = |address: u64| {
            let bytes = at(address);
            let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
            assert_eq!(checksum(&bytes[..len]), 0, "{:?}", &bytes[..4]);
            bytes[..len].to_vec()
        };

        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!(checksum(&blob[..20]), 0);
        assert_eq!(checksum(&blob[..36]), 0);
        let xsdt = table(u64_at(&blob[24..]));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(u64_at(&xsdt[36..]));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(u64_at(&xsdt[44..]));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(u64_at(&fadt[140..]));
        assert_eq!(&dsdt[..4], b"DSDT");
    }
}
