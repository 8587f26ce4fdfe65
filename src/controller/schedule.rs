//! Cron schedules of five fields with a time zone, as crontab(5) has them and a CronJob reads them. Pure.
//!
//! Day of month and day of week: where both are restricted either is enough. A time that the clocks skip counts at the moment
//! they skip it; one that they show twice counts once, the first time.

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Timestamp, ToSpan as _};

/// No schedule is looked for further than this. Days: every combination of day, month and weekday comes within it.
const HORIZON: i32 = 366 * 41;

/// When something is due.
#[derive(Clone, Debug)]
pub struct Schedule {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Neither day of month nor day of week begins with `*`: either is enough.
    either: bool,
    zone: TimeZone,
}

/// Text that is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSchedule {
    /// Not five fields.
    #[error("{text:?} has {count} fields and must have five: minute hour day-of-month month day-of-week")]
    Fields {
        /// The text.
        text: String,
        /// How many it has.
        count: usize,
    },
    /// A field is none.
    #[error(
        "{field} is {text:?}; it must be `*`, a number from {least} to {most}, a range a-b, or a list of these, each with a step /n or without"
    )]
    Field {
        /// Which.
        field: &'static str,
        /// Its text.
        text: String,
        /// Smallest value.
        least: u32,
        /// Largest value.
        most: u32,
    },
    /// No time zone of that name.
    #[error("{0:?} is no name of the tz database that this controller knows; use for example Europe/Berlin")]
    Zone(String),
}

struct Field {
    name: &'static str,
    least: u32,
    most: u32,
    words: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "the minute", least: 0, most: 59, words: &[] },
    Field { name: "the hour", least: 0, most: 23, words: &[] },
    Field { name: "the day of month", least: 1, most: 31, words: &[] },
    Field {
        name: "the month",
        least: 1,
        most: 12,
        words: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    },
    Field { name: "the day of week", least: 0, most: 7, words: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] },
];

impl Field {
    /// A bit for each value.
    fn parse(&self, text: &str) -> Result<u64, BadSchedule> {
        let bad = || BadSchedule::Field { field: self.name, text: text.to_owned(), least: self.least, most: self.most };
        let value = |text: &str| {
            let word = self.words.iter().position(|word| word.eq_ignore_ascii_case(text));
            let number = match word {
                Some(index) => u32::try_from(index).ok().map(|index| index + self.least),
                None => text.parse::<u32>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit())),
            };
            number.filter(|number| (self.least..=self.most).contains(number)).ok_or_else(bad)
        };
        let mut bits = 0;
        for item in text.split(',') {
            let (range, step) = match item.split_once('/') {
                Some((range, step)) => {
                    (range, Some(step.parse::<u32>().ok().filter(|step| *step > 0).ok_or_else(bad)?))
                }
                None => (item, None),
            };
            let (first, last) = match range.split_once('-') {
                _ if range == "*" => (self.least, self.most),
                Some((first, last)) => (value(first)?, value(last)?),
                // `5/10` is from 5 on.
                None => (value(range)?, if step.is_some() { self.most } else { value(range)? }),
            };
            if first > last {
                return Err(bad());
            }
            for number in (first..=last).step_by(step.unwrap_or(1) as usize) {
                bits |= 1_u64 << number;
            }
        }
        Ok(bits)
    }
}

fn has(bits: u64, number: i8) -> bool {
    u32::try_from(number).is_ok_and(|number| bits & (1_u64 << number) != 0)
}

