//! What the API refuses beyond types and bounds: every CEL rule, as one table.
//!
//! | a line says | |
//! | --- | --- |
//! | `name` | how tests and people speak of it |
//! | `at` | where in the schema it sits; `self` and `oldSelf` are the value there |
//! | `cel` | what must hold |
//! | `message`, `says` | what was wrong and what is right; `says` is CEL and has the values in it, `message` is for when it can't be evaluated |
//! | `field` | which field below `at` the refusal names |
//!
//! Three things to know before adding one. A rule without `oldSelf` is not asked again while its value stays as it was
//! (ratcheting), so a value that was stored before the rule never blocks status, finalizers or the repair of other fields;
//! therefore a rule sits as deep as it can. For the same reason a rule on the change of a scalar sits on the scalar: it is
//! asked only when there is both an old and a new value. Each access to a field of an object with many of them costs the API server
//! kilobytes, at every write of a status too: on `spec` a rule has as few of them as it can, the usual case first. And the API server prints a scalar's value by itself, so only what
//! sits on an object needs `says`.

use std::borrow::Cow;

/// The kinds of `berth.dev/v1alpha1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// [`super::BotContainer`]
    BotContainer,
    /// [`super::BotSnapshot`]
    BotSnapshot,
    /// [`super::BotRecord`]
    BotRecord,
    /// [`super::BotNode`]
    BotNode,
}

/// What kind of refusal it is, in the API server's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The value is wrong.
    Invalid,
    /// The field may not be set or changed here.
    Forbidden,
    /// The field must be set.
    Required,
}

impl Why {
    /// As the CRD writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "FieldValueInvalid",
            Self::Forbidden => "FieldValueForbidden",
            Self::Required => "FieldValueRequired",
        }
    }
}

/// One thing that the API server checks with CEL.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Its kind's rules have no two of one name.
    pub name: &'static str,
    /// The kind that it is for.
    pub kind: Kind,
    /// Path of the schema that it sits on: `[]` goes to a list's item, `{}` to a map's value; empty is the root.
    pub at: &'static str,
    /// What must hold.
    pub cel: Cow<'static, str>,
    /// Path below `at` that the refusal names, with its leading dot; empty is `at` itself.
    pub field: &'static str,
    /// What is right.
    pub message: Cow<'static, str>,
    /// CEL for a message with the values in it.
    pub says: Option<Cow<'static, str>>,
    /// Kind of refusal.
    pub why: Why,
    /// What was wrong already may stay so while other things below `at` change: for rules that compare two fields of a
    /// large object, which the API server's own ratcheting takes as changed with each of its fields.
    pub spares_old: bool,
}

impl Rule {
    fn new(kind: Kind, name: &'static str, at: &'static str) -> Self {
        let (cel, message) = (Cow::Borrowed(""), Cow::Borrowed(""));
        Self { name, kind, at, cel, field: "", message, says: None, why: Why::Invalid, spares_old: false }
    }

    fn must(mut self, cel: impl Into<Cow<'static, str>>) -> Self {
        self.cel = cel.into();
        self
    }

    fn or(mut self, message: impl Into<Cow<'static, str>>) -> Self {
        self.message = message.into();
        self
    }

    fn says(mut self, cel: impl Into<Cow<'static, str>>) -> Self {
        self.says = Some(cel.into());
        self
    }

    fn names(mut self, field: &'static str) -> Self {
        self.field = field;
        self
    }

    fn spares_old(mut self) -> Self {
        self.spares_old = true;
        self
    }

    fn is(mut self, why: Why) -> Self {
        self.why = why;
        self
    }
}

fn bot(name: &'static str, at: &'static str) -> Rule {
    Rule::new(Kind::BotContainer, name, at)
}

fn snapshot(name: &'static str, at: &'static str) -> Rule {
    Rule::new(Kind::BotSnapshot, name, at)
}

fn record(name: &'static str, at: &'static str) -> Rule {
    Rule::new(Kind::BotRecord, name, at)
}

fn node(name: &'static str, at: &'static str) -> Rule {
    Rule::new(Kind::BotNode, name, at)
}

// Regular expressions are RE2 and stand in CEL's r'…': no quote in them.

const DNS_LABEL: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
const DNS_SUBDOMAIN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
const LABEL_VALUE: &str = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";
const LABEL_KEY: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
const DATA_KEY: &str = r"^[-._a-zA-Z0-9]+$";
const TZ_NAME: &str = r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z][A-Za-z0-9_+-]*)*$";

// distribution's grammar: [domain[:port]/]path[:tag][@digest]. https://github.com/distribution/reference
const IMAGE: &str = concat!(
    r"^((([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])([.]([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*",
    r"|\[[a-fA-F0-9:]+\])(:[0-9]+)?/)?",
    r"[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*)*",
    r"(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?",
    // Of its digests the one that containerd's content store of every version computes.
    r"(@sha256:[0-9a-f]{64})?$",
);

// A path from the root, each component at least one character, none of them `.` or `..`, nothing that breaks a line.
const CLEAN_PATH: &str = r"self.matches(r'^(/[^/\x00-\x1f\x7f]+)+$') && !self.matches(r'/[.][.]?(/|$)')";
// NAME_MAX of Linux is 255 bytes; to count bytes would cost more than a CRD's rules may in all.
const SHORT_NAMES: &str = "!self.matches('[^/]{256}')";
const NAMES: &str = "must have no name between its slashes that is longer than 255 characters: no file system takes more than 255 bytes";
const OUTSIDE_KERNEL: &str = r"!self.matches(r'^/(proc|sys|dev)(/|$)')";

