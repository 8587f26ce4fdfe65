//! The addresses of one node's bots.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 network, for example `10.208.3.0/24`: the addresses of one node's bots.
///
/// The first address is the bridge's (the bots' gateway), all others but network and broadcast address are for bots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    base: Ipv4Addr,
    prefix: u8,
}

/// Text that is no network for bots.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no CIDR for bots: {why}; it is an IPv4 network like 10.208.3.0/24, from /8 to /30")]
pub struct BadCidr {
    text: String,
    why: &'static str,
}

impl Cidr {
    /// Parses `a.b.c.d/prefix`. Refuses host bits, and sizes without room for a gateway and a bot.
    pub fn parse(text: &str) -> Result<Self, BadCidr> {
        let bad = |why| BadCidr { text: text.chars().take(64).collect(), why };
        let (base, prefix) = text.split_once('/').ok_or_else(|| bad("it has no /prefix"))?;
        let base: Ipv4Addr = base.parse().map_err(|_| bad("its address is not IPv4"))?;
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|_| prefix.bytes().all(|b| b.is_ascii_digit()))
            .ok_or_else(|| bad("its prefix is no number"))?;
        if !(8..=30).contains(&prefix) {
            return Err(bad("its prefix is out of range"));
        }
        let cidr = Self { base, prefix };
        if u32::from(base) & !cidr.mask() != 0 {
            return Err(bad("it has bits set after the prefix"));
        }
        Ok(cidr)
    }

    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0)
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The bridge's address, the first of the network.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + 1)
    }

    /// How many bots have room: all addresses but network, gateway and broadcast.
    pub fn room(self) -> u32 {
        (1_u32 << (32 - u32::from(self.prefix))) - 3
    }

    /// Whether the address is of this network.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.mask() == u32::from(self.base)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = BadCidr;
    fn from_str(text: &str) -> Result<Self, BadCidr> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_knows_its_gateway_and_room() {
        for (text, gateway, room) in [
            ("10.208.3.0/24", "10.208.3.1", 253),
            ("10.0.0.4/30", "10.0.0.5", 1),
            ("10.0.0.0/8", "10.0.0.1", 16_777_213),
        ] {
            let cidr = Cidr::parse(text).unwrap();
            assert_eq!(cidr.to_string(), text);
            assert_eq!(cidr.gateway().to_string(), gateway);
            assert_eq!(cidr.room(), room);
            assert!(cidr.contains(cidr.gateway()));
            assert!(!cidr.contains(Ipv4Addr::new(192, 0, 2, 1)));
        }
    }

    #[test]
    fn what_is_no_network_for_bots_is_refused() {
        for text in
            ["", "10.0.0.0", "10.0.0.1/24", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.0/+24", "10.0.0.0/a", "fd00::/64"]
        {
            assert!(Cidr::parse(text).is_err(), "{text:?} was taken");
        }
    }
}