impl Schedule {
    /// Reads five fields. `zone` is a name of the tz database; UTC without one.
    pub fn parse(text: &str, zone: Option<&str>) -> Result<Self, BadSchedule> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(BadSchedule::Fields { text: text.to_owned(), count: fields.len() });
        };
        let [minutes, hours, days, months, weekdays] = FIELDS;
        let mut week = weekdays.parse(weekday)?;
        // Sunday is 0 and 7.
        if week & (1 << 7) != 0 {
            week |= 1;
        }
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| BadSchedule::Zone(name.to_owned()))?,
        };
        Ok(Self {
            minutes: minutes.parse(minute)?,
            hours: hours.parse(hour)?,
            days: days.parse(day)?,
            months: months.parse(month)?,
            weekdays: week,
            either: !day.starts_with('*') && !weekday.starts_with('*'),
            zone,
        })
    }

    /// The first time after `after`; `None` for one that never comes, such as 31 February.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let mut day = self.local(after)?.date();
        for _ in 0..HORIZON {
            if self.is_day(day) {
                let mut times = self.times(day);
                if let Some(at) = times.find(|at| *at > after) {
                    return Some(at);
                }
            }
            day = day.tomorrow().ok()?;
        }
        None
    }

    /// The last time in (`after`, `now`]: what was missed runs once, not many times.
    pub fn missed(&self, after: Timestamp, now: Timestamp) -> Option<Timestamp> {
        // A day more: a time that the clocks skipped may count on the day before.
        let first = self.local(after)?.date().yesterday().ok()?;
        let mut day = self.local(now)?.date();
        for _ in 0..HORIZON {
            if day < first {
                return None;
            }
            if self.is_day(day)
                && let Some(at) = self.times(day).filter(|at| *at > after && *at <= now).last()
            {
                return Some(at);
            }
            day = day.yesterday().ok()?;
        }
        None
    }

    fn local(&self, at: Timestamp) -> Option<DateTime> {
        Some(self.zone.to_datetime(at))
    }

    fn is_day(&self, day: Date) -> bool {
        let weekday = match day.weekday() {
            Weekday::Sunday => 0,
            other => other.to_monday_one_offset(),
        };
        let (by_day, by_week) = (has(self.days, day.day()), has(self.weekdays, weekday));
        has(self.months, day.month()) && if self.either { by_day || by_week } else { by_day && by_week }
    }

    /// The times of a day, in order.
    fn times(&self, day: Date) -> impl Iterator<Item = Timestamp> {
        let hours = (0..24).filter(|hour| has(self.hours, *hour));
        let times = hours.flat_map(|hour| (0..60).map(move |minute| (hour, minute)));
        let mut last = Timestamp::MIN;
        times.filter(|(_, minute)| has(self.minutes, *minute)).filter_map(move |(hour, minute)| {
            let at = self.instant(day.at(hour, minute, 0, 0))?;
            // All that was skipped counts at one moment.
            let later = at > last;
            last = last.max(at);
            later.then_some(at)
        })
    }

    fn instant(&self, local: DateTime) -> Option<Timestamp> {
        let ambiguous = self.zone.to_ambiguous_timestamp(local);
        match ambiguous.offset() {
            AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => ambiguous.compatible().ok(),
            AmbiguousOffset::Gap { .. } => {
                let after = ambiguous.later().ok()?;
                let change = self.zone.preceding(after.checked_add(1.second()).ok()?).next()?;
                Some(change.timestamp())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn next(schedule: &str, zone: Option<&str>, after: &str) -> Option<String> {
        Schedule::parse(schedule, zone).unwrap().next_after(at(after)).map(|at| at.to_string())
    }

    #[test]
    fn the_next_time_is_that_of_crontab() {
        for (schedule, after, wanted) in [
            ("0 3 * * *", "2026-11-26T02:59:59Z", "2026-11-26T03:00:00Z"),
            ("0 3 * * *", "2026-11-26T03:00:00Z", "2026-11-27T03:00:00Z"),
            ("*/15 * * * *", "2026-11-26T10:01:00Z", "2026-11-26T10:15:00Z"),
            ("5/20 * * * *", "2026-11-26T10:26:00Z", "2026-11-26T10:45:00Z"),
            ("0 0 1 jan *", "2026-11-26T00:00:00Z", "2027-01-01T00:00:00Z"),
            ("0 0 29 2 *", "2026-11-26T00:00:00Z", "2028-02-29T00:00:00Z"),
            // 2026-11-26 is a Thursday.
            ("0 12 * * sun", "2026-11-26T00:00:00Z", "2026-11-29T12:00:00Z"),
            ("0 12 * * 7", "2026-11-26T00:00:00Z", "2026-11-29T12:00:00Z"),
            ("0 12 * * 5-7", "2026-11-28T13:00:00Z", "2026-11-29T12:00:00Z"),
            // Both restricted: either. One of them `*`: the other.
            ("0 0 13 * fri", "2026-11-26T00:00:00Z", "2026-11-27T00:00:00Z"),
            ("0 0 13 * *", "2026-11-26T00:00:00Z", "2026-12-13T00:00:00Z"),
            ("0,30 9-17/4 * * Mon-FRI", "2026-11-27T17:30:00Z", "2026-11-30T09:00:00Z"),
        ] {
            assert_eq!(next(schedule, None, after).as_deref(), Some(wanted), "{schedule} after {after}");
        }
        assert_eq!(next("0 0 31 2 *", None, "2026-11-26T00:00:00Z"), None, "31 February never comes");
    }

    #[test]
    fn clocks_that_jump_skip_nothing_and_repeat_nothing() {
        let berlin = Some("Europe/Berlin");
        // Forward at 02:00 local, 01:00 UTC: what is skipped counts at that moment.
        assert_eq!(next("30 2 * * *", berlin, "2027-03-27T12:00:00Z").as_deref(), Some("2027-03-28T01:00:00Z"));
        assert_eq!(next("30 2 * * *", berlin, "2027-03-28T01:00:00Z").as_deref(), Some("2027-03-29T00:30:00Z"));
        assert_eq!(next("*/10 2 * * *", berlin, "2027-03-28T01:00:00Z").as_deref(), Some("2027-03-29T00:00:00Z"));
        // Back at 03:00 local, 01:00 UTC: 02:30 is there twice.
        assert_eq!(next("30 2 * * *", berlin, "2026-10-24T12:00:00Z").as_deref(), Some("2026-10-25T00:30:00Z"));
        assert_eq!(next("30 2 * * *", berlin, "2026-10-25T00:30:00Z").as_deref(), Some("2026-10-26T01:30:00Z"));
    }

    #[test]
    fn what_was_missed_runs_once() {
        let schedule = Schedule::parse("0 3 * * *", None).unwrap();
        let missed = |after: &str, now: &str| schedule.missed(at(after), at(now)).map(|at| at.to_string());
        assert_eq!(missed("2026-11-01T03:00:00Z", "2026-11-26T10:00:00Z").as_deref(), Some("2026-11-26T03:00:00Z"));
        assert_eq!(missed("2026-11-26T03:00:00Z", "2026-11-26T10:00:00Z"), None);
        assert_eq!(missed("2026-11-26T03:00:00Z", "2026-11-27T03:00:00Z").as_deref(), Some("2026-11-27T03:00:00Z"));
        let every = Schedule::parse("* * * * *", None).unwrap();
        let long_ago = every.missed(Timestamp::UNIX_EPOCH, at("2026-11-26T10:00:30Z"));
        assert_eq!(long_ago, Some(at("2026-11-26T10:00:00Z")), "in bounded work");
        assert_eq!(
            every.missed(at("2027-01-01T00:00:00Z"), at("2026-01-01T00:00:00Z")),
            None,
            "the clock was set back"
        );
    }

    #[test]
    fn what_is_no_schedule_names_its_field() {
        for (text, words) in [
            ("* * * *", "4 fields"),
            ("60 * * * *", "the minute is \"60\""),
            ("* 24 * * *", "the hour"),
            ("* * 0 * *", "the day of month"),
            ("* * * 13 *", "the month"),
            ("* * * * 8", "the day of week"),
            ("5-1 * * * *", "the minute"),
            ("*/0 * * * *", "the minute"),
            ("+5 * * * *", "the minute"),
            ("* * * mon *", "the month"),
        ] {
            let error = Schedule::parse(text, None).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(Schedule::parse("* * * * *", Some("Mars/Olympus")).unwrap_err().to_string().contains("Mars/Olympus"));
    }

    proptest! {
        /// The next time after any moment is what was missed at that time, and nothing lies between.
        #[test]
        fn next_and_missed_agree(
            minute in 0..60_u8, hour in 0..24_u8, weekday in 0..8_u8, second in 1_790_000_000_i64..1_990_000_000,
            zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
        ) {
            let schedule = Schedule::parse(&format!("{minute} {hour} * * {weekday}"), Some(zone)).unwrap();
            let after = Timestamp::from_second(second).unwrap();
            let next = schedule.next_after(after).unwrap();
            prop_assert!(next > after && next.as_second() - second <= 9 * 86_400);
            prop_assert_eq!(schedule.missed(after, next), Some(next));
            let before = Timestamp::from_second(next.as_second() - 1).unwrap();
            prop_assert_eq!(schedule.missed(after, before), None);
        }
    }
}
