//! The HTTP side: endpoints, authentication, manifests and blobs of a registry (OCI distribution-spec v1.1).
//!
//! Everything a registry sends is bounded here: a manifest or token in bytes, a blob by its descriptor, and each wait by
//! progress. `oci-client` reads manifests, tokens and error pages into memory whole, however long they are, so a hostile
//! registry could end the agent, and with it every bot's loop; so this speaks to `reqwest` itself.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::credentials::{Credentials, Login};
use super::error::{Flaw, ImageError, Tried};
use super::manifest;
use super::reference::{Digest, Reference};

/// The longest answer of a token server that is read, in bytes. Real ones have a few thousand.
const MAX_TOKEN: usize = 256 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest Retry-After that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// Fewer bytes than this within a stall time-out are no progress: one byte a minute would hold a pull for ever.
pub(crate) const MIN_PROGRESS: u64 = 4096;

/// Where a registry is asked before itself: a pull-through cache, or a copy of some of its repositories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The registry that is mirrored, as in references (`docker.io`), or `*` for every one.
    pub registry: String,
    /// `http://` or `https://`, host, and a path put before the repository; tried in order.
    pub prefixes: Vec<String>,
}

/// A flag that is no mirror.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no mirror: {why}; write REGISTRY=URL[,URL…], for example docker.io=http://127.0.0.1:5000/proxy")]
pub struct BadMirror {
    text: String,
    why: &'static str,
}

impl std::str::FromStr for Mirror {
    type Err = BadMirror;

    /// `docker.io=http://127.0.0.1:5000/proxy,https://cache.example.com`.
    fn from_str(text: &str) -> Result<Self, BadMirror> {
        let bad = |why| BadMirror { text: text.to_owned(), why };
        let (registry, urls) = text.split_once('=').ok_or_else(|| bad("it has no '='"))?;
        if registry.is_empty() {
            return Err(bad("it names no registry"));
        }
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let prefixes = urls
            .split(',')
            .map(|url| {
                let parsed = Url::parse(url).map_err(|_| bad("a URL can't be parsed"))?;
                if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() {
                    return Err(bad("a URL is not http:// or https:// and a host"));
                }
                if !parsed.username().is_empty() || parsed.password().is_some() {
                    return Err(bad("a URL has a login in it; use a pull secret for the mirror's host"));
                }
                if parsed.query().is_some() || parsed.fragment().is_some() {
                    return Err(bad("a URL has a query or a fragment"));
                }
                Ok(url.trim_end_matches('/').to_owned())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { registry: registry.to_owned(), prefixes })
    }
}

/// One place to ask for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// `http` or `https`, and the host with its port.
    origin: String,
    /// The host as credentials name it.
    credential_host: String,
    /// The repository there.
    repository: String,
    /// Set for a mirror: which registry it stands for, as containerd tells it (`?ns=`).
    stands_for: Option<String>,
    loopback: bool,
}

impl Endpoint {
    /// The logins that this endpoint may be shown.
    pub fn logins(&self, credentials: &Credentials) -> Vec<Login> {
        credentials.for_repository(&self.credential_host, &self.repository)
    }
}

/// Where an image is asked for, in order: its registry's mirrors, those of every registry, the registry itself.
pub(crate) fn endpoints(reference: &Reference, mirrors: &[Mirror]) -> Vec<Endpoint> {
    let named = mirrors.iter().filter(|m| m.registry == reference.registry());
    let any = mirrors.iter().filter(|m| m.registry == "*");
    let mut all: Vec<Endpoint> =
        named.chain(any).flat_map(|m| &m.prefixes).filter_map(|prefix| mirror_endpoint(reference, prefix)).collect();
    let host = match reference.registry() {
        "docker.io" => "registry-1.docker.io",
        other => other,
    };
    let loopback = is_loopback(host);
    all.push(Endpoint {
        origin: format!("{}://{host}", if loopback { "http" } else { "https" }),
        credential_host: reference.registry().to_owned(),
        repository: reference.repository().to_owned(),
        stands_for: None,
        loopback,
    });
    all
}

