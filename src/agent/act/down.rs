//! Steps on the way down.

use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::{DeleteContainerRequest, DeleteTaskRequest, KillRequest};
use jiff::Timestamp;

use crate::api::condition::Reason;
use crate::api::ids::ContainerId;
use crate::containerd::CallContext as _;

use super::super::desired::Goal;
use super::super::failpoint::{Effect, around};
use super::super::labels;
use super::super::observe::Task;
use super::super::record::{Ending, Life, Record};
use super::super::step::Parts;
use super::super::version::layers_of;
use super::{Actor, LAST_OUTPUT, StepError, Work, is_answer};

const KILL: u32 = 9;

impl Actor {
    pub(super) async fn stop(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let order = Record { stop_ordered: Some(Timestamp::now()), stop_sent: false, ..record.clone() };
        around(Effect::StopNote, self.note(id, &order)).await?;
        around(Effect::StopSignal, self.signal(id, record.stop_signal, false)).await?;
        if let Task::Paused { .. } = work.observed.task {
            around(Effect::StopResume, self.resume(id)).await?;
        }
        around(Effect::StopNoteSent, self.note(id, &Record { stop_sent: true, ..order })).await
    }

    pub(super) async fn kill(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        if let Some(record) = work.record() {
            let now = Timestamp::now();
            let order =
                Record { stop_ordered: record.stop_ordered.or(Some(now)), kill_ordered: Some(now), ..record.clone() };
            around(Effect::KillNote, self.note(id, &order)).await?;
        }
        around(Effect::KillSignal, self.signal(id, KILL, true)).await?;
        // On cgroup v1 a frozen process does not even die of KILL (runc #3134, #2105).
        if let Task::Paused { .. } = work.observed.task {
            match self.resume(id).await {
                Err(StepError::Runtime(error)) if is_answer(&error) => {}
                done => done?,
            }
        }
        Ok(())
    }

    async fn signal(&self, id: &ContainerId, signal: u32, all: bool) -> Result<(), StepError> {
        let request = KillRequest { container_id: id.to_string(), exec_id: String::new(), signal, all };
        match self.containerd.tasks().kill(self.containerd.request(request)).await.call("kill task", id.as_str()) {
            // It ended in between: the next look sees it.
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map_err(StepError::Runtime),
        }
    }

    pub(super) async fn reap(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let Some(record) = work.record().filter(|record| matches!(record.life, Life::Started { .. })) else {
            return around(Effect::ReapDelete, self.delete_task(id)).await;
        };
        let ending = match work.observed.task {
            Task::Stopped { code, at, oom } => Ending {
                code,
                reason: exit_reason(code, oom).as_str().to_owned(),
                message: String::new(),
                started_at: None,
                finished_at: at,
                asked: false,
            },
            // A shim that does not answer says nothing of its process. One that is dead can be deleted, and then the
            // attempt has no task, which is an end; one that only hangs refuses, and nothing was claimed.
            _ => return self.delete_task(id).await,
        };
        let ended = record.ended(ending);
        around(Effect::ReapNote, self.note(id, &ended)).await?;
        around(Effect::ReapDelete, self.delete_task(id)).await?;
        around(Effect::ReapNoteOutput, self.note_last_output(work, record, ended)).await
    }

    pub(super) async fn put_away(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        // A shim that has no task yet, because containerd died in the middle, is put away for knowing none. Whatever the
        // answer: the next look tells.
        let delete = DeleteTaskRequest { container_id: id.to_string() };
        let _ = around(Effect::PutAwayDelete, self.containerd.tasks().delete(self.containerd.request(delete))).await;
        let ours = work.bot.is_some() || work.record().is_some() || work.observed.layer.is_some();
        let rest = async { if work.overdue { self.shims.put_away(id, ours).await } else { self.shims.tidy(id).await } };
        around(Effect::PutAwayRest, rest).await.map_err(StepError::Leftover)
    }

    pub(super) async fn record_lost(&self, work: &Work<'_>) -> Result<(), StepError> {
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let ended = record.ended(lost());
        around(Effect::LostNote, self.note(work.id(), &ended)).await?;
        self.note_last_output(work, record, ended).await
    }

