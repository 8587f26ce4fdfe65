//! The cases of `admit_rules`: for each rule what it accepts, and what it refuses at which field in which words.

use berth::api::rule::Kind;
use serde_json::{Value, json};

/// A value that is refused.
pub struct Bad {
    /// Laid over the kind's smallest object, or over what is stored.
    pub value: Value,
    /// The field that the refusal names, as the API server writes it.
    pub field: &'static str,
    /// Words of the refusal.
    pub words: &'static str,
}

/// What one rule accepts and refuses.
pub struct Case {
    pub rule: &'static str,
    pub kind: Kind,
    /// What is stored before, where the rule is on a change.
    pub before: Option<Value>,
    pub good: Vec<Value>,
    pub bad: Vec<Bad>,
}

impl Case {
    fn new(kind: Kind, rule: &'static str) -> Self {
        Self { rule, kind, before: None, good: Vec::new(), bad: Vec::new() }
    }

    /// The smallest object of the kind.
    pub fn base(&self, number: usize) -> Value {
        let name = format!("case-{number}");
        let spec = match self.kind {
            Kind::BotContainer => json!({"image": "docker.io/library/busybox:1"}),
            Kind::BotSnapshot => json!({"botContainerName": "web"}),
            Kind::BotRecord => json!({"botId": name}),
            Kind::BotNode => json!({}),
        };
        json!({"apiVersion": "berth.dev/v1alpha1", "kind": format!("{:?}", self.kind), "metadata": {"name": name}, "spec": spec})
    }

    fn from(mut self, before: Value) -> Self {
        self.before = Some(before);
        self
    }

    /// From a spec, bound to node-1.
    fn placed(self, spec: Value) -> Self {
        self.from(json!({"spec": spec, "status": {"nodeName": "node-1"}}))
    }

    fn takes(mut self, spec: Value) -> Self {
        self.good.push(json!({"spec": spec}));
        self
    }

    fn takes_all(self, specs: impl IntoIterator<Item = Value>) -> Self {
        specs.into_iter().fold(self, Self::takes)
    }

    fn takes_object(mut self, value: Value) -> Self {
        self.good.push(value);
        self
    }

    fn refuses(mut self, spec: Value, field: &'static str, words: &'static str) -> Self {
        self.bad.push(Bad { value: json!({"spec": spec}), field, words });
        self
    }

    fn refuses_all(self, specs: impl IntoIterator<Item = Value>, field: &'static str, words: &'static str) -> Self {
        specs.into_iter().fold(self, |case, spec| case.refuses(spec, field, words))
    }

    fn refuses_object(mut self, value: Value, field: &'static str, words: &'static str) -> Self {
        self.bad.push(Bad { value, field, words });
        self
    }
}

fn bot(rule: &'static str) -> Case {
    Case::new(Kind::BotContainer, rule)
}

fn snapshot(rule: &'static str) -> Case {
    Case::new(Kind::BotSnapshot, rule)
}

fn record(rule: &'static str) -> Case {
    Case::new(Kind::BotRecord, rule)
}

fn node(rule: &'static str) -> Case {
    Case::new(Kind::BotNode, rule)
}

/// A field that holds another object's name.
fn names(case: Case, field: &'static str, spec: impl Fn(&str) -> Value) -> Case {
    let long = "a".repeat(253);
    let good = ["a", "web-1", "web.example.com", &long].map(&spec);
    let bad = ["", "Web", "web_1", "-web", "web-", "web..com", ".web", "../web", "a/b", "web\n"].map(&spec);
    case.takes_all(good).refuses_all(bad, field, "must be the name of")
}

/// A field that holds a key of a Secret or ConfigMap.
fn keys(case: Case, field: &'static str, spec: impl Fn(&str) -> Value) -> Case {
    let good = ["key", "KEY_1", "bot.toml", ".hidden", "a-b"].map(&spec);
    let bad = ["", ".", "..", "..data", "a/b", "a b", "ä"].map(&spec);
    case.takes_all(good).refuses_all(bad, field, "must be a key of a Secret or ConfigMap")
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(identity());
    all.extend(process());
    all.extend(resources());
    all.extend(security());
    all.extend(placement());
    all.extend(network());
    all.extend(data());
    all.extend(files_and_skills());
    all.extend(others());
    all
}

fn identity() -> Vec<Case> {
    let image = |text: &str| json!({"image": text});
    let digest = format!("node@sha256:{}", "0123456789abcdef".repeat(4));
    vec![
        bot("bot-id-label")
            .takes_all(
                ["a", "7c6b1d0e-8f0c-4d7e-9a55-0f6a3d1f2b11", "0", &"a".repeat(63)].map(|id| json!({"botId": id})),
            )
            .refuses_all(
                ["", "Web", "web.com", "-web", "web-", "a b", "../a", "a\n", "ä"].map(|id| json!({"botId": id})),
                "spec.botId",
                "must be a DNS label",
            ),
        bot("bot-id-immutable")
            .from(json!({"spec": {"botId": "one"}}))
            .takes(json!({"image": "other"}))
            .refuses(json!({"botId": "two"}), "spec.botId", "is immutable: it is one and cannot become two")
            .refuses(json!({"botId": null}), "spec.botId", "is one and cannot become unset (the uid of this object)"),
        bot("bot-id-immutable").from(json!({})).takes(json!({"image": "other"})).refuses(
            json!({"botId": "two"}),
            "spec.botId",
            "it is unset (the uid of this object) and cannot become two",
        ),
        bot("image-reference")
            .takes_all(
                [
                    "nginx",
                    "nginx:1.27",
                    "library/nginx",
                    "docker.io/library/node:22",
                    "localhost:5000/a/b:c",
                    "127.0.0.1:5000/a",
                    "[::1]:5000/a",
                    "registry.example.com:443/team-a/bot_1.x:V1.2-rc",
                    "ghcr.io/a__b/c",
                    &digest,
                    &format!("localhost:5000/{digest}"),
                ]
                .map(image),
            )
            .refuses_all(
                [
                    "",
                    " ",
                    "node 22",
                    "Node",
                    "docker.io/Library/node",
                    "https://docker.io/library/node",
                    "node:",
                    "node:a:b",
                    "node@sha256:123",
                    "node:ä",
                    "/node",
                    "node/",
                    "a//b",
                    "../node",
                    "node\n",
                    "-node",
                    &digest.to_uppercase().replace("NODE@SHA256", "node@sha256"),
                    &digest.replace("sha256", "sha512"),
                    &digest[.."node@sha256:".len() + 63],
                    &digest["node@sha256:".len()..],
                ]
                .map(image),
                "spec.image",
                "must be an image reference",
            ),
        names(bot("pull-secret-name"), "spec.imagePullSecrets[0].name", |n| json!({"imagePullSecrets": [{"name": n}]})),
    ]
}

