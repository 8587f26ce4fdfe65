//! Why a step failed, as a condition's reason, and whether it is worth another try.

use crate::api::condition::Reason;
use crate::containerd::CallFailed;
use crate::image::ImageError;
use crate::network::NetworkError;
use crate::output::OutputError;

use super::super::bundle::BundleError;
use super::super::references::ReadFailed;
use super::super::shim::PutAwayFailed;
use super::super::skills::SkillFailed;
use super::super::version::VersionError;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// containerd or runc refused.
    #[error("the runtime refused")]
    Runtime(#[source] CallFailed),
    /// The image can't be had.
    #[error("the image {image} can't be used")]
    Image {
        /// Its normalised reference.
        image: String,
        /// Why.
        source: ImageError,
    },
    /// `imagePullPolicy: Never`, and the image is not there.
    #[error("the image {image} is not on the node, and imagePullPolicy is Never; load it or change the policy")]
    NeverPull {
        /// Its normalised reference.
        image: String,
    },
    /// The image below the layer was taken from containerd by someone.
    #[error(
        "the image {image} ({digest}) that the bot's layer stands on is no longer whole in containerd; \
         pull it again with `ctr images pull {image}@{digest}`"
    )]
    ImageGone {
        /// Its normalised reference.
        image: String,
        /// Its digest.
        digest: String,
    },
    /// A pull secret can't be used.
    #[error("the pull secret {secret} can't be used: {why}")]
    PullSecret {
        /// Its name.
        secret: String,
        /// What is wrong with it.
        why: String,
    },
    /// The network can't be made or removed.
    #[error("the bot's network can't be set up or removed")]
    Network(#[source] NetworkError),
    /// The controller has not given the node a CIDR.
    #[error("the node has no CIDR for its bots yet; the controller gives it one")]
    NoCidr,
    /// FIFOs or logger can't be made or removed.
    #[error("the bot's output can't be set up or removed")]
    Output(#[source] OutputError),
    /// The OCI spec can't be made.
    #[error("the container can't be made")]
    Bundle(#[source] BundleError),
    /// A skill can't be written.
    #[error(transparent)]
    Skill(SkillFailed),
    /// What is left of an earlier task is in the way.
    #[error(transparent)]
    Leftover(PutAwayFailed),
    /// The version to start from can't be used.
    #[error("the bot can't start from BotSnapshot {snapshot}: {why}")]
    Restore {
        /// Its name.
        snapshot: String,
        /// Why.
        why: String,
    },
    /// A version can't be copied or made.
    #[error("a version can't be copied or made")]
    Version(#[source] VersionError),
    /// A Secret or ConfigMap can't be read.
    #[error("what the spec refers to can't be read")]
    References(#[source] ReadFailed),
    /// The world is not as the step needs it: it changed since the plan. The next look tells.
    #[error("{0}; it is looked at again")]
    Changed(&'static str),
}

impl StepError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Runtime(error) if error.is_unavailable() => Reason::RuntimeUnavailable,
            Self::Runtime(error) if error.is_storage() => Reason::StorageFailed,
            Self::Runtime(_) | Self::Leftover(_) | Self::Changed(_) => Reason::RuntimeFailed,
            Self::Image { source, .. } => source.reason(),
            Self::NeverPull { .. } => Reason::ErrImageNeverPull,
            Self::ImageGone { .. } => Reason::ImageCorrupt,
            Self::PullSecret { .. } => Reason::ImageAuthFailed,
            Self::Network(error) => error.reason(),
            Self::NoCidr => Reason::NodeNotConfigured,
            Self::Output(error) => error.reason(),
            Self::Bundle(error) => error.reason(),
            Self::Skill(_) => Reason::SkillFailed,
            Self::Restore { .. } => Reason::RestoreFailed,
            Self::Version(error) => error.reason(),
            Self::References(_) => Reason::ConfigUnreadable,
        }
    }

    /// How long the one that refused wants to be left alone, if it said so.
    pub fn retry_after(&self) -> Option<std::time::Duration> {
        match self {
            Self::Image { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    /// Whether trying again can help without an edit of the bot.
    pub fn retryable(&self) -> bool {
        match self {
            // Away, busy, full: all of these pass.
            Self::Runtime(_)
            | Self::Leftover(_)
            | Self::Network(_)
            | Self::NoCidr
            | Self::Output(_)
            | Self::Changed(_) => true,
            Self::Image { source, .. } => source.retryable(),
            // An image can be loaded by hand, a Secret mended: neither touches the bot.
            Self::NeverPull { .. } | Self::ImageGone { .. } | Self::PullSecret { .. } | Self::References(_) => true,
            // The bot's own doing, which the bot may undo.
            Self::Skill(_) => true,
            // An edit of the image; a version that somebody brings back.
            Self::Restore { .. } => true,
            Self::Version(error) => error.retryable(),
            Self::Bundle(error) => error.retryable(),
        }
    }
}
