//! The network of bots on the real kernel, with the real CNI plugins and nft.
//!
//! Each test runs on a thread in a network and mount namespace of its own, its "host": nothing touches the machine's
//! interfaces, rules or mounts, and all of it is gone with the thread. Needs root, the CNI plugins and nft; without them
//! a test fails, it does not skip.

// clippy.toml allows these in tests, but takes only what is marked #[test] for one, not the helpers here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth::api::condition::{Reason, chain};
use berth::api::ids::{BotUid, ContainerId};
use berth::network::{Attachment, Cidr, Network, NetworkError, NetworkOptions, NetworkState, Owner, Policy};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

const CIDR: &str = "10.233.1.0/24";
const HOST_ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The "host" of a test.
struct Host {
    root: PathBuf,
}

/// Runs a test in a host of its own: network and mount namespace, an uplink with an address, /sys and /run to match.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(Host) -> F + Send + 'static) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let root = std::env::temp_dir().join(format!("berth-network-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&root).unwrap();
    let host = Host { root: root.clone() };
    let run = move || {
        // SAFETY: FILES stays shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS).unwrap() };
        // Downstream, not private: what the machine unmounts meanwhile must not live on here.
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
        mount("none", &host.root, "tmpfs", MountFlags::empty(), None).unwrap();
        sh("ip link set lo up");
        // A bridge without ports stands for the uplink: not every kernel has dummy interfaces.
        sh(&format!("ip link add up0 type bridge && ip addr add {HOST_ELSEWHERE}/24 dev up0 && ip link set up0 up"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(host));
    };
    let ended = std::thread::spawn(run).join();
    // The mounts went with the thread's mount namespace, whether it ended well or not.
    std::fs::remove_dir(&root).unwrap();
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
}

impl Host {
    fn options(&self) -> NetworkOptions {
        NetworkOptions {
            run_dir: self.root.join("run"),
            state_dir: self.root.join("state"),
            bridge: "berth-t0".to_owned(),
            plugin_deadline: Duration::from_secs(10),
            ..NetworkOptions::default()
        }
    }

    fn network(&self) -> Network {
        Network::new(self.options()).unwrap()
    }

