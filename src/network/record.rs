//! What is remembered of each bot's network, one file a bot under `state_dir`, and whose address is whose.
//!
//! A record is written before the first side effect and removed after the last, so where there is none there is nothing
//! to clean. It is never the truth of its own: it names what to look at (namespace, veth), and counts only while that is
//! there. Leases are host-local's files: one an address, its content the container's id and the interface, each on a line.

use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::namespace::Identity;
use crate::api::ids::{BotUid, ContainerId};

/// Whose network it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// Namespace of the BotContainer: who may reach whom is decided by it.
    pub namespace: String,
    /// Its name, for people.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// One bot's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub owner: Owner,
    /// Of the boot that it was made in: namespaces and interfaces do not outlive it, and their numbers begin anew.
    pub boot: String,
    pub stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    /// Being made: anything may be there.
    Adding,
    /// A namespace with loopback only.
    Loopback { namespace: Identity },
    /// A namespace on the bridge.
    Bridged(Bridged),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bridged {
    pub namespace: Identity,
    pub host_interface: String,
    pub host_index: u32,
    /// The bot's end, as text.
    pub mac: String,
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
}

/// A record as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    Nothing,
    /// A file that can't be read as a record: a power cut, or someone's hand.
    Garbled(String),
    Record(Record),
}

/// The directory of records of one bridge.
#[derive(Clone, Debug)]
pub(super) struct Records {
    pub directory: PathBuf,
}

impl Records {
    pub(super) fn path(&self, id: &ContainerId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    pub(super) fn read(&self, id: &ContainerId) -> io::Result<Recorded> {
        let mut bytes = Vec::new();
        match std::fs::File::open(self.path(id)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Recorded::Nothing),
            // A record has a few hundred bytes.
            opened => opened?.take(64 * 1024).read_to_end(&mut bytes)?,
        };
        Ok(match serde_json::from_slice(&bytes) {
            Ok(record) => Recorded::Record(record),
            Err(e) => Recorded::Garbled(e.to_string()),
        })
    }

    /// Writes a record, whole or not at all. Not synced: after a power cut its boot is over, so it says no more than that
    /// there may be something to clean, which a garbled one says as well.
    pub(super) fn write(&self, id: &ContainerId, record: &Record) -> io::Result<()> {
        let path = self.path(id);
        let draft = path.with_extension("new");
        std::fs::File::create(&draft)?.write_all(&serde_json::to_vec(record)?)?;
        std::fs::rename(&draft, &path)
    }

    pub(super) fn remove(&self, id: &ContainerId) -> io::Result<()> {
        let path = self.path(id);
        remove_file(&path.with_extension("new"))?;
        remove_file(&path)
    }

    /// The ids of all records, drafts included, and when each was written.
    pub(super) fn list(&self) -> io::Result<Vec<(ContainerId, SystemTime)>> {
        let mut found = Vec::new();
        for (name, written) in files(&self.directory)? {
            let stem = name.strip_suffix(".json").or_else(|| name.strip_suffix(".new"));
            if let Some(uid) = stem.and_then(ContainerId::uid_of) {
                found.push((uid.container_id(), written));
            }
        }
        Ok(found)
    }
}

/// host-local's leases of one network.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    pub directory: PathBuf,
}

/// An address that is given out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub address: Ipv4Addr,
    /// `None`: the file names no bot of ours.
    pub holder: Option<BotUid>,
    pub given: SystemTime,
}

impl Leases {
    pub(super) fn list(&self) -> io::Result<Vec<Lease>> {
        let mut found = Vec::new();
        for (name, given) in files(&self.directory)? {
            // Beside the leases lie a lock and the last address given.
            let Ok(address) = name.parse() else { continue };
            // Freed since it was listed: no lease.
            if let Some(holder) = self.read(&name)? {
                found.push(Lease { address, holder, given });
            }
        }
        Ok(found)
    }

    pub(super) fn of(&self, id: &ContainerId) -> io::Result<Vec<Ipv4Addr>> {
        let ours = |lease: &Lease| lease.holder.as_ref().is_some_and(|uid| uid.container_id() == *id);
        Ok(self.list()?.iter().filter(|lease| ours(lease)).map(|lease| lease.address).collect())
    }

    /// Whether a bot holds this address.
    fn holds(&self, id: &ContainerId, address: Ipv4Addr) -> io::Result<bool> {
        Ok(self.read(&address.to_string())?.is_some_and(|holder| holder.is_some_and(|uid| uid.container_id() == *id)))
    }

    /// Whose lease a file is: `None` when there is no such file.
    fn read(&self, name: &str) -> io::Result<Option<Option<BotUid>>> {
        let mut content = Vec::new();
        match std::fs::File::open(self.directory.join(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?.take(256).read_to_end(&mut content)?,
        };
        let content = String::from_utf8_lossy(&content);
        Ok(Some(content.lines().next().and_then(|line| ContainerId::uid_of(line.trim()))))
    }

    /// Frees what a bot still holds after the plugin should have freed it. A bot has one address; where it is known, one
    /// look suffices. Blocks while host-local holds its lock, which it does for the time of one look at the directory.
    pub(super) fn free(&self, id: &ContainerId, address: Option<Ipv4Addr>) -> io::Result<()> {
        let held = || match address {
            Some(address) => Ok(if self.holds(id, address)? { vec![address] } else { Vec::new() }),
            None => self.of(id),
        };
        if held()?.is_empty() {
            return Ok(());
        }
        tracing::warn!(bot = %id, "the plugin did not free the bot's address; freeing it by hand");
        let lock = self.directory.join("lock");
        let lock = std::fs::File::options().read(true).write(true).create(true).truncate(false).open(lock)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        for address in held()? {
            remove_file(&self.directory.join(address.to_string()))?;
        }
        Ok(())
    }
}

/// Names and times of a directory's files; none where it does not exist.
fn files(directory: &Path) -> io::Result<Vec<(String, SystemTime)>> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        match entry.metadata().and_then(|meta| meta.modified()) {
            Ok(written) => found.push((name, written)),
            // Removed since it was listed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