// Linux capabilities up to 6.18 and ALL, as a Pod writes them: capabilities(7) without CAP_.
const CAPABILITIES: &str = "['ALL', 'AUDIT_CONTROL', 'AUDIT_READ', 'AUDIT_WRITE', 'BLOCK_SUSPEND', 'BPF', \
    'CHECKPOINT_RESTORE', 'CHOWN', 'DAC_OVERRIDE', 'DAC_READ_SEARCH', 'FOWNER', 'FSETID', 'IPC_LOCK', 'IPC_OWNER', 'KILL', \
    'LEASE', 'LINUX_IMMUTABLE', 'MAC_ADMIN', 'MAC_OVERRIDE', 'MKNOD', 'NET_ADMIN', 'NET_BIND_SERVICE', 'NET_BROADCAST', \
    'NET_RAW', 'PERFMON', 'SETFCAP', 'SETGID', 'SETPCAP', 'SETUID', 'SYSLOG', 'SYS_ADMIN', 'SYS_BOOT', 'SYS_CHROOT', \
    'SYS_MODULE', 'SYS_NICE', 'SYS_PACCT', 'SYS_PTRACE', 'SYS_RAWIO', 'SYS_RESOURCE', 'SYS_TIME', 'SYS_TTY_CONFIG', \
    'WAKE_ALARM']";

fn matches(regex: &str) -> String {
    format!("self.matches(r'{regex}')")
}

/// A field that holds the name of another object.
fn object_name(kind: Kind, name: &'static str, at: &'static str, of: &str) -> Rule {
    Rule::new(kind, name, at).must(matches(DNS_SUBDOMAIN)).or(format!(
        "must be the name of {of}: lower case letters, digits, '-' and '.', beginning and ending with a letter or digit"
    ))
}

fn data_key(name: &'static str, at: &'static str) -> Rule {
    bot(name, at)
        .must(format!("{} && self != '.' && !self.startsWith('..')", matches(DATA_KEY)))
        .or("must be a key of a Secret or ConfigMap: letters, digits, '-', '_' and '.', not '.' and not beginning with '..'")
}

/// That both have one value, or none. The shorter `self.?x == oldSelf.?x` has no size that the API server could reckon with: it takes
/// that for more than a CRD may cost.
fn same(new: &str, old: &str) -> String {
    format!("(has({new}) ? has({old}) && {new} == {old} : !has({old}))")
}

/// A field that never changes: neither set, nor unset, nor replaced. The rule sits on the parent, which sees all three.
/// `value` is the string to show of it, such as `.snapshotName` below the field.
fn never_changes(kind: Kind, name: &'static str, field: &'static str, value: &str, unset: &str, advice: &str) -> Rule {
    let (new, old) = (format!("self{field}"), format!("oldSelf{field}"));
    Rule::new(kind, name, "spec")
        .must(same(&new, &old))
        .names(field)
        .or(format!("is immutable; {advice}"))
        .says(format!(
            "'is immutable: it is ' + (has({old}) ? {old}{value} : '{unset}') + ' and cannot become ' + \
             (has({new}) ? {new}{value} : '{unset}') + '; {advice}'"
        ))
        .is(Why::Forbidden)
}

/// What decided the placement stays as long as the bot is placed. Unset and empty are the same.
fn fixed_once_placed(name: &'static str, field: &'static str) -> Rule {
    let what = field.trim_start_matches(".spec.");
    let (new, old) = (format!("self{field}"), format!("oldSelf{field}"));
    let advice = "set it back, or delete the BotContainer and create it anew (deletionPolicy: Retain keeps its data)";
    bot(name, "")
        .must(format!(
            "{} || !has(oldSelf.status) || !has(oldSelf.status.nodeName) || \
             !(has({new}) && size({new}) > 0) && !(has({old}) && size({old}) > 0)",
            same(&new, &old)
        ))
        .names(field)
        .or(format!("{what} cannot change once the bot is placed; {advice}"))
        .says(format!(
            "'{what} cannot change once the bot is placed (it is on node ' + oldSelf.status.nodeName + '); {advice}'"
        ))
        .is(Why::Forbidden)
}

/// All rules.
pub fn rules() -> Vec<Rule> {
    let mut all = Vec::new();
    all.extend(identity());
    all.extend(process());
    all.extend(resources());
    all.extend(security());
    all.extend(placement());
    all.extend(network());
    all.extend(data());
    all.extend(status());
    all.extend(snapshots());
    all.extend(records_and_nodes());
    all
}

