//! The CNI plugins: what they are asked, and what is taken for an answer (CNI spec 1.0.0).
//!
//! One plugin is run, `bridge`, which runs `host-local` for the address. Berth owns the bridge itself, its address,
//! forwarding, masquerading and packet rules, so all that is asked of the plugin is a veth pair, an address and a default
//! route.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::cidr::Cidr;
use super::error::PluginError;
use super::exec::{self, ExecError};
use super::netlink::Mac;
use crate::api::condition::cut;
use crate::api::ids::ContainerId;

/// The interface's name inside a bot.
pub(super) const INSIDE: &str = "eth0";

/// The plugin that we call.
pub(super) const BRIDGE: &str = "bridge";

const SPEC: &str = "1.0.0";

/// The longest text of a plugin that an error repeats, in bytes.
const MAX_WORDS: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Del,
}

impl Verb {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
        }
    }
}

/// What `bridge` made for one bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Added {
    /// The host's end of the veth pair, safe to be written into a rule.
    pub host_interface: String,
    /// The bot's end.
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// The plugins of a node.
#[derive(Clone, Debug)]
pub(super) struct Plugins {
    /// Searched in order.
    pub directories: Vec<PathBuf>,
    pub deadline: Duration,
}

impl Plugins {
    /// Runs the bridge plugin for a bot. Returns what it printed.
    pub(super) async fn run(
        &self,
        verb: Verb,
        id: &ContainerId,
        namespace: Option<&Path>,
        config: &Value,
    ) -> Result<Vec<u8>, PluginError> {
        let missing = || PluginError::Missing { plugin: BRIDGE, directories: self.directories.clone() };
        let program = self.directories.iter().map(|d| d.join(BRIDGE)).find(|p| p.is_file()).ok_or_else(missing)?;
        let path = std::env::join_paths(&self.directories).unwrap_or_default();
        let environment = [
            ("CNI_COMMAND", OsStr::new(verb.as_str())),
            ("CNI_CONTAINERID", OsStr::new(id.as_str())),
            ("CNI_NETNS", namespace.map_or(OsStr::new(""), Path::as_os_str)),
            ("CNI_IFNAME", OsStr::new(INSIDE)),
            ("CNI_PATH", path.as_os_str()),
        ];
        let call = verb.as_str();
        let ended = exec::run(&program, &[], &environment, config.to_string().as_bytes(), self.deadline)
            .await
            .map_err(|e| match e {
                ExecError::Io(source) => PluginError::NotRun { program: program.clone(), call, source },
                ExecError::TimedOut => {
                    PluginError::TimedOut { program: program.clone(), call, deadline: self.deadline }
                }
            })?;
        if ended.status.success() {
            return Ok(ended.stdout);
        }
        // A plugin tells its error as JSON on standard output; what crashed before that left its words on the other.
        Err(match serde_json::from_slice::<Refusal>(&ended.stdout) {
            Ok(refusal) => PluginError::Refused { program, call, code: refusal.code, words: refusal.words() },
            Err(_) => {
                let said = if ended.stderr.is_empty() { &ended.stdout } else { &ended.stderr };
                PluginError::Died { program, call, status: ended.status, words: words(said) }
            }
        })
    }
}

/// A plugin's error (CNI spec, "Error").
#[derive(Deserialize)]
struct Refusal {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Refusal {
    fn words(&self) -> String {
        let text = if self.details.is_empty() { self.msg.clone() } else { format!("{}; {}", self.msg, self.details) };
        words(text.as_bytes())
    }
}

/// What a plugin said, fit for one line of a message.
fn words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    if line.is_empty() { "it said nothing".to_owned() } else { cut(&line, MAX_WORDS) }
}

/// The configuration that the plugin gets on its standard input. `name` also names host-local's folder in `leases`.
pub(super) fn config(bridge: &str, mtu: u32, cidr: Option<Cidr>, leases: &Path) -> Value {
    // DEL finds the lease by the container's id, but host-local loads no configuration without a range: where the node's is
    // not known yet, one of RFC 5737 stands in its place.
    let range = match cidr {
        Some(cidr) => json!({"subnet": cidr.to_string(), "gateway": cidr.gateway().to_string()}),
        None => json!({"subnet": "192.0.2.0/24"}),
    };
    let ipam = json!({
        "type": "host-local",
        "dataDir": leases,
        "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[range]],
    });
    json!({
        "cniVersion": SPEC,
        "name": bridge,
        "type": BRIDGE,
        "bridge": bridge,
        "mtu": mtu,
        // The bridge's address, forwarding and masquerading are ours (rules.rs, bridge.rs): then no ADD races another
        // for the bridge's address and MAC, and iptables is never called.
        "isGateway": false,
        "ipMasq": false,
        "hairpinMode": false,
        "promiscMode": false,
        "ipam": ipam,
    })
}

