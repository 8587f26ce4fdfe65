//! The steps that the agent takes on a bot's way up and down.
//!
//! Each is idempotent, and safe to be cut off in the middle: its doc says what is left then, and which step finds it.

use std::fmt;

/// One step. What it works on comes from `Desired` and `Observed`; the step says only what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// Make what is missing of layer (pulling its image as the policy says), network and output, side by side. Cut off:
    /// each is found by its name, computed from the uid, and the next `Prepare` makes the rest; half a pull lies under a
    /// lease that ends by itself, and the next pull goes on from it.
    Prepare(Parts),
    /// Read Secrets and ConfigMaps, make the OCI spec, and create or update the container with it and the record, in one
    /// call of containerd. Cut off: the container is as before or as wanted; mounted files are written anew next time.
    WriteContainer,
    /// Create the task, which starts shim and runc but not the process, and side by side connect its network where that
    /// is not done. Cut off: a task in state created, none, or what is left of one (`PutAway`), and a network that is whole, not begun, or half-made; with
    /// a half-made one the task is killed, since it holds the namespace that has to go.
    CreateTask {
        /// Whether the network is to be connected.
        connect: bool,
    },
    /// Tell the hosts file the address, mark the attempt as started, start the created task. Cut off before the mark: the
    /// next `StartAttempt` does it all. Cut off after it: that task is started, or, when it is gone, the attempt counts as
    /// ended (`RecordLost`) and is not run twice.
    StartAttempt,
    /// Freeze the process. Cut off: frozen or not, seen at the next look.
    Pause,
    /// Thaw the process.
    Resume,
    /// Give the running task its new limits, then note them in the record. Cut off: done again.
    UpdateLimits,
    /// Write the skills into the data of a live process, then note them. Cut off: written again.
    WriteSkills,
    /// Note the order, then send the stop signal, then thaw where it was paused, then note that it was sent. Cut off: sent
    /// again, and the grace period begins again; nothing is killed that was not asked to end.
    Stop,
    /// Note the order, send KILL to all processes, thaw. Cut off: sent again.
    Kill,
    /// Note how the process ended in the record, then delete the task. Cut off between: the end is noted already, the
    /// next `Reap` only deletes. Where containerd can't say how the process is, only delete, which is refused while it
    /// lives: nothing is noted that was not seen.
    Reap,
    /// Have containerd put away what is left of a task that it does not know; once it has had its time for that, do it: shims
    /// and all other processes of the bot, runc's container, cgroups, bundle. Cut off: the rest is seen at the next look.
    PutAway,
    /// The attempt was marked as started and its task is gone: note that it ended.
    RecordLost,
    /// Note that an end by itself is settled, since the bot is to be stopped or its spec changed: the next start asks no
    /// restart policy.
    SettleEnd,
    /// Make a layer beside the one in use, with what the version of a rollback holds, and note it. The bot runs on. Cut off: the note
    /// says that it is not whole, and the next begins again.
    CopyAside,
    /// Pull the image that the bot is to move to, and note where its layer will be. The bot runs on. Cut off: nothing, or half a pull
    /// as `Prepare` leaves it.
    PullAside,
    /// Make the layer on the other image, with the bot's data in it, while no process uses either. Cut off: the note says that it is not
    /// whole, and the next begins again.
    CarryData,
    /// Note that the layer which was replaced is the bot's again, since its image was set back. Cut off: it is the one or the other.
    SwitchBack,
    /// Remove a layer that was made for a rollback which is not asked for any more. Cut off: the rest is noted still.
    DropAside,
    /// Note that the bot's layer is the one beside from now on, in one write. Cut off: it is the old one or the new one.
    SwitchLayer,
    /// Commit the layer that was replaced as the version that it becomes, or remove it, then note that. Cut off: done again.
    SettleReplaced,
    /// Commit the layer of a bot that is deleted as the version that it becomes. Cut off: it is that already, or is done again.
    Preserve,
    /// Remove parts that are not wanted any more, side by side. Cut off: the rest is found by name.
    Remove(Parts),
    /// Remove logs, mounted files and lease, then the container's record. The last step of a deletion: until then the record says whose the
    /// rest is.
    RemoveContainer,
}

/// Parts of a bot that are made and removed side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Parts {
    /// The writable layer.
    pub layer: bool,
    /// The network namespace, with loopback only. Made alone; it is removed with the network.
    pub namespace: bool,
    /// Network namespace and addresses.
    pub network: bool,
    /// FIFOs and logger.
    pub output: bool,
}

impl Parts {
    /// Whether there is anything to do.
    pub fn any(self) -> bool {
        self.layer || self.namespace || self.network || self.output
    }
}

impl Step {
    /// The step's name, for logs, metrics and fail points.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare(_) => "prepare",
            Self::WriteContainer => "write_container",
            Self::CreateTask { .. } => "create_task",
            Self::StartAttempt => "start_attempt",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::UpdateLimits => "update_limits",
            Self::WriteSkills => "write_skills",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Reap => "reap",
            Self::PutAway => "put_away",
            Self::RecordLost => "record_lost",
            Self::SettleEnd => "settle_end",
            Self::CopyAside => "copy_aside",
            Self::PullAside => "pull_aside",
            Self::CarryData => "carry_data",
            Self::SwitchBack => "switch_back",
            Self::DropAside => "drop_aside",
            Self::SwitchLayer => "switch_layer",
            Self::SettleReplaced => "settle_replaced",
            Self::Preserve => "preserve",
            Self::Remove(_) => "remove",
            Self::RemoveContainer => "remove_container",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