fn mirror_endpoint(reference: &Reference, prefix: &str) -> Option<Endpoint> {
    let (scheme, rest) = prefix.split_once("://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let repository = match path {
        "" => reference.repository().to_owned(),
        path => format!("{path}/{}", reference.repository()),
    };
    Some(Endpoint {
        origin: format!("{scheme}://{host}"),
        credential_host: host.to_owned(),
        repository,
        stands_for: Some(reference.registry().to_owned()),
        loopback: is_loopback(host),
    })
}

/// Whether a host, with an optional port, is this machine: only there is plain HTTP spoken unasked.
fn is_loopback(host: &str) -> bool {
    if let Some(v6) = host.strip_prefix('[') {
        return v6.split(']').next().and_then(|a| a.parse::<IpAddr>().ok()).is_some_and(|a| a.is_loopback());
    }
    let name = host.split(':').next().unwrap_or(host);
    name == "localhost" || name.parse::<Ipv4Addr>().is_ok_and(|a| a.is_loopback())
}

/// An authority that signs certificates of registries.
#[derive(Clone, Debug)]
pub struct Authority(reqwest::Certificate);

/// A text without certificates that can be used.
#[derive(Debug, thiserror::Error)]
pub enum BadAuthorities {
    /// Something in it is no certificate.
    #[error("a certificate can't be read")]
    Unreadable(#[from] reqwest::Error),
    /// There is none in it.
    #[error("there is no certificate in it")]
    None,
}

impl Authority {
    /// All certificates of a PEM text, at least one.
    pub fn parse_all(pem: &[u8]) -> Result<Vec<Self>, BadAuthorities> {
        match reqwest::Certificate::from_pem_bundle(pem)? {
            none if none.is_empty() => Err(BadAuthorities::None),
            all => Ok(all.into_iter().map(Self).collect()),
        }
    }
}

/// The HTTP clients, made at first use: reading the CA certificates takes time and memory, and a node with a loopback
/// registry alone need not have any.
#[derive(Default)]
pub(crate) struct Clients {
    loopback: Mutex<Option<Client>>,
    outside: Mutex<Option<Client>>,
    authorities: Vec<Authority>,
}

impl Clients {
    /// `authorities` are trusted beside the machine's own.
    pub fn new(authorities: Vec<Authority>) -> Self {
        Self { authorities, ..Self::default() }
    }

