//! One replica leads: a Lease, taken and renewed with its resourceVersion as the precondition.
//!
//! ```text
//! free, given back, or not renewed for its duration before our eyes  ->  take      (create, or replace)
//! ours                                                               ->  renew     every retry period
//! not renewed for the renew deadline, on our monotonic clock         ->  stop writing; the Lease still runs then
//! ```
//!
//! The same protocol as client-go's leaderelection, so clocks of two machines are never compared. Since a process can be
//! stopped between its check and its write (SIGSTOP, a slow disk), every write of the controller carries a precondition
//! of its own too: an old leader's late write finds a newer object and is refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::{CONTROLLER, resource_version};

/// How long things take in an election. `retry` < `renew_deadline` < `lease`.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// For how long others leave a Lease alone that is not renewed.
    pub lease: Duration,
    /// A leader that could not renew for so long stops.
    pub renew_deadline: Duration,
    /// Between two tries.
    pub retry: Duration,
}

/// Times that do not fit together.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "leader election needs retry period < renew deadline < lease duration, all at least a second; got {:?}, {:?}, {:?}",
    .0.retry, .0.renew_deadline, .0.lease
)]
pub struct BadTimes(Times);

impl Times {
    /// Checks that the times fit together.
    pub fn check(self) -> Result<Self, BadTimes> {
        let ordered = self.retry < self.renew_deadline && self.renew_deadline < self.lease;
        if ordered && self.lease >= Duration::from_secs(1) && self.retry >= Duration::from_millis(100) {
            Ok(self)
        } else {
            Err(BadTimes(self))
        }
    }
}

/// Whether this replica leads, and until when at most. Asked before each write.
#[derive(Clone, Debug)]
pub struct Leadership {
    /// When the renewal that last succeeded was sent.
    renewed: Arc<watch::Sender<Option<Instant>>>,
    times: Times,
}

impl Leadership {
    /// Not leading yet.
    pub fn new(times: Times) -> Self {
        Self { renewed: Arc::new(watch::Sender::new(None)), times }
    }

    fn set(&self, renewed: Option<Instant>) {
        self.renewed.send_replace(renewed);
    }

    /// Waits for a renewal that was sent after `then`: whoever sees it knows that nobody else led at `then`, or before it since this
    /// replica does. For ever, where this replica leads no more. Cancel-safe.
    pub async fn confirmed_after(&self, then: Instant) {
        let mut renewals = self.renewed.subscribe();
        if renewals.wait_for(|renewed| renewed.is_some_and(|sent| sent > then)).await.is_err() {
            // Can't be: the sender is ours.
            std::future::pending::<()>().await;
        }
    }

    /// When a write that begins now must be over, since another may lead from then on; `None`: write nothing.
    pub fn write_until(&self, now: Instant) -> Option<Instant> {
        let renewed = (*self.renewed.borrow())?;
        (now < renewed + self.times.renew_deadline).then(|| renewed + self.times.lease)
    }
}

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is none.
    Create,
    /// It is free, or its holder did not renew it in time.
    Take,
    /// It is ours.
    Renew,
    /// Another holds it, at least until then.
    Wait(Instant),
}

/// What to do about a Lease that has been as it is since `seen`. Pure.
pub fn judge(me: &str, lease: Option<&LeaseSpec>, seen: Instant, now: Instant) -> Step {
    let Some(lease) = lease else { return Step::Create };
    match lease.holder_identity.as_deref() {
        None | Some("") => Step::Take,
        Some(holder) if holder == me => Step::Renew,
        Some(_) => {
            let seconds = lease.lease_duration_seconds.unwrap_or(15).clamp(1, 3600);
            let until = seen + Duration::from_secs(u64::try_from(seconds).unwrap_or(15));
            if now >= until { Step::Take } else { Step::Wait(until) }
        }
    }
}

/// Takes, renews and gives back the Lease.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    me: String,
    times: Times,
    leadership: Leadership,
    /// The Lease as last seen, and since when it is so.
    seen: Option<(Lease, Instant)>,
    /// Cancelled when the Lease is older than it was.
    went_back: CancellationToken,
}

