//! The host, for an agent in a Pod: its mount namespace, and fewer rights than a privileged container has.
//!
//! containerd's shims, the bots' layers, FIFOs, network namespaces and cgroups are where containerd sees them, and helpers
//! of the agent (loggers, copiers) outlive its Pod. So the agent leaves the Pod's mount namespace for that of the host
//! before it does anything else, and every path means what it means to containerd. What Kubernetes mounts into the Pod
//! (token, certificates, resolv.conf) is from then on reached through a descriptor of the Pod's own root.
//!
//! docs/decisions/agent-pod.md weighs it against host paths.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kube::Config;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{CapabilitySet, LinkNameSpaceType};

use crate::network::{ClusterDns, ResolvConf};
use crate::oci::NodeFacts;

const OWN: &str = "/proc/self/ns/mnt";

/// The process where it does its work.
#[derive(Debug)]
pub struct Host {
    /// The Pod that it came from, if it did.
    pub pod: Option<Pod>,
    /// What this machine is.
    pub machine: NodeFacts,
}

impl Host {
    /// Leaves the Pod if `enter`, looks at the machine, and gives up the rights that are not used. To be called while the
    /// process has one thread: the kernel moves no more than that, and rights are a thread's.
    ///
    /// # Errors
    /// When the Pod lacks `hostPID: true` or is not privileged, or no bot can run on this machine.
    pub fn settle(enter: bool) -> anyhow::Result<Self> {
        let pod = enter.then(Pod::leave).transpose()?;
        // Before rights are given up: what bots may have at most is what containerd has.
        let machine = NodeFacts::read().context("this machine can't run bots")?;
        drop_capabilities()?;
        Ok(Self { pod, machine })
    }
}

/// What is left of the Pod after the agent went out of it. As long as this lives, so do the Pod's mounts.
#[derive(Debug)]
pub struct Pod {
    root: OwnedFd,
    _mounts: File,
    /// The way to the API server as a Pod has it; `None` where KUBECONFIG tells one.
    pub config: Option<Config>,
    /// What kubelet wrote into the Pod's resolv.conf, if that is of a cluster.
    pub cluster_dns: Option<ClusterDns>,
}

impl Pod {
    /// Enters the host's mount namespace.
    pub fn leave() -> anyhow::Result<Self> {
        let config = match std::env::var_os("KUBECONFIG") {
            Some(_) => None,
            None => Some(Config::incluster().context("no way to a cluster; set KUBECONFIG, or run in a Pod")?),
        };
        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .context("can't open the Pod's root")?;
        let own = File::open(OWN).with_context(|| format!("can't open {OWN}"))?;
        // A container's first process is started by its shim, which is where containerd is. On most machines that is where process 1
        // is, too; but it is containerd whose paths count.
        let shim = rustix::process::getppid().context(
            "--enter-host: the process that started this one can't be seen; the agent's Pod needs hostPID: true",
        )?;
        let path = format!("/proc/{}/ns/mnt", shim.as_raw_nonzero());
        let host = File::open(&path)
            .with_context(|| format!("can't open {path}; the agent's Pod must be privileged and have hostPID: true"))?;
        if own.metadata()?.ino() == host.metadata()?.ino() {
            anyhow::bail!(
                "--enter-host: this process is in the mount namespace of the one that started it already; outside of a Pod leave the flag out"
            );
        }
        rustix::thread::move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Mount))
            .context("can't enter the host's mount namespace; the agent's Pod must be privileged")?;
        // So that /proc/self/cgroup tells paths of the host; on cgroup v2 a container has a namespace of its own for them.
        let path = format!("/proc/{}/ns/cgroup", shim.as_raw_nonzero());
        File::open(&path)
            .map_err(anyhow::Error::new)
            .and_then(|host| {
                Ok(rustix::thread::move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::ControlGroup))?)
            })
            .with_context(|| format!("can't enter the host's cgroup namespace, {path}"))?;
        let mut pod =
            Self { root, _mounts: own, config: None, cluster_dns: cluster_dns(&ResolvConf::parse(&resolv_conf)) };
        pod.config = config.map(|mut config| {
            let kept = |path: String| pod.path(Path::new(&path));
            config.auth_info.token_file =
                config.auth_info.token_file.map(|path| kept(path).to_string_lossy().into_owned());
            config.root_cert_file = config.root_cert_file.map(|path| pod.path(&path));
            config
        });
        Ok(pod)
    }

    /// Where an absolute path of the Pod is to be found from now on, also by programs that this process starts.
    pub fn path(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix("/").unwrap_or(path);
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.root.as_raw_fd())).join(below)
    }
}

