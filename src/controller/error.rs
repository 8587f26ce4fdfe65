//! What can go wrong while the controller works: each error tells its own step and object, the cause is its source.

use std::time::Duration;

use crate::api::condition::Reason;

/// A reconcile that did not come to its end. It is tried again with back-off, and at once when the world changes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another replica leads, or may lead: nothing was written.
    #[error("{step} of {object} was not done: this replica does not lead")]
    NotLeading {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
    },
    /// The object changed since it was read; the newer one is looked at next.
    #[error("{step} of {object} came too late: it changed meanwhile")]
    Conflict {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
        /// What the API server said.
        source: Box<kube::Error>,
    },
    /// The API server forbids it: the role that the chart ships is not bound.
    #[error("{step} of {object} is forbidden; bind the controller's ClusterRole to its service account")]
    Forbidden {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
        /// What the API server said.
        source: Box<kube::Error>,
    },
    /// The API server refused what was written.
    #[error("{step} of {object} was refused by the API server")]
    Refused {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
        /// What the API server said.
        source: Box<kube::Error>,
    },
    /// The API server could not be reached or is not well.
    #[error("{step} of {object} failed: the API server can't be reached or is not well")]
    Unavailable {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
        /// What the client said.
        source: Box<kube::Error>,
    },
    /// No answer in time. It may have been done all the same: the next look tells.
    #[error("{step} of {object} had no answer within {after:?}; it may have been done")]
    Deadline {
        /// What was to be done.
        step: &'static str,
        /// To which object.
        object: String,
        /// How long was waited.
        after: Duration,
    },
    /// The cache said that something is gone, the API server says that it is there: the watch is behind.
    #[error("{what} is still there, though it was not seen; waiting for the watch")]
    StillThere {
        /// What is there.
        what: String,
    },
    /// No block is left for a node.
    #[error("BotNode {node} gets no CIDR")]
    Exhausted {
        /// The node.
        node: String,
        /// How many there are.
        source: super::cidr::Exhausted,
    },
    /// A reconcile panicked: a bug of ours, which stops nobody else.
    #[error("reconcile of {object} panicked")]
    Panicked {
        /// Of which object.
        object: String,
    },
}

impl Error {
    /// Sorts a failed call by what can be done about it.
    pub fn call(step: &'static str, object: impl Into<String>, source: kube::Error) -> Self {
        let object = object.into();
        let code = match &source {
            kube::Error::Api(status) => status.code,
            _ => 0,
        };
        let source = Box::new(source);
        match code {
            // 404 on a write: the object is gone, which the watch will tell.
            404 | 409 => Self::Conflict { step, object, source },
            401 | 403 => Self::Forbidden { step, object, source },
            400 | 405 | 413 | 415 | 422 => Self::Refused { step, object, source },
            _ => Self::Unavailable { step, object, source },
        }
    }

    /// Whether the API server said that the object is not there: of a deletion, that it is done.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Conflict { source, .. } if matches!(&**source, kube::Error::Api(s) if s.code == 404))
    }

    /// Whether it said 409: of a creation, that it was done before, by us or a leader before us.
    pub fn is_there_already(&self) -> bool {
        matches!(self, Self::Conflict { source, .. } if matches!(&**source, kube::Error::Api(s) if s.code == 409))
    }

    /// Whether the same call may succeed later with nothing changed by a person.
    pub fn retryable(&self) -> bool {
        match self {
            // Each of these heals by itself: leadership, a newer object, an API server that is back.
            Self::NotLeading { .. }
            | Self::Conflict { .. }
            | Self::Unavailable { .. }
            | Self::Deadline { .. }
            | Self::StillThere { .. } => true,
            // A role, a schema, a flag, our code: a person has to act. It is still looked at again, seldom (FAULTS.md, rule 11).
            Self::Forbidden { .. } | Self::Refused { .. } | Self::Exhausted { .. } | Self::Panicked { .. } => false,
        }
    }

    /// The word for metrics and logs: the variant's name.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotLeading { .. } => "NotLeading",
            Self::Conflict { .. } => "Conflict",
            Self::Forbidden { .. } => "Forbidden",
            Self::Refused { .. } => "Refused",
            Self::Unavailable { .. } => "Unavailable",
            Self::Deadline { .. } => "Deadline",
            Self::StillThere { .. } => "StillThere",
            Self::Exhausted { .. } => Reason::CIDRExhausted.as_str(),
            Self::Panicked { .. } => "Panicked",
        }
    }
}
