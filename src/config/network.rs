//! A network interface.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimit, make_absolute};
use crate::error::{Error, ErrorKind};

/// The smallest MTU of IPv4 (RFC 791), and the greatest that a virtio device can name.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;

/// A network interface of a guest, and what is at the other end of its cable.
///
/// | | needs | fit for |
/// | --- | --- | --- |
/// | [`user`](Self::user) | the program passt, no rights | a guest that reaches out, a few forwarded ports |
/// | [`tap`](Self::tap) | a tap, set up by the administrator | full speed, bridges, firewalls |
/// | [`pair`](Self::pair), [`socket`](Self::socket) | nothing | VMs joined to one another or to a program |
///
/// ```
/// use dormouse::{NetConfig, UserNetwork};
///
/// let outward = NetConfig::user(UserNetwork::new());
/// let bridged = NetConfig::tap("tap0").mac([0x02, 0, 0, 0, 0, 0x01]).mtu(9000);
/// ```
///
/// It serializes, but for one with a descriptor.
///
/// Source: virtio 1.2 §5.1.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    pub(crate) backend: NetBackend,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<MacAddress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtu: Option<u16>,
    #[serde(default, skip_serializing_if = "RateLimit::is_unlimited")]
    pub(crate) receive_limit: RateLimit,
    #[serde(default, skip_serializing_if = "RateLimit::is_unlimited")]
    pub(crate) transmit_limit: RateLimit,
}

/// What is at the other end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NetBackend {
    /// The name of a tap.
    Tap(String),
    User(UserNetwork),
    /// What was a descriptor of another process: each VM needs one of its own.
    Missing,
    // What cannot be written down.
    #[serde(skip)]
    TapFd(Arc<OwnedFd>),
    #[serde(skip)]
    Socket(Arc<Cable>),
}

/// A socket that frames go over, and what a VM that went to sleep had not come to the end of on it.
pub(crate) struct Cable {
    pub(crate) socket: UnixStream,
    rest: Mutex<CableRest>,
}

#[derive(Default)]
pub(crate) struct CableRest {
    /// Frames that no guest has yet, of which the last may not have all come.
    pub(crate) received: Vec<u8>,
    /// The rest of one that has not all been sent, and those after it.
    pub(crate) unsent: Vec<u8>,
}

impl fmt::Debug for Cable {
    /// Without what the guest's frames say.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cable").field(&self.socket).finish()
    }
}

impl Cable {
    fn new(socket: UnixStream) -> Self {
        Self { socket, rest: Mutex::default() }
    }

