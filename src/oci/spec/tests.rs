use std::path::Path;

use k8s_openapi::api::core::v1;
use proptest::prelude::*;

use super::*;
use crate::api::ids::BotUid;
use crate::oci::node::Machine;

/// A bot's spec from the fields that a test is about.
pub(crate) fn bot(fields: serde_json::Value) -> BotContainerSpec {
    let mut spec = serde_json::json!({"image": "example.com/bot:1"});
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

pub(crate) fn node() -> NodeFacts {
    let mut capabilities = capability::from_bits(u64::MAX);
    capabilities.remove(&oci_spec::runtime::Capability::SysResource);
    NodeFacts {
        cgroup: CgroupVersion::V1,
        swap_limit: true,
        machine: Machine::X86_64,
        capabilities,
        apparmor: None,
        selinux: false,
        oom_score_adj: 0,
        memory_bytes: 8 << 30,
        masked_paths: vec!["/sys/devices/system/cpu/cpu0/thermal_throttle".to_owned()],
        devices: vec![crate::oci::node::Device {
            path: "/dev/fuse".into(),
            block: false,
            major: 10,
            minor: 229,
            mode: 0o666,
            uid: 0,
            gid: 0,
        }],
        default_pids_limit: None,
    }
}

const ID: &str = "berth-2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11";

/// What a test changes of an otherwise usual input.
struct Case {
    bot: BotContainerSpec,
    image: RunConfig,
    env: Vec<(String, String)>,
    user: User,
    netns: NetworkNamespace<'static>,
    mounts: Vec<BindMount>,
    node: NodeFacts,
    hostname: String,
    cgroups_path: String,
    localhost: Option<LinuxSeccomp>,
}

fn case(fields: serde_json::Value) -> Case {
    Case {
        bot: bot(fields),
        image: RunConfig { cmd: vec!["run".to_owned()], ..RunConfig::default() },
        env: Vec::new(),
        user: User::default(),
        netns: NetworkNamespace::Path(Path::new("/run/netns/berth-x")),
        mounts: Vec::new(),
        node: node(),
        hostname: "web".to_owned(),
        cgroups_path: format!("/berth/{ID}"),
        localhost: None,
    }
}

impl Case {
    fn spec(&self) -> Result<Spec, SpecError> {
        let id = BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap().container_id();
        runtime_spec(&SpecInput {
            id: &id,
            hostname: &self.hostname,
            bot: &self.bot,
            image: &self.image,
            env: &self.env,
            user: &self.user,
            netns: self.netns,
            mounts: &self.mounts,
            cgroups_path: &self.cgroups_path,
            localhost_seccomp: self.localhost.as_ref(),
            node: &self.node,
        })
    }

    /// The spec as the runtime reads it.
    fn json(&self) -> serde_json::Value {
        serde_json::to_value(self.spec().unwrap()).unwrap()
    }

    fn refused_at(&self) -> String {
        self.spec().unwrap_err().field().to_owned()
    }
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|&w| w.to_owned()).collect()
}

#[test]
fn command_and_args_replace_the_images_as_in_a_pod() {
    for (entrypoint, cmd, command, args, result) in [
        (vec!["e"], vec!["c"], vec![], vec![], Some(vec!["e", "c"])),
        (vec![], vec!["c"], vec![], vec![], Some(vec!["c"])),
        (vec!["e"], vec!["c"], vec!["x"], vec![], Some(vec!["x"])),
        (vec!["e"], vec!["c"], vec![], vec!["a"], Some(vec!["e", "a"])),
        (vec!["e"], vec!["c"], vec!["x"], vec!["a"], Some(vec!["x", "a"])),
        (vec![], vec![], vec![], vec!["a"], Some(vec!["a"])),
        (vec![], vec![], vec![], vec![], None),
        (vec![], vec![], vec![""], vec![], None),
        (vec![""], vec!["c"], vec![], vec![], None),
        (vec!["e\0"], vec![], vec![], vec![], None),
    ] {
        let mut case = case(serde_json::json!({"command": command, "args": args}));
        case.image = RunConfig { entrypoint: words(&entrypoint), cmd: words(&cmd), ..RunConfig::default() };
        let made = case.spec().ok().map(|s| s.process().as_ref().unwrap().args().clone().unwrap());
        assert_eq!(made, result.map(|r| words(&r)), "{entrypoint:?} {cmd:?} {command:?} {args:?}");
    }
}

