//! The environment of a bot's process: what a Pod's container would get from the same lines. Pure.
//!
//! ```text
//! envFrom, env  --resolve_env-->  (name, value) in order  --process_env-->  NAME=VALUE, the image's below the bot's
//!                                        \--expand-->  $(NAME) in command and args
//! ```
//!
//! The rules are kubelet's: `envFrom` first, later wins, a key that is no variable's name is passed over; then `env`,
//! where `$(NAME)` sees what stands before it. An error never holds a value: it may be a Secret's.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use k8s_openapi::api::core::v1::{EnvFromSource, EnvVar, EnvVarSource, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::quantity::Amount;
use super::spec::SpecError;
use crate::api::bot_container::BotResources;
use crate::api::condition::Reason;

/// The kernel takes no longer string in arguments or environment, bytes: `MAX_ARG_STRLEN` less the NUL.
pub const MAX_STRING: usize = 128 * 1024 - 1;

/// The search path where the image has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Which kind of object an environment variable refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceKind {
    /// A ConfigMap's `data`.
    ConfigMap,
    /// A Secret's `data`, decoded.
    Secret,
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        })
    }
}

/// Keys and values of a ConfigMap or Secret.
pub type SourceData = BTreeMap<String, Vec<u8>>;

/// What `fieldRef` and `resourceFieldRef` can ask of a bot.
#[derive(Clone, Copy, Debug)]
pub struct FieldContext<'a> {
    /// `metadata.name`
    pub name: &'a str,
    /// `metadata.namespace`
    pub namespace: &'a str,
    /// `metadata.uid`
    pub uid: &'a str,
    /// `metadata.labels['KEY']`
    pub labels: &'a BTreeMap<String, String>,
    /// `metadata.annotations['KEY']`
    pub annotations: &'a BTreeMap<String, String>,
    /// `spec.nodeName`
    pub node_name: &'a str,
    /// `status.podIP` is the first, `status.podIPs` all: the bot's, or with `network.mode: Host` the node's.
    pub pod_ips: &'a [String],
    /// `status.hostIP` is the first, `status.hostIPs` all: the node's.
    pub host_ips: &'a [String],
    /// `requests.*` and `limits.*`
    pub resources: Option<&'a BotResources>,
    /// What an unset limit stands for, as in a Pod.
    pub allocatable: &'a BTreeMap<String, Quantity>,
}

/// Why the environment can't be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// An object that the spec names is missing, or lacks a key.
    #[error("{field}: {}; create it, or set optional: true", match .key {
        Some(key) => format!("{} {:?} has no key {key:?}", .kind, .name),
        None => format!("there is no {} {:?} in this namespace", .kind, .name),
    })]
    ConfigNotFound {
        /// Which field of the spec refers to it.
        field: String,
        /// Its kind.
        kind: SourceKind,
        /// Its name.
        name: String,
        /// The key that it lacks; `None` when the object itself is missing.
        key: Option<String>,
    },
    /// A value of a ConfigMap or Secret can't be a variable's.
    #[error(transparent)]
    BadValue(SpecError),
    /// The spec itself asks for what can't be.
    #[error(transparent)]
    InvalidSpec(#[from] SpecError),
}

impl EnvError {
    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        match self {
            Self::ConfigNotFound { .. } => Reason::ConfigNotFound,
            Self::BadValue(error) | Self::InvalidSpec(error) => error.reason(),
        }
    }

    /// Whether trying again, with the spec as it is, can help.
    pub fn retryable(&self) -> bool {
        match self {
            // The object may be created, and the agent does not watch it.
            Self::ConfigNotFound { .. } => true,
            // Nor does it see that the value is corrected.
            Self::BadValue(_) => true,
            Self::InvalidSpec(error) => error.retryable(),
        }
    }
}

/// Variables in the order of their first appearance; setting one again keeps its place.
#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
    places: HashMap<String, usize>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        match self.places.get(name) {
            Some(&place) => self.list[place].1 = value,
            None => {
                self.places.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value));
            }
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.places.get(name).map(|&place| self.list[place].1.as_str())
    }
}