    fn get(&self, endpoint: &Endpoint) -> Result<Client, ImageError> {
        let plain = endpoint.loopback && endpoint.origin.starts_with("http://");
        let slot = if plain { &self.loopback } else { &self.outside };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*slot {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")));
        if plain {
            // A proxy can't reach this machine's loopback, and nothing there speaks TLS unless it redirects.
            builder = builder.no_proxy().tls_certs_only([]);
        } else if !self.authorities.is_empty() {
            builder = builder.tls_certs_merge(self.authorities.iter().map(|authority| authority.0.clone()));
        }
        let client = builder.build().map_err(|e| ImageError::NoClient(Arc::new(e)))?;
        *slot = Some(client.clone());
        Ok(client)
    }
}

/// A conversation with one endpoint about one image: its connections, logins and token.
pub(crate) struct Session {
    client: Client,
    endpoint: Endpoint,
    image: Reference,
    stall: Duration,
    logins: Vec<Login>,
    auth: tokio::sync::Mutex<Auth>,
}

/// What is sent as `Authorization`, and how it came about.
#[derive(Default)]
struct Auth {
    header: Option<HeaderValue>,
    /// Which of the logins `header` was made with.
    login: usize,
    /// Whether `header` was ever accepted: then a 401 means that a token ran out, not that the login is wrong.
    worked: bool,
    challenge: Option<Challenge>,
}

#[derive(Clone, Debug)]
enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String>, scope: Option<String> },
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl Session {
    pub fn new(
        clients: &Clients,
        endpoint: Endpoint,
        image: &Reference,
        credentials: &Credentials,
        stall: Duration,
    ) -> Result<Self, ImageError> {
        let logins = endpoint.logins(credentials);
        Ok(Self {
            client: clients.get(&endpoint)?,
            endpoint,
            image: image.clone(),
            stall,
            logins,
            auth: tokio::sync::Mutex::default(),
        })
    }

    /// Who is asked, for messages.
    pub fn origin(&self) -> &str {
        &self.endpoint.origin
    }

    /// The digest behind a tag, by HEAD: what an `Always` pull of an image that is there costs. `None` where the
    /// registry does not say it that way.
    pub async fn resolve(&self, tag: &str) -> Result<Option<Digest>, ImageError> {
        let object = format!("manifest {tag}");
        let response = self.send(Method::HEAD, &format!("manifests/{tag}"), 0, &object).await?;
        match response.status() {
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => return Ok(None),
            _ => self.expect_success(&response, &object)?,
        }
        let digest = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        Ok(digest.and_then(Digest::parse))
    }

    /// A manifest or index by tag or digest, at most `max` bytes, with the media type that it was served as.
    pub async fn manifest(&self, which: &str, max: u64) -> Result<(Vec<u8>, Option<String>), ImageError> {
        let object = format!("manifest {which}");
        let response = self.send(Method::GET, &format!("manifests/{which}"), 0, &object).await?;
        self.expect_success(&response, &object)?;
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let bytes = self.read_all(response, max, "its manifest in bytes", &object).await?;
        Ok((bytes, media_type))
    }

    /// Opens a blob at an offset. The stream says where it really starts: at 0 where the registry knows no ranges.
    pub async fn blob(&self, digest: &Digest, size: u64, offset: u64) -> Result<BlobStream<'_>, ImageError> {
        let object = format!("blob {digest}");
        let response = self.send(Method::GET, &format!("blobs/{digest}"), offset, &object).await?;
        self.expect_success(&response, &object)?;
        let start =
            if response.status() == StatusCode::PARTIAL_CONTENT { range_start(response.headers()) } else { Some(0) };
        let corrupt =
            |problem| ImageError::Corrupt { image: self.image.clone().into(), object: object.clone(), problem };
        let start = start.filter(|&s| s == 0 || s == offset).ok_or_else(|| {
            corrupt(Flaw::Field("Content-Range", "it is missing, or not the one that was asked for".to_owned()))
        })?;
        if let Some(length) = response.content_length()
            && start.saturating_add(length) != size
        {
            return Err(corrupt(Flaw::Size { want: size, got: start.saturating_add(length) }));
        }
        Ok(BlobStream { session: self, progress: Progress::new(self.stall), response, start, object })
    }

    /// Sends a request, answering challenges with each login that fits.
    async fn send(&self, method: Method, path: &str, from: u64, object: &str) -> Result<Response, ImageError> {
        let url = format!("{}/v2/{}/{path}", self.endpoint.origin, self.endpoint.repository);
        let mut status = StatusCode::UNAUTHORIZED;
        // Each login twice, since its token may run out, and once with nothing; a registry that refuses now and then
        // must not keep us here.
        for _ in 0..2 * self.logins.len() + 4 {
            let shown = self.auth.lock().await.header.clone();
            let mut request = self.client.request(method.clone(), &url).header(ACCEPT, manifest::ACCEPT);
            if let Some(registry) = &self.endpoint.stands_for {
                request = request.query(&[("ns", registry)]);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if let Some(header) = &shown {
                request = request.header(AUTHORIZATION, header.clone());
            }
            let response = self.unstalled(request.send(), object).await?;
            if !matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
                if shown.is_some() {
                    let mut auth = self.auth.lock().await;
                    auth.worked |= auth.header == shown;
                }
                return Ok(response);
            }
            status = response.status();
            self.authorize(shown, &response, object).await?;
        }
        Err(self.refused(status, self.tried()))
    }

