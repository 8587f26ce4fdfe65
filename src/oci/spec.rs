//! The OCI runtime spec of a bot: image config and bot's spec in, spec out. Pure.
//!
//! ```text
//! runtime_spec = process   command, args, workingDir, env, user, capabilities, noNewPrivileges, AppArmor, SELinux, OOM
//!              + mounts    the usual ones, then the agent's files, shallow before deep
//!              + linux     namespaces, cgroup, devices, seccomp, masked and read-only paths
//! ```
//!
//! Unless the bot's spec says otherwise it gets what containerd and kubelet give a Pod's container at their best:
//!
//! | | by default | `privileged: true` |
//! | --- | --- | --- |
//! | capabilities | containerd's fourteen; none inheritable, none ambient | all that the node has |
//! | no_new_privs | on, as containerd itself has it; `allowPrivilegeEscalation: true` takes it off | off |
//! | seccomp | RuntimeDefault | none |
//! | AppArmor | the runtime's default profile where it is loaded | none |
//! | /proc, /sys | masked and read-only paths, /sys and cgroups read-only | as on the host |
//! | devices | null zero full random urandom tty console ptmx pts | all of the host |
//! | namespaces | pid ipc uts mount network, cgroup on v2 | the same |
//!
//! Source: <https://github.com/opencontainers/runtime-spec>, v1.0.2.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::SecurityContext;
use oci_spec::runtime::{
    Capabilities, Linux, LinuxCapabilities, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, Mount, Process, Root, Spec, User as OciUser,
};

use super::capability;
use super::env::{self, MAX_STRING, Surroundings, expand};
use super::node::{CgroupVersion, NodeFacts};
pub use super::resources::linux_resources;
use super::resources::oom_score_adj;
use super::seccomp;
use super::user::User;
use crate::api::BotContainerSpec;
use crate::api::condition::{Reason, cut};
use crate::api::ids::ContainerId;
use crate::image::RunConfig;

/// A value that can't be run: where it stands, what it is, what is wrong, what is right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {why}; {right}")]
pub struct SpecError {
    field: String,
    value: String,
    why: String,
    right: String,
}

impl SpecError {
    /// `why` goes on from the value ("is negative"), `right` is what to do ("use a positive quantity").
    pub(crate) fn new(field: &str, value: &str, why: &str, right: &str) -> Self {
        Self { field: field.to_owned(), value: cut(value, 100), why: why.to_owned(), right: right.to_owned() }
    }

    /// Path of the field, for example `spec.securityContext.procMount`.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        Reason::InvalidSpec
    }

    /// Whether trying again can help: no, only an edit does.
    pub fn retryable(&self) -> bool {
        false
    }
}

/// Where the bot's network comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkNamespace<'a> {
    /// A named namespace that was set up before the process.
    Path(&'a Path),
    /// The node's network, and its host name.
    Host,
    /// A new namespace with nothing but loopback; it goes with the process.
    Loopback,
}

/// A file or directory of the node that the bot sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindMount {
    /// Absolute path on the node.
    pub source: PathBuf,
    /// Absolute path in the bot, not `/`, not below `/proc`, `/sys` or `/dev`.
    pub destination: String,
    /// Whether the bot may only read it.
    pub read_only: bool,
}

/// All that the spec is made from.
#[derive(Clone, Copy, Debug)]
pub struct SpecInput<'a> {
    /// The container's id.
    pub id: &'a ContainerId,
    /// The bot's host name; with [`NetworkNamespace::Host`] the node's, for `HOSTNAME` only.
    pub hostname: &'a str,
    /// What the user asked for.
    pub bot: &'a BotContainerSpec,
    /// What the image says.
    pub image: &'a RunConfig,
    /// The bot's environment, resolved by [`super::env::resolve_env`].
    pub env: &'a [(String, String)],
    /// The user, resolved by [`super::user::resolve_user`].
    pub user: &'a User,
    /// The bot's network.
    pub netns: NetworkNamespace<'a>,
    /// resolv.conf, hosts, hostname, localtime, files.
    pub mounts: &'a [BindMount],
    /// Path of the bot's cgroup, `/PARENT/ID`, or `SLICE:PREFIX:ID` for systemd: the container's id stands at its end.
    pub cgroups_path: &'a str,
    /// The profile of `seccompProfile.type: Localhost`, read by [`super::seccomp::localhost_profile`].
    pub localhost_seccomp: Option<&'a LinuxSeccomp>,
    /// What the node can do.
    pub node: &'a NodeFacts,
}

