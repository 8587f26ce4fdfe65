//! The agent's flags: first what was typed, then what it means.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::NodeAddress;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::image::{Authority, CollectionPolicy, ImageOptions, Mirror};
use crate::network::{ClusterDns, NetworkOptions, Nft};
use crate::output::OutputOptions;

use super::bundle;
use super::disk::DiskOptions;
use super::host::Pod;
use super::node::NodeFacts;

/// Runs the bots of one node on its containerd. Ended by TERM; its bots run on.
#[derive(Clone, Debug, clap::Args)]
pub struct AgentArgs {
    /// Name of this node: of its BotNode, its Lease, and of the Node where there is one.
    #[arg(long, env = "BERTH_NODE_NAME", value_name = "NAME")]
    pub node_name: String,

    /// Enter the host's mount namespace first: for an agent in a Pod, which must be privileged and have hostPID: true.
    #[arg(long, env = "BERTH_ENTER_HOST")]
    pub enter_host: bool,

    /// containerd's socket.
    #[arg(
        long,
        env = "BERTH_CONTAINERD_ADDRESS",
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub containerd_address: PathBuf,

    /// containerd's state directory; that of its socket without it.
    #[arg(long, env = "BERTH_CONTAINERD_STATE", value_name = "DIR")]
    pub containerd_state: Option<PathBuf>,

    /// containerd's namespace for bots. Everything in it is Berth's.
    #[arg(long, env = "BERTH_CONTAINERD_NAMESPACE", value_name = "NAME", default_value = "berth")]
    pub containerd_namespace: String,

    /// containerd's snapshotter for writable layers, where a bot names none.
    #[arg(long, env = "BERTH_SNAPSHOTTER", value_name = "NAME", default_value = "overlayfs")]
    pub snapshotter: String,

    /// Folder for what does not outlive a reboot: network namespaces, FIFOs, mounted files.
    #[arg(long, env = "BERTH_RUN_DIR", value_name = "DIR", default_value = "/run/berth")]
    pub run_dir: PathBuf,

    /// Folder for what does: addresses given out, the agent's lock.
    #[arg(long, env = "BERTH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/berth")]
    pub state_dir: PathBuf,

    /// Folder for the bots' output, a folder a bot.
    #[arg(long, env = "BERTH_LOG_DIR", value_name = "DIR", default_value = "/var/log/berth")]
    pub log_dir: PathBuf,

    /// Largest size of one log file. Bytes.
    #[arg(long, env = "BERTH_LOG_FILE_BYTES", value_name = "BYTES", default_value_t = 10 << 20)]
    pub log_file_bytes: u64,

    /// Log files kept of one bot, the one being written among them.
    #[arg(long, env = "BERTH_LOG_FILES", value_name = "N", default_value_t = 5)]
    pub log_files: u32,

