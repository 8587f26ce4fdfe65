//! Registry credentials out of pull Secrets, and which of them an image's registry is shown.
//!
//! Rules as kubelet's keyring has them (`pkg/credentialprovider`): an entry's key is a host, with an optional port, an
//! optional path that must begin the repository, and `*` within one label of the host; more specific keys first; every
//! match is tried. A password is never printed and never shown to another registry.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;

use super::reference::Reference;

/// The most bytes of one Secret that are parsed. Kubernetes takes 1 MiB.
const MAX_SECRET: usize = 1 << 20;

/// User and password for one registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Login {
    pub(crate) user: String,
    pub(crate) password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({:?}, …)", self.user)
    }
}

/// All that a bot's pull Secrets hold, in their order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// One keyring a Secret: kubelet exhausts the first Secret before it looks at the second.
    secrets: Vec<Vec<Entry>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.secrets.iter().flatten().map(|e| format!("{}{}", e.host, e.path))).finish()
    }
}

#[derive(Clone, PartialEq, Eq)]
struct Entry {
    /// Host with optional port, as in the key.
    host: String,
    /// Empty, or starting with '/'.
    path: String,
    login: Login,
}

/// A pull Secret that can't be read. Never quotes what it held.
#[derive(Debug, thiserror::Error)]
pub enum BadCredentials {
    /// More than a Secret can hold.
    #[error("the pull secret has {0} bytes, more than {MAX_SECRET}")]
    TooLarge(usize),
    /// Not JSON of that shape. The cause is not kept: it may quote a password.
    #[error("the pull secret is no JSON of the shape that `docker login` writes (line {line}, column {column})")]
    NotJson {
        /// Where the parser stopped.
        line: usize,
        /// Where the parser stopped.
        column: usize,
    },
    /// `auth` is not base64 of `user:password`.
    #[error("the pull secret's entry for {0:?} has an `auth` that is not base64 of user:password")]
    BadAuth(String),
}

#[derive(Deserialize)]
struct DockerConfigJson {
    #[serde(default)]
    auths: BTreeMap<String, DockerConfigEntry>,
}

#[derive(Deserialize)]
struct DockerConfigEntry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

impl Credentials {
    /// None at all: every registry is asked anonymously.
    pub fn anonymous() -> Self {
        Self::default()
    }

    /// The bytes of a Secret's `.dockerconfigjson` (type `kubernetes.io/dockerconfigjson`).
    pub fn parse(bytes: &[u8]) -> Result<Self, BadCredentials> {
        let config: DockerConfigJson = read(bytes)?;
        Self::from_entries(config.auths)
    }

    /// The bytes of a Secret's `.dockercfg` (type `kubernetes.io/dockercfg`): the entries without `auths` around them.
    pub fn parse_legacy(bytes: &[u8]) -> Result<Self, BadCredentials> {
        Self::from_entries(read(bytes)?)
    }

    /// These, and after them those of a further Secret.
    pub fn and_then(mut self, more: Self) -> Self {
        self.secrets.extend(more.secrets);
        self
    }

    fn from_entries(entries: BTreeMap<String, DockerConfigEntry>) -> Result<Self, BadCredentials> {
        let mut keyring = Vec::new();
        for (key, entry) in entries {
            let login = if entry.auth.is_empty() {
                Login { user: entry.username, password: entry.password }
            } else {
                decode_auth(&entry.auth).ok_or_else(|| BadCredentials::BadAuth(key.chars().take(255).collect()))?
            };
            let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(&key);
            let (host, path) = bare.split_at(bare.find('/').unwrap_or(bare.len()));
            // `https://index.docker.io/v1/` is how `docker login` names Docker Hub.
            let path = path.strip_prefix("/v1/").or_else(|| path.strip_prefix("/v2/")).map_or(path, |rest| {
                // Keep the slash in front of what follows.
                if rest.is_empty() { "" } else { &path[3..] }
            });
            let path = if path == "/" { "" } else { path };
            keyring.push(Entry { host: host.to_owned(), path: path.to_owned(), login });
        }
        // Reverse order puts the longer, more specific key before the one that it begins with.
        keyring.sort_by(|a, b| (&b.host, &b.path).cmp(&(&a.host, &a.path)));
        Ok(Self { secrets: vec![keyring] })
    }

    /// Every login that fits an image, in the order to try them. Empty: ask anonymously.
    pub fn for_image(&self, reference: &Reference) -> Vec<Login> {
        self.for_repository(reference.registry(), reference.repository())
    }