    /// What whoever has it next goes on from.
    pub(crate) fn take(&self) -> CableRest {
        std::mem::take(&mut *self.rest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn put_back(&self, rest: CableRest) {
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = rest;
    }
}

impl NetConfig {
    /// A tap of the host: the guest is at one end, the host's interface `name` at the other.
    ///
    /// One that exists is used and kept. For a program without CAP_NET_ADMIN the administrator
    /// makes it: `ip tuntap add dev tap0 mode tap user alice`. One that does not exist is made,
    /// which needs CAP_NET_ADMIN, and goes with the VM. Either way it is the host that gives the
    /// interface its address and sets it up (`ip addr add 10.0.0.1/24 dev tap0`, `ip link set
    /// tap0 up`); until then, and whenever it is down, the guest finds its link down.
    ///
    /// Checksums and segmentation are left to whoever is last, so bulk data moves in frames of
    /// up to 64 KiB.
    pub fn tap(name: impl Into<String>) -> Self {
        Self::with(NetBackend::Tap(name.into()))
    }

    /// A tap that is open already, also in another network namespace: it was attached to with
    /// the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. It becomes non-blocking. The descriptor is
    /// closed when the configuration and the VM are gone. It serves one VM at a time.
    pub fn tap_fd(tap: impl Into<OwnedFd>) -> Self {
        Self::with(NetBackend::TapFd(Arc::new(tap.into())))
    }

    /// The host's network as the host's programs have it, through a child process
    /// [passt](https://passt.top), which needs no rights at all (package `passt`). The guest
    /// gets addresses by DHCP, DHCPv6 and router advertisements: those of the host.
    ///
    /// The process ends with the VM. If it ends before, the guest finds its link down.
    pub fn user(network: UserNetwork) -> Self {
        Self::with(NetBackend::User(network))
    }

    /// Any program that takes frames over a stream socket, each after its length as 32 bits,
    /// big-endian, as passt, gvproxy and QEMU's stream back end do. Frames are of 14 to 65,550
    /// bytes; a length above that ends the connection. The socket becomes non-blocking. It
    /// serves one VM at a time.
    pub fn socket(socket: impl Into<UnixStream>) -> Self {
        Self::with(NetBackend::Socket(Arc::new(Cable::new(socket.into()))))
    }

    /// Two ends of one cable, for two VMs that are joined to one another and to nothing else.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Resources`] where there is no descriptor left.
    pub fn pair() -> Result<(Self, Self), Error> {
        let (one, other) = UnixStream::pair().map_err(|error| {
            Error::new(ErrorKind::Resources, error).fix("raise the limit of open files (ulimit -n)")
        })?;
        Ok((Self::socket(one), Self::socket(other)))
    }

    /// The guest's hardware address. Unless set, each VM gets a random one of those that are
    /// locally administered; so clones of a configuration differ.
    #[must_use]
    pub fn mac(mut self, address: [u8; 6]) -> Self {
        self.mac = Some(MacAddress(address));
        self
    }

    /// The largest packet that the guest shall send, in bytes without the Ethernet header: 68 to
    /// 65,535. The guest chooses, mostly 1,500, unless set. A tap's own MTU is set on the host;
    /// where that is larger, a guest that takes no large frames (TSO) loses some unless this is as large.
    #[must_use]
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.mtu = Some(bytes);
        self
    }

    /// How fast the guest may receive; not limited unless set. Bytes are those of frames,
    /// operations are frames, of up to 64 KiB each over a tap. What is too much waits at the
    /// other end. It can be changed while the guest runs, see
    /// [`MicroVm::set_network_rate_limits`](crate::MicroVm::set_network_rate_limits).
    #[must_use]
    pub fn receive_rate_limit(mut self, limit: RateLimit) -> Self {
        self.receive_limit = limit;
        self
    }

    /// How fast the guest may transmit; as [`receive_rate_limit`](Self::receive_rate_limit).
    /// What is too much waits in the guest.
    #[must_use]
    pub fn transmit_rate_limit(mut self, limit: RateLimit) -> Self {
        self.transmit_limit = limit;
        self
    }

    /// Whether it has a descriptor, which cannot be written down.
    pub(crate) fn has_descriptor(&self) -> bool {
        matches!(self.backend, NetBackend::TapFd(_) | NetBackend::Socket(_))
    }

    pub(super) fn without_descriptor(&self) -> Self {
        match self.has_descriptor() {
            true => Self { backend: NetBackend::Missing, ..self.clone() },
            false => self.clone(),
        }
    }

    /// Has its program found from whatever directory a process is in.
    pub(super) fn make_absolute(&mut self) {
        if let NetBackend::User(user) = &mut self.backend
            && user.is_at_a_path()
        {
            make_absolute(&mut user.program);
        }
    }

    fn with(backend: NetBackend) -> Self {
        let limit = RateLimit::default();
        Self { backend, mac: None, mtu: None, receive_limit: limit, transmit_limit: limit }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if let Some(mtu) = self.mtu.filter(|mtu| !MTUS.contains(mtu)) {
            return Err(ConfigError::Mtu { mtu });
        }
        self.receive_limit.check()?;
        self.transmit_limit.check()?;
        if let NetBackend::User(user) = &self.backend {
            user.check()?;
        }
        match self.mac {
            Some(mac) if !mac.is_of_a_station() => Err(ConfigError::Mac { mac }),
            _ => Ok(()),
        }
    }
}

/// How a guest sees the host's network through passt.
///
/// The guest may connect to wherever this user's programs may, but for the host's loopback
/// addresses. Nobody reaches the guest, but through forwarded ports. What passt has to say, such
/// as that the host has no default route, is in the system's log.
///
/// ```
/// use dormouse::UserNetwork;
///
/// // Port 8080 of the host, on every address, is port 80 of the guest.
/// let network = UserNetwork::new().forward_tcp(8080, 80).nameserver([9, 9, 9, 9]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNetwork {
    pub(crate) program: PathBuf,
    pub(crate) tcp: Vec<(u16, u16)>,
    pub(crate) udp: Vec<(u16, u16)>,
    pub(crate) dns: Vec<IpAddr>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) host_loopback: bool,
}

