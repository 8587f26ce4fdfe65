//! The peer: `ctr`, on the same containerd.
//!
//! ```text
//! thread with a mount namespace of its own          /etc, /opt, /var/lib: overlays on a tmpfs, with a CNI network in them
//!    '-- WORKERS threads, which are born into it    each runs one `ctr` after the other
//! ```
//!
//! `ctr run --cni` knows one place for its network, /etc/cni/net.d and /opt/cni/bin; it finds it there without a file of
//! the machine's being touched, and no time is lost on a wrapper: what is measured is from `ctr`'s fork to its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::json;
use tokio::sync::oneshot;

/// How many `ctr` run at once at most: the peer of a burst is 8 at a time.
pub const WORKERS: usize = 8;

/// containerd's namespace for the peer's containers.
const NAMESPACE: &str = "bench-peer";

/// For benchmarks (RFC 2544), so nobody's bots or services are there.
const SUBNET: &str = "198.18.0.0/16";

/// Where Debian has the CNI plugins; Berth's side runs the same files.
const PLUGINS: &str = "/usr/lib/cni";

type Job = Box<dyn FnOnce() + Send>;

/// Runs `ctr`.
pub struct Ctr {
    jobs: mpsc::Sender<Job>,
    place: Place,
}

#[derive(Clone, Debug)]
struct Place {
    address: String,
    image: String,
    bridge: String,
    fifos: PathBuf,
}

/// How long the peer's commands for one container took.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    pub run: Duration,
    pub pause: Duration,
    pub resume: Duration,
    /// The same of another container, with containerd's seccomp profile, which `ctr run` has only where it is asked for.
    pub run_with_seccomp: Duration,
    /// TERM, until the process is gone and its task deleted.
    pub stop: Duration,
    /// `stop`, and container and layer deleted.
    pub delete: Duration,
}

