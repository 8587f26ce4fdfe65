//! The packet rules of a node's bots, in two nftables tables of our own, named after the bridge.
//!
//! ```text
//!  bot ──veth──┐ bridge table, prerouting: is the frame IPv4 or ARP, from this veth's own MAC and address?
//!              ├─ to another port: bridge table, forward: is that a bot of the same Kubernetes namespace?
//!              └─ to the host: inet table, input: an answer, or DNS?
//!                 through the host: inet table, forward: not to other bots, not to link-local addresses
//!                                   postrouting: masqueraded
//!  host ───────── to a bot: passes.     others through the host to a bot: answers only
//! ```
//!
//! Who a bot is, is told by the veth that a frame came in on, which no bot can choose; everything that it can choose
//! (MAC, address, ARP) is checked against that first, before the bridge learns from it. What is neither IPv4 nor ARP is
//! dropped, so there is no IPv6 link-local way round. Each Kubernetes namespace with bots has a number here, in maps from
//! veth and address; it is carried in the packet's mark from one lookup to the next within a chain, and cleared there.
//!
//! The second check by address in the inet table is for what is routed back onto the bridge (a Service that leads to a
//! bot, a packet addressed to the gateway's MAC), and for kernels with br_netfilter, where bridged packets pass there too.
//!
//! An accept here ends our own chains only: a host firewall of other making still has its say, and is never touched.
//! Without the bridge expressions of newer kernels (`meta ibrname`), ports that are no bots' are not told apart from
//! ports of other bridges, so among themselves they are let be; to or from a bot nothing of them passes.
//!
//! Loading everything is one `nft` transaction ([`ruleset`]); a bot's coming and going changes elements only
//! ([`Port::elements`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::Mutex;

use super::cidr::Cidr;
use super::error::NetworkError;
use super::exec::{self, ExecError};
use super::netlink::{self, Element, Family, Mac};
use crate::api::condition::cut;
use crate::api::ids::ContainerId;

/// What the rules allow beside the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether bots reach port 53 (UDP and TCP) of the host's own addresses: a resolver of the node.
    pub host_dns: bool,
    /// Link-local resolvers that bots reach on port 53, as some clouds have them. Everything else of 169.254.0.0/16 is
    /// closed: that is where clouds keep a machine's credentials.
    pub link_local_dns: Vec<Ipv4Addr>,
    /// Whether bots' traffic to the outside gets the host's address. Off where the network routes to the bots' CIDR.
    pub masquerade: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { host_dns: true, link_local_dns: Vec::new(), masquerade: true }
    }
}

/// A bot as the rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    /// The host's end of its veth pair.
    pub interface: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
    /// Number of its Kubernetes namespace, from 1.
    pub group: u32,
}

impl Port {
    /// Its elements in each set, as the kernel takes them.
    fn elements(&self) -> Vec<Element> {
        let mut interface = self.interface.as_bytes().to_vec();
        interface.resize(16, 0); // IFNAMSIZ
        let address = self.address.octets().to_vec();
        let mac = [&self.mac.0[..], &[0, 0]].concat();
        // Marks are kept in the host's byte order, addresses in the network's.
        let group = self.group.to_ne_bytes().to_vec();
        let element = |family, set, key: &[&[u8]], data| Element { family, set, key: key.concat(), data };
        vec![
            element(Family::Bridge, "ports", &[&interface], None),
            element(Family::Bridge, "senders", &[&interface, &mac, &address], None),
            element(Family::Bridge, "group_of", &[&interface], Some(group.clone())),
            element(Family::Bridge, "members", &[&interface, &group], None),
            element(Family::Inet, "addresses", &[&address], None),
            element(Family::Inet, "group_of", &[&address], Some(group.clone())),
            element(Family::Inet, "members", &[&address, &group], None),
        ]
    }
}

/// Name of both tables of a bridge. The prefix keeps a bridge of any name from claiming a foreign table.
pub(super) fn table(bridge: &str) -> String {
    format!("bots-on-{bridge}")
}

