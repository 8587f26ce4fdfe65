//! Linux capabilities: their numbers, the ones a bot has by default, and what a spec adds and drops.
//!
//! Sources: capabilities(7), `linux/capability.h`; default set and the meaning of ALL as containerd's CRI plugin has it.

use k8s_openapi::api::core::v1;
use oci_spec::runtime::{Capabilities, Capability};

use super::spec::SpecError;

/// Every capability at the place of its number in the kernel's sets.
const BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a bot holds when its spec says nothing: containerd's default.
pub const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// The capability of that number; `None` for one that Berth does not know.
pub fn by_number(number: usize) -> Option<Capability> {
    BY_NUMBER.get(number).copied()
}

/// The set that the kernel's number stands for, as in `CapEff` of `/proc/PID/status`.
pub fn from_bits(bits: u64) -> Capabilities {
    (0..BY_NUMBER.len()).filter(|bit| bits >> bit & 1 == 1).filter_map(by_number).collect()
}

/// What a bot holds: the default set, then `add: [ALL]`, `drop: [ALL]`, each added, each dropped, in this order.
///
/// A default or ALL that the node lacks is left out; one that is named is refused, since the bot asked for it and would
/// run without.
pub fn held(wanted: Option<&v1::Capabilities>, node: &Capabilities) -> Result<Capabilities, SpecError> {
    let none = Vec::new();
    let added = wanted.and_then(|c| c.add.as_ref()).unwrap_or(&none);
    let dropped = wanted.and_then(|c| c.drop.as_ref()).unwrap_or(&none);

    let mut held: Capabilities = DEFAULT.into_iter().filter(|cap| node.contains(cap)).collect();
    if added.iter().any(|name| is_all(name)) {
        held = node.clone();
    }
    if dropped.iter().any(|name| is_all(name)) {
        held.clear();
    }
    for (i, name) in added.iter().enumerate().filter(|(_, name)| !is_all(name)) {
        let field = format!("spec.securityContext.capabilities.add[{i}]");
        let cap = parse(name).ok_or_else(|| unknown(&field, name))?;
        if !node.contains(&cap) {
            let why = "is not held by the node's own agent and runtime";
            return Err(SpecError::new(
                &field,
                name,
                why,
                "leave it out, or give the node's agent and containerd this capability",
            ));
        }
        held.insert(cap);
    }
    for (i, name) in dropped.iter().enumerate().filter(|(_, name)| !is_all(name)) {
        let field = format!("spec.securityContext.capabilities.drop[{i}]");
        held.remove(&parse(name).ok_or_else(|| unknown(&field, name))?);
    }
    Ok(held)
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

fn unknown(field: &str, name: &str) -> SpecError {
    SpecError::new(field, name, "is no Linux capability", "use a name of capabilities(7) such as NET_ADMIN, or ALL")
}

/// `NET_ADMIN`, `CAP_NET_ADMIN`, in either case.
pub fn parse(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    BY_NUMBER.into_iter().find(|cap| cap.to_string() == bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(add: &[&str], drop: &[&str]) -> v1::Capabilities {
        let list = |names: &[&str]| Some(names.iter().map(|&n| n.to_owned()).collect());
        v1::Capabilities { add: list(add), drop: list(drop) }
    }

    fn set(names: &[&str]) -> Capabilities {
        names.iter().map(|n| parse(n).unwrap()).collect()
    }

    #[test]
    fn add_and_drop_mean_what_they_mean_in_a_pod() {
        let all = from_bits(u64::MAX);
        let mut default_and_admin: Capabilities = DEFAULT.into_iter().collect();
        default_and_admin.insert(Capability::NetAdmin);
        for (add, drop, result) in [
            (vec![], vec![], DEFAULT.into_iter().collect()),
            (vec!["NET_ADMIN"], vec![], default_and_admin.clone()),
            (vec!["cap_net_admin"], vec![], default_and_admin),
            (vec![], vec!["ALL"], set(&[])),
            (vec![], vec!["all"], set(&[])),
            (vec!["NET_BIND_SERVICE"], vec!["ALL"], set(&["NET_BIND_SERVICE"])),
            (vec!["ALL"], vec![], all.clone()),
            (vec!["ALL"], vec!["ALL"], set(&[])),
            (vec!["KILL"], vec!["ALL", "KILL"], set(&[])),
        ] {
            assert_eq!(held(Some(&wanted(&add, &drop)), &all).unwrap(), result, "add {add:?} drop {drop:?}");
        }
        assert_eq!(held(None, &all).unwrap(), DEFAULT.into_iter().collect::<Capabilities>());
    }

    #[test]
    fn what_the_node_lacks_never_gets_in() {
        let mut node = from_bits(u64::MAX);
        node.remove(&Capability::SysResource);
        node.remove(&Capability::Mknod);
        assert!(!held(None, &node).unwrap().contains(&Capability::Mknod));
        assert_eq!(held(Some(&wanted(&["ALL"], &[])), &node).unwrap(), node);
        let refused = held(Some(&wanted(&["KILL", "SYS_RESOURCE"], &[])), &node).unwrap_err();
        assert_eq!(refused.field(), "spec.securityContext.capabilities.add[1]");
        held(Some(&wanted(&[], &["SYS_RESOURCE"])), &node).unwrap();
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_field() {
        for name in ["SYS_FOO", "", "CAP_", "CAP_CAP_KILL", "NET ADMIN"] {
            let refused = held(Some(&wanted(&[], &[name])), &from_bits(u64::MAX)).unwrap_err();
            assert_eq!(refused.field(), "spec.securityContext.capabilities.drop[0]", "{name:?}");
        }
    }

    #[test]
    fn names_and_numbers_are_one_to_one() {
        for (i, cap) in BY_NUMBER.into_iter().enumerate() {
            assert_eq!(parse(&cap.to_string()), Some(cap));
            assert_eq!(from_bits(1 << i), [cap].into_iter().collect::<Capabilities>());
        }
    }
}
