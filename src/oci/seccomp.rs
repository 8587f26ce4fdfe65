//! The seccomp profile that `RuntimeDefault` means, as a table of our own, and reading a `Localhost` one.
//!
//! ```text
//! GROUPS            always allowed, one group of system calls a purpose
//! BY_CAPABILITY     allowed where the bot holds the capability that the kernel asks for anyway
//! BY_ARGUMENT       allowed for some arguments only: personality, socket, clone
//! all else          EPERM; clone3 ENOSYS, so that C libraries fall back to clone, whose flags a filter can see
//! ```
//!
//! It follows the profile that containerd, Docker and CRI-O agree on. A test compares it with what the installed
//! containerd makes of `ctr run --seccomp` and holds the list of intended differences; the notable ones:
//! `io_uring_*` is refused (its operations pass by the filter), `socket(AF_ALG)` is refused (CVE-2026-31431: a page of
//! an image layer that other bots share could be overwritten), and with it `socketcall`, which would pass by both; the
//! x32 ABI is no architecture of the profile (docs/decisions/seccomp.md).
//!
//! Sources: seccomp(2), capabilities(7), <https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#seccomp>.

use std::os::fd::BorrowedFd;

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::node::Machine;
use super::rootfs::{self, RootError};
use crate::api::condition::Reason;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Address families that `socket` refuses. AF_ALG hands kernel crypto to anyone and has a history of holes; AF_VSOCK
/// reaches the hypervisor, past every network rule.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// The `CLONE_NEW*` flags: cgroup, uts, ipc, user, pid, net, and mount. A new user namespace would give all capabilities.
const NEW_NAMESPACES: u64 =
    0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000 | 0x0002_0000;

