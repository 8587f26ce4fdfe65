//! What a bot's container is made from: its OCI spec, and the files that are mounted into it.
//!
//! ```text
//! layer's mounts -> root.rs (a descriptor) -> check, data path, user -+
//! Secrets, ConfigMaps ------------------------> environment, files ---+-> oci::runtime_spec -> JSON
//! image config, bot's spec, node's facts -----------------------------+
//! ```
//!
//! `spec.files` lie on a tmpfs below `files_dir`, a folder a bot: no Secret value comes onto a disk, into a layer or a log.
//! Berth's own files (hosts, hostname, resolv.conf, the time zone) are no secret, and the bot may write the first three, as
//! in a Pod: they lie on the disk that its layer is on, where it can fill no more than it could anyway, and not on a tmpfs
//! that all bots of the node, and `/run` itself, have in common (compare CVE-2020-8557 of kubelet).

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::types::Mount;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{Api, Client};

use crate::api::bot_container::{FileSpec, KeyRef, NetworkMode};
use crate::api::condition::{Reason, chain};
use crate::api::ids::ContainerId;
use crate::api::{BotContainer, BotContainerSpec};
use crate::image::RunConfig;
use crate::network::{
    ClusterDns, DnsWarning, ResolvConf, effective_policy, hosts_file, hosts_file_of_node, resolv_conf,
};
use crate::oci::seccomp::{ProfileError, localhost_profile};
use crate::oci::{
    BindMount, EnvError, FieldContext, NetworkNamespace, NodeFacts, RootError, SourceKind, SpecError, SpecInput, User,
    UserError, check_root, check_working_directory, ensure_directory, linux_resources, resolve_env, resolve_user,
    runtime_spec,
};

use super::cgroup::Cgroups;
use super::desired::{Alive, Desired};
use super::observe::{Attached, COMPLETE};
use super::references::{Kind, References};
use super::root::{self, MountFailed};
use super::signal;
use super::skills::{self, Skills};

/// Where systemd-resolved writes the servers that stand behind its stub on the node's loopback, which no bot with a network
/// of its own reaches (systemd-resolved(8); kubelet is set up the same way).
const BEHIND_THE_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// What is the same for all bots of a node.
#[derive(Clone, Debug)]
pub struct Options {
    /// A tmpfs: a folder a bot for `spec.files`, which are mounted in.
    pub files_dir: PathBuf,
    /// On a disk: a folder a bot for Berth's own files that are mounted in.
    pub own_files_dir: PathBuf,
    /// Where a layer is mounted for a moment, to get a descriptor of it.
    pub mnt_dir: PathBuf,
    /// Where named network namespaces are.
    pub netns_dir: PathBuf,
    /// Where `securityContext.seccompProfile.type: Localhost` looks for profiles.
    pub seccomp_dir: PathBuf,
    /// The tz database.
    pub zoneinfo_dir: PathBuf,
    /// The node's resolv.conf.
    pub resolv_conf: PathBuf,
    /// The cluster's DNS; empty where there is none.
    pub cluster_dns: ClusterDns,
    /// The node's name.
    pub node_name: String,
    /// The node's host name, for bots on its network.
    pub hostname: String,
    /// The node's addresses.
    pub host_ips: Vec<String>,
    /// What an unset limit stands for in the downward API.
    pub allocatable: BTreeMap<String, Quantity>,
    /// RuntimeClass handler -> containerd's runtime.
    pub runtimes: BTreeMap<String, String>,
}

/// The containerd runtime of a bot without a RuntimeClass.
pub const DEFAULT_RUNTIME: &str = "io.containerd.runc.v2";

/// Makes containers' specs. Cheap to clone.
#[derive(Clone)]
pub struct Bundle {
    options: Arc<Options>,
    node: Arc<NodeFacts>,
    cgroups: Cgroups,
    client: Client,
}

/// What one container is made from.
pub struct Input<'a> {
    /// Whose.
    pub desired: &'a Desired,
    /// What is asked.
    pub alive: &'a Alive,
    /// The object, for the downward API.
    pub bot: &'a BotContainer,
    /// How the image below the layer wants to be run.
    pub image: &'a RunConfig,
    /// What the spec refers to.
    pub references: &'a References,
    /// The layer's mounts.
    pub mounts: &'a [Mount],
    /// The bot's network as it was observed.
    pub network: &'a Attached,
    /// The skills as they were written last.
    pub noted: &'a Skills,
}