    /// A directory with a plugin `bridge` that is this shell script; `$REAL` runs the real one.
    fn plugins(&self, script: &str) -> Vec<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = self.root.join("plugins");
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("bridge");
        std::fs::write(&path, format!("#!/bin/sh\nREAL={}/bridge\n{script}\n", real_plugins().display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        vec![directory, real_plugins()]
    }

    /// Everything that a bot may leave behind.
    fn left(&self) -> Left {
        let names = |path: &Path| -> Vec<String> {
            let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
            let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let rules = sh("nft list ruleset");
        let root = self.root.to_string_lossy();
        Left {
            netns: names(&self.root.join("run/netns")),
            mounts: mounts.lines().filter(|l| l.contains(" - nsfs ") && l.contains(&*root)).count(),
            records: names(&self.root.join("state/network/berth-t0")),
            leases: names(&self.root.join("state/leases/berth-t0"))
                .into_iter()
                .filter(|n| n.parse::<IpAddr>().is_ok())
                .collect(),
            veths: sh("ip -o link show type veth").lines().count(),
            elements: rules.matches("veth").count() + rules.matches("10.233.").count(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Left {
    netns: Vec<String>,
    mounts: usize,
    records: Vec<String>,
    leases: Vec<String>,
    veths: usize,
    elements: usize,
}

fn real_plugins() -> PathBuf {
    let directories = NetworkOptions::default().cni_bin_dirs;
    directories.into_iter().find(|d| d.join("bridge").is_file()).expect("the CNI plugins are not installed")
}

fn run(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).output().unwrap()
}

/// Runs a command that must succeed.
fn sh(command: &str) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn bot(n: u32) -> ContainerId {
    BotUid::parse(&format!("{n:08x}-0000-4000-8000-000000000000")).unwrap().container_id()
}

fn owner(namespace: &str) -> Owner {
    Owner { namespace: namespace.to_owned(), name: "web".to_owned(), uid: "u".to_owned() }
}

fn cidr() -> Cidr {
    Cidr::parse(CIDR).unwrap()
}

fn ip(attachment: &Attachment) -> Ipv4Addr {
    match attachment.ips.as_slice() {
        [IpAddr::V4(ip)] => *ip,
        other => panic!("addresses: {other:?}"),
    }
}

/// Runs something inside a bot's network namespace.
fn inside<T: Send + 'static>(netns: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = std::fs::File::open(netns).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
    .join()
    .unwrap()
}

/// A server that greets whoever connects, on all addresses of where it was started. Ends with the process.
fn serve(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(format!("{peer}").as_bytes());
        }
    });
}

/// Connects; returns whom the server saw. `None` when nobody answered: dropped, not refused.
fn ask(address: Ipv4Addr, port: u16) -> Option<String> {
    let address = SocketAddr::from((address, port));
    match TcpStream::connect_timeout(&address, Duration::from_millis(400)) {
        Ok(mut stream) => {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            Some(text)
        }
        Err(e) if e.kind() == std::io::ErrorKind::TimedOut => None,
        Err(e) if matches!(e.raw_os_error(), Some(libc::EHOSTUNREACH | libc::ENETUNREACH)) => None,
        Err(e) => panic!("{address}: {e}: the packets got there and back"),
    }
}

fn ask_from(bot: &Attachment, address: Ipv4Addr, port: u16) -> Option<String> {
    inside(&bot.netns, move || ask(address, port))
}

/// Whether a ping gets an answer.
fn ping_from(bot: &Attachment, address: impl ToString) -> bool {
    let address = address.to_string();
    inside(&bot.netns, move || run(&format!("busybox ping -c 1 -W 1 {address}")).status.success())
}

// ---- reaching and not reaching ----------------------------------------------------------------------------------------

/// With br_netfilter on, as kube-proxy wants it, bridged packets pass the inet tables too; without, they do not. A kernel
/// that has no br_netfilter has the second case only.
fn on_hosts_with_and_without_br_netfilter<F: Future<Output = ()>>(test: impl Fn(Host) -> F + Send + Copy + 'static) {
    const SETTING: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    if Path::new(SETTING).exists() {
        for call in ["0", "1"] {
            on_a_host(move |host| {
                std::fs::write(SETTING, call).unwrap();
                test(host)
            });
        }
    } else {
        on_a_host(test);
    }
}

#[test]
fn bots_of_one_namespace_reach_each_other_and_no_others() {
    on_hosts_with_and_without_br_netfilter(|host| async move {
        let network = host.network();
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let b = network.ensure(&bot(2), &owner("team-a"), &cidr()).await.unwrap();
        let c = network.ensure(&bot(3), &owner("team-b"), &cidr()).await.unwrap();
        for bot in [&a, &b, &c] {
            inside(&bot.netns, || serve(80));
        }
        assert_eq!(ask_from(&a, ip(&b), 80), Some(ip(&a).to_string()));
        assert_eq!(ask_from(&b, ip(&a), 80), Some(ip(&b).to_string()));
        assert!(ping_from(&a, ip(&b)));
        for (from, to) in [(&a, &c), (&c, &a), (&b, &c), (&c, &b)] {
            assert_eq!(ask_from(from, ip(to), 80), None);
            assert!(!ping_from(from, ip(to)));
        }
        // The host reaches all of them.
        for bot in [&a, &b, &c] {
            assert_eq!(ask(ip(bot), 80), Some("10.233.1.1".to_owned()));
        }
        // The control: it is the rules that keep them apart.
        sh("nft delete table inet bots-on-berth-t0; nft delete table bridge bots-on-berth-t0");
        assert!(ask_from(&a, ip(&c), 80).is_some());
        network.ensure_rules(&cidr()).await.unwrap();
        assert_eq!(ask_from(&a, ip(&c), 80), None);
    });
}

#[test]
fn no_way_round_over_the_gateway_ipv6_or_a_learned_address() {
    on_hosts_with_and_without_br_netfilter(|host| async move {
        let network = host.network();
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let b = network.ensure(&bot(2), &owner("team-b"), &cidr()).await.unwrap();
        let same = network.ensure(&bot(3), &owner("team-a"), &cidr()).await.unwrap();
        inside(&b.netns, || serve(80));
        inside(&same.netns, || serve(80));

        // Routed: the packet goes to the gateway's MAC, the host sends it back onto the bridge.
        for (to, answer) in [(&b, None), (&same, Some(ip(&a).to_string()))] {
            let to = ip(to);
            inside(&a.netns, move || sh(&format!("ip route add {to}/32 via 10.233.1.1 onlink dev eth0")));
            assert_eq!(ask_from(&a, to, 80), answer, "{to}");
        }
        // A static neighbour entry in place of ARP.
        let (to, mac) = (ip(&b), inside(&b.netns, || sh("ip -o link show eth0")));
        let mac = mac.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        inside(&a.netns, move || {
            sh(&format!("ip route del {to}/32; ip neigh replace {to} lladdr {mac} dev eth0 nud permanent"));
        });
        assert_eq!(ask_from(&a, ip(&b), 80), None);
        // IPv6: link-local addresses are made by themselves.
        let address = |netns: &Path| {
            inside(netns, || {
                sh("ip -6 addr add fe80::1234/64 dev eth0 nodad 2>/dev/null || true");
                sh("ip -6 -o addr show dev eth0 scope link")
            })
        };
        let text = address(&same.netns);
        let v6 = text.split("inet6 ").nth(1).expect("the kernel has IPv6").split('/').next().unwrap().to_owned();
        address(&b.netns);
        assert!(!ping_from(&a, format!("{v6}%eth0")), "{v6}");
        // All nodes of the link, which our own answers; no neighbour may have been learned.
        ping_from(&a, "ff02::1%eth0");
        let learned = inside(&a.netns, || sh("ip -6 neigh show dev eth0"));
        assert!(!learned.contains("lladdr"), "{learned}");
    });
}

#[test]
fn a_bot_speaks_for_itself_only() {
    on_a_host(|host| async move {
        let network = host.network();
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let b = network.ensure(&bot(2), &owner("team-a"), &cidr()).await.unwrap();
        inside(&b.netns, || serve(80));
        assert!(ask_from(&a, ip(&b), 80).is_some(), "the control: unspoofed it works");

        // Another's address, ARP of it included.
        inside(&a.netns, || sh("ip addr add 10.233.1.99/24 dev eth0"));
        let target = ip(&b);
        let ping = move || run(&format!("busybox ping -c 1 -W 1 -I 10.233.1.99 {target}")).status.success();
        sh("nft delete table inet bots-on-berth-t0; nft delete table bridge bots-on-berth-t0");
        assert!(inside(&a.netns, ping), "the control: without rules a spoofed address works");
        network.ensure_rules(&cidr()).await.unwrap();
        inside(&b.netns, || sh("ip neigh flush dev eth0"));
        assert!(!inside(&a.netns, ping));
        let seen = inside(&b.netns, || sh("ip neigh show 10.233.1.99"));
        assert!(!seen.contains("lladdr"), "ARP got through: {seen}");
        // The gateway's address: others would send their traffic to the bot.
        let gateway = sh("ip -o link show berth-t0");
        let gateway = gateway.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        inside(&b.netns, || sh("ip neigh flush dev eth0"));
        inside(&a.netns, || {
            sh("ip addr add 10.233.1.1/32 dev eth0");
            // Gratuitous ARP, three ways.
            let _ = run(
                "busybox arping -U -c 2 -I eth0 -s 10.233.1.1 10.233.1.1; busybox arping -A -c 1 -I eth0 -s 10.233.1.1 10.233.1.1",
            );
        });
        inside(&b.netns, || run("busybox ping -c 1 -W 1 10.233.1.1"));
        let seen = inside(&b.netns, || sh("ip neigh show 10.233.1.1"));
        assert!(seen.contains(&gateway), "{seen}: should be {gateway}");
        inside(&a.netns, || sh("ip addr del 10.233.1.1/32 dev eth0"));
        // Another's MAC: the bridge must not learn it.
        inside(&a.netns, || {
            sh(
                "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ip route replace default via 10.233.1.1",
            )
        });
        assert_eq!(ask_from(&a, ip(&b), 80), None);
        let learned = sh("bridge fdb show br berth-t0");
        assert!(!learned.contains("02:00:00:00:00:99"), "{learned}");
    });
}

#[test]
fn the_host_is_closed_but_for_dns_and_answers() {
    on_a_host(|host| async move {
        let network = host.network();
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let gateway = Ipv4Addr::new(10, 233, 1, 1);
        serve(80);
        serve(53);
        let dns = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 16];
            while let Ok((n, from)) = dns.recv_from(&mut buffer) {
                let _ = dns.send_to(&buffer[..n], from);
            }
        });
        for address in [gateway, HOST_ELSEWHERE] {
            assert_eq!(ask_from(&a, address, 80), None, "{address}:80");
            assert!(!ping_from(&a, address), "{address}");
        }
        // From an unconnected UDP socket the answer comes from the address that the kernel likes best: the gateway's.
        assert_eq!(ask_from(&a, gateway, 53), Some(ip(&a).to_string()));
        assert_eq!(ask_from(&a, HOST_ELSEWHERE, 53), Some(ip(&a).to_string()));
        let answer = inside(&a.netns, move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket.send_to(b"who?", (gateway, 53)).unwrap();
            let mut buffer = [0; 16];
            socket.recv_from(&mut buffer).map(|(n, _)| buffer[..n].to_vec())
        });
        assert_eq!(answer.unwrap(), b"who?");

        // Closed too when the policy says so, and a policy takes effect at the agent's next start, on running bots.
        let mut options = host.options();
        options.policy = Policy { host_dns: false, ..Policy::default() };
        Network::new(options).unwrap().ensure_rules(&cidr()).await.unwrap();
        assert_eq!(ask_from(&a, gateway, 53), None);
    });
}