fn identity() -> Vec<Rule> {
    vec![
        bot("bot-id-label", "spec.botId")
            .must(matches(DNS_LABEL))
            .or("must be a DNS label: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63; a lower case UUID is one"),
        never_changes(
            Kind::BotContainer,
            "bot-id-immutable",
            ".botId",
            "", "unset (the uid of this object)",
            "a bot keeps its identity: to run as another bot create another BotContainer",
        ),
        bot("image-reference", "spec.image")
            // 64 hex digits alone are an image's id.
            .must(format!("{} && !self.matches('^[0-9a-f]{{64}}([:@]|$)')", matches(IMAGE)))
            .or("must be an image reference: [registry[:port]/]repository[:tag][@sha256:digest], the repository in lower case, no spaces, no scheme; for example docker.io/library/node:22"),
        object_name(Kind::BotContainer, "pull-secret-name", "spec.imagePullSecrets[].name", "a Secret"),
    ]
}

fn process() -> Vec<Rule> {
    const NO_NUL: &str = r"!self.contains('\u0000')";
    const NUL: &str = "must not contain a NUL character: no process can be given one";
    // In a Pod too, and since Kubernetes 1.30 nearly all characters: KEP-4369.
    const ENV_NAME: &str = "^[ -<>-~]+$";
    let total = |name, at: &'static str, what: &str| {
        bot(name, at)
            .must("self.map(text, size(bytes(text))).sum() <= 131072")
            .or(format!("{what} must not be larger than 131072 bytes in all; put long texts into files"))
    };
    vec![
        bot("command-nul", "spec.command[]").must(NO_NUL).or(NUL),
        bot("command-program", "spec.command")
            .must("self.size() == 0 || self[0] != ''")
            .or("must begin with the path or name of a program, not with an empty text"),
        total("command-total", "spec.command", "command"),
        bot("args-nul", "spec.args[]").must(NO_NUL).or(NUL),
        total("args-total", "spec.args", "args"),
        bot("working-dir-absolute", "spec.workingDir")
            .must(r"self.startsWith('/') && !self.contains('\u0000')")
            .or("must be an absolute path, for example /data; leave it out for the image's own"),
        bot("working-dir-names", "spec.workingDir").must(SHORT_NAMES).or(NAMES),
        bot("env-name", "spec.env[].name")
            .must(matches(ENV_NAME))
            .or("must be one or more printable ASCII characters other than '='"),
        bot("env-value-nul", "spec.env[].value").must(NO_NUL).or(NUL),
        bot("env-total", "spec.env")
            .must("self.map(e, has(e.value) ? size(bytes(e.value)) : 0).sum() <= 131072")
            .or("the values of env must not be larger than 131072 bytes in all; put long texts into files"),
        bot("env-value-or-source", "spec.env[]")
            .must("!has(self.valueFrom) || !has(self.value) || self.value == ''")
            .names(".valueFrom")
            .or("must not be set beside value; keep one of the two")
            .says("'must not be set beside value in the entry ' + self.name + '; keep one of the two'")
            .is(Why::Forbidden),
        bot("env-one-source", "spec.env[].valueFrom")
            .must("[has(self.configMapKeyRef), has(self.secretKeyRef), has(self.fieldRef), has(self.resourceFieldRef), has(self.fileKeyRef)].filter(set, set).size() == 1")
            .or("must have exactly one of configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef")
            .says("'must have exactly one of configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef, and has ' + ([has(self.configMapKeyRef), has(self.secretKeyRef), has(self.fieldRef), has(self.resourceFieldRef), has(self.fileKeyRef)].exists(set, set) ? 'more than one' : 'none')"),
        bot("env-no-file-source", "spec.env[].valueFrom")
            .must("!has(self.fileKeyRef)")
            .names(".fileKeyRef")
            .or("is not supported: a bot has no volumes; use configMapKeyRef or secretKeyRef")
            .is(Why::Forbidden),
        object_name(Kind::BotContainer, "env-config-map-name", "spec.env[].valueFrom.configMapKeyRef.name", "a ConfigMap"),
        data_key("env-config-map-key", "spec.env[].valueFrom.configMapKeyRef.key"),
        object_name(Kind::BotContainer, "env-secret-name", "spec.env[].valueFrom.secretKeyRef.name", "a Secret"),
        data_key("env-secret-key", "spec.env[].valueFrom.secretKeyRef.key"),
        bot("env-field-path", "spec.env[].valueFrom.fieldRef.fieldPath")
            .must(concat!(
                "self in ['metadata.name', 'metadata.namespace', 'metadata.uid', 'spec.nodeName', 'status.hostIP', 'status.hostIPs', 'status.podIP', 'status.podIPs'] || ",
                r#"self.matches(r"^metadata[.](labels|annotations)\['([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?'\]$")"#,
            ))
            .or("must be metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], metadata.annotations['KEY'], spec.nodeName, status.hostIP, status.hostIPs, status.podIP or status.podIPs"),
        bot("env-field-version", "spec.env[].valueFrom.fieldRef.apiVersion")
            .must("self in ['', 'v1']")
            .or("must be v1, or left out"),
        bot("env-resource", "spec.env[].valueFrom.resourceFieldRef.resource")
            .must("self in ['limits.cpu', 'limits.memory', 'limits.pids', 'requests.cpu', 'requests.memory']")
            .or("must be limits.cpu, limits.memory, limits.pids, requests.cpu or requests.memory"),
        bot("env-resource-divisor", "spec.env[].valueFrom.resourceFieldRef")
            .must("!has(self.divisor) || string(self.divisor) in (self.resource.endsWith('.cpu') ? ['0', '1', '1m'] : self.resource.endsWith('.memory') ? ['0', '1', '1k', '1M', '1G', '1T', '1P', '1E', '1Ki', '1Mi', '1Gi', '1Ti', '1Pi', '1Ei'] : ['0', '1'])")
            .names(".divisor")
            .or("must be 1 or 1m for cpu; 1 or 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei for memory; 1 for pids")
            .says("'is ' + string(self.divisor) + ' and must be ' + (self.resource.endsWith('.cpu') ? '1 or 1m for cpu' : self.resource.endsWith('.memory') ? '1 or 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei for memory' : '1 for pids')"),
        bot("env-resource-container", "spec.env[].valueFrom.resourceFieldRef.containerName")
            .must("self == ''")
            .or("must be left out: a bot is one container"),
        bot("env-from-one-source", "spec.envFrom[]")
            .must("has(self.configMapRef) != has(self.secretRef)")
            .or("must have exactly one of configMapRef and secretRef")
            .says("'must have exactly one of configMapRef and secretRef, and has ' + (has(self.secretRef) ? 'both' : 'none')"),
        bot("env-from-prefix", "spec.envFrom[].prefix")
            .must("self.matches(r'^[ -<>-~]*$')")
            .or("must be printable ASCII characters other than '='"),
        object_name(Kind::BotContainer, "env-from-config-map-name", "spec.envFrom[].configMapRef.name", "a ConfigMap"),
        object_name(Kind::BotContainer, "env-from-secret-name", "spec.envFrom[].secretRef.name", "a Secret"),
        bot("restarted-at-time", "spec.restartedAt")
            // The conversion finds the 30th of February, by an error that prints the same words.
            .must(format!("{} && timestamp(self).getFullYear() > 0", matches(super::bound::TIME)))
            .or("must be a time in RFC 3339, for example 2026-11-24T10:00:00Z"),
        bot("timezone-name", "spec.timezone")
            .must(format!("{} && self.lowerAscii() != 'local'", matches(TZ_NAME)))
            .or("must be a name of the tz database, for example Europe/Berlin or Etc/UTC"),
    ]
}

