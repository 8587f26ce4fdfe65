//! Networks of bots: a named network namespace, a veth on the bridge, an address, and the packet rules.
//!
//! ```text
//!            ensure(id) ── record "adding" ── namespace.rs ── plugin.rs (CNI ADD) ── record ── rules.rs ── Attachment
//!                            record.rs         unshare, mount   bridge, host-local               netlink
//!            remove(id) ── rules ── CNI DEL ── veth ── namespace ── record        (each step safe twice)
//!            observe(id)   record + mount + veth: are they there, and do they belong together?
//!
//! bridge.rs   the bridge, its MAC and address     cidr.rs    the node's network      error.rs  what can fail
//! rules.rs    who may talk to whom                exec.rs    a program, a deadline   netlink.rs  the kernel, without exec
//! dns.rs      resolv.conf                         hosts.rs   /etc/hosts
//! ```
//!
//! The network is made *before* the bot's process and outlives a crash of its task: a restarted bot keeps its address
//! and costs no CNI call. Nothing here holds state that is not on the disk or in the kernel: after `kill -9` at any point
//! the next [`Network::ensure`] first takes down what a cut-off one left (CNI DEL), then makes it anew; it never retries
//! into leftovers.
//!
//! Everything happens in the network and mount namespace of the calling thread's process, the host's.

mod bridge;
mod cidr;
mod dns;
mod error;
mod exec;
mod hosts;
mod namespace;
mod netlink;
mod plugin;
mod record;
mod rules;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tokio::task::spawn_blocking;
use tracing::Instrument;

pub use cidr::{BadCidr, Cidr};
pub use dns::{ClusterDns, DnsWarning, ResolvConf, Resolved, effective_policy, resolv_conf};
pub use error::{NetworkError, PluginError};
pub use hosts::{hosts_file, hosts_file_of_node};
pub use record::Owner;
pub use rules::{Nft, Policy};

use crate::api::ids::ContainerId;
use namespace::{Identity, Mounted};
use netlink::{LinkChange, Mac};
use plugin::{Plugins, Verb};
use record::{Bridged, Leases, Record, Recorded, Records, Stage};
use rules::{Member, Rules};

/// Where a node's bot network lives and what it allows.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// Directories of the CNI plugins `bridge` and `host-local`, searched in order.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Gone after a boot: network namespaces are mounted at `run_dir/netns/ID`. Must be on a mount that containerd's
    /// shims see.
    pub run_dir: PathBuf,
    /// Kept over a boot: `state_dir/network/BRIDGE/ID.json` and host-local's `state_dir/leases/BRIDGE/`.
    pub state_dir: PathBuf,
    /// The bridge's name, at most 15 bytes. Several agents on one machine use different ones.
    pub bridge: String,
    /// Of the bridge and the bots' interfaces, in bytes.
    pub mtu: u32,
    /// How long a plugin (or `nft`) may take before it is killed. Two may run one after the other: ADD, then DEL.
    pub plugin_deadline: Duration,
    /// Whether to switch on the kernel's IPv4 forwarding, without which bots reach nothing outside their node.
    pub forward: bool,
    /// What bots may reach beside the default.
    pub policy: Policy,
    /// What loads the packet rules.
    pub nft: Nft,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        Self {
            cni_bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            run_dir: "/run/berth".into(),
            state_dir: "/var/lib/berth".into(),
            bridge: "berth0".to_owned(),
            mtu: 1500,
            plugin_deadline: Duration::from_secs(15),
            forward: true,
            policy: Policy::default(),
            nft: Nft::default(),
        }
    }
}

/// The network of a node's bots. Cheap to clone. Operations on one bot wait for each other; those on different bots run
/// side by side.
#[derive(Clone, Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

/// A bot's network, ready for its process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Path for the OCI spec's network namespace.
    pub netns: PathBuf,
    /// The bot's addresses; none with loopback only.
    pub ips: Vec<IpAddr>,
    /// The host's end of the veth pair; empty with loopback only.
    pub host_interface: String,
    /// The bridge's address.
    pub gateway: Option<IpAddr>,
}

