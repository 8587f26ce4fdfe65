//! The bridge that a node's bots are on, and the kernel settings that it needs. Ours, not the plugin's: so its MAC is
//! fixed, its address is there before the first bot, and no two ADDs race for either.

use std::io;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::cidr::Cidr;
use super::error::NetworkError;
use super::netlink::{self, Link, LinkChange, Mac};

/// A fixed MAC for a bridge. Left to itself a bridge takes the lowest MAC of its ports and changes it as they come and
/// go, and bots lose their gateway each time. Locally administered, and different for each name: two bridges of one
/// machine may be bridged together.
pub(super) fn mac(name: &str) -> Mac {
    let digest = Sha256::digest(format!("berth bridge {name}").as_bytes());
    let mut bytes = [0x02; 6];
    for (byte, from) in bytes.iter_mut().skip(1).zip(digest.iter()) {
        *byte = *from;
    }
    Mac(bytes)
}

/// Whether the bridge is as [`ensure`] leaves it. Cheap: one question to the kernel.
pub(super) fn is_sound(link: Option<&Link>, name: &str, mtu: u32) -> bool {
    link.is_some_and(|l| l.up && l.mac == Some(mac(name)) && l.mtu == mtu && l.kind.as_deref() == Some("bridge"))
}

/// Makes the bridge, or mends what is not as it should be, and gives it the gateway's address. Returns its index.
pub(super) fn ensure(name: &str, mtu: u32, cidr: Cidr, forward: bool) -> Result<u32, NetworkError> {
    let failed = |doing| move |source| NetworkError::Interface { doing, name: name.to_owned(), source };
    let mac = mac(name);
    let link = match netlink::link(name).map_err(failed("look at"))? {
        Some(link) => link,
        None => {
            match netlink::create_bridge(name, mac, mtu) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make")(e)),
                _ => {}
            }
            let gone = || io::Error::from_raw_os_error(libc::ENODEV);
            netlink::link(name).and_then(|l| l.ok_or_else(gone)).map_err(failed("look at"))?
        }
    };
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind.unwrap_or_else(|| "physical interface".to_owned());
        return Err(NetworkError::NotABridge { name: name.to_owned(), kind });
    }
    let change = LinkChange {
        up: true,
        mac: (link.mac != Some(mac)).then_some(mac),
        mtu: (link.mtu != mtu).then_some(mtu),
        master: None,
    };
    netlink::change_link(link.index, change).map_err(failed("change"))?;
    netlink::ensure_address(link.index, cidr.gateway(), cidr.prefix()).map_err(failed("give an address to"))?;
    // Bots speak IPv4 only; an IPv6 link-local address of the host on the bridge would be one more door to guard.
    set(format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    if forward {
        set("net/ipv4/ip_forward".to_owned(), "1")?;
    }
    Ok(link.index)
}

/// Writes a kernel setting unless it is so already (a read-only /proc/sys is common in containers, and fine then).
fn set(name: String, value: &str) -> Result<(), NetworkError> {
    let path = PathBuf::from("/proc/sys").join(name);
    match std::fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(()),
        // A kernel without IPv6 has nothing to switch off.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => std::fs::write(&path, value).map_err(|source| NetworkError::Setting { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_has_one_mac_for_ever_and_another_name_another() {
        assert_eq!(mac("berth0"), mac("berth0"));
        assert_ne!(mac("berth0"), mac("berth1"));
        let Mac([first, ..]) = mac("berth0");
        assert_eq!(first & 0b11, 0b10, "locally administered, not multicast");
    }
}
