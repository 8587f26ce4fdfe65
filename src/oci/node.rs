//! What the spec depends on and only the node knows, read once at the agent's start.
//!
//! The thin side: it reads files of the kernel and decides nothing. [`super::spec`] gets it as a value.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Capabilities;

use super::capability::by_number;
use crate::api::condition::Reason;

/// Facts of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFacts {
    /// Which hierarchy limits bots. Hybrid machines count as v1, as runc counts them.
    pub cgroup: CgroupVersion,
    /// Whether the kernel can limit swap. Without, a limit for it makes runc fail.
    pub swap_limit: bool,
    /// Instruction set of the kernel.
    pub machine: Machine,
    /// What a bot can hold at most. runc fails on a capability that it lacks itself.
    pub capabilities: Capabilities,
    /// AppArmor profiles that the kernel has loaded; `None` where AppArmor is off.
    pub apparmor: Option<BTreeSet<String>>,
    /// Whether SELinux is on.
    pub selinux: bool,
    /// The agent's own `oom_score_adj`, -1000 to 1000. Lowering it takes CAP_SYS_RESOURCE, so no bot goes below it.
    pub oom_score_adj: i32,
    /// Memory of the machine, bytes.
    pub memory_bytes: u64,
    /// Paths masked besides the usual ones, since they depend on the machine: each processor's `thermal_throttle`.
    pub masked_paths: Vec<String>,
    /// Devices of the machine, for privileged bots.
    pub devices: Vec<Device>,
    /// Processes and threads a bot may have when its spec has no `limits.pids`; `None`: as many as the parent cgroup
    /// allows. The agent sets it from its configuration.
    pub default_pids_limit: Option<i64>,
}

/// The kernel's cgroup interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// A hierarchy a controller.
    V1,
    /// One hierarchy.
    V2,
}

/// Instruction sets that Berth knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

/// A device node of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Where it is, below `/dev`.
    pub path: PathBuf,
    /// Block device, else a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Something of the node that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file of the kernel can't be read.
    #[error("facts of the node: {path} can't be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file of the kernel does not say what is looked for.
    #[error("facts of the node: {path} has no usable {what}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
    },
    /// Berth has no seccomp table for this instruction set.
    #[error(
        "facts of the node: {machine} is no instruction set that bots can run on; use a node with x86_64 or aarch64"
    )]
    UnknownMachine {
        /// As the kernel names it.
        machine: String,
    },
}

impl NodeError {
    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unreadable { .. } | Self::Missing { .. } => Reason::RuntimeFailed,
            Self::UnknownMachine { .. } => Reason::Unsupported,
        }
    }

    /// Whether trying again can help.
    pub fn retryable(&self) -> bool {
        match self {
            // /proc or /sys may be mounted late.
            Self::Unreadable { .. } | Self::Missing { .. } => true,
            Self::UnknownMachine { .. } => false,
        }
    }
}

impl NodeFacts {
    /// Reads the facts of the running machine.
    ///
    /// # Errors
    /// When `/proc` or `/sys` is not as a Linux kernel has it, or the instruction set is none of ours.
    pub fn read() -> Result<Self, NodeError> {
        let cgroup =
            if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { CgroupVersion::V2 } else { CgroupVersion::V1 };
        let machine = match rustix::system::uname().machine().to_str() {
            Ok("x86_64") => Machine::X86_64,
            Ok("aarch64") => Machine::Aarch64,
            other => return Err(NodeError::UnknownMachine { machine: other.unwrap_or("?").to_owned() }),
        };
        Ok(Self {
            cgroup,
            swap_limit: swap_limit(cgroup),
            machine,
            capabilities: bounding_set(&read("/proc/self/status")?)
                .ok_or_else(|| NodeError::Missing { path: "/proc/self/status".into(), what: "CapBnd" })?,
            apparmor: loaded_apparmor_profiles(),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            oom_score_adj: read("/proc/self/oom_score_adj")?
                .trim()
                .parse()
                .map_err(|_| NodeError::Missing { path: "/proc/self/oom_score_adj".into(), what: "number" })?,
            memory_bytes: memory_bytes(&read("/proc/meminfo")?)
                .ok_or_else(|| NodeError::Missing { path: "/proc/meminfo".into(), what: "MemTotal" })?,
            masked_paths: thermal_throttle_paths(),
            devices: devices_below(Path::new("/dev")),
            default_pids_limit: None,
        })
    }
}

