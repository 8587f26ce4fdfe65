//! Every condition type and every reason, each reason with what a user should do about it.
//!
//! The variant's name is the condition's reason, the Event's reason and the metric's label: few, stable words. The free
//! text goes into the message.

use std::fmt;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The condition types of a BotContainer, and of a BotSnapshot, which has `Ready`, `Verified`
/// and, where that was asked for, `Exported`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConditionType {
    /// What is observed is what was asked.
    Ready,
    /// The process runs.
    Running,
    /// Bound to a node. The controller's; all others are the agent's.
    Scheduled,
    /// The image is there, whole.
    ImageReady,
    /// Network namespace and addresses are there.
    NetworkReady,
    /// What was to be restored is.
    Restored,
    /// What was committed was read back and is what was copied.
    Verified,
    /// The version is an OCI image in the node's content store.
    Exported,
    /// kstatus: work is under way towards the newest generation.
    Reconciling,
    /// kstatus: only an edit helps.
    Stalled,
}

impl ConditionType {
    /// The type as the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Running => "Running",
            Self::Scheduled => "Scheduled",
            Self::ImageReady => "ImageReady",
            Self::NetworkReady => "NetworkReady",
            Self::Restored => "Restored",
            Self::Verified => "Verified",
            Self::Exported => "Exported",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
        }
    }
}

