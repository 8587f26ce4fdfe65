//! What can go wrong with an image, each with the reason that condition, Event and metric bear.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::api::condition::Reason;
use crate::containerd::CallFailed;

use super::reference::{BadReference, Digest, Reference};

/// Why an image is not there. Cheap to clone: everybody who waited for one pull gets the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ImageError {
    /// The name can't be one.
    #[error(transparent)]
    InvalidName(#[from] BadReference),
    /// The registry has no such manifest, or no such blob.
    #[error("{registry} has no {object} (for image {image})")]
    NotFound {
        /// What was pulled.
        image: Box<Reference>,
        /// Who was asked, as a URL.
        registry: String,
        /// Manifest or blob, by tag or digest.
        object: String,
    },
    /// 401 or 403, with all credentials that fit.
    #[error("{registry} refused {tried} for image {image} (HTTP {status})")]
    AuthFailed {
        /// What was pulled.
        image: Box<Reference>,
        /// Who refused: the registry or its token server.
        registry: String,
        /// What it was shown.
        tried: Tried,
        /// The last answer's status.
        status: u16,
    },
    /// The registry answered that it can't now: 429, 5xx, or something that no registry says.
    #[error("{registry} answered HTTP {status} for image {image}{}", after(*retry_after))]
    RegistryRefused {
        /// What was pulled.
        image: Box<Reference>,
        /// Who was asked.
        registry: String,
        /// Its answer.
        status: u16,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// No connection, or one that broke more often than we try.
    #[error("can't read {object} of image {image} from {registry}")]
    Unreachable {
        /// What was pulled.
        image: Box<Reference>,
        /// Who was asked.
        registry: String,
        /// Manifest, token or blob.
        object: String,
        /// What the HTTP client said.
        source: Arc<reqwest::Error>,
    },
    /// The transfer ended early more often than we try.
    #[error("{registry} sent {got} of {want} bytes of {object} of image {image}, {tries} times cut off")]
    CutOff {
        /// What was pulled.
        image: Box<Reference>,
        /// Who was asked.
        registry: String,
        /// Which blob.
        object: String,
        /// Bytes that are here.
        got: u64,
        /// Bytes that the manifest promised.
        want: u64,
        /// How often it was tried.
        tries: u32,
    },
    /// Nothing, or next to nothing, came for too long.
    #[error("{registry} sent less than {min} bytes of {object} of image {image} in {} s", within.as_secs())]
    Stalled {
        /// What was pulled.
        image: Box<Reference>,
        /// Who was asked.
        registry: String,
        /// Manifest, token or blob.
        object: String,
        /// Fewer bytes than this are no progress.
        min: u64,
        /// How long was waited.
        within: Duration,
    },
    /// There is nothing for this machine in it.
    #[error("image {image} is for {offered}, this node is {wanted}")]
    WrongPlatform {
        /// What was pulled.
        image: Box<Reference>,
        /// This node, for example `linux/amd64`.
        wanted: String,
        /// What the index or the config offers.
        offered: String,
    },
    /// What came is not what was promised, or can't be an image.
    #[error("image {image}: {object} {problem}")]
    Corrupt {
        /// What was pulled.
        image: Box<Reference>,
        /// Manifest, config or layer, with its digest.
        object: String,
        /// In what way.
        problem: Flaw,
    },
    /// It is larger than this node allows.
    #[error("image {image}: {what} is more than the node's limit of {limit}{}", got.map(|g| format!(" ({g})")).unwrap_or_default())]
    TooLarge {
        /// What was pulled.
        image: Box<Reference>,
        /// What was measured, with its unit.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What it is, where that is known.
        got: Option<u64>,
    },
    /// Unpacking made no progress for too long.
    #[error("unpacking layer {layer} of image {image} made no progress in {} s", within.as_secs())]
    UnpackStalled {
        /// What was pulled.
        image: Box<Reference>,
        /// The layer.
        layer: Digest,
        /// How long was waited.
        within: Duration,
    },
    /// containerd refused a step or was away.
    #[error("can't keep image {image} on the node")]
    Runtime {
        /// What was pulled, or looked for.
        image: Box<Reference>,
        /// What containerd said.
        source: Arc<CallFailed>,
    },
    /// The same, while looking at all images.
    #[error("can't look through the node's images")]
    RuntimeList(#[source] Arc<CallFailed>),
    /// The HTTP client could not be made: no TLS provider, or no CA certificates on the node.
    #[error("can't make an HTTP client; does the node have CA certificates?")]
    NoClient(#[source] Arc<reqwest::Error>),
    /// How full the disk is could not be read.
    #[error("can't read how full {path} is")]
    DiskUsage {
        /// The folder.
        path: String,
        /// What the kernel said.
        source: Arc<std::io::Error>,
    },
}

/// What a registry was shown when it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// No credentials fit this image.
    Anonymous,
    /// So many.
    Credentials(usize),
    /// The login was held back: the registry wanted it sent in the clear.
    HeldBack,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("to be read without credentials, and no pull secret fits it,"),
            Self::Credentials(1) => f.write_str("the credentials"),
            Self::Credentials(n) => write!(f, "each of the {n} credentials"),
            Self::HeldBack => f.write_str("anything but a login over plain HTTP, which is not sent,"),
        }
    }
}