fn resources() -> Vec<Rule> {
    // The server's schema takes number and text alike here, so each value is made text before it is read.
    fn good(map: &str, key: &str) -> String {
        let value = format!("string(self.{map}['{key}'])");
        format!(
            "has(self.{map}) && '{key}' in self.{map} && isQuantity({value}) && !quantity({value}).isLessThan(quantity('0'))"
        )
    }
    let value = |name, at: &'static str| {
        bot(name, at)
            .must("isQuantity(string(self)) && !quantity(string(self)).isLessThan(quantity('0')) && !quantity(string(self)).isGreaterThan(quantity('1Ei'))")
            .or("must be a quantity from 0 to 1Ei, for example 500m or 2 for cpu, 512Mi or 2Gi for memory")
    };
    let keys = |name, at: &'static str, known: &str, words: &str| {
        bot(name, at)
            .must(format!("self.all(key, key in [{known}])"))
            .or(format!("may have {words} only"))
            .is(Why::Forbidden)
    };
    let floor = |name, map: &str, field: &'static str, key: &str, test: &str, words: &str| {
        bot(name, "spec.resources")
            .must(format!("!({}) || {test}", good(map, key)))
            .names(field)
            .or(words.to_owned())
            .says(format!("'is ' + string(self.{map}['{key}']) + ' and {words}'"))
    };
    let within = |name, key: &str, field: &'static str| {
        bot(name, "spec.resources")
            .must(format!(
                "!({} && {}) || quantity(string(self.requests['{key}'])).compareTo(quantity(string(self.limits['{key}']))) <= 0",
                good("requests", key),
                good("limits", key)
            ))
            .names(field)
            .or(format!("must not be more than limits.{key}"))
            .says(format!("'is ' + string(self.requests['{key}']) + ' and must not be more than limits.{key}, which is ' + string(self.limits['{key}'])"))
    };
    let (at_least, whole) = (
        |map: &str, key: &str, least: &str| {
            format!("quantity(string(self.{map}['{key}'])).compareTo(quantity('{least}')) >= 0")
        },
        // Not isInteger(): to it 1.5Gi is none.
        |map: &str| format!("!string(self.{map}['memory']).matches('[num]$')"),
    );
    vec![
        keys("requests-keys", "spec.resources.requests", "'cpu', 'memory'", "cpu and memory"),
        keys("limits-keys", "spec.resources.limits", "'cpu', 'memory', 'pids'", "cpu, memory and pids"),
        value("requests-quantity", "spec.resources.requests{}"),
        value("limits-quantity", "spec.resources.limits{}"),
        // The kernel's shortest quota is 1 ms in a period of 100 ms.
        floor(
            "limit-cpu",
            "limits",
            ".limits.cpu",
            "cpu",
            &at_least("limits", "cpu", "10m"),
            "must be at least 10m, the smallest share that the kernel gives; leave it out for no limit",
        ),
        // runc itself needs about that much to start a process (docker refuses less, too).
        floor(
            "limit-memory",
            "limits",
            ".limits.memory",
            "memory",
            &format!("({} && {})", whole("limits"), at_least("limits", "memory", "6Mi")),
            "must be whole bytes, at least 6Mi (a trailing m means thousandths: 512Mi, not 512m); leave it out for no limit",
        ),
        floor(
            "request-memory",
            "requests",
            ".requests.memory",
            "memory",
            &whole("requests"),
            "must be whole bytes (a trailing m means thousandths: 512Mi, not 512m)",
        ),
        // 4,194,304 is the kernel's PID_MAX_LIMIT on 64 bits.
        floor(
            "limit-pids",
            "limits",
            ".limits.pids",
            "pids",
            &format!(
                "({} && {} && quantity(string(self.limits['pids'])).compareTo(quantity('4194304')) <= 0)",
                "quantity(string(self.limits['pids'])).isInteger()",
                at_least("limits", "pids", "1")
            ),
            "must be a whole number from 1 to 4194304",
        ),
        within("request-cpu-within-limit", "cpu", ".requests.cpu"),
        within("request-memory-within-limit", "memory", ".requests.memory"),
    ]
}

