//! resolv.conf of a bot by its `dnsPolicy`, as kubelet makes it for a Pod (docs: "DNS for Services and Pods").

use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::PodDNSConfig;

use crate::api::bot_container::{DnsPolicy, NetworkMode};

/// The most nameservers; glibc and musl read no more.
const MAX_NAMESERVERS: usize = 3;
/// The most search domains, as the API server allows a Pod.
const MAX_SEARCHES: usize = 32;
/// The longest search line without its keyword, in bytes.
const MAX_SEARCH_LINE: usize = 2048;
/// The longest domain; glibc 2.28 aborts on a longer one.
const MAX_DOMAIN: usize = 253;

/// What a resolv.conf says (resolv.conf(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Addresses, in the order that they are asked.
    pub nameservers: Vec<String>,
    /// Domains, in the order that they are tried.
    pub searches: Vec<String>,
    /// Options, for example `ndots:5`.
    pub options: Vec<String>,
}

/// The cluster's DNS as the agent was told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterDns {
    /// Addresses of the DNS Service; none when the agent was told of none.
    pub ips: Vec<IpAddr>,
    /// For example `cluster.local`; may be empty.
    pub domain: String,
}

/// A resolv.conf, and what had to be left out or replaced to get there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// What to write.
    pub conf: ResolvConf,
    /// For an Event or the log.
    pub warnings: Vec<DnsWarning>,
}

/// Why a resolv.conf is not all that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DnsWarning {
    /// ClusterFirst without a cluster DNS.
    #[error(
        "the agent knows of no cluster DNS (--cluster-dns), so the node's resolv.conf is used for dnsPolicy ClusterFirst"
    )]
    NoClusterDns,
    /// Too many nameservers.
    #[error("only the first {MAX_NAMESERVERS} nameservers are used, left out: {}", .0.join(" "))]
    NameserversLeftOut(Vec<String>),
    /// Too many or too long search domains.
    #[error("only {MAX_SEARCHES} search domains of at most {MAX_DOMAIN} characters, {MAX_SEARCH_LINE} in all, are used; left out: {}", .0.join(" "))]
    SearchesLeftOut(Vec<String>),
    /// A value of dnsConfig that would break the file.
    #[error("spec.dnsConfig.{field}: {value:?} is left out: it is no {wanted}")]
    BadValue {
        /// The field.
        field: &'static str,
        /// The value, cut.
        value: String,
        /// What is right.
        wanted: &'static str,
    },
}

impl ResolvConf {
    /// Reads a resolv.conf. The last `search` line counts, of an option the last value; what is not understood is
    /// skipped.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
            let mut fields = line.split_whitespace();
            match fields.next() {
                Some("nameserver") => conf.nameservers.extend(fields.next().map(str::to_owned)),
                Some("search") => {
                    // The root is always tried; a domain with and without its last dot is the same one.
                    let domains = fields.filter(|d| *d != ".").map(|d| d.strip_suffix('.').unwrap_or(d).to_owned());
                    conf.searches = domains.collect();
                }
                Some("options") => fields.for_each(|option| set_option(&mut conf.options, option.to_owned())),
                _ => {}
            }
        }
        conf
    }

    /// Whether every nameserver is on the node's own loopback (systemd-resolved's stub, dnsmasq): of no use to a bot with
    /// a network of its own.
    pub fn is_loopback_only(&self) -> bool {
        let loopback = |s: &String| s.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        !self.nameservers.is_empty() && self.nameservers.iter().all(loopback)
    }
}

impl fmt::Display for ResolvConf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.searches.is_empty() {
            writeln!(f, "search {}", self.searches.join(" "))?;
        }
        for server in &self.nameservers {
            writeln!(f, "nameserver {server}")?;
        }
        if !self.options.is_empty() {
            writeln!(f, "options {}", self.options.join(" "))?;
        }
        Ok(())
    }
}

/// The policy that is meant: ClusterFirst is for bots with a network of their own; in the node's network it is Default,
/// and ClusterFirstWithHostNet is how to ask for the cluster's DNS there.
pub fn effective_policy(policy: DnsPolicy, mode: NetworkMode) -> DnsPolicy {
    match (policy, mode) {
        (DnsPolicy::ClusterFirst, NetworkMode::Host) => DnsPolicy::Default,
        (policy, _) => policy,
    }
}

