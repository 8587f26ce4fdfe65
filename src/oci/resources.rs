//! `spec.resources` as the cgroup's numbers, by kubelet's formulas.
//!
//! Pure. Every number is always given, "no limit" as -1, so that one function serves the start and the live update: a
//! limit that was taken out of the spec is taken off the running task too.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::node::NodeFacts;
use super::quantity::Amount;
use super::spec::SpecError;
use crate::api::bot_container::BotResources;

/// Length of a period that a CPU quota is for, microseconds.
const PERIOD: i64 = 100_000;
/// The kernel takes no smaller quota, microseconds.
const MIN_QUOTA: i64 = 1000;
/// The kernel's bounds of `cpu.shares`; 1024 stand for one processor.
const SHARES: std::ops::RangeInclusive<i64> = 2..=262_144;
/// With less memory runc itself does not get through the start, bytes.
const MIN_MEMORY: i64 = 6 << 20;
/// Most tasks that a 64-bit kernel can number.
const MAX_PIDS: i64 = 1 << 22;

/// The cgroup's limits of a bot, for the start and for `update task`. Devices are not in it.
///
/// | spec | cgroup |
/// | --- | --- |
/// | `requests.cpu`, else `limits.cpu` | shares: 1024 a processor, at least 2 |
/// | `limits.cpu` | quota in a period of 100 ms, at least 1 ms |
/// | `limits.memory` | memory, and memory with swap where the kernel counts swap: a bot does not swap |
/// | `limits.pids`, else the node's default | pids |
pub fn linux_resources(resources: Option<&BotResources>, node: &NodeFacts) -> Result<LinuxResources, SpecError> {
    let none = BotResources::default();
    let resources = resources.unwrap_or(&none);
    for (list, allowed, map) in [
        ("requests", &["cpu", "memory"][..], &resources.requests),
        ("limits", &["cpu", "memory", "pids"][..], &resources.limits),
    ] {
        if let Some((key, quantity)) = map.iter().find(|(key, _)| !allowed.contains(&key.as_str())) {
            let field = format!("spec.resources.{list}.{key}");
            let right = format!("use only {}", allowed.join(", "));
            return Err(SpecError::new(&field, &quantity.0, "is for a resource that bots don't have", &right));
        }
    }

    let cpu_limit = positive("limits", "cpu", resources, Amount::millis)?;
    let cpu_request = positive("requests", "cpu", resources, Amount::millis)?.or(cpu_limit).unwrap_or(0);
    let memory_limit = positive("limits", "memory", resources, Amount::units)?;
    let memory_request = positive("requests", "memory", resources, Amount::units)?;
    let pids_limit = positive("limits", "pids", resources, Amount::units)?;
    above_limit("cpu", resources, cpu_request, cpu_limit)?;
    above_limit("memory", resources, memory_request.unwrap_or(0), memory_limit)?;
    if memory_limit.is_some_and(|limit| limit < MIN_MEMORY) {
        return Err(refused(
            "limits",
            "memory",
            resources,
            "is less than starting a process takes",
            "use at least 6Mi",
        ));
    }
    if pids_limit.is_some_and(|limit| limit > MAX_PIDS) {
        return Err(refused("limits", "pids", resources, "is more than the kernel can number", "use at most 4194304"));
    }

    let mut cpu = LinuxCpu::default();
    cpu.set_shares(Some(shares(cpu_request)))
        .set_quota(Some(cpu_limit.map_or(-1, quota)))
        .set_period(Some(PERIOD.unsigned_abs()));
    let limit = memory_limit.unwrap_or(-1);
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(limit)).set_swap(node.swap_limit.then_some(limit));
    let mut pids = LinuxPids::default();
    pids.set_limit(pids_limit.or(node.default_pids_limit).unwrap_or(-1));

    let mut all = LinuxResources::default();
    all.set_devices(None).set_cpu(Some(cpu)).set_memory(Some(memory)).set_pids(Some(pids));
    Ok(all)
}

/// How likely the kernel ends the bot when the machine is out of memory: 1000 without any request or limit, else less the
/// more of the machine's memory the bot reserves, from 999 down to 3. kubelet's negative value for Guaranteed is left out:
/// it takes CAP_SYS_RESOURCE, and bots go before what runs the node. Never below the agent's own.
pub fn oom_score_adj(resources: Option<&BotResources>, node: &NodeFacts) -> i32 {
    let reserved = resources.and_then(|r| r.requests.get("memory").or_else(|| r.limits.get("memory")));
    let asks = resources.is_some_and(|r| {
        ["cpu", "memory"].iter().any(|key| r.requests.contains_key(*key) || r.limits.contains_key(*key))
    });
    let computed = if asks {
        let bytes = reserved.and_then(Amount::parse).and_then(Amount::units).unwrap_or(0).max(0);
        let share = i128::from(bytes) * 1000 / i128::from(node.memory_bytes.max(1));
        i32::try_from(1000 - share.min(1000)).unwrap_or(0).clamp(3, 999)
    } else {
        1000
    };
    computed.max(node.oom_score_adj)
}

/// CPU shares of a request in thousandths of a processor.
fn shares(millis: i64) -> u64 {
    (i128::from(millis) * 1024 / 1000).clamp(i128::from(*SHARES.start()), i128::from(*SHARES.end())) as u64
}

/// Microseconds of a period for a limit in thousandths of a processor.
fn quota(millis: i64) -> i64 {
    millis.saturating_mul(PERIOD / 1000).max(MIN_QUOTA)
}

/// The number of a resource; `None` when it is not set or 0, which means "no limit" as it does in a Pod.
fn positive(
    list: &'static str,
    key: &'static str,
    resources: &BotResources,
    unit: fn(Amount) -> Option<i64>,
) -> Result<Option<i64>, SpecError> {
    let Some(quantity) = quantity(list, key, resources) else { return Ok(None) };
    let number = Amount::parse(quantity).and_then(unit).ok_or_else(|| {
        refused(list, key, resources, "is no quantity, or too large", "write for example 500m, 2, 512Mi or 1Gi")
    })?;
    if number < 0 {
        return Err(refused(list, key, resources, "is negative", "use a positive quantity, or leave it out"));
    }
    Ok((number > 0).then_some(number))
}

fn above_limit(key: &'static str, resources: &BotResources, request: i64, limit: Option<i64>) -> Result<(), SpecError> {
    match limit {
        Some(limit) if request > limit => {
            let limit = quantity("limits", key, resources).map_or("", |q| q.0.as_str());
            let right = format!("use at most {limit}, as spec.resources.limits.{key} has");
            Err(refused("requests", key, resources, "is above the limit", &right))
        }
        _ => Ok(()),
    }
}

fn quantity<'a>(list: &str, key: &str, resources: &'a BotResources) -> Option<&'a Quantity> {
    let map = if list == "limits" { &resources.limits } else { &resources.requests };
    map.get(key)
}

fn refused(list: &str, key: &str, resources: &BotResources, why: &str, right: &str) -> SpecError {
    let value = quantity(list, key, resources).map_or("", |q| q.0.as_str());
    SpecError::new(&format!("spec.resources.{list}.{key}"), value, why, right)
}

#[cfg(test)]
mod tests;