/// Name of the root file system's folder in the bundle, as containerd's shim mounts it.
const ROOT: &str = "rootfs";

/// Version of the runtime spec that all runtimes above the documented floor take.
const VERSION: &str = "1.0.2";

/// Bytes of arguments and environment in all. The kernel's bound is a quarter of the stack's limit, 2 MiB by default; what
/// is larger would fail with "argument list too long".
const MAX_STRINGS: usize = 2 << 20;

/// The spec of a bot's container.
///
/// Two specs of the same input are equal; their JSON may differ, since oci-spec keeps capabilities in hash sets.
///
/// # Errors
/// When the bot's spec or the image's config asks for what can't be run on this node; the error names the field.
pub fn runtime_spec(input: &SpecInput) -> Result<Spec, SpecError> {
    let hostname = hostname(input)?;
    let security = Security::of(input)?;
    let mut spec = Spec::default();
    let mut root = Root::default();
    root.set_path(ROOT.into()).set_readonly(Some(security.read_only_root));
    spec.set_version(VERSION.to_owned())
        .set_root(Some(root))
        .set_process(Some(process(input, &security)?))
        .set_mounts(Some(mounts(input, &security)?))
        .set_hostname(hostname)
        .set_domainname(None)
        .set_hooks(None)
        .set_annotations(None)
        .set_linux(Some(linux(input, &security)?));
    Ok(spec)
}

/// What `spec.securityContext` comes to.
struct Security {
    privileged: bool,
    no_new_privileges: bool,
    capabilities: Capabilities,
    unmasked: bool,
    read_only_root: bool,
    seccomp: Option<LinuxSeccomp>,
    apparmor: Option<String>,
    selinux: Option<SelinuxLabels>,
}

struct SelinuxLabels {
    process: String,
    files: String,
}

impl Security {
    fn of(input: &SpecInput) -> Result<Self, SpecError> {
        let none = SecurityContext::default();
        let asked = input.bot.security_context.as_ref().unwrap_or(&none);
        if asked.windows_options.is_some() {
            let right = "leave it out: bots run on Linux";
            return Err(SpecError::new("spec.securityContext.windowsOptions", "", "has no meaning here", right));
        }
        let privileged = asked.privileged == Some(true);
        let capabilities = if privileged {
            input.node.capabilities.clone()
        } else {
            capability::held(asked.capabilities.as_ref(), &input.node.capabilities)?
        };
        let unmasked = match asked.proc_mount.as_deref() {
            None | Some("Default") => privileged,
            Some("Unmasked") => true,
            Some(other) => {
                let right = "use Default or Unmasked";
                return Err(SpecError::new("spec.securityContext.procMount", other, "is no kind of /proc", right));
            }
        };
        Ok(Self {
            privileged,
            no_new_privileges: no_new_privileges(asked, privileged)?,
            seccomp: seccomp_profile(asked, privileged, &capabilities, input)?,
            apparmor: apparmor_profile(asked, privileged, input.node)?,
            selinux: selinux_labels(asked, input.node)?,
            capabilities,
            unmasked,
            read_only_root: asked.read_only_root_filesystem == Some(true),
        })
    }
}

/// Unset means on, but for a bot that was given the rights of the host anyway. Beside SYS_ADMIN `false` is obeyed, as in a
/// Pod: what the process gains by its files is another matter than what it holds.
fn no_new_privileges(asked: &SecurityContext, privileged: bool) -> Result<bool, SpecError> {
    let added = asked.capabilities.as_ref().and_then(|c| c.add.as_ref());
    let admin = added.is_some_and(|names| {
        names.iter().any(|n| n == "ALL" || capability::parse(n) == Some(oci_spec::runtime::Capability::SysAdmin))
    });
    match asked.allow_privilege_escalation {
        Some(false) if privileged => {
            let field = "spec.securityContext.allowPrivilegeEscalation";
            let right = "set it to true, or take privileged: true away";
            Err(SpecError::new(field, "false", "contradicts privileged: true", right))
        }
        Some(allowed) => Ok(!allowed),
        None => Ok(!(privileged || admin)),
    }
}