fn process() -> Vec<Case> {
    let env = |entry: Value| json!({"env": [entry]});
    let source = |from: Value| json!({"env": [{"name": "A", "valueFrom": from}]});
    let text = |size: usize| "x".repeat(size);
    let four = |each: usize, last: usize| json!([text(each), text(each), text(each), text(last)]);
    let resource = |resource: &str, divisor: Value| {
        source(json!({"resourceFieldRef": {"resource": resource, "divisor": divisor}}))
    };
    vec![
        bot("command-program").takes_all([json!({"command": []}), json!({"command": ["sh", ""]})]).refuses_all(
            [json!({"command": [""]}), json!({"command": ["", "sh"]})],
            "spec.command",
            "must begin with the path or name of a program",
        ),
        bot("working-dir-names").takes(json!({"workingDir": format!("/{}", text(255))})).refuses_all(
            [json!({"workingDir": format!("/{}", text(256))}), json!({"workingDir": format!("/a/{}/b", "ä".repeat(256))})],
            "spec.workingDir",
            "longer than 255 characters",
        ),
        bot("command-nul").takes(json!({"command": ["sh", "", "ä\n"]})).refuses(
            json!({"command": ["sh", "a\u{0}b"]}),
            "spec.command[1]",
            "must not contain a NUL",
        ),
        bot("args-nul").takes(json!({"args": ["", "$(A)"]})).refuses(
            json!({"args": ["a\u{0}b"]}),
            "spec.args[0]",
            "must not contain a NUL",
        ),
        bot("command-total").takes(json!({"command": four(32_768, 32_768)})).refuses(
            json!({"command": [text(32_768), text(32_768), text(32_768), text(32_768), "x"]}),
            "spec.command",
            "command must not be larger than 131072 bytes",
        ),
        bot("args-total")
            .takes(json!({"args": four(32_768, 32_768)}))
            // Bytes, not characters.
            .refuses(json!({"args": ["ä".repeat(32_768), "ä".repeat(32_768), "x"]}), "spec.args", "args must not be larger than 131072 bytes"),
        bot("working-dir-absolute")
            .takes_all([json!({"workingDir": "/"}), json!({"workingDir": "/data/a b"})])
            .refuses_all(
                [json!({"workingDir": ""}), json!({"workingDir": "data"}), json!({"workingDir": "/a\u{0}"})],
                "spec.workingDir",
                "must be an absolute path",
            ),
        bot("env-name")
            .takes_all(["A", "a.b-c", "1", "A B", "_", "!\"#$%&'()~"].map(|n| env(json!({"name": n, "value": "v"}))))
            .refuses_all(
                ["", "A=B", "ä", "A\n", "A\u{0}"].map(|n| env(json!({"name": n, "value": "v"}))),
                "spec.env[0].name",
                "printable ASCII characters other than '='",
            ),
        bot("env-value-nul").takes(env(json!({"name": "A", "value": "ä\n"}))).refuses(
            env(json!({"name": "A", "value": "\u{0}"})),
            "spec.env[0].value",
            "must not contain a NUL",
        ),
        bot("env-total")
            .takes(json!({"env": (0..4).map(|i| json!({"name": format!("E{i}"), "value": text(32_768)})).collect::<Value>()}))
            .refuses(
                json!({"env": (0..5).map(|i| json!({"name": format!("E{i}"), "value": text(32_000)})).collect::<Value>()}),
                "spec.env",
                "must not be larger than 131072 bytes",
            ),
        bot("env-value-or-source")
            .takes_all([
                env(json!({"name": "A"})),
                env(json!({"name": "A", "value": "", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})),
            ])
            .refuses(
                env(json!({"name": "A", "value": "v", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})),
                "spec.env[0].valueFrom",
                "must not be set beside value in the entry A",
            ),
        bot("env-one-source")
            .takes(source(json!({"secretKeyRef": {"name": "a", "key": "b", "optional": true}})))
            .refuses(source(json!({})), "spec.env[0].valueFrom", "must have exactly one of configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef, and has none")
            .refuses(
                source(json!({"secretKeyRef": {"name": "a", "key": "b"}, "configMapKeyRef": {"name": "a", "key": "b"}})),
                "spec.env[0].valueFrom",
                "and has more than one",
            ),
        bot("env-no-file-source").takes(source(json!({"configMapKeyRef": {"name": "a", "key": "b"}}))).refuses(
            source(json!({"fileKeyRef": {"volumeName": "a", "path": "b", "key": "c"}})),
            "spec.env[0].valueFrom.fileKeyRef",
            "a bot has no volumes",
        ),
        names(bot("env-config-map-name"), "spec.env[0].valueFrom.configMapKeyRef.name", |n| {
            source(json!({"configMapKeyRef": {"name": n, "key": "k"}}))
        }),
        keys(bot("env-config-map-key"), "spec.env[0].valueFrom.configMapKeyRef.key", |k| {
            source(json!({"configMapKeyRef": {"name": "n", "key": k}}))
        }),
        names(bot("env-secret-name"), "spec.env[0].valueFrom.secretKeyRef.name", |n| {
            source(json!({"secretKeyRef": {"name": n, "key": "k"}}))
        }),
        keys(bot("env-secret-key"), "spec.env[0].valueFrom.secretKeyRef.key", |k| {
            source(json!({"secretKeyRef": {"name": "n", "key": k}}))
        }),
        bot("env-field-path")
            .takes_all(
                [
                    "metadata.name",
                    "metadata.namespace",
                    "metadata.uid",
                    "spec.nodeName",
                    "status.hostIP",
                    "status.hostIPs",
                    "status.podIP",
                    "status.podIPs",
                    "metadata.labels['app']",
                    "metadata.annotations['example.com/a_b']",
                ]
                .map(|p| source(json!({"fieldRef": {"fieldPath": p}}))),
            )
            .refuses_all(
                ["", "metadata", "metadata.labels", "metadata.labels[app]", "metadata.labels['']", "spec.serviceAccountName", "spec.image"]
                    .map(|p| source(json!({"fieldRef": {"fieldPath": p}}))),
                "spec.env[0].valueFrom.fieldRef.fieldPath",
                "must be metadata.name, metadata.namespace",
            ),
        bot("env-field-version")
            .takes(source(json!({"fieldRef": {"fieldPath": "metadata.name", "apiVersion": "v1"}})))
            .refuses(
                source(json!({"fieldRef": {"fieldPath": "metadata.name", "apiVersion": "v2"}})),
                "spec.env[0].valueFrom.fieldRef.apiVersion",
                "must be v1, or left out",
            ),
        bot("env-resource")
            .takes_all(["limits.cpu", "limits.memory", "limits.pids", "requests.cpu", "requests.memory"].map(|r| resource(r, json!("1"))))
            .refuses_all(
                ["limits", "cpu", "requests.pids", "limits.ephemeral-storage"].map(|r| resource(r, json!("1"))),
                "spec.env[0].valueFrom.resourceFieldRef.resource",
                "must be limits.cpu, limits.memory",
            ),
        bot("env-resource-divisor")
            .takes_all([
                source(json!({"resourceFieldRef": {"resource": "limits.cpu"}})),
                resource("limits.cpu", json!("1m")),
                resource("limits.cpu", json!(1)),
                resource("limits.memory", json!("1Mi")),
                resource("requests.memory", json!("0")),
            ])
            .refuses(resource("limits.cpu", json!("1Mi")), "spec.env[0].valueFrom.resourceFieldRef.divisor", "is 1Mi and must be 1 or 1m for cpu")
            .refuses(resource("limits.memory", json!(7)), "spec.env[0].valueFrom.resourceFieldRef.divisor", "is 7 and must be 1 or 1k"),
        bot("env-resource-container")
            .takes(source(json!({"resourceFieldRef": {"resource": "limits.cpu", "containerName": ""}})))
            .refuses(
                source(json!({"resourceFieldRef": {"resource": "limits.cpu", "containerName": "a"}})),
                "spec.env[0].valueFrom.resourceFieldRef.containerName",
                "a bot is one container",
            ),
        bot("env-from-one-source")
            .takes_all([json!({"envFrom": [{"secretRef": {"name": "a"}}]}), json!({"envFrom": [{"configMapRef": {"name": "a"}}]})])
            .refuses(json!({"envFrom": [{"prefix": "A"}]}), "spec.envFrom[0]", "exactly one of configMapRef and secretRef, and has none")
            .refuses(
                json!({"envFrom": [{"secretRef": {"name": "a"}, "configMapRef": {"name": "a"}}]}),
                "spec.envFrom[0]",
                "exactly one of configMapRef and secretRef, and has both",
            ),
        bot("env-from-prefix").takes(json!({"envFrom": [{"prefix": "A_", "secretRef": {"name": "a"}}]})).refuses(
            json!({"envFrom": [{"prefix": "A=", "secretRef": {"name": "a"}}]}),
            "spec.envFrom[0].prefix",
            "must be printable ASCII characters other than '='",
        ),
        names(bot("env-from-config-map-name"), "spec.envFrom[0].configMapRef.name", |n| {
            json!({"envFrom": [{"configMapRef": {"name": n}}]})
        }),
        names(bot("env-from-secret-name"), "spec.envFrom[0].secretRef.name", |n| {
            json!({"envFrom": [{"secretRef": {"name": n}}]})
        }),
        bot("restarted-at-time")
            .takes_all(
                ["2026-11-24T10:00:00Z", "2026-11-24T10:00:00.123456789+05:45", "0001-01-01T00:00:00Z", "8999-12-31T23:59:59-23:59"]
                    .map(|t| json!({"restartedAt": t})),
            )
            .refuses_all(
                [
                    "", "now", "2026-11-24", "2026-11-24 10:00:00Z", "2026-11-24T10:00:00", "2026-11-24t10:00:00z", "2026-11-24T10:00:00,5Z",
                    "2026-11-24T10:00:00.1234567891Z", "2026-13-24T10:00:00Z", "2026-02-30T10:00:00Z", "9999-12-31T23:59:59-23:59",
                ]
                .map(|t| json!({"restartedAt": t})),
                "spec.restartedAt",
                "must be a time in RFC 3339",
            ),
        time_zones(bot("timezone-name"), "spec.timezone", |z| json!({"timezone": z})),
    ]
}