/// Resolves `spec.envFrom` and `spec.env`. `sources` gives the data of a ConfigMap or Secret of the bot's namespace.
///
/// # Errors
/// When a source or key that is not optional is missing, or a field asks for what a bot does not have.
pub fn resolve_env<'s>(
    env: &[EnvVar],
    env_from: &[EnvFromSource],
    sources: &impl Fn(SourceKind, &str) -> Option<&'s SourceData>,
    context: &FieldContext,
) -> Result<Vec<(String, String)>, EnvError> {
    let mut variables = Variables::default();
    for (i, from) in env_from.iter().enumerate() {
        let field = format!("spec.envFrom[{i}]");
        let (kind, name, optional) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(r), None) => (SourceKind::ConfigMap, &r.name, r.optional),
            (None, Some(r)) => (SourceKind::Secret, &r.name, r.optional),
            (None, None) | (Some(_), Some(_)) => {
                let right = "set exactly one of configMapRef and secretRef";
                return Err(SpecError::new(&field, "", "names no source, or two", right).into());
            }
        };
        let Some(data) = sources(kind, name) else {
            if optional == Some(true) {
                continue;
            }
            return Err(EnvError::ConfigNotFound { field, kind, name: name.clone(), key: None });
        };
        let prefix = from.prefix.as_deref().unwrap_or("");
        for (key, value) in data {
            let variable = format!("{prefix}{key}");
            if is_name(&variable) {
                variables.set(&variable, text(&field, key, value)?);
            }
        }
    }
    for (i, var) in env.iter().enumerate() {
        let field = format!("spec.env[{i}]");
        if !is_name(&var.name) {
            let right = "use printable ASCII characters without =";
            return Err(SpecError::new(&format!("{field}.name"), &var.name, "is no variable's name", right).into());
        }
        let value = match (var.value.as_deref().filter(|v| !v.is_empty()), &var.value_from) {
            (Some(_), Some(_)) => {
                let right = "set one of value and valueFrom";
                return Err(SpecError::new(&field, &var.name, "has two values", right).into());
            }
            (Some(value), None) => Some(expand(&format!("{field}.value"), value, |name| variables.get(name))?),
            (None, Some(from)) => from_source(&format!("{field}.valueFrom"), from, sources, context)?,
            (None, None) => Some(String::new()),
        };
        // An optional source that is not there leaves what `envFrom` gave.
        if let Some(value) = value {
            variables.set(&var.name, value);
        }
    }
    Ok(variables.list)
}

fn from_source<'s>(
    field: &str,
    from: &EnvVarSource,
    sources: &impl Fn(SourceKind, &str) -> Option<&'s SourceData>,
    context: &FieldContext,
) -> Result<Option<String>, EnvError> {
    let invalid = |value: &str, why: &str, right: &str| Err(SpecError::new(field, value, why, right).into());
    match from {
        EnvVarSource {
            config_map_key_ref: Some(r),
            secret_key_ref: None,
            field_ref: None,
            resource_field_ref: None,
            file_key_ref: None,
        } => key_of(field, SourceKind::ConfigMap, &r.name, &r.key, r.optional, sources),
        EnvVarSource {
            config_map_key_ref: None,
            secret_key_ref: Some(r),
            field_ref: None,
            resource_field_ref: None,
            file_key_ref: None,
        } => key_of(field, SourceKind::Secret, &r.name, &r.key, r.optional, sources),
        EnvVarSource {
            config_map_key_ref: None,
            secret_key_ref: None,
            field_ref: Some(r),
            resource_field_ref: None,
            file_key_ref: None,
        } => Ok(Some(field_value(&format!("{field}.fieldRef.fieldPath"), &r.field_path, context)?)),
        EnvVarSource {
            config_map_key_ref: None,
            secret_key_ref: None,
            field_ref: None,
            resource_field_ref: Some(r),
            file_key_ref: None,
        } => Ok(Some(resource_value(&format!("{field}.resourceFieldRef"), r, context)?)),
        EnvVarSource {
            config_map_key_ref: None,
            secret_key_ref: None,
            field_ref: None,
            resource_field_ref: None,
            file_key_ref: Some(r),
        } => invalid(&r.volume_name, "names a volume, which bots don't have", "use configMapKeyRef or secretKeyRef"),
        _ => invalid(
            "",
            "names no source, or more than one",
            "set exactly one of configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef",
        ),
    }
}

