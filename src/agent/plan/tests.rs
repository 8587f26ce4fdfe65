//! Properties of the plan, in a world that steps change as they do on a node. `world` has the rules of that world,
//! `stories` what people can read of it.

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::agent::record::Ending;

mod stories;
pub mod world;

use world::{Ask, Habits, Kept, Mode, World, connected, layer};

const NOON: i64 = 1_795_521_600;

fn noon() -> Timestamp {
    Timestamp::from_second(NOON).unwrap()
}

/// Mostly near to noon, sometimes where the calendar ends.
pub fn time() -> impl Strategy<Value = Timestamp> {
    prop_oneof![
        8 => (-1000i64..1000).prop_map(|s| Timestamp::from_second(NOON + s).unwrap()),
        1 => Just(Timestamp::MIN),
        1 => Just(Timestamp::MAX),
        1 => Just(Timestamp::UNIX_EPOCH),
        1 => (0i64..9_000_000_000).prop_map(|s| Timestamp::from_second(s).unwrap()),
    ]
}

pub fn ask() -> impl Strategy<Value = Ask> {
    (
        prop_oneof![
            4 => Just(Mode::Running), 3 => Just(Mode::Paused), 2 => Just(Mode::Stopped),
            1 => Just(Mode::Refused), 2 => Just(Mode::Gone), 1 => Just(Mode::Retained),
        ],
        (0..2u8, 0..2u8, prop_oneof![2 => Just(0u8), 1 => 1..3u8]),
        0..2u8,
        prop_oneof![5 => Just(0u8), 1 => Just(1)],
        select(vec![RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never]),
        prop_oneof![select(vec![0i64, 1, 10, 86_400]), Just(i64::MAX), Just(-1)],
        prop_oneof![3 => Just(NetworkMode::Bridge), 1 => Just(NetworkMode::Host), 1 => Just(NetworkMode::None)],
        any::<bool>(),
        (prop_oneof![3 => Just(0u8), 1 => 1..3u8], select(vec![Kept::No, Kept::Awaited, Kept::As])),
    )
        .prop_map(
            |(mode, (env, skill, restarted), cpu, image, policy, grace, network, address_in_env, (rollback, keep))| {
                Ask { mode, env, cpu, skill, restarted, image, policy, grace, network, address_in_env, rollback, keep }
            },
        )
}

fn ending() -> impl Strategy<Value = Ending> {
    (
        select(vec![0u32, 1, 128, 137, 143, u32::MAX]),
        select(vec!["Completed", "Error", "OOMKilled", "StartError", "TaskLost", "Else"]),
        select(vec!["", "the last words"]),
        proptest::option::of(time()),
        time(),
        any::<bool>(),
    )
        .prop_map(|(code, reason, message, started_at, finished_at, asked)| Ending {
            code,
            reason: reason.into(),
            message: message.into(),
            started_at,
            finished_at,
            asked,
        })
}

fn life() -> impl Strategy<Value = Life> {
    prop_oneof![Just(Life::Fresh), time().prop_map(|at| Life::Started { at }), Just(Life::Ended)]
}

pub fn record() -> impl Strategy<Value = Record> {
    let made_from = (ask(), 0..3u8);
    let number = || prop_oneof![8 => 0..4u64, 1 => Just(u64::MAX)];
    let orders = (proptest::option::of(time()), any::<bool>(), proptest::option::of(time()));
    let counts = (prop_oneof![8 => 0..12u32, 1 => Just(u32::MAX)], number());
    (made_from, number(), number(), life(), orders, counts, proptest::option::of(ending())).prop_map(
        |((ask, limits), spec_for, attempt, life, (stop, sent, kill), (failures, restarts), last)| {
            let alive = ask.alive();
            Record {
                uid: world::UID.into(),
                namespace: "team-a".into(),
                name: "web".into(),
                bot_id: "web".into(),
                hash: alive.hash,
                restarted_at: alive.restarted_at,
                rollback: None,
                rolled: None,
                aside: None,
                replaced: None,
                limits: match limits {
                    0 => String::new(),
                    1 => "not JSON".into(),
                    _ => alive.limits,
                },
                skills: alive.skills,
                image: alive.image.to_string(),
                digest: "sha256:0".into(),
                snapshotter: "overlayfs".into(),
                layer: format!("berth-{}.1", world::UID),
                stop_signal: 15,
                spec_for,
                attempt,
                life,
                stop_ordered: stop,
                stop_sent: sent,
                kill_ordered: kill,
                failures,
                restarts,
                last,
            }
        },
    )
}