fn security() -> Vec<Rule> {
    let capability = |name, at: &'static str| {
        // In either case, as container runtimes take them of a Pod: `drop: [all]` is in many a manifest.
        bot(name, at)
            .must(format!("self.upperAscii() in {CAPABILITIES}"))
            .or("must be ALL or a capability of Linux without CAP_, as in a Pod, for example NET_BIND_SERVICE")
    };
    let profile_type = |name, at: &'static str| {
        bot(name, at)
            .must("self in ['RuntimeDefault', 'Localhost', 'Unconfined']")
            .or("must be RuntimeDefault, Localhost or Unconfined")
    };
    let profile_name = |name, at: &'static str| {
        bot(name, at)
            .must("(self.type == 'Localhost') == (has(self.localhostProfile) && self.localhostProfile != '')")
            .names(".localhostProfile")
            .or("must be set when type is Localhost, and only then")
            .says("self.type == 'Localhost' ? 'must be set when type is Localhost' : 'must not be set when type is ' + self.type + '; only Localhost takes one'")
    };
    let selinux = |name, at: &'static str, marks: &str| {
        bot(name, at)
            .must(format!("self.matches('^[A-Za-z0-9_.,{marks}-]*$')"))
            .or("must be one part of an SELinux label: letters, digits, '_', '.', ',' and '-', in a level also ':'")
    };
    vec![
        selinux("selinux-level", "spec.securityContext.seLinuxOptions.level", ":"),
        selinux("selinux-role", "spec.securityContext.seLinuxOptions.role", ""),
        selinux("selinux-type", "spec.securityContext.seLinuxOptions.type", ""),
        selinux("selinux-user", "spec.securityContext.seLinuxOptions.user", ""),
        bot("privileged-escalates", "spec.securityContext")
            .must("!(self.?privileged.orValue(false) && !self.?allowPrivilegeEscalation.orValue(true))")
            .names(".allowPrivilegeEscalation")
            .or("must not be false when privileged is true: a privileged process can always gain rights; change one of the two"),
        bot("non-root-user", "spec.securityContext")
            .must("!(self.?runAsNonRoot.orValue(false) && self.?runAsUser.orValue(1) == 0)")
            .names(".runAsUser")
            .or("must not be 0 when runAsNonRoot is true; set another user or drop runAsNonRoot"),
        capability("capability-add", "spec.securityContext.capabilities.add[]"),
        capability("capability-drop", "spec.securityContext.capabilities.drop[]"),
        bot("proc-mount", "spec.securityContext.procMount")
            .must("self == 'Default'")
            .or("must be Default, or left out: Unmasked needs a user namespace, as in a Pod, and a bot has none of its own"),
        profile_type("seccomp-type", "spec.securityContext.seccompProfile.type"),
        profile_name("seccomp-profile", "spec.securityContext.seccompProfile"),
        bot("seccomp-profile-path", "spec.securityContext.seccompProfile.localhostProfile")
            .must(r"!self.startsWith('/') && !self.matches(r'(^|/)[.][.](/|$)') && !self.contains('\u0000')")
            .or("must be a relative path without '..', below the node's folder of seccomp profiles"),
        profile_type("apparmor-type", "spec.securityContext.appArmorProfile.type"),
        profile_name("apparmor-profile", "spec.securityContext.appArmorProfile"),
        bot("apparmor-profile-name", "spec.securityContext.appArmorProfile.localhostProfile")
            .must(r"self.trim() == self && !self.contains('\u0000')")
            .or("must be the name of a profile that is loaded on the node, without white space around it"),
        bot("no-windows", "spec.securityContext")
            .must("!has(self.windowsOptions)")
            .names(".windowsOptions")
            .or("is not supported: bots run on Linux; remove it")
            .is(Why::Forbidden),
    ]
}

