//! Addresses and routes, by rtnetlink(7).

use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::protocol::{Failure, FailureKind, Interface};
use crate::sys::NetlinkSocket;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTNH_F_ONLINK: u32 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// How long an interface may take to appear.
const PATIENCE: Duration = Duration::from_secs(5);

const LOOPBACK: &str = "lo";

/// Sets the loopback up.
pub(crate) fn set_loopback_up() -> Result<(), Failure> {
    let up = || Netlink::open()?.set_up(index_of(LOOPBACK)?);
    up().map_err(|error| Failure::of("set up the loopback", &error))
}

/// Gives eth0, eth1, … the addresses of `interfaces`, in place of `old` ones; what has no addresses
/// in the list keeps its own.
pub(crate) fn configure(interfaces: &[Interface], old: &[Interface]) -> Result<(), Failure> {
    for (at, interface) in interfaces.iter().enumerate() {
        let name = format!("eth{at}");
        let addresses = parse_all(&interface.addresses, Address::parse)?;
        let gateways = parse_all(&interface.gateways, |gateway| gateway.parse().ok())?;
        let old = old.get(at).map_or(&[][..], |interface| &interface.addresses);
        let old = parse_all(old, Address::parse)?;
        let configured = (|| {
            let index = wait_for(&name)?;
            let mut netlink = Netlink::open()?;
            for address in old.iter().filter(|old| !addresses.contains(old)) {
                // One that somebody else has removed is none.
                let _ = netlink.change_address(RTM_DELADDR, index, address);
            }
            netlink.set_up(index)?;
            for address in &addresses {
                netlink.change_address(RTM_NEWADDR, index, address)?;
            }
            for gateway in &gateways {
                netlink.set_gateway(index, *gateway)?;
            }
            Ok(())
        })();
        configured.map_err(|e: io::Error| Failure::of(format!("configure {name}"), &e))?;
    }
    Ok(())
}

fn parse_all<T>(texts: &[String], parse: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, Failure> {
    let parsed = texts.iter().map(|text| {
        let invalid = || Failure::new(FailureKind::Invalid, format!("use the address {text}"));
        parse(text).ok_or_else(invalid)
    });
    parsed.collect()
}

/// The number of an interface.
fn index_of(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn wait_for(name: &str) -> io::Result<u32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match index_of(name) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
            result => return result,
        }
    }
}

/// An address, and how many of its bits are the network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    ip: IpAddr,
    prefix: u8,
}

impl Address {
    fn parse(text: &str) -> Option<Self> {
        let (ip, prefix) = text.split_once('/')?;
        let (ip, prefix) = (ip.parse::<IpAddr>().ok()?, prefix.parse().ok()?);
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then_some(Self { ip, prefix })
    }

    /// The address that all of an IPv4 network listen to, if there can be others.
    fn broadcast(&self) -> Option<[u8; 4]> {
        let IpAddr::V4(ip) = self.ip else { return None };
        let hosts = u32::MAX.checked_shr(self.prefix.into()).filter(|hosts| *hosts > 1)?;
        Some((ip.to_bits() | hosts).to_be_bytes())
    }
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A request: a header (`struct nlmsghdr`), a fixed part, and attributes.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Adds a `struct rtattr`: its length, its kind, and its value, up to a multiple of four bytes.
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

struct Netlink(NetlinkSocket);

impl Netlink {
    fn open() -> io::Result<Self> {
        NetlinkSocket::open().map(Self)
    }

    /// Sends a request, and waits for its answer.
    fn request(&mut self, request: Request) -> io::Result<()> {
        self.0.0.write_all(&request.finish())?;
        let mut answer = [0; 4096];
        let count = self.0.0.read(&mut answer)?;
        let answer = answer.get(..count).unwrap_or_default();
        let word = |at: usize| answer.get(at..at + 4).and_then(|word| word.try_into().ok());
        let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
        match (kind, word(HEADER_BYTES).map(i32::from_ne_bytes)) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(error)) => {
                Err(io::Error::from_raw_os_error(error.saturating_neg()))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn set_up(&mut self, index: u32) -> io::Result<()> {
        // struct ifinfomsg: family, type, index, flags, and which of them change.
        let words = [0, index, IFF_UP, IFF_UP].map(u32::to_ne_bytes);
        self.request(Request::new(RTM_NEWLINK, 0, words.as_flattened()))
    }

    fn change_address(&mut self, kind: u16, index: u32, address: &Address) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix, flags, scope, index. Nobody else has the address: that it
        // were looked for would take seconds.
        let [a, b, c, d] = index.to_ne_bytes();
        let fixed = [family(address.ip), address.prefix, IFA_F_NODAD, 0, a, b, c, d];
        let octets = octets(address.ip);
        let mut request = Request::new(kind, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &octets)
            .attribute(IFA_ADDRESS, &octets);
        if let Some(broadcast) = address.broadcast() {
            request = request.attribute(IFA_BROADCAST, &broadcast);
        }
        self.request(request)
    }

    /// Sends what is for no known network to a gateway, also to one outside of the interface's own.
    fn set_gateway(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        // struct rtmsg: family, lengths of destination and source, service, table, protocol, scope,
        // type, flags.
        let [a, b, c, d] = RTNH_F_ONLINK.to_ne_bytes();
        let head = [family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST];
        let fixed = [&head[..], &[a, b, c, d]].concat();
        let request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(RTA_GATEWAY, &octets(gateway))
            .attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_prefix_that_fits() {
        let address = Address::parse("10.0.2.15/24").unwrap();
        assert_eq!((address.prefix, address.broadcast()), (24, Some([10, 0, 2, 255])));
        assert_eq!(Address::parse("10.0.2.15/31").unwrap().broadcast(), None);
        assert_eq!(Address::parse("10.0.2.15/32").unwrap().broadcast(), None);
        assert_eq!(Address::parse("10.0.2.15/0").unwrap().broadcast(), Some([255; 4]));
        assert_eq!(Address::parse("fd00::2/64").unwrap().broadcast(), None);
        for wrong in ["10.0.2.15", "10.0.2.15/33", "10.0.2/24", "fd00::/129", "x/24", "/", ""] {
            assert_eq!(Address::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let bytes =
            Request::new(RTM_NEWADDR, NLM_F_CREATE, &[1; 8]).attribute(7, b"abcde").finish();
        assert_eq!(bytes[..4], 36_u32.to_ne_bytes());
        assert_eq!(bytes[4..8], [20, 0, 5, 4]);
        assert_eq!(bytes[24..], *b"\x09\0\x07\0abcde\0\0\0");
    }

    #[test]
    fn the_kernel_answers_with_its_errors() {
        let mut netlink = Netlink::open().unwrap();
        let error = netlink.set_up(i32::MAX as u32).unwrap_err();
        // ENODEV, or EPERM for who may not change the network.
        assert!(matches!(error.raw_os_error(), Some(19 | 1)), "{error}");
    }
}