/// All rules, as the text of one transaction that replaces what is there.
pub(super) fn ruleset(bridge: &str, cidr: Cidr, policy: &Policy, ports: &[&Port]) -> String {
    let table = table(bridge);
    let list = |items: Vec<String>| match items.is_empty() {
        true => String::new(),
        false => format!(" elements = {{ {} }};", items.join(", ")),
    };
    let each = |f: &dyn Fn(&Port) -> String| list(ports.iter().map(|p| f(p)).collect());
    let link_local_dns = match policy.link_local_dns.is_empty() {
        true => String::new(),
        false => {
            let servers: Vec<String> = policy.link_local_dns.iter().map(Ipv4Addr::to_string).collect();
            format!(
                "iifname \"{bridge}\" ip daddr {{ {} }} meta l4proto {{ tcp, udp }} th dport 53 accept",
                servers.join(", ")
            )
        }
    };
    let host_dns = match policy.host_dns {
        true => format!("iifname \"{bridge}\" meta l4proto {{ tcp, udp }} th dport 53 accept"),
        false => String::new(),
    };
    let masquerade = match policy.masquerade {
        true => format!("ip saddr {cidr} oifname != \"{bridge}\" masquerade"),
        false => String::new(),
    };
    let mut text = String::new();
    // Declared before it is deleted: deleting what is not there would fail the transaction.
    for family in ["bridge", "inet"] {
        let _ = writeln!(text, "table {family} {table}\ndelete table {family} {table}");
    }
    let _ = write!(
        text,
        r#"table bridge {table} {{
  set ports {{ type ifname;{ports} }}
  set senders {{ type ifname . ether_addr . ipv4_addr;{senders} }}
  map group_of {{ type ifname : mark;{group_of_port} }}
  set members {{ type ifname . mark;{members_by_port} }}
  chain from_port {{
    type filter hook prerouting priority -300; policy accept;
    iifname @ports jump from_bot
  }}
  chain from_bot {{
    ether type ip iifname . ether saddr . ip saddr @senders return
    ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 iifname . ether saddr . arp saddr ip @senders iifname . arp saddr ether . arp saddr ip @senders return
    drop
  }}
  chain between_ports {{
    type filter hook forward priority -200; policy accept;
    iifname != @ports oifname != @ports accept
    meta mark set 0
    meta mark set iifname map @group_of
    oifname . meta mark @members meta mark set 0 accept
    drop
  }}
}}
table inet {table} {{
  set addresses {{ type ipv4_addr;{addresses} }}
  map group_of {{ type ipv4_addr : mark;{group_of_address} }}
  set members {{ type ipv4_addr . mark;{members_by_address} }}
  chain through_host {{
    type filter hook forward priority filter - 10; policy accept;
    iifname "{bridge}" ip saddr != @addresses drop
    iifname "{bridge}" oifname "{bridge}" jump between_bots
    oifname "{bridge}" ct state established,related accept
    oifname "{bridge}" drop
    {link_local_dns}
    iifname "{bridge}" ip daddr 169.254.0.0/16 drop
    iifname "{bridge}" meta nfproto != ipv4 drop
  }}
  chain between_bots {{
    meta mark set 0
    meta mark set ip saddr map @group_of
    ip daddr . meta mark @members meta mark set 0 accept
    drop
  }}
  chain to_host {{
    type filter hook input priority filter - 10; policy accept;
    iifname "{bridge}" ip saddr != @addresses drop
    iifname "{bridge}" ct state established,related accept
    {host_dns}
    iifname "{bridge}" drop
  }}
  chain leaving_host {{
    type nat hook postrouting priority srcnat; policy accept;
    {masquerade}
  }}
}}
"#,
        ports = each(&|p| format!("\"{}\"", p.interface)),
        senders = each(&|p| format!("\"{}\" . {} . {}", p.interface, p.mac, p.address)),
        group_of_port = each(&|p| format!("\"{}\" : {}", p.interface, p.group)),
        members_by_port = each(&|p| format!("\"{}\" . {}", p.interface, p.group)),
        addresses = each(&|p| p.address.to_string()),
        group_of_address = each(&|p| format!("{} : {}", p.address, p.group)),
        members_by_address = each(&|p| format!("{} . {}", p.address, p.group)),
    );
    text
}