    /// Makes the next `Authorization` after a refusal of `shown`, or says that there is none left.
    async fn authorize(&self, shown: Option<HeaderValue>, refusal: &Response, object: &str) -> Result<(), ImageError> {
        let status = refusal.status();
        let mut auth = self.auth.lock().await;
        if auth.header != shown {
            // Another request was refused too and has seen to it.
            return Ok(());
        }
        // A challenge from where a redirect led is not the registry's: no login for this registry goes there.
        let own = Url::parse(&self.endpoint.origin).is_ok_and(|o| o.origin() == refusal.url().origin());
        if own && let Some(challenge) = challenge(refusal.headers()) {
            auth.challenge = Some(challenge);
        }
        let Some(challenge) = auth.challenge.clone().filter(|_| own) else {
            return Err(self.refused(status, self.tried()));
        };
        if shown.is_some() {
            let ran_out = auth.worked && status == StatusCode::UNAUTHORIZED;
            auth.worked = false;
            if !ran_out {
                auth.login += 1;
            }
        }
        auth.header = None;
        loop {
            let login = self.logins.get(auth.login);
            if auth.login > 0 && login.is_none() {
                return Err(self.refused(status, self.tried()));
            }
            let header = match (&challenge, login) {
                (Challenge::Basic, None) => return Err(self.refused(status, self.tried())),
                (Challenge::Basic, Some(login)) => Some(basic(login)),
                (Challenge::Bearer { realm, service, scope }, login) => {
                    if login.is_some() && realm.scheme() == "http" && self.endpoint.origin.starts_with("https://") {
                        return Err(self.refused(status, Tried::HeldBack));
                    }
                    self.token(realm, service.as_deref(), scope.as_deref(), login, object).await?
                }
            };
            match header {
                Some(mut header) => {
                    header.set_sensitive(true);
                    auth.header = Some(header);
                    return Ok(());
                }
                None => auth.login += 1,
            }
        }
    }

    /// Asks the token server. `None` when it refuses the login.
    async fn token(
        &self,
        realm: &Url,
        service: Option<&str>,
        scope: Option<&str>,
        login: Option<&Login>,
        object: &str,
    ) -> Result<Option<HeaderValue>, ImageError> {
        let usual = format!("repository:{}:pull", self.endpoint.repository);
        let mut request = self.client.get(realm.clone()).query(&[("scope", scope.unwrap_or(&usual))]);
        if let Some(service) = service {
            request = request.query(&[("service", service)]);
        }
        if let Some(login) = login {
            request = request.header(AUTHORIZATION, basic(login));
        }
        let object = format!("a token for {object}");
        let response = self.unstalled(request.send(), &object).await?;
        match response.status() {
            StatusCode::OK => {}
            // Some token servers answer 400 or 404 to a login that they don't know.
            status if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => return Ok(None),
            _ => return Err(self.registry_refused(&response)),
        }
        let bytes = self.read_all(response, MAX_TOKEN as u64, "the token in bytes", &object).await?;
        let corrupt =
            |problem| ImageError::Corrupt { image: self.image.clone().into(), object: object.clone(), problem };
        // The parser's words would quote the token.
        let token: Token = serde_json::from_slice(&bytes)
            .map_err(|e| corrupt(Flaw::Json(format!("line {}, column {}", e.line(), e.column()))))?;
        let text = if token.token.is_empty() { token.access_token } else { token.token };
        HeaderValue::from_str(&format!("Bearer {text}"))
            .map(Some)
            .map_err(|_| corrupt(Flaw::Field("token", "it has characters that no header takes".to_owned())))
    }

    async fn read_all(
        &self,
        mut response: Response,
        max: u64,
        what: &'static str,
        object: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let too_large = |got| ImageError::TooLarge { image: self.image.clone().into(), what, limit: max, got };
        if let Some(length) = response.content_length()
            && length > max
        {
            return Err(too_large(Some(length)));
        }
        let mut progress = Progress::new(self.stall);
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk(&mut response, &mut progress, object).await? {
            if bytes.len() as u64 + chunk.as_ref().len() as u64 > max {
                return Err(too_large(None));
            }
            bytes.extend_from_slice(chunk.as_ref());
        }
        Ok(bytes)
    }

    async fn chunk(
        &self,
        response: &mut Response,
        progress: &mut Progress,
        object: &str,
    ) -> Result<Option<impl AsRef<[u8]> + use<>>, ImageError> {
        match timeout_at(progress.deadline, response.chunk()).await {
            Err(_) => Err(self.stalled(object)),
            Ok(Err(e)) => Err(self.unreachable(e, object)),
            Ok(Ok(chunk)) => {
                progress.came(chunk.as_ref().map_or(0, |c| c.len()) as u64);
                Ok(chunk)
            }
        }
    }