/// What is really there of a bot's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkState {
    /// Neither namespace nor record. (Of a lease without either, [`Network::list`] tells.)
    Absent,
    /// Something is there that is no working network: cut off, from before a boot, or taken apart by someone.
    Partial {
        /// What is missing or does not fit.
        why: String,
    },
    /// Namespace, veth and record are there and belong together.
    Attached(Attachment),
}

/// Something of ours found on the node, for whoever looks for what nobody owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whose it is.
    pub id: ContainerId,
    /// As its record says, if that can be read.
    pub owner: Option<Owner>,
    /// Whether a namespace's mount point is there.
    pub netns: bool,
    /// Whether a record is there.
    pub record: bool,
    /// The addresses that it holds.
    pub addresses: Vec<Ipv4Addr>,
    /// Since the newest of these was made; zero if that lies in the future.
    pub age: Duration,
}

#[derive(Debug)]
struct Inner {
    options: NetworkOptions,
    namespaces: PathBuf,
    records: Records,
    /// host-local's `dataDir`; it makes a folder of the network's name in it.
    leases_root: PathBuf,
    leases: Leases,
    plugins: Plugins,
    rules: Rules,
    boot: String,
    locks: std::sync::Mutex<HashMap<ContainerId, Weak<tokio::sync::Mutex<()>>>>,
    /// Held while the bridge is looked at and mended, so that of many first bots one does it.
    base: tokio::sync::Mutex<()>,
}