/// A bot whose rules are to be: what its record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub id: ContainerId,
    /// Its Kubernetes namespace.
    pub namespace: String,
    pub interface: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// The rules in the kernel, and what of them was loaded by this process.
#[derive(Debug)]
pub(super) struct Rules {
    pub bridge: String,
    pub policy: Policy,
    pub deadline: Duration,
    nft: Nft,
    loaded: Mutex<Loaded>,
}

/// Numbers and elements that this process loaded. Only a shadow: whenever the kernel disagrees, everything is loaded
/// anew from the records.
#[derive(Debug, Default)]
struct Loaded {
    cidr: Option<Cidr>,
    groups: HashMap<String, u32>,
    /// The highest number given.
    last_group: u32,
    ports: BTreeMap<ContainerId, Port>,
    /// Being taken down: still recorded, but to be kept out of the rules.
    leaving: HashSet<ContainerId>,
}

impl Loaded {
    /// The number of a namespace. Never given twice by one process, so nothing stale can point to another namespace.
    fn group(&mut self, namespace: &str) -> u32 {
        let last = &mut self.last_group;
        *self.groups.entry(namespace.to_owned()).or_insert_with(|| {
            *last += 1;
            *last
        })
    }

    fn port(&mut self, member: &Member) -> Port {
        let group = self.group(&member.namespace);
        Port { interface: member.interface.clone(), mac: member.mac, address: member.address, group }
    }
}

impl Rules {
    pub(super) fn new(bridge: String, policy: Policy, deadline: Duration, nft: Nft) -> Self {
        Self { bridge, policy, deadline, nft, loaded: Mutex::default() }
    }

    /// Takes both tables away. Safe twice.
    pub(super) async fn unload(&self) -> Result<(), NetworkError> {
        let table = table(&self.bridge);
        // What is added before it is deleted is there to be deleted.
        let each = |family| format!("add table {family} {table}\ndelete table {family} {table}\n");
        self.nft(&format!("{}{}", each("bridge"), each("inet"))).await
    }

    /// The CIDR that rules were loaded for by this process.
    pub(super) async fn cidr(&self) -> Option<Cidr> {
        self.loaded.lock().await.cidr
    }

    /// Loads all rules, for the members that `recorded` finds. They are read under the lock, so none is missed.
    pub(super) async fn load(
        &self,
        cidr: Cidr,
        recorded: impl Fn() -> Result<Vec<Member>, NetworkError>,
    ) -> Result<(), NetworkError> {
        let mut loaded = self.loaded.lock().await;
        self.load_locked(&mut loaded, cidr, recorded()?).await
    }

    async fn load_locked(&self, loaded: &mut Loaded, cidr: Cidr, mut members: Vec<Member>) -> Result<(), NetworkError> {
        members.sort_by(|a, b| a.id.cmp(&b.id));
        let mut groups = loaded.groups.clone();
        groups.retain(|namespace, _| members.iter().any(|m| m.namespace == *namespace));
        let mut fresh = Loaded { cidr: Some(cidr), groups, last_group: loaded.last_group, ..Loaded::default() };
        let (mut interfaces, mut addresses) = (HashSet::new(), HashSet::new());
        for member in members.iter().filter(|m| !loaded.leaving.contains(&m.id)) {
            // One veth, one address, one bot. Records that say otherwise were tampered with; they must not make nft
            // refuse the rules of all others.
            if !interfaces.insert(&member.interface) || !addresses.insert(member.address) {
                tracing::warn!(bot = %member.id, interface = member.interface, address = %member.address,
                    "two bots are on record for one interface or address; the second stays shut out");
                continue;
            }
            let port = fresh.port(member);
            fresh.ports.insert(member.id.clone(), port);
        }
        let ports: Vec<&Port> = fresh.ports.values().collect();
        let text = ruleset(&self.bridge, cidr, &self.policy, &ports);
        // Until it is known what the kernel has, nothing is.
        loaded.cidr = None;
        self.nft(&text).await?;
        fresh.leaving = std::mem::take(&mut loaded.leaving);
        *loaded = fresh;
        Ok(())
    }