/// A neighbour of the host, in a namespace of its own at the far end of a veth pair.
fn neighbour(host: &Host, addresses: &[Ipv4Addr]) -> PathBuf {
    let path = host.root.join("neighbour");
    std::fs::File::create(&path).unwrap();
    sh(&format!("unshare --net={} true", path.display()));
    sh(&format!(
        "ip link add out0 type veth peer name in0 && ip link set in0 netns {0} && \
         ip addr add 198.51.100.1/24 dev out0 && ip link set out0 up",
        path.display()
    ));
    let addresses = addresses.to_vec();
    inside(&path, move || {
        sh("ip link set lo up; ip link set in0 up; ip addr add 198.51.100.9/24 dev in0");
        for address in &addresses {
            sh(&format!("ip addr add {address}/32 dev in0"));
        }
        serve(80);
        serve(53);
    });
    path
}

#[test]
fn the_outside_is_reached_masqueraded_but_not_cloud_metadata() {
    on_a_host(|host| async move {
        let outside = neighbour(&host, &[METADATA]);
        sh("ip route add 169.254.0.0/16 dev out0");
        let network = host.network();
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        inside(&a.netns, || serve(80));
        assert_eq!(ask_from(&a, OUTSIDE, 80), Some("198.51.100.1".to_owned()), "egress has the host's address");
        assert!(ask(METADATA, 80).is_some(), "the control: the host reaches it");
        for port in [80, 53] {
            assert_eq!(ask_from(&a, METADATA, port), None);
        }
        // From outside nobody gets in, not even with a route.
        inside(&outside, || sh("ip route add 10.233.1.0/24 via 198.51.100.1"));
        let to = ip(&a);
        assert_eq!(inside(&outside, move || ask(to, 80)), None);

        let mut options = host.options();
        options.policy = Policy { link_local_dns: vec![METADATA], masquerade: false, ..Policy::default() };
        Network::new(options).unwrap().ensure_rules(&cidr()).await.unwrap();
        assert!(ask_from(&a, METADATA, 53).is_some(), "a resolver that the policy names");
        assert_eq!(ask_from(&a, METADATA, 80), None);
        assert_eq!(ask_from(&a, OUTSIDE, 80), Some(ip(&a).to_string()), "not masqueraded");
    });
}