fn time_zones(case: Case, field: &'static str, spec: impl Fn(&str) -> Value) -> Case {
    let good = [
        "Europe/Berlin",
        "Etc/UTC",
        "UTC",
        "Etc/GMT+12",
        "America/Argentina/Buenos_Aires",
        "America/Port-au-Prince",
        "EST5EDT",
    ];
    let bad = [
        "",
        "Local",
        "local",
        "/etc/localtime",
        "../etc/passwd",
        "Europe/../UTC",
        "Europe/",
        "Europe Berlin",
        "+01:00",
        "Europe//Berlin",
    ];
    case.takes_all(good.map(&spec)).refuses_all(bad.map(&spec), field, "must be a name of the tz database")
}

fn resources() -> Vec<Case> {
    let limits = |l: Value| json!({"resources": {"limits": l}});
    let requests = |r: Value| json!({"resources": {"requests": r}});
    let both = |key: &str, request: Value, limit: Value| json!({"resources": {"requests": {key: request}, "limits": {key: limit}}});
    let quantity = "must be a quantity from 0 to 1Ei";
    vec![
        bot("requests-keys").takes(requests(json!({"cpu": "1", "memory": "1Gi"}))).refuses_all(
            [requests(json!({"pids": "1"})), requests(json!({"nvidia.com/gpu": "1"}))],
            "spec.resources.requests",
            "may have cpu and memory only",
        ),
        bot("limits-keys").takes(limits(json!({"cpu": 1, "memory": "1Gi", "pids": "5"}))).refuses_all(
            [limits(json!({"ephemeral-storage": "1Gi"})), limits(json!({"CPU": "1"}))],
            "spec.resources.limits",
            "may have cpu, memory and pids only",
        ),
        bot("requests-quantity")
            .takes_all(["0", "100m", "1.5", "1e3", "2k"].map(|q| requests(json!({"cpu": q}))))
            .refuses_all(
                ["", "-1", "-100m", "1 000", "one", "1Kb", "1,5", "2Ei"].map(|q| requests(json!({"cpu": q}))),
                "spec.resources.requests[cpu]",
                quantity,
            ),
        bot("limits-quantity")
            .takes_all(
                [json!("64Mi"), json!("1.5Gi"), json!(64_000_000), json!("1e9")].map(|q| limits(json!({"memory": q}))),
            )
            .refuses_all(
                [json!("64MB"), json!("-64Mi"), json!(-64), json!("")].map(|q| limits(json!({"memory": q}))),
                "spec.resources.limits[memory]",
                quantity,
            ),
        bot("limit-cpu").takes(limits(json!({"cpu": "10m"}))).refuses(
            limits(json!({"cpu": "9m"})),
            "spec.resources.limits[cpu]",
            "is 9m and must be at least 10m",
        ),
        bot("limit-memory")
            .takes(limits(json!({"memory": "6Mi"})))
            .refuses(
                limits(json!({"memory": "512m"})),
                "spec.resources.limits[memory]",
                "is 512m and must be whole bytes, at least 6Mi",
            )
            .refuses(
                limits(json!({"memory": 6_291_455})),
                "spec.resources.limits[memory]",
                "is 6291455 and must be whole bytes, at least 6Mi",
            )
            .refuses(limits(json!({"memory": "0"})), "spec.resources.limits[memory]", "leave it out for no limit"),
        bot("request-memory").takes(requests(json!({"memory": "0"}))).refuses(
            requests(json!({"memory": "512m"})),
            "spec.resources.requests[memory]",
            "is 512m and must be whole bytes",
        ),
        bot("limit-pids")
            .takes_all([limits(json!({"pids": 1})), limits(json!({"pids": "4194304"})), limits(json!({"pids": "1k"}))])
            .refuses(
                limits(json!({"pids": 0})),
                "spec.resources.limits[pids]",
                "is 0 and must be a whole number from 1 to 4194304",
            )
            .refuses(limits(json!({"pids": "1.5"})), "spec.resources.limits[pids]", "is 1.5 and must be a whole number")
            .refuses(
                limits(json!({"pids": "4194305"})),
                "spec.resources.limits[pids]",
                "is 4194305 and must be a whole number",
            ),
        bot("request-cpu-within-limit")
            .takes_all([both("cpu", json!("1000m"), json!(1)), both("cpu", json!("1"), json!("2"))])
            .refuses(
                both("cpu", json!("1001m"), json!(1)),
                "spec.resources.requests[cpu]",
                "is 1001m and must not be more than limits.cpu, which is 1",
            ),
        bot("request-memory-within-limit").takes(both("memory", json!("1Gi"), json!("1024Mi"))).refuses(
            both("memory", json!("1Gi"), json!("1G")),
            "spec.resources.requests[memory]",
            "is 1Gi and must not be more than limits.memory, which is 1G",
        ),
    ]
}