    /// Lets a bot in. Its record must be written before, so that a full load at any time has it too.
    pub(super) async fn add(
        &self,
        member: &Member,
        recorded: impl Fn() -> Result<Vec<Member>, NetworkError>,
    ) -> Result<(), NetworkError> {
        let mut loaded = self.loaded.lock().await;
        loaded.leaving.remove(&member.id);
        let cidr = loaded.cidr.ok_or(NetworkError::NoCidr)?;
        let port = loaded.port(member);
        let changed = netlink::change_elements(&table(&self.bridge), &port.elements(), true);
        loaded.ports.insert(member.id.clone(), port);
        match changed {
            Ok(()) => Ok(()),
            Err(error) => {
                // The table is gone, or an element is in the way.
                tracing::warn!(bot = %member.id, %error, "packet rules were not as loaded; loading them anew");
                self.load_locked(&mut loaded, cidr, recorded()?).await
            }
        }
    }

    /// Shuts a bot out, and keeps it out of full loads until [`Rules::forget`]. To be called while the address is still
    /// the bot's own.
    ///
    /// `expected` says whether the kernel may have elements of it: another process of ours may have loaded them.
    pub(super) async fn remove(
        &self,
        id: &ContainerId,
        expected: bool,
        recorded: impl Fn() -> Result<Vec<Member>, NetworkError>,
    ) -> Result<(), NetworkError> {
        let mut loaded = self.loaded.lock().await;
        loaded.leaving.insert(id.clone());
        match loaded.ports.remove(id) {
            Some(port) => match netlink::change_elements(&table(&self.bridge), &port.elements(), false) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(bot = %id, %error, "packet rules were not as loaded; loading them anew");
                }
            },
            None if !expected => return Ok(()),
            None => {}
        }
        match loaded.cidr {
            Some(cidr) => self.load_locked(&mut loaded, cidr, recorded()?).await,
            // Nothing was loaded by this process yet; the first load leaves this bot out, before anyone is let in.
            None => Ok(()),
        }
    }

    /// The bot's record is gone.
    pub(super) async fn forget(&self, id: &ContainerId) {
        self.loaded.lock().await.leaving.remove(id);
    }

    /// Runs one transaction.
    async fn nft(&self, text: &str) -> Result<(), NetworkError> {
        let table = || table(&self.bridge);
        let ended = {
            let (program, mut arguments) = self.nft.command();
            arguments.extend(["-f".into(), "-".into()]);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            exec::run(&program, &arguments, &[], text.as_bytes(), self.deadline).await
        };
        match ended {
            Ok(ended) if ended.status.success() => Ok(()),
            Ok(ended) => {
                let words = String::from_utf8_lossy(&ended.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
                Err(NetworkError::RulesRefused { table: table(), words: cut(&words, 512) })
            }
            Err(ExecError::Io(source)) => Err(NetworkError::Rules { table: table(), source }),
            Err(ExecError::TimedOut) => Err(NetworkError::RulesTimedOut { table: table(), deadline: self.deadline }),
        }
    }
}

/// Where `nft` comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nft {
    /// The machine's own.
    #[default]
    Host,
    /// A folder with `nft`, its loader `ld.so` and its libraries: the image's, for nodes that have none. It is not where it was
    /// built to be, so the loader is told where all of it is.
    Folder(PathBuf),
}