impl Default for UserNetwork {
    fn default() -> Self {
        Self {
            program: "passt".into(),
            tcp: Vec::new(),
            udp: Vec::new(),
            dns: Vec::new(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            host_loopback: false,
        }
    }
}

impl UserNetwork {
    /// The way out, and no port forwarded.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where passt is: a path, or a name that is looked for in PATH. `passt` unless set.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = path.into();
        self
    }

    /// Makes a TCP port of the host, on each of its addresses, one of the guest: 1 to 65,535, each of
    /// the host's once.
    #[must_use]
    pub fn forward_tcp(mut self, host: u16, guest: u16) -> Self {
        self.tcp.push((host, guest));
        self
    }

    /// Makes a UDP port of the host one of the guest; as [`forward_tcp`](Self::forward_tcp).
    #[must_use]
    pub fn forward_udp(mut self, host: u16, guest: u16) -> Self {
        self.udp.push((host, guest));
        self
    }

    /// A name server for the guest, in place of the host's; several are several calls.
    #[must_use]
    pub fn nameserver(mut self, server: impl Into<IpAddr>) -> Self {
        self.dns.push(server.into());
        self
    }

    /// The guest's address, one of each version, in place of the host's.
    #[must_use]
    pub fn address(mut self, address: impl Into<IpAddr>) -> Self {
        self.addresses.push(address.into());
        self
    }

    /// The gateway's address, one of each version, in place of the host's.
    #[must_use]
    pub fn gateway(mut self, address: impl Into<IpAddr>) -> Self {
        self.gateways.push(address.into());
        self
    }

    /// Lets the guest reach what listens on the host's loopback addresses, at the gateway's
    /// address. Off unless set: such services often take whoever connects for a friend.
    #[must_use]
    pub fn host_loopback(mut self, on: bool) -> Self {
        self.host_loopback = on;
        self
    }

    /// Whether the program is named by a path, and is not looked for in PATH.
    pub(crate) fn is_at_a_path(&self) -> bool {
        self.program.components().count() > 1
    }

    /// Checks what passt would refuse, which then is a link that is down.
    fn check(&self) -> Result<(), ConfigError> {
        for forwarded in [&self.tcp, &self.udp] {
            if forwarded.iter().any(|&(host, guest)| host == 0 || guest == 0) {
                return Err(ConfigError::ForwardedNothing);
            }
            let mut ports: Vec<_> = forwarded.iter().map(|&(host, _)| host).collect();
            ports.sort_unstable();
            if let Some(twice) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(ConfigError::ForwardedTwice { port: twice[0] });
            }
        }
        for (what, addresses) in [("addresses", &self.addresses), ("gateways", &self.gateways)] {
            let of_version_4 = addresses.iter().filter(|address| address.is_ipv4()).count();
            if of_version_4 > 1 || addresses.len() - of_version_4 > 1 {
                return Err(ConfigError::TwoOfOneVersion { what });
            }
        }
        Ok(())
    }
}

/// A hardware address; as text, six pairs of hexadecimal digits with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct MacAddress(pub(crate) [u8; 6]);

impl MacAddress {
    /// One of those that are locally administered, out of six random bytes.
    pub(crate) fn local([first, rest @ ..]: [u8; 6]) -> Self {
        let [a, b, c, d, e] = rest;
        Self([first & !GROUP | LOCAL, a, b, c, d, e])
    }

    /// Neither of a group nor nobody's.
    fn is_of_a_station(self) -> bool {
        self.0[0] & GROUP == 0 && self.0 != [0; 6]
    }
}