impl Network {
    /// Makes the directories and the mount that namespaces are bound below. Touches neither bridge nor rules.
    pub fn new(options: NetworkOptions) -> Result<Self, NetworkError> {
        // A letter first, so that nft never takes the name for a number.
        if !plugin::is_interface_name(&options.bridge) || !options.bridge.starts_with(|c: char| c.is_ascii_alphabetic())
        {
            return Err(NetworkError::BadBridgeName { name: options.bridge });
        }
        let namespaces = options.run_dir.join("netns");
        let records = Records { directory: options.state_dir.join("network").join(&options.bridge) };
        let leases_root = options.state_dir.join("leases");
        let leases = Leases { directory: leases_root.join(&options.bridge) };
        for path in [&records.directory, &leases.directory] {
            std::fs::create_dir_all(path).map_err(storage("make", path))?;
        }
        namespace::prepare(&namespaces).map_err(storage("make, or mount,", &namespaces))?;
        let boot_id = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = std::fs::read_to_string(boot_id).map_err(storage("read", boot_id))?.trim().to_owned();
        let plugins = Plugins { directories: options.cni_bin_dirs.clone(), deadline: options.plugin_deadline };
        let rules =
            Rules::new(options.bridge.clone(), options.policy.clone(), options.plugin_deadline, options.nft.clone());
        let (locks, base) = Default::default();
        let inner = Inner { options, namespaces, records, leases_root, leases, plugins, rules, boot, locks, base };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where a bot's network namespace is mounted.
    pub fn netns_path(&self, id: &ContainerId) -> PathBuf {
        self.inner.netns(id)
    }

    /// Puts a bot on the bridge. Safe twice: what is whole stays, with its address; what is not is taken down first.
    ///
    /// Finishes even if the caller stops waiting.
    pub async fn ensure(&self, id: &ContainerId, owner: &Owner, cidr: &Cidr) -> Result<Attachment, NetworkError> {
        let (owner, cidr) = (owner.clone(), *cidr);
        self.exclusively(id, move |inner, id| async move { inner.ensure(&id, &owner, cidr).await }).await
    }

    /// Gives a bot a network namespace with nothing but loopback in it: all that `network.mode: None` asks for, and what
    /// [`Network::ensure`] goes on from. Safe twice.
    pub async fn ensure_loopback_only(&self, id: &ContainerId, owner: &Owner) -> Result<Attachment, NetworkError> {
        let owner = owner.clone();
        self.exclusively(id, move |inner, id| async move { inner.ensure_loopback_only(&id, &owner).await }).await
    }

    /// Looks at what is there of a bot's network. Runs nothing; a few system calls, about 0.1 ms. Says nothing of the
    /// packet rules: those are kept by [`Network::ensure_rules`].
    pub async fn observe(&self, id: &ContainerId) -> Result<NetworkState, NetworkError> {
        self.inner.observe(id).map(|(state, _)| state)
    }

    /// Takes down a bot's network, whole or half: rules, veth, address, namespace, record. Safe twice.
    ///
    /// A plugin that is missing or fails does not hold it up: what the plugin would have freed is freed by hand.
    /// Finishes even if the caller stops waiting.
    pub async fn remove(&self, id: &ContainerId) -> Result<(), NetworkError> {
        self.exclusively(id, |inner, id| async move { inner.remove(&id).await }).await
    }

    /// Every namespace, record and lease of ours on this node, by bot. Beside what is known to its bots this shows what a
    /// plugin left that went on after the agent's death; [`Network::remove`] takes that away too.
    pub async fn list(&self) -> Result<Vec<Found>, NetworkError> {
        let inner = Arc::clone(&self.inner);
        let now = SystemTime::now();
        blocking(&self.inner.namespaces, move || inner.list(now)).await
    }

    /// Makes bridge and packet rules be as they should, whatever they were: at the agent's start, when the CIDR is given,
    /// and every now and then. Rules are replaced in one transaction, so none is ever without force.
    pub async fn ensure_rules(&self, cidr: &Cidr) -> Result<(), NetworkError> {
        self.inner.mend(*cidr).await
    }

    /// Takes away what is the node's and no bot's: rules and bridge. Once no bot is left; safe twice.
    pub async fn dismantle(&self) -> Result<(), NetworkError> {
        self.inner.rules.unload().await?;
        let bridge = self.inner.options.bridge.clone();
        let gone = netlink::link(&bridge).and_then(|link| match link {
            Some(link) => netlink::delete_link(link.index),
            None => Ok(()),
        });
        gone.map_err(|source| NetworkError::Interface { doing: "remove", name: bridge, source })
    }

    /// Runs an operation alone for its bot, and to its end: a caller that goes away must not leave it half-done.
    async fn exclusively<T, F>(
        &self,
        id: &ContainerId,
        operation: impl FnOnce(Arc<Inner>, ContainerId) -> F + Send + 'static,
    ) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetworkError>> + Send,
    {
        let (inner, own) = (Arc::clone(&self.inner), id.clone());
        let lock = self.inner.lock_of(id);
        let work = async move {
            let _alone = lock.lock().await;
            operation(inner, own).await
        };
        let done = tokio::spawn(work.in_current_span()).await;
        done.unwrap_or_else(|source| Err(NetworkError::CutOff { id: id.to_string(), source }))
    }
}

impl Inner {
    fn netns(&self, id: &ContainerId) -> PathBuf {
        self.namespaces.join(id.as_str())
    }

    fn lock_of(&self, id: &ContainerId) -> Arc<tokio::sync::Mutex<()>> {
        // A panic while it was held leaves a map that is whole.
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = locks.get(id).and_then(Weak::upgrade).unwrap_or_default();
        locks.insert(id.clone(), Arc::downgrade(&lock));
        lock
    }

    /// The state, and the record where there is one.
    fn observe(&self, id: &ContainerId) -> Result<(NetworkState, Recorded), NetworkError> {
        let path = self.netns(id);
        let mounted = namespace::look(&path).map_err(namespace_failed("look at", &path))?;
        let record_path = self.records.path(id);
        let recorded = self.records.read(id).map_err(storage("read", &record_path))?;
        let state = match &recorded {
            Recorded::Nothing if mounted == Mounted::Nothing => NetworkState::Absent,
            Recorded::Nothing => partial("there is a network namespace without a record"),
            Recorded::Garbled(why) => partial(format!("its record {} can't be read: {why}", record_path.display())),
            Recorded::Record(record) => self.judge(record, &mounted, path)?,
        };
        Ok((state, recorded))
    }