fn security() -> Vec<Case> {
    let with = |c: Value| json!({"securityContext": c});
    let seccomp = |p: Value| json!({"securityContext": {"seccompProfile": p}});
    let apparmor = |p: Value| json!({"securityContext": {"appArmorProfile": p}});
    let types = "must be RuntimeDefault, Localhost or Unconfined";
    let selinux = |rule, field: &'static str, part: &str| {
        let label = |v: &str| json!({"securityContext": {"seLinuxOptions": {part: v}}});
        let (good, bad) = if part == "level" { ("s0-s0:c123,c456", "a/b") } else { ("container_t", "a:b") };
        bot(rule).takes_all(["", good].map(label)).refuses_all(
            [bad, "a b", "a\n", "ä", "a;b"].map(label),
            field,
            "must be one part of an SELinux label",
        )
    };
    vec![
        selinux("selinux-level", "spec.securityContext.seLinuxOptions.level", "level"),
        selinux("selinux-role", "spec.securityContext.seLinuxOptions.role", "role"),
        selinux("selinux-type", "spec.securityContext.seLinuxOptions.type", "type"),
        selinux("selinux-user", "spec.securityContext.seLinuxOptions.user", "user"),
        bot("privileged-escalates")
            .takes_all([
                with(json!({"privileged": true})),
                with(json!({"privileged": true, "allowPrivilegeEscalation": true})),
                with(json!({"privileged": false, "allowPrivilegeEscalation": false})),
            ])
            .refuses(
                with(json!({"privileged": true, "allowPrivilegeEscalation": false})),
                "spec.securityContext.allowPrivilegeEscalation",
                "must not be false when privileged is true",
            ),
        bot("non-root-user")
            .takes_all([
                with(json!({"runAsNonRoot": true})),
                with(json!({"runAsUser": 0})),
                with(json!({"runAsNonRoot": true, "runAsUser": 1})),
            ])
            .refuses(
                with(json!({"runAsNonRoot": true, "runAsUser": 0})),
                "spec.securityContext.runAsUser",
                "must not be 0 when runAsNonRoot is true",
            ),
        bot("capability-add")
            .takes(with(json!({"capabilities": {"add": ["NET_BIND_SERVICE", "SYS_PTRACE", "ALL", "net_admin"]}})))
            .refuses_all(
                ["CAP_NET_ADMIN", "cap_net_admin", "NET_ADMN", "NET ADMIN", "ALL\n", ""]
                    .map(|c| with(json!({"capabilities": {"add": [c]}}))),
                "spec.securityContext.capabilities.add[0]",
                "must be ALL or a capability of Linux",
            ),
        // Many manifests have it in small letters, and a Pod's runtime takes them.
        bot("capability-drop")
            .takes_all(["ALL", "all"].map(|c| with(json!({"capabilities": {"drop": [c]}}))))
            .refuses_all(
                ["any", "CAP_CHOWN"].map(|c| with(json!({"capabilities": {"drop": [c]}}))),
                "spec.securityContext.capabilities.drop[0]",
                "must be ALL or a capability of Linux",
            ),
        bot("proc-mount").takes(with(json!({"procMount": "Default"}))).refuses_all(
            [with(json!({"procMount": "Unmasked"})), with(json!({"procMount": "x"}))],
            "spec.securityContext.procMount",
            "must be Default, or left out",
        ),
        bot("seccomp-type")
            .takes_all([
                seccomp(json!({"type": "RuntimeDefault"})),
                seccomp(json!({"type": "Unconfined"})),
                seccomp(json!({"type": "Localhost", "localhostProfile": "a.json"})),
            ])
            .refuses(seccomp(json!({"type": "runtime/default"})), "spec.securityContext.seccompProfile.type", types),
        bot("seccomp-profile")
            .takes(seccomp(json!({"type": "Localhost", "localhostProfile": "a/b.json"})))
            .refuses(
                seccomp(json!({"type": "Localhost"})),
                "spec.securityContext.seccompProfile.localhostProfile",
                "must be set when type is Localhost",
            )
            .refuses(
                seccomp(json!({"type": "RuntimeDefault", "localhostProfile": "a"})),
                "spec.securityContext.seccompProfile.localhostProfile",
                "must not be set when type is RuntimeDefault",
            ),
        bot("seccomp-profile-path")
            .takes_all(["a", "a/b..c/d.json"].map(|p| seccomp(json!({"type": "Localhost", "localhostProfile": p}))))
            .refuses_all(
                ["/etc/a.json", "../a", "a/../b", "a/..", ".."]
                    .map(|p| seccomp(json!({"type": "Localhost", "localhostProfile": p}))),
                "spec.securityContext.seccompProfile.localhostProfile",
                "must be a relative path without '..'",
            ),
        bot("apparmor-type").takes(apparmor(json!({"type": "Unconfined"}))).refuses(
            apparmor(json!({"type": "unconfined"})),
            "spec.securityContext.appArmorProfile.type",
            types,
        ),
        bot("apparmor-profile")
            .takes(apparmor(json!({"type": "Localhost", "localhostProfile": "my-profile"})))
            .refuses(
                apparmor(json!({"type": "Localhost"})),
                "spec.securityContext.appArmorProfile.localhostProfile",
                "must be set when type is Localhost",
            )
            .refuses(
                apparmor(json!({"type": "Unconfined", "localhostProfile": "a"})),
                "spec.securityContext.appArmorProfile.localhostProfile",
                "must not be set when type is Unconfined",
            ),
        bot("apparmor-profile-name").takes(apparmor(json!({"type": "Localhost", "localhostProfile": "a b"}))).refuses(
            apparmor(json!({"type": "Localhost", "localhostProfile": " a"})),
            "spec.securityContext.appArmorProfile.localhostProfile",
            "without white space around it",
        ),
        bot("no-windows").takes(with(json!({"seLinuxOptions": {"level": "s0:c123,c456"}}))).refuses(
            with(json!({"windowsOptions": {"hostProcess": false}})),
            "spec.securityContext.windowsOptions",
            "bots run on Linux",
        ),
    ]
}

