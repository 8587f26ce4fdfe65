//! Moves of processes between cgroups, quick while a container is created.
//!
//! The kernel takes one lock of the whole machine for a move (`cgroup_threadgroup_rwsem`). Who holds it to read, at each fork and exit, is
//! to pay nothing, so who takes it to write waits first until each CPU has taken notice: an RCU grace period, some 9 ms on a machine that
//! has nothing else to do. Those who come soon after do not wait (`rcu_sync_enter` in Linux: kernel/rcu/sync.c). `runc create` makes such
//! moves, one a hierarchy, in the middle of a start. So the agent makes them from the begin of a creation to its end, of itself into the
//! cgroup where it is: that changes nothing, and the first of them waits while shim and runc are loaded.
//!
//! A machine may have it so for good, with the mount option `favordynmods` of cgroup (Linux 6.0), for all processes and at the price of
//! each fork. That is for who owns the machine to say. docs/decisions/cgroup-moves.md has the figures.

use std::convert::Infallible;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::cgroup::{ROOT, Version};

/// Well within a grace period: that is how long a move keeps the next one quick.
const EVERY: Duration = Duration::from_millis(3);

/// Keeps moves quick. Clones are one: it is enough that one creation does.
#[derive(Clone, Debug)]
pub struct Moves {
    version: Version,
    keeper: Arc<Semaphore>,
}

impl Moves {
    /// On a machine with such hierarchies.
    pub fn new(version: Version) -> Self {
        Self { version, keeper: Arc::new(Semaphore::new(1)) }
    }

    /// Does `creation`, and keeps moves quick until it is done. Where they can't be, it takes longer, and that is all.
    pub async fn quick<T>(&self, creation: impl Future<Output = T>) -> T {
        let Ok(_keeper) = self.keeper.try_acquire() else { return creation.await };
        // The first wins by being done; the other never is, and what it was at is a write that ends by itself.
        tokio::select! {
            done = creation => done,
            never = keep(self.version) => match never {},
        }
    }
}

async fn keep(version: Version) -> Infallible {
    let own = match own(version) {
        Ok(own) => own,
        Err(error) => {
            tracing::debug!(%error, "moves between cgroups are not kept quick");
            return std::future::pending().await;
        }
    };
    loop {
        let own = own.clone();
        // That it fails is no worse than that it was not tried.
        let _ = tokio::task::spawn_blocking(move || stay(&own)).await;
        tokio::time::sleep(EVERY).await;
    }
}

/// The file that lists this process.
fn own(version: Version) -> io::Result<PathBuf> {
    let own = procs_file(version, &fs::read_to_string("/proc/self/cgroup")?).ok_or(io::ErrorKind::NotFound)?;
    // In a cgroup namespace of one's own the path is another's: that of its root, for one.
    let pid = std::process::id().to_string();
    if fs::read_to_string(&own)?.lines().any(|line| line == pid) {
        Ok(own)
    } else {
        Err(io::Error::other(format!("{} does not list this process", own.display())))
    }
}

/// Moves this process into the cgroup where it is. Blocks.
fn stay(own: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(own)?.write_all(b"0")
}

/// The file that lists the processes of the cgroup that /proc/PID/cgroup tells (cgroups(7)), in one of the hierarchies.
fn procs_file(version: Version, told: &str) -> Option<PathBuf> {
    let (wanted, hierarchy) = match version {
        Version::V1 => ("pids", "pids"),
        Version::V2 => ("", ""),
    };
    told.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        // The root of a namespace that it is not in.
        (controllers == wanted && !path.contains(".."))
            .then(|| Path::new(ROOT).join(hierarchy).join(path.trim_start_matches('/')).join("cgroup.procs"))
    })
}

#[cfg(test)]
mod tests {
    use super::super::cgroup::Cgroups;
    use super::*;

    #[test]
    fn the_cgroup_is_the_one_that_the_kernel_tells() {
        const V1: &str = "12:pids:/kubepods/pod1/abc\n4:cpu,cpuacct:/kubepods\n1:name=systemd:/x\n0::/unified\n";
        for (version, told, file) in [
            (Version::V1, V1, Some("/sys/fs/cgroup/pids/kubepods/pod1/abc/cgroup.procs")),
            (Version::V1, "3:pids:/\n", Some("/sys/fs/cgroup/pids/cgroup.procs")),
            (Version::V1, "0::/x\n", None),
            (
                Version::V2,
                "0::/system.slice/agent.service\n",
                Some("/sys/fs/cgroup/system.slice/agent.service/cgroup.procs"),
            ),
            (Version::V2, "0::/a:b\n", Some("/sys/fs/cgroup/a:b/cgroup.procs")),
            (Version::V2, "0::/../other\n", None),
            (Version::V2, "", None),
        ] {
            assert_eq!(procs_file(version, told), file.map(PathBuf::from), "{told}");
        }
    }

    #[tokio::test]
    async fn it_moves_nothing() {
        let version = Cgroups::detect("berth").version();
        let told = || fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = told();
        stay(&own(version).unwrap()).unwrap();
        let moves = Moves::new(version);
        let done = moves.quick(async { moves.clone().quick(std::future::ready(7)).await }).await;
        assert_eq!((done, told()), (7, before));
    }
}