/// Why a container can't be made.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The layer can't be mounted.
    #[error("the bot's layer can't be opened")]
    Mount(#[from] MountFailed),
    /// The image's tree can't be used.
    #[error("the image's file system can't be used")]
    Root(#[from] RootError),
    /// The data path can't be used.
    #[error("spec.data.path {path:?} can't be used with this image")]
    Data {
        /// As it was asked.
        path: String,
        /// Why not.
        source: RootError,
    },
    /// The working directory can't be used.
    #[error("{field} can't be used")]
    WorkingDirectory {
        /// Whose it is: the spec's or the image's.
        field: &'static str,
        /// Why not.
        source: RootError,
    },
    /// The user can't be told.
    #[error(transparent)]
    User(#[from] UserError),
    /// The environment can't be made.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The spec can't be run.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A Secret or ConfigMap that `spec.files` names is missing, or lacks the key.
    #[error("{field}: there is no {kind:?} {name:?} with the key {key:?} in this namespace; create it")]
    FileSource {
        /// Path of the field.
        field: String,
        /// Kind of the object.
        kind: Kind,
        /// Its name.
        name: String,
        /// The key.
        key: String,
    },
    /// The time zone is not in the node's tz database.
    #[error(
        "spec.timezone: {zone:?} is not in this node's {dir}; use a name of the tz database, and install tzdata on the node"
    )]
    Timezone {
        /// As it was asked.
        zone: String,
        /// Where it was looked for.
        dir: String,
    },
    /// The RuntimeClass is missing, or the node does not know its handler.
    #[error("spec.runtimeClassName: {name:?} {why}")]
    RuntimeClass {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The API server did not give the RuntimeClass.
    #[error("can't read the RuntimeClass {name:?}")]
    Api {
        /// Its name.
        name: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// The seccomp profile of the node can't be used.
    #[error("the seccomp profile can't be used")]
    Seccomp(#[from] ProfileError),
    /// A file can't be written or removed.
    #[error("can't {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The spec can't be written as JSON.
    #[error("the OCI spec can't be written as JSON")]
    Json(#[from] serde_json::Error),
    /// A thread for blocking work died.
    #[error("the work on the bot's layer was cut off")]
    CutOff(#[from] tokio::task::JoinError),
}

impl BundleError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Mount(_) | Self::File { .. } | Self::CutOff(_) => Reason::StorageFailed,
            Self::Root(error) | Self::Data { source: error, .. } | Self::WorkingDirectory { source: error, .. } => {
                error.reason()
            }
            Self::User(error) => error.reason(),
            Self::Env(error) => error.reason(),
            Self::Spec(error) => error.reason(),
            Self::FileSource { .. } => Reason::ConfigNotFound,
            Self::Timezone { .. } | Self::RuntimeClass { .. } | Self::Json(_) => Reason::InvalidSpec,
            Self::Api { .. } => Reason::ConfigUnreadable,
            Self::Seccomp(error) => error.reason(),
        }
    }

    /// Whether trying again can help without an edit of the bot.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Mount(_) | Self::File { .. } | Self::CutOff(_) | Self::Api { .. } => true,
            // The object may be created; the agent does not watch it.
            Self::FileSource { .. } | Self::RuntimeClass { .. } => true,
            Self::Root(error) | Self::Data { source: error, .. } | Self::WorkingDirectory { source: error, .. } => {
                error.retryable()
            }
            Self::User(error) => error.retryable(),
            Self::Env(error) => error.retryable(),
            Self::Spec(error) => error.retryable(),
            Self::Timezone { .. } | Self::Json(_) => false,
            Self::Seccomp(error) => error.retryable(),
        }
    }
}

/// A container's making.
pub struct Made {
    /// The OCI spec as JSON.
    pub spec: Vec<u8>,
    /// The image's stop signal.
    pub stop_signal: u32,
    /// containerd's runtime.
    pub runtime: String,
    /// The skills that are in the bot's data now. One that can't be written keeps no bot from starting: it is tried again,
    /// and told, once the process runs.
    pub skills: Skills,
}