fn placement() -> Vec<Rule> {
    vec![
        object_name(Kind::BotContainer, "runtime-class-name", "spec.runtimeClassName", "a RuntimeClass"),
        object_name(Kind::BotContainer, "node-name", "spec.nodeName", "a node"),
        bot("node-selector-key", "spec.nodeSelector")
            .must(format!("self.all(key, size(key) <= 317 && key.matches(r'{LABEL_KEY}'))"))
            .or("must have keys of labels: [prefix/]name, the name at most 63 letters, digits, '-', '_' and '.'"),
        bot("node-selector-value", "spec.nodeSelector{}")
            .must(matches(LABEL_VALUE))
            .or("must be a label's value: at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit; or empty"),
        bot("toleration-key", "spec.tolerations[].key")
            .must(format!("self == '' || {}", matches(LABEL_KEY)))
            .or("must be the key of a taint: [prefix/]name, the name at most 63 letters, digits, '-', '_' and '.'"),
        bot("toleration-operator", "spec.tolerations[].operator")
            .must("self in ['', 'Equal', 'Exists']")
            .or("must be Equal or Exists; unset means Equal"),
        bot("toleration-any-key", "spec.tolerations[]")
            .must("(has(self.key) && self.key != '') || (has(self.operator) && self.operator == 'Exists')")
            .names(".operator")
            .or("must be Exists when key is empty, which tolerates every taint; else set key"),
        bot("toleration-no-value", "spec.tolerations[]")
            .must("!(has(self.operator) && self.operator == 'Exists') || !has(self.value) || self.value == ''")
            .names(".value")
            .or("must be empty when operator is Exists; use Equal to compare values"),
        bot("toleration-value", "spec.tolerations[].value")
            .must(matches(LABEL_VALUE))
            .or("must be a taint's value: at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit; or empty"),
        bot("toleration-effect", "spec.tolerations[].effect")
            .must("self in ['', 'NoSchedule', 'PreferNoSchedule', 'NoExecute']")
            .or("must be NoSchedule, PreferNoSchedule or NoExecute; unset means all"),
        bot("toleration-seconds", "spec.tolerations[]")
            .must("!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')")
            .names(".tolerationSeconds")
            .or("may be set only when effect is NoExecute"),
        fixed_once_placed("runtime-class-placed", ".spec.runtimeClassName"),
        fixed_once_placed("node-name-placed", ".spec.nodeName"),
        fixed_once_placed("node-selector-placed", ".spec.nodeSelector"),
        fixed_once_placed("tolerations-placed", ".spec.tolerations"),
        fixed_once_placed("network-mode-placed", ".spec.network.mode"),
    ]
}

fn network() -> Vec<Rule> {
    vec![
        bot("hostname-label", "spec.network.hostname")
            .must(matches(DNS_LABEL))
            .or("must be a DNS label: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63"),
        bot("dns-none-needs-servers", "spec")
            .must("!has(self.dnsPolicy) || self.dnsPolicy != 'None' || (has(self.dnsConfig) && has(self.dnsConfig.nameservers) && self.dnsConfig.nameservers.size() > 0)")
            .names(".dnsConfig.nameservers")
            .or("must have at least one address when dnsPolicy is None")
            .spares_old()
            .is(Why::Required),
        bot("dns-server-ip", "spec.dnsConfig.nameservers[]")
            .must("isIP(self)")
            .or("must be an IP address, for example 10.96.0.10"),
        bot("dns-search-name", "spec.dnsConfig.searches[]")
            .must("self == '.' || self.matches(r'^[a-z0-9_]([-a-z0-9_]*[a-z0-9_])?([.][a-z0-9_]([-a-z0-9_]*[a-z0-9_])?)*[.]?$')")
            .or("must be a domain name in lower case, or '.'"),
        bot("dns-search-total", "spec.dnsConfig.searches")
            .must("self.map(name, size(name) + 1).sum() <= 2049")
            .or("must not be longer than 2048 characters in all, spaces between them included"),
        bot("dns-option-name", "spec.dnsConfig.options[]")
            .must("has(self.name) && self.name.matches('^[!-~]+$')")
            .names(".name")
            .or("must be the name of an option of resolv.conf, for example ndots")
            .is(Why::Required),
        bot("dns-option-value", "spec.dnsConfig.options[].value")
            .must("self.matches('^[!-~]*$')")
            .or("must be printable ASCII characters without spaces"),
    ]
}