fn read(path: &str) -> Result<String, NodeError> {
    fs::read_to_string(path).map_err(|source| NodeError::Unreadable { path: path.into(), source })
}

fn swap_limit(cgroup: CgroupVersion) -> bool {
    match cgroup {
        CgroupVersion::V1 => Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists(),
        // The root cgroup has no limits of its own, so one of its children is asked.
        CgroupVersion::V2 => fs::read_dir("/sys/fs/cgroup")
            .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().join("memory.swap.max").exists())),
    }
}

fn bounding_set(status: &str) -> Option<Capabilities> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
    let bits = u64::from_str_radix(hex.trim(), 16).ok()?;
    Some((0..64).filter(|bit| bits >> bit & 1 == 1).filter_map(by_number).collect::<Capabilities>())
}

fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Profiles by name; each line of the kernel's list is `NAME (MODE)`.
fn loaded_apparmor_profiles() -> Option<BTreeSet<String>> {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'));
    let profiles = enabled.then(|| fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default())?;
    Some(profiles.lines().filter_map(|line| Some(line.rsplit_once(" (")?.0.to_owned())).collect())
}

fn thermal_throttle_paths() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let mut paths: Vec<String> = entries
        .flatten()
        .map(|entry| entry.path().join("thermal_throttle"))
        .filter(|path| path.exists())
        .filter_map(|path| path.into_os_string().into_string().ok())
        .collect();
    paths.sort();
    paths
}

/// All devices but those that the runtime makes itself or mounts over.
fn devices_below(dev: &Path) -> Vec<Device> {
    const LEFT_OUT: [&str; 8] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"];
    const DEEPEST: usize = 8;
    let mut devices = Vec::new();
    let mut folders = vec![(dev.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if LEFT_OUT.iter().any(|name| entry.file_name() == *name) {
                continue;
            }
            // Of the entry itself: a link is neither a device nor a folder.
            let Ok(metadata) = entry.metadata() else { continue };
            let kind = metadata.file_type();
            if kind.is_dir() && depth < DEEPEST {
                folders.push((entry.path(), depth + 1));
            } else if kind.is_char_device() || kind.is_block_device() {
                devices.push(Device {
                    path: entry.path(),
                    block: kind.is_block_device(),
                    major: rustix::fs::major(metadata.rdev()),
                    minor: rustix::fs::minor(metadata.rdev()),
                    mode: metadata.mode() & 0o7777,
                    uid: metadata.uid(),
                    gid: metadata.gid(),
                });
            }
        }
    }
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    devices
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Capability;

    use super::*;

    #[test]
    fn the_bounding_set_is_read_bit_by_bit() {
        let caps = bounding_set("Name:\tx\nCapBnd:\t0000000000000401\nNoNewPrivs:\t0\n").unwrap();
        assert_eq!(caps, [Capability::Chown, Capability::NetBindService].into_iter().collect::<Capabilities>());
        assert_eq!(bounding_set("CapEff:\t1\n"), None);
        assert_eq!(bounding_set("CapBnd:\tnonsense\n"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        assert_eq!(memory_bytes("MemTotal:        2048 kB\nMemFree: 1 kB\n"), Some(2 << 20));
        assert_eq!(memory_bytes("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let facts = NodeFacts::read().unwrap();
        assert!(facts.capabilities.contains(&Capability::Chown), "{:?}", facts.capabilities);
        assert!(facts.memory_bytes > 64 << 20, "{}", facts.memory_bytes);
        assert!(facts.devices.iter().any(|d| d.path == Path::new("/dev/null") && (d.major, d.minor) == (1, 3)));
    }
}