    async fn unstalled(
        &self,
        sending: impl Future<Output = Result<Response, reqwest::Error>>,
        object: &str,
    ) -> Result<Response, ImageError> {
        match tokio::time::timeout(self.stall, sending).await {
            Err(_) => Err(self.stalled(object)),
            Ok(Err(e)) => Err(self.unreachable(e, object)),
            Ok(Ok(response)) => Ok(response),
        }
    }

    fn expect_success(&self, response: &Response, object: &str) -> Result<(), ImageError> {
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(()),
            StatusCode::NOT_FOUND => Err(ImageError::NotFound {
                image: self.image.clone().into(),
                registry: self.origin().to_owned(),
                object: object.to_owned(),
            }),
            _ => Err(self.registry_refused(response)),
        }
    }

    fn registry_refused(&self, response: &Response) -> ImageError {
        let seconds = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        ImageError::RegistryRefused {
            image: self.image.clone().into(),
            registry: self.origin().to_owned(),
            status: response.status().as_u16(),
            retry_after: seconds.map(|s| Duration::from_secs(s).min(MAX_RETRY_AFTER)),
        }
    }

    fn refused(&self, status: StatusCode, tried: Tried) -> ImageError {
        ImageError::AuthFailed {
            image: self.image.clone().into(),
            registry: self.origin().to_owned(),
            tried,
            status: status.as_u16(),
        }
    }

    fn tried(&self) -> Tried {
        if self.logins.is_empty() { Tried::Anonymous } else { Tried::Credentials(self.logins.len()) }
    }

    fn stalled(&self, object: &str) -> ImageError {
        ImageError::Stalled {
            image: self.image.clone().into(),
            registry: self.origin().to_owned(),
            object: object.to_owned(),
            min: MIN_PROGRESS,
            within: self.stall,
        }
    }

    fn unreachable(&self, error: reqwest::Error, object: &str) -> ImageError {
        ImageError::Unreachable {
            image: self.image.clone().into(),
            registry: self.origin().to_owned(),
            object: object.to_owned(),
            // A redirect's URL may be a signed one, good for whoever reads our log.
            source: Arc::new(error.without_url()),
        }
    }
}

/// A blob on its way.
pub(crate) struct BlobStream<'a> {
    session: &'a Session,
    response: Response,
    progress: Progress,
    object: String,
    /// Offset of the first byte that comes.
    pub start: u64,
}