/// Execution domains that change how a program sees the system without opening old holes (no READ_IMPLIES_EXEC, no
/// ADDR_NO_RANDOMIZE, no MMAP_PAGE_ZERO): PER_LINUX, PER_LINUX32, both with UNAME26, and "only ask".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// System calls that every bot may make, by purpose.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "start, run and end processes and threads",
        &[
            "execve",
            "execveat",
            "exit",
            "exit_group",
            "fork",
            "vfork",
            "wait4",
            "waitid",
            "waitpid",
            "gettid",
            "getpid",
            "getppid",
            "getpgid",
            "getpgrp",
            "getsid",
            "setpgid",
            "setsid",
            "set_tid_address",
            "set_robust_list",
            "get_robust_list",
            "get_thread_area",
            "set_thread_area",
            "rseq",
            "membarrier",
            "prctl",
            "restart_syscall",
            "pidfd_open",
            "pidfd_send_signal",
            "process_mrelease",
        ],
    ),
    // Since Linux 4.8 a filter is checked again after a tracer changed the call, so tracing opens nothing; the kernel
    // lets it reach only the bot's own processes. Debuggers need it.
    ("trace own processes", &["ptrace"]),
    (
        "restrict oneself further",
        &["seccomp", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self"],
    ),
    (
        "memory",
        &[
            "brk",
            "madvise",
            "mincore",
            "mlock",
            "mlock2",
            "mlockall",
            "mmap",
            "mmap2",
            "mprotect",
            "mremap",
            "mseal",
            "msync",
            "munlock",
            "munlockall",
            "munmap",
            "pkey_alloc",
            "pkey_free",
            "pkey_mprotect",
            "remap_file_pages",
            "memfd_create",
            "memfd_secret",
            "map_shadow_stack",
            "cachestat",
        ],
    ),
    (
        "open, read and write files",
        &[
            "open",
            "openat",
            "openat2",
            "creat",
            "close",
            "close_range",
            "read",
            "readv",
            "pread64",
            "preadv",
            "preadv2",
            "write",
            "writev",
            "pwrite64",
            "pwritev",
            "pwritev2",
            "lseek",
            "_llseek",
            "dup",
            "dup2",
            "dup3",
            "fcntl",
            "fcntl64",
            "ioctl",
            "flock",
            "fsync",
            "fdatasync",
            "sync",
            "syncfs",
            "sync_file_range",
            "fallocate",
            "fadvise64",
            "fadvise64_64",
            "readahead",
            "truncate",
            "truncate64",
            "ftruncate",
            "ftruncate64",
            "sendfile",
            "sendfile64",
            "splice",
            "tee",
            "vmsplice",
            "copy_file_range",
            "pipe",
            "pipe2",
            "umask",
        ],
    ),
    (
        "names, links and directories",
        &[
            "access",
            "faccessat",
            "faccessat2",
            "chdir",
            "fchdir",
            "getcwd",
            "getdents",
            "getdents64",
            "link",
            "linkat",
            "symlink",
            "symlinkat",
            "readlink",
            "readlinkat",
            "mkdir",
            "mkdirat",
            "rmdir",
            "rename",
            "renameat",
            "renameat2",
            "unlink",
            "unlinkat",
            "mknod",
            "mknodat",
        ],
    ),
    (
        "owners, modes, times and attributes of files",
        &[
            "chmod",
            "fchmod",
            "fchmodat",
            "fchmodat2",
            "chown",
            "chown32",
            "fchown",
            "fchown32",
            "fchownat",
            "lchown",
            "lchown32",
            "stat",
            "stat64",
            "fstat",
            "fstat64",
            "lstat",
            "lstat64",
            "fstatat64",
            "newfstatat",
            "statx",
            "statfs",
            "statfs64",
            "fstatfs",
            "fstatfs64",
            "utime",
            "utimes",
            "utimensat",
            "utimensat_time64",
            "futimesat",
            "getxattr",
            "lgetxattr",
            "fgetxattr",
            "getxattrat",
            "setxattr",
            "lsetxattr",
            "fsetxattr",
            "setxattrat",
            "listxattr",
            "llistxattr",
            "flistxattr",
            "listxattrat",
            "removexattr",
            "lremovexattr",
            "fremovexattr",
            "removexattrat",
        ],
    ),
    (
        "wait for files and events",
        &[
            "select",
            "_newselect",
            "pselect6",
            "pselect6_time64",
            "poll",
            "ppoll",
            "ppoll_time64",
            "epoll_create",
            "epoll_create1",
            "epoll_ctl",
            "epoll_ctl_old",
            "epoll_pwait",
            "epoll_pwait2",
            "epoll_wait",
            "epoll_wait_old",
            "eventfd",
            "eventfd2",
            "inotify_add_watch",
            "inotify_init",
            "inotify_init1",
            "inotify_rm_watch",
            "fanotify_mark",
            "signalfd",
            "signalfd4",
        ],
    ),
    (
        "asynchronous files, the old way (io_uring is left out on purpose)",
        &["io_setup", "io_submit", "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_pgetevents_time64"],
    ),
    (
        "sockets (`socket` itself is below, `socketcall` left out on purpose)",
        &[
            "socketpair",
            "accept",
            "accept4",
            "bind",
            "connect",
            "listen",
            "shutdown",
            "getpeername",
            "getsockname",
            "getsockopt",
            "setsockopt",
            "recv",
            "recvfrom",
            "recvmmsg",
            "recvmmsg_time64",
            "recvmsg",
            "send",
            "sendmmsg",
            "sendmsg",
            "sendto",
        ],
    ),
    (
        "signals",
        &[
            "kill",
            "tkill",
            "tgkill",
            "pause",
            "rt_sigaction",
            "rt_sigpending",
            "rt_sigprocmask",
            "rt_sigqueueinfo",
            "rt_sigreturn",
            "rt_sigsuspend",
            "rt_sigtimedwait",
            "rt_sigtimedwait_time64",
            "rt_tgsigqueueinfo",
            "sigaltstack",
            "sigprocmask",
            "sigreturn",
        ],
    ),
    ("locks between threads", &["futex", "futex_time64", "futex_waitv", "futex_wait", "futex_wake", "futex_requeue"]),
    (
        "clocks and timers (setting a clock also needs CAP_SYS_TIME of the kernel)",
        &[
            "alarm",
            "clock_getres",
            "clock_getres_time64",
            "clock_gettime",
            "clock_gettime64",
            "clock_nanosleep",
            "clock_nanosleep_time64",
            "adjtimex",
            "clock_adjtime",
            "clock_adjtime64",
            "getitimer",
            "setitimer",
            "gettimeofday",
            "nanosleep",
            "time",
            "times",
            "timer_create",
            "timer_delete",
            "timer_getoverrun",
            "timer_gettime",
            "timer_gettime64",
            "timer_settime",
            "timer_settime64",
            "timerfd_create",
            "timerfd_gettime",
            "timerfd_gettime64",
            "timerfd_settime",
            "timerfd_settime64",
        ],
    ),
    (
        "users, groups and capabilities; the kernel checks each change",
        &[
            "capget",
            "capset",
            "getuid",
            "getuid32",
            "geteuid",
            "geteuid32",
            "getgid",
            "getgid32",
            "getegid",
            "getegid32",
            "getgroups",
            "getgroups32",
            "getresuid",
            "getresuid32",
            "getresgid",
            "getresgid32",
            "setuid",
            "setuid32",
            "setgid",
            "setgid32",
            "setgroups",
            "setgroups32",
            "setreuid",
            "setreuid32",
            "setregid",
            "setregid32",
            "setresuid",
            "setresuid32",
            "setresgid",
            "setresgid32",
            "setfsuid",
            "setfsuid32",
            "setfsgid",
            "setfsgid32",
        ],
    ),
    (
        "scheduling and limits",
        &[
            "getcpu",
            "getpriority",
            "setpriority",
            "ioprio_get",
            "ioprio_set",
            "getrlimit",
            "ugetrlimit",
            "setrlimit",
            "prlimit64",
            "getrusage",
            "sched_getaffinity",
            "sched_getattr",
            "sched_getparam",
            "sched_get_priority_max",
            "sched_get_priority_min",
            "sched_getscheduler",
            "sched_rr_get_interval",
            "sched_rr_get_interval_time64",
            "sched_setaffinity",
            "sched_setattr",
            "sched_setparam",
            "sched_setscheduler",
            "sched_yield",
        ],
    ),
    (
        "messages, semaphores and shared memory: of the bot's own ipc namespace",
        &[
            "ipc",
            "mq_getsetattr",
            "mq_notify",
            "mq_open",
            "mq_timedreceive",
            "mq_timedreceive_time64",
            "mq_timedsend",
            "mq_timedsend_time64",
            "mq_unlink",
            "msgctl",
            "msgget",
            "msgrcv",
            "msgsnd",
            "semctl",
            "semget",
            "semop",
            "semtimedop",
            "semtimedop_time64",
            "shmat",
            "shmctl",
            "shmdt",
            "shmget",
        ],
    ),
    ("facts of the system", &["uname", "sysinfo", "getrandom"]),
];

