//! /etc/hosts of a bot, with the entries that kubelet gives a Pod.

use std::fmt::Write as _;
use std::net::IpAddr;

/// The hosts file of a bot with a network of its own: the usual local names, and its hostname at each of its addresses.
pub fn hosts_file(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text = String::from(
        "# Made by Berth at each start of the bot.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        let _ = writeln!(text, "{ip}\t{hostname}");
    }
    text
}

/// The hosts file of a bot in the node's network (`network.mode: Host`): the node's own.
pub fn hosts_file_of_node(node: &str) -> String {
    format!("# Made by Berth at each start of the bot, from the node's /etc/hosts.\n{node}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bot_finds_itself_and_localhost() {
        let text = hosts_file("web", &["10.233.1.2".parse().unwrap()]);
        assert!(text.lines().any(|l| l == "127.0.0.1\tlocalhost"));
        assert!(text.lines().any(|l| l == "10.233.1.2\tweb"));
        assert_eq!(hosts_file("web", &[]).lines().count(), text.lines().count() - 1);
    }

    #[test]
    fn in_the_nodes_network_it_is_the_nodes() {
        assert!(hosts_file_of_node("192.0.2.7 node-1\n").ends_with("\n192.0.2.7 node-1\n"));
    }
}