fn task() -> impl Strategy<Value = Task> {
    prop_oneof![
        2 => Just(Task::Absent),
        1 => Just(Task::Created),
        2 => Just(Task::Running { pid: 7 }),
        2 => Just(Task::Paused { pid: 7 }),
        2 => (select(vec![0u32, 1, 137]), time(), any::<bool>()).prop_map(|(code, at, oom)| Task::Stopped { code, at, oom }),
        1 => Just(Task::Unknown),
        1 => Just(Task::Leftover),
    ]
}

/// Anything at all, whether or not a way leads to it.
pub fn observed() -> impl Strategy<Value = Observed> {
    let container = prop_oneof![
        2 => Just(Container::Absent),
        6 => record().prop_map(|record| Container::Ours(Box::new(record))),
        1 => Just(Container::Foreign { why: "someone made it".into() }),
        1 => Just(Container::Garbled { why: "someone wrote over it".into() }),
    ];
    let network = select(vec![Attached::Absent, Attached::Partial, Attached::Ready { ips: vec![] }, connected()]);
    let output = select(vec![Output::Absent, Output::Undrained, Output::Drained]);
    (container, task(), proptest::option::of((0..2u8).prop_map(layer)), network, output, any::<bool>()).prop_map(
        |(container, task, layer, network, output, files)| Observed { container, task, layer, network, output, files },
    )
}

fn habits() -> impl Strategy<Value = Habits> {
    (any::<bool>(), 0..3u8, any::<bool>()).prop_map(|(heeds_term, shrugs, freezer_v1)| Habits {
        heeds_term,
        shrugs,
        freezer_v1,
        ..Habits::default()
    })
}

/// What befalls a bot between two looks, or in the middle of a step.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The agent looks, and does what it planned.
    Look,
    /// The agent dies after so many effects of its next step.
    CutOff(u8),
    Apply(Ask),
    Pass(i64),
    Clock(i64),
    Exit(u32, bool),
    ShimDies,
    ShimHangs,
    ShimAnswers,
    TaskIsLost,
    NetworkVanishes,
    NetworkBreaks,
    LoggerDies,
    PipesVanish,
    FilesVanish,
    Reboot,
    OutsiderRemovesContainer,
    OutsiderRemovesLayer,
    BadCommand(bool),
    BadDirectory(bool),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        30 => Just(Event::Look),
        8 => (0..6u8).prop_map(Event::CutOff),
        6 => ask().prop_map(Event::Apply),
        3 => (0..700i64).prop_map(Event::Pass),
        1 => select(vec![-1_000_000i64, -30, 30, 1_000_000]).prop_map(Event::Clock),
        3 => (select(vec![0u32, 1, 137]), any::<bool>()).prop_map(|(code, oom)| Event::Exit(code, oom)),
        1 => select(vec![Event::ShimDies, Event::ShimHangs, Event::ShimAnswers, Event::TaskIsLost]),
        1 => select(vec![Event::NetworkVanishes, Event::NetworkBreaks, Event::LoggerDies, Event::PipesVanish, Event::FilesVanish]),
        1 => Just(Event::Reboot),
        1 => select(vec![Event::OutsiderRemovesContainer, Event::OutsiderRemovesLayer]),
        1 => any::<bool>().prop_map(Event::BadCommand),
        1 => any::<bool>().prop_map(Event::BadDirectory),
    ]
}