    /// Whether what a record names is there.
    fn judge(&self, record: &Record, mounted: &Mounted, netns: PathBuf) -> Result<NetworkState, NetworkError> {
        if record.boot != self.boot {
            return Ok(partial("it is from before the machine's last boot"));
        }
        let expected: Identity = match &record.stage {
            Stage::Adding => return Ok(partial("its set-up was cut off")),
            Stage::Loopback { namespace } => *namespace,
            Stage::Bridged(bridged) => bridged.namespace,
        };
        match mounted {
            Mounted::Namespace(identity) if *identity == expected => {}
            Mounted::Namespace(_) => return Ok(partial("another network namespace is mounted in its place")),
            Mounted::PlainFile | Mounted::Nothing => return Ok(partial("its network namespace is not mounted")),
        }
        match &record.stage {
            Stage::Bridged(bridged) => {
                // The veth's two ends live and die together, so the host's stands for the bot's.
                let link = netlink::link(&bridged.host_interface)
                    .map_err(interface_failed("look at", &bridged.host_interface))?;
                if link.is_none_or(|link| link.index != bridged.host_index) {
                    return Ok(partial(format!("its interface {} is gone", bridged.host_interface)));
                }
                Ok(NetworkState::Attached(bridged.attachment(netns)))
            }
            Stage::Loopback { .. } | Stage::Adding => Ok(NetworkState::Attached(Attachment {
                netns,
                ips: Vec::new(),
                host_interface: String::new(),
                gateway: None,
            })),
        }
    }

    async fn ensure(&self, id: &ContainerId, owner: &Owner, cidr: Cidr) -> Result<Attachment, NetworkError> {
        self.ensure_base(cidr).await?;
        let (state, recorded) = self.observe(id)?;
        match (state, &recorded) {
            (
                NetworkState::Attached(attachment),
                Recorded::Record(Record { owner: same, stage: Stage::Bridged(bridged), .. }),
            ) if same == owner => {
                // The rules were loaded from the records, this one among them; but that may be long ago.
                if let Some(member) = bridged.member(id, &owner.namespace) {
                    self.rules.add(&member, || self.members()).await?;
                    return Ok(attachment);
                }
            }
            // Made ahead: a process may be in it already, so it must stay the one that it is.
            (
                NetworkState::Attached(_),
                Recorded::Record(Record { owner: same, stage: Stage::Loopback { namespace }, .. }),
            ) if same == owner => return self.attach_or_undo(id, owner, cidr, Some(*namespace)).await,
            (NetworkState::Absent, _) => return self.attach_or_undo(id, owner, cidr, None).await,
            (NetworkState::Attached(_) | NetworkState::Partial { .. }, _) => {}
        }
        self.take_down(id, &recorded).await?;
        self.attach_or_undo(id, owner, cidr, None).await
    }

    async fn ensure_loopback_only(&self, id: &ContainerId, owner: &Owner) -> Result<Attachment, NetworkError> {
        let (state, recorded) = self.observe(id)?;
        match (state, &recorded) {
            (NetworkState::Attached(attachment), Recorded::Record(Record { stage: Stage::Loopback { .. }, .. })) => {
                return Ok(attachment);
            }
            (NetworkState::Absent, _) => {}
            (NetworkState::Attached(_) | NetworkState::Partial { .. }, _) => self.take_down(id, &recorded).await?,
        }
        self.write(id, owner, Stage::Adding)?;
        let netns = self.netns(id);
        let made = self.make_namespace(&netns).await;
        match made.and_then(|namespace| self.write(id, owner, Stage::Loopback { namespace })) {
            Ok(()) => Ok(Attachment { netns, ips: Vec::new(), host_interface: String::new(), gateway: None }),
            Err(error) => {
                self.undo(id).await;
                Err(error)
            }
        }
    }

    async fn make_namespace(&self, path: &Path) -> Result<Identity, NetworkError> {
        namespace::make_file(path).map_err(storage("make", path))?;
        namespace::create(path.to_owned()).await.map_err(namespace_failed("make", path))
    }

    async fn attach_or_undo(
        &self,
        id: &ContainerId,
        owner: &Owner,
        cidr: Cidr,
        made: Option<Identity>,
    ) -> Result<Attachment, NetworkError> {
        match self.attach(id, owner, cidr, made).await {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                self.undo(id).await;
                Err(error)
            }
        }
    }

