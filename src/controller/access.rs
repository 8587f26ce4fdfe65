//! What the account of each node may read: the Secrets and ConfigMaps that bots of that node name, by name, one Role a namespace
//! and node. The pure part is above, the writing below.
//!
//! RBAC has no word for "what is named by a bot of your node", and the node authorizer knows Pods alone: so the words are
//! written out, and kept right as everything else is. A grant comes before the bind, and goes when nothing names it any more.
//! What the controller may grant at all is in a policy of the chart.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PostParams};
use kube::{Resource as _, ResourceExt as _};

use crate::api::reference::{Kind, Reference};
use crate::api::{BotNode, NODES_NAMESPACE};

use super::error::Error;
use super::snapshot::is_ending;
use super::{Context, Name, Next, apply_params};

/// Before the node in the names of Role and RoleBinding. The policy knows it too.
const PREFIX: &str = "berth:node:";

/// What the watches of Roles and RoleBindings select.
pub const LABEL: &str = "berth.dev/access";
const OF_NODE: &str = "node";

/// What is there of one namespace and node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// What its Role allows to get. Nothing, which is never wanted, of a Role that somebody made into something else.
    pub role: Option<BTreeSet<Reference>>,
    /// Its RoleBinding: whether it gives that to the node's account, and to nobody else.
    pub binding: Option<bool>,
}

/// The node that a Role or RoleBinding is about.
pub fn node_of(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX).filter(|node| !node.is_empty())
}

/// Namespace and name of the Role and the RoleBinding of a namespace and node.
pub fn object_of(at: &Name) -> Name {
    Name { namespace: at.namespace.clone(), name: format!("{PREFIX}{}", at.name) }
}

fn rules(references: &BTreeSet<Reference>) -> Vec<PolicyRule> {
    let of = |kind: Kind, resource: &str| {
        let names: Vec<String> = references.iter().filter(|(k, _)| *k == kind).map(|(_, name)| name.clone()).collect();
        (!names.is_empty()).then(|| PolicyRule {
            api_groups: Some(vec![String::new()]),
            resources: Some(vec![resource.to_owned()]),
            resource_names: Some(names),
            verbs: vec!["get".to_owned()],
            ..PolicyRule::default()
        })
    };
    of(Kind::Secret, "secrets").into_iter().chain(of(Kind::ConfigMap, "configmaps")).collect()
}

/// What a Role allows, if it is one of ours unchanged; else nothing.
pub fn allowed(role: &Role) -> BTreeSet<Reference> {
    let mut found = BTreeSet::new();
    let written = role.rules.as_deref().unwrap_or_default();
    for rule in written {
        let kind = match rule.resources.as_deref() {
            Some([resource]) if resource == "secrets" => Kind::Secret,
            Some([resource]) if resource == "configmaps" => Kind::ConfigMap,
            _ => return BTreeSet::new(),
        };
        found.extend(rule.resource_names.iter().flatten().map(|name| (kind, name.clone())));
    }
    if rules(&found) == written { found } else { BTreeSet::new() }
}

/// Whether a RoleBinding is as it should be.
pub fn is_right(binding: &RoleBinding, node: &str) -> bool {
    let wanted = self::binding("", node);
    binding.role_ref == wanted.role_ref && binding.subjects == wanted.subjects
}

fn metadata(namespace: &str, node: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(format!("{PREFIX}{node}")),
        namespace: Some(namespace.to_owned()),
        labels: Some([(LABEL.to_owned(), OF_NODE.to_owned())].into()),
        ..ObjectMeta::default()
    }
}

fn role(namespace: &str, node: &str, references: &BTreeSet<Reference>) -> Role {
    Role { metadata: metadata(namespace, node), rules: Some(rules(references)) }
}

fn binding(namespace: &str, node: &str) -> RoleBinding {
    let metadata = metadata(namespace, node);
    let role_ref = RoleRef {
        api_group: Some("rbac.authorization.k8s.io".to_owned()),
        kind: "Role".to_owned(),
        name: metadata.name.clone().unwrap_or_default(),
    };
    let account = Subject {
        kind: "ServiceAccount".to_owned(),
        name: node.to_owned(),
        namespace: Some(NODES_NAMESPACE.to_owned()),
        ..Subject::default()
    };
    RoleBinding { metadata, role_ref, subjects: Some(vec![account]) }
}

