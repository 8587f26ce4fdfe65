//! The blocks of the cluster's bot CIDR, one a node. Pure.
//!
//! A node's block is looked for from a place computed from its name on, so a BotNode that was deleted and made again
//! mostly gets the block that its bots still have addresses of.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 network, its address always the first one: `10.208.3.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    first: u32,
    bits: u8,
}

/// Text that is no IPv4 network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no IPv4 network; write for example 10.208.0.0/12, with no bit set after the prefix")]
pub struct NotABlock {
    text: String,
}

impl FromStr for Block {
    type Err = NotABlock;

    fn from_str(text: &str) -> Result<Self, NotABlock> {
        let parsed = text.split_once('/').and_then(|(address, bits)| {
            let first = u32::from(address.parse::<Ipv4Addr>().ok()?);
            let bits = bits.parse::<u8>().ok().filter(|b| *b <= 32)?;
            (first & !mask(bits) == 0).then_some(Self { first, bits })
        });
        parsed.ok_or_else(|| NotABlock { text: text.chars().take(64).collect() })
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.bits)
    }
}

fn mask(bits: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0)
}

impl Block {
    /// Whether the two share an address.
    pub fn overlaps(self, other: Self) -> bool {
        let shorter = mask(self.bits.min(other.bits));
        self.first & shorter == other.first & shorter
    }
}

/// The cluster's bot CIDR and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    all: Block,
    node_bits: u8,
}

/// A pool that can't be cut so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{all} can't be cut into blocks of /{node_bits}; --node-cidr-mask-size must lie between {} and 29", all.bits)]
pub struct BadPool {
    all: Block,
    node_bits: u8,
}

/// Every block is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all {blocks} blocks of /{node_bits} in {all} are taken; give the controller a larger --cluster-cidr")]
pub struct Exhausted {
    all: Block,
    node_bits: u8,
    blocks: u64,
}

impl Pool {
    /// Cuts `all` into blocks of `/node_bits`; a block smaller than /29 holds no bots beside network, bridge and
    /// broadcast worth having.
    pub fn new(all: Block, node_bits: u8) -> Result<Self, BadPool> {
        if (all.bits..=29).contains(&node_bits) { Ok(Self { all, node_bits }) } else { Err(BadPool { all, node_bits }) }
    }

    fn blocks(self) -> u64 {
        1 << (self.node_bits - self.all.bits)
    }

    /// A block for the node of this name that overlaps none of `taken`, whatever the flags were when those were given.
    pub fn assign(self, node: &str, taken: &[Block]) -> Result<Block, Exhausted> {
        let blocks = self.blocks();
        let start = fnv(node) % blocks;
        (0..blocks)
            .map(|step| {
                let index = (start + step) % blocks;
                let offset = u32::try_from(index << (32 - self.node_bits)).unwrap_or(0);
                Block { first: self.all.first | offset, bits: self.node_bits }
            })
            .find(|block| !taken.iter().any(|t| t.overlaps(*block)))
            .ok_or(Exhausted { all: self.all, node_bits: self.node_bits, blocks })
    }
}

/// FNV-1a, 64 bits: the same in every build and on every machine, unlike `std`'s hashers.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(text: &str) -> Block {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_read_and_written_alike_and_others_refused() {
        for text in ["10.208.0.0/12", "0.0.0.0/0", "10.0.0.1/32", "192.0.2.0/24"] {
            assert_eq!(block(text).to_string(), text);
        }
        for text in ["", "10.208.0.0", "10.208.0.1/12", "10.208.0.0/33", "fd00::/8", "10.208.0.0/-1", "a/b"] {
            assert!(text.parse::<Block>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn overlap_is_sharing_an_address() {
        for (a, b, wanted) in [
            ("10.0.0.0/24", "10.0.0.0/24", true),
            ("10.0.0.0/24", "10.0.1.0/24", false),
            ("10.0.0.0/23", "10.0.1.0/24", true),
            ("0.0.0.0/0", "10.0.1.0/24", true),
        ] {
            assert_eq!(block(a).overlaps(block(b)), wanted, "{a} {b}");
            assert_eq!(block(b).overlaps(block(a)), wanted, "{b} {a}");
        }
    }

    #[test]
    fn a_pool_that_cannot_be_cut_is_refused() {
        assert!(Pool::new(block("10.0.0.0/24"), 23).is_err());
        assert!(Pool::new(block("10.0.0.0/24"), 30).is_err());
        assert!(Pool::new(block("10.0.0.0/24"), 24).is_ok());
        // The largest there is must not overflow.
        let all = Pool::new(block("0.0.0.0/0"), 29).unwrap();
        assert!(all.assign("node-1", &[]).is_ok());
    }

    #[test]
    fn a_node_made_again_gets_its_block_again() {
        let pool = Pool::new(block("10.208.0.0/12"), 24).unwrap();
        let first = pool.assign("node-1", &[]).unwrap();
        assert_eq!(pool.assign("node-1", &[pool.assign("node-2", &[first]).unwrap()]), Ok(first));
    }

    proptest! {
        #[test]
        fn blocks_lie_in_the_pool_and_never_overlap_until_all_are_given(
            bits in 8u8..=20, extra in 0u8..=5, names in proptest::collection::hash_set("[a-z]{1,8}", 1..40),
        ) {
            let all = Block { first: 10 << 24, bits };
            let pool = Pool::new(all, bits + extra).unwrap();
            let mut taken = Vec::new();
            for name in names {
                match pool.assign(&name, &taken) {
                    Ok(block) => {
                        prop_assert!(all.overlaps(block));
                        prop_assert!(!taken.iter().any(|t: &Block| t.overlaps(block)));
                        taken.push(block);
                    }
                    Err(_) => prop_assert_eq!(taken.len() as u64, pool.blocks()),
                }
            }
        }
    }
}