/// Bits of the first byte (IEEE 802, 8.2).
const GROUP: u8 = 1;
const LOCAL: u8 = 2;

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let mut address = [0; 6];
        for byte in &mut address {
            let is_pair = |part: &&str| part.len() == 2 && !part.contains('+');
            let part = parts.next().filter(is_pair);
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(|| format!("{text:?} is no hardware address"))?;
        }
        match parts.next() {
            None => Ok(Self(address)),
            Some(_) => Err(format!("{text:?} is no hardware address")),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_read_as_they_are_written() {
        let mac = MacAddress([0x02, 0xab, 0, 1, 0x7f, 0xff]);
        assert_eq!(mac.to_string(), "02:ab:00:01:7f:ff");
        assert_eq!("02:AB:00:01:7f:ff".parse(), Ok(mac));
        for bad in ["", "02:ab", "02:ab:00:01:7f:ff:00", "2:ab:00:01:7f:ff", "02:+b:00:01:7f:ff"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn values_that_no_interface_has_are_refused() {
        for mtu in [0, 67] {
            assert!(NetConfig::tap("t").mtu(mtu).check().is_err());
        }
        for mtu in [68, 1500, 65535] {
            NetConfig::tap("t").mtu(mtu).check().unwrap();
        }
        NetConfig::tap("t").mac([0xff; 6]).check().unwrap_err();
        NetConfig::tap("t").mac([0; 6]).check().unwrap_err();
        for random in [[0; 6], [0xff; 6], [1, 2, 3, 4, 5, 6]] {
            NetConfig::tap("t").mac(MacAddress::local(random).0).check().unwrap();
        }
    }

    #[test]
    fn user_networks_that_passt_would_refuse_are_refused() {
        let check = |network| NetConfig::user(network).check();
        let new = UserNetwork::new;
        check(new().forward_tcp(8080, 80).forward_tcp(8081, 80).forward_udp(8080, 80)).unwrap();
        check(new().address([10, 0, 0, 2]).address([0xfd, 0, 0, 0, 0, 0, 0, 2])).unwrap();
        for bad in [
            new().forward_tcp(0, 80),
            new().forward_udp(53, 0),
            new().forward_tcp(8080, 80).forward_tcp(1, 1).forward_tcp(8080, 81),
            new().address([10, 0, 0, 2]).address([10, 0, 0, 3]),
            new().gateway([0xfd, 0, 0, 0, 0, 0, 0, 2]).gateway([0xfd, 0, 0, 0, 0, 0, 0, 3]),
        ] {
            check(bad).unwrap_err();
        }
    }

    #[test]
    fn a_program_at_a_path_is_the_same_one_from_anywhere() {
        let absolute = |program: &str| {
            let mut config = NetConfig::user(UserNetwork::new().program(program));
            config.make_absolute();
            let NetBackend::User(user) = config.backend else { panic!("{config:?}") };
            user.program
        };
        assert_eq!(absolute("passt"), PathBuf::from("passt"));
        assert_eq!(absolute("./passt"), std::env::current_dir().unwrap().join("passt"));
    }

    #[test]
    fn what_has_a_descriptor_cannot_be_written_down() {
        let (one, _other) = NetConfig::pair().unwrap();
        let error = serde_json::to_string(&one).unwrap_err();
        assert!(error.to_string().contains("Socket"), "{error}");
        let tap = NetConfig::tap("tap0").mac([2, 0, 0, 0, 0, 1]).mtu(9000);
        let text = serde_json::to_string(&tap).unwrap();
        assert_eq!(text, r#"{"backend":{"tap":"tap0"},"mac":"02:00:00:00:00:01","mtu":9000}"#);
        let user = r#"{"backend": {"user": {"tcp": [[8080, 80]]}}}"#;
        let user: NetConfig = serde_json::from_str(user).unwrap();
        let NetBackend::User(network) = user.backend else { panic!("{user:?}") };
        assert_eq!(network, UserNetwork::new().forward_tcp(8080, 80));
    }
}