impl Ctr {
    /// Prepares the network and pulls the image. `dir` is for scratch; `address` is containerd's socket.
    pub async fn new(dir: &Path, address: &str, image: &str) -> anyhow::Result<Self> {
        let place = Place {
            address: address.to_owned(),
            image: image.to_owned(),
            bridge: format!("bench{}", std::process::id()),
            fifos: dir.join("fifos"),
        };
        fs::create_dir_all(&place.fifos)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, prepared) = oneshot::channel();
        let (top, bridge) = (dir.join("mounts"), place.bridge.clone());
        thread::spawn(move || {
            let done = enter(&top, &bridge);
            let well = done.is_ok();
            // Whoever asked is gone: nobody is left to tell.
            let _ = ready.send(done);
            if !well {
                return;
            }
            let queue = Arc::new(Mutex::new(queue));
            for _ in 0..WORKERS {
                let queue = queue.clone();
                // A thread is born into its maker's namespaces.
                thread::spawn(move || {
                    loop {
                        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok(job) = job else { return };
                        job();
                    }
                });
            }
        });
        prepared.await.context("the peer's thread died")??;
        let this = Self { jobs, place };
        this.job(|place| place.ctr(&["images", "pull", "--plain-http", &place.image]).map(drop)).await?;
        Ok(this)
    }

    /// One container, from its start to its end.
    pub async fn life(&self, id: &str, settle: Duration) -> anyhow::Result<Life> {
        let id = id.to_owned();
        let own = id.clone();
        let run = self.job(move |place| place.run(&own)).await?;
        tokio::time::sleep(settle).await;
        let own = id.clone();
        let pause = self.job(move |place| place.ctr(&["tasks", "pause", &own])).await?;
        let own = id.clone();
        let resume = self.job(move |place| place.ctr(&["tasks", "resume", &own])).await?;
        let own = id.clone();
        let (stop, delete) = self.job(move |place| place.end(&own)).await?;
        tokio::time::sleep(settle).await;
        let confined = format!("{id}-confined");
        let own = confined.clone();
        let run_with_seccomp = self.job(move |place| place.run_with(&own, &["--seccomp"])).await?;
        tokio::time::sleep(settle).await;
        self.job(move |place| place.end(&confined)).await?;
        Ok(Life { run, run_with_seccomp, pause, resume, stop, delete })
    }

    /// Starts many, [`WORKERS`] at a time; how long all of it took.
    pub async fn burst(&self, ids: &[String]) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let runs = ids.iter().cloned().map(|id| self.job(move |place| place.run(&id)));
        futures::future::try_join_all(runs).await?;
        Ok(began.elapsed())
    }

    /// Ends many.
    pub async fn clear(&self, ids: &[String]) -> anyhow::Result<()> {
        let ends = ids.iter().cloned().map(|id| self.job(move |place| place.end(&id)));
        futures::future::try_join_all(ends).await.map(drop)
    }

    /// How long a container is paused for containerd's own diff of its layer. `fill` gets its process.
    pub async fn frozen_diff(
        &self,
        id: &str,
        fill: impl FnOnce(i32) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Duration> {
        self.filled(id, fill, |place, id| {
            let began = Instant::now();
            place.ctr(&["tasks", "pause", id])?;
            let diffed = place.ctr(&["snapshots", "diff", id]);
            place.ctr(&["tasks", "resume", id])?;
            let took = began.elapsed();
            diffed?;
            place.end(id)?;
            Ok(took)
        })
        .await
    }

    /// Runs a container, has it filled, and does with it what is measured.
    async fn filled(
        &self,
        id: &str,
        fill: impl FnOnce(i32) -> anyhow::Result<()> + Send + 'static,
        then: impl FnOnce(&Place, &str) -> anyhow::Result<Duration> + Send + 'static,
    ) -> anyhow::Result<Duration> {
        let id = id.to_owned();
        self.job(move |place| {
            place.run(&id)?;
            fill(place.pid(&id)?.as_raw_nonzero().get())?;
            then(place, &id)
        })
        .await
    }

    /// What the old system did for a snapshot: stop, commit the layer, prepare one on top, start. How long the container was away.
    /// `fill` gets its process, and puts into it what is to be committed.
    pub async fn old_snapshot(
        &self,
        id: &str,
        fill: impl FnOnce(i32) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Duration> {
        self.filled(id, fill, |place, id| {
            let began = Instant::now();
            place.end_task(id)?;
            place.ctr(&["snapshots", "commit", &format!("{id}-version"), id])?;
            place.ctr(&["snapshots", "prepare", &format!("{id}-next"), &format!("{id}-version")])?;
            place.ctr(&["containers", "delete", "--keep-snapshot", id])?;
            // It makes a layer of its own besides, which takes a millisecond. Under another name, for `ctr` gives no address back.
            let again = format!("{id}-again");
            place.run(&again)?;
            let took = began.elapsed();
            place.end(&again)?;
            for layer in [format!("{id}-next"), format!("{id}-version")] {
                place.ctr(&["snapshots", "remove", &layer])?;
            }
            Ok(took)
        })
        .await
    }

    /// Removes what `hack/cluster down` does not know of: the bridge, and the parent cgroup of the containers.
    pub async fn leave(self) -> anyhow::Result<()> {
        self.job(|place| {
            // It was made with the first container, and not every group has one.
            if Path::new("/sys/class/net").join(&place.bridge).exists() {
                let ended = Command::new("ip").args(["link", "delete", &place.bridge]).stdin(Stdio::null()).output()?;
                anyhow::ensure!(ended.status.success(), "ip link delete: {}", String::from_utf8_lossy(&ended.stderr));
            }
            let mut parents = vec![PathBuf::from("/sys/fs/cgroup")];
            parents.extend(fs::read_dir("/sys/fs/cgroup")?.flatten().map(|entry| entry.path()));
            for parent in parents {
                let group = parent.join(NAMESPACE);
                if group.is_dir() {
                    fs::remove_dir(&group).with_context(|| format!("{} is in use", group.display()))?;
                }
            }
            Ok(())
        })
        .await
    }

    async fn job<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Place) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let (sender, done) = oneshot::channel();
        let place = self.place.clone();
        let job = Box::new(move || {
            // Nobody waits for it any more: the run has failed elsewhere.
            let _ = sender.send(work(&place));
        });
        self.jobs.send(job).ok().context("the peer's threads are gone")?;
        done.await.context("a thread of the peer's died")?
    }
}

