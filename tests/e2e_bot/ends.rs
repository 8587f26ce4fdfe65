//! The process ends by itself: restart policy, back-off, and what is said of the end.

use std::time::Duration;

use berth::api::BotContainer;
use berth::api::bot_container::{Phase, RestartPolicy, Termination};
use berth::api::condition::ConditionType;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::{SOON, bot, summary, wait_for};
use crate::stage::{Stage, WAIT, life, message, moment, pid, read_in, says, status};

/// The last end; there must be one.
#[track_caller]
fn last(bot: &BotContainer) -> &Termination {
    status(bot).last_termination.as_ref().unwrap_or_else(|| panic!("no lastTermination: {}", summary(bot)))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_policy_does_its_part_for_each_end() {
    let stage = Stage::set("policy").await;
    let cases = [
        (RestartPolicy::Always, 0, Phase::BackOff, "CrashLoopBackOff"),
        (RestartPolicy::Always, 3, Phase::BackOff, "CrashLoopBackOff"),
        (RestartPolicy::OnFailure, 0, Phase::Succeeded, "Completed"),
        (RestartPolicy::OnFailure, 3, Phase::BackOff, "CrashLoopBackOff"),
        (RestartPolicy::Never, 0, Phase::Succeeded, "Completed"),
        (RestartPolicy::Never, 3, Phase::Failed, "Error"),
    ];
    let name = |policy: RestartPolicy, code| format!("{policy:?}-{code}").to_lowercase();
    for (policy, code, ..) in cases {
        let script = format!("echo n >>/data/runs; echo last words $(wc -l </data/runs); exit {code}");
        stage.apply(bot(&name(policy, code)).sh(&script).restart(policy)).await;
    }
    for (policy, code, phase, reason) in cases {
        let bot = stage.says(&name(policy, code), phase, reason).await;
        let end = last(&bot);
        assert_eq!((end.exit_code, end.signal), (code, None), "{end:?}");
        assert_eq!(end.reason, if code == 0 { "Completed" } else { "Error" }, "{end:?}");
        assert!(end.started_at.is_some() && end.finished_at >= end.started_at, "{end:?}");
        // The first restart is at once, as kubelet's.
        let restarts = if phase == Phase::BackOff { 1 } else { 0 };
        let said = end.message.as_deref().unwrap_or_else(|| panic!("no last words: {end:?}"));
        assert!(said.trim_end().ends_with(&format!("last words {}", restarts + 1)), "{policy:?} {code}: {said:?}");
        assert_eq!(status(&bot).restart_count, Some(restarts), "{}", summary(&bot));
        assert_eq!(status(&bot).task, None);
        let stalled = says(&bot, ConditionType::Stalled).is_some_and(|(status, _)| status == "True");
        assert_eq!(stalled, phase == Phase::Failed, "{}", summary(&bot));
        assert_eq!(says(&bot, ConditionType::Running).unwrap().0, "False");
    }
    // Whoever will not run again holds no address.
    let left = stage.agent.leaks();
    assert_eq!((left.count("tasks"), left.count("addresses")), (0, 3), "{left:?}");
    // The failed one tells people.
    let told = stage.told_once("never-3", "Error").await;
    assert!(told.contains("exit code 3"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_back_off_is_kept_doubles_and_ends_with_an_edit() {
    let stage = Stage::set("backoff").await;
    stage.apply(bot("web").sh("exit 7")).await;
    let waits = stage.says("web", Phase::BackOff, "CrashLoopBackOff").await;
    assert_eq!(status(&waits).restart_count, Some(1));
    assert!(message(&waits, ConditionType::Ready).contains("10 s"), "{}", summary(&waits));
    let ended = last(&waits).finished_at.clone().unwrap();
    let second = stage
        .ns
        .until("web", "the second restart's end", SOON, |bot| {
            status(bot).restart_count == Some(2) && status(bot).phase == Some(Phase::BackOff)
        })
        .await;
    let began = last(&second).started_at.clone().unwrap();
    let waited = began.0.duration_since(ended.0);
    // API times have whole seconds, so a second may be missing from the difference.
    assert!((9..=20).contains(&waited.as_secs()), "10 s of back-off took {waited}");
    assert!(message(&second, ConditionType::Ready).contains("20 s"), "{}", summary(&second));

    // An edit is tried at once: whoever mends the bot does not wait.
    stage.apply(bot("web").sh("sleep 1000000")).await;
    let start = std::time::Instant::now();
    let mended = stage.ns.phase("web", Phase::Running, SOON).await;
    assert!(start.elapsed() < Duration::from_secs(15), "the edit waited for the back-off: {:?}", start.elapsed());
    assert_eq!(status(&mended).restart_count, Some(2), "an edit is no restart: {}", summary(&mended));
    assert_eq!(last(&mended).exit_code, 7, "how it last ended stays to be read");

    // So is stopping and pausing a bot that waits.
    stage.apply(bot("web").sh("exit 7")).await;
    stage.says("web", Phase::BackOff, "CrashLoopBackOff").await;
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(says(&stopped, ConditionType::Ready).unwrap().0, "True");
    stage.edit("web", json!({"operatingMode": "Running"})).await;
    stage.says("web", Phase::BackOff, "CrashLoopBackOff").await;
    let paused = stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    assert_eq!(says(&paused, ConditionType::Ready).unwrap().0, "True", "{}", summary(&paused));
    // And deleting it.
    stage.ns.delete("web", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_from_outside_is_told_and_the_bot_restarted_on_its_files() {
    let stage = Stage::set("signal").await;
    let script = format!("echo x >>/data/runs; wc -l </data/runs >/data/count; {WAIT}");
    let first = stage.runs(bot("web").sh(&script)).await;
    assert_eq!(read_in(&first, "/data/count").await.trim(), "1");
    kill_process(Pid::from_raw(i32::try_from(pid(&first)).unwrap()).unwrap(), Signal::KILL).unwrap();
    let again = stage
        .ns
        .until("web", "restarted", SOON, |bot| {
            status(bot).restart_count == Some(1) && status(bot).phase == Some(Phase::Running)
        })
        .await;
    let end = last(&again);
    assert_eq!((end.exit_code, end.signal, end.reason.as_str()), (137, Some(9), "Error"), "{end:?}");
    assert_ne!(life(pid(&again)), life_of(&first));
    wait_for("the second run's word, on the first one's files", SOON, || async {
        match read_in(&again, "/data/count").await.trim() {
            "2" => Ok(()),
            // The process may only just have begun.
            other => Err(other.to_owned()),
        }
    })
    .await;
    assert_eq!(status(&again).network, status(&first).network, "the address stays");
    let happened: Vec<&str> = status(&again).transitions.iter().map(|t| t.type_.as_str()).collect();
    assert_eq!(happened, ["scheduled", "pulled", "created", "started", "exited", "started"]);

    // Never restarted, a signal is a failure.
    let never = stage.runs(bot("never").sh(WAIT).restart(RestartPolicy::Never)).await;
    kill_process(Pid::from_raw(i32::try_from(pid(&never)).unwrap()).unwrap(), Signal::KILL).unwrap();
    let failed = stage.says("never", Phase::Failed, "Error").await;
    assert_eq!((last(&failed).exit_code, last(&failed).signal), (137, Some(9)));
}

/// The dead process's id and no time: only to differ from a living one.
fn life_of(bot: &BotContainer) -> (u32, String) {
    (pid(bot), String::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_memory_is_told_as_such() {
    let stage = Stage::set("oom").await;
    // tail keeps the last line, and /dev/zero has but one.
    let hungry = |name: &str| bot(name).sh("exec tail /dev/zero").limit("memory", "16Mi");
    stage.apply(hungry("never").restart(RestartPolicy::Never)).await;
    stage.apply(hungry("always")).await;
    let failed = stage.says("never", Phase::Failed, "OOMKilled").await;
    let end = last(&failed);
    assert_eq!((end.exit_code, end.signal, end.reason.as_str()), (137, Some(9), "OOMKilled"), "{end:?}");
    assert!(status(&failed).transitions.iter().any(|t| t.type_ == "oom_killed"), "{:?}", status(&failed).transitions);
    stage.told_once("never", "OOMKilled").await;
    let waits = stage.says("always", Phase::BackOff, "CrashLoopBackOff").await;
    assert_eq!(last(&waits).reason, "OOMKilled");
    // A child that is killed while process 1 lives and ends well is no OOMKilled end.
    let script = "tail /dev/zero; exit 0";
    stage.apply(bot("survivor").sh(script).limit("memory", "16Mi").restart(RestartPolicy::Never)).await;
    let done = stage.says("survivor", Phase::Succeeded, "Completed").await;
    assert_eq!((last(&done).exit_code, last(&done).reason.as_str()), (0, "Completed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_started_says_why_and_is_mended_by_an_edit() {
    let stage = Stage::set("nostart").await;
    stage.apply(bot("never").command(["/no/such/program"]).restart(RestartPolicy::Never)).await;
    stage.apply(bot("always").command(["/no/such/program"])).await;
    let failed = stage.says("never", Phase::Failed, "StartError").await;
    let end = last(&failed);
    assert_eq!((end.exit_code, end.signal, end.reason.as_str()), (128, None, "StartError"), "{end:?}");
    assert!(end.message.as_deref().unwrap_or_default().contains("/no/such/program"), "{end:?}");
    let waits = stage.says("always", Phase::BackOff, "CrashLoopBackOff").await;
    assert_eq!(last(&waits).reason, "StartError");
    assert_eq!(stage.agent.leaks().count("tasks"), 0);
    assert_eq!(stage.agent.leaks().count("shims"), 0);
    for name in ["never", "always"] {
        stage.runs(bot(name)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_final_until_it_is_asked_again() {
    let stage = Stage::set("again").await;
    // Its last words tell how often it ran. Its times do not: two runs may end in the second that an API time is told in.
    let job = bot("job").sh("echo x >>/data/runs; echo run $(wc -l </data/runs)").restart(RestartPolicy::OnFailure);
    stage.ready(job).await;
    let runs = |bot: &BotContainer| -> u32 {
        let said = last(bot).message.as_deref().unwrap_or_else(|| panic!("no last words: {}", summary(bot)));
        said.trim_end().rsplit(' ').next().unwrap().parse().unwrap_or_else(|e| panic!("{said:?}: {e}"))
    };
    let done = stage.says("job", Phase::Succeeded, "Completed").await;
    assert_eq!(runs(&done), 1);
    // What costs nothing starts nothing.
    stage.edited("job", json!({"terminationGracePeriodSeconds": 3}), Phase::Succeeded).await;
    moment(Duration::from_millis(500)).await;
    let still = stage.says("job", Phase::Succeeded, "Completed").await;
    assert_eq!(last(&still), last(&done));
    // A new restartedAt runs it again, once.
    let again = stage.edited("job", json!({"restartedAt": "2026-11-24T10:00:00Z"}), Phase::Succeeded).await;
    assert_eq!((runs(&again), status(&again).restart_count), (2, Some(0)), "{}", summary(&again));
    // Stopped and run again is asked again, too.
    stage.edited("job", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    let third = stage.edited("job", json!({"operatingMode": "Running"}), Phase::Succeeded).await;
    assert_eq!((runs(&third), status(&third).restart_count), (3, Some(0)), "{}", summary(&third));
    let exits = status(&third).transitions.iter().filter(|t| t.type_ == "exited").count();
    assert_eq!(exits, 3, "each end is told, however quick: {:?}", status(&third).transitions);
}

#[tokio::test(flavor = "multi_thread")]
async fn last_words_are_bounded_and_whole() {
    let stage = Stage::set("words").await;
    // Characters of two bytes, and far more than is kept; the end is what counts. The streams are two pipes, so nobody
    // can tell how their lines lay among each other.
    let script = "i=0; while [ $i -lt 2000 ]; do echo ééééé $i; echo ööööö $i >&2; i=$((i+1)); done; \
        echo the end; echo the end >&2; exit 5";
    stage.apply(bot("talker").sh(script).restart(RestartPolicy::Never)).await;
    let failed = stage.says("talker", Phase::Failed, "Error").await;
    let said = last(&failed).message.clone().unwrap();
    assert!(said.len() <= 2048, "{} bytes", said.len());
    assert!(said.trim_end().ends_with("the end"), "{said}");
    assert!(["ééééé 1999\n", "ööööö 1999\n"].iter().any(|line| said.contains(line)), "{said}");
    // What is said on the other stream counts as well.
    stage.apply(bot("grumbler").sh("echo the reason >&2; exit 5").restart(RestartPolicy::Never)).await;
    let failed = stage.says("grumbler", Phase::Failed, "Error").await;
    assert_eq!(last(&failed).message.as_deref().map(str::trim_end), Some("the reason"));
    // Nothing said: no message.
    stage.apply(bot("silent").sh("exit 5").restart(RestartPolicy::Never)).await;
    let failed = stage.says("silent", Phase::Failed, "Error").await;
    assert_eq!(last(&failed).message, None);
}
