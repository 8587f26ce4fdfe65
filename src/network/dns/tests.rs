use k8s_openapi::api::core::v1::PodDNSConfigOption;

use super::*;

fn node() -> ResolvConf {
    ResolvConf::parse("nameserver 192.0.2.53\nsearch example.com corp.example.com\noptions timeout:1 rotate\n")
}

fn cluster() -> ClusterDns {
    ClusterDns { ips: vec!["10.96.0.10".parse().unwrap()], domain: "cluster.local".to_owned() }
}

fn resolved(policy: DnsPolicy, config: Option<&PodDNSConfig>) -> Resolved {
    resolv_conf(policy, config, &node(), &cluster(), "team-a")
}

fn option(name: &str, value: Option<&str>) -> PodDNSConfigOption {
    PodDNSConfigOption { name: Some(name.to_owned()), value: value.map(str::to_owned) }
}

#[test]
fn each_policy_gives_what_kubelet_gives() {
    let cluster_first = "search team-a.svc.cluster.local svc.cluster.local cluster.local example.com corp.example.com\n\
                         nameserver 10.96.0.10\noptions ndots:5\n";
    let of_node = "search example.com corp.example.com\nnameserver 192.0.2.53\noptions timeout:1 rotate\n";
    for (policy, text) in [
        (DnsPolicy::ClusterFirst, cluster_first),
        (DnsPolicy::ClusterFirstWithHostNet, cluster_first),
        (DnsPolicy::Default, of_node),
        (DnsPolicy::None, ""),
    ] {
        let resolved = resolved(policy, None);
        assert_eq!(resolved.conf.to_string(), text, "{policy:?}");
        assert_eq!(resolved.warnings, [], "{policy:?}");
    }
}

#[test]
fn without_cluster_dns_cluster_first_is_the_nodes_and_says_so() {
    for policy in [DnsPolicy::ClusterFirst, DnsPolicy::ClusterFirstWithHostNet] {
        let resolved = resolv_conf(policy, None, &node(), &ClusterDns::default(), "team-a");
        assert_eq!(resolved.conf, node());
        assert_eq!(resolved.warnings, [DnsWarning::NoClusterDns]);
    }
    let default = resolv_conf(DnsPolicy::Default, None, &node(), &ClusterDns::default(), "team-a");
    assert_eq!(default.warnings, []);
}

#[test]
fn in_the_nodes_network_cluster_first_is_default() {
    use DnsPolicy::*;
    for (policy, host, bridge) in [
        (ClusterFirst, Default, ClusterFirst),
        (ClusterFirstWithHostNet, ClusterFirstWithHostNet, ClusterFirstWithHostNet),
        (Default, Default, Default),
        (None, None, None),
    ] {
        assert_eq!(effective_policy(policy, NetworkMode::Host), host);
        assert_eq!(effective_policy(policy, NetworkMode::Bridge), bridge);
        assert_eq!(effective_policy(policy, NetworkMode::None), bridge);
    }
}

#[test]
fn dns_config_is_added_and_its_options_win() {
    let config = PodDNSConfig {
        nameservers: Some(vec!["192.0.2.1".into(), "10.96.0.10".into()]),
        searches: Some(vec!["example.com".into(), "more.example".into()]),
        options: Some(vec![option("ndots", Some("2")), option("edns0", None)]),
    };
    let conf = resolved(DnsPolicy::ClusterFirst, Some(&config)).conf;
    assert_eq!(conf.nameservers, ["10.96.0.10", "192.0.2.1"]);
    assert_eq!(conf.searches.last().map(String::as_str), Some("more.example"));
    assert_eq!(conf.searches.iter().filter(|s| *s == "example.com").count(), 1);
    assert_eq!(conf.options, ["ndots:2", "edns0"]);
    let alone = resolved(DnsPolicy::None, Some(&config)).conf;
    assert_eq!(alone.nameservers, ["192.0.2.1", "10.96.0.10"]);
}

#[test]
fn limits_hold_and_what_is_left_out_is_named() {
    let config = PodDNSConfig {
        nameservers: Some((1..=5).map(|n| format!("192.0.2.{n}")).collect()),
        searches: Some((0..40).map(|n| format!("d{n}.example")).collect()),
        options: None,
    };
    let Resolved { conf, warnings } = resolved(DnsPolicy::None, Some(&config));
    assert_eq!(conf.nameservers, ["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    assert_eq!(conf.searches.len(), 32);
    assert_eq!(warnings[0], DnsWarning::NameserversLeftOut(vec!["192.0.2.4".into(), "192.0.2.5".into()]));
    assert_eq!(warnings[1], DnsWarning::SearchesLeftOut((32..40).map(|n| format!("d{n}.example")).collect()));

    // 20 domains of 120 characters: 16 of them with their spaces are 1,935 bytes, 17 are 2,056.
    let long: Vec<String> = (10..30).map(|n| format!("{n}{}", "x".repeat(118))).collect();
    let config = PodDNSConfig { searches: Some(long), ..PodDNSConfig::default() };
    let conf = resolved(DnsPolicy::None, Some(&config)).conf;
    assert_eq!(conf.searches.len(), 16);

    let config = PodDNSConfig { searches: Some(vec!["y".repeat(254), "z".repeat(253)]), ..PodDNSConfig::default() };
    assert_eq!(resolved(DnsPolicy::None, Some(&config)).conf.searches, ["z".repeat(253)]);
}

#[test]
fn a_value_never_writes_another_line() {
    let config = PodDNSConfig {
        nameservers: Some(vec!["192.0.2.1\nnameserver 6.6.6.6".into(), "evil".into()]),
        searches: Some(vec!["a\nnameserver 6.6.6.6".into(), "a b".into(), String::new()]),
        options: Some(vec![option("ndots", Some("1\nnameserver 6.6.6.6")), option("a b", None), option("", None)]),
    };
    let Resolved { conf, warnings } = resolved(DnsPolicy::None, Some(&config));
    assert_eq!(conf.to_string(), "");
    assert_eq!(warnings.len(), 8);
}

#[test]
fn a_file_is_read_as_resolvers_read_it() {
    let conf = ResolvConf::parse(
        "# comment\n; another\nnameserver 192.0.2.1 # first\nnameserver\n  nameserver\t192.0.2.2\ndomain old.example\n\
         search a.example\nsearch b.example. . c.example\noptions ndots:1 rotate\noptions ndots:3\nunknown x\n",
    );
    assert_eq!(conf.nameservers, ["192.0.2.1", "192.0.2.2"]);
    assert_eq!(conf.searches, ["b.example", "c.example"]);
    assert_eq!(conf.options, ["ndots:3", "rotate"]);
    assert_eq!(ResolvConf::parse(&conf.to_string()), conf);
}

#[test]
fn a_stub_resolver_on_loopback_is_told_apart() {
    for (text, stub) in [
        ("nameserver 127.0.0.53\n", true),
        ("nameserver ::1\nnameserver 127.0.0.1\n", true),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", false),
        ("", false),
    ] {
        assert_eq!(ResolvConf::parse(text).is_loopback_only(), stub, "{text:?}");
    }
}