#[test]
fn two_agents_on_one_machine_keep_their_bots_apart() {
    on_a_host(|host| async move {
        let mut options = host.options();
        options.bridge = "berth-t1".to_owned();
        options.run_dir = host.root.join("run1");
        options.state_dir = host.root.join("state1");
        let (one, two) = (host.network(), Network::new(options).unwrap());
        let a = one.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let b = two.ensure(&bot(2), &owner("team-b"), &Cidr::parse("10.233.2.0/24").unwrap()).await.unwrap();
        for bot in [&a, &b] {
            inside(&bot.netns, || serve(80));
            assert!(ask(ip(bot), 80).is_some());
        }
        assert_eq!(ask_from(&a, ip(&b), 80), None);
        assert_eq!(ask_from(&b, ip(&a), 80), None);
        // The other's tables and bots are left alone.
        two.remove(&bot(2)).await.unwrap();
        one.ensure_rules(&cidr()).await.unwrap();
        assert!(sh("nft list tables").contains("table inet bots-on-berth-t1"));
        assert!(ask(ip(&a), 80).is_some());
    });
}

// ---- lasting, mending, leaving ----------------------------------------------------------------------------------------

#[test]
fn a_bot_keeps_its_network_over_the_agents_restart_and_leaves_nothing() {
    on_a_host(|host| async move {
        host.network().ensure_rules(&cidr()).await.unwrap();
        let before = host.left();
        let network = host.network();
        assert_eq!(network.observe(&bot(1)).await.unwrap(), NetworkState::Absent);
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        assert_eq!(a.gateway, Some("10.233.1.1".parse().unwrap()));
        assert_eq!(network.observe(&bot(1)).await.unwrap(), NetworkState::Attached(a.clone()));
        // Again, and by another agent's process: no plugin is run (there is none), nothing changes.
        let mut options = host.options();
        options.cni_bin_dirs = vec![host.root.join("none")];
        let after_restart = Network::new(options).unwrap();
        for network in [&network, &after_restart] {
            assert_eq!(network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap(), a);
        }
        let found = network.list().await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].id, &found[0].owner), (&bot(1), &Some(owner("team-a"))));
        assert_eq!((found[0].netns, found[0].record, &found[0].addresses), (true, true, &vec![ip(&a)]));
        assert!(found[0].age < Duration::from_secs(60), "{:?}", found[0].age);

        network.remove(&bot(1)).await.unwrap();
        network.remove(&bot(1)).await.unwrap();
        assert_eq!(network.observe(&bot(1)).await.unwrap(), NetworkState::Absent);
        assert_eq!(network.list().await.unwrap(), []);
        assert_eq!(host.left(), before);
    });
}