#[derive(Deserialize)]
struct Success {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    mac: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
}

/// Reads an ADD's answer. Nothing in it is believed that rules or records are later made of.
pub(super) fn read_added(said: &[u8], bridge: &str, cidr: Cidr) -> Result<Added, PluginError> {
    let garbage = |why: String| PluginError::Garbage { plugin: BRIDGE, why, words: words(said) };
    let success: Success = serde_json::from_slice(said).map_err(|e| garbage(format!("no CNI result: {e}")))?;
    let inside = success
        .interfaces
        .iter()
        .find(|i| !i.sandbox.is_empty() && i.name == INSIDE)
        .ok_or_else(|| garbage(format!("no interface {INSIDE} in the bot")))?;
    let mac = Mac::parse(&inside.mac).ok_or_else(|| garbage(format!("{:?} is no hardware address", inside.mac)))?;
    let host = success
        .interfaces
        .iter()
        .find(|i| i.sandbox.is_empty() && i.name != bridge)
        .ok_or_else(|| garbage("no interface on the host".to_owned()))?;
    if !is_interface_name(&host.name) {
        return Err(garbage(format!("{:?} is no name of an interface", host.name)));
    }
    let [ip] = success.ips.as_slice() else {
        return Err(garbage(format!("{} addresses where one was asked for", success.ips.len())));
    };
    let address = ip.address.split_once('/').map_or(ip.address.as_str(), |(address, _)| address);
    let address: Ipv4Addr = address.parse().map_err(|_| garbage(format!("{:?} is no IPv4 address", ip.address)))?;
    if !cidr.contains(address) || address == cidr.gateway() {
        return Err(garbage(format!("{address} is no address for a bot of {cidr}")));
    }
    Ok(Added { host_interface: host.name.clone(), mac, address })
}

/// Whether a text is fit to be an interface's name in a rule: what Linux allows, less what nft would read as its own.
pub(super) fn is_interface_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text != "."
        && text != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = r#"{"cniVersion":"1.0.0",
        "interfaces":[{"name":"berth0","mac":"02:00:00:00:00:01"},{"name":"veth1","mac":"02:00:00:00:00:02"},
                      {"name":"eth0","mac":"02:00:00:00:00:03","sandbox":"/run/berth/netns/x"}],
        "ips":[{"interface":2,"address":"10.233.1.2/24","gateway":"10.233.1.1"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}"#;

    fn cidr() -> Cidr {
        Cidr::parse("10.233.1.0/24").unwrap()
    }

    #[test]
    fn a_result_is_read() {
        let added = read_added(RESULT.as_bytes(), "berth0", cidr()).unwrap();
        assert_eq!(added.host_interface, "veth1");
        assert_eq!(added.mac.to_string(), "02:00:00:00:00:03");
        assert_eq!(added.address.to_string(), "10.233.1.2");
    }

    #[test]
    fn what_rules_could_not_be_made_of_is_refused() {
        for (from, to, why) in [
            ("\"eth0\"", "\"eth1\"", "no interface eth0"),
            ("02:00:00:00:00:03", "02:00", "no hardware address"),
            ("veth1", "berth0", "no interface on the host"),
            ("veth1", "x\\\" accept", "no name of an interface"),
            ("10.233.1.2/24", "10.234.1.2/24", "no address for a bot"),
            ("10.233.1.2/24", "10.233.1.1/24", "no address for a bot"),
            ("10.233.1.2/24", "fd00::2/64", "no IPv4 address"),
            ("\"ips\"", "\"pis\"", "0 addresses"),
            ("{\"cniVersion\"", "cniVersion", "no CNI result"),
        ] {
            let said = RESULT.replacen(from, to, 1);
            let error = read_added(said.as_bytes(), "berth0", cidr()).unwrap_err().to_string();
            assert!(error.contains(why), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn words_are_one_bounded_line_without_control_characters() {
        assert_eq!(words(b" a\n\tb\x1b[31m \xff"), "a b[31m \u{fffd}");
        assert_eq!(words(b" \n"), "it said nothing");
        assert!(words(&vec![b'x'; 10_000]).len() <= MAX_WORDS);
    }
}
