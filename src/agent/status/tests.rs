//! The phase table of the API, row by row, and what must hold of every status.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;

use super::*;
use crate::agent::observe::Output;
use crate::agent::plan::plan;
use crate::agent::plan::tests::world::{Ask, Habits, Kept, Mode, World, connected, layer, nothing};
use crate::agent::plan::tests::{ask, observed, time};
use crate::agent::record::Ending;
use crate::agent::step::Parts;
use crate::api::bot_container::RestartPolicy;

fn noon() -> Timestamp {
    Timestamp::from_second(1_795_521_600).unwrap()
}

/// What one row says of a bot.
struct Row {
    name: &'static str,
    ask: Ask,
    observed: Observed,
    trouble: Option<Trouble>,
    /// Phase, Ready with reason, Running with reason, what is kept, and the condition of kstatus.
    says: &'static str,
}

fn words(status: &BotContainerStatus) -> String {
    let condition = |type_| match find(&status.conditions, type_) {
        Some(found) => format!("{}={} {}", found.type_, found.status, found.reason),
        None => "-".to_owned(),
    };
    let kstatus = [ConditionType::Reconciling, ConditionType::Stalled].map(condition);
    let kept = status.kept.map_or("-".to_owned(), |kept| format!("{kept:?}"));
    format!(
        "{:?} | {} | {} | {kept} | {}",
        status.phase.unwrap(),
        condition(ConditionType::Ready),
        condition(ConditionType::Running),
        match &kstatus {
            [a, b] if a == "-" && b == "-" => "-".to_owned(),
            [a, b] if b == "-" => a.clone(),
            [a, b] if a == "-" => b.clone(),
            both => panic!("both of kstatus' conditions: {both:?}"),
        },
    )
}

fn ask_for(mode: Mode) -> Ask {
    Ask { mode, ..Ask::default() }
}

/// The bot as it is once it runs.
fn running() -> Observed {
    let mut world = World::new(noon(), Habits::default());
    world.settle(&Ask::default().desired());
    world.observed
}

fn with_task(task: Task) -> Observed {
    Observed { task, ..running() }
}

fn edited(edit: impl FnOnce(&mut Record)) -> Observed {
    let mut observed = running();
    if let Container::Ours(record) = &mut observed.container {
        edit(record);
    }
    observed
}

/// Ended by itself, `failures` times in a row, just now.
fn ended(code: u32, reason: &str, failures: u32) -> Observed {
    let ending = Ending {
        code,
        reason: reason.into(),
        message: "last words".into(),
        started_at: None,
        finished_at: noon(),
        asked: false,
    };
    let mut observed = edited(|record| *record = Record { failures, ..record.clone() }.ended(ending));
    observed.task = Task::Absent;
    observed
}

fn trouble(step: Step, reason: Reason, retryable: bool) -> Option<Trouble> {
    Some(Trouble { step, reason, message: "its words".into(), retryable })
}