/// Makes what is granted in a namespace to a node what is wanted there.
pub async fn reconcile(context: &Context, at: &Name) -> Result<Next, Error> {
    let Name { namespace, name: node } = at;
    let (wanted, granted) = context.world().access(at);
    let object = format!("Role {namespace}/{PREFIX}{node}");
    let roles: Api<Role> = Api::namespaced(context.client.clone(), namespace);
    let bindings: Api<RoleBinding> = Api::namespaced(context.client.clone(), namespace);
    let name = format!("{PREFIX}{node}");
    if wanted.is_empty() {
        if granted.binding.is_some() {
            gone(context.write("taking back", &object, bindings.delete(&name, &DeleteParams::default())).await)?;
        }
        if granted.role.is_some() {
            gone(context.write("taking back", &object, roles.delete(&name, &DeleteParams::default())).await)?;
        }
        return Ok(Next::Done);
    }
    if granted.role.as_ref() != Some(&wanted) {
        let body = Patch::Apply(role(namespace, node, &wanted));
        match context.write("granting", &object, roles.patch(&name, &apply_params(), &body)).await {
            Ok(made) => context.world().saw_role(&made),
            Err(error) if ends(&error) => return Ok(Next::Resync),
            Err(error) => return Err(error),
        };
    }
    if granted.binding != Some(true) {
        // What a RoleBinding refers to can't be changed: one that refers elsewhere has to go.
        if granted.binding.is_some() {
            gone(context.write("granting", &object, bindings.delete(&name, &DeleteParams::default())).await)?;
        }
        let body = Patch::Apply(binding(namespace, node));
        match context.write("granting", &object, bindings.patch(&name, &apply_params(), &body)).await {
            Ok(made) => context.world().saw_binding(&made),
            Err(error) if ends(&error) => return Ok(Next::Resync),
            Err(error) => return Err(error),
        };
    }
    Ok(Next::Resync)
}

/// In a namespace that is being deleted nothing is made, and its bots read nothing any more.
fn ends(error: &Error) -> bool {
    matches!(error, Error::Forbidden { source, .. } if is_ending(source))
}

/// A deletion of what is gone already is done.
fn gone<T>(done: Result<T, Error>) -> Result<(), Error> {
    match done {
        Err(error) if error.is_gone() => Ok(()),
        done => done.map(drop),
    }
}

/// Makes the account of a node. It goes with its BotNode.
pub async fn ensure_account(context: &Context, node: &BotNode) -> Result<(), Error> {
    let name = node.name_any();
    if context.world().has_account(&name) {
        return Ok(());
    }
    let owner = OwnerReference {
        api_version: BotNode::api_version(&()).into_owned(),
        kind: BotNode::kind(&()).into_owned(),
        name: name.clone(),
        uid: node.uid().unwrap_or_default(),
        ..OwnerReference::default()
    };
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some(name.clone()), owner_references: Some(vec![owner]), ..ObjectMeta::default() },
        // Tokens are asked for, never mounted: no Pod is to run as this account.
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    };
    let object = format!("ServiceAccount {NODES_NAMESPACE}/{name}");
    let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), NODES_NAMESPACE);
    match context.write("making", &object, api.create(&PostParams::default(), &account)).await {
        // Made before, by us or a leader before us.
        Err(error) if error.is_there_already() => Ok(()),
        done => done.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(kind: Kind, name: &str) -> Reference {
        (kind, name.to_owned())
    }

    #[test]
    fn a_role_says_what_it_was_made_of_and_nothing_else_passes_for_it() {
        let references: BTreeSet<_> =
            [named(Kind::Secret, "a"), named(Kind::Secret, "b"), named(Kind::ConfigMap, "a")].into();
        let made = role("team-a", "node-1", &references);
        assert_eq!(allowed(&made), references);
        assert_eq!(node_of(made.metadata.name.as_deref().unwrap()), Some("node-1"));
        let mut wider = made.clone();
        wider.rules.as_mut().unwrap()[0].resource_names = None;
        assert!(allowed(&wider).is_empty());
        let mut more = made.clone();
        more.rules.as_mut().unwrap()[0].verbs.push("list".to_owned());
        assert!(allowed(&more).is_empty());
        let mut other = made;
        other.rules.as_mut().unwrap()[1].resources = Some(vec!["pods".to_owned()]);
        assert!(allowed(&other).is_empty());
        // No rule without names: it would allow all of them.
        assert!(rules(&[named(Kind::ConfigMap, "a")].into()).iter().all(|rule| rule.resource_names.is_some()));
    }

    #[test]
    fn a_binding_is_right_for_its_node_alone() {
        let made = binding("team-a", "node-1");
        assert!(is_right(&made, "node-1"));
        assert!(!is_right(&made, "node-2"));
        let mut shared = made;
        shared.subjects.as_mut().unwrap().push(Subject {
            kind: "User".into(),
            name: "eve".into(),
            ..Subject::default()
        });
        assert!(!is_right(&shared, "node-1"));
    }
}