impl BlobStream<'_> {
    /// Appends to `buffer` until it has `enough` bytes or the blob ends; says whether more may come. After an error the
    /// buffer still holds what came before it.
    pub async fn fill(&mut self, buffer: &mut Vec<u8>, enough: usize) -> Result<bool, ImageError> {
        while buffer.len() < enough {
            match self.session.chunk(&mut self.response, &mut self.progress, &self.object).await? {
                Some(chunk) => buffer.extend_from_slice(chunk.as_ref()),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The time that our own disk took is not the registry's.
    pub fn waited_for_us(&mut self) {
        self.progress = Progress::new(self.session.stall);
    }
}

/// A deadline that moves whenever enough has come.
struct Progress {
    deadline: Instant,
    stall: Duration,
    bytes: u64,
}

impl Progress {
    fn new(stall: Duration) -> Self {
        Self { deadline: Instant::now() + stall, stall, bytes: 0 }
    }

    fn came(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= MIN_PROGRESS {
            *self = Self::new(self.stall);
        }
    }
}

fn basic(login: &Login) -> HeaderValue {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{}:{}", login.user, login.password));
    // Base64 has none but visible ASCII, so this never falls back.
    let mut value = HeaderValue::from_str(&format!("Basic {text}")).unwrap_or(HeaderValue::from_static("Basic"));
    value.set_sensitive(true);
    value
}

/// The challenge that we can answer; Bearer before Basic, since it shows the password to the token server alone.
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(challenges) = http_auth::parse_challenges(value.to_str().unwrap_or_default()) else { continue };
        for c in challenges {
            let parameter =
                |name: &str| c.params.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.to_unescaped());
            if c.scheme.eq_ignore_ascii_case("bearer") {
                let realm = parameter("realm").and_then(|r| Url::parse(&r).ok());
                let realm = realm.filter(|r| matches!(r.scheme(), "http" | "https"));
                if let Some(realm) = realm {
                    return Some(Challenge::Bearer { realm, service: parameter("service"), scope: parameter("scope") });
                }
            } else if c.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

/// The first byte's offset out of `Content-Range: bytes 5-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(image: &str, mirrors: &[&str]) -> Vec<(String, String, String)> {
        let mirrors: Vec<Mirror> = mirrors.iter().map(|m| m.parse().unwrap()).collect();
        endpoints(&Reference::parse(image).unwrap(), &mirrors)
            .into_iter()
            .map(|e| (e.origin, e.repository, e.credential_host))
            .collect()
    }

    fn endpoint(origin: &str, repository: &str, host: &str) -> (String, String, String) {
        (origin.to_owned(), repository.to_owned(), host.to_owned())
    }

    #[test]
    fn a_registry_is_asked_by_https_and_loopback_by_http() {
        for (image, origin) in [
            ("nginx", "https://registry-1.docker.io"),
            ("ghcr.io/a/b", "https://ghcr.io"),
            ("example.com:5000/a", "https://example.com:5000"),
            ("localhost:5000/a", "http://localhost:5000"),
            ("127.0.0.1:5000/a", "http://127.0.0.1:5000"),
            ("127.1.2.3/a", "http://127.1.2.3"),
            ("[::1]:5000/a", "http://[::1]:5000"),
            ("10.0.0.1:5000/a", "https://10.0.0.1:5000"),
            ("localhost.example.com/a", "https://localhost.example.com"),
            ("127.0.0.1.example.com/a", "https://127.0.0.1.example.com"),
            ("[::2]/a", "https://[::2]"),
        ] {
            assert_eq!(asked(image, &[])[0].0, origin, "{image}");
        }
    }

    #[test]
    fn mirrors_come_first_in_order_and_have_credentials_of_their_own() {
        let mirrors = ["*=https://any.example.com", "docker.io=http://127.0.0.1:5000/proxy/,https://b.example.com"];
        assert_eq!(
            asked("nginx", &mirrors),
            [
                endpoint("http://127.0.0.1:5000", "proxy/library/nginx", "127.0.0.1:5000"),
                endpoint("https://b.example.com", "library/nginx", "b.example.com"),
                endpoint("https://any.example.com", "library/nginx", "any.example.com"),
                endpoint("https://registry-1.docker.io", "library/nginx", "docker.io"),
            ]
        );
        assert_eq!(asked("ghcr.io/a/b", &mirrors).len(), 2);
    }

    #[test]
    fn what_is_no_mirror_is_refused() {
        for text in
            ["", "docker.io", "=http://a", "a=", "a=ftp://b", "a=b", "a=http://u:p@b", "a=http://b?x", "a=http://b,"]
        {
            assert!(text.parse::<Mirror>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn challenges_are_read() {
        let read = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
            }
            challenge(&headers)
        };
        assert!(matches!(read(&["Basic realm=\"x\""]), Some(Challenge::Basic)));
        assert!(matches!(
            read(&["Basic realm=\"x\"", "Bearer realm=\"https://a.io/token\",service=\"s\",scope=\"repository:a:pull\""]),
            Some(Challenge::Bearer { service: Some(s), scope: Some(_), .. }) if s == "s"
        ));
        for nothing in
            [&[][..], &["Digest realm=\"x\""], &["Bearer"], &["Bearer realm=\"file:///etc/passwd\""], &["\"\""]]
        {
            assert!(read(nothing).is_none(), "{nothing:?}");
        }
    }

    #[test]
    fn ranges_are_read() {
        for (value, start) in [("bytes 5-9/10", Some(5)), ("bytes 0-9/*", Some(0)), ("bytes */10", None), ("5-9", None)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, value.parse().unwrap());
            assert_eq!(range_start(&headers), start, "{value}");
        }
    }
}
