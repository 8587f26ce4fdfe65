//! What was stored before a rule was there: it can still be observed, let go and repaired, and what was wrong stays refused
//! when it is written anew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is how a test fails")]

mod admit;

use admit::{causes, cluster, eventually};
use berth::api::crd;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// The schema as it was before there were rules and bounds.
fn lax(schema: &mut JSONSchemaProps) {
    schema.x_kubernetes_validations = None;
    schema.max_length = None;
    schema.max_items = None;
    schema.max_properties = None;
    schema.minimum = None;
    schema.maximum = None;
    schema.properties.iter_mut().flatten().for_each(|(_, property)| lax(property));
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        lax(item);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &mut schema.additional_properties {
        lax(value);
    }
}

fn lax_crds() -> Vec<CustomResourceDefinition> {
    let mut crds = crd::all();
    for version in crds.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        lax(version.schema.as_mut().unwrap().open_api_v3_schema.as_mut().unwrap());
    }
    crds
}

#[tokio::test]
async fn a_bad_value_never_blocks_status_deletion_or_its_repair() {
    let cluster = cluster();
    let api = cluster.objects("BotContainer").await;
    // Wrong in every way that the tables know: too long, too many, against rules of scalars, items, maps, objects and sums.
    let bad = json!({
        "botId": "Not A Label",
        "image": "no image at all",
        "env": (0..300).map(|i| json!({"name": format!("E={i}"), "value": "x".repeat(600)})).collect::<Value>(),
        "envFrom": [{}],
        "terminationGracePeriodSeconds": -1,
        "resources": {"requests": {"cpu": "2", "gpu": "1"}, "limits": {"cpu": "1", "memory": "512m"}},
        "securityContext": {"privileged": true, "allowPrivilegeEscalation": false, "capabilities": {"add": ["CAP_X"]}},
        "nodeSelector": {"a b": "c d"},
        "tolerations": [{"operator": "Sometimes"}],
        "dnsPolicy": "None",
        "data": {"path": "/proc"},
        "rollback": {"id": "a"},
        "snapshotPolicy": {"schedule": "@daily"},
        "skills": [{"name": "../a", "content": "x"}],
        "files": [{"path": "/data"}, {"path": "/proc/1", "content": "x"}, {"path": "relative", "content": "x"}],
        "timezone": "x".repeat(100),
    });
    let whole = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": "old", "finalizers": [berth::api::FINALIZER]}, "spec": bad,
    });
    let other = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": "new"}, "spec": {"image": "no image"},
    });
    let object = |value: &Value| serde_json::from_value::<DynamicObject>(value.clone()).unwrap();
    let dry = PostParams { dry_run: true, ..PostParams::default() };

    cluster.apply(&lax_crds()).await;
    eventually("without rules", async || {
        api.create(&dry, &object(&whole)).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    api.create(&PostParams::default(), &object(&whole)).await.unwrap();
    cluster.apply(&crd::all()).await;
    eventually("with rules again", async || match api.create(&dry, &object(&other)).await {
        Ok(_) => Err("a wrong image is still accepted".to_owned()),
        Err(_) => Ok(()),
    })
    .await;

    let merge = |change: Value| Patch::Merge(change);
    let params = PatchParams::default();
    // Status, by update and by apply, as controller and agent write it; the binding too.
    api.patch_status("old", &params, &merge(json!({"status": {"phase": "Pending", "nodeName": "node-1"}})))
        .await
        .unwrap();
    let applied = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "status": {"phase": "Failed", "conditions": [{"type": "Ready", "status": "False", "reason": "InvalidImageName",
            "message": "", "lastTransitionTime": "2026-11-24T10:00:00Z"}]},
    });
    let mine = PatchParams::apply("berth-agent").force();
    api.patch_status("old", &mine, &Patch::Apply(&applied)).await.unwrap();

    // Another field, labels, and one wrong value after the other put right while the rest is still wrong.
    for change in [
        json!({"metadata": {"labels": {"a": "b"}}}),
        json!({"spec": {"operatingMode": "Stopped"}}),
        json!({"spec": {"image": "docker.io/library/busybox:1"}}),
        json!({"spec": {"terminationGracePeriodSeconds": 5}}),
        json!({"spec": {"files": null}}),
        json!({"spec": {"skills": [{"name": "a", "content": "x"}]}}),
        json!({"spec": {"env": null}}),
        json!({"spec": {"securityContext": {"privileged": false}}}),
    ] {
        let text = change.to_string();
        api.patch("old", &params, &merge(change)).await.unwrap_or_else(|e| panic!("{text} must be accepted: {e}"));
    }

    // What is written anew is judged anew.
    let answer = api.patch("old", &params, &merge(json!({"spec": {"image": "still no image"}}))).await;
    let told = causes("a wrong image", answer);
    assert_eq!(told.iter().map(|c| c.field.as_str()).collect::<Vec<_>>(), ["spec.image"], "{told:?}");

    // Deletion: the finalizer comes off.
    api.delete("old", &DeleteParams::default()).await.unwrap();
    api.patch("old", &params, &merge(json!({"metadata": {"finalizers": null}}))).await.unwrap();
    eventually("gone", async || match api.get_opt("old").await.unwrap() {
        Some(object) => Err(format!("{:?}", object.metadata)),
        None => Ok(()),
    })
    .await;
}