fn seccomp_profile(
    asked: &SecurityContext,
    privileged: bool,
    capabilities: &Capabilities,
    input: &SpecInput,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    let field = "spec.securityContext.seccompProfile";
    let profile = asked.seccomp_profile.as_ref();
    match profile.map_or("RuntimeDefault", |p| p.type_.as_str()) {
        // A Pod's privileged container has none, whatever its spec says.
        "RuntimeDefault" | "Unconfined" | "Localhost" if privileged => Ok(None),
        "RuntimeDefault" => Ok(Some(seccomp::runtime_default(capabilities, input.node.machine))),
        "Unconfined" => Ok(None),
        "Localhost" => match (profile.and_then(|p| p.localhost_profile.as_deref()), input.localhost_seccomp) {
            (Some(_), Some(profile)) => Ok(Some(profile.clone())),
            (name, _) => {
                let right = "name a profile that is in the node's seccomp directory";
                let field = format!("{field}.localhostProfile");
                Err(SpecError::new(&field, name.unwrap_or(""), "names no profile of this node", right))
            }
        },
        other => {
            let right = "use RuntimeDefault, Localhost or Unconfined";
            Err(SpecError::new(&format!("{field}.type"), other, "is no kind of profile", right))
        }
    }
}

/// Profiles that a runtime of this node may have loaded as its default, the best known first.
const APPARMOR_DEFAULTS: [&str; 2] = ["cri-containerd.apparmor.d", "docker-default"];

fn apparmor_profile(asked: &SecurityContext, privileged: bool, node: &NodeFacts) -> Result<Option<String>, SpecError> {
    let field = "spec.securityContext.appArmorProfile";
    let default = |loaded: &std::collections::BTreeSet<String>| {
        APPARMOR_DEFAULTS.iter().find(|name| loaded.contains(**name)).map(|&name| name.to_owned())
    };
    let Some(profile) = asked.app_armor_profile.as_ref() else {
        return Ok(node.apparmor.as_ref().filter(|_| !privileged).and_then(default));
    };
    let off = "asks for AppArmor, which this node does not have";
    let elsewhere = "use Unconfined, leave it out, or choose a node with AppArmor";
    match (profile.type_.as_str(), &node.apparmor) {
        ("Unconfined", _) => Ok(None),
        (kind @ ("RuntimeDefault" | "Localhost"), None) => {
            Err(SpecError::new(&format!("{field}.type"), kind, off, elsewhere))
        }
        ("RuntimeDefault", Some(loaded)) => match default(loaded) {
            Some(name) => Ok(Some(name)),
            None => {
                let right = format!("load {} on the node, or name another as Localhost", APPARMOR_DEFAULTS[0]);
                Err(SpecError::new(&format!("{field}.type"), "RuntimeDefault", "is not loaded on this node", &right))
            }
        },
        ("Localhost", Some(loaded)) => {
            let name = profile.localhost_profile.as_deref().unwrap_or("");
            if loaded.contains(name) {
                return Ok(Some(name.to_owned()));
            }
            let right = "name a profile that is loaded there";
            Err(SpecError::new(&format!("{field}.localhostProfile"), name, "is not loaded on this node", right))
        }
        (other, _) => {
            let right = "use RuntimeDefault, Localhost or Unconfined";
            Err(SpecError::new(&format!("{field}.type"), other, "is no kind of profile", right))
        }
    }
}