fn live(world: &mut World, events: &[Event], first: Ask) -> Desired {
    let mut desired = first.desired();
    let mut gone = false;
    for &event in events {
        match event {
            Event::Look => {
                if let Next::Do(step) = world.look(&desired) {
                    let _ = world.act(step, &desired);
                }
                continue;
            }
            Event::CutOff(effects) => world.cut_after = Some(effects),
            // A deletion is never taken back; its policy may be edited.
            Event::Apply(ask) if !gone || matches!(ask.mode, Mode::Gone | Mode::Retained) => {
                gone = matches!(ask.mode, Mode::Gone | Mode::Retained);
                desired = ask.desired();
            }
            Event::Apply(_) => {}
            Event::Pass(seconds) => world.pass_until(world.now + SignedDuration::from_secs(seconds)),
            Event::Clock(seconds) => world.set_clock(seconds),
            Event::Exit(code, oom) => world.exit(code, oom),
            Event::ShimDies => world.shim_dies(),
            Event::ShimHangs => world.shim_hangs(),
            Event::ShimAnswers => world.shim_answers(),
            Event::TaskIsLost => world.task_is_lost(),
            Event::NetworkVanishes => world.observed.network = Attached::Absent,
            Event::NetworkBreaks => world.observed.network = Attached::Partial,
            Event::LoggerDies if world.observed.output == Output::Drained => world.observed.output = Output::Undrained,
            Event::LoggerDies => {}
            Event::PipesVanish => world.observed.output = Output::Absent,
            Event::FilesVanish => world.observed.files = false,
            Event::Reboot => world.reboot(),
            Event::OutsiderRemovesContainer => world.outsider_removes_container(),
            Event::OutsiderRemovesLayer => world.outsider_removes_layer(),
            Event::BadCommand(bad) => world.habits.refuses_start = bad,
            Event::BadDirectory(bad) => world.habits.refuses_create = bad,
        }
        world.trace.push(format!("{event:?}"));
    }
    desired
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Total, a function, bounded, and right: whatever is there, whatever is asked, whatever the clock says.
    #[test]
    fn every_state_leads_to_what_is_asked(
        observed in observed(), ask in ask(), now in time(), habits in habits(), order in any::<u64>(),
    ) {
        let desired = ask.desired();
        let mut world = World::drawn(observed, now, habits);
        world.order = order;
        let state = world.settle(&desired);
        world.assert_right(&state, &desired);
    }

    /// Deletion takes nothing for granted, not even that the container is ours.
    #[test]
    fn deletion_ends_from_anywhere(observed in observed(), ask in ask(), habits in habits(), now in time()) {
        let desired = Ask { mode: Mode::Gone, ..ask }.desired();
        let foreign = matches!(observed.container, Container::Foreign { .. });
        let (container, task) = (observed.container.clone(), observed.task);
        let mut world = World::drawn(observed, now, habits);
        prop_assert_eq!(world.settle(&desired), State::Removed);
        if foreign {
            prop_assert_eq!(&world.observed.container, &container);
            prop_assert_eq!(world.observed.task, task, "a foreign process is left alone");
        }
    }

    /// A bot's life with the agent killed in the middle of steps, processes that end, reboots and edits; once that is
    /// over, what was asked last is there.
    #[test]
    fn any_history_leads_to_what_is_asked(
        first in ask(), events in prop::collection::vec(event(), 1..80), habits in habits(), order in any::<u64>(),
    ) {
        let mut world = World::new(noon(), habits);
        world.order = order;
        let desired = live(&mut world, &events, first);
        world.shim_answers();
        let state = world.settle(&desired);
        world.assert_right(&state, &desired);
    }

    /// After an order KILL comes at most the grace period later, whoever changed his mind or set the clock meanwhile.
    #[test]
    fn a_stop_order_ends_in_a_kill(
        record in record(), ordered in time(), ask in ask(), frozen in any::<bool>(), later in 0..100_000i64,
    ) {
        let desired = ask.desired();
        let task = if frozen { Task::Paused { pid: 7 } } else { Task::Running { pid: 7 } };
        let record = Record { stop_ordered: Some(ordered), stop_sent: true, kill_ordered: None, ..record };
        let container = Container::Ours(Box::new(record));
        let observed = Observed { container, task, output: Output::Drained, ..world::nothing() };
        let Ok(now) = ordered.checked_add(SignedDuration::from_secs(later)) else { return Ok(()) };
        let set_back = now.checked_sub(SignedDuration::from_secs(later + 1));
        let grace = world::grace(&desired);
        match plan(&desired, &observed, now) {
            Next::Do(Step::Resume) => prop_assert!(frozen),
            Next::Do(Step::Kill) => {
                // Where the calendar ends there is no later to wait for.
                let over = now.duration_since(ordered) >= grace || now == Timestamp::MAX;
                prop_assert!(over, "before the grace is over");
            }
            Next::Settled { state: State::Stopping, until: Some(until) } => {
                prop_assert_eq!(until, ordered.saturating_add(grace).unwrap());
                prop_assert!(until > now);
            }
            other => prop_assert!(false, "an order once given is dropped: {:?}", other),
        }
        if let Ok(before) = set_back {
            prop_assert_eq!(plan(&desired, &observed, before), Next::Do(Step::Stop), "an order from the future is given anew");
        }
    }
}
