//! Images that can't be had, and their repair.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth::api::BotContainer;
use berth::api::bot_container::{ImagePullPolicy, Phase};
use berth::api::condition::ConditionType;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, Patch, PatchParams};
use serde_json::json;

use crate::common::{BotBuilder, Cluster, SOON, bot, run, summary, wait_for};
use crate::stage::{Stage, life, message, page, pid, says, status};

/// The digest that a bot's layer stands on.
#[track_caller]
fn digest(bot: &BotContainer) -> String {
    let image = status(bot).image.as_ref().unwrap_or_else(|| panic!("no image: {}", summary(bot)));
    image.digest.clone().unwrap_or_else(|| panic!("no digest: {}", summary(bot)))
}

/// Pushes the demo's bot with another greeting: an image of other bytes under the same name.
pub fn push_another(image: &str) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["bot", "push"] {
        std::fs::copy(Path::new("images/demo-bot").join(file), dir.path().join(file)).unwrap();
    }
    let bot = dir.path().join("bot");
    let text = std::fs::read_to_string(&bot).unwrap().replace("I am", "Also I am");
    std::fs::write(&bot, text).unwrap();
    run(Command::new(dir.path().join("push")).arg(image));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_told_and_mended_by_an_edit_or_a_push() {
    let stage = Stage::set("missing").await;
    let registry = stage.cluster.env("BERTH_REGISTRY");
    let tag = stage.ns.name();
    let missing = format!("{registry}/berth/{tag}:1");
    for name in ["edited", "pushed"] {
        stage.apply(bot(name).image(&missing)).await;
    }
    for name in ["edited", "pushed"] {
        let waits = stage.says(name, Phase::BackOff, "ImagePullBackOff").await;
        assert_eq!(says(&waits, ConditionType::ImageReady), Some(("False", "ImageNotFound")), "{}", summary(&waits));
        assert!(message(&waits, ConditionType::Ready).contains(&missing), "{}", summary(&waits));
        assert!(stage.told_once(name, "ImageNotFound").await.contains(&missing));
        assert_eq!(status(&waits).restart_count, Some(0), "{}", summary(&waits));
    }
    let mended = stage.edited("edited", json!({"image": stage.cluster.image()}), Phase::Running).await;
    page(&mended).await;
    assert_eq!(status(&mended).image.as_ref().unwrap().reference, stage.cluster.image());
    assert_eq!(says(&mended, ConditionType::Reconciling), None);
    run(Command::new("images/demo-bot/push").arg(&missing));
    let mended = stage.ns.ready("pushed", SOON).await;
    page(&mended).await;
    // Each further try found the same, and nobody was told again.
    for name in ["edited", "pushed"] {
        stage.told_once(name, "ImageNotFound").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_whose_image_is_missing_is_stopped_paused_and_deleted_all_the_same() {
    let stage = Stage::set("nopull").await;
    let before = stage.warmed().await;
    let missing = format!("{}/berth/none:1", stage.cluster.env("BERTH_REGISTRY"));
    stage.apply(bot("web").image(&missing)).await;
    stage.says("web", Phase::BackOff, "ImagePullBackOff").await;
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(says(&stopped, ConditionType::Ready).unwrap().0, "True");
    stage.edit("web", json!({"operatingMode": "Running"})).await;
    stage.says("web", Phase::BackOff, "ImagePullBackOff").await;
    stage.ns.delete("web", SOON).await;
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none_and_registries_that_are_away_are_told() {
    let stage = Stage::set("names").await;
    // What the API server's own rules let through, the agent refuses in words.
    for (name, image) in [("upper", "127.0.0.1:1/Upper/case:1"), ("tag", "example.com/bot:a b")] {
        match stage.ns.try_apply(bot(name).image(image).on(stage.agent.node())).await {
            Ok(_) => {
                let failed = stage.says(name, Phase::Failed, "InvalidImageName").await;
                assert_eq!(says(&failed, ConditionType::Stalled).unwrap().0, "True");
                assert!(message(&failed, ConditionType::Ready).contains("spec.image"), "{}", summary(&failed));
                stage.edited(name, json!({"image": stage.cluster.image()}), Phase::Running).await;
            }
            Err(kube::Error::Api(status)) => {
                assert_eq!(status.code, 422, "{status:?}");
                assert!(status.message.contains("spec.image"), "{status:?}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Nobody listens on port 1.
    stage.apply(bot("away").image("127.0.0.1:1/berth/bot:1")).await;
    let waits = stage.says("away", Phase::BackOff, "ImagePullBackOff").await;
    assert_eq!(says(&waits, ConditionType::ImageReady).unwrap(), ("False", "RegistryUnavailable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn never_pulling_means_never_until_the_image_is_there() {
    let stage = Stage::set("never").await;
    let never = || bot("web").with(|spec| spec.image_pull_policy = Some(ImagePullPolicy::Never));
    stage.apply(never()).await;
    let waits = stage.says("web", Phase::BackOff, "ErrImageNeverPull").await;
    assert_eq!(stage.agent.leaks().count("images"), 0, "{}", summary(&waits));
    // Another bot brings the image; this one goes on by itself.
    stage.runs(bot("other")).await;
    let web = stage.ns.ready("web", SOON).await;
    page(&web).await;
    // And with the image there, at once.
    stage.runs(bot("third").with(|spec| spec.image_pull_policy = Some(ImagePullPolicy::Never))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_found_by_its_digest_as_well() {
    let stage = Stage::set("digest").await;
    let first = stage.runs(bot("first")).await;
    let digest = status(&first).image.as_ref().unwrap().digest.clone().unwrap();
    let by_digest = format!("{}/berth/demo-bot@{digest}", stage.cluster.env("BERTH_REGISTRY"));
    let second = stage.runs(bot("second").image(&by_digest)).await;
    assert_eq!(status(&second).image.as_ref().unwrap().digest.as_ref(), Some(&digest));
    page(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pull_policy_does_as_it_says_with_a_tag_that_moved() {
    let stage = Stage::set("policies").await;
    let image = format!("{}/berth/{}:1", stage.cluster.env("BERTH_REGISTRY"), stage.ns.name());
    run(Command::new("images/demo-bot/push").arg(&image));
    let asks = |name: &str, policy| bot(name).image(&image).with(|spec| spec.image_pull_policy = Some(policy));
    let first = stage.runs(asks("first", ImagePullPolicy::IfNotPresent)).await;

    push_another(&image);
    for (name, policy) in [("present", ImagePullPolicy::IfNotPresent), ("never", ImagePullPolicy::Never)] {
        let bot = stage.runs(asks(name, policy)).await;
        assert_eq!(digest(&bot), digest(&first), "{policy:?}: what is there is good enough");
        assert!(page(&bot).await.starts_with("I am"), "{policy:?}");
    }
    let always = stage.runs(asks("always", ImagePullPolicy::Always)).await;
    assert_ne!(digest(&always), digest(&first), "the registry is asked for what the tag means now");
    assert!(page(&always).await.starts_with("Also I am"));
    let reference = &status(&always).image.as_ref().unwrap().reference;
    assert_eq!((reference, Some(reference)), (&image, status(&first).image.as_ref().map(|i| &i.reference)));

    // Whoever has a layer keeps it, with the image below it: a restart is no change of the image.
    let restarted = stage.edited("first", json!({"restartedAt": "2026-11-24T10:00:00Z"}), Phase::Running).await;
    assert_eq!(digest(&restarted), digest(&first));
    // It has counted this start, before the next one ends it.
    page(&restarted).await;
    let both = json!({"imagePullPolicy": "Always", "restartedAt": "2026-11-24T10:00:01Z"});
    let restarted = stage.edited("first", both, Phase::Running).await;
    assert_eq!(digest(&restarted), digest(&first));
    assert!(page(&restarted).await.starts_with("I am first, started 3 time"), "{}", page(&restarted).await);
}

/// Debian's registry with a login, on the storage of the cluster's own; stopped when dropped.
struct PrivateRegistry {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl PrivateRegistry {
    async fn start(cluster: &Cluster) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        // bcrypt of `s3cret`, at the least cost.
        let user = "bot:$2b$04$AmJfMJpDj/.SCa4R3HILteZl/mMWGyTOTPG.t7xh3wAijY8iGLdCy\n";
        std::fs::write(dir.path().join("htpasswd"), user).unwrap();
        let config = json!({
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": cluster.dir().join("registry")}},
            "http": {"addr": address},
            "auth": {"htpasswd": {"realm": "bots", "path": dir.path().join("htpasswd")}},
        });
        // Every JSON text is YAML.
        std::fs::write(dir.path().join("config.yaml"), config.to_string()).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(dir.path().join("config.yaml")).stdin(Stdio::null());
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let registry = Self { child, address, _dir: dir };
        let at = registry.address.parse().unwrap();
        wait_for("the private registry", SOON, || async {
            match crate::common::get(at, "/v2/").await? {
                (401, _) => Ok(()),
                other => Err(format!("it asks for no login: {other:?}")),
            }
        })
        .await;
        registry
    }
}

impl Drop for PrivateRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pull secret as `kubectl create secret docker-registry` makes it, created or replaced.
async fn pull_secret(stage: &Stage, name: &str, registry: &str, password: &str) {
    let config = json!({"auths": {registry: {"username": "bot", "password": password}}}).to_string();
    let secret = Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        type_: Some("kubernetes.io/dockerconfigjson".to_owned()),
        data: Some([(".dockerconfigjson".to_owned(), ByteString(config.into_bytes()))].into()),
        ..Secret::default()
    };
    let params = PatchParams::apply("berth-test").force();
    stage.ns.api::<Secret>().patch(name, &params, &Patch::Apply(&secret)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_asks_for_a_login_gets_the_pull_secrets() {
    let stage = Stage::set("login").await;
    let registry = PrivateRegistry::start(stage.cluster).await;
    let image = stage.cluster.image().replace(stage.cluster.env("BERTH_REGISTRY"), &registry.address);
    let with = |bot: BotBuilder, secrets: &[&str]| {
        let named = json!(secrets.iter().map(|name| json!({"name": name})).collect::<Vec<_>>());
        bot.image(&image).with(|spec| spec.image_pull_secrets = serde_json::from_value(named).unwrap())
    };
    stage.apply(with(bot("web"), &[])).await;
    let refused = stage.says("web", Phase::BackOff, "ImagePullBackOff").await;
    assert_eq!(says(&refused, ConditionType::ImageReady), Some(("False", "ImageAuthFailed")), "{}", summary(&refused));
    assert!(message(&refused, ConditionType::Ready).contains(&registry.address), "{}", summary(&refused));
    stage.told_once("web", "ImageAuthFailed").await;

    // A Secret that is not there yet is passed over, as for Pods; one with a wrong password is of no help.
    stage.apply(with(bot("web"), &["registry"])).await;
    stage.says("web", Phase::BackOff, "ImagePullBackOff").await;
    pull_secret(&stage, "registry", &registry.address, "wr0ng").await;
    stage.edit("web", json!({"terminationGracePeriodSeconds": 1})).await;
    let refused = stage.says("web", Phase::BackOff, "ImagePullBackOff").await;
    // Mended without an edit of the bot.
    pull_secret(&stage, "registry", &registry.address, "s3cret").await;
    let web = stage.ns.ready("web", SOON).await;
    page(&web).await;
    assert_eq!(digest(&web), digest(&stage.runs(bot("free")).await), "the same image by another way");

    // No password is told to anybody.
    let log = stage.cluster.dir().join(format!("log/agent-{}.log", stage.agent.node()));
    let log = std::fs::read_to_string(&log).unwrap_or_else(|e| panic!("{}: {e}", log.display()));
    assert!(log.contains("ImageAuthFailed"), "the log tells of the refusal");
    let told = serde_json::to_string(&refused).unwrap() + &serde_json::to_string(&web).unwrap() + &log;
    for password in ["s3cret", "wr0ng", "Ym90OnMzY3JldA", "Ym90OndyMG5n"] {
        assert!(!told.contains(password), "{password}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_the_registry_itself_when_the_mirror_is_away() {
    let registry = Cluster::shared().env("BERTH_REGISTRY");
    // The first stands for a registry that this node can't reach; the second has a mirror where nobody listens.
    let mirrors = format!("registry.invalid=http://{registry},{registry}=http://127.0.0.1:1");
    let stage = Stage::set_with("mirror", &[("BERTH_REGISTRY_MIRROR", &mirrors)]).await;
    let far = stage.cluster.image().replace(registry, "registry.invalid");
    let mirrored = stage.runs(bot("mirrored").image(&far)).await;
    page(&mirrored).await;
    assert_eq!(status(&mirrored).image.as_ref().unwrap().reference, far, "people read the name that they wrote");
    let itself = stage.runs(bot("itself")).await;
    page(&itself).await;
    assert_eq!(digest(&itself), digest(&mirrored));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_hangs_is_told_and_holds_up_nothing() {
    let stage = Stage::set("hangs").await;
    // The kernel takes the connections, and nobody ever answers.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let image = format!("{}/berth/bot:1", silent.local_addr().unwrap());
    for name in ["web", "leaves", "mended"] {
        stage.apply(bot(name).image(&image)).await;
    }
    for name in ["web", "leaves", "mended"] {
        let starting = stage.says(name, Phase::Starting, "Starting").await;
        assert_eq!(says(&starting, ConditionType::Reconciling), Some(("True", "Starting")));
        assert_eq!(says(&starting, ConditionType::ImageReady), Some(("False", "Pulling")), "{}", summary(&starting));
        assert_eq!(says(&starting, ConditionType::Running).unwrap().0, "False");
    }
    let start = Instant::now();
    page(&stage.runs(bot("other")).await).await;
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(says(&stopped, ConditionType::Ready), Some(("True", "Stopped")));
    stage.ns.delete("leaves", SOON).await;
    page(&stage.edited("mended", json!({"image": stage.cluster.image()}), Phase::Running).await).await;
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "somebody waited for the registry: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_nobody_uses_go_when_the_disk_is_full() {
    let mut stage = Stage::set("collect").await;
    let name = |n: &str| format!("{}/berth/{}-{n}:1", stage.cluster.env("BERTH_REGISTRY"), stage.ns.name());
    let (kept, unused) = (name("kept"), name("unused"));
    push_another(&kept);
    run(Command::new("images/demo-bot/push").arg(&unused));
    let web = stage.runs(bot("web").image(&kept)).await;
    let process = life(pid(&web));
    stage.runs(bot("stopped").image(&kept)).await;
    stage.edited("stopped", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    stage.runs(bot("gone").image(&unused)).await;
    stage.ns.delete("gone", SOON).await;
    let images = || stage.agent.ctr(["images", "list", "-q"]);
    assert!(images().contains(&kept) && images().contains(&unused), "{}", images());

    // On a disk that counts as full, and with no image too young to go.
    stage.agent.stop().await;
    let full = [
        ("BERTH_IMAGE_GC_HIGH_PERCENT", "0"),
        ("BERTH_IMAGE_GC_LOW_PERCENT", "0"),
        ("BERTH_IMAGE_MIN_AGE_SECONDS", "0"),
    ];
    stage.agent.start_again(&full).await;
    let images = || stage.agent.ctr(["images", "list", "-q"]);
    wait_for("the unused image gone", SOON, || async {
        if images().contains(&unused) { Err(images()) } else { Ok(()) }
    })
    .await;
    assert!(images().contains(&kept), "an image went that layers stand on: {}", images());
    assert_eq!(life(pid(&web)), process);
    // What is used is whole: both go on from it, and what went is pulled again.
    let stopped = stage.edited("stopped", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert!(page(&stopped).await.contains("started 2 time"));
    let fresh =
        stage.runs(bot("fresh").image(&kept).with(|s| s.image_pull_policy = Some(ImagePullPolicy::Never))).await;
    page(&fresh).await;
    page(&stage.runs(bot("again").image(&unused)).await).await;
}
