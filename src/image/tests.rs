//! Pulls on the real containerd, from the real registry and from one that misbehaves.

mod fixture;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::json;

use super::store::PullLease;
use super::*;
use crate::api::condition::{Reason, chain};
use fixture::*;

const EXAMPLE: &[(&str, &[u8])] = &[("app", b"#!/bin/sh\n")];

fn basic(user: &str, password: &str) -> (Credentials, String) {
    use base64::Engine as _;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let json = json!({"auths": {"127.0.0.1:*": {"auth": auth}}}).to_string();
    (Credentials::parse(json.as_bytes()).unwrap(), format!("Basic {auth}"))
}

fn login_for(registry: &Registry, user: &str, password: &str) -> (Credentials, String) {
    let (_, header) = basic(user, password);
    let json = json!({"auths": {&registry.host: {"username": user, "password": password}}}).to_string();
    (Credentials::parse(json.as_bytes()).unwrap(), header)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_packing_is_unpacked_and_the_collector_keeps_exactly_what_an_image_needs() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let layers = [
        layer(Packed::Plain, &[("plain", b"1"), ("over", b"low")]),
        layer(Packed::Gzip, &[("gzip", b"2"), ("over", b"high")]),
        layer(Packed::Zstd, &[("zstd", b"3")]),
    ];
    let digest = registry.push("v1", &image(&layers));
    let reference = registry.reference("a:v1");
    let pulled = pull(&images, &reference).await.unwrap();
    assert_eq!(pulled.digest, digest.to_string());
    assert_eq!(pulled.config.entrypoint, ["/bin/app"]);

    node.collect_garbage().await;
    let counts = node.counts().await;
    // Manifest, config and three layers; the record by tag and the one by digest.
    assert_eq!(counts, Counts { blobs: 5, ingests: 0, snapshots: 3, records: 2, leases: 0 });
    assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap().as_ref(), Some(&pulled));
    assert!(images.find(&reference.pinned(digest), SNAPSHOTTER).await.unwrap().is_some());
    for (path, content) in [("plain", "1"), ("gzip", "2"), ("zstd", "3"), ("over", "high")] {
        assert_eq!(node.read(&pulled, path).await.as_deref(), Some(content.as_bytes()), "{path}");
    }
    // Nothing that the image says of itself became a label.
    for snapshot in node.store().snapshots(SNAPSHOTTER).await.unwrap() {
        assert!(snapshot.labels.keys().all(|k| k == store::OURS), "{:?}", snapshot.labels);
    }
    for record in node.store().records().await.unwrap() {
        assert!(record.labels.keys().all(|k| k == store::OURS), "{:?}", record.labels);
        assert!(record.target.unwrap().annotations.is_empty());
        node.store().remove_record(&record.name, true).await.unwrap();
    }
    assert_eq!(node.counts().await, Counts::default(), "without its record an image holds nothing");
    assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_there_costs_one_head_and_no_write() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    registry.push("latest", &image(&[layer(Packed::Gzip, EXAMPLE)]));
    let reference = registry.reference("a");
    let first = pull(&images, &reference).await.unwrap();
    registry.content().requests.clear();
    assert_eq!(pull(&images, &reference).await.unwrap(), first);
    assert_eq!(registry.content().requests, ["HEAD /v2/a/manifests/latest"]);

    // The tag moves: the new one is pulled, what is shared is not fetched again, the old one stays under its digest.
    let base = layer(Packed::Gzip, EXAMPLE);
    registry.push("latest", &image(&[base.clone(), layer(Packed::Gzip, &[("more", b"x")])]));
    registry.content().requests.clear();
    let second = pull(&images, &reference).await.unwrap();
    assert_ne!(second.digest, first.digest);
    assert_eq!(registry.asked("GET", Digest::of(&base.blob).as_str()), 0);
    assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), Some(second));
    let old = reference.pinned(Digest::parse(&first.digest).unwrap());
    assert_eq!(images.find(&old, SNAPSHOTTER).await.unwrap().map(|i| i.chain_id), Some(first.chain_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_has_its_reason_and_leaves_nothing() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(ImageOptions { max_manifest_bytes: 64 << 10, ..hasty() });
    let good = image(&[layer(Packed::Gzip, &[("noise", &noise(1, 100_000))])]);
    let blob = Digest::of(&good.layers[0].blob).to_string();
    let size = good.layers[0].blob.len();
    let manifest = registry.push("good", &good).to_string();
    let flipped: Vec<u8> = good.layers[0].blob.iter().map(|b| b ^ 1).collect();
    let other_size = |n: i64| {
        let mut made = good.clone();
        made.manifest["layers"][0]["size"] = json!(n);
        made
    };
    registry.push("too-small", &other_size(size as i64 - 1));
    registry.push("too-large", &other_size(size as i64 + 1));
    registry.push("huge", &other_size(1 << 40));
    registry.push("wrong-arch", &image_for("s390x", &good.layers));
    registry.push_index("wrong-index", &[("s390x", &good), ("arm", &good)]);
    let liar = Layer { diff_id: Digest::of(b"another"), ..good.layers[0].clone() };
    registry.push("wrong-diff-id", &image(&[liar]));
    let junk = Layer { blob: b"this is no gzip".to_vec(), ..good.layers[0].clone() };
    registry.push("junk", &image(&[junk]));
    registry.push("no-config", &assemble(json!({"rootfs": 1}), &good.layers));
    let bad_env = json!({"os": "linux", "architecture": std::env::consts::ARCH,
        "rootfs": {"diff_ids": [good.layers[0].diff_id.as_str()]}, "config": {"Env": ["A=\u{0}"]}});
    registry.push("bad-env", &assemble(bad_env, &good.layers));

    use Reason::*;
    type Case<'a> = (&'a str, &'a str, Vec<Fault>, Reason);
    let cases: Vec<Case<'_>> = vec![
        ("missing", "", vec![], ImageNotFound),
        ("good", "manifests/good", vec![Fault::Status(401)], ImageAuthFailed),
        ("good", "manifests/good", vec![Fault::Status(403)], ImageAuthFailed),
        ("good", "manifests/good", vec![Fault::Status(404)], ImageNotFound),
        ("good", "manifests/good", vec![Fault::Status(429)], RegistryUnavailable),
        ("good", "manifests/good", vec![Fault::Status(500)], RegistryUnavailable),
        ("good", "manifests/good", vec![Fault::Status(503)], RegistryUnavailable),
        ("good", "manifests/good", vec![Fault::Status(204)], RegistryUnavailable),
        ("good", "manifests/good", vec![Fault::Silence], RegistryUnavailable),
        ("good", &manifest, vec![Fault::Bytes(b"{}".to_vec())], ImageCorrupt),
        ("good", &manifest, vec![Fault::Endless], ImageTooLarge),
        ("good", &manifest, vec![Fault::Stall(10)], RegistryUnavailable),
        ("good", &manifest, vec![Fault::Cut(10)], RegistryUnavailable),
        ("good", &blob, vec![Fault::Status(404)], ImageNotFound),
        ("good", &blob, vec![Fault::Status(401)], ImageAuthFailed),
        ("good", &blob, vec![Fault::Status(500)], RegistryUnavailable),
        ("good", &blob, vec![Fault::Stall(0)], RegistryUnavailable),
        ("good", &blob, vec![Fault::Cut(0)], RegistryUnavailable),
        ("good", &blob, vec![Fault::Bytes(flipped)], ImageCorrupt),
        ("good", &blob, vec![Fault::Bytes(vec![0; 10])], ImageCorrupt),
        ("good", &blob, vec![Fault::Endless], ImageCorrupt),
        ("too-small", "", vec![], ImageCorrupt),
        ("too-large", "", vec![], ImageCorrupt),
        ("huge", "", vec![], ImageTooLarge),
        ("wrong-arch", "", vec![], ImageWrongPlatform),
        ("wrong-index", "", vec![], ImageWrongPlatform),
        ("wrong-diff-id", "", vec![], ImageCorrupt),
        ("junk", "", vec![], ImageCorrupt),
        ("no-config", "", vec![], ImageCorrupt),
        ("bad-env", "", vec![], ImageCorrupt),
    ];
    for (i, (tag, path, faults, reason)) in cases.into_iter().enumerate() {
        registry.content().faults.clear();
        if !path.is_empty() {
            registry.fault(path, faults);
        }
        let reference = registry.reference(&format!("a:{tag}"));
        let begun = Instant::now();
        let Err(error) = pull(&images, &reference).await else { panic!("case {i}, {tag} {path}: it was pulled") };
        assert_eq!(error.reason(), reason, "case {i}, {tag}: {}", chain(&error));
        assert!(chain(&error).contains(&reference.to_string()), "case {i}: {}", chain(&error));
        assert!(begun.elapsed() < Duration::from_secs(15), "case {i}, {tag} took {:?}", begun.elapsed());
        assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), None, "case {i}, {tag}");
        node.wait_for_nothing().await;
    }
    registry.content().faults.clear();
    pull(&images, &registry.reference("a:good")).await.expect("history does not matter");

    let nobody = Reference::parse("127.0.0.1:1/a:b").unwrap();
    assert_eq!(pull(&images, &nobody).await.unwrap_err().reason(), RegistryUnavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_download_goes_on_where_it_ended() {
    for ranges in [true, false] {
        let (node, registry) = (Node::start().await, Registry::start().await);
        let images = node.images(hasty());
        let made = image(&[layer(Packed::Plain, &[("noise", &noise(2, 3_000_000))])]);
        let blob = Digest::of(&made.layers[0].blob).to_string();
        registry.push("v1", &made);
        registry.content().ranges = ranges;
        // Past a message to containerd, so that some of it is kept.
        registry
            .fault(&blob, [Fault::Cut(1_000_000), Fault::Cut(1_200_000), Fault::Bytes(made.layers[0].blob.clone())]);
        if ranges {
            registry.fault(&blob, [Fault::Cut(1_000_000), Fault::Cut(1_200_000), Fault::Cut(usize::MAX)]);
        }
        let pulled = pull(&images, &registry.reference("a:v1")).await.unwrap();
        assert_eq!(registry.asked("GET", &blob), 3, "ranges: {ranges}");
        assert_eq!(node.read(&pulled, "noise").await, Some(noise(2, 3_000_000)));
        assert_eq!(node.counts().await.ingests, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_stopped_near_the_limit_and_taken_away() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let limit = 32 << 20;
    let images = node.images(ImageOptions { max_unpacked_bytes: limit, max_unpacked_inodes: 500, ..hasty() });
    // 4 GiB of zeros in a file, well compressed; the same as one hole in a sparse tar (the PAX kind; containerd refuses GNU's); ten thousand empty files.
    let scratch = node.root().join("bomb");
    std::fs::create_dir_all(&scratch).unwrap();
    std::fs::write(scratch.join("header"), tar_header("zeros", 4 << 30)).unwrap();
    std::fs::File::create(scratch.join("hole")).unwrap().set_len(4 << 30).unwrap();
    let shell = |script: &str| {
        let output = std::process::Command::new("sh").args(["-c", script]).current_dir(&scratch).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let zeros = shell("{ cat header; head -c 4G /dev/zero; } | zstd -q -1 -c");
    let sparse = shell("tar --format=pax --sparse -cf - hole | zstd -q -1 -c");
    let names: Vec<String> = (0..10_000).map(|n| format!("f{n}")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    let zstd = |blob| Layer {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
        blob,
        diff_id: Digest::of(b"never reached"),
    };
    for (name, bomb) in [("zeros", zstd(zeros)), ("sparse", zstd(sparse)), ("files", layer(Packed::Zstd, &files))] {
        registry.push(name, &image(&[layer(Packed::Plain, EXAMPLE), bomb]));
        let before = FsUsage::of(node.root()).unwrap().available;
        let error = pull(&images, &registry.reference(&format!("a:{name}"))).await.expect_err(name);
        assert_eq!(error.reason(), Reason::ImageTooLarge, "{name}: {}", chain(&error));
        node.wait_for_nothing().await;
        let lost = before.saturating_sub(FsUsage::of(node.root()).unwrap().available);
        assert!(lost < 1 << 30, "{name} still takes {lost} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_this_machines_image() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let mine = image(&[layer(Packed::Gzip, &[("mine", b"1")])]);
    let other = image_for("s390x", &[layer(Packed::Gzip, &[("other", b"1")])]);
    let digest = registry.push_index("v1", &[("s390x", &other), (std::env::consts::ARCH, &mine)]);
    let pulled = pull(&images, &registry.reference("a:v1")).await.unwrap();
    assert_eq!(pulled.digest, digest.to_string(), "the digest is the index's");
    assert!(node.read(&pulled, "mine").await.is_some());
    node.collect_garbage().await;
    assert_eq!(node.counts().await.blobs, 4, "index, manifest, config, layer, and nothing of the other");
    assert!(images.find(&registry.reference("a:v1"), SNAPSHOTTER).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_wait_for_one_image_pull_it_once_but_not_with_anothers_login() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let made = image(&[layer(Packed::Gzip, &[("noise", &noise(3, 500_000))])]);
    registry.push("v1", &made);
    let (good, header) = login_for(&registry, "bot", "geheim");
    let (bad, _) = login_for(&registry, "bot", "guessed");
    registry.content().wants = Wants::Bearer(header);
    let reference = registry.reference("a:v1");
    let pulls = (0..20).map(|_| images.pull(&reference, SNAPSHOTTER, &good));
    let strangers = (0..3).map(|i| {
        let credentials = if i == 0 { Credentials::anonymous() } else { bad.clone() };
        let (images, reference) = (images.clone(), reference.clone());
        async move { images.pull(&reference, SNAPSHOTTER, &credentials).await }
    });
    let (pulled, refused) = tokio::join!(futures::future::join_all(pulls), futures::future::join_all(strangers));
    assert!(pulled.iter().all(Result::is_ok), "{pulled:?}");
    assert_eq!(registry.asked("GET", "/blobs/"), 2, "config and layer, once each");
    for refusal in refused {
        let error = refusal.unwrap_err();
        assert_eq!(error.reason(), Reason::ImageAuthFailed);
        assert!(!chain(&error).contains("guessed"));
    }
    // Nor once it is there.
    assert_eq!(
        images.pull(&reference, SNAPSHOTTER, &bad).await.unwrap_err().reason(),
        Reason::ImageAuthFailed,
        "the image is on the node, and the registry refuses this login"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_are_tried_in_order_by_basic_and_bearer() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    registry.push("v1", &image(&[layer(Packed::Gzip, EXAMPLE)]));
    let (wrong, _) = login_for(&registry, "bot", "old");
    let (right, header) = login_for(&registry, "bot", "new");
    let rotated = wrong.and_then(right);
    for wants in [Wants::Basic(header.clone()), Wants::Bearer(header)] {
        registry.content().wants = wants;
        images.pull(&registry.reference("a:v1"), SNAPSHOTTER, &rotated).await.unwrap();
        let error = pull(&images, &registry.reference("a:v1")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ImageAuthFailed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_server_that_misbehaves_has_its_reason_and_gets_no_login_by_a_detour() {
    let (node, registry, other) = (Node::start().await, Registry::start().await, Registry::start().await);
    let images = node.images(hasty());
    registry.push("v1", &image(&[layer(Packed::Gzip, EXAMPLE)]));
    let (login, header) = login_for(&registry, "bot", "geheim");
    registry.content().wants = Wants::Bearer(header);
    let reference = registry.reference("a:v1");
    use Reason::*;
    for (fault, reason) in [
        (Fault::Silence, RegistryUnavailable),
        (Fault::Status(500), RegistryUnavailable),
        (Fault::Later(7), RegistryUnavailable),
        (Fault::Status(401), ImageAuthFailed),
        (Fault::Status(404), ImageAuthFailed),
        (Fault::Endless, ImageTooLarge),
        (Fault::Bytes(b"no JSON".to_vec()), ImageCorrupt),
        (Fault::Bytes(b"{}".to_vec()), ImageAuthFailed),
        (Fault::Bytes(b"{\"token\":\"a\\nb\"}".to_vec()), ImageCorrupt),
        // Round in a circle, and to somebody who is not to see the password.
        (Fault::Redirect("/token".to_owned()), RegistryUnavailable),
        (Fault::Redirect(format!("http://{}/token", other.host)), ImageAuthFailed),
    ] {
        registry.fault("/token", [fault]);
        let error = images.pull(&reference, SNAPSHOTTER, &login).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{}", chain(&error));
        assert!(!chain(&error).contains("geheim"), "{}", chain(&error));
        node.wait_for_nothing().await;
    }
    assert!(other.asked("GET", "/token") > 0, "the detour was taken");
    assert_eq!(other.content().shown, Vec::<String>::new(), "a login went where the registry did not send it");
    registry.content().faults.clear();
    images.pull(&reference, SNAPSHOTTER, &login).await.unwrap();
}

/// Harm done: a registry that had asked to be left alone was asked five times for each blob within three seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_to_be_left_alone_is() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let made = image(&[layer(Packed::Gzip, EXAMPLE)]);
    registry.push("v1", &made);
    let blob = Digest::of(&made.layers[0].blob).to_string();
    for path in ["manifests/v1", &blob] {
        registry.content().faults.clear();
        registry.fault(path, [Fault::Later(77)]);
        registry.content().requests.clear();
        let error = pull(&images, &registry.reference("a:v1")).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(77)), "{}", chain(&error));
        assert_eq!(registry.content().requests.iter().filter(|r| r.ends_with(path)).count(), 1, "{path}");
        node.wait_for_nothing().await;
    }
    registry.content().faults.clear();
    pull(&images, &registry.reference("a:v1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_within_indexes_are_followed_so_far_and_no_further() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let made = image(&[layer(Packed::Gzip, EXAMPLE)]);
    registry.push_deep("three", &made, 3);
    registry.push_deep("four", &made, 4);
    let error = pull(&images, &registry.reference("a:four")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ImageCorrupt, "{}", chain(&error));
    node.wait_for_nothing().await;
    let pulled = pull(&images, &registry.reference("a:three")).await.unwrap();
    assert_eq!(images.find(&registry.reference("a:three"), SNAPSHOTTER).await.unwrap(), Some(pulled));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_nobody_waits_for_leaves_nothing() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(ImageOptions { stall_timeout: Duration::from_secs(60), ..hasty() });
    let made = image(&[layer(Packed::Gzip, EXAMPLE), layer(Packed::Plain, &[("noise", &noise(4, 2_000_000))])]);
    let blob = Digest::of(&made.layers[1].blob).to_string();
    registry.push("v1", &made);
    registry.fault(&blob, [Fault::Stall(1_000_000)]);
    let reference = registry.reference("a:v1");
    // Two wait; one gives up, and the other's pull goes on.
    let mut first = Box::pin(pull(&images, &reference));
    let mut second = Box::pin(pull(&images, &reference));
    let until = Instant::now() + Duration::from_secs(20);
    while node.counts().await.snapshots == 0 {
        assert!(Instant::now() < until, "the first layer was never unpacked");
        let step = tokio::time::sleep(Duration::from_millis(50));
        tokio::select! { _ = &mut first => panic!("ended"), _ = &mut second => panic!("ended"), () = step => {} }
    }
    drop(first);
    let step = tokio::time::sleep(Duration::from_millis(200));
    tokio::select! { _ = &mut second => panic!("ended"), () = step => {} }
    assert_ne!(node.counts().await, Counts::default());
    assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), None, "half an image is none");
    drop(second);
    node.wait_for_nothing().await;
    registry.content().faults.clear();
    pull(&images, &reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_killed_in_fetch_and_in_unpack_is_said_so_and_survived() {
    let (mut node, registry) = (Node::start().await, Registry::start().await);
    let options = ImageOptions { stall_timeout: Duration::from_secs(60), max_unpacked_bytes: 8 << 30, ..hasty() };
    let images = node.images(options);
    let fetched = image(&[layer(Packed::Gzip, EXAMPLE), layer(Packed::Plain, &[("noise", &noise(6, 2_000_000))])]);
    registry.push("fetch", &fetched);
    registry.fault(Digest::of(&fetched.layers[1].blob).as_str(), [Fault::Stall(1_000_000)]);
    let mut zeros = tar_header("zeros", 256 << 20).to_vec();
    zeros.resize((256 << 20) + 512 + 1024, 0);
    let unpacked = image(&[layer_of_tar(Packed::Zstd, &zeros)]);
    drop(zeros);
    registry.push("unpack", &unpacked);
    for (tag, path_part) in [("fetch", "sha256:"), ("unpack", store::EXTRACT_PREFIX)] {
        let reference = registry.reference(&format!("a:{tag}"));
        let (pulling, wanted) = (images.clone(), reference.clone());
        let pulled = tokio::spawn(async move { pull(&pulling, &wanted).await });
        let until = Instant::now() + Duration::from_secs(20);
        while !node.store().snapshots(SNAPSHOTTER).await.unwrap().iter().any(|s| s.name.starts_with(path_part)) {
            assert!(Instant::now() < until, "{tag}: nothing was ever unpacked");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        node.kill();
        registry.content().faults.clear();
        let error = tokio::time::timeout(Duration::from_secs(120), pulled).await.unwrap().unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::RuntimeUnavailable, "{tag}: {}", chain(&error));
        let error = images.find(&reference, SNAPSHOTTER).await.unwrap_err();
        assert_eq!(error.reason(), Reason::RuntimeUnavailable, "{tag}: {}", chain(&error));
        node.start_again().await;
        assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), None, "{tag}");
        pull(&images, &reference).await.unwrap();
    }
    images.clear_interrupted().await.unwrap();
    assert_eq!(node.counts().await, Counts { blobs: 7, ingests: 0, snapshots: 3, records: 4, leases: 0 });
}

#[test]
fn what_a_killed_agent_left_is_cleared_at_the_next_start() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build().unwrap();
    let outer = runtime();
    let (node, registry) = outer.block_on(async { (Node::start().await, Registry::start().await) });
    let made = image(&[layer(Packed::Gzip, EXAMPLE), layer(Packed::Plain, &[("noise", &noise(5, 2_000_000))])]);
    registry.push("v1", &made);
    registry.fault(Digest::of(&made.layers[1].blob).as_str(), [Fault::Stall(1_000_000)]);
    let reference = registry.reference("a:v1");
    let options = ImageOptions { stall_timeout: Duration::from_secs(60), ..hasty() };

    // The runtime of the first agent ends without a word, as by SIGKILL: no destructor can reach containerd.
    let agent = runtime();
    let images = {
        let _context = agent.enter();
        let containerd = crate::containerd::Containerd::new(node.containerd.address(), node.containerd.namespace());
        Images::new(containerd.unwrap(), options.clone())
    };
    let wanted = reference.clone();
    agent.spawn(async move {
        let result = pull(&images, &wanted).await;
        panic!("ended: {result:?}");
    });
    outer.block_on(async {
        let until = Instant::now() + Duration::from_secs(20);
        while node.counts().await.snapshots == 0 {
            assert!(Instant::now() < until, "the first layer was never unpacked");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    agent.shutdown_timeout(Duration::ZERO);

    outer.block_on(async {
        node.collect_garbage().await;
        assert!(node.counts().await.leases >= 1, "the lease holds on");
        let images = node.images(options);
        assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), None);
        assert!(images.clear_interrupted().await.unwrap() >= 1);
        node.wait_for_nothing().await;
        registry.content().faults.clear();
        pull(&images, &reference).await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_lease_holds_what_the_first_held() {
    let node = Node::start().await;
    let store = node.store();
    let lease = PullLease::begin(&store).await.unwrap();
    let first = lease.hold_snapshot(SNAPSHOTTER, "x").await.unwrap();
    store.prepare(&first, SNAPSHOTTER, "x", "").await.unwrap();
    lease.renew().await.unwrap();
    let second = lease.hold_snapshot(SNAPSHOTTER, "x").await.unwrap();
    assert_ne!(first, second);
    // The first runs out.
    let delete = containerd_client::services::v1::DeleteRequest { id: first.as_str().to_owned(), sync: true };
    node.containerd.leases().delete(node.containerd.request(delete)).await.unwrap();
    assert_eq!(node.counts().await.snapshots, 1);
    lease.end(true).await.unwrap();
    assert_eq!(node.counts().await, Counts::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_first_and_the_registry_last() {
    let node = Node::start().await;
    let (empty, full, origin) = (Registry::start().await, Registry::start().await, Registry::start().await);
    let made = image(&[layer(Packed::Gzip, EXAMPLE)]);
    full.push("v1", &made);
    let mirrors = vec![format!("{}=http://{},http://{}/proxy", origin.host, empty.host, full.host).parse().unwrap()];
    let images = node.images(ImageOptions { mirrors, ..hasty() });
    pull(&images, &origin.reference("a/b:v1")).await.unwrap();
    assert_eq!(empty.asked("HEAD", "/v2/a/b/manifests/v1"), 1);
    assert!(full.asked("GET", "/v2/proxy/a/b/blobs/") > 0);
    assert!(origin.content().requests.is_empty(), "the origin was not needed");
    // What the mirrors lack or garble comes from the registry.
    let second = image(&[layer(Packed::Gzip, &[("second", b"2")])]);
    origin.push("v2", &second);
    full.push("v2", &second);
    full.fault(Digest::of(&second.layers[0].blob).as_str(), [Fault::Bytes(b"garbled".to_vec())]);
    pull(&images, &origin.reference("a/b:v2")).await.unwrap();
    assert_eq!(origin.asked("GET", "/blobs/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn collection_takes_the_unused_and_leaves_what_a_layer_stands_on() {
    let (node, registry) = (Node::start().await, Registry::start().await);
    let images = node.images(hasty());
    let base = layer(Packed::Gzip, &[("base", b"1")]);
    let mut pulled = HashMap::new();
    for name in ["stood-on", "in-use", "free"] {
        registry.push(name, &image(&[base.clone(), layer(Packed::Gzip, &[(name, b"1")])]));
        pulled.insert(name, pull(&images, &registry.reference(&format!("a:{name}"))).await.unwrap());
    }
    // A bot's layer.
    let lease = PullLease::begin(&node.store()).await.unwrap();
    let id = lease.hold_snapshot(SNAPSHOTTER, "bot").await.unwrap();
    let prepare = containerd_client::services::v1::snapshots::PrepareSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: "bot".to_owned(),
        parent: pulled["stood-on"].chain_id.clone(),
        labels: HashMap::new(),
    };
    node.containerd.snapshots().prepare(node.containerd.leased(&id, prepare)).await.unwrap();
    let in_use = InUse(HashSet::from([pulled["in-use"].digest.clone()]));
    let full =
        CollectionPolicy { high_percent: 0, low_percent: 0, min_age: Duration::ZERO, ..CollectionPolicy::default() };

    let young = CollectionPolicy { min_age: Duration::from_secs(60), ..full.clone() };
    assert!(
        images.collect(&young, node.root(), &in_use).await.unwrap().removed.is_empty(),
        "all were asked for just now"
    );
    let roomy = CollectionPolicy { high_percent: 100, low_percent: 99, ..full.clone() };
    assert!(images.collect(&roomy, node.root(), &in_use).await.unwrap().removed.is_empty(), "the disk has room");
    let collected = images.collect(&full, node.root(), &in_use).await.unwrap();
    assert_eq!(collected.removed.len(), 2, "{collected:?}");
    let there =
        async |name: &str| images.find(&registry.reference(&format!("a:{name}")), SNAPSHOTTER).await.unwrap().is_some();
    assert!(there("stood-on").await && there("in-use").await && !there("free").await);
    // Base, two tops and the bot's own.
    assert_eq!(node.counts().await.snapshots, 4);
    lease.end(true).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_serves_a_real_program() {
    let node = Node::start().await;
    let port = free_port();
    let mut server = docker_registry(node.root(), "registry", port, "").await;
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let made = image(&[layer(Packed::Gzip, &[("busybox", &busybox)])]);
    let reference = push(port, "team/busybox:1", &made).await;

    let images = node.images(ImageOptions::default());
    let pulled = pull(&images, &reference).await.unwrap();
    assert_eq!(node.read(&pulled, "busybox").await, Some(busybox));
    assert_eq!(pull(&images, &reference).await.unwrap(), pulled);
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(pull(&images, &reference).await.unwrap_err().reason(), Reason::RegistryUnavailable);
    assert_eq!(images.find(&reference, SNAPSHOTTER).await.unwrap(), Some(pulled));
}

/// Debian's registry over TLS, with a certificate of an authority that no machine knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_a_private_authority_is_trusted_when_that_is_given() {
    let node = Node::start().await;
    let dir = node.root().join("private");
    std::fs::create_dir_all(&dir).unwrap();
    let script = "openssl ecparam -name prime256v1 -genkey -noout -out ca.key && \
         openssl req -x509 -new -key ca.key -subj /CN=private -days 9 -addext keyUsage=critical,keyCertSign -out ca.crt && \
         openssl ecparam -name prime256v1 -genkey -noout -out own.key && \
         openssl req -new -key own.key -subj /CN=registry -out own.csr && \
         printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth\\n' >own.ext && \
         openssl x509 -req -in own.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 9 -extfile own.ext -out own.crt";
    let made = std::process::Command::new("sh").args(["-c", script]).current_dir(&dir).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (plain, tls) = (free_port(), free_port());
    let mut push_side = docker_registry(&dir, "plain", plain, "").await;
    let files = format!("tls: {{certificate: {0}/own.crt, key: {0}/own.key}}", dir.display());
    let mut tls_side = docker_registry(&dir, "tls", tls, &files).await;
    push(plain, "team/bot:1", &image(&[layer(Packed::Gzip, EXAMPLE)])).await;

    // On loopback a registry speaks plain HTTP unless a mirror's URL says otherwise.
    let mirrors = vec![format!("registry.invalid=https://127.0.0.1:{tls}").parse().unwrap()];
    let reference = Reference::parse("registry.invalid/team/bot:1").unwrap();
    let stranger = node.images(ImageOptions { mirrors: mirrors.clone(), ..hasty() });
    let error = pull(&stranger, &reference).await.unwrap_err();
    assert_eq!(error.reason(), Reason::RegistryUnavailable, "{}", chain(&error));
    let authorities = Authority::parse_all(&std::fs::read(dir.join("ca.crt")).unwrap()).unwrap();
    let images = node.images(ImageOptions { mirrors, authorities, ..hasty() });
    pull(&images, &reference).await.unwrap();
    assert!(Authority::parse_all(b"").is_err() && Authority::parse_all(b"no certificate").is_err());
    for server in [&mut push_side, &mut tls_side] {
        server.kill().unwrap();
        server.wait().unwrap();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Debian's registry on the storage `DIR/storage`; `more` goes into the section `http` of its configuration.
async fn docker_registry(dir: &Path, name: &str, port: u16, more: &str) -> std::process::Child {
    let separator = if more.is_empty() { "" } else { ", " };
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: '127.0.0.1:{port}'{separator}{more}}}\n",
        dir.join("storage").display()
    );
    let file = dir.join(format!("{name}.yml"));
    std::fs::write(&file, config).unwrap();
    let server = std::process::Command::new("docker-registry")
        .arg("serve")
        .arg(file)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("docker-registry is installed");
    let until = Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(Instant::now() < until, "the registry did not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server
}

/// Pushes an image to a real registry that speaks plain HTTP.
async fn push(port: u16, name: &str, made: &Made) -> Reference {
    use oci_client::client::{ClientConfig, ClientProtocol, Config, ImageLayer};
    let client = oci_client::Client::new(ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() });
    let name: oci_client::Reference = format!("127.0.0.1:{port}/{name}").parse().unwrap();
    let layers = [ImageLayer::oci_v1_gzip(made.layers[0].blob.clone(), None)];
    let config = Config::oci_v1(made.config.clone(), None);
    client.push(&name, &layers, config, &oci_client::secrets::RegistryAuth::Anonymous, None).await.unwrap();
    Reference::parse(&name.to_string()).unwrap()
}