    /// Takes down what a failed set-up left. Its own failure is only logged: the set-up's is what the caller must hear,
    /// and what stays is found by the record.
    async fn undo(&self, id: &ContainerId) {
        let undone = match self.observe(id) {
            Ok((_, recorded)) => self.take_down(id, &recorded).await,
            Err(error) => Err(error),
        };
        if let Err(error) = undone {
            let error = crate::api::condition::chain(&error);
            tracing::warn!(bot = %id, error, "a network that failed to be set up could not be taken down whole");
        }
    }

    /// Namespace (unless one was made ahead), veth and address, record, rules, where nothing of them is.
    async fn attach(
        &self,
        id: &ContainerId,
        owner: &Owner,
        cidr: Cidr,
        made: Option<Identity>,
    ) -> Result<Attachment, NetworkError> {
        let bridge = &self.options.bridge;
        self.write(id, owner, Stage::Adding)?;
        let netns = self.netns(id);
        let namespace = match made {
            Some(namespace) => namespace,
            None => self.make_namespace(&netns).await?,
        };

        let config = plugin::config(bridge, self.options.mtu, Some(cidr), &self.leases_root);
        let failed = |source| NetworkError::Plugin { id: id.to_string(), source };
        let said = match self.plugins.run(Verb::Add, id, Some(&netns), &config).await {
            Ok(said) => said,
            Err(source) if self.is_exhausted(id, cidr) => {
                return Err(NetworkError::AddressesExhausted { id: id.to_string(), cidr, room: cidr.room(), source });
            }
            Err(source) => return Err(failed(source)),
        };
        let added = plugin::read_added(&said, bridge, cidr).map_err(failed)?;

        // What the plugin says is looked at before anything is built on it.
        let name = added.host_interface;
        let look = |name: &str| netlink::link(name).map_err(interface_failed("look at", name));
        let (port, bridge_link) = (look(&name)?, look(bridge)?);
        let host_index = match (port, bridge_link) {
            (Some(port), Some(master)) if port.master == Some(master.index) => port.index,
            _ => return Err(NetworkError::NoSuchPort { id: id.to_string(), name, bridge: bridge.clone() }),
        };
        let bridged = Bridged {
            namespace,
            host_interface: name.clone(),
            host_index,
            mac: added.mac.to_string(),
            address: added.address,
            gateway: cidr.gateway(),
        };
        let attachment = bridged.attachment(netns);
        // The record first: a full load of the rules finds the bot by it.
        self.write(id, owner, Stage::Bridged(bridged))?;
        let namespace = owner.namespace.clone();
        let member = Member { id: id.clone(), namespace, interface: name, mac: added.mac, address: added.address };
        self.rules.add(&member, || self.members()).await?;
        Ok(attachment)
    }

    fn write(&self, id: &ContainerId, owner: &Owner, stage: Stage) -> Result<(), NetworkError> {
        let record = Record { owner: owner.clone(), boot: self.boot.clone(), stage };
        self.records.write(id, &record).map_err(storage("write", &self.records.path(id)))
    }

    /// Whether all addresses are given out, counted on the disk. A plugin's words are for people, not for deciding.
    fn is_exhausted(&self, id: &ContainerId, cidr: Cidr) -> bool {
        let own = |lease: &record::Lease| lease.holder.as_ref().is_some_and(|uid| uid.container_id() == *id);
        self.leases.list().is_ok_and(|leases| {
            let taken = leases.iter().filter(|l| cidr.contains(l.address) && l.address != cidr.gateway() && !own(l));
            taken.count() as u64 >= u64::from(cidr.room())
        })
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), NetworkError> {
        let (state, recorded) = self.observe(id)?;
        if state == NetworkState::Absent {
            // A lease may still be there: the disk outlives records that were lost with a power cut.
            let leases = self.leases.clone();
            let own = id.clone();
            if blocking(&self.leases.directory, move || leases.of(&own)).await?.is_empty() {
                return Ok(());
            }
        }
        self.take_down(id, &recorded).await
    }

