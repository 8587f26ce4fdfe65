//! Stories as text: `stories.txt` has commands (`> …`) and, below each, what the agent did and what status said then. A
//! change of behaviour shows as a diff there. `UPDATE=1 cargo test --lib stories` writes what is now.

use std::fmt::Write as _;

use jiff::{SignedDuration, Timestamp};

use super::NOON;
use super::world::{Ask, Habits, Mode, World, grace};
use crate::agent::desired::Desired;
use crate::agent::plan::{Next, State, plan};
use crate::agent::status::report;
use crate::agent::step::Step;
use crate::api::BotContainerStatus;
use crate::api::bot_container::{NetworkMode, RestartPolicy};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent/plan/tests/stories.txt");

struct Story {
    world: World,
    ask: Ask,
    desired: Desired,
    status: Option<BotContainerStatus>,
}

impl Story {
    fn new() -> Self {
        let habits = Habits { heeds_term: true, ..Habits::default() };
        let ask = Ask::default();
        Self {
            world: World::new(Timestamp::from_second(NOON).unwrap(), habits),
            ask,
            desired: ask.desired(),
            // As the controller leaves it.
            status: Some(BotContainerStatus { node_name: Some("node-1".into()), ..BotContainerStatus::default() }),
        }
    }

    /// One command; what came of it as lines.
    fn tell(&mut self, command: &str) -> String {
        let mut out = String::new();
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            ["apply", fields @ ..] => {
                for field in fields {
                    self.apply(field);
                }
                self.desired = self.ask.desired();
            }
            ["agent", "runs"] => self.run(&mut out, None),
            ["agent", "dies", "after", "effect", n, "of", step] => self.run(&mut out, Some((step, n.parse().unwrap()))),
            ["exits", code] => self.world.exit(code.parse().unwrap(), false),
            ["reboot"] => self.world.reboot(),
            ["shim", "dies"] => self.world.shim_dies(),
            ["shim", "hangs"] => self.world.shim_hangs(),
            ["shim", "answers"] => self.world.shim_answers(),
            ["task", "is", "lost"] => self.world.task_is_lost(),
            ["logger", "dies"] => self.world.observed.output = super::Output::Undrained,
            ["ignores", "TERM"] => self.world.habits.heeds_term = false,
            ["command", "is", "missing"] => self.world.habits.refuses_start = true,
            ["command", "is", "there"] => self.world.habits.refuses_start = false,
            ["pass", seconds] => {
                let then = self.world.now + SignedDuration::from_secs(seconds.parse().unwrap());
                self.world.pass_until(then);
            }
            ["clock", seconds] => self.world.set_clock(seconds.parse().unwrap()),
            other => panic!("no such command: {other:?}"),
        }
        out
    }

    fn apply(&mut self, field: &str) {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        match (name, value) {
            ("Running", _) => self.ask.mode = Mode::Running,
            ("Paused", _) => self.ask.mode = Mode::Paused,
            ("Stopped", _) => self.ask.mode = Mode::Stopped,
            ("deleted", _) => self.ask.mode = Mode::Gone,
            ("bad-image", _) => self.ask.mode = Mode::Refused,
            ("env", n) => self.ask.env = n.parse().unwrap(),
            ("cpu", n) => self.ask.cpu = n.parse().unwrap(),
            ("image", n) => self.ask.image = n.parse().unwrap(),
            ("grace", n) => self.ask.grace = n.parse().unwrap(),
            ("restart", "Never") => self.ask.policy = RestartPolicy::Never,
            ("restart", "OnFailure") => self.ask.policy = RestartPolicy::OnFailure,
            ("restart", "Always") => self.ask.policy = RestartPolicy::Always,
            ("network", "None") => self.ask.network = NetworkMode::None,
            ("network", "Host") => self.ask.network = NetworkMode::Host,
            other => panic!("no such field: {other:?}"),
        }
    }

    /// The loop, until it waits or dies. It waits only for what is not to come by itself.
    fn run(&mut self, out: &mut String, death: Option<(&str, u8)>) {
        let mut starts = 0;
        loop {
            let next = plan(&self.desired, &self.world.observed, self.world.now);
            match &next {
                Next::Do(step) => {
                    starts += usize::from(*step == Step::StartAttempt);
                    if starts > 3 {
                        let _ = writeln!(out, "  … and so on");
                        return;
                    }
                    if let Some((name, effects)) = death.filter(|(name, _)| *name == step.name()) {
                        self.world.cut_after = Some(effects);
                        let _ = self.world.act(*step, &self.desired);
                        let _ = writeln!(out, "  {}, cut off after effect {effects} of {name}", words(*step));
                        return;
                    }
                    let done = match self.world.act(*step, &self.desired) {
                        Ok(()) => String::new(),
                        Err(error) => format!(": {error:?}"),
                    };
                    let _ = writeln!(out, "  {}{done}", words(*step));
                }
                Next::Settled { state, until } => {
                    self.say(&next, out);
                    let Some(until) = until else { return };
                    let _ = writeln!(out, "  … waits {:#}", until.duration_since(self.world.now));
                    if *state == State::BackOff {
                        return;
                    }
                    self.world.pass_until(*until);
                    assert!(grace(&self.desired) <= SignedDuration::from_hours(24));
                }
            }
        }
    }

    fn say(&mut self, next: &Next, out: &mut String) {
        let Self { world, desired, status, .. } = self;
        let new = report(Some(1), desired, &world.observed, next, None, status.as_ref(), world.now);
        let conditions = new.conditions.iter().map(|c| format!("{}={} {}", c.type_, c.status, c.reason));
        let _ = write!(out, "  = {:?}", new.phase.unwrap());
        if let Some(kept) = new.kept {
            let _ = write!(out, ", kept {kept:?}");
        }
        if let Some(restarts) = new.restart_count.filter(|&n| n > 0) {
            let _ = write!(out, ", {restarts} restarts");
        }
        let _ = writeln!(out, ": {}", conditions.collect::<Vec<_>>().join(", "));
        let seen = status.as_ref().and_then(|s| s.transitions.last()).map_or(0, |last| last.seq);
        for transition in new.transitions.iter().filter(|t| t.seq > seen) {
            let code = transition.exit_code.map_or(String::new(), |code| format!(" with {code}"));
            let _ = writeln!(out, "    {} {}{code}", transition.seq, transition.type_);
        }
        *status = Some(new);
    }
}