fn key_of<'s>(
    field: &str,
    kind: SourceKind,
    name: &str,
    key: &str,
    optional: Option<bool>,
    sources: &impl Fn(SourceKind, &str) -> Option<&'s SourceData>,
) -> Result<Option<String>, EnvError> {
    let missing = |key: Option<&str>| {
        let (field, name, key) = (field.to_owned(), name.to_owned(), key.map(str::to_owned));
        if optional == Some(true) { Ok(None) } else { Err(EnvError::ConfigNotFound { field, kind, name, key }) }
    };
    let Some(data) = sources(kind, name) else { return missing(None) };
    match data.get(key) {
        Some(value) => Ok(Some(text(field, key, value)?)),
        None => missing(Some(key)),
    }
}

/// A value of a ConfigMap or Secret as text that the kernel takes. The error names the key, never the value.
fn text(field: &str, key: &str, value: &[u8]) -> Result<String, EnvError> {
    let refuse = |why: &str| {
        let right = "keep such a value in spec.files, or take it out of the object";
        Err(EnvError::BadValue(SpecError::new(field, key, why, right)))
    };
    if value.len() > MAX_STRING {
        return refuse(
            "is the key of a value longer than 131071 bytes, the most that an environment variable can hold",
        );
    }
    match std::str::from_utf8(value) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        Ok(_) | Err(_) => refuse("is the key of a value that is no UTF-8 text or has a NUL"),
    }
}

fn field_value(field: &str, path: &str, context: &FieldContext) -> Result<String, SpecError> {
    let first = |ips: &[String]| ips.first().cloned().unwrap_or_default();
    let value = match path {
        "metadata.name" => context.name.to_owned(),
        "metadata.namespace" => context.namespace.to_owned(),
        "metadata.uid" => context.uid.to_owned(),
        "spec.nodeName" => context.node_name.to_owned(),
        "status.podIP" => first(context.pod_ips),
        "status.podIPs" => context.pod_ips.join(","),
        "status.hostIP" => first(context.host_ips),
        "status.hostIPs" => context.host_ips.join(","),
        _ => {
            let entry = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
            if let Some(key) = entry("metadata.labels['") {
                context.labels.get(key).cloned().unwrap_or_default()
            } else if let Some(key) = entry("metadata.annotations['") {
                context.annotations.get(key).cloned().unwrap_or_default()
            } else {
                let right = "use metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], \
                             metadata.annotations['KEY'], spec.nodeName, status.podIP, status.podIPs, status.hostIP or \
                             status.hostIPs";
                return Err(SpecError::new(field, path, "is no field that a bot has", right));
            }
        }
    };
    // An annotation may hold anything.
    if value.contains('\0') || value.len() > MAX_STRING {
        let right = "correct the annotation";
        return Err(SpecError::new(field, path, "has a NUL, or is longer than 131071 bytes", right));
    }
    Ok(value)
}

fn resource_value(field: &str, r: &ResourceFieldSelector, context: &FieldContext) -> Result<String, SpecError> {
    let none = BotResources::default();
    let resources = context.resources.unwrap_or(&none);
    let (key, quantity) = match r.resource.split_once('.') {
        Some(("limits", key @ ("cpu" | "memory" | "pids"))) => {
            (key, resources.limits.get(key).or_else(|| context.allocatable.get(key)))
        }
        // What is not requested is reserved as the limit has it, as a Pod's defaults do.
        Some(("requests", key @ ("cpu" | "memory"))) => {
            (key, resources.requests.get(key).or_else(|| resources.limits.get(key)))
        }
        _ => {
            let right = "use limits.cpu, limits.memory, limits.pids, requests.cpu or requests.memory";
            return Err(SpecError::new(&format!("{field}.resource"), &r.resource, "is no resource of a bot", right));
        }
    };
    let bad_divisor = |divisor: &Quantity| {
        let right = "use for example 1, 1m (cpu only), 1Ki or 1Mi";
        SpecError::new(&format!("{field}.divisor"), &divisor.0, "is no divisor", right)
    };
    let one = Quantity("1".to_owned());
    let divisor =
        r.divisor.as_ref().filter(|d| Amount::parse(d) != Amount::parse(&Quantity("0".into()))).unwrap_or(&one);
    let zero = Quantity("0".to_owned());
    let quantity = quantity.unwrap_or(&zero);
    // Both rounded up first, cpu to thousandths, all else to units, as kubelet does.
    let unit = if key == "cpu" { Amount::millis } else { Amount::units };
    let divisor = Amount::parse(divisor).and_then(unit).filter(|d| *d > 0).ok_or_else(|| bad_divisor(divisor))?;
    let amount = Amount::parse(quantity).and_then(unit).filter(|a| *a >= 0).ok_or_else(|| {
        SpecError::new(&format!("spec.resources.{}", r.resource), &quantity.0, "is no quantity", "correct it")
    })?;
    Ok((amount / divisor + i64::from(amount % divisor != 0)).to_string())
}

