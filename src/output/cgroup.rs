//! Leaves the agent's cgroup, so that the end of its Pod is not the end of the logger.
//!
//! On cgroup v1 and in hybrid mode a process is in one cgroup of *each* hierarchy; it leaves all of them.

use std::io;
use std::path::{Path, PathBuf};

/// Moves the calling process into `path` (such as `/berth/logger`, seen from the root of each hierarchy), making it
/// where it is missing. Tries every hierarchy and gives the first failure.
pub fn enter(path: &str) -> io::Result<()> {
    let memberships = std::fs::read_to_string("/proc/self/cgroup")?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut first = Ok(());
    for (mount, now) in hierarchies(&memberships, &mounts) {
        if now == path {
            continue;
        }
        let dir = mount.join(path.trim_start_matches('/'));
        if let Err(error) = enter_one(&mount, &dir) {
            let error = io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
            first = first.and(Err(error));
        }
    }
    first
}

fn enter_one(mount: &Path, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    if mount.join("cpuset.cpus").exists() {
        // A new cpuset of v1 has no CPUs and takes no process until it has: the parents' are copied down.
        let mut at = mount.to_path_buf();
        for part in dir.strip_prefix(mount).unwrap_or(dir) {
            let above = at.clone();
            at.push(part);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if std::fs::read_to_string(at.join(file))?.trim().is_empty() {
                    std::fs::write(at.join(file), std::fs::read_to_string(above.join(file))?)?;
                }
            }
        }
    }
    // "0" is the writer.
    std::fs::write(dir.join("cgroup.procs"), "0")
}

/// Each hierarchy that is mounted whole: where, and the cgroup that we are in. `memberships` is `/proc/self/cgroup`,
/// `mounts` is `/proc/self/mountinfo`.
fn hierarchies<'m>(memberships: &'m str, mounts: &str) -> Vec<(PathBuf, &'m str)> {
    let mounted: Vec<(&str, &str, &str)> = mounts
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(3);
            let (root, point) = (left.next()?, left.next()?);
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            (root == "/" && matches!(kind, "cgroup" | "cgroup2")).then_some((kind, point, options))
        })
        .collect();
    memberships
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let is_it = |&&(kind, _, options): &&(&str, &str, &str)| match controllers {
                "" => kind == "cgroup2",
                _ => kind == "cgroup" && controllers.split(',').all(|c| options.split(',').any(|o| o == c)),
            };
            mounted.iter().find(is_it).map(|&(_, point, _)| (PathBuf::from(point), path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found_by_its_controllers() {
        let memberships = "9:name=systemd:/\n6:cpu,cpuacct:/pod/a:b\n3:cpuset:/\n2:rdma:/x\n0::/pod\n";
        let mounts = "\
30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw
35 30 0:31 /pod /sys/fs/cgroup/rdma rw - cgroup cgroup rw,rdma
";
        let found = hierarchies(memberships, mounts);
        let found: Vec<_> = found.iter().map(|(mount, path)| (mount.to_str().unwrap(), *path)).collect();
        assert_eq!(
            found,
            [
                ("/sys/fs/cgroup/systemd", "/"),
                ("/sys/fs/cgroup/cpu,cpuacct", "/pod/a:b"),
                ("/sys/fs/cgroup/cpuset", "/"),
                ("/sys/fs/cgroup/unified", "/pod"),
            ],
            "one that is mounted in part only is not to be trusted with a path from its root"
        );
    }
}
