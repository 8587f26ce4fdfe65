//! Derives the CustomResourceDefinitions: schema from the types, then bounds and CEL rules from tables.
//!
//! `berth crds` writes them; a test fails when `crds/` differs.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use super::{BotContainer, BotNode, BotRecord, BotSnapshot};

/// All CRDs, ready to be applied.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![BotContainer::crd(), BotSnapshot::crd(), BotRecord::crd(), BotNode::crd()]
}