/// System calls that only one kind of machine has.
fn machine_group(machine: Machine) -> &'static [&'static str] {
    match machine {
        Machine::X86_64 => &["arch_prctl", "modify_ldt"],
        Machine::Aarch64 => {
            &["arm_fadvise64_64", "arm_sync_file_range", "sync_file_range2", "breakpoint", "cacheflush", "set_tls"]
        }
    }
}

/// System calls that a bot may make when it holds a capability, which the kernel then checks itself.
const BY_CAPABILITY: &[(Capability, &[&str])] = &[
    (Capability::DacReadSearch, &["name_to_handle_at", "open_by_handle_at"]),
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "listmount",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "name_to_handle_at",
            "open_tree",
            "open_tree_attr",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "statmount",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (Capability::SysModule, &["delete_module", "init_module", "finit_module"]),
    (Capability::SysPacct, &["acct"]),
    (
        Capability::SysPtrace,
        &["kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace"],
    ),
    (Capability::SysRawio, &["iopl", "ioperm"]),
    (Capability::SysTime, &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    (Capability::SysTtyConfig, &["vhangup"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::Syslog, &["syslog"]),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
];

/// The profile that `RuntimeDefault` means, for a bot that holds these capabilities on such a machine.
pub fn runtime_default(held: &Capabilities, machine: Machine) -> LinuxSeccomp {
    let mut names: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    names.extend(machine_group(machine));
    names.extend(
        BY_CAPABILITY.iter().filter(|(cap, _)| held.contains(cap)).flat_map(|(_, names)| names.iter().copied()),
    );
    names.sort_unstable();
    names.dedup();

    let mut rules = vec![allow(&names, None)];
    rules.extend(
        PERSONALITIES
            .iter()
            .map(|&value| allow(&["personality"], Some(argument(LinuxSeccompOperator::ScmpCmpEq, value, 0)))),
    );
    // Two "not equal" on one argument would be or-ed and so allow all: the families around the refused are allowed.
    for (op, family) in [
        (LinuxSeccompOperator::ScmpCmpLt, AF_ALG),
        (LinuxSeccompOperator::ScmpCmpEq, AF_ALG + 1),
        (LinuxSeccompOperator::ScmpCmpGt, AF_VSOCK),
    ] {
        rules.push(allow(&["socket"], Some(argument(op, family, 0))));
    }
    if !held.contains(&Capability::SysAdmin) {
        let no_namespace = argument(LinuxSeccompOperator::ScmpCmpMaskedEq, NEW_NAMESPACES, 0);
        rules.push(allow(&["clone"], Some(no_namespace)));
        rules.push(rule(&["clone3"], LinuxSeccompAction::ScmpActErrno, Some(ENOSYS), None));
    }

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(match machine {
            // Each costs a start some 10 ms, in which runc makes a filter of names.
            Machine::X86_64 => vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86],
            Machine::Aarch64 => vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        }))
        .set_syscalls(Some(rules));
    profile
}

