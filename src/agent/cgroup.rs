//! Where bots' cgroups are, on cgroup v1, v2 and the hybrid of both, and what the kernel says there.

use std::path::{Path, PathBuf};

use crate::api::ids::ContainerId;

/// Which cgroup hierarchy the runtime uses. A hybrid counts as v1: the controllers are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// One hierarchy for all.
    V2,
}

/// Bots' cgroups: `PARENT/CONTAINER-ID`.
#[derive(Clone, Debug)]
pub struct Cgroups {
    version: Version,
    parent: String,
}

const ROOT: &str = "/sys/fs/cgroup";

impl Cgroups {
    /// Finds out which hierarchy this machine has. `parent` is absolute within it, for example `/berth`.
    pub fn detect(parent: &str) -> Self {
        let version = if Path::new(ROOT).join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 };
        Self { version, parent: format!("/{}", parent.trim_matches('/')) }
    }

    /// The hierarchy.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How BotNode names it: v1, v2 or hybrid.
    pub fn describe(&self) -> &'static str {
        match self.version {
            Version::V2 => "v2",
            Version::V1 if Path::new(ROOT).join("unified").exists() => "hybrid",
            Version::V1 => "v1",
        }
    }

    /// The OCI spec's `linux.cgroupsPath` of a bot.
    pub fn path(&self, id: &ContainerId) -> String {
        format!("{}/{id}", self.parent)
    }

    /// Whether the kernel killed a process of the bot for memory since its cgroup was made. The cgroup outlives the
    /// process until the task is deleted, so an exit that nobody watched can still be explained.
    pub async fn oom_killed(&self, id: &ContainerId) -> bool {
        let file = match self.version {
            Version::V1 => self.file("memory", id, "memory.oom_control"),
            Version::V2 => self.file("", id, "memory.events"),
        };
        // No such file: the cgroup is gone, and nothing can be said; the exit code then speaks alone.
        let text = tokio::fs::read_to_string(file).await.unwrap_or_default();
        oom_kills(&text) > 0
    }

    fn file(&self, controller: &str, id: &ContainerId, name: &str) -> PathBuf {
        Path::new(ROOT).join(controller).join(self.path(id).trim_start_matches('/')).join(name)
    }
}

/// The counter `oom_kill` of `memory.oom_control` (v1) or `memory.events` (v2).
fn oom_kills(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == "oom_kill")
        .and_then(|(_, count)| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_read_from_both_hierarchies() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill garbage"), 0);
    }
}