    /// Adds the last output to a noted end. Only after the task is deleted has its shim passed on all of it; cut off
    /// before, the end is noted without its last words.
    async fn note_last_output(&self, work: &Work<'_>, began: &Record, mut ended: Record) -> Result<(), StepError> {
        let Some(last) = ended.last.as_mut().filter(|last| !last.asked) else {
            // An unfinished last line is the end of this process's words, not the beginning of the next one's.
            let (output, id) = (self.output.clone(), work.id().clone());
            let _ = tokio::task::spawn_blocking(move || output.flush(&id)).await;
            return Ok(());
        };
        let since = match began.life {
            Life::Started { at } => Some(at),
            Life::Fresh | Life::Ended => None,
        };
        let (output, logs) = (self.output.clone(), work.logs());
        let read = tokio::task::spawn_blocking(move || output.last_output_since(&logs, since, LAST_OUTPUT)).await;
        match read {
            Ok(Ok(text)) if !text.is_empty() => last.message = text,
            // What can't be read is missed by people, not by the plan.
            Ok(_) | Err(_) => return Ok(()),
        }
        self.note(work.id(), &ended).await
    }

    pub(super) async fn delete_task(&self, id: &ContainerId) -> Result<(), StepError> {
        let request = DeleteTaskRequest { container_id: id.to_string() };
        match self.containerd.tasks().delete(self.containerd.request(request)).await.call("delete task", id.as_str()) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(|_| ()).map_err(StepError::Runtime),
        }
    }

    pub(super) async fn remove(&self, parts: Parts, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let network = async {
            if !parts.network {
                return Ok(());
            }
            around(Effect::RemoveNetwork, self.network.remove(id)).await.map_err(StepError::Network)
        };
        let output = async {
            if !parts.output {
                return Ok(());
            }
            let keep_logs = !matches!(work.desired.goal, Goal::Gone { .. });
            around(Effect::RemoveOutput, self.output.remove(id, keep_logs)).await.map_err(StepError::Output)
        };
        let layer = async {
            let Some(layer) = work.observed.layer.as_ref().filter(|_| parts.layer) else { return Ok(()) };
            let snapshotter = work.record().map_or(&work.desired.snapshotter, |record| &record.snapshotter).clone();
            let request = RemoveSnapshotRequest { snapshotter, key: layer.key.clone() };
            let answer =
                around(Effect::RemoveLayer, self.containerd.snapshots().remove(self.containerd.request(request))).await;
            match answer.call("remove snapshot", &layer.key) {
                Err(error) if error.is_not_found() => Ok(()),
                done => done.map_err(StepError::Runtime),
            }
        };
        let (network, output, layer) = tokio::join!(network, output, layer);
        network.and(output).and(layer)
    }

    /// Removes what no observation shows: a shim without a task, logs of a bot that was stopped before, mounted files.
    /// Safe twice. The last thing before a bot is said to be removed: it looks through the machine's processes.
    pub async fn remove_rest(&self, id: &ContainerId) -> Result<(), StepError> {
        self.shims.end_idle(id).await.map_err(StepError::Leftover)?;
        self.remove_unseen(id).await
    }

    async fn remove_unseen(&self, id: &ContainerId) -> Result<(), StepError> {
        around(Effect::RemoveLogs, self.output.remove(id, false)).await.map_err(StepError::Output)?;
        around(Effect::RemoveFiles, self.bundle.remove_files(id)).await.map_err(StepError::Bundle)?;
        around(Effect::RemoveSpare, self.remove_spare(id)).await
    }

    /// Layers that were made beside, or replaced, and never settled.
    async fn remove_spare(&self, id: &ContainerId) -> Result<(), StepError> {
        let Some(uid) = ContainerId::uid_of(id.as_str()) else { return Ok(()) };
        for snapshotter in &self.snapshotters {
            let filter = format!("labels.\"{}\"=={uid}", labels::UID);
            let found = self.versions.list(snapshotter, filter).await.map_err(StepError::Runtime)?;
            for layer in layers_of(id, &found) {
                self.versions.remove(snapshotter, &layer.name).await.map_err(StepError::Runtime)?;
            }
        }
        Ok(())
    }

    pub(super) async fn remove_container(&self, id: &ContainerId) -> Result<(), StepError> {
        self.remove_unseen(id).await?;
        let request = DeleteContainerRequest { id: id.to_string() };
        let answer =
            around(Effect::RemoveContainer, self.containerd.containers().delete(self.containerd.request(request)))
                .await;
        match answer.call("delete container", id.as_str()) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map_err(StepError::Runtime),
        }
    }
}

fn lost() -> Ending {
    Ending {
        code: 137,
        reason: Reason::TaskLost.as_str().to_owned(),
        message: String::new(),
        started_at: None,
        finished_at: Timestamp::now(),
        asked: false,
    }
}

fn exit_reason(code: u32, oom: bool) -> Reason {
    match code {
        0 => Reason::Completed,
        _ if oom => Reason::OOMKilled,
        _ => Reason::Error,
    }
}