/// A bot's resolv.conf. `policy` is an [`effective_policy`], `node` the node's own file.
pub fn resolv_conf(
    policy: DnsPolicy,
    config: Option<&PodDNSConfig>,
    node: &ResolvConf,
    cluster: &ClusterDns,
    namespace: &str,
) -> Resolved {
    let mut warnings = Vec::new();
    let mut conf = match policy {
        DnsPolicy::None => ResolvConf::default(),
        DnsPolicy::Default => node.clone(),
        DnsPolicy::ClusterFirst | DnsPolicy::ClusterFirstWithHostNet if cluster.ips.is_empty() => {
            warnings.push(DnsWarning::NoClusterDns);
            node.clone()
        }
        DnsPolicy::ClusterFirst | DnsPolicy::ClusterFirstWithHostNet => {
            let domain = &cluster.domain;
            let mut searches = match domain.is_empty() {
                true => Vec::new(),
                false => vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()],
            };
            searches.extend(node.searches.iter().cloned());
            ResolvConf {
                // The cluster's server asks the node's for what it does not know.
                nameservers: cluster.ips.iter().map(IpAddr::to_string).collect(),
                searches: without_repeats(searches),
                options: vec!["ndots:5".to_owned()],
            }
        }
    };
    if let Some(config) = config {
        add(&mut conf, config, &mut warnings);
    }
    fit(&mut conf, &mut warnings);
    Resolved { conf, warnings }
}

/// Adds what `dnsConfig` asks for. A value with a space or a line break in it would write other lines than it names.
fn add(conf: &mut ResolvConf, config: &PodDNSConfig, warnings: &mut Vec<DnsWarning>) {
    let mut bad = |field, value: &str, wanted| {
        warnings.push(DnsWarning::BadValue { field, value: value.chars().take(80).collect(), wanted });
    };
    for server in config.nameservers.iter().flatten() {
        match server.parse::<IpAddr>() {
            Ok(_) => conf.nameservers.push(server.clone()),
            Err(_) => bad("nameservers", server, "IP address"),
        }
    }
    for domain in config.searches.iter().flatten() {
        match is_word(domain) {
            true => conf.searches.push(domain.clone()),
            false => bad("searches", domain, "DNS domain"),
        }
    }
    for option in config.options.iter().flatten() {
        let name = option.name.as_deref().unwrap_or_default();
        let value = option.value.as_deref().unwrap_or_default();
        if !is_word(name) || !(value.is_empty() || is_word(value)) {
            bad("options", &format!("{name}:{value}"), "option of resolv.conf");
        } else if value.is_empty() {
            set_option(&mut conf.options, name.to_owned());
        } else {
            set_option(&mut conf.options, format!("{name}:{value}"));
        }
    }
    conf.nameservers = without_repeats(std::mem::take(&mut conf.nameservers));
    conf.searches = without_repeats(std::mem::take(&mut conf.searches));
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic())
}

/// Cuts to what resolvers can take.
fn fit(conf: &mut ResolvConf, warnings: &mut Vec<DnsWarning>) {
    if conf.nameservers.len() > MAX_NAMESERVERS {
        warnings.push(DnsWarning::NameserversLeftOut(conf.nameservers.split_off(MAX_NAMESERVERS)));
    }
    let mut left_out = conf.searches.split_off(conf.searches.len().min(MAX_SEARCHES));
    let (fitting, long) = std::mem::take(&mut conf.searches).into_iter().partition(|d| d.len() <= MAX_DOMAIN);
    conf.searches = fitting;
    left_out.extend::<Vec<String>>(long);
    // From the end, until the rest fits.
    while conf.searches.join(" ").len() > MAX_SEARCH_LINE {
        left_out.extend(conf.searches.pop());
    }
    if !left_out.is_empty() {
        warnings.push(DnsWarning::SearchesLeftOut(left_out));
    }
}

/// Sets an option in the place of one of the same name, or at the end.
fn set_option(options: &mut Vec<String>, option: String) {
    fn name(option: &str) -> &str {
        option.split(':').next().unwrap_or_default()
    }
    match options.iter_mut().find(|o| name(o) == name(&option)) {
        Some(same) => *same = option,
        None => options.push(option),
    }
}

fn without_repeats(items: Vec<String>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::with_capacity(items.len());
    for item in items {
        if !kept.contains(&item) {
            kept.push(item);
        }
    }
    kept
}

#[cfg(test)]
mod tests;