/// A variable's name as Kubernetes allows it: printable ASCII, no `=`.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 1024 && name.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'=')
}

/// Replaces `$(NAME)` by the variable's value where there is one; `$$` becomes `$`, so `$$(NAME)` stays as `$(NAME)`.
///
/// # Errors
/// When the result is longer than the kernel takes. Without a bound, a list of variables that each double the one before
/// would fill the agent's memory.
pub fn expand<'v>(field: &str, input: &str, variable: impl Fn(&str) -> Option<&'v str>) -> Result<String, SpecError> {
    let mut output = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(dollar) = rest.find('$') {
        output.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        rest = if let Some(after) = after.strip_prefix('$') {
            output.push('$');
            after
        } else if let Some((name, after)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match variable(name) {
                Some(value) => output.push_str(value),
                None => {
                    output.push_str("$(");
                    output.push_str(name);
                    output.push(')');
                }
            }
            after
        } else {
            output.push('$');
            after
        };
        if output.len() > MAX_STRING {
            break;
        }
    }
    output.push_str(rest);
    if output.len() > MAX_STRING {
        let right = "make the variables that it refers to shorter";
        let why = "becomes longer than 131071 bytes, the most that one argument or variable can hold";
        return Err(SpecError::new(field, input, why, right));
    }
    Ok(output)
}

/// What of the process's environment comes neither from the image nor from `env`.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// `HOSTNAME`
    pub hostname: &'a str,
    /// `HOME`; `None`: `/`.
    pub home: Option<&'a str>,
    /// `TZ`, from `spec.timezone`.
    pub timezone: Option<&'a str>,
}

/// The environment as the runtime gets it, `NAME=VALUE`. Each layer goes over the one before: defaults (PATH, HOSTNAME,
/// HOME), the image's, `spec.timezone`, the bot's.
///
/// An entry of the image without name or `=` means nothing and is left out: runc would refuse to start.
pub fn process_env(
    image: &[String],
    surroundings: &Surroundings,
    bot: &[(String, String)],
) -> Result<Vec<String>, SpecError> {
    let mut variables = Variables::default();
    variables.set("PATH", DEFAULT_PATH.to_owned());
    variables.set("HOSTNAME", surroundings.hostname.to_owned());
    variables.set("HOME", surroundings.home.unwrap_or("/").to_owned());
    for (name, value) in image.iter().filter_map(|entry| entry.split_once('=')).filter(|(name, _)| !name.is_empty()) {
        variables.set(name, value.to_owned());
    }
    if let Some(timezone) = surroundings.timezone {
        variables.set("TZ", timezone.to_owned());
    }
    for (name, value) in bot {
        variables.set(name, value.clone());
    }
    let own = |name: &str| bot.iter().any(|(n, _)| n == name);
    for (name, value) in &variables.list {
        let field = if own(name) { "spec.env" } else { "the image's Env" };
        if name.is_empty() || name.contains(['\0', '=']) || value.contains('\0') {
            return Err(SpecError::new(field, name, "has a NUL, or no usable name", "take it out"));
        }
        if name.len() + 1 + value.len() > MAX_STRING {
            return Err(SpecError::new(field, name, "is longer than 131071 bytes", "make it shorter"));
        }
    }
    Ok(variables.list.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

#[cfg(test)]
mod tests;