/// As in a Pod, labels have no effect on a node without SELinux.
fn selinux_labels(asked: &SecurityContext, node: &NodeFacts) -> Result<Option<SelinuxLabels>, SpecError> {
    let Some(options) = asked.se_linux_options.as_ref() else { return Ok(None) };
    let part = |name: &str, value: &Option<String>, default: &str, colon: bool| match value.as_deref() {
        None | Some("") => Ok(default.to_owned()),
        Some(v) if v.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.,-".contains(&b) || colon && b == b':') => {
            Ok(v.to_owned())
        }
        Some(v) => {
            let field = format!("spec.securityContext.seLinuxOptions.{name}");
            Err(SpecError::new(&field, v, "is no part of an SELinux label", "use letters, digits, _ . , and -"))
        }
    };
    let level = part("level", &options.level, "s0", true)?;
    let user = part("user", &options.user, "system_u", false)?;
    let role = part("role", &options.role, "system_r", false)?;
    let type_ = part("type", &options.type_, "container_t", false)?;
    Ok(node.selinux.then(|| SelinuxLabels {
        process: format!("{user}:{role}:{type_}:{level}"),
        files: format!("system_u:object_r:container_file_t:{level}"),
    }))
}

fn process(input: &SpecInput, security: &Security) -> Result<Process, SpecError> {
    let args = arguments(input)?;
    let surroundings = Surroundings {
        hostname: input.hostname,
        home: input.user.home.as_deref(),
        timezone: input.bot.timezone.as_deref(),
    };
    let env = env::process_env(&input.image.env, &surroundings, input.env)?;
    let total: usize = args.iter().chain(&env).map(|s| s.len() + 1 + size_of::<usize>()).sum();
    if total > MAX_STRINGS {
        let right = "make command, args and env shorter, or use spec.files";
        let why = format!("bytes are more than the {MAX_STRINGS} that the kernel passes to a process");
        return Err(SpecError::new("spec.env", &total.to_string(), &why, right));
    }

    let mut user = OciUser::default();
    user.set_uid(input.user.uid).set_gid(input.user.gid).set_additional_gids(Some(input.user.additional_gids.clone()));
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(security.capabilities.clone()))
        .set_effective(Some(security.capabilities.clone()))
        .set_permitted(Some(security.capabilities.clone()))
        // Inheritable ones would come back through a file's capabilities (CVE-2022-24769).
        .set_inheritable(None)
        .set_ambient(None);
    let mut process = Process::default();
    process
        .set_terminal(Some(false))
        .set_user(user)
        .set_args(Some(args))
        .set_env(Some(env))
        .set_cwd(working_directory(input)?)
        .set_capabilities(Some(capabilities))
        .set_rlimits(None)
        .set_no_new_privileges(Some(security.no_new_privileges))
        .set_apparmor_profile(security.apparmor.clone())
        .set_selinux_label(security.selinux.as_ref().map(|labels| labels.process.clone()))
        .set_oom_score_adj(Some(oom_score_adj(input.bot.resources.as_ref(), input.node)));
    Ok(process)
}

/// `command` takes the place of the image's entrypoint and its arguments, `args` of its arguments only.
fn arguments(input: &SpecInput) -> Result<Vec<String>, SpecError> {
    let SpecInput { bot, image, .. } = input;
    let variable = |name: &str| input.env.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let own = |field: &str, words: &[String]| {
        words
            .iter()
            .enumerate()
            .map(|(i, w)| expand(&format!("{field}[{i}]"), w, variable))
            .collect::<Result<Vec<_>, _>>()
    };
    let mut all = if bot.command.is_empty() { image.entrypoint.clone() } else { own("spec.command", &bot.command)? };
    if !bot.args.is_empty() {
        all.extend(own("spec.args", &bot.args)?);
    } else if bot.command.is_empty() {
        all.extend(image.cmd.iter().cloned());
    }
    let field = if bot.command.is_empty() { "the image's Entrypoint and Cmd" } else { "spec.command" };
    match all.first() {
        None => return Err(SpecError::new("spec.command", "", "is not set, nor does the image have one", "set it")),
        Some(first) if first.is_empty() => {
            return Err(SpecError::new(field, "", "names no program", "put the program's path or name first"));
        }
        Some(_) => {}
    }
    // The word itself stays unsaid: an expanded variable may have put a Secret's value into it.
    if let Some(i) = all.iter().position(|word| word.contains('\0') || word.len() > MAX_STRING) {
        let why = "is the place of a word with a NUL, or longer than 131071 bytes";
        return Err(SpecError::new(field, &i.to_string(), why, "use words that the kernel can pass on"));
    }
    Ok(all)
}

