//! The few netlink messages that the hot path needs: links and addresses (rtnetlink), elements of nftables sets.
//!
//! Each call opens a socket, asks, reads the kernel's answer and closes it: about 50 µs, against 2 to 4 ms for an exec of
//! `ip` or `nft`. The calls block for that long and need no executor, since a thread that has just entered a network
//! namespace of its own has none. What is rare and large (the whole rule set) goes through `nft` instead, as text that
//! people can read.
//!
//! Sources: linux/netlink.h, linux/rtnetlink.h, linux/netfilter/nf_tables.h, rtnetlink(7).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// rtnetlink is protocol 0, which the system call takes as none.
const ROUTE: Option<Protocol> = None;

/// A hardware (Ethernet) address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac(pub [u8; 6]);

impl Mac {
    /// Parses `02:00:00:00:00:01`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(bytes))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An interface as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Never given twice in the life of a network namespace, other than the name.
    pub index: u32,
    /// Index of the bridge that it is a port of.
    pub master: Option<u32>,
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub up: bool,
    /// `bridge`, `veth` …
    pub kind: Option<String>,
}

/// What to change of an interface; what is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkChange {
    pub up: bool,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub master: Option<u32>,
}

/// The interface of a name in the calling thread's network namespace.
pub(super) fn link(name: &str) -> io::Result<Option<Link>> {
    let mut request = Message::new(libc::RTM_GETLINK, 0);
    request.interface(0, 0, 0);
    request.attribute(libc::IFLA_IFNAME, &c_string(name));
    match exchange(ROUTE, &[request]) {
        Ok(replies) => Ok(replies.iter().find_map(|reply| parse_link(reply))),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes a bridge, down and without addresses. `AlreadyExists` when an interface has the name.
pub(super) fn create_bridge(name: &str, mac: Mac, mtu: u32) -> io::Result<()> {
    let mut request = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    request.interface(0, 0, 0);
    request.attribute(libc::IFLA_IFNAME, &c_string(name));
    request.attribute(libc::IFLA_ADDRESS, &mac.0);
    request.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
    request.nested(libc::IFLA_LINKINFO, |info| info.attribute(libc::IFLA_INFO_KIND, b"bridge"));
    exchange(ROUTE, &[request]).map(drop)
}

/// Changes an interface.
pub(super) fn change_link(index: u32, change: LinkChange) -> io::Result<()> {
    let mut request = Message::new(libc::RTM_NEWLINK, 0);
    let up = if change.up { libc::IFF_UP as u32 } else { 0 };
    request.interface(index, up, up);
    if let Some(mac) = change.mac {
        request.attribute(libc::IFLA_ADDRESS, &mac.0);
    }
    if let Some(mtu) = change.mtu {
        request.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
    }
    if let Some(master) = change.master {
        request.attribute(libc::IFLA_MASTER, &master.to_ne_bytes());
    }
    exchange(ROUTE, &[request]).map(drop)
}

/// Brings the loopback interface of the calling thread's network namespace up. Its index is 1 in every namespace.
pub(super) fn loopback_up() -> io::Result<()> {
    change_link(1, LinkChange { up: true, ..LinkChange::default() })
}

/// Removes an interface; of a veth both ends. Fine when it is gone already.
pub(super) fn delete_link(index: u32) -> io::Result<()> {
    let mut request = Message::new(libc::RTM_DELLINK, 0);
    request.interface(index, 0, 0);
    match exchange(ROUTE, &[request]) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        done => done.map(drop),
    }
}

/// Gives an interface an address. Fine when it has it already.
pub(super) fn ensure_address(index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut request = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    request.bytes.extend_from_slice(&[libc::AF_INET as u8, prefix, 0, 0]);
    request.bytes.extend_from_slice(&index.to_ne_bytes());
    let broadcast = Ipv4Addr::from(u32::from(address) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0));
    request.attribute(libc::IFA_LOCAL, &address.octets());
    request.attribute(libc::IFA_ADDRESS, &address.octets());
    request.attribute(libc::IFA_BROADCAST, &broadcast.octets());
    match exchange(ROUTE, &[request]) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done.map(drop),
    }
}

/// The family of an nftables table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Inet,
    Bridge,
}

/// One element of a set, or of a map when it has data. Fields of a concatenation are padded to 4 bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub family: Family,
    pub set: &'static str,
    pub key: Vec<u8>,
    pub data: Option<Vec<u8>>,
}

/// Adds elements to the sets of `table`, or removes them, all or none. Adding what is there is fine; removing what is
/// not there is an error (`NotFound`), and so is a missing table.
pub(super) fn change_elements(table: &str, elements: &[Element], add: bool) -> io::Result<()> {
    const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
    // NFNL_MSG_BATCH_BEGIN and _END: what is between them is one transaction.
    let mut messages = vec![Message::batch(0x10)];
    for element in elements {
        let (kind, flags) = if add {
            (libc::NFT_MSG_NEWSETELEM as u16, libc::NLM_F_CREATE)
        } else {
            (libc::NFT_MSG_DELSETELEM as u16, 0)
        };
        let mut message = Message::new(SUBSYSTEM << 8 | kind, flags);
        let family = match element.family {
            Family::Inet => 1,   // NFPROTO_INET
            Family::Bridge => 7, // NFPROTO_BRIDGE
        };
        message.bytes.extend_from_slice(&[family, 0, 0, 0]);
        message.attribute(NFTA_SET_ELEM_LIST_TABLE, &c_string(table));
        message.attribute(NFTA_SET_ELEM_LIST_SET, &c_string(element.set));
        message.nested(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
            list.nested(NFTA_LIST_ELEM, |item| {
                item.nested(NFTA_SET_ELEM_KEY, |key| key.attribute(NFTA_DATA_VALUE, &element.key));
                // The key alone tells which element is to go.
                if let (Some(data), true) = (&element.data, add) {
                    item.nested(NFTA_SET_ELEM_DATA, |value| value.attribute(NFTA_DATA_VALUE, data));
                }
            });
        });
        messages.push(message);
    }
    messages.push(Message::batch(0x11));
    exchange(Some(NETFILTER), &messages).map(drop)
}