macro_rules! reasons {
    ($($name:ident => $advice:literal),* $(,)?) => {
        /// Why a condition has its status. Also the reason of Events and the label of metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $(#[doc = $advice] $name,)*
        }

        impl Reason {
            /// All reasons, in the order of the docs page.
            pub const ALL: &'static [Reason] = &[$(Reason::$name),*];

            /// The reason as the API writes it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),* }
            }

            /// What a user should do about it.
            pub fn advice(self) -> &'static str {
                match self { $(Self::$name => $advice),* }
            }

            /// The reason that the API writes so; `None` for a word that is not ours.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $(stringify!($name) => Some(Self::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    AsAsked => "Nothing to do: what is observed is what was asked.",
    Running => "Nothing to do: the process runs.",
    Paused => "Nothing to do: frozen as asked, memory and files are kept.",
    MemoryLost => "The node restarted while the bot was paused: its files are kept, its memory is gone.",
    Stopped => "Nothing to do: stopped as asked, files are kept.",
    Completed => "Nothing to do: the process ended with 0 and is not to be restarted.",
    Starting => "Wait: image, layer, network and process are being made.",
    Stopping => "Wait: TERM was sent, KILL follows after the grace period.",
    Pausing => "Wait: the process is being frozen.",
    Resuming => "Wait: the process is being thawed.",
    Terminating => "Wait: the bot is being deleted.",
    Removed => "Nothing to do: nothing of the bot is left on its node.",
    RestartPending => "The change needs a restart, which waits while the bot is paused; set operatingMode to Running or Stopped.",
    Scheduled => "Nothing to do: the bot is bound to a node.",
    Unschedulable => "No node fits; the message has each node's reason. The bot is placed as soon as one does.",
    BotIdInUse => "Another BotContainer of this namespace holds this botId; it goes on by itself when that one is gone.",
    NodeUnreachable => "The node's agent has not renewed its Lease; what runs there is not known.",
    NodeDraining => "The node is being drained, so its bots are stopped; `kubectl uncordon` starts them again.",
    HolderRefused => "kubelet refuses the node's holder Pod, so the scheduler does not see what bots use; make room on the node, or fewer bots.",
    NodeGone => "The node was deleted or taken out of service: what was only there is lost.",
    Pulling => "Wait: the image is being pulled.",
    ImageReady => "Nothing to do: the image is there, whole.",
    InvalidImageName => "Correct spec.image: it is no valid image reference.",
    ErrImageNeverPull => "The image is not on the node and imagePullPolicy is Never; change the policy or load the image.",
    ImageNotFound => "The registry has no such image; correct spec.image or push it.",
    ImageAuthFailed => "The registry refused the credentials; correct spec.imagePullSecrets.",
    RegistryUnavailable => "The registry can't be reached or fails; it is tried again.",
    ImageWrongPlatform => "The image has no variant for the node's platform; use another image or another node.",
    ImageCorrupt => "What the registry sent does not match its digest or can't be unpacked; push the image again.",
    ImageTooLarge => "The image is larger than the node's limit allows.",
    ImagePullBackOff => "The pull failed and is tried again later; the message has the cause.",
    NetworkReady => "Nothing to do: the bot's network is set up.",
    NoNetwork => "Nothing to do: network.mode asks for none.",
    NetworkFailed => "The network plugin failed; the message has its words. It is tried again.",
    AddressesExhausted => "The node's bot CIDR has no free address; delete bots or give the node a larger CIDR.",
    NodeNotConfigured => "The node has no bot CIDR yet; the controller gives it one.",
    Restored => "Nothing to do: what was to be restored is.",
    RestoreFailed => "The version to start from can't be used; the message says why.",
    RestoreWaiting => "Wait: the version to start from is not ready yet; the message says which.",
    WaitingForSnapshot => "Wait: a version is made of the bot first.",
    StoppedForSnapshot => "Wait: a BotSnapshot of consistency Stopped is being taken; the bot is started again after it.",
    RollingBack => "Wait: the version to go back to is being copied, then the bot is started from it.",
    RollbackFailed => "The bot can't go back to that version and is as it was; the message says what spec.rollback may name.",
    WaitingForBot => "Wait: the bot has no layer on a node yet, or the controller is about to look; the message says which.",
    BotNotFound => "There is no such BotContainer; correct spec.botContainerName in another BotSnapshot.",
    BotTerminating => "The BotContainer is being deleted; its deletionPolicy says what is kept of it.",
    Copying => "Wait: the bot's layer is being copied while it runs.",
    Committing => "Wait: the copy is whole, and is being committed and read back.",
    SnapshotReady => "Nothing to do: the version is there, and was read back.",
    Verified => "Nothing to do: what was committed was read back and is what was copied.",
    Exporting => "Wait: the version is being written as an OCI image into the node's content store.",
    Exported => "Nothing to do: `ctr -n berth images push REFERENCE` with status.runtimeName after it pushes the image, on the node.",
    ExportFailed => "The version is no OCI image yet; the message says why. It is tried again.",
    ExportUnsupported => "The version holds what an OCI layer has no words for; the message says where. The version itself is whole; change that in the bot and take another.",
    SnapshotCorrupt => "What was committed is not what was copied; the message says where. It is kept as evidence until the BotSnapshot is deleted. Look after the node's disk, and take another.",
    SnapshotFailed => "The version could not be made; the message says why. Take another.",
    SnapshotLost => "What the version is made of is gone from containerd; delete the BotSnapshot.",
    NamespaceTerminating => "The namespace is being deleted, so no BotSnapshot can be made of what the bot left: it stays on its node for --orphan-retention. `kubectl berth adopt` lists it, and makes a version of it in another namespace.",
    AdoptionFailed => "What spec.adopt names can't become a version; the message says why. It is tried again while the layer is there.",
    Thawed => "A bot that a snapshot had frozen was thawed, since its copier had been killed.",
    TooManyChanges => "The bot changes faster than it can be copied; raise spec.maxFreezeMillis in another BotSnapshot, or use consistency Stopped.",
    DeadlineExceeded => "It could not be finished within spec.failureDeadlineSeconds; the message says what it waited for.",
    MadeByDiff => "containerd's own diff made the version; it sees changes of size, time, mode and owner. Use the snapshotter overlayfs for versions that are compared with what the bot had.",
    SnapshotsUnsupported => "The layer's snapshotter has no directory of a layer's own, of which an image could be made; use overlayfs.",
    CrashLoopBackOff => "The process keeps ending; see lastTermination. It is started again after a back-off.",
    Error => "The process ended with an error and is not to be restarted; see lastTermination.",
    OOMKilled => "The process used more memory than its limit; raise resources.limits.memory.",
    StartError => "The process could not be started; the message says why, usually spec.command or spec.workingDir.",
    TaskLost => "The process ended while nobody could watch (the node restarted, or its shim died).",
    InvalidSpec => "The spec can't be run on this node; the message names the field and what is right.",
    ConfigNotFound => "A Secret or ConfigMap that the spec names is missing or lacks the key; create it.",
    ConfigUnreadable => "The API server did not give a Secret, ConfigMap or RuntimeClass that the spec names; the message has its words. It is tried again.",
    ForeignContainer => "A container of this name exists in containerd that is not Berth's; remove it by hand.",
    RuntimeUnavailable => "containerd on the node can't be reached; it is tried again.",
    RuntimeFailed => "containerd or runc refused a step; the message has its words. It is tried again.",
    StorageFailed => "The node's disk refused a write; the message has its words. It is tried again.",
    SkillFailed => "A skill can't be written into the bot's data; the message says why, usually a link or a full disk. It is tried again.",
    ChangingImage => "Wait: the bot is being moved to the image of spec.image.",
    ImageChangeFailed => "The bot could not be moved to the new image; its data is where it was.",
    AgentReady => "Nothing to do: the agent serves its node.",
    AgentStopping => "The agent was stopped; its bots run on.",
    Unsupported => "containerd or runc is below the floor of docs/requirements.md, or is known to let a container out to its node; upgrade it.",
    Supported => "Nothing to do: the runtime's versions are supported.",
    DiskPressure => "The node's disk is nearly full; free space.",
    DiskOk => "Nothing to do: the disk has room.",
    Created => "Nothing to do: the container was made.",
    Started => "Nothing to do: the process was started.",
    Killing => "Nothing to do: the process is being stopped.",
    Pulled => "Nothing to do: the image was pulled.",
    FinalizerReleased => "The node is gone; the object was let go, what was only there is lost.",
    CIDRAssigned => "Nothing to do: the node has a CIDR for its bots.",
    CIDRExhausted => "The cluster's bot CIDR has no free block; give the controller a larger --cluster-cidr.",
    MirrorLags => "The rows in PostgreSQL are behind the objects; the message says how far, and why. Bots are not affected; the rows catch up by themselves.",
    MirrorCaughtUp => "Nothing to do: the rows in PostgreSQL are again what the objects say.",
    MirrorRefused => "PostgreSQL does not take a bot's row; the message says why. It is tried again when the bot changes and at each resync.",
    Orphaned => "Something of Berth's that no object owns was found and removed or reported.",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The longest message of a condition or an Event that we write, in bytes. The API takes 32,768 for a condition but only