#[test]
fn variables_are_expanded_in_command_and_args_but_not_in_the_images_words() {
    let mut case = case(serde_json::json!({"command": ["$(A)"], "args": ["$$(A)", "$(B)", "-$(A)-"]}));
    case.env = vec![("A".to_owned(), "1".to_owned())];
    case.image.env = words(&["B=image"]);
    assert_eq!(case.json()["process"]["args"], serde_json::json!(["1", "$(A)", "$(B)", "-1-"]));
    case.bot = bot(serde_json::json!({}));
    case.image.cmd = words(&["$(A)"]);
    assert_eq!(case.json()["process"]["args"], serde_json::json!(["$(A)"]));
}

#[test]
fn the_working_directory_is_the_specs_else_the_images_else_the_root() {
    for (spec, image, result) in [
        ("", "", Some("/")),
        ("", "/app/", Some("/app")),
        ("", "app", Some("/app")),
        ("/data/../x//.", "/app", Some("/x")),
        ("/../../..", "", Some("/")),
        ("data", "", None),
        ("/proc/self/fd/8", "", None),
        ("", "/proc/self/fd/8", None),
        ("", "proc/self/fd/8", None),
        ("/x/../proc/self/fd/8", "", None),
        ("/dev/fd/8", "", None),
        ("/process", "", Some("/process")),
        ("/a\0b", "", None),
    ] {
        let mut case = case(serde_json::json!({"workingDir": spec}));
        case.image.working_dir = image.to_owned();
        let made = case.spec().ok().map(|s| s.process().as_ref().unwrap().cwd().clone());
        assert_eq!(made, result.map(PathBuf::from), "spec {spec:?}, image {image:?}");
    }
}

