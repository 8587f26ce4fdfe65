//! The OCI spec of a bot, run by the real runc, beside what the real containerd makes of `ctr run --seccomp`.
//!
//! Needs root, runc, containerd, ctr, busybox-static and perl-base. Everything is below a temporary folder and a cgroup of
//! the test's own; the machine's containerd is not touched. `BERTH_KEEP=1` keeps the folders for a look.

// The helpers are test code too, which clippy can't tell outside of `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth::api::BotContainerSpec;
use berth::api::bot_container::BotResources;
use berth::api::ids::{BotUid, ContainerId};
use berth::image::RunConfig;
use berth::oci::capability;
use berth::oci::node::{Machine, NodeFacts};
use berth::oci::{
    BindMount, NetworkNamespace, SpecInput, check_root, ensure_directory, linux_resources, resolve_user, runtime_spec,
    seccomp,
};
use serde_json::{Value, json};

/// A temporary folder with a bundle in it: a root file system of busybox, and what runc and containerd keep.
struct Bundle {
    top: PathBuf,
    id: ContainerId,
}

/// What a bot printed and how it ended.
struct Run {
    ok: bool,
    out: String,
    err: String,
}

impl Bundle {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let top = std::env::temp_dir().join(format!("berth-oci-{}-{n}", std::process::id()));
        let root = top.join("rootfs");
        for folder in ["bin", "etc", "proc", "sys", "dev", "usr"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is needed");
        for name in ["sh", "cat", "ls", "sleep", "env", "id", "touch", "hostname", "readlink", "pwd", "mount", "true"] {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        for lib in ["lib", "lib64"] {
            symlink(format!("usr/{lib}"), root.join(lib)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nbot:x:1000:1001::/home/bot:/bin/sh\n").unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nbot:x:1001:\nwheel:x:10:bot\n").unwrap();
        let uid = format!("{:08x}-0000-4000-8000-{n:012x}", std::process::id());
        Self { top, id: BotUid::parse(&uid).unwrap().container_id() }
    }

    fn root(&self) -> PathBuf {
        self.top.join("rootfs")
    }

    fn root_fd(&self) -> OwnedFd {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(self.root(), flags, rustix::fs::Mode::empty()).unwrap()
    }

    fn cgroup(&self) -> String {
        format!("/berth-oci-test-{}/{}", std::process::id(), self.id)
    }

    /// Makes the spec as the agent does, from the bot's own fields.
    fn prepare(&self, fields: &Value, netns: NetworkNamespace, mounts: &[BindMount]) {
        let mut spec = json!({"image": "example.com/bot:1"});
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let bot: BotContainerSpec = serde_json::from_value(spec).unwrap();
        let image = RunConfig {
            env: vec!["PATH=/bin:/usr/bin".to_owned()],
            cmd: vec!["true".to_owned()],
            ..RunConfig::default()
        };
        let root = self.root_fd();
        check_root(root.as_fd(), &bot.data.path).unwrap();
        let user = resolve_user(root.as_fd(), &image.user, bot.security_context.as_ref()).unwrap();
        ensure_directory(root.as_fd(), &bot.data.path, user.uid, user.gid, 0o755).unwrap();
        let node = NodeFacts::read().unwrap();
        let spec = runtime_spec(&SpecInput {
            id: &self.id,
            hostname: "web",
            bot: &bot,
            image: &image,
            env: &[],
            user: &user,
            netns,
            mounts,
            cgroups_path: &self.cgroup(),
            localhost_seccomp: None,
            node: &node,
        })
        .unwrap();
        fs::write(self.top.join("config.json"), serde_json::to_vec_pretty(&spec).unwrap()).unwrap();
    }

    fn runc(&self, args: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.top.join("runc")).args(args).stdin(Stdio::null());
        command
    }

    /// Runs the prepared spec to its end.
    fn run_prepared(&self) -> Run {
        let output =
            self.runc(&["run", "--bundle"]).arg(&self.top).arg(self.id.as_str()).output().expect("runc is needed");
        Run {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a shell script as a bot whose spec has these fields besides.
    fn sh(&self, script: &str, fields: &Value) -> Run {
        self.sh_with(script, fields, NetworkNamespace::Loopback, &[])
    }

    fn sh_with(&self, script: &str, fields: &Value, netns: NetworkNamespace, mounts: &[BindMount]) -> Run {
        let mut fields = fields.clone();
        fields["command"] = json!(["sh", "-c", script]);
        self.prepare(&fields, netns, mounts);
        self.run_prepared()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", self.id.as_str()]).output();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let own = hierarchy.path().join(self.cgroup().trim_start_matches('/'));
            let _ = fs::remove_dir(&own);
            let _ = own.parent().map(fs::remove_dir);
        }
        if std::env::var_os("BERTH_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.top);
        }
    }
}

/// A containerd of the test's own.
struct Containerd {
    process: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Containerd {
    fn start(top: &Path) -> Self {
        let socket = top.join("containerd.sock");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {:?}\n",
            top.join("containerd"),
            top.join("containerd-state"),
            top.join("containerd.ttrpc"),
        );
        fs::write(top.join("containerd.toml"), config).unwrap();
        let log = top.join("containerd.log");
        let process = Command::new("containerd")
            .arg("--config")
            .arg(top.join("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .expect("containerd is needed");
        let containerd = Self { process, socket, log };
        let limit = Instant::now() + Duration::from_secs(60);
        while !containerd.ctr(&["version"]).ok {
            assert!(
                Instant::now() < limit,
                "containerd does not answer:\n{}",
                fs::read_to_string(&containerd.log).unwrap()
            );
        }
        containerd
    }

    fn ctr(&self, args: &[&str]) -> Run {
        let output =
            Command::new("ctr").arg("--address").arg(&self.socket).args(args).stdin(Stdio::null()).output().unwrap();
        Run {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The seccomp profile that containerd makes for a container with these capabilities besides the default.
    fn is_1_6(&self) -> bool {
        let said = self.ctr(&["version"]).out;
        let server = said.split("Server:").nth(1).unwrap_or_else(|| panic!("ctr version said: {said}"));
        server.contains(" 1.6.") || server.contains(" v1.6.")
    }

    fn profile(&self, root: &Path, name: &str, added: &[String]) -> oci_spec::runtime::LinuxSeccomp {
        let root = root.to_string_lossy();
        let mut args = vec!["run", "--detach", "--seccomp", "--rootfs"];
        for cap in added {
            args.extend(["--cap-add", cap]);
        }
        args.extend([&*root, name, "/bin/sleep", "600"]);
        let run = self.ctr(&args);
        assert!(run.ok, "ctr run {added:?}: {}", run.err);
        let info = self.ctr(&["container", "info", name]);
        assert!(self.ctr(&["task", "rm", "--force", name]).ok);
        assert!(self.ctr(&["container", "rm", name]).ok);
        let info: Value = serde_json::from_str(&info.out).unwrap();
        serde_json::from_value(info["Spec"]["linux"]["seccomp"].clone()).unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

/// Rules of a profile, each call with action, error and conditions.
fn rules(profile: &oci_spec::runtime::LinuxSeccomp) -> BTreeSet<(String, String)> {
    let mut all = BTreeSet::new();
    for rule in profile.syscalls().as_ref().unwrap() {
        let conditions: Vec<String> = rule
            .args()
            .iter()
            .flatten()
            .map(|a| format!("arg{} {:?} {:#x} {:#x}", a.index(), a.op(), a.value(), a.value_two().unwrap_or(0)))
            .collect();
        for name in rule.names() {
            all.insert((
                name.clone(),
                format!("{:?} {:?} {}", rule.action(), rule.errno_ret(), conditions.join(" and ")),
            ));
        }
    }
    all
}

/// Calls that Debian's containerd 1.6 allows and Berth refuses, each with why.
const REFUSED_ON_PURPOSE: &[(&str, &str)] = &[
    ("io_uring_enter", "its operations pass by every filter; containerd 2 refuses it too"),
    ("io_uring_register", "as io_uring_enter"),
    ("io_uring_setup", "as io_uring_enter"),
    ("socketcall", "32-bit way to every socket, past the check of the family"),
];

/// Calls that containerd 1.7 or 2 allows beside those of 1.6, whose profile ours is made after (docs/decisions/seccomp.md).
const REFUSED_AS_IN_1_6: &[&str] = &[
    "listmount",
    "lsm_get_self_attr",
    "lsm_list_modules",
    "lsm_set_self_attr",
    "name_to_handle_at",
    "process_vm_readv",
    "process_vm_writev",
    "statmount",
    "uretprobe",
];

/// Calls that Berth allows and Debian's containerd 1.6 does not know: they came with Linux 6.5 to 6.13, or differ from an
/// allowed call only in how arguments are passed.
const ALLOWED_ON_PURPOSE: &[&str] = &[
    "cachestat",
    "fchmodat2",
    "futex_requeue",
    "futex_wait",
    "futex_wake",
    "getxattrat",
    "listxattrat",
    "map_shadow_stack",
    "mseal",
    "removexattrat",
    "setxattrat",
];

/// The same for calls that a capability opens.
const ALLOWED_WITH_CAPABILITY_ON_PURPOSE: &[(&str, &[&str])] = &[
    ("CAP_SYS_ADMIN", &["listmount", "open_tree_attr", "statmount"]),
    ("CAP_SYS_NICE", &["set_mempolicy_home_node"]),
    ("CAP_DAC_READ_SEARCH", &["name_to_handle_at"]),
];

#[test]
fn the_seccomp_profile_is_containerds_but_for_the_written_differences() {
    let bundle = Bundle::new();
    let containerd = Containerd::start(&bundle.top);
    let node = NodeFacts::read().unwrap();
    let machine = node.machine;
    let default: oci_spec::runtime::Capabilities = capability::DEFAULT.into_iter().collect();
    let base_theirs = rules(&containerd.profile(&bundle.root(), "base", &[]));
    let profile = seccomp::runtime_default(&default, machine);
    let base_ours = rules(&profile);

    let socket = |(name, _): &&(String, String)| name == "socket";
    let missing: BTreeSet<&str> =
        base_theirs.difference(&base_ours).filter(|r| !socket(r)).map(|(name, _)| name.as_str()).collect();
    let refused: BTreeSet<&str> = REFUSED_ON_PURPOSE.iter().map(|(name, _)| *name).collect();
    if !containerd.is_1_6() {
        let known: BTreeSet<&str> = refused.iter().chain(REFUSED_AS_IN_1_6).copied().collect();
        assert!(missing.is_subset(&known), "it allows, and nobody has decided on: {:?}", missing.difference(&known));
        return;
    }
    assert_eq!(missing, refused, "containerd allows these and Berth does not");
    let more: BTreeSet<&str> =
        base_ours.difference(&base_theirs).filter(|r| !socket(r)).map(|(name, _)| name.as_str()).collect();
    assert_eq!(more, ALLOWED_ON_PURPOSE.iter().copied().collect(), "Berth allows these and containerd does not");
    let sockets: Vec<&str> = base_ours.iter().filter(socket).map(|(_, rule)| rule.as_str()).collect();
    assert_eq!(sockets.len(), 3, "{sockets:?}");
    if machine == Machine::X86_64 {
        let theirs = containerd.profile(&bundle.root(), "arch", &[]);
        // The x32 ABI is left out: docs/decisions/seccomp.md.
        let mut architectures = theirs.architectures().clone().unwrap();
        architectures.retain(|architecture| *architecture != oci_spec::runtime::Arch::ScmpArchX32);
        assert_eq!(profile.architectures().as_ref(), Some(&architectures));
        assert_eq!(profile.default_action(), theirs.default_action());
    }

    for cap in [
        "CAP_DAC_READ_SEARCH",
        "CAP_SYS_ADMIN",
        "CAP_SYS_BOOT",
        "CAP_SYS_MODULE",
        "CAP_SYS_PACCT",
        "CAP_SYS_PTRACE",
        "CAP_SYS_RAWIO",
        "CAP_SYS_TIME",
        "CAP_SYS_TTY_CONFIG",
        "CAP_SYS_NICE",
        "CAP_SYSLOG",
        "CAP_BPF",
        "CAP_PERFMON",
        "CAP_NET_ADMIN",
    ] {
        let theirs =
            rules(&containerd.profile(&bundle.root(), &cap.to_lowercase().replace('_', "-"), &[cap.to_owned()]));
        let mut held = default.clone();
        held.insert(capability::parse(cap).unwrap());
        let ours = rules(&seccomp::runtime_default(&held, machine));
        let names = |all: &BTreeSet<(String, String)>, base: &BTreeSet<(String, String)>| -> BTreeSet<String> {
            all.difference(base).map(|(name, _)| name.clone()).collect()
        };
        let mut expected = names(&theirs, &base_theirs);
        for (_, names) in ALLOWED_WITH_CAPABILITY_ON_PURPOSE.iter().filter(|(name, _)| *name == cap) {
            expected.extend(names.iter().map(|&n| n.to_owned()));
        }
        // An allowed call named again changes nothing.
        expected.remove("ptrace");
        let mut opened = names(&ours, &base_ours);
        opened.remove("ptrace");
        assert_eq!(opened, expected, "what {cap} opens");
        assert_eq!(names(&base_ours, &ours), names(&base_theirs, &theirs), "what {cap} takes away");
    }
}

/// Prints all that the comparison looks at.
const PROBE: &str = "cat /proc/self/status; echo ==; cat /proc/self/mountinfo; echo ==; ls -l /dev; echo ==; \
                     ls -l /proc/self/fd 2>/dev/null; echo ==; cat /proc/self/limits";

/// Mount points by path: file system, options, and options of the file system.
fn mounts(mountinfo: &str) -> BTreeMap<String, (String, String)> {
    mountinfo
        .lines()
        .map(|line| {
            let (before, after) = line.split_once(" - ").unwrap();
            let before: Vec<&str> = before.split(' ').collect();
            let kind = after.split(' ').next().unwrap();
            (before[4].to_owned(), (kind.to_owned(), before[5].to_owned()))
        })
        .collect()
}

fn status(text: &str) -> BTreeMap<&str, &str> {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Uid", "Gid"]
        .into_iter()
        .map(|key| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
            (key, line.unwrap_or_else(|| panic!("no {key} in\n{text}")).trim())
        })
        .collect()
}

#[test]
fn a_bot_that_asks_nothing_is_as_confined_as_under_ctr() {
    let bundle = Bundle::new();
    let containerd = Containerd::start(&bundle.top);
    // A descriptor that the runtime's caller forgot must not reach the bot.
    let leaked = fs::File::open("/etc/hostname").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let ours = bundle.sh(PROBE, &json!({}));
    drop(leaked);
    assert!(ours.ok, "{}", ours.err);
    let theirs = containerd.ctr(&[
        "run",
        "--rm",
        "--seccomp",
        "--rootfs",
        &bundle.root().to_string_lossy(),
        "peer",
        "/bin/sh",
        "-c",
        PROBE,
    ]);
    assert!(theirs.ok, "{}", theirs.err);
    let split = |run: &Run| -> Vec<String> { run.out.split("==\n").map(str::to_owned).collect() };
    let (ours, theirs) = (split(&ours), split(&theirs));

    assert_eq!(status(&ours[0]), status(&theirs[0]));
    assert_eq!(status(&ours[0])["Seccomp"], "2");

    let (our_mounts, mut their_mounts) = (mounts(&ours[1]), mounts(&theirs[1]));
    // A Pod's container has no tmpfs there either: what a bot leaves in /run is part of its layer.
    assert!(their_mounts.remove("/run").is_some());
    for (path, theirs) in &their_mounts {
        assert_eq!(our_mounts.get(path), Some(theirs), "{path}");
    }
    for (path, (kind, options)) in our_mounts.iter().filter(|(path, _)| !their_mounts.contains_key(*path)) {
        let read_only = options.split(',').any(|o| o == "ro");
        // On cgroup v1 runc mounts a tmpfs for the hierarchies to stand on, and leaves that alone writable; what a bot puts
        // there counts as its memory. A file is masked by /dev/null, which is not read-only either.
        let stand = path == "/sys/fs/cgroup" && kind == "tmpfs";
        let known = stand
            || path == "/proc/interrupts"
            || read_only
                && (path.starts_with("/sys/fs/cgroup")
                    || path == "/sys/devices/virtual/powercap"
                    || path.ends_with("/thermal_throttle"));
        assert!(known, "{path} {kind} {options}: not under ctr\n{}", ours[1]);
    }
    assert!(our_mounts.contains_key("/sys/fs/cgroup"), "{our_mounts:?}");

    // Mode, and for a device its numbers, by name; links with where they lead.
    let devices = |text: &str| -> BTreeMap<String, String> {
        text.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| words.len() > 8)
            .map(|words| {
                let numbered = words[0].starts_with(['c', 'b']);
                let (numbers, name) = if numbered { (words[4..6].concat(), 9) } else { (String::new(), 8) };
                (words[name..].join(" "), format!("{} {numbers}", words[0]))
            })
            .collect()
    };
    assert_eq!(devices(&ours[2]).get("null").map(String::as_str), Some("crw-rw-rw- 1,3"), "{}", ours[2]);
    assert_eq!(devices(&ours[2]), devices(&theirs[2]));

    let open: Vec<&str> = ours[3].lines().filter_map(|l| l.split_whitespace().nth(8)).collect();
    assert_eq!(open, ["0", "1", "2", "3"], "3 is ls's own view of the folder");
}

#[test]
fn the_filter_holds_against_real_calls() {
    let bundle = Bundle::new();
    // Numbers of x86_64 and aarch64; perl makes the bare call and prints errno.
    let machine = NodeFacts::read().unwrap().machine;
    let number = |x86: u32, arm: u32| if machine == Machine::X86_64 { x86 } else { arm };
    let (eperm, enosys, einval, ebadf) = (1, 38, 22, 9);
    let calls = [
        ("unshare a user namespace", number(272, 97), "0x10000000, 0, 0", eperm),
        ("mount", number(165, 40), "0, 0, 0, 0, 0", eperm),
        ("keyctl", number(250, 219), "0, 0, 0", eperm),
        ("bpf", number(321, 280), "0, 0, 0", eperm),
        ("io_uring_setup", 425, "1, 0", eperm),
        ("clone3", 435, "0, 0", enosys),
        ("clone with a new user namespace", number(56, 220), "0x10000000, 0, 0, 0, 0", eperm),
        ("an AF_ALG socket", number(41, 198), "38, 5, 0", eperm),
        ("an AF_VSOCK socket", number(41, 198), "40, 1, 0", eperm),
        ("personality ADDR_NO_RANDOMIZE", number(135, 92), "0x0040000", eperm),
        ("an AF_NFC socket of no known type, between them, allowed", number(41, 198), "39, 99, 0", einval),
        ("an unknown call that is newer than the profile", 999, "0", enosys),
        ("close of what is not open, allowed", number(3, 57), "999", ebadf),
        ("fchmodat2, allowed", 452, "-1, 0, 0, -1", einval),
    ];
    let mut script = String::new();
    for (_, number, args, _) in &calls {
        script.push_str(&format!("$! = 0; $r = syscall({number}, {args}); print $r == -1 ? $! + 0 : 0, \"\\n\"; "));
    }
    let usr = BindMount { source: "/usr".into(), destination: "/usr".to_owned(), read_only: true };
    bundle.prepare(&json!({"command": ["/usr/bin/perl", "-e", script]}), NetworkNamespace::Loopback, &[usr]);
    let run = bundle.run_prepared();
    assert!(run.ok, "{}", run.err);
    let answers: Vec<i32> = run.out.lines().map(|l| l.parse().unwrap()).collect();
    for ((what, _, _, errno), answer) in calls.iter().zip(&answers) {
        assert_eq!(answer, errno, "{what}");
    }
    assert_eq!(answers.len(), calls.len());
}

#[test]
fn a_read_only_root_is_read_only_and_its_data_is_not() {
    let bundle = Bundle::new();
    let script = "touch /x 2>/dev/null && echo wrote /x; touch /etc/x 2>/dev/null && echo wrote /etc/x; touch /srv/data/x && echo ok";
    let fields = json!({"securityContext": {"readOnlyRootFilesystem": true}, "data": {"path": "/srv/data"}});
    let run = bundle.sh(script, &fields);
    assert_eq!(run.out, "ok\n", "{}", run.err);
    assert!(bundle.root().join("srv/data/x").exists(), "data is part of the layer");
}

#[test]
fn a_user_other_than_root_has_its_groups_its_home_and_no_capability() {
    let bundle = Bundle::new();
    let script = "id -u; id -g; id -G; echo $HOME; cat /proc/self/status";
    let run = bundle.sh(
        script,
        &json!({"securityContext": {"runAsUser": 1000, "runAsNonRoot": true, "capabilities": {"drop": ["ALL"]}}}),
    );
    let lines: Vec<&str> = run.out.lines().take(4).collect();
    assert_eq!(lines, ["1000", "1001", "1001 10", "/home/bot"], "{}", run.err);
    for (key, value) in status(&run.out).into_iter().filter(|(key, _)| key.starts_with("Cap")) {
        assert_eq!(value, "0000000000000000", "{key}");
    }
}

#[test]
fn privileged_runs_with_what_the_node_has() {
    let bundle = Bundle::new();
    let script = "cat /proc/self/status; busybox mkdir /m && mount -t tmpfs none /m && echo mounted; ls /dev";
    let run = bundle.sh(script, &json!({"securityContext": {"privileged": true}}));
    assert!(run.ok, "{}", run.err);
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert_eq!(status(&run.out)["CapBnd"], status(&own)["CapBnd"]);
    assert_eq!((status(&run.out)["Seccomp"], status(&run.out)["NoNewPrivs"]), ("0", "0"));
    assert!(run.out.contains("\nmounted\n"), "{}", run.err);
    for device in NodeFacts::read().unwrap().devices {
        let name = device.path.strip_prefix("/dev").unwrap().components().next().unwrap();
        let name = name.as_os_str().to_string_lossy().into_owned();
        assert!(run.out.lines().any(|line| line == name), "no {name} in\n{}", run.out);
    }
}

#[test]
fn escalation_all_capabilities_and_unconfined_can_be_asked_for() {
    let bundle = Bundle::new();
    let run = bundle.sh(
        "cat /proc/self/status",
        &json!({"securityContext": {"allowPrivilegeEscalation": true, "seccompProfile": {"type": "Unconfined"}, "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}}}),
    );
    assert!(run.ok, "{}", run.err);
    let status = status(&run.out);
    assert_eq!((status["NoNewPrivs"], status["Seccomp"]), ("0", "0"));
    assert_eq!(status["CapEff"], "0000000000001000", "NET_ADMIN is 12");
}

#[test]
fn the_host_network_brings_the_hosts_name() {
    let bundle = Bundle::new();
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let namespace = fs::read_link("/proc/self/ns/net").unwrap();
    let script = "hostname; readlink /proc/self/ns/net";
    let run = bundle.sh_with(script, &json!({}), NetworkNamespace::Host, &[]);
    assert_eq!(run.out, format!("{}\n{}\n", own.trim(), namespace.display()), "{}", run.err);
    let other = Bundle::new();
    let run = other.sh(script, &json!({}));
    assert!(
        run.out.starts_with("web\n") && !run.out.contains(&*namespace.to_string_lossy()),
        "{} {}",
        run.out,
        run.err
    );
}

#[test]
fn limits_are_in_force_and_can_be_changed_and_taken_off_while_it_runs() {
    let bundle = Bundle::new();
    let limits = json!({"resources": {"limits": {"cpu": "500m", "memory": "64Mi", "pids": "20"}}});
    let mut fields = limits.clone();
    fields["command"] = json!(["sleep", "600"]);
    bundle.prepare(&fields, NetworkNamespace::Loopback, &[]);
    let started = bundle
        .runc(&["run", "--detach", "--bundle"])
        .arg(&bundle.top)
        .arg(bundle.id.as_str())
        .stdout(Stdio::null())
        .stderr(fs::File::create(bundle.top.join("runc.err")).unwrap())
        .status()
        .unwrap();
    assert!(started.success(), "{}", fs::read_to_string(bundle.top.join("runc.err")).unwrap());

    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let read = |controller: &str, v1: &str, v2_name: &str| {
        let base = Path::new("/sys/fs/cgroup");
        let folder = if v2 { base.to_path_buf() } else { base.join(controller) };
        let file = folder.join(bundle.cgroup().trim_start_matches('/')).join(if v2 { v2_name } else { v1 });
        fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display())).trim().to_owned()
    };
    let seen = || {
        (
            read("memory", "memory.limit_in_bytes", "memory.max"),
            read("pids", "pids.max", "pids.max"),
            read("cpu", "cpu.cfs_quota_us", "cpu.max"),
        )
    };
    let update = |resources: &Value| {
        let resources: BotResources = serde_json::from_value(resources.clone()).unwrap();
        let made = linux_resources(Some(&resources), &NodeFacts::read().unwrap()).unwrap();
        let mut child = bundle
            .runc(&["update", "--resources", "-", bundle.id.as_str()])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&serde_json::to_vec(&made).unwrap()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let (quota, unlimited_quota, unlimited) =
        if v2 { ("50000 100000", "max 100000", "max") } else { ("50000", "-1", "9223372036854771712") };
    assert_eq!(seen(), ((64 << 20).to_string(), "20".to_owned(), quota.to_owned()));
    update(&json!({"limits": {"memory": "128Mi", "pids": "30", "cpu": "500m"}}));
    assert_eq!(seen(), ((128 << 20).to_string(), "30".to_owned(), quota.to_owned()));
    update(&json!({"limits": {"memory": "32Mi"}}));
    assert_eq!(seen(), ((32 << 20).to_string(), "max".to_owned(), unlimited_quota.to_owned()));
    update(&json!({}));
    assert_eq!(seen(), (unlimited.to_owned(), "max".to_owned(), unlimited_quota.to_owned()));
}