// linux/netfilter/nf_tables.h; libc has the messages but not all attributes.
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;

/// A name as the kernel takes it.
fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// One netlink message under construction: header (16 bytes), the family's own header, attributes.
struct Message {
    bytes: Vec<u8>,
    answered: bool,
}

impl Message {
    fn new(kind: u16, flags: libc::c_int) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        Self { bytes: header(kind, flags), answered: true }
    }

    /// The begin or end of an nftables transaction. They ask for no answer; an error is sent all the same.
    fn batch(kind: u16) -> Self {
        let mut bytes = header(kind, libc::NLM_F_REQUEST as u16);
        // struct nfgenmsg: no family, version 0, resource id in network order.
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&(libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes());
        Self { bytes, answered: false }
    }

    /// struct ifinfomsg: family, padding, type, index, flags, mask of changed flags.
    fn interface(&mut self, index: u32, flags: u32, changed: u32) {
        self.bytes.extend_from_slice(&[0; 4]);
        for word in [index, flags, changed] {
            self.bytes.extend_from_slice(&word.to_ne_bytes());
        }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        // An attribute's length is 16 bits; every value here is a name, an address or a key, far below.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    fn nested(&mut self, kind: u16, content: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.attribute(kind | libc::NLA_F_NESTED as u16, &[]);
        content(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn header(kind: u16, flags: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend_from_slice(&[0; 4]); // the length, filled in when sent
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence and port: one exchange a socket, so nothing to tell apart
    bytes
}

/// Sends messages as one datagram and reads until each that asks for an answer has its acknowledgement, or one its
/// error. Returns the other replies: type and payload.
fn exchange(protocol: Option<Protocol>, messages: &[Message]) -> io::Result<Vec<Vec<u8>>> {
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
    // The kernel answers before `sendto` returns; the deadline is for a kernel that drops an answer (out of memory).
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5)))?;
    let mut datagram = Vec::new();
    for message in messages {
        let start = datagram.len();
        datagram.extend_from_slice(&message.bytes);
        let length = u32::try_from(message.bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        datagram[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }
    rustix::net::sendto(&socket, &datagram, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;

    let mut outstanding = messages.iter().filter(|m| m.answered).count();
    let mut replies = Vec::new();
    let mut buffer = vec![0_u8; 32 * 1024];
    while outstanding > 0 {
        let (received, _) = match rustix::net::recv(&socket, &mut *buffer, RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received?,
        };
        let mut rest = buffer.get(..received).unwrap_or_default();
        while let Some((length, kind)) = read_header(rest) {
            let payload = rest.get(16..length).ok_or(io::ErrorKind::InvalidData)?;
            if i32::from(kind) == libc::NLMSG_ERROR {
                match read_i32(payload) {
                    Some(0) => outstanding = outstanding.saturating_sub(1),
                    Some(errno) => return Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                }
            } else {
                replies.push(payload.to_vec());
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(replies)
}

/// Length and type of the message at the start of `bytes`.
fn read_header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    (length >= 16).then_some((length as usize, kind))
}

fn read_i32(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// Reads the payload of an RTM_NEWLINK.
fn parse_link(payload: &[u8]) -> Option<Link> {
    let index = read_u32(payload.get(4..8)?)?;
    let flags = read_u32(payload.get(8..12)?)?;
    let up = flags & libc::IFF_UP as u32 != 0;
    let mut link = Link { index, master: None, mac: None, mtu: 0, up, kind: None };
    for (kind, value) in attributes(payload.get(16..)?) {
        match kind {
            libc::IFLA_MASTER => link.master = read_u32(value),
            libc::IFLA_MTU => link.mtu = read_u32(value)?,
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            libc::IFLA_LINKINFO => {
                let name = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                link.kind = name.map(|(_, v)| String::from_utf8_lossy(v).trim_end_matches('\0').to_owned());
            }
            _ => {}
        }
    }
    Some(link)
}

/// The attributes in `bytes`: type (without its flags) and value.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !(libc::NLA_F_NESTED as u16 | libc::NLA_F_NET_BYTEORDER as u16), value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_written_as_it_is_parsed() {
        let mac = Mac::parse("02:00:0a:ff:10:01").unwrap();
        assert_eq!(mac, Mac([2, 0, 10, 255, 16, 1]));
        assert_eq!(Mac::parse(&mac.to_string()), Some(mac));
        for text in
            ["", "02:00:0a:ff:10", "02:00:0a:ff:10:01:02", "2:0:a:f:1:1", "02:00:0a:ff:10:0g", "+2:00:0a:ff:10:01"]
        {
            assert_eq!(Mac::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_kernel_answers_for_loopback_and_for_nothing() {
        let lo = link("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.master), (1, None));
        assert_eq!(link("no-such-link").unwrap(), None);
    }

    #[test]
    fn garbage_is_read_without_panic() {
        for length in 0..40 {
            let bytes = vec![0xff; length];
            assert_eq!(attributes(&bytes).count(), 0);
            let _ = parse_link(&bytes);
            let _ = read_header(&bytes);
        }
        // A length of 0 must not loop for ever.
        assert_eq!(attributes(&[0; 8]).count(), 0);
    }
}