    /// Takes down what there is of a bot's network. Each step is safe twice; the record goes last.
    async fn take_down(&self, id: &ContainerId, recorded: &Recorded) -> Result<(), NetworkError> {
        let path = self.netns(id);
        // While the address is still the bot's own: afterwards the elements could be another's.
        let bridged = matches!(recorded, Recorded::Record(Record { stage: Stage::Bridged(_), .. }));
        self.rules.remove(id, bridged, || self.members()).await?;

        let loopback_only = matches!(recorded, Recorded::Record(Record { stage: Stage::Loopback { .. }, .. }));
        if !loopback_only {
            let mounted = namespace::look(&path).map_err(namespace_failed("look at", &path))?;
            let live = matches!(mounted, Mounted::Namespace(_)).then_some(path.as_path());
            let cidr = self.rules.cidr().await;
            let config = plugin::config(&self.options.bridge, self.options.mtu, cidr, &self.leases_root);
            let deleted = self.plugins.run(Verb::Del, id, live, &config).await;
            if let Err(error) = &deleted {
                // The bridge plugin keeps nothing but the veth and the lease, so its work can be done for it, and a bot's
                // deletion never hangs on a plugin.
                let error = crate::api::condition::chain(error);
                tracing::warn!(bot = %id, error, "the plugin did not take the network down; doing it by hand");
            }
            let bridged = match recorded {
                Recorded::Record(Record { boot, stage: Stage::Bridged(bridged), .. }) => Some((boot, bridged)),
                _ => None,
            };
            if let Some((boot, bridged)) = bridged
                && *boot == self.boot
            {
                let name = &bridged.host_interface;
                let link = netlink::link(name).map_err(interface_failed("look at", name))?;
                if link.is_some_and(|link| link.index == bridged.host_index) {
                    netlink::delete_link(bridged.host_index).map_err(interface_failed("remove", name))?;
                }
            }
            let (leases, own, address) = (self.leases.clone(), id.clone(), bridged.map(|(_, b)| b.address));
            blocking(&self.leases.directory, move || leases.free(&own, address)).await?;
        }
        namespace::remove(&path).map_err(namespace_failed("remove", &path))?;
        self.records.remove(id).map_err(storage("remove", &self.records.path(id)))?;
        self.rules.forget(id).await;
        Ok(())
    }

    /// Bridge and rules as they should be before a bot comes: on the hot path two questions, both answered in memory or
    /// by one system call.
    async fn ensure_base(&self, cidr: Cidr) -> Result<(), NetworkError> {
        let sound = || -> Result<bool, NetworkError> {
            let name = &self.options.bridge;
            let link = netlink::link(name).map_err(interface_failed("look at", name))?;
            Ok(bridge::is_sound(link.as_ref(), name, self.options.mtu))
        };
        if self.rules.cidr().await == Some(cidr) && sound()? {
            return Ok(());
        }
        let _one = self.base.lock().await;
        if self.rules.cidr().await == Some(cidr) && sound()? {
            return Ok(());
        }
        self.mend_alone(cidr).await
    }

    async fn mend(&self, cidr: Cidr) -> Result<(), NetworkError> {
        let _one = self.base.lock().await;
        self.mend_alone(cidr).await
    }

    async fn mend_alone(&self, cidr: Cidr) -> Result<(), NetworkError> {
        let NetworkOptions { bridge, mtu, forward, .. } = &self.options;
        // Rules before the bridge: no port is ever on it without them.
        self.rules.load(cidr, || self.members()).await?;
        let master = bridge::ensure(bridge, *mtu, cidr, *forward)?;
        // A bridge that was removed and made again has lost its ports.
        for member in self.members()? {
            let name = &member.interface;
            let link = netlink::link(name).map_err(interface_failed("look at", name))?;
            if let Some(link) = link.filter(|link| link.master != Some(master)) {
                tracing::warn!(bot = %member.id, interface = name, bridge, "a bot's interface was off the bridge");
                let change = LinkChange { up: true, master: Some(master), ..LinkChange::default() };
                netlink::change_link(link.index, change).map_err(interface_failed("put on the bridge", name))?;
            }
        }
        Ok(())
    }