/// The working directory, without `.`, `..` and double slashes.
///
/// One below `/proc` or `/dev` is refused: it could be a descriptor of the host that the runtime still has open
/// (CVE-2024-21626). Links are looked at by [`super::rootfs::check_working_directory`].
fn working_directory(input: &SpecInput) -> Result<PathBuf, SpecError> {
    let (field, given) = match input.bot.working_dir.as_deref().filter(|dir| !dir.is_empty()) {
        Some(dir) => ("spec.workingDir", dir),
        None => ("the image's WorkingDir", input.image.working_dir.as_str()),
    };
    // Builders write WORKDIR in full; a relative one can only be meant from the root.
    if field == "spec.workingDir" && !given.starts_with('/') {
        return Err(SpecError::new(field, given, "is not absolute", "begin it with /"));
    }
    let path = clean(given);
    if given.contains('\0') || given.len() > 4095 || below(&path, &["/proc", "/dev"]) {
        let right = "use a directory of the bot's own files, such as /data";
        return Err(SpecError::new(field, given, "is no directory that a process can start in", right));
    }
    Ok(path.into())
}

/// Absolute, with no `.`, `..`, empty name or slash at the end.
fn clean(path: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    format!("/{}", names.join("/"))
}

/// Whether a clean path is one of these or below it.
fn below(path: &str, tops: &[&str]) -> bool {
    tops.iter().any(|top| path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn hostname(input: &SpecInput) -> Result<Option<String>, SpecError> {
    if input.netns == NetworkNamespace::Host {
        return Ok(None);
    }
    let name = input.hostname;
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
        let right = "use at most 63 letters, digits and -";
        return Err(SpecError::new("spec.network.hostname", name, "is no host name", right));
    }
    Ok(Some(name.to_owned()))
}

fn mounts(input: &SpecInput, security: &Security) -> Result<Vec<Mount>, SpecError> {
    let sys = if security.privileged { "rw" } else { "ro" };
    let shm = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    let mut all = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &pts),
        mount("/dev/shm", "tmpfs", "shm", &shm),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", sys]),
    ];

    let mut binds = Vec::new();
    if security.read_only_root {
        // What a volume is to a Pod, the data path is to a bot: it stays writable. The source is relative to the bundle,
        // and `check_root` has seen that no link is on the way.
        let data = mount_point("spec.data.path", &input.bot.data.path)?;
        let source = format!("{ROOT}{data}");
        binds.push((data.clone(), mount(&data, "bind", &source, &["bind", "rprivate", "rw"])));
    }
    for bind in input.mounts {
        let destination = mount_point("spec.files", &bind.destination)?;
        let access = if bind.read_only { "ro" } else { "rw" };
        let source = bind.source.to_string_lossy();
        let options = ["rbind", "rprivate", "nosuid", "nodev", access];
        binds.push((destination.clone(), mount(&destination, "bind", &source, &options)));
    }
    // A mount hides what was mounted below it before, so the shallow ones come first; else as given.
    binds.sort_by_key(|(destination, _)| destination.matches('/').count());
    for pair in 0..binds.len() {
        if binds[..pair].iter().any(|(earlier, _)| *earlier == binds[pair].0) {
            let right = "give each file a path of its own";
            return Err(SpecError::new("spec.files", &binds[pair].0, "is mounted twice", right));
        }
    }
    all.extend(binds.into_iter().map(|(_, mount)| mount));
    Ok(all)
}

fn mount_point(field: &str, path: &str) -> Result<String, SpecError> {
    let cleaned = clean(path);
    if !path.starts_with('/')
        || path.contains('\0')
        || path.len() > 4095
        || cleaned == "/"
        || below(&cleaned, &["/proc", "/sys", "/dev"])
    {
        let right = "use an absolute path that is not / and not below /proc, /sys or /dev";
        return Err(SpecError::new(field, path, "is no path that can be mounted on", right));
    }
    Ok(cleaned)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|&o| o.to_owned()).collect()));
    mount
}

