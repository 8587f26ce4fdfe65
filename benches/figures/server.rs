//! The API server's own count of the requests that it served.

use std::collections::BTreeMap;

use kube::Client;

/// Requests that change something, by what they are. Taken twice, their difference is what happened in between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes(BTreeMap<Write, u64>);

/// One kind of request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Write {
    group: String,
    resource: String,
    subresource: String,
    verb: String,
}

impl Writes {
    /// As the server counts them now (`apiserver_request_total`, whatever the answer was).
    pub async fn read(client: &Client) -> anyhow::Result<Self> {
        let request = axum::http::Request::get("/metrics").body(Vec::new())?;
        Ok(Self::parse(&client.request_text(request).await?))
    }

    fn parse(text: &str) -> Self {
        let mut writes = BTreeMap::new();
        for line in text.lines() {
            let Some((labels, count)) =
                line.strip_prefix("apiserver_request_total{").and_then(|rest| rest.rsplit_once("} "))
            else {
                continue;
            };
            let labels: BTreeMap<&str, &str> = labels
                .split(',')
                .filter_map(|pair| pair.split_once('='))
                .map(|(k, v)| (k, v.trim_matches('"')))
                .collect();
            let label = |name| labels.get(name).copied().unwrap_or_default().to_owned();
            let write = Write {
                group: label("group"),
                resource: label("resource"),
                subresource: label("subresource"),
                verb: label("verb"),
            };
            // Prometheus prints whole numbers as decimals, large ones with an exponent.
            let Ok(count) = count.trim().parse::<f64>() else { continue };
            if ["POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"].contains(&write.verb.as_str()) {
                *writes.entry(write).or_default() += count as u64;
            }
        }
        Self(writes)
    }

    /// What came after `before`.
    pub fn since(&self, before: &Self) -> Self {
        let grown = self.0.iter().filter_map(|(write, count)| {
            let more = count - before.0.get(write).copied().unwrap_or_default().min(*count);
            (more > 0).then(|| (write.clone(), more))
        });
        Self(grown.collect())
    }

    /// Of objects of Berth's API, status included.
    pub fn objects(&self) -> Self {
        self.only(|write| write.group == "berth.dev")
    }

    /// Of Events.
    pub fn events(&self) -> Self {
        self.only(|write| write.resource == "events")
    }

    /// Of Leases.
    pub fn leases(&self) -> Self {
        self.only(|write| write.resource == "leases")
    }

    /// Of all but Leases.
    pub fn but_leases(&self) -> Self {
        self.only(|write| write.resource != "leases")
    }

    fn only(&self, which: impl Fn(&Write) -> bool) -> Self {
        Self(self.0.iter().filter(|(write, _)| which(write)).map(|(write, count)| (write.clone(), *count)).collect())
    }

    /// How many in all.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// What they are, each divided by `starts`.
    pub fn describe(&self, starts: usize) -> String {
        let each = self.0.iter().map(|(write, count)| {
            let slash = if write.subresource.is_empty() { "" } else { "/" };
            let times = *count as f64 / starts as f64;
            format!("{times:.1} {} {}{slash}{}", write.verb, write.resource, write.subresource)
        });
        each.collect::<Vec<_>>().join(", ")
    }
}
