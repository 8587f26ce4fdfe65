//! `berth node-cleanup`: takes all that Berth has off a node that is to have no bots any more. Bots and their data go with the
//! rest, so nothing is touched until that is confirmed, nor while an agent runs.
//!
//! It goes by what is there, not by what an agent noted, so what a crash or an older version left goes too. Each step is safe
//! twice: where one fails, another run goes on.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::{
    DeleteContainerRequest, DeleteContentRequest, DeleteImageRequest, DeleteNamespaceRequest,
    DeleteRequest as DeleteLeaseRequest, DeleteTaskRequest, KillRequest, ListContainersRequest, ListContentRequest,
    ListImagesRequest, ListRequest as ListLeasesRequest, ListTasksRequest, ResumeTaskRequest, WaitRequest,
};
use rustix::fs::FlockOperation;
use rustix::mount::UnmountFlags;

use super::args::AgentArgs;
use super::cgroup::Cgroups;
use super::node;
use crate::containerd::{CallContext as _, CallFailed, Containerd, gone};
use crate::network::Network;

/// How long a killed task may take to end.
const DIES: Duration = Duration::from_secs(10);

/// What is in containerd's namespace, by names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct There {
    tasks: Vec<String>,
    containers: Vec<String>,
    /// Snapshotter, key, parent.
    layers: Vec<(String, String, String)>,
    images: Vec<String>,
    leases: Vec<String>,
    blobs: Vec<String>,
}

impl fmt::Display for There {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tasks, containers, layers, images, leases, blobs } = self;
        write!(
            f,
            "{} tasks, {} containers, {} layers and versions, {} images, {} leases, {} blobs",
            tasks.len(),
            containers.len(),
            layers.len(),
            images.len(),
            leases.len(),
            blobs.len()
        )
    }
}

/// Says what there is, and with `yes` removes it.
///
/// # Errors
/// When an agent runs on this node, or a step fails: what was removed stays so, and another run goes on.
pub async fn run(args: AgentArgs, yes: bool) -> anyhow::Result<()> {
    let containerd = Containerd::new(&args.containerd_address, &args.containerd_namespace)?;
    let _lock = lock(&args.state_dir)?;
    let there = look(&containerd).await.context("can't see what there is in containerd")?;
    let network = Network::new(args.network_options()).context("can't see the networks of bots")?;
    let networks = network.list().await?;
    let dirs = [&args.run_dir, &args.state_dir, &args.log_dir];
    let mut out = std::io::stdout();
    let mut say = |words: String| std::io::Write::write_all(&mut out, format!("{words}\n").as_bytes());
    say(format!("namespace {} of {}: {there}", args.containerd_namespace, args.containerd_address.display()))?;
    say(format!("{} networks of bots, the bridge {} and its packet rules", networks.len(), args.bridge_name))?;
    say(format!("the cgroups below {}", args.cgroup_parent))?;
    for dir in dirs {
        say(format!("{}{}", dir.display(), if dir.exists() { "" } else { " (is not there)" }))?;
    }
    if !yes {
        say("nothing was removed; with --yes all of this goes, and what bots wrote with it".to_owned())?;
        return Ok(());
    }

    end_tasks(&containerd, &there.tasks).await?;
    let cgroups = Cgroups::detect(&args.cgroup_parent);
    tokio::task::spawn_blocking(move || cgroups.clear()).await??;
    for found in networks {
        network.remove(&found.id).await?;
    }
    network.dismantle().await?;
    remove(&containerd, &there).await?;
    for dir in dirs {
        unmount_below(dir)?;
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("can't remove {}", dir.display()));
            }
            _ => {}
        }
    }
    say("all of this is gone".to_owned())?;
    Ok(())
}

/// The agent's own lock. Without a state directory there was no agent.
fn lock(state_dir: &Path) -> anyhow::Result<Option<fs::File>> {
    let path = state_dir.join("agent.lock");
    let file = match fs::File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("can't open {}", path.display()))?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => anyhow::bail!(
            "an agent runs on this node and would bring back what is removed; take it off first (helm uninstall, or keep its Pod off this node)"
        ),
        Err(error) => Err(error).with_context(|| format!("can't lock {}", path.display())),
    }
}

async fn look(containerd: &Containerd) -> Result<There, CallFailed> {
    let mut there = There::default();
    let tasks = containerd.tasks().list(containerd.request(ListTasksRequest::default())).await;
    there.tasks = tasks.call("list", "tasks")?.tasks.into_iter().map(|task| task.id).collect();
    let containers = containerd.containers().list(containerd.request(ListContainersRequest::default())).await;
    there.containers = containers.call("list", "containers")?.containers.into_iter().map(|c| c.id).collect();
    for snapshotter in node::snapshotters(containerd).await? {
        let layers = containerd.list_snapshots(&snapshotter, Vec::new()).await?;
        there.layers.extend(layers.into_iter().map(|info| (snapshotter.clone(), info.name, info.parent)));
    }
    let images = containerd.images().list(containerd.request(ListImagesRequest::default())).await;
    there.images = images.call("list", "images")?.images.into_iter().map(|image| image.name).collect();
    let leases = containerd.leases().list(containerd.request(ListLeasesRequest::default())).await;
    there.leases = leases.call("list", "leases")?.leases.into_iter().map(|lease| lease.id).collect();
    let mut pages =
        containerd.content().list(containerd.request(ListContentRequest::default())).await.call("list", "content")?;
    while let Some(page) = pages.message().await.map(tonic::Response::new).call("list", "content")? {
        there.blobs.extend(page.info.into_iter().map(|info| info.digest));
    }
    Ok(there)
}