impl Place {
    fn run(&self, id: &str) -> anyhow::Result<Duration> {
        self.run_with(id, &[])
    }

    fn run_with(&self, id: &str, more: &[&str]) -> anyhow::Result<Duration> {
        let (fifos, name) = (self.fifos.display().to_string(), format!("BOT_NAME={id}"));
        // containerd's own folder for FIFOs would be the machine's.
        let words = ["run", "--detach", "--cni", "--fifo-dir", &fifos, "--env", &name];
        self.ctr(&[&words, more, &[&self.image, id]].concat())
    }

    /// TERM as a person would, then all that is left; the time until the task was gone, and until all was.
    fn end(&self, id: &str) -> anyhow::Result<(Duration, Duration)> {
        let began = Instant::now();
        let stop = self.end_task(id)?;
        self.ctr(&["containers", "delete", id])?;
        Ok((stop, began.elapsed()))
    }

    /// TERM, until the task is gone.
    fn end_task(&self, id: &str) -> anyhow::Result<Duration> {
        let pid = self.pid(id)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).context("the peer's process is gone")?;
        let began = Instant::now();
        self.ctr(&["tasks", "kill", "--signal", "SIGTERM", id])?;
        let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))?;
        anyhow::ensure!(ready > 0, "the peer's container {id} does not end on TERM");
        // The shim may hear of it a moment later than we do.
        while let Err(error) = self.ctr(&["tasks", "delete", id]) {
            anyhow::ensure!(began.elapsed() < Duration::from_secs(30), "{error:#}");
        }
        Ok(began.elapsed())
    }

    fn pid(&self, id: &str) -> anyhow::Result<Pid> {
        let list = self.command(&["tasks", "list"]).output()?;
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        let of = |line: &str| -> Option<i32> {
            let mut words = line.split_whitespace();
            (words.next()? == id).then(|| words.next()?.parse().ok())?
        };
        let pid = list.lines().find_map(of).with_context(|| format!("no task {id} in {list}"))?;
        Pid::from_raw(pid).context("pid 0")
    }

    /// Runs it to its end; how long that took.
    fn ctr(&self, args: &[&str]) -> anyhow::Result<Duration> {
        let mut command = self.command(args);
        let began = Instant::now();
        let output = command.output().context("can't run ctr")?;
        let took = began.elapsed();
        let words = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "ctr {}: {}", args.join(" "), words.trim());
        Ok(took)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.args(["--address", &self.address, "--namespace", NAMESPACE]).args(args).stdin(Stdio::null());
        command
    }
}

/// Gives the calling thread, and those that it makes, a view of the machine in which CNI is set up.
fn enter(top: &Path, bridge: &str) -> anyhow::Result<()> {
    // SAFETY: the table of descriptors stays shared; what is parted from are mounts, root and working directory.
    unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }.context("no mount namespace; are you root?")?;
    // Without this the mounts below would appear on the machine as well.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    fs::create_dir_all(top)?;
    // An overlay can't stand on every file system, but it can on this one; and it goes with the namespace.
    mount("bench", top, "tmpfs", MountFlags::empty(), None)?;
    for lower in ["/etc", "/opt", "/var/lib"] {
        let (upper, work) = (top.join("upper").join(&lower[1..]), top.join("work").join(&lower[1..]));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display());
        let options = std::ffi::CString::new(options)?;
        mount("bench", lower, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .with_context(|| format!("can't mount over {lower}"))?;
    }
    fs::create_dir_all("/etc/cni/net.d")?;
    fs::create_dir_all("/opt/cni")?;
    if !Path::new("/opt/cni/bin").exists() {
        std::os::unix::fs::symlink(PLUGINS, "/opt/cni/bin")?;
    }
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "bench",
        "plugins": [{
            "type": "bridge",
            "bridge": bridge,
            "isGateway": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": SUBNET}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }],
    });
    // The first by name is taken.
    fs::write("/etc/cni/net.d/00-bench.conflist", network.to_string()).context("can't write the peer's network")
}
