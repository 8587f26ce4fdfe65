//! Image references: what a user writes, made into one form that everything else compares by.
//!
//! The grammar is that of the distribution project's `reference` package, which Docker, containerd and kubelet share
//! (<https://github.com/distribution/reference>): `[registry/]repository[:tag][@digest]`. `nginx` is
//! `docker.io/library/nginx:latest` and nothing else.

use std::fmt;

use crate::api::bot_container::ImagePullPolicy;

/// The longest name (registry and repository) that registries take, in bytes.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;
/// What `nginx` alone means.
const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// A SHA-256 digest, `sha256:` and 64 lower-case hex digits. No other algorithm is taken: containerd's content store
/// of every version that we run on computes SHA-256 alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    /// Parses a digest; `None` for another shape or algorithm.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let legal = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        legal.then(|| Self(text.to_owned()))
    }

    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        use std::fmt::Write as _;
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in sha2::Sha256::digest(bytes) {
            // Writing to a String can't fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hex digits.
    pub fn hex(&self) -> &str {
        self.0.strip_prefix("sha256:").unwrap_or(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A normalised image reference. Two texts that mean the same image are equal here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that is no image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no image reference: {why}; write [registry/]repository[:tag][@sha256:digest]")]
pub struct BadReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// Parses and normalises: `nginx` becomes `docker.io/library/nginx:latest`.
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        parse(text).map_err(|why| BadReference { text: text.chars().take(300).collect(), why })
    }

    /// The registry's host, with its port where one was written. Docker Hub is `docker.io`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry, for example `library/nginx`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` only where there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, where one was written. It wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same image pinned: what `docker.io/library/nginx:latest` was when it resolved to this digest.
    pub fn pinned(&self, digest: Digest) -> Self {
        Self { registry: self.registry.clone(), repository: self.repository.clone(), tag: None, digest: Some(digest) }
    }

    /// `Always` for `:latest` without a digest, else `IfNotPresent`, as for Pods.
    pub fn default_pull_policy(&self) -> ImagePullPolicy {
        match (&self.digest, self.tag.as_deref()) {
            (None, Some(DEFAULT_TAG)) => ImagePullPolicy::Always,
            _ => ImagePullPolicy::IfNotPresent,
        }
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name of containerd's Image record: with a digest the tag means nothing, and is left out, as CRI does.
    pub(crate) fn record_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}/{}@{digest}", self.registry, self.repository),
            (None, Some(tag)) => format!("{}/{}:{tag}", self.registry, self.repository),
            (None, None) => self.name(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Reference {
    type Err = BadReference;
    fn from_str(text: &str) -> Result<Self, BadReference> {
        Self::parse(text)
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (named, digest) = match text.split_once('@') {
        None => (text, None),
        Some((named, digest)) => {
            (named, Some(Digest::parse(digest).ok_or("its digest is not sha256: and 64 lower-case hex digits")?))
        }
    };
    // A colon after the last slash starts a tag; one before it is a port.
    let after_slash = named.rfind('/').map_or(0, |i| i + 1);
    let (name, tag) = match named[after_slash..].find(':') {
        None => (named, None),
        Some(colon) => (&named[..after_slash + colon], Some(&named[after_slash + colon + 1..])),
    };
    if tag.is_some_and(|t| !is_tag(t)) {
        return Err(
            "its tag is not letters, digits, '_', '.' and '-', at most 128, starting with a letter, digit or '_'",
        );
    }
    if name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hex digits are an image's id, not its name");
    }
    let (registry, rest) = match name.split_once('/') {
        Some((first, rest)) if is_registry_like(first) => (first, rest),
        _ => (DEFAULT_REGISTRY, name),
    };
    if !is_registry(registry) {
        return Err("its registry is no host name, IPv4 or [IPv6] address with an optional port");
    }
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    if rest.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("its repository has upper-case letters");
    }
    if rest.is_empty() || !rest.split('/').all(is_path_component) {
        return Err("its repository is not lower-case letters and digits, joined by '.', '_', '__', '-' and '/'");
    }
    let repository = match registry {
        DEFAULT_REGISTRY if !rest.contains('/') => format!("library/{rest}"),
        _ => rest.to_owned(),
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("registry and repository have more than 255 characters");
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
}

/// Whether the first part of a name is a registry rather than the start of a repository of Docker Hub.
fn is_registry_like(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, "")) => (Err(address), None),
            Some((address, port)) => match port.strip_prefix(':') {
                Some(port) => (Err(address), Some(port)),
                None => return false,
            },
            None => return false,
        },
        None => match text.split_once(':') {
            Some((host, port)) => (Ok(host), Some(port)),
            None => (Ok(text), None),
        },
    };
    let port_legal = port.is_none_or(|p| p.bytes().all(|b| b.is_ascii_digit()) && p.parse::<u16>().is_ok());
    let host_legal = match host {
        Ok(name) => name.split('.').all(|part| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !part.starts_with('-')
                && !part.ends_with('-')
        }),
        Err(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
    };
    port_legal && host_legal
}