impl Nft {
    /// Program and first arguments.
    fn command(&self) -> (PathBuf, Vec<String>) {
        match self {
            // Also where PATH lacks the system's own directories, as it does for people and in some images.
            Self::Host => {
                let usual = ["/usr/sbin/nft", "/sbin/nft"].into_iter().map(Path::new).find(|path| path.is_file());
                (usual.map_or_else(|| PathBuf::from("nft"), Path::to_path_buf), Vec::new())
            }
            Self::Folder(dir) => {
                let text = |path: &Path| path.to_string_lossy().into_owned();
                (dir.join("ld.so"), vec!["--library-path".to_owned(), text(dir), text(&dir.join("nft"))])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(n: u8, group: u32) -> Port {
        Port {
            interface: format!("veth{n}"),
            mac: Mac([2, 0, 0, 0, 0, n]),
            address: Ipv4Addr::new(10, 233, 1, n),
            group,
        }
    }

    fn text(policy: &Policy, ports: &[&Port]) -> String {
        ruleset("berth0", Cidr::parse("10.233.1.0/24").unwrap(), policy, ports)
    }

    #[test]
    fn a_bot_is_in_every_set_of_the_text_as_in_the_elements() {
        let (a, b) = (port(2, 1), port(3, 2));
        let text = text(&Policy::default(), &[&a, &b]);
        for line in [
            "set ports { type ifname; elements = { \"veth2\", \"veth3\" }; }",
            "set senders { type ifname . ether_addr . ipv4_addr; elements = { \"veth2\" . 02:00:00:00:00:02 . 10.233.1.2, \"veth3\" . 02:00:00:00:00:03 . 10.233.1.3 }; }",
            "map group_of { type ifname : mark; elements = { \"veth2\" : 1, \"veth3\" : 2 }; }",
            "set members { type ifname . mark; elements = { \"veth2\" . 1, \"veth3\" . 2 }; }",
            "set addresses { type ipv4_addr; elements = { 10.233.1.2, 10.233.1.3 }; }",
            "map group_of { type ipv4_addr : mark; elements = { 10.233.1.2 : 1, 10.233.1.3 : 2 }; }",
            "set members { type ipv4_addr . mark; elements = { 10.233.1.2 . 1, 10.233.1.3 . 2 }; }",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        let sets = text.lines().filter(|l| l.starts_with("  set ") || l.starts_with("  map ")).count();
        assert_eq!(a.elements().len(), sets, "a set that bots are not added to, or the other way round");
    }

    #[test]
    fn without_bots_the_sets_are_empty_and_only_our_tables_are_named() {
        let text = text(&Policy::default(), &[]);
        assert!(!text.contains("elements"), "{text}");
        for line in text.lines().filter(|l| l.contains("table ")) {
            assert!(line.contains("bots-on-berth0"), "{line}");
        }
        assert!(!text.contains("flush"));
    }

    #[test]
    fn policy_opens_and_closes() {
        let dns = "iifname \"berth0\" meta l4proto { tcp, udp } th dport 53 accept";
        let open = Policy { link_local_dns: vec![Ipv4Addr::new(169, 254, 20, 10)], ..Policy::default() };
        let closed = Policy { host_dns: false, link_local_dns: Vec::new(), masquerade: false };
        assert!(text(&open, &[]).contains(dns));
        assert!(text(&open, &[]).contains("ip daddr { 169.254.20.10 } meta l4proto { tcp, udp } th dport 53 accept"));
        assert!(text(&open, &[]).contains("ip saddr 10.233.1.0/24 oifname != \"berth0\" masquerade"));
        for word in ["dport 53", "masquerade\n", "169.254.20.10"] {
            assert!(!text(&closed, &[]).contains(word), "{word}");
        }
    }

    #[test]
    fn a_namespace_keeps_its_number_and_shares_it_with_none() {
        let mut loaded = Loaded::default();
        let a = loaded.group("team-a");
        let b = loaded.group("team-b");
        assert_ne!(a, b);
        assert_ne!(a, 0, "0 is what an unknown packet has");
        assert_eq!(loaded.group("team-a"), a);
    }
}