impl Bundle {
    /// `node` are the facts of the machine.
    pub fn new(options: Options, node: NodeFacts, cgroups: Cgroups, client: Client) -> Self {
        Self { options: Arc::new(options), node: Arc::new(node), cgroups, client }
    }

    /// The limits as the runtime takes them, as JSON.
    pub fn resources(&self, spec: &BotContainerSpec) -> Result<Vec<u8>, BundleError> {
        Ok(serde_json::to_vec(&linux_resources(spec.resources.as_ref(), &self.node)?)?)
    }

    /// Makes a container's spec, and writes the files that it mounts.
    pub async fn make(&self, input: &Input<'_>) -> Result<Made, BundleError> {
        let runtime = self.runtime(&input.alive.spec).await?;
        let spec = &input.alive.spec;
        let ips: Vec<String> = match input.network {
            Attached::Ready { ips } => ips.iter().map(IpAddr::to_string).collect(),
            _ if input.alive.network == NetworkMode::Host => self.options.host_ips.clone(),
            _ => Vec::new(),
        };
        let none = BTreeMap::new();
        let meta = &input.bot.metadata;
        let context = FieldContext {
            name: &input.desired.name,
            namespace: &input.desired.namespace,
            uid: input.desired.uid.as_str(),
            labels: meta.labels.as_ref().unwrap_or(&none),
            annotations: meta.annotations.as_ref().unwrap_or(&none),
            node_name: &self.options.node_name,
            pod_ips: &ips,
            host_ips: &self.options.host_ips,
            resources: spec.resources.as_ref(),
            allocatable: &self.options.allocatable,
        };
        let source = |kind, name: &str| match kind {
            SourceKind::Secret => input.references.get(Kind::Secret, name),
            SourceKind::ConfigMap => input.references.get(Kind::ConfigMap, name),
        };
        let mut env = resolve_env(&spec.env, &spec.env_from, &source, &context)?;
        // For `$(TZ)`. What the bot's own env says of it goes before.
        if let Some(zone) = spec.timezone.as_ref().filter(|_| env.iter().all(|(name, _)| name != "TZ")) {
            env.push(("TZ".to_owned(), zone.clone()));
        }
        let hostname = self.hostname(input.desired, input.alive);
        let files = self.files(input, &hostname, &ips)?;
        let stop_signal = signal::parse(input.image.stop_signal.as_deref());

        // Mounting and reading the image's tree blocks: it has a thread of its own.
        let this = self.clone();
        let (id, mounts) = (input.desired.id.clone(), input.mounts.to_vec());
        let (bot, image) = (spec.clone(), input.image.clone());
        let (alive_network, noted) = (input.alive.network, input.noted.clone());
        let (spec, skills) = tokio::task::spawn_blocking(move || -> Result<(Vec<u8>, Skills), BundleError> {
            let root = root::open(&mounts, &this.options.mnt_dir, id.as_str())?;
            let data = &bot.data.path;
            check_root(root.as_fd(), data).map_err(|source| match source {
                // What is wrong on the way to the data is a matter of that field, all else of the image.
                source @ (RootError::BadPath { .. } | RootError::NotADirectory { .. }) if source.is_on(data) => {
                    BundleError::Data { path: data.clone(), source }
                }
                source => source.into(),
            })?;
            let user = resolve_user(root.as_fd(), &image.user, bot.security_context.as_ref())?;
            let binds = this.write_files(&id, &files, &user)?;
            // 0755 and the bot's own user: a bot that does not run as root must be able to write its data.
            ensure_directory(root.as_fd(), &bot.data.path, user.uid, user.gid, 0o755)?;
            let (skills, failed) = skills::write(root.as_fd(), &bot.data.path, &bot.skills, &noted);
            if let Some(failed) = failed {
                tracing::warn!(%id, error = %chain(&failed), "the bot starts without a skill");
            }
            let netns = this.options.netns_dir.join(id.as_str());
            let localhost_seccomp = this.localhost_seccomp(&bot)?;
            let spec = runtime_spec(&SpecInput {
                id: &id,
                hostname: &hostname,
                bot: &bot,
                image: &image,
                env: &env,
                user: &user,
                netns: match alive_network {
                    NetworkMode::Host => NetworkNamespace::Host,
                    NetworkMode::Bridge | NetworkMode::None => NetworkNamespace::Path(&netns),
                },
                mounts: &binds,
                cgroups_path: &this.cgroups.path(&id),
                localhost_seccomp: localhost_seccomp.as_ref(),
                node: &this.node,
            })?;
            if let Some(process) = spec.process() {
                let field = if bot.working_dir.is_some() { "spec.workingDir" } else { "the image's WorkingDir" };
                check_working_directory(root.as_fd(), &process.cwd().to_string_lossy())
                    .map_err(|source| BundleError::WorkingDirectory { field, source })?;
            }
            Ok((serde_json::to_vec(&spec)?, skills))
        })
        .await??;
        Ok(Made { spec, stop_signal, runtime, skills })
    }