fn words(step: Step) -> String {
    match step {
        Step::Prepare(parts) | Step::Remove(parts) => {
            let names = [
                ("layer", parts.layer),
                ("namespace", parts.namespace),
                ("network", parts.network),
                ("output", parts.output),
            ];
            let names: Vec<_> = names.iter().filter_map(|(name, wanted)| wanted.then_some(*name)).collect();
            format!("{step} {}", names.join(" + "))
        }
        Step::CreateTask { connect: true } => format!("{step} beside its network"),
        step => step.to_string(),
    }
}

#[test]
fn stories() {
    let told = std::fs::read_to_string(FILE).unwrap();
    let mut now = String::new();
    let mut story = Story::new();
    for line in told.lines() {
        if let Some(title) = line.strip_prefix("# ") {
            story = Story::new();
            let _ = writeln!(now, "{}# {title}", if now.is_empty() { "" } else { "\n" });
        } else if let Some(command) = line.strip_prefix("> ") {
            let _ = writeln!(now, "> {command}");
            now.push_str(&story.tell(command));
        } else if let Some(comment) = line.strip_prefix("; ") {
            let _ = writeln!(now, "; {comment}");
        }
    }
    assert!(now.matches("\n  = ").count() > 20, "the stories tell nothing");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(FILE, &now).unwrap();
    }
    assert!(now == told || std::env::var_os("UPDATE").is_some(), "{FILE} tells another story; it goes so now:\n{now}");
}