fn rows() -> Vec<Row> {
    let row = |name, ask, observed, says| Row { name, ask, observed, trouble: None, says };
    let never = Ask { policy: RestartPolicy::Never, ..Ask::default() };
    let making = Step::Prepare(Parts { layer: true, ..Parts::default() });
    let frozen = || Task::Paused { pid: 7 };
    let lost = || Observed { network: Attached::Absent, output: Output::Absent, ..ended(137, "TaskLost", 1) };
    let put_away = |observed| Observed { network: Attached::Absent, output: Output::Absent, ..observed };
    vec![
        row(
            "Starting: nothing there yet",
            ask_for(Mode::Running),
            nothing(),
            "Starting | Ready=False Starting | Running=False Stopped | - | Reconciling=True Starting",
        ),
        row(
            "Starting: made, not started",
            ask_for(Mode::Running),
            Observed { task: Task::Created, ..edited(|r| (r.life, r.attempt) = (Life::Fresh, 0)) },
            "Starting | Ready=False Starting | Running=False Starting | - | Reconciling=True Starting",
        ),
        row(
            "Running: the task runs as asked",
            ask_for(Mode::Running),
            running(),
            "Running | Ready=True AsAsked | Running=True Running | - | -",
        ),
        row(
            "Running: about to be frozen",
            ask_for(Mode::Paused),
            running(),
            "Running | Ready=False Pausing | Running=True Running | - | Reconciling=True Pausing",
        ),
        row(
            "Running: new limits",
            Ask { cpu: 1, ..Ask::default() },
            running(),
            "Running | Ready=False Starting | Running=True Running | - | Reconciling=True Starting",
        ),
        row(
            "Paused: frozen, memory kept",
            ask_for(Mode::Paused),
            with_task(frozen()),
            "Paused | Ready=True Paused | Running=False Paused | MemoryAndFiles | -",
        ),
        row(
            "Paused: created Paused",
            ask_for(Mode::Paused),
            Observed { task: Task::Absent, ..edited(|r| (r.life, r.attempt) = (Life::Fresh, 0)) },
            "Paused | Ready=True Paused | Running=False Stopped | Files | -",
        ),
        row(
            "Paused: after a reboot",
            ask_for(Mode::Paused),
            lost(),
            "Paused | Ready=True MemoryLost | Running=False TaskLost | Files | -",
        ),
        row(
            "Paused: a change waits for a restart",
            Ask { mode: Mode::Paused, env: 1, ..Ask::default() },
            with_task(frozen()),
            "Paused | Ready=False RestartPending | Running=False Paused | MemoryAndFiles | Reconciling=True RestartPending",
        ),
        row(
            "Paused: about to be thawed",
            ask_for(Mode::Running),
            with_task(frozen()),
            "Paused | Ready=False Resuming | Running=False Paused | MemoryAndFiles | Reconciling=True Resuming",
        ),
        row(
            "Stopping: TERM sent",
            ask_for(Mode::Stopped),
            edited(|r| (r.stop_ordered, r.stop_sent) = (Some(noon()), true)),
            "Stopping | Ready=False Stopping | Running=True Running | - | Reconciling=True Stopping",
        ),
        row(
            "Stopping: a change needs a restart",
            Ask { env: 1, ..Ask::default() },
            running(),
            "Stopping | Ready=False Stopping | Running=True Running | - | Reconciling=True Stopping",
        ),
        row(
            "Stopped: no task",
            ask_for(Mode::Stopped),
            put_away(Observed { task: Task::Absent, ..edited(|r| r.life = Life::Fresh) }),
            "Stopped | Ready=True Stopped | Running=False Stopped | Files | -",
        ),
        row(
            "BackOff: the process keeps ending",
            ask_for(Mode::Running),
            ended(1, "Error", 2),
            "BackOff | Ready=False CrashLoopBackOff | Running=False Error | - | Reconciling=True CrashLoopBackOff",
        ),
        Row {
            trouble: trouble(making, Reason::ImagePullBackOff, true),
            ..row(
                "BackOff: the pull fails",
                ask_for(Mode::Running),
                nothing(),
                "BackOff | Ready=False ImagePullBackOff | Running=False Stopped | - | Reconciling=True ImagePullBackOff",
            )
        },
        row(
            "Succeeded: exit 0, not to be restarted",
            never,
            put_away(ended(0, "Completed", 0)),
            "Succeeded | Ready=True Completed | Running=False Completed | - | -",
        ),
        row(
            "Failed: exit 1, not to be restarted",
            never,
            put_away(ended(1, "Error", 0)),
            "Failed | Ready=False Error | Running=False Error | - | Stalled=True Error",
        ),
        row(
            "Failed: out of memory, not to be restarted",
            never,
            put_away(ended(137, "OOMKilled", 0)),
            "Failed | Ready=False OOMKilled | Running=False OOMKilled | - | Stalled=True OOMKilled",
        ),
        Row {
            trouble: trouble(making, Reason::ImageWrongPlatform, false),
            ..row(
                "Failed: it can't be run here, and only an edit helps",
                ask_for(Mode::Running),
                nothing(),
                "Failed | Ready=False ImageWrongPlatform | Running=False Stopped | - | Stalled=True ImageWrongPlatform",
            )
        },
        row(
            "Failed: the spec is refused",
            ask_for(Mode::Refused),
            nothing(),
            "Failed | Ready=False InvalidImageName | Running=False Stopped | - | Stalled=True InvalidImageName",
        ),
        row(
            "Failed: a foreign container",
            ask_for(Mode::Running),
            Observed { container: Container::Foreign { why: "someone's".into() }, ..nothing() },
            "Failed | Ready=False ForeignContainer | Running=False ForeignContainer | - | Stalled=True ForeignContainer",
        ),
        row(
            "Failed: what runs in a foreign container is not the bot",
            ask_for(Mode::Running),
            Observed { container: Container::Foreign { why: "someone's".into() }, ..running() },
            "Failed | Ready=False ForeignContainer | Running=False ForeignContainer | - | Stalled=True ForeignContainer",
        ),
        row(
            "A note that somebody wrote over leaves what runs as it is",
            ask_for(Mode::Running),
            Observed { container: Container::Garbled { why: "no JSON".into() }, ..running() },
            "Running | Ready=False ForeignContainer | Running=True Running | - | Stalled=True ForeignContainer",
        ),
        row(
            "A refused spec leaves what runs as it is",
            ask_for(Mode::Refused),
            running(),
            "Running | Ready=False InvalidImageName | Running=True Running | - | Stalled=True InvalidImageName",
        ),
        row(
            "Running: another image is asked for, and is being pulled",
            Ask { image: 1, env: 1, ..Ask::default() },
            running(),
            "Running | Ready=False ChangingImage | Running=True Running | - | Reconciling=True ChangingImage",
        ),
        Row {
            trouble: trouble(Step::UpdateLimits, Reason::RuntimeFailed, true),
            ..row(
                "Trouble with a running bot",
                Ask { cpu: 1, ..Ask::default() },
                running(),
                "Running | Ready=False RuntimeFailed | Running=True Running | - | Reconciling=True RuntimeFailed",
            )
        },
        row(
            "containerd does not know",
            ask_for(Mode::Running),
            with_task(Task::Unknown),
            "Unknown | Ready=Unknown RuntimeFailed | Running=Unknown RuntimeFailed | - | -",
        ),
        row(
            "containerd lost it, and it may run",
            ask_for(Mode::Running),
            with_task(Task::Leftover),
            "Unknown | Ready=Unknown RuntimeFailed | Running=Unknown RuntimeFailed | - | -",
        ),
        row(
            "Terminating",
            ask_for(Mode::Gone),
            running(),
            "Terminating | Ready=False Terminating | Running=True Running | - | Reconciling=True Terminating",
        ),
        row(
            "Terminating: the files are to be kept, and the version has no number yet",
            Ask { keep: Kept::Awaited, ..ask_for(Mode::Retained) },
            put_away(Observed { task: Task::Absent, ..edited(|r| r.life = Life::Fresh) }),
            "Terminating | Ready=False WaitingForSnapshot | Running=False Stopped | Files | Reconciling=True WaitingForSnapshot",
        ),
        row(
            "Terminating: the files become a version",
            ask_for(Mode::Retained),
            put_away(Observed { task: Task::Absent, ..edited(|r| r.life = Life::Fresh) }),
            "Terminating | Ready=False Terminating | Running=False Stopped | - | Reconciling=True Terminating",
        ),
        row(
            "Running: a rollback is asked for, and its version is being copied",
            Ask { rollback: 1, ..Ask::default() },
            running(),
            "Running | Ready=False RollingBack | Running=True Running | - | Reconciling=True RollingBack",
        ),
        row(
            "Running: a rollback waits for the version that it makes of what it replaces",
            Ask { rollback: 1, keep: Kept::Awaited, ..Ask::default() },
            edited(|r| {
                r.aside = Some(crate::agent::record::Aside {
                    layer: "l2".into(),
                    for_: crate::agent::record::AsideFor::Rollback { id: "r1".into(), snapshot: "v1".into() },
                    complete: true,
                });
            }),
            "Running | Ready=False WaitingForSnapshot | Running=True Running | - | Reconciling=True WaitingForSnapshot",
        ),
        row(
            "Terminating: there are no files to be kept",
            ask_for(Mode::Retained),
            nothing(),
            "Terminating | Ready=False Removed | Running=False Removed | - | Reconciling=True Removed",
        ),
        row(
            "Terminating: nothing is left",
            ask_for(Mode::Gone),
            nothing(),
            "Terminating | Ready=False Removed | Running=False Removed | - | Reconciling=True Removed",
        ),
    ]
}