/// Kernel interfaces that tell of the host or of other bots; what is not there is passed over by the runtime.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Kernel interfaces that change the host.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn linux(input: &SpecInput, security: &Security) -> Result<Linux, SpecError> {
    // Two bots in one cgroup would be limited, frozen and killed together.
    let own = input.cgroups_path.ends_with(input.id.as_str());
    if !own || !input.cgroups_path.starts_with('/') && input.cgroups_path.matches(':').count() != 2 {
        let right = "use an absolute path or slice:prefix:name, with the container's id at its end";
        return Err(SpecError::new("the agent's cgroup path", input.cgroups_path, "is no cgroup of this bot", right));
    }
    let mut resources: LinuxResources = linux_resources(input.bot.resources.as_ref(), input.node)?;
    resources.set_devices(Some(device_rules(security.privileged)));
    let strings = |paths: &[&str]| paths.iter().map(|&p| p.to_owned()).collect::<Vec<_>>();
    let (masked, read_only) = if security.unmasked {
        (Vec::new(), Vec::new())
    } else {
        ([strings(&MASKED), input.node.masked_paths.clone()].concat(), strings(&READ_ONLY))
    };
    let mut linux = Linux::default();
    linux
        .set_resources(Some(resources))
        .set_cgroups_path(Some(input.cgroups_path.into()))
        .set_namespaces(Some(namespaces(input)))
        .set_devices(security.privileged.then(|| host_devices(input.node)))
        .set_seccomp(security.seccomp.clone())
        .set_mount_label(security.selinux.as_ref().map(|labels| labels.files.clone()))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(read_only))
        .set_sysctl(None)
        .set_rootfs_propagation(None);
    Ok(linux)
}

fn namespaces(input: &SpecInput) -> Vec<LinuxNamespace> {
    let namespace = |kind: LinuxNamespaceType, path: Option<&Path>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path.map(Path::to_path_buf));
        namespace
    };
    let mut all = vec![
        namespace(LinuxNamespaceType::Pid, None),
        namespace(LinuxNamespaceType::Ipc, None),
        namespace(LinuxNamespaceType::Mount, None),
    ];
    match input.netns {
        NetworkNamespace::Host => {}
        NetworkNamespace::Path(path) => {
            all.push(namespace(LinuxNamespaceType::Uts, None));
            all.push(namespace(LinuxNamespaceType::Network, Some(path)));
        }
        NetworkNamespace::Loopback => {
            all.push(namespace(LinuxNamespaceType::Uts, None));
            all.push(namespace(LinuxNamespaceType::Network, None));
        }
    }
    if input.node.cgroup == CgroupVersion::V2 {
        all.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    all
}

/// Character devices that every bot may use: major and minor number, `None` for all minors.
const DEVICES: [(i64, Option<i64>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(1)), // console
    (5, Some(2)), // ptmx
    (136, None),  // pts
];

fn device_rules(privileged: bool) -> Vec<LinuxDeviceCgroup> {
    let rule = |allow: bool, kind: LinuxDeviceType, major: Option<i64>, minor: Option<i64>| {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(allow).set_typ(Some(kind)).set_major(major).set_minor(minor).set_access(Some("rwm".to_owned()));
        rule
    };
    if privileged {
        return vec![rule(true, LinuxDeviceType::A, None, None)];
    }
    let mut rules = vec![rule(false, LinuxDeviceType::A, None, None)];
    rules.extend(DEVICES.map(|(major, minor)| rule(true, LinuxDeviceType::C, Some(major), minor)));
    rules
}

fn host_devices(node: &NodeFacts) -> Vec<LinuxDevice> {
    let device = |d: &super::node::Device| {
        let mut device = LinuxDevice::default();
        device
            .set_path(d.path.clone())
            .set_typ(if d.block { LinuxDeviceType::B } else { LinuxDeviceType::C })
            .set_major(d.major.into())
            .set_minor(d.minor.into())
            .set_file_mode(Some(d.mode))
            .set_uid(Some(d.uid))
            .set_gid(Some(d.gid));
        device
    };
    node.devices.iter().map(device).collect()
}

#[cfg(test)]
pub(crate) mod tests;