    /// Folders with the CNI plugins bridge, host-local and loopback; the first that has one is used.
    #[arg(
        long,
        env = "BERTH_CNI_BIN_DIR",
        value_name = "DIR",
        value_delimiter = ',',
        default_value = "/opt/cni/bin,/usr/lib/cni"
    )]
    pub cni_bin_dir: Vec<PathBuf>,

    /// Name of the bridge that this node's bots are on, at most 15 characters.
    #[arg(long, env = "BERTH_BRIDGE_NAME", value_name = "NAME", default_value = "berth0")]
    pub bridge_name: String,

    /// Parent of the bots' cgroups, absolute within the hierarchy.
    #[arg(long, env = "BERTH_CGROUP_PARENT", value_name = "PATH", default_value = "/berth")]
    pub cgroup_parent: String,

    /// Addresses of the cluster's DNS, for dnsPolicy ClusterFirst. Without any, those that kubelet gave to the Pod that the agent is in;
    /// else bots get the node's.
    #[arg(long, env = "BERTH_CLUSTER_DNS", value_name = "IP", value_delimiter = ',')]
    pub cluster_dns: Vec<std::net::IpAddr>,

    /// Domain of the cluster's DNS. Default: cluster.local.
    #[arg(long, env = "BERTH_CLUSTER_DOMAIN", value_name = "DOMAIN")]
    pub cluster_domain: Option<String>,

    /// The node's resolv.conf.
    #[arg(long, env = "BERTH_RESOLV_CONF", value_name = "PATH", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,

    /// A registry's mirror, tried before the registry itself, for example `docker.io=https://mirror.example/proxy`.
    #[arg(long, env = "BERTH_REGISTRY_MIRROR", value_name = "REGISTRY=URL", value_delimiter = ',')]
    pub registry_mirror: Vec<Mirror>,

    /// Files with certificates (PEM) of authorities that registries and mirrors are trusted by, beside the machine's own.
    #[arg(long, env = "BERTH_REGISTRY_CA", value_name = "FILE", value_delimiter = ',')]
    pub registry_ca: Vec<PathBuf>,

    /// Most bytes that an image may have unpacked.
    #[arg(long, env = "BERTH_MAX_IMAGE_BYTES", value_name = "BYTES", default_value_t = 32 << 30)]
    pub max_image_bytes: u64,

    /// Above this much use of the disk under containerd's layers, images that no bot uses are removed. Percent, as
    /// kubelet's imageGCHighThresholdPercent.
    #[arg(long, env = "BERTH_IMAGE_GC_HIGH_PERCENT", value_name = "PERCENT", default_value_t = 85, value_parser = percent())]
    pub image_gc_high_percent: u8,

    /// Removal of unused images ends at this much use. Percent, as kubelet's imageGCLowThresholdPercent.
    #[arg(long, env = "BERTH_IMAGE_GC_LOW_PERCENT", value_name = "PERCENT", default_value_t = 80, value_parser = percent())]
    pub image_gc_low_percent: u8,

    /// An image that was asked for, or first seen by this agent, less long ago stays. Seconds.
    #[arg(long, env = "BERTH_IMAGE_MIN_AGE_SECONDS", value_name = "SECONDS", default_value_t = 120)]
    pub image_min_age_seconds: u64,

    /// With less free room than this on that disk, the node says DiskPressure and takes no new bots. Percent.
    #[arg(long, env = "BERTH_DISK_PRESSURE_PERCENT", value_name = "PERCENT", default_value_t = 12, value_parser = percent())]
    pub disk_pressure_percent: u8,

    /// A RuntimeClass handler and containerd's runtime for it, for example `gvisor=io.containerd.runsc.v1`.
    #[arg(long, env = "BERTH_RUNTIME_HANDLER", value_name = "HANDLER=RUNTIME", value_delimiter = ',', value_parser = pair)]
    pub runtime_handler: Vec<(String, String)>,

    /// CPU that bots may use in all, a quantity. Default: the machine's.
    #[arg(long, env = "BERTH_CAPACITY_CPU", value_name = "QUANTITY")]
    pub capacity_cpu: Option<String>,

    /// Memory that bots may use in all, a quantity. Default: the machine's less a tenth.
    #[arg(long, env = "BERTH_CAPACITY_MEMORY", value_name = "QUANTITY")]
    pub capacity_memory: Option<String>,

    /// How many bots this node takes.
    #[arg(long, env = "BERTH_MAX_BOTS", value_name = "N", default_value_t = 200)]
    pub max_bots: u32,

    /// Processes and threads of a bot whose spec has no limits.pids.
    #[arg(long, env = "BERTH_DEFAULT_PIDS_LIMIT", value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(i64).range(1..=4_194_304))]
    pub default_pids_limit: i64,

    /// Address of this node, for BotNode's status. Default: the one that the machine would use to reach others.
    #[arg(long, env = "BERTH_NODE_IP", value_name = "IP")]
    pub node_ip: Option<std::net::IpAddr>,

    /// How long something that no object owns is left alone after it was first found. Seconds.
    #[arg(long, env = "BERTH_ORPHAN_GRACE_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub orphan_grace_seconds: u64,

    /// How long a layer stays that a bot under `deletionPolicy: Retain` left when its namespace was deleted: until then `kubectl berth
    /// adopt` makes a version of it. For example `7d` or `36h`.
    #[arg(long, env = "BERTH_ORPHAN_RETENTION", value_name = "DURATION", default_value = "7d", value_parser = duration)]
    pub orphan_retention: Duration,

    /// What loads the packet rules.
    #[arg(skip)]
    pub nft: Nft,

    /// Where /healthz, /readyz and /metrics are served; none without it.
    #[arg(long, env = "BERTH_HEALTH_ADDRESS", value_name = "IP:PORT")]
    pub health_address: Option<SocketAddr>,
}