#[test]
fn the_phase_table_row_by_row() {
    let mut wrong = Vec::new();
    for row in rows() {
        let desired = row.ask.desired();
        let next = plan(&desired, &row.observed, noon());
        let status = report(Some(4), &desired, &row.observed, &next, row.trouble.as_ref(), None, noon());
        let told = words(&status);
        if told != row.says {
            wrong.push(format!("{}\n  wanted {}\n  told   {told}", row.name, row.says));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_bot_in_trouble_keeps_its_facts() {
    let desired = Ask { cpu: 1, ..Ask::default() }.desired();
    let trouble = trouble(Step::UpdateLimits, Reason::RuntimeFailed, true);
    let observed = running();
    let next = plan(&desired, &observed, noon());
    let well = report(Some(4), &desired, &observed, &next, None, None, noon());
    let ill = report(Some(4), &desired, &observed, &next, trouble.as_ref(), Some(&well), noon());
    assert!(well.task.is_some() && well.image.is_some() && well.network.is_some() && well.container_id.is_some());
    let facts = |s: &BotContainerStatus| BotContainerStatus { conditions: vec![], transitions: vec![], ..s.clone() };
    assert_eq!(facts(&ill), facts(&well));
}

#[test]
fn a_container_that_is_gone_takes_no_last_word_with_it() {
    let desired = Ask::default().desired();
    let observed = ended(7, "Error", 2);
    let look = |observed: &Observed, live| {
        report(Some(1), &desired, observed, &plan(&desired, observed, noon()), None, live, noon())
    };
    let before = look(&observed, None);
    let after = look(&Observed { container: Container::Absent, ..observed }, Some(&before));
    assert_eq!(after.last_termination.as_ref().unwrap().exit_code, 7);
    assert_eq!(after.restart_count, before.restart_count);
}

#[test]
fn an_end_and_a_start_within_one_second_are_both_told() {
    let desired = Ask::default().desired();
    let mut world = World::new(noon(), Habits::default());
    let mut live: Option<BotContainerStatus> = None;
    for _ in 0..3 {
        world.settle(&desired);
        let next = plan(&desired, &world.observed, world.now);
        let status = report(Some(1), &desired, &world.observed, &next, None, live.as_ref(), world.now);
        live = Some(status);
        world.exit(1, false);
        // As if the back-off had been forgotten: all of it within this second.
        if let Container::Ours(record) = &mut world.observed.container {
            record.failures = 0;
        }
    }
    let types: Vec<_> = live.unwrap().transitions.into_iter().map(|t| t.type_).collect();
    assert_eq!(types, ["pulled", "created", "started", "exited", "started", "exited", "started"]);
}

/// A job that was asked again and was done before anybody saw it run.
#[test]
fn an_end_in_the_second_of_the_one_before_is_told_by_its_words() {
    let desired = Ask { policy: RestartPolicy::OnFailure, ..Ask::default() }.desired();
    let said = |words: &str, live: Option<&BotContainerStatus>| {
        let mut observed = ended(0, "Completed", 1);
        if let Container::Ours(record) = &mut observed.container
            && let Some(last) = &mut record.last
        {
            last.message = words.to_owned();
        }
        report(Some(1), &desired, &observed, &plan(&desired, &observed, noon()), None, live, noon())
    };
    let exits = |status: &BotContainerStatus| status.transitions.iter().filter(|t| t.type_ == "exited").count();
    let first = said("run 1", None);
    let second = said("run 2", Some(&first));
    assert_eq!((exits(&first), exits(&second), exits(&said("run 2", Some(&second)))), (1, 2, 2));
}

#[test]
fn thawed_is_resumed_and_started_anew_is_not() {
    let paused = |observed: Observed, live: Option<&BotContainerStatus>, mode| {
        let desired = ask_for(mode).desired();
        report(Some(1), &desired, &observed, &plan(&desired, &observed, noon()), None, live, noon())
    };
    let frozen = paused(with_task(Task::Paused { pid: 1001 }), None, Mode::Paused);
    let types = |s: &BotContainerStatus| s.transitions.iter().map(|t| t.type_.clone()).collect::<Vec<_>>();
    let thawed = paused(running(), Some(&frozen), Mode::Running);
    assert_eq!(types(&thawed).last().unwrap(), "resumed");
    let anew = paused(with_task(Task::Running { pid: 4711 }), Some(&frozen), Mode::Running);
    assert_eq!(types(&anew).last().unwrap(), "started");
}

/// The object after the API server took `status`: our fields as JSON keeps them, the controller's beside them.
fn applied(status: &BotContainerStatus) -> BotContainerStatus {
    let json = serde_json::to_string(status).unwrap();
    let mut live: BotContainerStatus = serde_json::from_str(&json).unwrap();
    live.node_name = Some("node-1".into());
    live.bot_id = Some("web".into());
    let bound = condition(ConditionType::Scheduled, Some(true), Reason::Scheduled, "bound to node-1", api_time(noon()));
    live.conditions.insert(0, bound);
    live
}

fn any_trouble() -> impl Strategy<Value = Option<Trouble>> {
    let reason = proptest::sample::select(Reason::ALL);
    let step = proptest::sample::select(vec![
        Step::Prepare(Parts { layer: true, network: true, ..Parts::default() }),
        Step::StartAttempt,
        Step::Kill,
        Step::RemoveContainer,
    ]);
    proptest::option::of((step, reason, "[a-zé]{1,40}", any::<bool>()).prop_map(
        |(step, reason, message, retryable)| Trouble { step, reason, message: message.repeat(60), retryable },
    ))
}

fn whole(time: &Time) -> bool {
    time.0.subsec_nanosecond() == 0
}

/// Times as a machine's clock has them: the API server takes no year before 0.
fn clock() -> impl Strategy<Value = Timestamp> {
    (time(), 0..1_000_000_000i32).prop_filter_map("the API has no such year", |(at, nanos)| {
        let at = Timestamp::new(at.as_second(), nanos).ok()?;
        (at.as_second() >= 0).then_some(at)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// What was applied is what is wanted at the next look: else the agent would write for ever.
    #[test]
    fn a_status_once_written_is_not_written_again(
        observed in observed(), ask in ask(), trouble in any_trouble(), first in clock(), then in clock(),
    ) {
        let desired = ask.desired();
        let next = plan(&desired, &observed, first);
        // An agent sees a bot no sooner than bound.
        let bound = applied(&BotContainerStatus::default());
        let status = report(Some(4), &desired, &observed, &next, trouble.as_ref(), Some(&bound), first);
        prop_assert!(!says(Some(&bound), &status));
        let live = applied(&status);
        prop_assert!(says(Some(&live), &status), "{:#?}\n{:#?}", live, status);
        // Seen again at another time, with nothing new: still nothing to write.
        let again = report(Some(4), &desired, &observed, &next, trouble.as_ref(), Some(&live), then);
        prop_assert!(says(Some(&live), &again), "{:#?}\n{:#?}", live, again);
    }

    #[test]
    fn every_status_is_one_that_people_and_tools_can_use(
        observed in observed(), ask in ask(), trouble in any_trouble(), now in clock(),
    ) {
        let desired = ask.desired();
        let next = plan(&desired, &observed, now);
        let status = report(Some(4), &desired, &observed, &next, trouble.as_ref(), None, now);
        prop_assert_eq!(status.observed_generation, Some(4));
        let ready = find(&status.conditions, ConditionType::Ready).unwrap();
        let _ = words(&status);
        let busy = [ConditionType::Reconciling, ConditionType::Stalled];
        let busy = busy.iter().filter(|type_| find(&status.conditions, **type_).is_some()).count();
        prop_assert_eq!(busy, usize::from(ready.status == "False"), "kstatus wants one of its conditions while not Ready");
        for condition in &status.conditions {
            prop_assert!(!condition.message.is_empty(), "{} without a message", condition.type_);
            prop_assert!(condition.message.len() <= crate::api::condition::MAX_MESSAGE);
            prop_assert!(Reason::parse(&condition.reason).is_some());
            prop_assert!(whole(&condition.last_transition_time));
            prop_assert_eq!(condition.observed_generation, Some(4));
        }
        // Never Running on hearsay: the condition says what containerd says.
        let runs = find(&status.conditions, ConditionType::Running).unwrap().status == "True";
        let removed = matches!(next, Next::Settled { state: State::Removed, .. });
        let bots_own = !matches!(observed.container, Container::Foreign { .. });
        prop_assert_eq!(runs, matches!(observed.task, Task::Running { .. }) && !removed && bots_own);
        let times = status.transitions.iter().map(|t| &t.at).chain(status.task.iter().map(|t| &t.started_at));
        prop_assert!(times.into_iter().all(whole));
        if let Some(last) = &status.last_termination {
            prop_assert!(last.started_at.iter().chain(&last.finished_at).all(whole));
        }
    }

    /// Whatever the bot goes through, the numbers go up by one, and the list stays short.
    #[test]
    fn transitions_are_numbered_without_gaps(
        looks in prop::collection::vec((observed(), ask(), 0..5000i64), 1..40),
    ) {
        let mut live: Option<BotContainerStatus> = None;
        for (observed, ask, later) in looks {
            let desired = ask.desired();
            let now = noon() + SignedDuration::from_secs(later);
            let next = plan(&desired, &observed, now);
            let before = live.as_ref().and_then(|s| s.transitions.last()).map_or(0, |t| t.seq);
            let status = report(Some(1), &desired, &observed, &next, None, live.as_ref(), now);
            prop_assert!(status.transitions.len() <= 32);
            let seqs: Vec<i64> = status.transitions.iter().map(|t| t.seq).collect();
            prop_assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{:?}", seqs);
            prop_assert!(seqs.last().copied().unwrap_or(0) >= before);
            if let Some(first) = seqs.first() {
                prop_assert!(*first == 1 || seqs.len() == 32, "{:?}", seqs);
            }
            live = Some(applied(&status));
        }
    }
}

#[test]
fn a_layer_is_named_with_its_image() {
    let observed = Observed { layer: Some(layer(0)), network: connected(), ..nothing() };
    let desired = Ask::default().desired();
    let status = report(None, &desired, &observed, &plan(&desired, &observed, noon()), None, None, noon());
    assert_eq!(status.image.unwrap().digest.as_deref(), Some("sha256:0"));
    assert_eq!(status.network.unwrap().ip.as_deref(), Some("10.208.3.7"));
}