impl Elector {
    /// `me` must be another in each process, also in two that follow each other.
    pub fn new(api: Api<Lease>, name: String, me: String, leadership: Leadership) -> Self {
        Self { api, name, me, times: leadership.times, leadership, seen: None, went_back: CancellationToken::new() }
    }

    /// Cancelled when the cluster went back: its etcd was restored from a backup. All that was seen is of a future that is no more,
    /// and a watch that goes on where it was leaves out all that is written from then on until its number is reached again.
    pub fn went_back(&self) -> CancellationToken {
        self.went_back.clone()
    }

    /// Tries until this replica leads. Cancel-safe: a Lease taken by a write that nobody waited for is ours to renew.
    pub async fn acquire(&mut self) {
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        lease = self.name,
                        error = &error as &dyn std::error::Error,
                        "can't take the leader Lease"
                    );
                }
            }
            tokio::time::sleep(self.times.retry).await;
        }
    }

    /// Renews until that fails for the renew deadline or another took the Lease. Cancel-safe, as `acquire`.
    pub async fn hold(&mut self) {
        loop {
            tokio::time::sleep(self.times.retry).await;
            let Some(_) = self.leadership.write_until(Instant::now()) else {
                tracing::error!(lease = self.name, "the leader Lease could not be renewed in time");
                break;
            };
            match self.attempt().await {
                Ok(true) => {}
                Ok(false) => {
                    tracing::error!(lease = self.name, "another replica took the leader Lease");
                    break;
                }
                Err(error) => {
                    tracing::warn!(
                        lease = self.name,
                        error = &error as &dyn std::error::Error,
                        "can't renew the leader Lease"
                    );
                }
            }
        }
        self.leadership.set(None);
    }

    /// Gives the Lease back, so that the next leader need not wait for it to run out.
    pub async fn release(&mut self) {
        self.leadership.set(None);
        let Some((mut lease, _)) = self.seen.take() else { return };
        let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_deref() == Some(&self.me)) else { return };
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        if let Ok(Err(error)) =
            tokio::time::timeout(self.times.retry, self.api.replace(&self.name, &params(), &lease)).await
        {
            tracing::debug!(error = &error as &dyn std::error::Error, "the leader Lease was not given back");
        }
    }

    /// One try; whether this replica leads after it.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let deadline = self.times.renew_deadline / 2;
        match tokio::time::timeout(deadline, self.step()).await {
            Ok(done) => done,
            // No answer is no news: the Lease is as we last saw it, and its time runs.
            Err(_) => Err(kube::Error::Service(format!("no answer within {deadline:?}").into())),
        }
    }

    async fn step(&mut self) -> Result<bool, kube::Error> {
        // What is ours is renewed without a look: the resourceVersion tells when it is not ours any more.
        let ours = self
            .seen
            .as_ref()
            .is_some_and(|(l, _)| judge(&self.me, l.spec.as_ref(), Instant::now(), Instant::now()) == Step::Renew);
        if !ours {
            self.look().await?;
        }
        let sent = Instant::now();
        let (lease, seen) = match &self.seen {
            Some((lease, seen)) => (Some(lease), *seen),
            None => (None, sent),
        };
        let spec = lease.map(|l| l.spec.clone().unwrap_or_default());
        let step = judge(&self.me, spec.as_ref(), seen, sent);
        let now = MicroTime(Timestamp::now());
        let mut next = spec.unwrap_or_default();
        if step != Step::Renew {
            next.acquire_time = Some(now.clone());
            next.lease_transitions = Some(next.lease_transitions.map_or(0, |n| n.saturating_add(1)));
        }
        next.holder_identity = Some(self.me.clone());
        next.lease_duration_seconds = Some(i32::try_from(self.times.lease.as_secs().max(1)).unwrap_or(i32::MAX));
        next.renew_time = Some(now);
        let written = match (step, lease) {
            (Step::Wait(_), _) => return Ok(false),
            (_, None) => {
                let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
                self.api.create(&params(), &Lease { metadata, spec: Some(next) }).await
            }
            (_, Some(lease)) => {
                let lease = Lease { metadata: lease.metadata.clone(), spec: Some(next) };
                self.api.replace(&self.name, &params(), &lease).await
            }
        };
        match written {
            Ok(lease) => {
                self.seen = Some((lease, sent));
                self.leadership.set(Some(sent));
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {
                // Ours written before, its answer lost, or another's: the live one tells.
                self.look().await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn look(&mut self) -> Result<(), kube::Error> {
        let live = self.api.get_opt(&self.name).await?;
        let now = Instant::now();
        if is_older(live.as_ref(), self.seen.as_ref().map(|(lease, _)| lease)) {
            tracing::warn!(
                lease = self.name,
                "the leader Lease is older than it was: the cluster was restored from a backup"
            );
            self.went_back.cancel();
        }
        self.seen = live.map(|lease| match self.seen.take() {
            Some((before, since)) if before.spec == lease.spec => (lease, since),
            _ => (lease, now),
        });
        Ok(())
    }
}

/// Whether a Lease is older than it was seen before, or is not there any more. Pure.
fn is_older(live: Option<&Lease>, seen: Option<&Lease>) -> bool {
    let version = |lease: &Lease| resource_version(&lease.metadata);
    match (live, seen) {
        (Some(live), Some(seen)) => version(live) < version(seen),
        (None, Some(_)) => true,
        (_, None) => false,
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        lease: Duration::from_secs(15),
        renew_deadline: Duration::from_secs(10),
        retry: Duration::from_secs(2),
    };

    fn lease(holder: Option<&str>) -> LeaseSpec {
        LeaseSpec {
            holder_identity: holder.map(str::to_owned),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_free_or_run_out_before_our_eyes() {
        let seen = Instant::now();
        let at = |seconds| seen + Duration::from_secs(seconds);
        for (held, now, wanted) in [
            (None, at(0), Step::Create),
            (Some(lease(None)), at(0), Step::Take),
            (Some(lease(Some(""))), at(0), Step::Take),
            (Some(lease(Some("me"))), at(100), Step::Renew),
            (Some(lease(Some("other"))), at(14), Step::Wait(at(15))),
            (Some(lease(Some("other"))), at(15), Step::Take),
        ] {
            assert_eq!(judge("me", held.as_ref(), seen, now), wanted, "{held:?}");
        }
    }

    #[test]
    fn writing_stops_before_another_can_lead() {
        let leadership = Leadership::new(TIMES);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(leadership.write_until(start), None);
        leadership.set(Some(start));
        assert_eq!(leadership.write_until(at(9)), Some(at(15)), "a write that begins late is over before the Lease");
        assert_eq!(leadership.write_until(at(10)), None);
        leadership.set(None);
        assert_eq!(leadership.write_until(start), None);
    }

    #[test]
    fn a_lease_that_is_older_than_it_was_is_a_restored_one() {
        let at = |version: &str| {
            let mut lease = Lease::default();
            lease.metadata.resource_version = Some(version.into());
            lease
        };
        for (live, seen, wanted) in [
            (None, None, false),
            (Some(at("9")), None, false),
            (Some(at("9")), Some(at("9")), false),
            (Some(at("10")), Some(at("9")), false),
            (Some(at("9")), Some(at("10")), true),
            (None, Some(at("9")), true),
        ] {
            assert_eq!(is_older(live.as_ref(), seen.as_ref()), wanted, "{live:?} after {seen:?}");
        }
    }

    #[test]
    fn times_that_do_not_fit_are_refused() {
        assert!(TIMES.check().is_ok());
        assert!(Times { lease: Duration::from_secs(10), ..TIMES }.check().is_err());
        assert!(Times { retry: Duration::from_secs(10), ..TIMES }.check().is_err());
        assert!(Times { retry: Duration::ZERO, ..TIMES }.check().is_err());
    }
}