    /// The bots that rules are to be for: those on record whose veth is there.
    fn members(&self) -> Result<Vec<Member>, NetworkError> {
        let directory = &self.records.directory;
        let mut members = Vec::new();
        for (id, _) in self.records.list().map_err(storage("list", directory))? {
            let recorded = self.records.read(&id).map_err(storage("read", &self.records.path(&id)))?;
            let Recorded::Record(Record { owner, boot, stage: Stage::Bridged(bridged) }) = recorded else { continue };
            let name = &bridged.host_interface;
            let link = netlink::link(name).map_err(interface_failed("look at", name))?;
            if boot == self.boot && link.is_some_and(|link| link.index == bridged.host_index) {
                members.extend(bridged.member(&id, &owner.namespace));
            }
        }
        Ok(members)
    }

    fn list(&self, now: SystemTime) -> io::Result<Vec<Found>> {
        let mut found: BTreeMap<ContainerId, Found> = BTreeMap::new();
        let mut note = |id: &ContainerId, made: SystemTime, what: &mut dyn FnMut(&mut Found)| {
            let age = now.duration_since(made).unwrap_or_default();
            let fresh = || Found {
                id: id.clone(),
                owner: None,
                netns: false,
                record: false,
                addresses: Vec::new(),
                age: Duration::MAX,
            };
            let entry = found.entry(id.clone()).or_insert_with(fresh);
            entry.age = entry.age.min(age);
            what(entry);
        };
        for (id, written) in self.records.list()? {
            let owner = match self.records.read(&id)? {
                Recorded::Record(record) => Some(record.owner),
                Recorded::Nothing | Recorded::Garbled(_) => None,
            };
            note(&id, written, &mut |found| {
                found.record = true;
                found.owner = owner.clone();
            });
        }
        for lease in self.leases.list()? {
            if let Some(uid) = &lease.holder {
                note(&uid.container_id(), lease.given, &mut |found| found.addresses.push(lease.address));
            }
        }
        for entry in std::fs::read_dir(&self.namespaces)? {
            let entry = entry?;
            let Some(uid) = entry.file_name().to_str().and_then(ContainerId::uid_of) else { continue };
            match namespace::made_at(&entry.path()) {
                Ok(made) => note(&uid.container_id(), made, &mut |found| found.netns = true),
                // Removed since it was listed.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(found.into_values().collect())
    }
}

impl Bridged {
    fn attachment(&self, netns: PathBuf) -> Attachment {
        Attachment {
            netns,
            ips: vec![IpAddr::V4(self.address)],
            host_interface: self.host_interface.clone(),
            gateway: Some(IpAddr::V4(self.gateway)),
        }
    }

    /// `None` where a file that someone edited holds what no rule may be made of.
    fn member(&self, id: &ContainerId, namespace: &str) -> Option<Member> {
        Some(Member {
            id: id.clone(),
            namespace: namespace.to_owned(),
            interface: Some(self.host_interface.clone()).filter(|name| plugin::is_interface_name(name))?,
            mac: Mac::parse(&self.mac)?,
            address: self.address,
        })
    }
}

fn partial(why: impl Into<String>) -> NetworkState {
    NetworkState::Partial { why: why.into() }
}

fn storage(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NetworkError + use<> {
    let path = path.to_path_buf();
    move |source| NetworkError::Storage { doing, path, source }
}

fn namespace_failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NetworkError + use<> {
    let path = path.to_path_buf();
    move |source| NetworkError::Namespace { doing, path, source }
}

fn interface_failed(doing: &'static str, name: &str) -> impl FnOnce(io::Error) -> NetworkError + use<> {
    let name = name.to_owned();
    move |source| NetworkError::Interface { doing, name, source }
}

/// Reads or changes many files of a directory off the executor.
async fn blocking<T: Send + 'static>(
    directory: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NetworkError> {
    let done = spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)));
    done.map_err(storage("go through", directory))
}