async fn end_tasks(containerd: &Containerd, tasks: &[String]) -> anyhow::Result<()> {
    for id in tasks {
        let container_id = id.clone();
        // One that is not paused says so, and a frozen one would not hear KILL.
        let resume = ResumeTaskRequest { container_id: container_id.clone() };
        let _ = containerd.tasks().resume(containerd.request(resume)).await;
        let kill = KillRequest { container_id: container_id.clone(), signal: 9, all: true, ..KillRequest::default() };
        let _ = containerd.tasks().kill(containerd.request(kill)).await;
        let wait = WaitRequest { container_id: container_id.clone(), ..WaitRequest::default() };
        let _ = tokio::time::timeout(DIES, containerd.tasks().wait(containerd.request(wait))).await;
        let delete = DeleteTaskRequest { container_id };
        gone(containerd.tasks().delete(containerd.request(delete)).await.call("delete task", id.as_str()))?;
    }
    Ok(())
}

/// What containerd has, then its namespace.
async fn remove(containerd: &Containerd, there: &There) -> anyhow::Result<()> {
    for id in &there.containers {
        let request = DeleteContainerRequest { id: id.clone() };
        gone(containerd.containers().delete(containerd.request(request)).await.call("delete container", id.as_str()))?;
    }
    for name in &there.images {
        let request = DeleteImageRequest { name: name.clone(), ..DeleteImageRequest::default() };
        gone(containerd.images().delete(containerd.request(request)).await.call("delete image", name.as_str()))?;
    }
    for id in &there.leases {
        let request = DeleteLeaseRequest { id: id.clone(), sync: false };
        gone(containerd.leases().delete(containerd.request(request)).await.call("delete lease", id.as_str()))?;
    }
    for (snapshotter, key) in children_first(&there.layers) {
        let request = RemoveSnapshotRequest { snapshotter, key: key.clone() };
        gone(containerd.snapshots().remove(containerd.request(request)).await.call("remove snapshot", key))?;
    }
    for digest in &there.blobs {
        let request = DeleteContentRequest { digest: digest.clone() };
        gone(containerd.content().delete(containerd.request(request)).await.call("delete content", digest.as_str()))?;
    }
    let name = containerd.namespace().to_owned();
    let request = DeleteNamespaceRequest { name: name.clone() };
    gone(containerd.namespaces().delete(containerd.request(request)).await.call("delete namespace", name))?;
    Ok(())
}

/// containerd removes no layer that has a child.
fn children_first(layers: &[(String, String, String)]) -> Vec<(String, String)> {
    let depth = |layer: &(String, String, String)| {
        let mut at = layer;
        let mut depth = 0;
        // No more steps than layers: a ring can't be, but must not hang us.
        while let Some(parent) = layers.iter().find(|other| other.0 == at.0 && other.1 == at.2)
            && depth < layers.len()
        {
            at = parent;
            depth += 1;
        }
        depth
    };
    let mut sorted: Vec<_> = layers.iter().map(|layer| (depth(layer), layer.0.clone(), layer.1.clone())).collect();
    sorted.sort_by(|a, b| b.cmp(a));
    sorted.into_iter().map(|(_, snapshotter, key)| (snapshotter, key)).collect()
}

/// Unmounts what is mounted below a folder, the last mount first.
fn unmount_below(dir: &Path) -> anyhow::Result<()> {
    // /proc/self is the process's first thread, which is where this one is too.
    let table = fs::read_to_string("/proc/self/mountinfo").context("can't read the mount table")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    let below: Vec<&Path> = points.filter(|point| point.starts_with(dir)).collect();
    for point in below.into_iter().rev() {
        rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .with_context(|| format!("can't unmount {}", point.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_go_after_those_that_stand_on_them() {
        let layer = |key: &str, parent: &str| ("overlayfs".to_owned(), key.to_owned(), parent.to_owned());
        let layers = [layer("a", ""), layer("c", "b"), layer("b", "a"), layer("z", "a")];
        let order: Vec<String> = children_first(&layers).into_iter().map(|(_, key)| key).collect();
        let at = |key: &str| order.iter().position(|other| other == key).unwrap();
        assert!(at("c") < at("b") && at("b") < at("a") && at("z") < at("a"), "{order:?}");
        // A ring, which containerd never makes, ends.
        assert_eq!(children_first(&[layer("a", "b"), layer("b", "a")]).len(), 2);
    }
}