fn allow(names: &[&str], argument: Option<LinuxSeccompArg>) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow, None, argument)
}

fn rule(
    names: &[&str],
    action: LinuxSeccompAction,
    errno: Option<u32>,
    argument: Option<LinuxSeccompArg>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|&n| n.to_owned()).collect())
        .set_action(action)
        .set_errno_ret(errno)
        .set_args(argument.map(|a| vec![a]));
    rule
}

/// A condition on the first argument. For `MaskedEq`, `value` is the mask and `masked` what must remain.
fn argument(op: LinuxSeccompOperator, value: u64, masked: u64) -> LinuxSeccompArg {
    // The type has no setters, and its builder fails only where a field without default is missing: none is.
    #[allow(clippy::expect_used)]
    LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .value(value)
        .value_two(masked)
        .op(op)
        .build()
        .expect("all fields are set")
}

/// Longest a `Localhost` profile may be: the largest known ones have some 50 KiB.
const MAX_PROFILE: u64 = 1 << 20;

/// Why a `Localhost` profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// There is no such file below the node's profile directory.
    #[error(
        "spec.securityContext.seccompProfile.localhostProfile: {name:?} is not on this node; put the file into the node's seccomp directory or name another"
    )]
    Missing {
        /// As the spec names it.
        name: String,
    },
    /// The file is there and is not a profile.
    #[error(
        "spec.securityContext.seccompProfile.localhostProfile: {name:?} is no seccomp profile in the form of the OCI runtime spec"
    )]
    Malformed {
        /// As the spec names it.
        name: String,
        /// Where it fails.
        source: serde_json::Error,
    },
    /// The file can't be read.
    #[error("spec.securityContext.seccompProfile.localhostProfile: {name:?} can't be read")]
    Unreadable {
        /// As the spec names it.
        name: String,
        /// How reading failed.
        source: RootError,
    },
}

impl ProfileError {
    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        Reason::InvalidSpec
    }

    /// Whether trying again, with nothing edited, can help.
    pub fn retryable(&self) -> bool {
        match self {
            // An administrator may still put the file there, and no event tells us.
            Self::Missing { .. } | Self::Malformed { .. } => true,
            Self::Unreadable { source, .. } => source.retryable(),
        }
    }
}