/// Runs of lower-case letters and digits, joined by one '.', one or two '_', or any number of '-'.
fn is_path_component(text: &str) -> bool {
    let is_word = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let ends_are_words = text.bytes().next().is_some_and(is_word) && text.bytes().last().is_some_and(is_word);
    ends_are_words
        && text
            .split(|c: char| c.is_ascii() && is_word(c as u8))
            .all(|between| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-'))
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn references_are_normalised_as_everywhere() {
        for (text, normal) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.27", "docker.io/library/nginx:1.27".to_owned()),
            ("library/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("bitnami/redis", "docker.io/bitnami/redis:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a", "localhost:5000/a:latest".to_owned()),
            ("localhost:5000", "docker.io/library/localhost:5000".to_owned()),
            ("127.0.0.1:5000/a/b:x", "127.0.0.1:5000/a/b:x".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("[fe80::1]/a", "[fe80::1]/a:latest".to_owned()),
            ("ghcr.io/Org/a".to_lowercase().as_str(), "ghcr.io/org/a:latest".to_owned()),
            ("MyRegistry/a", "MyRegistry/a:latest".to_owned()),
            ("a/b__c/d.e/f---g", "docker.io/a/b__c/d.e/f---g:latest".to_owned()),
            (format!("nginx@sha256:{HEX}").as_str(), format!("docker.io/library/nginx@sha256:{HEX}")),
            (format!("nginx:1@sha256:{HEX}").as_str(), format!("docker.io/library/nginx:1@sha256:{HEX}")),
        ] {
            let parsed = Reference::parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(parsed.to_string(), normal, "{text}");
            assert_eq!(Reference::parse(&normal).as_ref(), Ok(&parsed), "{text}: the normal form means the same");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = "a".repeat(256);
        for text in [
            "",
            " ",
            "nginx ",
            "NGINX",
            "nginx:",
            "nginx:-a",
            "nginx@",
            "nginx@sha256:12",
            "a//b",
            "/a",
            "a/",
            "a/../b",
            "a..b",
            "a_.b",
            "a___b",
            "-a",
            "a-",
            "https://docker.io/nginx",
            "docker.io:99999/a",
            "docker.io:x/a",
            "[::1/a",
            "[zz]/a",
            "a.-b/c",
            "é",
            "a\nb",
            "a:b c",
            HEX,
            long.as_str(),
            "nginx@sha512:aa",
            "localhost:/",
            &format!("nginx:{}", "a".repeat(129)),
            &format!("nginx@sha256:{}", HEX.to_uppercase()),
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?} was taken as {:?}", Reference::parse(text));
        }
    }

    #[test]
    fn latest_is_pulled_always_unless_pinned() {
        for (text, policy) in [
            ("nginx", ImagePullPolicy::Always),
            ("nginx:latest", ImagePullPolicy::Always),
            ("nginx:1", ImagePullPolicy::IfNotPresent),
            (&format!("nginx:latest@sha256:{HEX}"), ImagePullPolicy::IfNotPresent),
            (&format!("nginx@sha256:{HEX}"), ImagePullPolicy::IfNotPresent),
        ] {
            assert_eq!(Reference::parse(text).unwrap().default_pull_policy(), policy, "{text}");
        }
    }

    #[test]
    fn a_pinned_record_has_no_tag() {
        let reference = Reference::parse(&format!("nginx:1@sha256:{HEX}")).unwrap();
        assert_eq!(reference.record_name(), format!("docker.io/library/nginx@sha256:{HEX}"));
        assert_eq!(Digest::of(b"").as_str(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_to_itself(text in r"[a-zA-Z0-9./:@_\-\[\]é ]{0,60}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference));
            }
        }
    }
}