fn data() -> Vec<Rule> {
    // Minute, hour, day of month, month, day of week: crontab(5).
    fn cron(value: &str) -> String {
        let item = format!("([*]|{value}(-{value})?)(/[1-9][0-9]?)?");
        format!("{item}(,{item})*")
    }
    let schedule = format!(
        "(?i)^{} +{} +{} +{} +{}$",
        cron("[0-5]?[0-9]"),
        cron("([01]?[0-9]|2[0-3])"),
        cron("(0?[1-9]|[12][0-9]|3[01])"),
        cron("(0?[1-9]|1[0-2]|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"),
        cron("(0?[0-7]|sun|mon|tue|wed|thu|fri|sat)"),
    );
    const PATH: &str = "must be an absolute path other than '/', without empty, '.' or '..' components, without a trailing slash and control characters";
    const KERNEL: &str = "must not be under /proc, /sys or /dev: they are the kernel's";
    let sum = "self.map(f, has(f.content) ? size(bytes(f.content)) : 0).sum()";
    vec![
        bot("snapshotter-name", "spec.snapshotter")
            .must("self.matches(r'^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$')")
            .or("must be the name of a containerd snapshotter, for example overlayfs"),
        never_changes(
            Kind::BotContainer,
            "snapshotter-immutable",
            ".snapshotter",
            "", "unset (the default of the node)",
            "the writable layer lies in it: take a BotSnapshot and restore it into another BotContainer",
        ),
        bot("data-path-clean", "spec.data.path").must(CLEAN_PATH).or(PATH),
        bot("data-path-names", "spec.data.path").must(SHORT_NAMES).or(NAMES),
        bot("data-path-kernel", "spec.data.path").must(OUTSIDE_KERNEL).or(KERNEL),
        // A directory there would have a file mounted on it, which no runtime can.
        bot("data-path-own-files", "spec.data.path")
            .must(r"!self.matches(r'^/etc/(hosts|hostname|resolv[.]conf|localtime)(/|$)')")
            .or("must not be /etc/hosts, /etc/hostname, /etc/resolv.conf or /etc/localtime, nor below: Berth mounts files there"),
        bot("data-path-immutable", "spec.data.path")
            .must("self == oldSelf")
            .or("is immutable: the data lies there")
            .says("'is immutable: it is ' + oldSelf + ' and cannot become ' + self + '; the data lies there'")
            .is(Why::Forbidden),
        object_name(Kind::BotContainer, "restore-from-name", "spec.restoreFrom.snapshotName", "a BotSnapshot of this namespace"),
        never_changes(
            Kind::BotContainer,
            "restore-from-immutable",
            ".restoreFrom",
            ".snapshotName",
            "unset",
            "it says what the bot was made from; use rollback to go to a version of this bot",
        ),
        bot("rollback-one-target", "spec.rollback")
            .must("has(self.toVersion) != has(self.snapshotName)")
            .or("must have exactly one of toVersion and snapshotName")
            .says("'must have exactly one of toVersion and snapshotName, and has ' + (has(self.toVersion) ? 'both' : 'none')"),
        bot("rollback-id", "spec.rollback.id")
            .must(r"self.matches(r'^[!-~]([ -~]*[!-~])?$')")
            .or("must be one or more printable ASCII characters without spaces around them, for example the date; a new id runs the rollback again"),
        object_name(Kind::BotContainer, "rollback-snapshot-name", "spec.rollback.snapshotName", "a BotSnapshot of this bot"),
        bot("schedule-cron", "spec.snapshotPolicy.schedule")
            .must(format!("self.matches(r'{schedule}')"))
            .or("must be five cron fields separated by spaces: minute hour day-of-month month day-of-week, for example '0 3 * * *'; write @daily as '0 0 * * *', and a time zone into timeZone"),
        bot("schedule-time-zone", "spec.snapshotPolicy.timeZone")
            .must(format!("{} && self.lowerAscii() != 'local'", matches(TZ_NAME)))
            .or("must be a name of the tz database, for example Europe/Berlin or Etc/UTC"),
        bot("skill-name", "spec.skills[].name")
            .must(matches(DNS_LABEL))
            .or("must be a DNS label, since it becomes a folder: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63"),
        bot("skill-description-line", "spec.skills[].description")
            .must(r"!self.matches(r'[\x00-\x1f\x7f]')")
            .or("must be one line without control characters"),
        bot("skill-metadata-key", "spec.skills[].metadata")
            .must("self.all(key, key.matches(r'^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$') && !(key in ['name', 'description', 'metadata']))")
            .or("must have keys of at most 63 letters, digits, '-', '_' and '.', and not name, description or metadata, which have fields of their own"),
        bot("skill-content-nul", "spec.skills[].content")
            .must(r"!self.contains('\u0000')")
            .or("must be text: it contains a NUL character"),
        bot("skills-total", "spec.skills")
            .must(format!("{sum} <= 262144"))
            .or("skills must not be larger than 262144 bytes in all; write large ones into the bot's data at run time"),
        bot("file-path-clean", "spec.files[].path").must(CLEAN_PATH).or(PATH),
        bot("file-path-names", "spec.files[].path").must(SHORT_NAMES).or(NAMES),
        bot("file-path-kernel", "spec.files[].path").must(OUTSIDE_KERNEL).or(KERNEL),
        bot("file-one-source", "spec.files[]")
            .must("[has(self.content), has(self.secretKeyRef), has(self.configMapKeyRef)].filter(set, set).size() == 1")
            .or("must have exactly one of content, secretKeyRef and configMapKeyRef")
            .says("'must have exactly one of content, secretKeyRef and configMapKeyRef, and ' + self.path + ' has ' + ([has(self.content), has(self.secretKeyRef), has(self.configMapKeyRef)].exists(set, set) ? 'more than one' : 'none')"),
        object_name(Kind::BotContainer, "file-secret-name", "spec.files[].secretKeyRef.name", "a Secret"),
        data_key("file-secret-key", "spec.files[].secretKeyRef.key"),
        object_name(Kind::BotContainer, "file-config-map-name", "spec.files[].configMapKeyRef.name", "a ConfigMap"),
        data_key("file-config-map-key", "spec.files[].configMapKeyRef.key"),
        bot("files-total", "spec.files")
            .must(format!("{sum} <= 131072"))
            .or("the content of files must not be larger than 131072 bytes in all; put large ones into ConfigMaps"),
        bot("files-not-nested", "spec.files")
            .must("self.all(f, !self.exists(g, f.path.startsWith(g.path + '/')))")
            .or("must not have a file below another file"),
        bot("files-spare-data", "spec")
            .must("!has(self.files) || self.files.all(f, f.path == '' || !((self.data.path + '/').startsWith(f.path + '/')) && !(f.path + '/').startsWith(self.data.path + '/.skills/'))")
            .names(".files")
            .or("must not have a file in the place of data.path, above it, or in its .skills folder")
            .spares_old()
            .says("'must not have a file in the place of data.path (' + self.data.path + '), above it, or in its .skills folder'"),
    ]
}