/// In what way bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Its bytes have another digest.
    Digest {
        /// As promised.
        want: String,
        /// As it came, where that is known.
        got: Option<String>,
    },
    /// It has another size.
    Size {
        /// As promised, in bytes.
        want: u64,
        /// As it came, or at least that.
        got: u64,
    },
    /// No JSON of that shape; the parser's words.
    Json(String),
    /// A field that can't be; its name and what is wrong.
    Field(&'static str, String),
    /// A media type that is not unpacked here.
    MediaType(String),
    /// containerd could not unpack it; its words.
    Unpack(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest { want, got: Some(got) } => write!(f, "has digest {got}, should have {want}"),
            Self::Digest { want, got: None } => write!(f, "has another digest than {want}"),
            Self::Size { want, got } => write!(f, "has {got} bytes, should have {want}"),
            Self::Json(words) => write!(f, "is no JSON of the right shape: {words}"),
            Self::Field(field, problem) => write!(f, "has a wrong {field}: {problem}"),
            Self::MediaType(media_type) => write!(f, "has media type {media_type:?}, which can't be unpacked here"),
            Self::Unpack(words) => write!(f, "can't be unpacked: {words}"),
        }
    }
}

fn after(retry_after: Option<Duration>) -> String {
    retry_after.map(|d| format!("; it wants to be asked again in {} s", d.as_secs())).unwrap_or_default()
}

impl ImageError {
    /// The reason for condition, Event and metric.
    pub fn reason(&self) -> Reason {
        match self {
            Self::InvalidName(_) => Reason::InvalidImageName,
            Self::NotFound { .. } => Reason::ImageNotFound,
            Self::AuthFailed { .. } => Reason::ImageAuthFailed,
            Self::RegistryRefused { .. } | Self::Unreachable { .. } | Self::CutOff { .. } | Self::Stalled { .. } => {
                Reason::RegistryUnavailable
            }
            Self::WrongPlatform { .. } => Reason::ImageWrongPlatform,
            Self::Corrupt { .. } => Reason::ImageCorrupt,
            Self::TooLarge { .. } => Reason::ImageTooLarge,
            Self::UnpackStalled { .. } => Reason::RuntimeFailed,
            Self::Runtime { source, .. } | Self::RuntimeList(source) => runtime_reason(source),
            Self::NoClient(_) => Reason::RuntimeFailed,
            Self::DiskUsage { .. } => Reason::StorageFailed,
        }
    }

    /// Whether trying the same again can help. Where not, only an edit of the spec does.
    pub fn retryable(&self) -> bool {
        match self {
            Self::InvalidName(_) => false,
            // Behind a tag there may be another image tomorrow; behind a digest there never is.
            Self::WrongPlatform { image, .. } | Self::TooLarge { image, .. } => image.digest().is_none(),
            // Someone may push it, mend the registry, or change the Secret, none of which touches the spec.
            Self::NotFound { .. }
            | Self::AuthFailed { .. }
            | Self::RegistryRefused { .. }
            | Self::Unreachable { .. }
            | Self::CutOff { .. }
            | Self::Stalled { .. }
            // A proxy may have garbled it.
            | Self::Corrupt { .. } => true,
            Self::UnpackStalled { .. }
            | Self::Runtime { .. }
            | Self::RuntimeList(_)
            | Self::NoClient(_)
            | Self::DiskUsage { .. } => true,
        }
    }

    /// When the registry asked to be left alone until, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RegistryRefused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

fn runtime_reason(error: &CallFailed) -> Reason {
    if error.is_unavailable() {
        Reason::RuntimeUnavailable
    } else if error.is_storage() {
        Reason::StorageFailed
    } else {
        Reason::RuntimeFailed
    }
}