fn percent() -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(0..=100)
}

/// A length of time in jiff's friendly format, a day being 24 hours.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("{error}; expected for example 7d or 36h");
    let span: jiff::Span = text.parse().map_err(|error: jiff::Error| wrong(&error))?;
    let length = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|error| wrong(&error))?;
    Duration::try_from(length).map_err(|error| wrong(&error))
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((handler, runtime)) if !handler.is_empty() && !runtime.is_empty() => {
            Ok((handler.to_owned(), runtime.to_owned()))
        }
        _ => Err("expected HANDLER=RUNTIME, for example gvisor=io.containerd.runsc.v1".to_owned()),
    }
}

impl AgentArgs {
    /// containerd's state directory.
    pub fn containerd_state(&self) -> PathBuf {
        let beside = || self.containerd_address.parent().map(Path::to_owned);
        self.containerd_state.clone().or_else(beside).unwrap_or_default()
    }

    /// Where layers are mounted for a moment.
    pub fn mnt_dir(&self) -> PathBuf {
        self.run_dir.join("mnt")
    }

    /// Where the files to be mounted into bots lie.
    pub fn files_dir(&self) -> PathBuf {
        self.run_dir.join("files")
    }

    /// Where a bot is noted that a snapshot has frozen, as long as it is.
    pub fn debts_dir(&self) -> PathBuf {
        self.run_dir.join("frozen")
    }

    /// Where versions' manifests lie.
    pub fn snapshots_dir(&self) -> PathBuf {
        self.state_dir.join("snapshots")
    }

    /// The cgroup of what has to outlive the agent, loggers and copiers, from the root of each hierarchy.
    pub fn helpers_cgroup(&self) -> String {
        format!("/{}/logger", self.cgroup_parent.trim_matches('/'))
    }

    /// This program, for the processes that it starts: the very file that runs, wherever it is mounted, also when another was put
    /// in its place or the Pod that it came in is gone.
    pub fn program(&self) -> PathBuf {
        PathBuf::from("/proc/self/exe")
    }

    /// Of an agent that left its Pod: files are named as the Pod sees them, and kubelet told it the cluster's DNS.
    pub fn of_pod(mut self, pod: &Pod) -> Self {
        self.nft = Nft::Folder(pod.path(Path::new("/usr/libexec/nft")));
        self.registry_ca = self.registry_ca.iter().map(|path| pod.path(path)).collect();
        if let Some(dns) = pod.cluster_dns.as_ref().filter(|_| self.cluster_dns.is_empty()) {
            self.cluster_dns.clone_from(&dns.ips);
            self.cluster_domain.get_or_insert_with(|| dns.domain.clone());
        }
        self
    }

    /// How long an orphan is left alone.
    pub fn orphan_grace(&self) -> Duration {
        Duration::from_secs(self.orphan_grace_seconds)
    }

    /// RuntimeClass handler -> containerd's runtime.
    pub fn runtimes(&self) -> BTreeMap<String, String> {
        let mut runtimes = BTreeMap::from([("runc".to_owned(), bundle::DEFAULT_RUNTIME.to_owned())]);
        runtimes.extend(self.runtime_handler.iter().cloned());
        runtimes
    }