    fn hostname(&self, desired: &Desired, alive: &Alive) -> String {
        match alive.network {
            NetworkMode::Host => self.options.hostname.clone(),
            NetworkMode::Bridge | NetworkMode::None => {
                alive.spec.network.hostname.clone().unwrap_or_else(|| label_of(&desired.name))
            }
        }
    }

    /// The node's own DNS, as a bot with that network can use it.
    fn node_dns(&self, network: NetworkMode) -> Result<ResolvConf, BundleError> {
        let read = |path: &Path| match fs::read_to_string(path) {
            Ok(text) => Ok(ResolvConf::parse(&text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(ResolvConf::default()),
            Err(source) => Err(BundleError::File { what: "read", path: path.to_owned(), source }),
        };
        let node = read(&self.options.resolv_conf)?;
        if network == NetworkMode::Host || !node.is_loopback_only() {
            return Ok(node);
        }
        let behind = read(Path::new(BEHIND_THE_STUB))?;
        Ok(if behind.nameservers.is_empty() { node } else { behind })
    }

    /// Writes the bot's address into its hosts file, which was made before the address was known. In place: the file is
    /// mounted already, and no process reads it yet.
    pub fn tell_address(&self, desired: &Desired, alive: &Alive, network: &Attached) -> Result<(), BundleError> {
        let ips = match network {
            Attached::Ready { ips } if alive.network == NetworkMode::Bridge => ips,
            _ => return Ok(()),
        };
        let path = self.options.own_files_dir.join(desired.id.as_str()).join(HOSTS.to_string());
        let text = hosts_file(&self.hostname(desired, alive), ips);
        fs::write(&path, text).map_err(|source| BundleError::File { what: "write", path, source })
    }

    fn localhost_seccomp(
        &self,
        bot: &BotContainerSpec,
    ) -> Result<Option<oci_spec::runtime::LinuxSeccomp>, BundleError> {
        let profile = bot.security_context.as_ref().and_then(|security| security.seccomp_profile.as_ref());
        let Some(name) = profile.filter(|p| p.type_ == "Localhost").and_then(|p| p.localhost_profile.as_deref()) else {
            return Ok(None);
        };
        let dir = &self.options.seccomp_dir;
        let dir = match fs::File::open(dir) {
            // A node without the folder has no profile, this one included.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ProfileError::Missing { name: name.to_owned() }.into());
            }
            opened => opened.map_err(|source| BundleError::File {
                what: "open the folder of seccomp profiles",
                path: dir.clone(),
                source,
            })?,
        };
        Ok(Some(localhost_profile(dir.as_fd(), name)?))
    }

    async fn runtime(&self, spec: &BotContainerSpec) -> Result<String, BundleError> {
        let Some(name) = &spec.runtime_class_name else { return Ok(DEFAULT_RUNTIME.to_owned()) };
        let api: Api<RuntimeClass> = Api::all(self.client.clone());
        let class = api
            .get_opt(name)
            .await
            .map_err(|source| BundleError::Api { name: name.clone(), source: Box::new(source) })?;
        let unusable = |why: String| BundleError::RuntimeClass { name: name.clone(), why };
        let class = class.ok_or_else(|| unusable("does not exist; create it".to_owned()))?;
        self.options.runtimes.get(&class.handler).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.options.runtimes.keys().map(String::as_str).collect();
            unusable(format!(
                "asks for the handler {:?}, which this node does not have; it has {}",
                class.handler,
                known.join(", ")
            ))
        })
    }

    /// Content and place of every file that is mounted in.
    fn files(&self, input: &Input<'_>, hostname: &str, ips: &[String]) -> Result<Vec<File>, BundleError> {
        let spec = &input.alive.spec;
        let mut files = Vec::new();
        if input.alive.network == NetworkMode::Host {
            // A copy: with the node's own file mounted, a bot would go on seeing the old one when it is replaced.
            let node = fs::read_to_string("/etc/hosts").unwrap_or_default();
            files.push(File::new("/etc/hosts", hosts_file_of_node(&node), 0o644));
        } else {
            let ips: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.parse().ok()).collect();
            files.insert(HOSTS, File::new("/etc/hosts", hosts_file(hostname, &ips), 0o644));
            files.push(File::new("/etc/hostname", format!("{hostname}\n"), 0o644));
        }
        let node = self.node_dns(input.alive.network)?;
        let resolved = resolv_conf(
            effective_policy(spec.dns_policy, input.alive.network),
            spec.dns_config.as_ref(),
            &node,
            &self.options.cluster_dns,
            &input.desired.namespace,
        );
        for warning in &resolved.warnings {
            // That the node has no cluster DNS was told at the agent's start.
            if !matches!(warning, DnsWarning::NoClusterDns) {
                tracing::warn!(namespace = input.desired.namespace, bot = input.desired.name, %warning, "resolv.conf");
            }
        }
        files.push(File::new("/etc/resolv.conf", resolved.conf.to_string(), 0o644));
        if let Some(zone) = &spec.timezone {
            let rules = self.zone(zone)?;
            // Where TZ names it too: an image without a tz database would take it for UTC.
            for place in ["/etc/localtime", &format!("/usr/share/zoneinfo/{zone}")] {
                files.push(File { read_only: true, ..File::new(place, rules.clone(), 0o644) });
            }
        }
        let read_only = spec.security_context.as_ref().and_then(|security| security.read_only_root_filesystem);
        for own in &mut files {
            own.read_only |= read_only == Some(true);
        }
        for (i, file) in spec.files.iter().enumerate() {
            if let Some(content) = content(i, file, input.references)? {
                // As a Pod's volume does: one at /etc/hosts or the like takes the place of ours.
                for own in files.iter_mut().filter(|own| own.destination == file.path) {
                    own.mounted = false;
                }
                let mode = u32::try_from(file.mode.unwrap_or(0o644)).unwrap_or(0o644) & 0o777;
                files.push(File::of_bot(&file.path, content, mode));
            }
        }
        Ok(files)
    }

    /// The rules of a time zone (tzfile(5)).
    fn zone(&self, zone: &str) -> Result<Vec<u8>, BundleError> {
        let dir = &self.options.zoneinfo_dir;
        let plain = zone.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        let path = dir.join(zone);
        if plain && fs::metadata(&path).is_ok_and(|found| found.is_file()) {
            let rules = fs::read(&path).map_err(|source| BundleError::File { what: "read", path, source })?;
            // The folder has lists of zones as well.
            if rules.starts_with(b"TZif") {
                return Ok(rules);
            }
        }
        Err(BundleError::Timezone { zone: zone.to_owned(), dir: dir.display().to_string() })
    }

    /// Writes the files of a bot anew, each beside the old one and moved over it: a process that has the old one mounted
    /// keeps it. The mark comes last.
    fn write_files(&self, id: &ContainerId, files: &[File], user: &User) -> Result<Vec<BindMount>, BundleError> {
        let [secret, own] = self.dirs(id);
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| BundleError::File { what, path, source }
        };
        for dir in [&secret, &own] {
            fs::create_dir_all(dir).map_err(failed("create", dir))?;
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed("set the mode of", dir))?;
        }
        let mark = secret.join(COMPLETE);
        if let Err(error) = fs::remove_file(&mark)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(failed("remove", &mark)(error));
        }
        let mut binds = Vec::new();
        for (i, file) in files.iter().enumerate() {
            let dir = if file.of_bot { &secret } else { &own };
            let path = dir.join(i.to_string());
            let new = dir.join(format!("{i}.new"));
            let mut out = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)
                .map_err(failed("create", &new))?;
            out.write_all(&file.bytes).map_err(failed("write", &new))?;
            if file.of_bot {
                std::os::unix::fs::fchown(&out, Some(user.uid), Some(user.gid))
                    .map_err(failed("set the owner of", &new))?;
            }
            out.set_permissions(fs::Permissions::from_mode(file.mode)).map_err(failed("set the mode of", &new))?;
            fs::rename(&new, &path).map_err(failed("rename", &new))?;
            if file.mounted {
                binds.push(BindMount {
                    source: path,
                    destination: file.destination.clone(),
                    read_only: file.read_only,
                });
            }
        }
        // What is no longer asked for, a Secret's value it may be, does not wait for the bot's end.
        for entry in fs::read_dir(&secret).map_err(failed("list", &secret))? {
            let path = entry.map_err(failed("list", &secret))?.path();
            let index = path.file_name().and_then(|name| name.to_str()?.parse::<usize>().ok());
            if !index.and_then(|i| files.get(i)).is_some_and(|file| file.of_bot) {
                fs::remove_file(&path).map_err(failed("remove", &path))?;
            }
        }
        fs::write(&mark, b"").map_err(failed("create", &mark))?;
        Ok(binds)
    }

    /// The bot's folders of `spec.files` and of Berth's own files.
    fn dirs(&self, id: &ContainerId) -> [PathBuf; 2] {
        [&self.options.files_dir, &self.options.own_files_dir].map(|dir| dir.join(id.as_str()))
    }

    /// Removes the files of a bot. Safe twice.
    pub async fn remove_files(&self, id: &ContainerId) -> Result<(), BundleError> {
        for dir in self.dirs(id) {
            match tokio::fs::remove_dir_all(&dir).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(BundleError::File { what: "remove", path: dir, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Place of the hosts file among a bot's files, and its name.
const HOSTS: usize = 0;

/// A file to be mounted.
struct File {
    destination: String,
    bytes: Vec<u8>,
    mode: u32,
    /// The process's user owns it, else root does.
    of_bot: bool,
    /// Not where one of `spec.files` is mounted in its place.
    mounted: bool,
    /// As a Pod has it: what the spec asks for the process may only read, hosts and the like it may write unless its whole
    /// root is read-only.
    read_only: bool,
}

impl File {
    fn new(destination: &str, content: impl Into<Vec<u8>>, mode: u32) -> Self {
        let (bytes, destination) = (content.into(), destination.to_owned());
        Self { destination, bytes, mode, of_bot: false, mounted: true, read_only: false }
    }

    /// One of `spec.files`: with mode 0600 a bot that is not root could not read it, were it not its own.
    fn of_bot(destination: &str, content: Vec<u8>, mode: u32) -> Self {
        Self { of_bot: true, read_only: true, ..Self::new(destination, content, mode) }
    }
}

/// The content of one of `spec.files`; `None` for an optional one that is not there.
fn content(index: usize, file: &FileSpec, references: &References) -> Result<Option<Vec<u8>>, BundleError> {
    let find = |kind, key: &KeyRef, field: &str| {
        let found = references.get(kind, &key.name).and_then(|data| data.get(&key.key)).cloned();
        match found {
            None if key.optional != Some(true) => Err(BundleError::FileSource {
                field: format!("spec.files[{index}].{field}"),
                kind,
                name: key.name.clone(),
                key: key.key.clone(),
            }),
            found => Ok(found),
        }
    };
    match (&file.secret_key_ref, &file.config_map_key_ref) {
        (Some(key), _) => find(Kind::Secret, key, "secretKeyRef"),
        (None, Some(key)) => find(Kind::ConfigMap, key, "configMapKeyRef"),
        (None, None) => Ok(Some(file.content.clone().unwrap_or_default().into_bytes())),
    }
}

/// The object's name as a host name: its first 63 characters, without what may not end a label.
fn label_of(name: &str) -> String {
    let cut: String = name.chars().take(63).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}