/// The cluster's DNS as kubelet writes it for dnsPolicy ClusterFirst: `search NAMESPACE.svc.DOMAIN svc.DOMAIN DOMAIN …`.
fn cluster_dns(pod: &ResolvConf) -> Option<ClusterDns> {
    let domain = pod.searches.iter().find_map(|search| search.strip_prefix("svc."))?;
    let ips: Vec<IpAddr> = pod.nameservers.iter().filter_map(|server| server.parse().ok()).collect();
    (!ips.is_empty()).then(|| ClusterDns { ips, domain: domain.to_owned() })
}

/// What neither the agent nor a program that it starts ever uses. Who holds the agent can get all of it back from containerd:
/// this narrows what a mistake of the agent's can do, not what an attacker can.
const UNUSED: [CapabilitySet; 21] = [
    CapabilitySet::AUDIT_CONTROL,
    CapabilitySet::AUDIT_READ,
    CapabilitySet::AUDIT_WRITE,
    CapabilitySet::BLOCK_SUSPEND,
    CapabilitySet::BPF,
    CapabilitySet::CHECKPOINT_RESTORE,
    CapabilitySet::IPC_LOCK,
    CapabilitySet::IPC_OWNER,
    CapabilitySet::LEASE,
    CapabilitySet::MAC_ADMIN,
    CapabilitySet::MAC_OVERRIDE,
    CapabilitySet::NET_BROADCAST,
    CapabilitySet::PERFMON,
    CapabilitySet::SYSLOG,
    CapabilitySet::SYS_BOOT,
    CapabilitySet::SYS_MODULE,
    CapabilitySet::SYS_PACCT,
    CapabilitySet::SYS_RAWIO,
    CapabilitySet::SYS_TIME,
    CapabilitySet::SYS_TTY_CONFIG,
    CapabilitySet::WAKE_ALARM,
];

/// Gives up the rights that are not used, for this process and all that it starts.
fn drop_capabilities() -> anyhow::Result<()> {
    let failed = "can't give up capabilities; the agent must run as root";
    let mut sets = rustix::thread::capabilities(None).context(failed)?;
    for capability in UNUSED {
        // EINVAL: this kernel does not know it yet.
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).context(failed),
        }
        sets.effective.remove(capability);
        sets.permitted.remove(capability);
        sets.inheritable.remove(capability);
    }
    rustix::thread::set_capabilities(None, sets).context(failed)?;
    // No set-uid program of the host makes up for it.
    rustix::thread::set_no_new_privs(true).context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubelets_resolv_conf_tells_the_clusters_dns() {
        let text = "search berth-system.svc.cluster.local svc.cluster.local cluster.local example.org\nnameserver 10.96.0.10\noptions ndots:5\n";
        let found = cluster_dns(&ResolvConf::parse(text));
        assert_eq!(
            found,
            Some(ClusterDns { ips: vec!["10.96.0.10".parse().unwrap()], domain: "cluster.local".into() })
        );
        // The node's own: the Pod has dnsPolicy Default.
        assert_eq!(cluster_dns(&ResolvConf::parse("search example.org\nnameserver 192.0.2.1\n")), None);
        // A domain that begins like it.
        assert_eq!(cluster_dns(&ResolvConf::parse("search svc.example.org\n")), None);
    }

    /// In a thread of its own: what is given up does not come back.
    #[test]
    fn what_is_not_used_is_given_up() {
        let dropped = std::thread::spawn(|| {
            drop_capabilities().unwrap();
            let sets = rustix::thread::capabilities(None).unwrap();
            let bounded = rustix::thread::capability_is_in_bounding_set(CapabilitySet::SYS_MODULE).unwrap();
            (sets, bounded)
        });
        let (sets, bounded) = dropped.join().unwrap();
        assert!(!bounded && !sets.permitted.contains(CapabilitySet::SYS_MODULE));
        assert!(sets.effective.contains(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN));
    }
}
