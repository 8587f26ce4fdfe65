//! Finalizers of ours: whose object has one may have bytes on a node.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{Api, Patch};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::error::Error;
use super::{Context, describe, merge_params};

/// Adds one; gives the object as it is after that. A conflict when the object is not the one that was seen.
pub async fn add<K>(context: &Context, object: &K, finalizer: &str) -> Result<K, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let mut all = object.finalizers().to_vec();
    all.push(finalizer.to_owned());
    write(context, object, all).await
}

/// Removes one. The answer is kept by nobody: after the last is removed the object is gone, and the watch may have said so first.
pub async fn remove<K>(context: &Context, object: &K, finalizer: &str) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let left = object.finalizers().iter().filter(|f| *f != finalizer).cloned().collect();
    match write(context, object, left).await {
        // Somebody was quicker, and it is gone.
        Err(error) if error.is_gone() => Ok(()),
        done => done.map(drop),
    }
}

async fn write<K>(context: &Context, object: &K, all: Vec<String>) -> Result<K, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let body = json!({
        "metadata": {"uid": object.uid(), "resourceVersion": object.resource_version(), "finalizers": all},
    });
    let api: Api<K> = Api::namespaced(context.client.clone(), &object.namespace().unwrap_or_default());
    let (name, params, patch) = (object.name_any(), merge_params(), Patch::Merge(&body));
    context.write("finalizer", &describe(object), api.patch(&name, &params, &patch)).await
}