#[test]
fn namespaces_are_seen_by_shims_whose_mounts_were_copied_before() {
    on_a_host(|host| async move {
        // The host's mounts are private here, as in some containers: then the directory is made a shared mount, once.
        let network = host.network();
        let of_ours = || {
            let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let point = format!(" {} ", host.root.join("run/netns").display());
            table.lines().filter(|l| l.contains(&point)).map(str::to_owned).collect::<Vec<_>>()
        };
        assert!(matches!(of_ours().as_slice(), [one] if one.contains(" shared:")), "{:?}", of_ours());
        host.network();
        assert_eq!(of_ours().len(), 1);
        let mut shim = Command::new("unshare")
            .args(["--mount", "--propagation", "unchanged", "sh", "-c", "echo up; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(shim.stdout.take().unwrap()), &mut line).unwrap();
        let seen = || {
            let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", shim.id())).unwrap();
            table.lines().filter(|l| l.contains(bot(1).as_str()) && l.contains(" - nsfs ")).count()
        };
        network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        assert_eq!(seen(), 1);
        network.remove(&bot(1)).await.unwrap();
        assert_eq!(seen(), 0);
        shim.kill().unwrap();
        shim.wait().unwrap();
    });
}

#[test]
fn loopback_only_is_a_namespace_with_loopback_up() {
    on_a_host(|host| async move {
        let network = host.network();
        let before = host.left();
        let a = network.ensure_loopback_only(&bot(1), &owner("team-a")).await.unwrap();
        assert_eq!(network.ensure_loopback_only(&bot(1), &owner("team-a")).await.unwrap(), a);
        assert_eq!(a.ips, [] as [IpAddr; 0]);
        assert!(ping_from(&a, "127.0.0.1"));
        let links = inside(&a.netns, || sh("ip -o link show up"));
        assert_eq!(links.lines().count(), 1, "{links}");
        network.remove(&bot(1)).await.unwrap();
        assert_eq!(host.left(), before);
    });
}

#[test]
fn what_a_cut_off_set_up_left_is_taken_down_first() {
    // Each script leaves a plugin's work at another point and ends as `kill -9` of everything would: the undo that the
    // agent would have run is not run, since the state is put back as it was before it.
    type Sabotage = fn(&Host, &Attachment);
    let cases: [(&str, Sabotage); 8] = [
        ("record gone, all else there", |host, _| remove_records(host)),
        ("record garbled", |host, _| {
            for path in records(host) {
                std::fs::write(path, "{\"owner\":").unwrap();
            }
        }),
        ("only a draft of the record", |host, _| {
            for path in records(host) {
                std::fs::rename(&path, path.with_extension("new")).unwrap();
            }
        }),
        ("namespace unmounted, veth and lease there", |_, a| unmount(&a.netns, UnmountFlags::DETACH).unwrap()),
        ("mount point without namespace, no record", |host, a| {
            unmount(&a.netns, UnmountFlags::DETACH).unwrap();
            remove_records(host);
        }),
        ("lease only", |host, a| {
            unmount(&a.netns, UnmountFlags::DETACH).unwrap();
            std::fs::remove_file(&a.netns).unwrap();
            remove_records(host);
        }),
        ("veth deleted by someone", |_, a| drop(sh(&format!("ip link del {}", a.host_interface)))),
        ("another namespace in its place", |_, a| {
            unmount(&a.netns, UnmountFlags::DETACH).unwrap();
            sh(&format!("unshare --net={} true", a.netns.display()));
        }),
    ];
    for (name, sabotage) in cases {
        on_a_host(move |host| async move {
            host.network().ensure_rules(&cidr()).await.unwrap();
            let before = host.left();
            // Put back, it is taken down whole …
            let a = host.network().ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
            sabotage(&host, &a);
            let network = host.network();
            network.ensure_rules(&cidr()).await.unwrap();
            network.remove(&bot(1)).await.unwrap();
            eventually(name, || (host.left() == before).then_some(()).ok_or_else(|| format!("{:?}", host.left())))
                .await;
            // … or made anew.
            let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
            sabotage(&host, &a);
            let network = host.network();
            let again = match network.ensure(&bot(1), &owner("team-a"), &cidr()).await {
                Ok(again) => again,
                // A lease without any other trace is found by the plugin's refusal, and then freed.
                Err(_) if name == "lease only" => network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap(),
                Err(e) => panic!("{name}: {}", chain(&e)),
            };
            assert_eq!(network.observe(&bot(1)).await.unwrap(), NetworkState::Attached(again.clone()), "{name}");
            inside(&again.netns, || serve(80));
            assert!(ask(ip(&again), 80).is_some(), "{name}");
            eventually(name, || {
                let left = host.left();
                let one = left.leases.len() == 1 && left.veths == 1 && left.mounts == 1 && left.netns.len() == 1;
                one.then_some(()).ok_or_else(|| format!("{left:?}"))
            })
            .await;
            network.remove(&bot(1)).await.unwrap();
            eventually(name, || (host.left() == before).then_some(()).ok_or_else(|| format!("{:?}", host.left())))
                .await;
        });
    }
}

/// Not a test: what the next one kills. It has its host from the thread that started it.
#[test]
#[ignore = "run by an_agent_killed_at_any_moment_leaves_what_the_next_one_mends"]
fn an_agent_to_be_killed() {
    let Some(root) = std::env::var_os("BERTH_TEST_ROOT") else { return };
    let host = Host { root: root.into() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let network = host.network();
        network.ensure_rules(&cidr()).await.unwrap();
        println!("up");
        loop {
            network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
            network.remove(&bot(1)).await.unwrap();
        }
    });
}

#[test]
fn an_agent_killed_at_any_moment_leaves_what_the_next_one_mends() {
    on_a_host(|host| async move {
        host.network().ensure_rules(&cidr()).await.unwrap();
        let before = host.left();
        let mut cut_off = 0;
        for round in 0..30_u64 {
            let mut agent = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "--nocapture", "an_agent_to_be_killed"])
                .env("BERTH_TEST_ROOT", &host.root)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(agent.stdout.take().unwrap()));
            assert!(lines.any(|line| line.unwrap().ends_with("up")), "the agent did not come up");
            // Spread over a round of ensure and remove.
            tokio::time::sleep(Duration::from_micros(round * 2_300)).await;
            agent.kill().unwrap();
            agent.wait().unwrap();
            let network = host.network();
            network.ensure_rules(&cidr()).await.unwrap();
            cut_off += u32::from(matches!(network.observe(&bot(1)).await.unwrap(), NetworkState::Partial { .. }));
            if round % 2 == 0 {
                // A plugin that outlived its agent may still take an address; that is refused once, then freed.
                let mut attached = network.ensure(&bot(1), &owner("team-a"), &cidr()).await;
                for _ in 0..3 {
                    if attached.is_err() {
                        attached = network.ensure(&bot(1), &owner("team-a"), &cidr()).await;
                    }
                }
                let attached = attached.unwrap();
                inside(&attached.netns, || serve(80));
                assert!(ask(ip(&attached), 80).is_some());
            }
            network.remove(&bot(1)).await.unwrap();
            // What such a plugin left after that is in the list, as for the agent's sweep.
            let limit = Instant::now() + Duration::from_secs(10);
            while host.left() != before {
                for found in network.list().await.unwrap() {
                    network.remove(&found.id).await.unwrap();
                }
                assert!(Instant::now() < limit, "round {round}: {:?}", host.left());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert!(cut_off > 0, "no kill hit a network in the making: nothing was tried");
    });
}