/// Reads the profile that `seccompProfile.localhostProfile` names, relative to the node's profile directory (kubelet's
/// is `/var/lib/kubelet/seccomp`). The name cannot lead out of that directory.
pub fn localhost_profile(directory: BorrowedFd, name: &str) -> Result<LinuxSeccomp, ProfileError> {
    let text = rootfs::read_file(directory, name, MAX_PROFILE)
        .map_err(|source| ProfileError::Unreadable { name: name.to_owned(), source })?
        .ok_or_else(|| ProfileError::Missing { name: name.to_owned() })?;
    serde_json::from_slice(&text).map_err(|source| ProfileError::Malformed { name: name.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::fd::AsFd;

    use super::*;
    use crate::oci::capability;

    fn allowed(held: &Capabilities, machine: Machine) -> BTreeSet<String> {
        let profile = runtime_default(held, machine);
        let rules = profile.syscalls().clone().unwrap();
        let whole = rules.iter().filter(|r| r.args().is_none() && r.action() == LinuxSeccompAction::ScmpActAllow);
        whole.flat_map(|r| r.names().clone()).collect()
    }

    #[test]
    fn no_call_stands_in_two_groups() {
        let mut seen = BTreeSet::new();
        for (why, names) in GROUPS {
            assert!(!why.is_empty());
            for name in *names {
                assert!(seen.insert(name), "{name} stands twice");
            }
        }
    }

    #[test]
    fn a_capability_opens_its_calls_and_no_other_does() {
        for machine in [Machine::X86_64, Machine::Aarch64] {
            let none = allowed(&Capabilities::new(), machine);
            for (cap, names) in BY_CAPABILITY {
                let with = allowed(&[*cap].into_iter().collect(), machine);
                let opened: BTreeSet<&str> = with.difference(&none).map(String::as_str).collect();
                let expected: BTreeSet<&str> = names.iter().copied().filter(|n| !none.contains(*n)).collect();
                assert_eq!(opened, expected, "{cap}");
            }
        }
    }

    #[test]
    fn what_reaches_the_host_is_never_allowed_by_default() {
        let default = allowed(&capability::DEFAULT.into_iter().collect(), Machine::X86_64);
        for name in [
            "mount",
            "umount2",
            "pivot_root",
            "move_mount",
            "open_tree",
            "fsopen",
            "unshare",
            "setns",
            "clone",
            "clone3",
            "bpf",
            "perf_event_open",
            "keyctl",
            "add_key",
            "request_key",
            "init_module",
            "finit_module",
            "kexec_load",
            "reboot",
            "swapon",
            "iopl",
            "ioperm",
            "io_uring_setup",
            "userfaultfd",
            "open_by_handle_at",
            "quotactl",
            "sethostname",
            "settimeofday",
            "process_vm_writev",
            "pidfd_getfd",
            "socket",
            "socketcall",
            "personality",
        ] {
            assert!(!default.contains(name), "{name} is allowed whatever its arguments");
        }
    }

    #[test]
    fn a_profile_of_the_node_is_read_and_its_name_stays_in_the_folder() {
        let folder = std::env::temp_dir().join(format!("berth-seccomp-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("in/deep")).unwrap();
        std::fs::write(folder.join("outside.json"), r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
        std::fs::write(folder.join("in/deep/a.json"), r#"{"defaultAction": "SCMP_ACT_LOG"}"#).unwrap();
        std::fs::write(folder.join("in/bad.json"), "{").unwrap();
        let directory = std::fs::File::open(folder.join("in")).unwrap();
        let read = |name: &str| localhost_profile(directory.as_fd(), name);
        assert_eq!(read("deep/a.json").unwrap().default_action(), LinuxSeccompAction::ScmpActLog);
        for name in ["../outside.json", "/outside.json", "gone.json", "deep/../../outside.json"] {
            assert!(matches!(read(name), Err(ProfileError::Missing { .. })), "{name}: {:?}", read(name));
        }
        assert!(matches!(read("bad.json"), Err(ProfileError::Malformed { .. })));
        for name in ["deep", ""] {
            assert!(read(name).is_err(), "{name:?}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