    /// What bots may use in all. `memory` is the machine's, in bytes.
    pub fn capacity(&self, memory: u64) -> BTreeMap<String, Quantity> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cpu = self.capacity_cpu.clone().unwrap_or_else(|| cpus.to_string());
        // A tenth is left to the machine: what kubelet's reserves come to on nodes of usual size.
        let memory = self.capacity_memory.clone().unwrap_or_else(|| format!("{}Ki", memory / 10 * 9 / 1024));
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpu)),
            ("memory".to_owned(), Quantity(memory)),
            ("bots".to_owned(), Quantity(self.max_bots.to_string())),
        ])
    }

    /// The capacity as the cgroup counts it: thousandths of a CPU, and bytes. `None` where a flag is no quantity.
    pub fn cgroup_limits(&self, memory: u64) -> Option<(i64, i64)> {
        let capacity = self.capacity(memory);
        let amount = |key| capacity.get(key).and_then(crate::oci::quantity::Amount::parse);
        Some((amount("cpu")?.millis()?, amount("memory")?.units()?))
    }

    /// The node's addresses.
    pub fn addresses(&self) -> Vec<NodeAddress> {
        let ip = self.node_ip.or_else(outgoing_ip);
        let ip = ip.map(|ip| NodeAddress { type_: "InternalIP".to_owned(), address: ip.to_string() });
        let name = NodeAddress { type_: "Hostname".to_owned(), address: hostname() };
        ip.into_iter().chain([name]).collect()
    }

    /// For the network of bots.
    pub fn network_options(&self) -> NetworkOptions {
        NetworkOptions {
            cni_bin_dirs: self.cni_bin_dir.clone(),
            run_dir: self.run_dir.clone(),
            state_dir: self.state_dir.clone(),
            bridge: self.bridge_name.clone(),
            nft: self.nft.clone(),
            ..NetworkOptions::default()
        }
    }

    /// For the output of bots.
    pub fn output_options(&self) -> OutputOptions {
        OutputOptions {
            log_root: self.log_dir.clone(),
            run_dir: self.run_dir.clone(),
            max_file_bytes: self.log_file_bytes,
            max_files: self.log_files,
            cgroup: Some(self.helpers_cgroup()),
            program: self.program(),
        }
    }

    /// For images. Reads the files of `--registry-ca`.
    pub fn image_options(&self) -> anyhow::Result<ImageOptions> {
        let mut authorities = Vec::new();
        for path in &self.registry_ca {
            let failed = || format!("--registry-ca {}: it must be a file with PEM certificates", path.display());
            let pem = std::fs::read(path).with_context(failed)?;
            authorities.extend(Authority::parse_all(&pem).with_context(failed)?);
        }
        Ok(ImageOptions {
            mirrors: self.registry_mirror.clone(),
            authorities,
            max_unpacked_bytes: self.max_image_bytes,
            ..ImageOptions::default()
        })
    }

    /// For the node's disk.
    pub fn disk_options(&self) -> DiskOptions {
        let images = CollectionPolicy {
            high_percent: self.image_gc_high_percent,
            low_percent: self.image_gc_low_percent,
            min_age: Duration::from_secs(self.image_min_age_seconds),
            snapshotters: vec![self.snapshotter.clone()],
        };
        DiskOptions { images, pressure_percent: u64::from(self.disk_pressure_percent) }
    }

    /// For containers' specs.
    pub fn bundle_options(&self, facts: &NodeFacts, runtimes: BTreeMap<String, String>) -> bundle::Options {
        let ips = facts.addresses.iter().filter(|address| address.type_ == "InternalIP");
        bundle::Options {
            files_dir: self.files_dir(),
            own_files_dir: self.state_dir.join("files"),
            mnt_dir: self.mnt_dir(),
            netns_dir: self.run_dir.join("netns"),
            seccomp_dir: self.state_dir.join("seccomp"),
            zoneinfo_dir: PathBuf::from("/usr/share/zoneinfo"),
            resolv_conf: self.resolv_conf.clone(),
            cluster_dns: ClusterDns {
                ips: self.cluster_dns.clone(),
                domain: self.cluster_domain.clone().unwrap_or_else(|| "cluster.local".to_owned()),
            },
            node_name: self.node_name.clone(),
            hostname: hostname(),
            host_ips: ips.map(|address| address.address.clone()).collect(),
            allocatable: facts.capacity.clone(),
            runtimes,
        }
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The address that the kernel would send from to the outside. Nothing is sent: a UDP socket's connect only asks the
/// routing table. TEST-NET-1 (RFC 5737) stands for the outside.
fn outgoing_ip() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified()).then_some(ip)
}

/// The version of the runc on the path, or `unknown`: containerd does not tell it.
pub async fn runc_version() -> String {
    let output = tokio::process::Command::new("runc").arg("--version").kill_on_drop(true).output();
    let Ok(Ok(output)) = tokio::time::timeout(Duration::from_secs(5), output).await else {
        return "unknown".to_owned();
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().next().and_then(|line| line.strip_prefix("runc version "));
    first.map_or_else(|| "unknown".to_owned(), |version| version.trim().to_owned())
}