    /// The same for a repository of a registry, given as host with optional port.
    pub fn for_repository(&self, registry: &str, repository: &str) -> Vec<Login> {
        let mut logins = Vec::new();
        let target_path = format!("/{repository}");
        for keyring in &self.secrets {
            let before = logins.len();
            for entry in keyring {
                if host_matches(&entry.host, registry) && target_path.starts_with(&entry.path) {
                    logins.push(entry.login.clone());
                }
            }
            if logins.len() == before && registry == "docker.io" {
                // Docker Hub's login goes by its old name.
                let hub = keyring.iter().filter(|e| e.host == "index.docker.io" && e.path.is_empty());
                logins.extend(hub.map(|e| e.login.clone()));
            }
        }
        logins
    }
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, BadCredentials> {
    if bytes.len() > MAX_SECRET {
        return Err(BadCredentials::TooLarge(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(|e| BadCredentials::NotJson { line: e.line(), column: e.column() })
}

fn decode_auth(auth: &str) -> Option<Login> {
    let text = auth.trim();
    let bytes = if text.ends_with('=') { STANDARD.decode(text) } else { STANDARD_NO_PAD.decode(text) }.ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Login { user: user.to_owned(), password: password.to_owned() })
}

/// Same port, same number of labels, each label equal or matching its pattern.
fn host_matches(pattern: &str, host: &str) -> bool {
    let (pattern_host, pattern_port) = split_port(pattern);
    let (host, port) = split_port(host);
    pattern_port == port
        && pattern_host.split('.').count() == host.split('.').count()
        && pattern_host.split('.').zip(host.split('.')).all(|(p, h)| label_matches(p, h))
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        // The colons of an IPv6 address stand before its bracket.
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    }
}

/// `*` is any run of characters, `?` any one, within a label. Linear in both: keys are the user's, images too.
fn label_matches(pattern: &str, label: &str) -> bool {
    let (pattern, label) = (pattern.as_bytes(), label.as_bytes());
    let (mut p, mut l) = (0, 0);
    // Where the last star stood, and how far it reached.
    let mut star: Option<(usize, usize)> = None;
    while l < label.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, l));
                p += 1;
            }
            Some(&c) if c == b'?' || c == label[l] => {
                p += 1;
                l += 1;
            }
            _ => match star {
                Some((at, reach)) => {
                    star = Some((at, reach + 1));
                    p = at + 1;
                    l = reach + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(credentials: &Credentials, image: &str) -> Vec<String> {
        credentials.for_image(&Reference::parse(image).unwrap()).into_iter().map(|l| l.user).collect()
    }

    fn with_keys(keys: &[&str]) -> Credentials {
        let auths: serde_json::Map<_, _> =
            keys.iter().map(|k| ((*k).to_owned(), serde_json::json!({"username": k, "password": "geheim"}))).collect();
        Credentials::parse(serde_json::json!({ "auths": auths }).to_string().as_bytes()).unwrap()
    }

    #[test]
    fn keys_match_as_kubelets_do() {
        for (key, image, matches) in [
            ("example.com", "example.com/a", true),
            ("example.com", "example.com:5000/a", false),
            ("example.com:5000", "example.com:5000/a", true),
            ("https://example.com", "example.com/a", true),
            ("https://example.com/v1/", "example.com/a", true),
            ("https://example.com/v2/team", "example.com/team/a", true),
            ("example.com/team", "example.com/team/a", true),
            ("example.com/team", "example.com/other/a", false),
            ("*.example.com", "a.example.com/x", true),
            ("*.example.com", "example.com/x", false),
            ("*.example.com", "a.b.example.com/x", false),
            ("*.*.example.com", "a.b.example.com/x", true),
            ("reg*.example.com", "registry.example.com/x", true),
            ("reg*.example.com", "other.example.com/x", false),
            ("*", "evil.com/x", false),
            ("evil.com", "evil.com.example.com/x", false),
            ("https://index.docker.io/v1/", "nginx", true),
            ("docker.io", "nginx", true),
            ("index.docker.io", "docker.io/bitnami/redis", true),
            ("https://index.docker.io/v1/", "ghcr.io/a/b", false),
            ("[::1]:5000", "[::1]:5000/a", true),
        ] {
            assert_eq!(!users(&with_keys(&[key]), image).is_empty(), matches, "{key} on {image}");
        }
    }

    #[test]
    fn the_more_specific_key_is_tried_first_and_the_first_secret_before_the_second() {
        let first = with_keys(&["example.com", "example.com/team", "example.com/team/sub"]);
        let second = with_keys(&["*.com"]);
        assert_eq!(
            users(&first.and_then(second), "example.com/team/sub/a"),
            ["example.com/team/sub", "example.com/team", "example.com", "*.com"]
        );
    }

    #[test]
    fn auth_wins_over_user_and_password() {
        for (auth, user) in [("dTpwOnE=", "u"), ("dTpw", "u")] {
            let json = format!(r#"{{"auths":{{"a.io":{{"auth":"{auth}","username":"x","password":"y"}}}}}}"#);
            assert_eq!(users(&Credentials::parse(json.as_bytes()).unwrap(), "a.io/b"), [user]);
        }
        let legacy = Credentials::parse_legacy(br#"{"a.io":{"username":"x","password":"y","email":"z"}}"#).unwrap();
        assert_eq!(users(&legacy, "a.io/b"), ["x"]);
    }

    #[test]
    fn nothing_prints_a_password() {
        let credentials = with_keys(&["example.com"]);
        assert!(!format!("{credentials:?}").contains("geheim"));
        assert!(!format!("{:?}", credentials.for_repository("example.com", "a")).contains("geheim"));
        for bad in
            [r#"{"auths":{"a":{"password":geheim}}}"#, r#"{"auths":"geheim"}"#, r#"{"auths":{"a":{"auth":"geheim!"}}}"#]
        {
            let error = Credentials::parse(bad.as_bytes()).unwrap_err();
            let text = format!("{error:?} {}", crate::api::condition::chain(&error));
            assert!(!text.contains("geheim"), "{text}");
        }
    }
}
