//! containerd's event stream: triggers, no news.

use std::time::Duration;

use containerd_client::events::{TaskExit, TaskOom, TaskPaused, TaskResumed, TaskStart};
use containerd_client::services::v1::SubscribeRequest;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::api::ids::{BotUid, ContainerId};
use crate::containerd::Containerd;

use super::run;

/// What containerd's event stream says.
pub(super) enum Heard {
    /// Something happened to a bot's task.
    Task(BotUid),
    /// containerd was away, and anything may have happened.
    Back,
}

/// Turns containerd's task events into triggers.
pub(super) async fn follow_events(containerd: Containerd, wake: mpsc::Sender<Heard>, stop: CancellationToken) {
    let mut broken = false;
    let filter = format!("namespace=={},topic~=\"/tasks/\"", containerd.namespace());
    loop {
        let mut request = tonic::Request::new(SubscribeRequest { filters: vec![filter.clone()] });
        // No deadline: the stream lives as long as containerd.
        *request.metadata_mut() = containerd.request(()).metadata().clone();
        request.metadata_mut().remove("grpc-timeout");
        let mut events = containerd.events();
        // What is missed while the stream is down is made good by a look at all. Asked beside it: containerd answers a
        // subscription with its first event, however long nothing happens.
        let back = async {
            if broken && containerd.version().version(containerd.request(())).await.is_ok() {
                // Nobody listens any more only where the agent ends.
                let _ = wake.send(Heard::Back).await;
                broken = false;
            }
        };
        let subscribed = tokio::select! {
            (subscribed, ()) = async { tokio::join!(events.subscribe(request), back) } => subscribed,
            () = stop.cancelled() => return,
        };
        match subscribed {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    let message = tokio::select! {
                        message = stream.message() => message,
                        () = stop.cancelled() => return,
                    };
                    match message {
                        Ok(Some(envelope)) => {
                            let uid = envelope
                                .event
                                .as_ref()
                                .and_then(|event| container_of(&envelope.topic, &event.value))
                                .and_then(|id| ContainerId::uid_of(&id));
                            if let Some(uid) = uid
                                && wake.send(Heard::Task(uid)).await.is_err()
                            {
                                return;
                            }
                        }
                        Ok(None) => break,
                        Err(error) => {
                            tracing::warn!(error = %error.message(), "containerd's event stream broke; it is made anew");
                            break;
                        }
                    }
                }
            }
            Err(error) => tracing::debug!(error = %error.message(), "no event stream of containerd"),
        }
        broken = true;
        tokio::select! {
            () = tokio::time::sleep(run::jittered(Duration::from_secs(1))) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn container_of(topic: &str, event: &[u8]) -> Option<String> {
    match topic {
        "/tasks/exit" => TaskExit::decode(event).ok().map(|event| event.container_id),
        "/tasks/oom" => TaskOom::decode(event).ok().map(|event| event.container_id),
        "/tasks/paused" => TaskPaused::decode(event).ok().map(|event| event.container_id),
        "/tasks/resumed" => TaskResumed::decode(event).ok().map(|event| event.container_id),
        "/tasks/start" => TaskStart::decode(event).ok().map(|event| event.container_id),
        _ => None,
    }
}