fn records(host: &Host) -> Vec<PathBuf> {
    std::fs::read_dir(host.root.join("state/network/berth-t0")).unwrap().map(|e| e.unwrap().path()).collect()
}

fn remove_records(host: &Host) {
    records(host).iter().for_each(|path| std::fs::remove_file(path).unwrap());
}

/// Asks until it is so; the kernel takes namespaces apart in its own time.
async fn eventually<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        match ask() {
            Ok(is) => return is,
            Err(seen) if Instant::now() > limit => panic!("{what}: last seen: {seen}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[test]
fn after_a_boot_everything_is_made_anew() {
    on_a_host(|host| async move {
        let a = host.network().ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        // /run is gone, /var is kept; the boot's id in the record is another's.
        unmount(&a.netns, UnmountFlags::DETACH).unwrap();
        std::fs::remove_dir_all(host.root.join("run")).ok();
        sh("ip link del berth-t0; nft flush ruleset");
        for path in records(&host) {
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            let old = text.replace(boot.trim(), "00000000-0000-0000-0000-000000000000");
            assert_ne!(text, old);
            std::fs::write(&path, old).unwrap();
        }
        let network = host.network();
        let state = network.observe(&bot(1)).await.unwrap();
        assert!(matches!(&state, NetworkState::Partial { why } if why.contains("boot")), "{state:?}");
        let again = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        inside(&again.netns, || serve(80));
        assert!(ask(ip(&again), 80).is_some());
        assert_eq!(host.left().leases.len(), 1);
    });
}

#[test]
fn rules_and_bridge_that_someone_took_apart_are_mended() {
    on_a_host(|host| async move {
        let network = host.network();
        sh("nft add table inet foreign && nft add chain inet foreign theirs");
        let a = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        let b = network.ensure(&bot(2), &owner("team-a"), &cidr()).await.unwrap();
        let c = network.ensure(&bot(3), &owner("team-b"), &cidr()).await.unwrap();
        for bot in [&a, &b, &c] {
            inside(&bot.netns, || serve(80));
        }
        let rules = |text: String| -> Vec<String> {
            // The kernel lists elements in no order.
            let mut words: Vec<String> = text.split([' ', ',', '\n', '\t']).map(str::to_owned).collect();
            words.sort();
            words
        };
        let whole = rules(sh("nft list ruleset"));
        let mac = sh("ip -o link show berth-t0");
        for damage in [
            "nft delete table inet bots-on-berth-t0",
            "nft delete table bridge bots-on-berth-t0",
            "nft flush chain bridge bots-on-berth-t0 between_ports",
            "nft flush set bridge bots-on-berth-t0 senders",
            "nft add rule inet bots-on-berth-t0 to_host accept",
            "ip link del berth-t0",
            "ip link set berth-t0 address 02:00:00:00:00:55",
            "ip link set berth-t0 down",
        ] {
            sh(damage);
            network.ensure_rules(&cidr()).await.unwrap();
            let now = sh("nft list ruleset");
            assert!(rules(now.clone()) == whole, "{damage}: {now}");
            assert_eq!(ask_from(&a, ip(&b), 80), Some(ip(&a).to_string()), "{damage}");
            assert_eq!(ask_from(&a, ip(&c), 80), None, "{damage}");
            assert!(ask(ip(&c), 80).is_some(), "{damage}");
        }
        let now = sh("ip -o link show berth-t0");
        let of = |text: &str| text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        assert_eq!(of(&mac), of(&now), "the bridge's MAC is fixed");
        assert!(sh("nft list tables").contains("table inet foreign"));

        // A bot that comes or goes while the table is gone mends it too.
        sh("nft delete table bridge bots-on-berth-t0");
        network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
        assert_eq!(rules(sh("nft list ruleset")), whole);
        sh("nft delete table bridge bots-on-berth-t0");
        network.remove(&bot(2)).await.unwrap();
        assert!(sh("nft list tables").contains("table bridge bots-on-berth-t0"));
        assert_eq!(ask_from(&a, ip(&c), 80), None);
    });
}

// ---- plugins that fail ------------------------------------------------------------------------------------------------

#[test]
fn a_plugin_that_fails_tells_why_and_leaves_nothing() {
    let refusal = r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"no luck","details":"today"}'; exit 1"#;
    let cases: [(&str, String, &str); 10] = [
        ("refuses", refusal.to_owned(), "no luck; today (code 11)"),
        ("dies with words", "echo 'segfault at 0' >&2; exit 2".to_owned(), "exit status: 2: segfault at 0"),
        ("dies silently", "exit 3".to_owned(), "it said nothing"),
        ("prints nothing", "exit 0".to_owned(), "printed garbage"),
        ("prints garbage", "echo hello; exit 0".to_owned(), "printed garbage (no CNI result"),
        ("floods", "head -c 10000000 /dev/zero".to_owned(), "bridge"),
        ("hangs", "exec sleep 1000".to_owned(), "did not end within 700ms and was killed"),
        ("hangs in a grandchild", "sleep 1000 & wait".to_owned(), "did not end within 700ms and was killed"),
        ("does its work, then prints garbage", "$REAL >/dev/null; echo '{}'".to_owned(), "printed garbage"),
        ("does its work, then is killed", "$REAL; kill -9 $$".to_owned(), "signal: 9"),
    ];
    for (name, script, words) in cases {
        // DEL fails in the same way in one run, and works in the other.
        for del_works in [false, true] {
            let script = match del_works {
                true => format!("if [ $CNI_COMMAND = DEL ]; then exec $REAL; fi\n{script}"),
                false => script.clone(),
            };
            on_a_host(move |host| async move {
                host.network().ensure_rules(&cidr()).await.unwrap();
                let before = host.left();
                let mut options = host.options();
                options.plugin_deadline = Duration::from_millis(700);
                options.cni_bin_dirs = host.plugins(&script);
                let broken = Network::new(options).unwrap();
                let error = broken.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap_err();
                let text = chain(&error);
                assert!(text.contains(words), "{name}: {text}");
                assert!(text.contains(bot(1).as_str()), "{name}: {text}");
                assert_eq!(error.reason(), Reason::NetworkFailed, "{name}");
                assert!(error.retryable());
                eventually(name, || (host.left() == before).then_some(()).ok_or_else(|| format!("{:?}", host.left())))
                    .await;
                eventually(name, || match plugins_alive(&host) {
                    0 => Ok(()),
                    n => Err(format!("{n} processes of the plugin live on")),
                })
                .await;
                // Mended, it works.
                host.network().ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap();
                // Broken again, the bot can still be removed.
                broken.remove(&bot(1)).await.unwrap();
                eventually(name, || (host.left() == before).then_some(()).ok_or_else(|| format!("{:?}", host.left())))
                    .await;
            });
        }
    }
}

/// Processes that were started as a plugin of this host, or by one: they have its namespaces' path in their environment.
fn plugins_alive(host: &Host) -> usize {
    let mark = format!("CNI_NETNS={}", host.root.display());
    let environments =
        std::fs::read_dir("/proc").unwrap().filter_map(|e| std::fs::read(e.ok()?.path().join("environ")).ok());
    environments.filter(|text| String::from_utf8_lossy(text).contains(&mark)).count()
}

#[test]
fn a_missing_plugin_is_named_with_where_it_was_looked_for() {
    on_a_host(|host| async move {
        let mut options = host.options();
        options.cni_bin_dirs = vec![host.root.join("here"), host.root.join("there")];
        let network = Network::new(options).unwrap();
        network.ensure_rules(&cidr()).await.unwrap();
        let before = host.left();
        let error = network.ensure(&bot(1), &owner("team-a"), &cidr()).await.unwrap_err();
        let text = chain(&error);
        for word in ["bridge is missing", "/here", "/there", "install"] {
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(host.left(), before);
    });
}

#[test]
fn an_exhausted_network_says_so_and_goes_on_when_there_is_room() {
    on_a_host(|host| async move {
        let network = host.network();
        let small = Cidr::parse("10.233.9.0/29").unwrap();
        for n in 1..=5 {
            network.ensure(&bot(n), &owner("team-a"), &small).await.unwrap();
        }
        let before = host.left();
        let error = network.ensure(&bot(6), &owner("team-a"), &small).await.unwrap_err();
        assert!(matches!(error, NetworkError::AddressesExhausted { room: 5, .. }), "{error:?}");
        assert_eq!(error.reason(), Reason::AddressesExhausted);
        assert!(chain(&error).contains("all 5 of 10.233.9.0/29"), "{}", chain(&error));
        assert_eq!(host.left(), before);
        network.remove(&bot(3)).await.unwrap();
        network.ensure(&bot(6), &owner("team-a"), &small).await.unwrap();
    });
}

#[test]
fn a_caller_that_goes_away_leaves_no_half_network() {
    on_a_host(|host| async move {
        let network = host.network();
        network.ensure_rules(&cidr()).await.unwrap();
        for delay in [0, 1, 3, 6, 9, 12] {
            let (id, own, net) = (bot(100 + delay), owner("team-a"), cidr());
            let ensure = network.ensure(&id, &own, &net);
            let _ = tokio::time::timeout(Duration::from_millis(delay.into()), ensure).await;
            // The next call waits for the one that goes on, and finds it done.
            let a = network.ensure(&id, &own, &net).await.unwrap();
            assert_eq!(network.observe(&id).await.unwrap(), NetworkState::Attached(a));
        }
        assert!(host.left().leases.len() <= 6);
    });
}

#[test]
fn many_at_once_get_an_address_each_and_leave_nothing() {
    on_a_host(|host| async move {
        let network = host.network();
        // No rules before: the first to come make bridge and rules, all at once.
        let owners: Vec<Owner> = (0..24).map(|n| owner(&format!("team-{}", n % 3))).collect();
        let ids: Vec<ContainerId> = (0..24).map(bot).collect();
        let net = cidr();
        let ensure = ids.iter().zip(&owners).map(|(id, owner)| network.ensure(id, owner, &net));
        let attached = futures::future::try_join_all(ensure).await.unwrap();
        let mut addresses: Vec<Ipv4Addr> = attached.iter().map(ip).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 24);
        inside(&attached[3].netns, || serve(80));
        assert!(ask_from(&attached[0], ip(&attached[3]), 80).is_some(), "same namespace");
        assert_eq!(ask_from(&attached[1], ip(&attached[3]), 80), None, "another namespace");
        futures::future::try_join_all(ids.iter().map(|id| network.remove(id))).await.unwrap();
        let left = host.left();
        assert_eq!((left.netns.len(), left.mounts, left.records.len(), left.leases.len(), left.veths), (0, 0, 0, 0, 0));
        assert!(!sh("nft list ruleset").contains("veth"));
    });
}

/// How long things take; run with `--ignored --nocapture`. Asserts nothing but that `observe` is cheap.
#[test]
#[ignore = "a measurement"]
fn how_long_it_takes() {
    on_a_host(|host| async move {
        let network = host.network();
        network.ensure_rules(&cidr()).await.unwrap();
        let (own, net) = (owner("team-a"), cidr());
        let ids: Vec<ContainerId> = (0..64).map(bot).collect();
        let report = |what: &str, mut times: Vec<Duration>| {
            times.sort();
            println!("{what}: p50 {:?} p95 {:?}", times[times.len() / 2], times[times.len() * 95 / 100]);
        };
        let (mut made, mut again, mut seen, mut gone) = (vec![], vec![], vec![], vec![]);
        for id in &ids {
            let start = Instant::now();
            network.ensure(id, &own, &net).await.unwrap();
            made.push(start.elapsed());
            let start = Instant::now();
            network.ensure(id, &own, &net).await.unwrap();
            again.push(start.elapsed());
            let start = Instant::now();
            network.observe(id).await.unwrap();
            seen.push(start.elapsed());
        }
        let start = Instant::now();
        network.ensure_rules(&net).await.unwrap();
        println!("ensure_rules with 64 bots: {:?}", start.elapsed());
        let start = Instant::now();
        network.list().await.unwrap();
        println!("list of 64: {:?}", start.elapsed());
        for id in &ids {
            let start = Instant::now();
            network.remove(id).await.unwrap();
            gone.push(start.elapsed());
        }
        for (what, times) in [("ensure", made), ("ensure again", again), ("observe", seen), ("remove", gone)] {
            report(what, times);
        }
        // The peer: the same plugin with nothing around it, into namespaces made before.
        let (mut add, mut del) = (vec![], vec![]);
        let config = |d: &Path| {
            format!(
                r#"{{"cniVersion":"1.0.0","name":"raw","type":"bridge","bridge":"berth-t0","isGateway":false,
                   "ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"10.233.1.0/24"}}]],
                   "routes":[{{"dst":"0.0.0.0/0"}}]}}}}"#,
                d.display()
            )
        };
        for id in &ids {
            network.ensure_loopback_only(id, &own).await.unwrap();
        }
        for (verb, times) in [("ADD", &mut add), ("DEL", &mut del)] {
            for id in &ids {
                let start = Instant::now();
                let mut child = Command::new(real_plugins().join("bridge"))
                    .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", id.as_str()), ("CNI_IFNAME", "eth0")])
                    .env("CNI_NETNS", network.netns_path(id))
                    .env("CNI_PATH", real_plugins())
                    .stdin(std::process::Stdio::piped())
                    .stdout(std::process::Stdio::null())
                    .spawn()
                    .unwrap();
                child.stdin.take().unwrap().write_all(config(&host.root.join("raw")).as_bytes()).unwrap();
                assert!(child.wait().unwrap().success());
                times.push(start.elapsed());
            }
        }
        for id in &ids {
            network.remove(id).await.unwrap();
        }
        report("bridge ADD alone", add);
        report("bridge DEL alone", del);
        use futures::StreamExt as _;
        let start = Instant::now();
        futures::stream::iter(&ids)
            .for_each_concurrent(8, |id| async { drop(network.ensure(id, &own, &net).await.unwrap()) })
            .await;
        println!("64 ensures, 8 at a time: {:?} each", start.elapsed() / 64);
        let start = Instant::now();
        futures::stream::iter(&ids).for_each_concurrent(8, |id| async { network.remove(id).await.unwrap() }).await;
        println!("64 removes, 8 at a time: {:?} each", start.elapsed() / 64);
    });
}