fn placement() -> Vec<Case> {
    let toleration = |t: Value| json!({"tolerations": [t]});
    let selector = |key: &str, value: &str| json!({"nodeSelector": {key: value}});
    let fixed = |rule, unplaced: Value, placed: Value, other: Value, field, words| {
        [
            // Not placed yet: all may change.
            bot(rule).from(json!({"spec": unplaced})).takes_all([placed.clone(), other.clone()]),
            bot(rule)
                .placed(placed.clone())
                .takes(json!({"image": "other"}))
                .refuses(other.clone(), field, words)
                .refuses(
                    placed.as_object().unwrap().keys().map(|k| (k.clone(), Value::Null)).collect(),
                    field,
                    "(it is on node node-1)",
                ),
            bot(rule).placed(json!({})).refuses(other, field, "(it is on node node-1)"),
        ]
    };
    let mut all = vec![
        names(bot("runtime-class-name"), "spec.runtimeClassName", |n| json!({"runtimeClassName": n})),
        names(bot("node-name"), "spec.nodeName", |n| json!({"nodeName": n})),
        bot("node-selector-key")
            .takes_all(
                ["a", "kubernetes.io/hostname", "A_b.c-d", &format!("{}/{}", "a".repeat(253), "b".repeat(63))]
                    .map(|k| selector(k, "v")),
            )
            .refuses_all(
                ["", "/a", "a/", "a b", "a/b/c", "-a", "A.com/b", &"a".repeat(64), &format!("{}/b", "a".repeat(316))]
                    .map(|k| selector(k, "v")),
                "spec.nodeSelector",
                "must have keys of labels",
            ),
        bot("node-selector-value").takes_all(["", "a", "A_b.c-d"].map(|v| selector("a", v))).refuses_all(
            ["-", "a b", "a/b", "ä"].map(|v| selector("a", v)),
            "spec.nodeSelector[a]",
            "must be a label's value",
        ),
        bot("toleration-key")
            .takes_all([
                toleration(json!({"key": "example.com/a", "operator": "Exists"})),
                toleration(json!({"key": "", "operator": "Exists"})),
            ])
            .refuses_all(
                ["a b", "/", "a/b/c"].map(|k| toleration(json!({"key": k, "operator": "Exists"}))),
                "spec.tolerations[0].key",
                "must be the key of a taint",
            ),
        bot("toleration-operator")
            .takes_all(["", "Equal", "Exists"].map(|o| toleration(json!({"key": "a", "operator": o}))))
            .refuses_all(
                ["exists", "Lt", "In"].map(|o| toleration(json!({"key": "a", "operator": o}))),
                "spec.tolerations[0].operator",
                "must be Equal or Exists",
            ),
        bot("toleration-any-key").takes(toleration(json!({"operator": "Exists"}))).refuses_all(
            [toleration(json!({})), toleration(json!({"operator": "Equal", "value": "a"}))],
            "spec.tolerations[0].operator",
            "must be Exists when key is empty",
        ),
        bot("toleration-no-value").takes(toleration(json!({"key": "a", "value": "b"}))).refuses(
            toleration(json!({"key": "a", "operator": "Exists", "value": "b"})),
            "spec.tolerations[0].value",
            "must be empty when operator is Exists",
        ),
        bot("toleration-value").takes(toleration(json!({"key": "a", "value": ""}))).refuses(
            toleration(json!({"key": "a", "value": "b c"})),
            "spec.tolerations[0].value",
            "must be a taint's value",
        ),
        bot("toleration-effect")
            .takes_all(
                ["", "NoSchedule", "PreferNoSchedule", "NoExecute"]
                    .map(|e| toleration(json!({"key": "a", "effect": e}))),
            )
            .refuses(
                toleration(json!({"key": "a", "effect": "noexecute"})),
                "spec.tolerations[0].effect",
                "must be NoSchedule, PreferNoSchedule or NoExecute",
            ),
        bot("toleration-seconds")
            .takes(toleration(json!({"key": "a", "effect": "NoExecute", "tolerationSeconds": 0})))
            .refuses_all(
                [
                    toleration(json!({"key": "a", "tolerationSeconds": 5})),
                    toleration(json!({"key": "a", "effect": "NoSchedule", "tolerationSeconds": 5})),
                ],
                "spec.tolerations[0].tolerationSeconds",
                "may be set only when effect is NoExecute",
            ),
    ];
    let cannot = "cannot change once the bot is placed";
    all.extend(fixed(
        "runtime-class-placed",
        json!({}),
        json!({"runtimeClassName": "a"}),
        json!({"runtimeClassName": "b"}),
        "spec.runtimeClassName",
        cannot,
    ));
    all.extend(fixed(
        "node-name-placed",
        json!({}),
        json!({"nodeName": "node-1"}),
        json!({"nodeName": "node-2"}),
        "spec.nodeName",
        cannot,
    ));
    all.extend(fixed(
        "node-selector-placed",
        json!({}),
        json!({"nodeSelector": {"a": "b"}}),
        json!({"nodeSelector": {"a": "c"}}),
        "spec.nodeSelector",
        cannot,
    ));
    all.extend(fixed(
        "tolerations-placed",
        json!({}),
        json!({"tolerations": [{"key": "a"}]}),
        json!({"tolerations": [{"key": "b"}]}),
        "spec.tolerations",
        cannot,
    ));
    all.extend([
        // Unset and empty are the same: a client that drops empty fields changes nothing.
        bot("node-selector-placed").placed(json!({})).takes(json!({"nodeSelector": {}})),
        bot("tolerations-placed").placed(json!({"tolerations": []})).takes(json!({"tolerations": null})),
        bot("network-mode-placed").from(json!({})).takes(json!({"network": {"mode": "Host"}})),
        bot("network-mode-placed")
            .placed(json!({}))
            .takes(json!({"network": {"mode": "Bridge", "hostname": "other"}}))
            .refuses(
                json!({"network": {"mode": "None"}}),
                "spec.network.mode",
                "network.mode cannot change once the bot is placed (it is on node node-1)",
            ),
        bot("network-mode-placed").placed(json!({"network": {"mode": "Host"}})).refuses(
            json!({"network": null}),
            "spec.network.mode",
            "cannot change once the bot is placed (it is on node node-1)",
        ),
        // The binding and its end are statuses: free.
        bot("binding-stays")
            .placed(json!({}))
            .takes_object(json!({"status": {"nodeName": "node-1", "phase": "Running"}}))
            .takes_object(json!({"status": {"nodeName": null}}))
            .refuses_object(
                json!({"status": {"nodeName": "node-2"}}),
                "status.nodeName",
                "cannot change from node-1 to node-2 in one write",
            ),
        bot("status-bot-id-stays")
            .from(json!({"status": {"botId": "a"}}))
            .takes_object(json!({"status": {"botId": null}}))
            .refuses_object(json!({"status": {"botId": "b"}}), "status.botId", "cannot change from a to b"),
    ]);
    all
}