fn status() -> Vec<Rule> {
    vec![
        // Two nodes must never both believe that a bot is theirs (invariant 2): a binding is first taken back, which the
        // old node sees, and then given anew.
        bot("binding-stays", "status.nodeName")
            .must("self == oldSelf")
            .or("cannot change from one node to another in one write; a binding is cleared first")
            .says("'cannot change from ' + oldSelf + ' to ' + self + ' in one write; a binding is cleared first'")
            .is(Why::Forbidden),
        bot("status-bot-id-stays", "status.botId")
            .must("self == oldSelf")
            .or("cannot change: a bot keeps its identity")
            .says("'cannot change from ' + oldSelf + ' to ' + self + ': a bot keeps its identity'")
            .is(Why::Forbidden),
    ]
}

fn snapshots() -> Vec<Rule> {
    let text = |name, at: &'static str| {
        snapshot(name, at)
            .must("self == oldSelf")
            .or("is immutable; create another BotSnapshot")
            .says("'is immutable: it is ' + oldSelf + ' and cannot become ' + self + '; create another BotSnapshot'")
            .is(Why::Forbidden)
    };
    let number = |name, at: &'static str, advice: &str| {
        snapshot(name, at).must("self == oldSelf").or(format!("is immutable; {advice}"))
    };
    const ANOTHER: &str = "create another BotSnapshot";
    vec![
        object_name(
            Kind::BotSnapshot,
            "snapshot-bot-name",
            "spec.botContainerName",
            "a BotContainer of this namespace",
        ),
        text("snapshot-bot-immutable", "spec.botContainerName"),
        text("snapshot-consistency-immutable", "spec.consistency"),
        number("snapshot-freeze-immutable", "spec.maxFreezeMillis", ANOTHER),
        number("snapshot-deadline-immutable", "spec.failureDeadlineSeconds", ANOTHER),
        snapshot("snapshot-export-once", "spec.export")
            .must("self == oldSelf || oldSelf == 'None'")
            .or("may change from None to OCI only: what was exported stays")
            .says(
                "'may change from None to OCI only, not from ' + oldSelf + ' to ' + self + ': what was exported stays'",
            )
            .is(Why::Forbidden),
        snapshot("snapshot-display-name", "spec.displayName")
            .must(r"self.matches(r'^[^\x00-\x1f\x7f]+$') && self.trim() == self")
            .or("must be one line of text without spaces around it; leave it out for 'Version N'"),
        text("snapshot-bot-id-stays", "status.botId"),
        number("snapshot-version-stays", "status.version", "a version is given once"),
    ]
}

fn records_and_nodes() -> Vec<Rule> {
    vec![
        record("record-bot-id-label", "spec.botId")
            .must(matches(DNS_LABEL))
            .or("must be a DNS label: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63"),
        record("record-name", "")
            .must("self.metadata.name == self.spec.botId")
            .names(".spec.botId")
            .or("must be the name of the BotRecord: creating it is the lock on the botId")
            .says("'is ' + self.spec.botId + ' and must be the name of the BotRecord, ' + self.metadata.name + ': creating it is the lock on the botId'"),
        record("record-version-grows", "spec.lastVersion")
            .must("self >= oldSelf")
            .or("must not decrease: a version is given once and never reused"),
        object_name(Kind::BotRecord, "record-holder-name", "spec.holder.name", "a BotContainer"),
        object_name(Kind::BotRecord, "record-node-name", "spec.nodeName", "a node"),
        node("node-adopt-orphan", "spec.adopt[].orphan")
            .must(r"self.matches(r'^berth-v-[-a-z0-9]+$')")
            .or("must be a name of status.orphans, berth-v- and an uid: `kubectl berth adopt` lists them"),
        node("node-adopt-namespace", "spec.adopt[].namespace")
            .must(matches(DNS_LABEL))
            .or("must be the name of a namespace: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63"),
        object_name(Kind::BotNode, "node-adopt-snapshot", "spec.adopt[].snapshotName", "the BotSnapshot to be made"),
        node("node-cidr", "spec.botCIDR")
            .must("isCIDR(self) && cidr(self) == cidr(self).masked() && cidr(self).prefixLength() >= 8 && cidr(self).prefixLength() <= (cidr(self).ip().family() == 4 ? 30 : 126)")
            .or("must be the first address of a block and the length of its prefix, with room for bots: 10.208.3.0/24 (/8 to /30; IPv6 /8 to /126)"),
        node("node-cidr-stays", "spec")
            .must("!has(oldSelf.botCIDR) || (has(self.botCIDR) && self.botCIDR == oldSelf.botCIDR)")
            .names(".botCIDR")
            .or("is immutable once given: bots have addresses in it; to give another one remove the node's bots and delete the BotNode")
            .says("'is immutable once given: it is ' + oldSelf.botCIDR + ' and cannot become ' + (has(self.botCIDR) ? self.botCIDR : 'unset') + '; bots have addresses in it: to give another one remove the bots of the node and delete the BotNode'")
            .is(Why::Forbidden),
    ]
}