/// 1,024 for an Event's note; one text serves both.
pub const MAX_MESSAGE: usize = 1024;

/// Cuts a text to at most `max` bytes at a character boundary, with a mark where something was cut.
pub fn cut(text: &str, max: usize) -> String {
    const MARK: &str = " …";
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max.saturating_sub(MARK.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    format!("{}{MARK}", &text[..end])
}

/// An error with its causes, one line: what log, condition and Event say alike.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let words = e.to_string();
        // Some libraries repeat their source in their own text; saying it twice helps nobody.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = e.source();
    }
    text
}

/// A time as the API keeps it: `metav1.Time` has whole seconds. What is compared with an object read back must be cut so.
/// A time before 1970, of a broken clock or note, becomes 1970: the API server takes no year before 0.
pub fn api_time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second().max(0)).unwrap_or(at))
}

/// Makes a condition. `since` is when it took this status.
pub fn condition(type_: ConditionType, status: Option<bool>, reason: Reason, message: &str, since: Time) -> Condition {
    Condition {
        type_: type_.as_str().to_owned(),
        status: match status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        }
        .to_owned(),
        reason: reason.as_str().to_owned(),
        message: cut(message, MAX_MESSAGE),
        last_transition_time: since,
        observed_generation: None,
    }
}

/// The condition of a type among many.
pub fn find(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == type_.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_written_as_it_is_parsed_and_has_advice() {
        for &reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason));
            assert!(reason.advice().ends_with('.'), "{reason}: advice is a sentence");
        }
    }

    #[test]
    fn a_cut_never_splits_a_character_and_fits() {
        let text = "é".repeat(100);
        for max in 0..210 {
            let cut = cut(&text, max);
            assert!(cut.len() <= max.max(" …".len()), "{} > {max}", cut.len());
        }
        assert_eq!(cut(&text, 200), text);
    }
}
