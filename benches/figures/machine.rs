//! The machine, and what processes cost on it, as the kernel tells.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use serde::Serialize;

/// What the figures were measured on, and in which state.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub commit: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    pub containerd: String,
    pub runc: String,
    /// Load averages over 1 and 5 minutes, before and after the run.
    pub load_before: String,
    pub load_after: String,
    pub cache: &'static str,
}

impl Machine {
    /// Asks the kernel and the programs.
    pub fn read() -> anyhow::Result<Self> {
        let cpu = fs::read_to_string("/proc/cpuinfo")?;
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = fs::read_to_string("/proc/meminfo")?;
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        let dirty = !said("git", &["status", "--porcelain", "--untracked-files=no"])?.is_empty();
        let commit = said("git", &["rev-parse", "--short=12", "HEAD"])?;
        Ok(Self {
            commit: if dirty { format!("{commit} and changes") } else { commit },
            cpu: cpu.map_or("unknown", |(_, name)| name).to_owned(),
            cores: std::thread::available_parallelism()?.get(),
            memory_bytes: memory.context("no MemTotal in /proc/meminfo")?.parse::<u64>()? * 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            containerd: said("containerd", &["--version"])?,
            runc: said("runc", &["--version"])?.lines().next().unwrap_or_default().to_owned(),
            load_before: load()?,
            load_after: String::new(),
            cache: "warm: image unpacked for both sides, first starts of each thrown away",
        })
    }

    /// To be called when all is measured.
    pub fn ended(mut self) -> anyhow::Result<Self> {
        self.load_after = load()?;
        Ok(self)
    }

    /// For people.
    pub fn describe(&self) -> String {
        let gib = self.memory_bytes >> 30;
        format!(
            "commit   {}\nmachine  {}, {} cores, {gib} GiB, Linux {}\nruntime  {}; {}\ncache    {}\nload     {} before, {} after",
            self.commit,
            self.cpu,
            self.cores,
            self.kernel,
            self.containerd,
            self.runc,
            self.cache,
            self.load_before,
            self.load_after
        )
    }
}

fn load() -> anyhow::Result<String> {
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(load.split(' ').take(2).collect::<Vec<_>>().join(" "))
}

fn said(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("can't run {program}"))?;
    anyhow::ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a process of Berth's is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Agent,
    Controller,
    Logger,
}

/// Berth's processes in a cluster's folder, by pid: agent and controller by their pid files, loggers as all else that
/// runs the same binary and names the folder.
pub fn parts(run: &Path, binary: &Path) -> anyhow::Result<BTreeMap<u32, Part>> {
    let folder = run.parent().context("BERTH_RUN has no folder above it")?.display().to_string();
    let mut parts = BTreeMap::new();
    for (name, part) in [("agent", Part::Agent), ("controller", Part::Controller)] {
        let path = run.join(name).with_extension("pid");
        let pid = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
        parts.insert(pid.trim().parse()?, part);
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process may end while it is looked at.
        let Ok(program) = fs::read_link(entry.path().join("exe")) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if program == binary && String::from_utf8_lossy(&words).contains(&folder) {
            parts.entry(pid).or_insert(Part::Logger);
        }
    }
    Ok(parts)
}

/// What containerd's shims of a namespace and Pods' sandboxes have in memory, bytes.
pub fn shims(namespace: &str) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let shim = words[0].ends_with(b"containerd-shim-runc-v2")
            && words.windows(2).any(|pair| pair == [b"-namespace".as_slice(), namespace.as_bytes()]);
        // As hack/cluster makes the sandboxes' image.
        let sandbox = namespace == "k8s.io" && words.starts_with(&[b"/bin/sleep".as_slice(), b"infinity"]);
        if shim || sandbox {
            // It may end while it is looked at.
            bytes += pss(pid).unwrap_or(0);
        }
    }
    anyhow::ensure!(bytes > 0, "no shim of namespace {namespace} was found");
    Ok(bytes)
}

/// Ends a part of the cluster, which is started again by nobody.
pub async fn end_part(name: &str) -> anyhow::Result<()> {
    let run = std::env::var("BERTH_RUN").context("BERTH_RUN is not set; run `make bench`")?;
    let path = format!("{run}/{name}.pid");
    let pid = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?.trim().to_owned();
    let done = std::process::Command::new("kill").args(["-TERM", &pid]).status()?;
    anyhow::ensure!(done.success(), "can't end {name}, process {pid}");
    for _ in 0..300 {
        if !fs::exists(format!("/proc/{pid}"))? {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    anyhow::bail!("{name}, process {pid}, has not ended within 30 s")
}

/// Proportional set size of a process, bytes: its own memory, and its share of what it shares.
pub fn pss(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
    Ok(kib.with_context(|| format!("{path} has no Pss"))?.parse::<u64>()? * 1024)
}

/// CPU time that a process has had, in seconds, of all its threads. The kernel counts in ticks of 10 ms.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    // The name, in brackets, may hold anything; utime and stime are the 12th and 13th field after it (proc_pid_stat(5)).
    let (_, fields) = text.rsplit_once(") ").with_context(|| format!("{path} has no name"))?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<u32>().ok()).map(f64::from);
    let (user, system) = (ticks(11), ticks(12));
    let ticks = user.zip(system).map(|(user, system)| user + system);
    // USER_HZ is 100 on every architecture that containerd runs on.
    Ok(ticks.with_context(|| format!("{path} is too short"))? / 100.0)
}