fn network() -> Vec<Case> {
    let dns = |c: Value| json!({"dnsConfig": c});
    let search = |s: &str| json!({"dnsConfig": {"searches": [s]}});
    let long = format!("{}.{}", "a".repeat(200), "b".repeat(48));
    vec![
        bot("hostname-label")
            .takes_all(["web", "0", &"a".repeat(63)].map(|h| json!({"network": {"hostname": h}})))
            .refuses_all(
                ["", "Web", "web.example.com", "-", "a_b"].map(|h| json!({"network": {"hostname": h}})),
                "spec.network.hostname",
                "must be a DNS label",
            ),
        bot("dns-none-needs-servers")
            .takes_all([
                json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.1"]}}),
                json!({"dnsPolicy": "Default", "dnsConfig": {}}),
                json!({"network": {"mode": "None"}, "dnsConfig": {"searches": ["a"]}}),
            ])
            .refuses_all(
                [
                    json!({"dnsPolicy": "None"}),
                    json!({"dnsPolicy": "None", "dnsConfig": {}}),
                    json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": []}}),
                ],
                "spec.dnsConfig.nameservers",
                "must have at least one address when dnsPolicy is None",
            ),
        bot("dns-server-ip").takes(dns(json!({"nameservers": ["10.0.0.1", "fd00::1"]}))).refuses_all(
            ["", "dns.example.com", "10.0.0", "10.0.0.1:53", "10.0.0.1\nsearch x"]
                .map(|n| dns(json!({"nameservers": [n]}))),
            "spec.dnsConfig.nameservers[0]",
            "must be an IP address",
        ),
        bot("dns-search-name")
            .takes_all([".", "svc.cluster.local", "a.b.", "_tcp.example.com"].map(search))
            .refuses_all(
                ["", "..", "A.com", "a b", "a\nnameserver 1.1.1.1"].map(search),
                "spec.dnsConfig.searches[0]",
                "must be a domain name in lower case",
            ),
        bot("dns-search-total").takes(dns(json!({"searches": vec![long.clone(); 8]}))).refuses(
            dns(json!({"searches": vec![long; 9]})),
            "spec.dnsConfig.searches",
            "must not be longer than 2048 characters in all",
        ),
        bot("dns-option-name")
            .takes(dns(json!({"options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]})))
            .refuses_all(
                [
                    json!({}),
                    json!({"name": ""}),
                    json!({"value": "2"}),
                    json!({"name": "a b"}),
                    json!({"name": "a\nb"}),
                ]
                .map(|o| dns(json!({"options": [o]}))),
                "spec.dnsConfig.options[0].name",
                "must be the name of an option of resolv.conf",
            ),
        bot("dns-option-value").takes(dns(json!({"options": [{"name": "ndots", "value": ""}]}))).refuses(
            dns(json!({"options": [{"name": "ndots", "value": "2\nnameserver 1.1.1.1"}]})),
            "spec.dnsConfig.options[0].value",
            "must be printable ASCII characters without spaces",
        ),
    ]
}

const UNCLEAN: [&str; 11] =
    ["", "/", "data", "./data", "/data/", "//data", "/data//a", "/data/./a", "/data/../a", "/data/..", "/da\nta"];
const KERNEL: [&str; 6] = ["/proc", "/sys", "/dev", "/proc/1", "/sys/fs/cgroup", "/dev/shm"];

fn data() -> Vec<Case> {
    let path = |p: &str| json!({"data": {"path": p}});
    let rollback = |r: Value| json!({"rollback": r});
    let schedule = |s: &str| json!({"snapshotPolicy": {"schedule": s}});
    vec![
        bot("snapshotter-name")
            .takes_all(["overlayfs", "native", "fuse-overlayfs", "nydus_1.0"].map(|s| json!({"snapshotter": s})))
            .refuses_all(
                ["", "over/lay", "a b", "-a", "../a"].map(|s| json!({"snapshotter": s})),
                "spec.snapshotter",
                "must be the name of a containerd snapshotter",
            ),
        bot("snapshotter-immutable")
            .from(json!({"spec": {"snapshotter": "overlayfs"}}))
            .takes(json!({"image": "other"}))
            .refuses(
                json!({"snapshotter": "native"}),
                "spec.snapshotter",
                "is immutable: it is overlayfs and cannot become native",
            )
            .refuses(
                json!({"snapshotter": null}),
                "spec.snapshotter",
                "it is overlayfs and cannot become unset (the default of the node)",
            ),
        bot("snapshotter-immutable").from(json!({})).refuses(
            json!({"snapshotter": "native"}),
            "spec.snapshotter",
            "it is unset (the default of the node) and cannot become native",
        ),
        bot("data-path-clean")
            .takes_all(["/data", "/home/bot/.data", "/a b/ä", "/data/..a", "/data/a.."].map(path))
            .refuses_all(UNCLEAN.map(path), "spec.data.path", "must be an absolute path other than '/'"),
        bot("data-path-kernel").takes_all(["/process", "/devel/a", "/data/proc", "/system"].map(path)).refuses_all(
            KERNEL.map(path),
            "spec.data.path",
            "must not be under /proc, /sys or /dev",
        ),
        bot("data-path-own-files").takes_all(["/etc", "/etc/hosts.d", "/etc/bot"].map(path)).refuses_all(
            ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/localtime", "/etc/hosts/data"].map(path),
            "spec.data.path",
            "Berth mounts files there",
        ),
        bot("data-path-names").takes(path(&format!("/{}/{0}", "a".repeat(255)))).refuses_all(
            [path(&format!("/a/{}", "a".repeat(256))), path(&format!("/{}/b", "ä".repeat(256)))],
            "spec.data.path",
            "longer than 255 characters",
        ),
        bot("data-path-immutable")
            .from(json!({"spec": {"data": {"path": "/bot"}}}))
            .takes(json!({"image": "other"}))
            .refuses(path("/data"), "spec.data.path", "is immutable: it is /bot and cannot become /data")
            // Removed, it would be the default.
            .refuses(json!({"data": null}), "spec.data.path", "it is /bot and cannot become /data"),
        names(
            bot("restore-from-name"),
            "spec.restoreFrom.snapshotName",
            |n| json!({"restoreFrom": {"snapshotName": n}}),
        ),
        bot("restore-from-immutable")
            .from(json!({"spec": {"restoreFrom": {"snapshotName": "a"}}}))
            .takes(json!({"image": "other"}))
            .refuses(
                json!({"restoreFrom": {"snapshotName": "b"}}),
                "spec.restoreFrom",
                "is immutable: it is a and cannot become b",
            )
            .refuses(json!({"restoreFrom": null}), "spec.restoreFrom", "it is a and cannot become unset"),
        bot("restore-from-immutable").from(json!({})).refuses(
            json!({"restoreFrom": {"snapshotName": "b"}}),
            "spec.restoreFrom",
            "it is unset and cannot become b",
        ),
        bot("rollback-one-target")
            .takes_all([
                rollback(json!({"id": "a", "toVersion": 1})),
                rollback(json!({"id": "a", "snapshotName": "s"})),
            ])
            .refuses(
                rollback(json!({"id": "a"})),
                "spec.rollback",
                "must have exactly one of toVersion and snapshotName, and has none",
            )
            .refuses(
                rollback(json!({"id": "a", "toVersion": 1, "snapshotName": "s"})),
                "spec.rollback",
                "and has both",
            ),
        bot("rollback-id")
            .takes_all(["2026-11-24", "a b", "1", "#7: again"].map(|id| rollback(json!({"id": id, "toVersion": 1}))))
            .refuses_all(
                ["", " ", " a", "a ", "a\nb", "ä"].map(|id| rollback(json!({"id": id, "toVersion": 1}))),
                "spec.rollback.id",
                "must be one or more printable ASCII",
            ),
        names(bot("rollback-snapshot-name"), "spec.rollback.snapshotName", |n| {
            rollback(json!({"id": "a", "snapshotName": n}))
        }),
        bot("schedule-cron")
            .takes_all(
                [
                    "0 3 * * *",
                    "*/15 * * * *",
                    "0,30 8-18/2 1,15 jan-mar,DEC Mon-Fri",
                    "59 23 31 12 7",
                    "5/10 0 1 1 0",
                    "00 03 01 01 *",
                    "0  3 * *  sun",
                ]
                .map(schedule),
            )
            .refuses_all(
                [
                    "",
                    "@daily",
                    "0 3 * *",
                    "0 3 * * * *",
                    "60 3 * * *",
                    "0 24 * * *",
                    "0 3 0 * *",
                    "0 3 32 * *",
                    "0 3 * 13 *",
                    "0 3 * * 8",
                    "TZ=UTC 0 3 * * *",
                    " 0 3 * * *",
                    "0 3 * * * ",
                    "0 3 * * foo",
                    "*/0 * * * *",
                    "0 3 ? * *",
                    "0\n3 * * *",
                    "-1 3 * * *",
                    "1, 3 * * *",
                ]
                .map(schedule),
                "spec.snapshotPolicy.schedule",
                "must be five cron fields",
            ),
        time_zones(
            bot("schedule-time-zone"),
            "spec.snapshotPolicy.timeZone",
            |z| json!({"snapshotPolicy": {"timeZone": z}}),
        ),
    ]
}

fn files_and_skills() -> Vec<Case> {
    let skill = |over: Value| {
        let mut skill = json!({"name": "a", "content": "x"});
        crate::admit::overlay(&mut skill, &over);
        json!({"skills": [skill]})
    };
    let file = |path: &str| json!({"files": [{"path": path, "content": "x"}]});
    let source = |over: Value| {
        let mut file = json!({"path": "/etc/a"});
        crate::admit::overlay(&mut file, &over);
        json!({"files": [file]})
    };
    let files =
        |paths: &[&str]| json!({"files": paths.iter().map(|p| json!({"path": p, "content": "x"})).collect::<Value>()});
    let text = |size: usize| "x".repeat(size);
    vec![
        bot("skill-name")
            .takes_all([skill(json!({"name": "web-search"})), skill(json!({"name": "a1"}))])
            .refuses_all(
                ["", ".", "..", "a/b", "../a", "Web", "a_b", "a\u{0}"].map(|n| skill(json!({"name": n}))),
                "spec.skills[0].name",
                "must be a DNS label, since it becomes a folder",
            ),
        bot("skill-description-line")
            .takes(skill(json!({"description": "Search: \"the\" wéb"})))
            .refuses_all(["a\nb", "a\r", "a\u{0}"].map(|d| skill(json!({"description": d}))), "spec.skills[0].description", "must be one line without control"),
        bot("skill-metadata-key")
            .takes(skill(json!({"metadata": {"version": "1", "a.b-c_d": "…\n…"}})))
            .refuses_all(
                ["", "a b", "a:", "name", "description", "metadata", "a\nb"].map(|k| skill(json!({"metadata": {k: "v"}}))),
                "spec.skills[0].metadata",
                "must have keys of at most 63 letters",
            ),
        bot("skill-content-nul").takes(skill(json!({"content": ""}))).refuses(
            skill(json!({"content": "a\u{0}b"})),
            "spec.skills[0].content",
            "it contains a NUL character",
        ),
        bot("skills-total")
            .takes(json!({"skills": (0..2).map(|i| json!({"name": format!("s{i}"), "content": text(131_072)})).collect::<Value>()}))
            .refuses(
                json!({"skills": (0..3).map(|i| json!({"name": format!("s{i}"), "content": "ä".repeat(44_000)})).collect::<Value>()}),
                "spec.skills",
                "must not be larger than 262144 bytes in all",
            ),
        bot("file-path-clean")
            .takes_all(["/a", "/etc/bot.toml", "/data/.env", "/etc/a b"].map(file))
            .refuses_all(UNCLEAN.map(file), "spec.files[0].path", "must be an absolute path other than '/'"),
        bot("file-path-names").takes(file(&format!("/{}/{0}", "a".repeat(255)))).refuses_all(
            [file(&format!("/a/{}", "a".repeat(256))), file(&format!("/{}/b", "ä".repeat(256)))],
            "spec.files[0].path",
            "longer than 255 characters",
        ),
        bot("file-path-kernel")
            .takes(file("/etc/proc"))
            .refuses_all(KERNEL.map(file), "spec.files[0].path", "must not be under /proc, /sys or /dev"),
        bot("file-one-source")
            .takes_all([
                source(json!({"content": ""})),
                source(json!({"secretKeyRef": {"name": "a", "key": "b"}, "mode": 0o600})),
                source(json!({"configMapKeyRef": {"name": "a", "key": "b", "optional": true}})),
            ])
            .refuses(source(json!({})), "spec.files[0]", "must have exactly one of content, secretKeyRef and configMapKeyRef, and /etc/a has none")
            .refuses(source(json!({"content": "x", "secretKeyRef": {"name": "a", "key": "b"}})), "spec.files[0]", "and /etc/a has more than one"),
        names(bot("file-secret-name"), "spec.files[0].secretKeyRef.name", |n| source(json!({"secretKeyRef": {"name": n, "key": "k"}}))),
        keys(bot("file-secret-key"), "spec.files[0].secretKeyRef.key", |k| source(json!({"secretKeyRef": {"name": "n", "key": k}}))),
        names(bot("file-config-map-name"), "spec.files[0].configMapKeyRef.name", |n| source(json!({"configMapKeyRef": {"name": n, "key": "k"}}))),
        keys(bot("file-config-map-key"), "spec.files[0].configMapKeyRef.key", |k| source(json!({"configMapKeyRef": {"name": "n", "key": k}}))),
        bot("files-total").takes(source(json!({"content": text(131_072)}))).refuses(
            json!({"files": [{"path": "/a", "content": text(131_072)}, {"path": "/b", "content": "x"}]}),
            "spec.files",
            "must not be larger than 131072 bytes in all",
        ),
        bot("files-not-nested").takes(files(&["/etc/a", "/etc/ab", "/etc/a.b"])).refuses(
            files(&["/etc/a", "/etc/a/b"]),
            "spec.files",
            "must not have a file below another file",
        ),
        bot("files-spare-data")
            .takes_all([file("/data/a"), file("/database"), file("/data/.skillset")])
            .refuses_all([file("/data"), file("/data/.skills"), file("/data/.skills/a/SKILL.md")], "spec.files", "must not have a file in the place of data.path (/data)")
            .refuses(json!({"data": {"path": "/home/bot"}, "files": [{"path": "/home", "content": "x"}]}), "spec.files", "in the place of data.path (/home/bot), above it"),
    ]
}

fn others() -> Vec<Case> {
    let immutable = |rule, old: Value, same: Value, other: Value, field, words| {
        snapshot(rule).from(json!({"spec": old})).takes(same).refuses(other, field, words)
    };
    let other_name = json!({"displayName": "other"});
    vec![
        names(snapshot("snapshot-bot-name"), "spec.botContainerName", |n| json!({"botContainerName": n})),
        immutable(
            "snapshot-bot-immutable",
            json!({"botContainerName": "a"}),
            other_name.clone(),
            json!({"botContainerName": "b"}),
            "spec.botContainerName",
            "is immutable: it is a and cannot become b",
        ),
        immutable(
            "snapshot-consistency-immutable",
            json!({}),
            other_name.clone(),
            json!({"consistency": "Stopped"}),
            "spec.consistency",
            "is immutable: it is Live and cannot become Stopped",
        ),
        immutable(
            "snapshot-freeze-immutable",
            json!({"maxFreezeMillis": 500}),
            other_name.clone(),
            json!({"maxFreezeMillis": 501}),
            "spec.maxFreezeMillis",
            "is immutable; create another BotSnapshot",
        ),
        immutable(
            "snapshot-deadline-immutable",
            json!({}),
            other_name.clone(),
            json!({"failureDeadlineSeconds": 301}),
            "spec.failureDeadlineSeconds",
            "is immutable; create another BotSnapshot",
        ),
        snapshot("snapshot-export-once").from(json!({"spec": {"export": "None"}})).takes(json!({"export": "OCI"})),
        immutable(
            "snapshot-export-once",
            json!({"export": "OCI"}),
            other_name,
            json!({"export": "None"}),
            "spec.export",
            "may change from None to OCI only, not from OCI to None",
        ),
        snapshot("snapshot-display-name")
            .takes_all(["before the upgrade", "vor dem Update: ä"].map(|n| json!({"displayName": n})))
            .refuses_all(
                ["", " ", " a", "a\nb", "a\u{0}"].map(|n| json!({"displayName": n})),
                "spec.displayName",
                "must be one line of text",
            ),
        snapshot("snapshot-bot-id-stays")
            .from(json!({"status": {"botId": "a"}}))
            .takes_object(json!({"status": {"botId": "a", "phase": "Ready"}}))
            .refuses_object(
                json!({"status": {"botId": "b"}}),
                "status.botId",
                "is immutable: it is a and cannot become b",
            ),
        snapshot("snapshot-version-stays")
            .from(json!({"status": {"version": 4}}))
            .takes_object(json!({"status": {"version": 4, "phase": "Ready"}}))
            .refuses_object(
                json!({"status": {"version": 5}}),
                "status.version",
                "is immutable; a version is given once",
            ),
        record("record-bot-id-label")
            .takes_object(json!({"metadata": {"name": "a"}, "spec": {"botId": "a"}}))
            .refuses_object(
                json!({"metadata": {"name": "a.b"}, "spec": {"botId": "a.b"}}),
                "spec.botId",
                "must be a DNS label",
            ),
        record("record-name").takes_object(json!({"metadata": {"name": "a"}, "spec": {"botId": "a"}})).refuses_object(
            json!({"metadata": {"name": "a"}, "spec": {"botId": "b"}}),
            "spec.botId",
            "is b and must be the name of the BotRecord, a",
        ),
        record("record-version-grows")
            .from(json!({"spec": {"lastVersion": 7}}))
            .takes_all([json!({"lastVersion": 7, "nodeName": "n"}), json!({"lastVersion": 8})])
            .refuses(json!({"lastVersion": 6}), "spec.lastVersion", "must not decrease")
            // Removed, it would be 0.
            .refuses(json!({"lastVersion": null}), "spec.lastVersion", "must not decrease"),
        names(record("record-holder-name"), "spec.holder.name", |n| json!({"holder": {"name": n, "uid": "u"}})),
        names(record("record-node-name"), "spec.nodeName", |n| json!({"nodeName": n})),
        node("node-adopt-orphan")
            .takes(json!({"adopt": [{"orphan": "berth-v-2f0d-1", "namespace": "a", "snapshotName": "s"}]}))
            .refuses_all(
                ["", "web", "berth-v-", "Berth-v-1", "berth-v-a/b", "berth-v-1\n"]
                    .map(|orphan| json!({"adopt": [{"orphan": orphan, "namespace": "a", "snapshotName": "s"}]})),
                "spec.adopt[0].orphan",
                "must be a name of status.orphans",
            ),
        node("node-adopt-namespace")
            .takes(json!({"adopt": [{"orphan": "berth-v-1", "namespace": "team-a", "snapshotName": "s"}]}))
            .refuses_all(
                ["", "Team", "team_a", "team.a", "-team", "team\n"]
                    .map(|name| json!({"adopt": [{"orphan": "berth-v-1", "namespace": name, "snapshotName": "s"}]})),
                "spec.adopt[0].namespace",
                "must be the name of a namespace",
            ),
        names(
            node("node-adopt-snapshot"),
            "spec.adopt[0].snapshotName",
            |n| json!({"adopt": [{"orphan": "berth-v-1", "namespace": "a", "snapshotName": n}]}),
        ),
        node("node-cidr")
            .takes_all(["10.208.3.0/24", "10.0.0.0/8", "192.0.2.4/30", "fd00:1::/64"].map(|c| json!({"botCIDR": c})))
            .refuses_all(
                [
                    "",
                    "10.208.3.0",
                    "10.208.3.1/24",
                    "10.208.3.0/33",
                    "10.208.3.0/31",
                    "0.0.0.0/0",
                    "10.208.3.0/24,fd00::/64",
                    "a/24",
                ]
                .map(|c| json!({"botCIDR": c})),
                "spec.botCIDR",
                "must be the first address of a block",
            ),
        node("node-cidr-stays")
            .from(json!({"spec": {"botCIDR": "10.208.3.0/24"}}))
            .takes(json!({"unschedulable": true}))
            .refuses(
                json!({"botCIDR": "10.208.4.0/24"}),
                "spec.botCIDR",
                "it is 10.208.3.0/24 and cannot become 10.208.4.0/24",
            )
            .refuses(json!({"botCIDR": null}), "spec.botCIDR", "it is 10.208.3.0/24 and cannot become unset"),
        node("node-cidr-stays").from(json!({})).takes(json!({"botCIDR": "10.208.3.0/24"})),
    ]
}