#[test]
fn a_bot_that_asks_nothing_gets_the_defaults() {
    let spec = case(serde_json::json!({})).json();
    let process = &spec["process"];
    assert_eq!(process["noNewPrivileges"], true);
    assert_eq!(process["oomScoreAdj"], 1000);
    assert!(process.get("rlimits").is_none() && process.get("apparmorProfile").is_none());
    let mut caps: Vec<_> = capability::DEFAULT.iter().map(|c| format!("CAP_{c}")).collect();
    caps.sort();
    for set in ["bounding", "effective", "permitted"] {
        let mut held: Vec<String> = serde_json::from_value(process["capabilities"][set].clone()).unwrap();
        held.sort();
        assert_eq!(held, caps, "{set}");
    }
    for set in ["inheritable", "ambient"] {
        assert!(process["capabilities"].get(set).is_none(), "{set}");
    }
    assert_eq!(spec["root"]["path"], "rootfs");
    assert_eq!(spec["root"]["readonly"], false);
    assert_eq!(spec["hostname"], "web");
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(spec["linux"]["cgroupsPath"], format!("/berth/{ID}"));
    assert_eq!(
        spec["linux"]["resources"]["devices"][0],
        serde_json::json!({"allow": false, "type": "a", "access": "rwm"})
    );
    let masked: Vec<String> = serde_json::from_value(spec["linux"]["maskedPaths"].clone()).unwrap();
    assert!(masked.contains(&"/proc/kcore".to_owned()));
    assert!(masked.contains(&"/sys/devices/system/cpu/cpu0/thermal_throttle".to_owned()));
    let kinds: Vec<_> = spec["linux"]["namespaces"].as_array().unwrap().iter().map(|n| n["type"].clone()).collect();
    assert_eq!(kinds, ["pid", "ipc", "mount", "uts", "network"]);
    let mounted: Vec<_> = spec["mounts"].as_array().unwrap().iter().map(|m| m["destination"].clone()).collect();
    assert_eq!(mounted, ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"]);
}

#[test]
fn namespaces_follow_network_and_cgroup_version() {
    let kinds = |case: &Case| -> Vec<(String, Option<String>)> {
        let list = case.json()["linux"]["namespaces"].as_array().unwrap().clone();
        list.iter()
            .map(|n| (n["type"].as_str().unwrap().to_owned(), n["path"].as_str().map(str::to_owned)))
            .filter(|(kind, _)| ["network", "uts", "cgroup"].contains(&kind.as_str()))
            .collect()
    };
    let named = |k: &str| (k.to_owned(), None);
    let mut case = case(serde_json::json!({}));
    assert_eq!(kinds(&case), [named("uts"), ("network".to_owned(), Some("/run/netns/berth-x".to_owned()))]);
    case.netns = NetworkNamespace::Loopback;
    assert_eq!(kinds(&case), [named("uts"), named("network")]);
    case.netns = NetworkNamespace::Host;
    assert_eq!(kinds(&case), []);
    assert!(case.json().get("hostname").is_none(), "runc refuses a host name without a uts namespace");
    case.node.cgroup = CgroupVersion::V2;
    assert_eq!(kinds(&case), [named("cgroup")]);
}

#[test]
fn privilege_escalation_is_off_unless_asked_for() {
    for (security, result) in [
        (serde_json::json!({}), Some(true)),
        (serde_json::json!({"allowPrivilegeEscalation": false}), Some(true)),
        (serde_json::json!({"allowPrivilegeEscalation": true}), Some(false)),
        (serde_json::json!({"privileged": true}), Some(false)),
        (serde_json::json!({"privileged": true, "allowPrivilegeEscalation": true}), Some(false)),
        (serde_json::json!({"privileged": true, "allowPrivilegeEscalation": false}), None),
        (serde_json::json!({"capabilities": {"add": ["SYS_ADMIN"]}}), Some(false)),
        // Was refused as InvalidSpec, after the API server had taken it; a Pod runs so.
        (serde_json::json!({"capabilities": {"add": ["SYS_ADMIN"]}, "allowPrivilegeEscalation": false}), Some(true)),
        (serde_json::json!({"capabilities": {"add": ["NET_ADMIN"]}}), Some(true)),
    ] {
        let made = case(serde_json::json!({"securityContext": security})).spec();
        let made = made.map(|s| s.process().as_ref().unwrap().no_new_privileges()).ok().flatten();
        assert_eq!(made, result, "{security}");
    }
}

#[test]
fn a_privileged_bot_has_the_rights_of_the_host_and_no_more_than_the_node() {
    let case = case(serde_json::json!({"securityContext": {"privileged": true}}));
    let spec = case.spec().unwrap();
    let held = spec.process().as_ref().unwrap().capabilities().as_ref().unwrap().bounding().clone().unwrap();
    assert_eq!(held, case.node.capabilities);
    let json = case.json();
    assert!(json["linux"].get("seccomp").is_none());
    assert_eq!(json["linux"]["maskedPaths"], serde_json::json!([]));
    assert_eq!(json["linux"]["readonlyPaths"], serde_json::json!([]));
    assert_eq!(json["linux"]["devices"][0]["path"], "/dev/fuse");
    assert_eq!(
        json["linux"]["resources"]["devices"],
        serde_json::json!([{"allow": true, "type": "a", "access": "rwm"}])
    );
    for mount in json["mounts"].as_array().unwrap() {
        let options = mount["options"].as_array().unwrap();
        assert!(!options.contains(&"ro".into()), "{mount}");
    }
}

#[test]
fn proc_mount_is_default_or_unmasked() {
    let proc = |kind: &str| case(serde_json::json!({"securityContext": {"procMount": kind}}));
    assert_eq!(proc("Unmasked").json()["linux"]["maskedPaths"], serde_json::json!([]));
    assert_ne!(proc("Default").json()["linux"]["maskedPaths"], serde_json::json!([]));
    assert_eq!(proc("unmasked").refused_at(), "spec.securityContext.procMount");
}

#[test]
fn seccomp_profiles_are_chosen_by_type() {
    let profile = |p: serde_json::Value| case(serde_json::json!({"securityContext": {"seccompProfile": p}}));
    let none = serde_json::Value::Null;
    assert_eq!(profile(serde_json::json!({"type": "Unconfined"})).json()["linux"]["seccomp"], none);
    assert_ne!(profile(serde_json::json!({"type": "RuntimeDefault"})).json()["linux"]["seccomp"], none);
    let mut own = profile(serde_json::json!({"type": "Localhost", "localhostProfile": "a.json"}));
    assert_eq!(own.refused_at(), "spec.securityContext.seccompProfile.localhostProfile");
    own.localhost = serde_json::from_value(serde_json::json!({"defaultAction": "SCMP_ACT_LOG"})).unwrap();
    assert_eq!(own.json()["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_LOG");
    let unnamed =
        Case { bot: bot(serde_json::json!({"securityContext": {"seccompProfile": {"type": "Localhost"}}})), ..own };
    assert_eq!(unnamed.refused_at(), "spec.securityContext.seccompProfile.localhostProfile");
    assert_eq!(profile(serde_json::json!({"type": "x"})).refused_at(), "spec.securityContext.seccompProfile.type");
}

#[test]
fn apparmor_profiles_are_chosen_by_type_and_node() {
    let loaded = |names: &[&str]| Some(names.iter().map(|&n| n.to_owned()).collect());
    for (profile, node, result) in [
        (None, None, Ok(None)),
        (None, loaded(&[]), Ok(None)),
        (None, loaded(&["cri-containerd.apparmor.d"]), Ok(Some("cri-containerd.apparmor.d"))),
        (Some(("Unconfined", None)), loaded(&["cri-containerd.apparmor.d"]), Ok(None)),
        (Some(("RuntimeDefault", None)), None, Err("type")),
        (Some(("RuntimeDefault", None)), loaded(&["mine"]), Err("type")),
        (Some(("RuntimeDefault", None)), loaded(&["docker-default"]), Ok(Some("docker-default"))),
        (Some(("Localhost", Some("mine"))), loaded(&["mine"]), Ok(Some("mine"))),
        (Some(("Localhost", Some("other"))), loaded(&["mine"]), Err("localhostProfile")),
        (Some(("Localhost", None)), loaded(&["mine"]), Err("localhostProfile")),
        (Some(("odd", None)), loaded(&["mine"]), Err("type")),
    ] {
        let mut case = case(serde_json::json!({}));
        case.node.apparmor = node.clone();
        case.bot.security_context = Some(SecurityContext {
            app_armor_profile: profile.map(|(type_, name)| v1::AppArmorProfile {
                type_: type_.to_owned(),
                localhost_profile: name.map(str::to_owned),
            }),
            ..SecurityContext::default()
        });
        match (case.spec(), result) {
            (Ok(spec), Ok(name)) => {
                assert_eq!(spec.process().as_ref().unwrap().apparmor_profile().as_deref(), name, "{profile:?} {node:?}")
            }
            (Err(e), Err(field)) => {
                assert_eq!(e.field(), format!("spec.securityContext.appArmorProfile.{field}"), "{profile:?}")
            }
            (made, _) => panic!("{profile:?} on {node:?}: {:?}", made.map(|_| ())),
        }
    }
}

#[test]
fn selinux_labels_are_set_where_the_node_has_selinux() {
    let options = serde_json::json!({"securityContext": {"seLinuxOptions": {"level": "s0:c1,c2", "type": "bot_t"}}});
    let mut case = case(options);
    assert!(case.json()["process"].get("selinuxLabel").is_none());
    case.node.selinux = true;
    assert_eq!(case.json()["process"]["selinuxLabel"], "system_u:system_r:bot_t:s0:c1,c2");
    assert_eq!(case.json()["linux"]["mountLabel"], "system_u:object_r:container_file_t:s0:c1,c2");
    case.bot = bot(serde_json::json!({"securityContext": {"seLinuxOptions": {"type": "a:b"}}}));
    assert_eq!(case.refused_at(), "spec.securityContext.seLinuxOptions.type");
    case.bot = bot(serde_json::json!({}));
    assert!(case.json()["process"].get("selinuxLabel").is_none());
}

fn bind(destination: &str) -> BindMount {
    BindMount { source: "/run/berth/x".into(), destination: destination.to_owned(), read_only: true }
}

#[test]
fn mounts_come_after_the_usual_ones_and_shallow_before_deep() {
    let mut case = case(serde_json::json!({}));
    case.mounts = vec![bind("/a/b/c"), bind("/etc/hosts"), bind("/a"), bind("/etc/resolv.conf")];
    let json = case.json();
    let order: Vec<_> = json["mounts"].as_array().unwrap()[7..].iter().map(|m| m["destination"].clone()).collect();
    assert_eq!(order, ["/a", "/etc/hosts", "/etc/resolv.conf", "/a/b/c"]);
    assert_eq!(json["mounts"][7]["options"], serde_json::json!(["rbind", "rprivate", "nosuid", "nodev", "ro"]));
}

#[test]
fn a_mount_that_would_hide_the_kernels_own_is_refused() {
    for path in ["/", "//", "/x/..", "/proc/1", "/proc", "/x/../sys/kernel", "/dev/null", "etc/x", "", "/a\0"] {
        let mut case = case(serde_json::json!({}));
        case.mounts = vec![bind(path)];
        assert_eq!(case.refused_at(), "spec.files", "{path:?} was taken");
    }
    let mut twice = case(serde_json::json!({}));
    twice.mounts = vec![bind("/etc/x"), bind("/etc//x")];
    assert_eq!(twice.refused_at(), "spec.files");
}

#[test]
fn a_read_only_root_leaves_the_data_writable() {
    let mut case =
        case(serde_json::json!({"securityContext": {"readOnlyRootFilesystem": true}, "data": {"path": "/srv/data"}}));
    case.mounts = vec![bind("/srv/data/x"), bind("/etc/hosts")];
    let json = case.json();
    assert_eq!(json["root"]["readonly"], true);
    let binds = &json["mounts"].as_array().unwrap()[7..];
    let order: Vec<_> = binds.iter().map(|m| m["destination"].clone()).collect();
    assert_eq!(order, ["/srv/data", "/etc/hosts", "/srv/data/x"]);
    assert_eq!(binds[0]["source"], "rootfs/srv/data");
    assert_eq!(binds[0]["options"], serde_json::json!(["bind", "rprivate", "rw"]));
}

#[test]
fn host_names_fit_the_kernel() {
    for name in ["", "a b", "a/b", "ü", "a\0", &"a".repeat(65)] {
        let mut case = case(serde_json::json!({}));
        case.hostname = name.to_owned();
        assert_eq!(case.refused_at(), "spec.network.hostname", "{name:?} was taken");
    }
}

#[test]
fn a_cgroup_is_the_bots_own() {
    for (path, fits) in [
        (format!("/berth/{ID}"), true),
        (format!("berth.slice:cri:{ID}"), true),
        (format!("berth/{ID}"), false),
        ("/berth".to_owned(), false),
        (String::new(), false),
    ] {
        let mut case = case(serde_json::json!({}));
        case.cgroups_path = path.clone();
        assert_eq!(case.spec().is_ok(), fits, "{path:?}");
    }
}

#[test]
fn the_user_is_as_resolved() {
    let mut case = case(serde_json::json!({}));
    case.user = User { uid: 7, gid: 8, additional_gids: vec![8, 9], home: Some("/home/x".to_owned()) };
    let json = case.json();
    assert_eq!(json["process"]["user"], serde_json::json!({"uid": 7, "gid": 8, "additionalGids": [8, 9]}));
    assert!(json["process"]["env"].as_array().unwrap().contains(&"HOME=/home/x".into()));
}

#[test]
fn more_words_than_the_kernel_passes_on_are_refused() {
    let mut case = case(serde_json::json!({}));
    case.env = (0..20).map(|i| (format!("V{i}"), "x".repeat(120_000))).collect();
    let refused = case.spec().unwrap_err();
    assert!(refused.to_string().contains("2097152"), "{refused}");
    case.env.truncate(10);
    case.spec().unwrap();
    case.image.cmd = vec!["x".repeat(MAX_STRING + 1)];
    assert_eq!(case.refused_at(), "the image's Entrypoint and Cmd");
}

#[test]
fn equal_input_makes_an_equal_spec() {
    let case = case(serde_json::json!({"resources": {"limits": {"cpu": "1", "memory": "64Mi"}}}));
    assert_eq!(case.spec().unwrap(), case.spec().unwrap());
}

#[test]
fn an_error_names_field_value_and_what_is_right() {
    let refused = case(serde_json::json!({"securityContext": {"procMount": "Odd"}})).spec().unwrap_err();
    assert_eq!(
        refused.to_string(),
        "spec.securityContext.procMount: \"Odd\" is no kind of /proc; use Default or Unmasked"
    );
    assert_eq!(refused.reason(), Reason::InvalidSpec);
    assert!(!refused.retryable());
}

fn any_security() -> impl Strategy<Value = SecurityContext> {
    let names = ["ALL", "all", "SYS_ADMIN", "CAP_KILL", "net_raw", "SYS_RESOURCE", "", "ODD"];
    let list = || proptest::option::of(proptest::collection::vec(proptest::sample::select(names.to_vec()), 0..4));
    let flag = || proptest::option::of(any::<bool>());
    (
        list(),
        list(),
        flag(),
        flag(),
        flag(),
        proptest::option::of("Default|Unmasked|x"),
        proptest::option::of("RuntimeDefault|Unconfined|x"),
    )
        .prop_map(|(add, drop, privileged, escalation, read_only, proc_mount, seccomp)| {
            let owned = |l: Option<Vec<&str>>| l.map(|l| l.into_iter().map(str::to_owned).collect());
            SecurityContext {
                capabilities: Some(v1::Capabilities { add: owned(add), drop: owned(drop) }),
                privileged,
                allow_privilege_escalation: escalation,
                read_only_root_filesystem: read_only,
                proc_mount,
                seccomp_profile: seccomp.map(|type_| v1::SeccompProfile { type_, localhost_profile: None }),
                ..SecurityContext::default()
            }
        })
}

proptest! {
    /// Whatever a bot asks for: it is refused at a field, or gets a spec that holds these.
    #[test]
    fn no_bot_gets_what_the_node_lacks_or_loses_its_confinement_unasked(
        security in any_security(), dir in "\\PC{0,12}|(/(\\.\\.|proc|dev|a)){0,4}", mount in "(/(\\.\\.|proc|etc)){0,3}",
    ) {
        let mut case = case(serde_json::json!({}));
        case.bot.security_context = Some(security.clone());
        case.bot.working_dir = Some(dir);
        case.mounts = vec![bind(&mount)];
        match case.spec() {
            Err(refused) => prop_assert!(!refused.field().is_empty()),
            Ok(spec) => {
                let process = spec.process().as_ref().unwrap();
                let held = process.capabilities().as_ref().unwrap().bounding().clone().unwrap();
                prop_assert!(held.is_subset(&case.node.capabilities));
                let privileged = security.privileged == Some(true);
                let linux = spec.linux().as_ref().unwrap();
                let unconfined = security.seccomp_profile.is_some_and(|p| p.type_ == "Unconfined");
                prop_assert_eq!(linux.seccomp().is_none(), privileged || unconfined);
                prop_assert_eq!(process.no_new_privileges() == Some(true) && privileged, false);
                prop_assert!(process.cwd().is_absolute() && !process.cwd().starts_with("/proc"));
                for mount in spec.mounts().as_ref().unwrap().iter().skip(7) {
                    prop_assert!(!mount.destination().starts_with("/proc") && mount.destination() != Path::new("/"));
                }
                let again: Spec = serde_json::from_value(serde_json::to_value(&spec).unwrap()).unwrap();
                prop_assert_eq!(again, spec);
            }
        }
    }
}
