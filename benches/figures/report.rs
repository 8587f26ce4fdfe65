//! What was measured, as people read it and as tools do.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use crate::machine::Machine;

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Lower,
    Higher,
}

/// Values of one quantity, sorted.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

/// A distribution in a few numbers, of the unit of its figure.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub count: usize,
    pub min: f64,
    pub p50: f64,
    pub p95: f64,
    pub max: f64,
}

impl Samples {
    /// Sorts them. Fails when there are none: a figure without a sample is void.
    pub fn new(mut values: Vec<f64>) -> anyhow::Result<Self> {
        anyhow::ensure!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Ok(Self(values))
    }

    /// The value that `percent` of all do not exceed (nearest rank).
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    pub fn spread(&self) -> Spread {
        Spread {
            count: self.0.len(),
            min: self.percentile(0),
            p50: self.percentile(50),
            p95: self.percentile(95),
            max: self.percentile(100),
        }
    }
}

/// One line of the report. `target` is for `ratio` where there is a peer, else for `ours`.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: Better,
    pub ours: f64,
    pub peer: Option<f64>,
    pub peer_name: Option<&'static str>,
    pub ratio: Option<f64>,
    pub target: Option<f64>,
    /// How `ours` is spread, where it stands for many.
    pub ours_spread: Option<Spread>,
    pub peer_spread: Option<Spread>,
    /// What else a reader has to know.
    pub note: String,
}

impl Figure {
    /// A number that stands alone.
    pub fn new(name: &'static str, unit: &'static str, better: Better, ours: f64) -> Self {
        Self {
            name,
            unit,
            better,
            ours,
            peer: None,
            peer_name: None,
            ratio: None,
            target: None,
            ours_spread: None,
            peer_spread: None,
            note: String::new(),
        }
    }

    /// The median of many.
    pub fn median(name: &'static str, unit: &'static str, better: Better, ours: &Samples) -> Self {
        let spread = ours.spread();
        Self { ours_spread: Some(spread), ..Self::new(name, unit, better, spread.p50) }
    }

    /// Beside the median of a peer's, taken in the same run.
    pub fn beside(mut self, peer_name: &'static str, peer: &Samples) -> Self {
        let spread = peer.spread();
        self.peer = Some(spread.p50);
        self.peer_name = Some(peer_name);
        self.ratio = Some(self.ours / spread.p50);
        self.peer_spread = Some(spread);
        self
    }

    /// What is aimed at.
    pub fn target(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }

    /// What else a reader has to know.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// Whether the target is met; `None` without one.
    fn met(&self) -> Option<bool> {
        let value = self.ratio.unwrap_or(self.ours);
        self.target.map(|target| match self.better {
            Better::Lower => value <= target,
            Better::Higher => value >= target,
        })
    }
}

/// A figure with what it was measured on, so that an entry says all even when it is taken out of its list.
#[derive(Serialize)]
struct Entry<'a> {
    #[serde(flatten)]
    figure: &'a Figure,
    run: &'a Machine,
}

/// Writes the list that DESIGN.md promises; `more`: behind what is there already.
pub fn write(path: &Path, figures: &[Figure], run: &Machine, more: bool) -> anyhow::Result<()> {
    let mut entries: Vec<serde_json::Value> = match more {
        true => serde_json::from_str(&std::fs::read_to_string(path)?)?,
        false => Vec::new(),
    };
    for figure in figures {
        entries.push(serde_json::to_value(Entry { figure, run })?);
    }
    let text = serde_json::to_string_pretty(&entries)?;
    std::fs::write(path, text + "\n").with_context(|| format!("can't write {}", path.display()))
}

/// The same for people.
pub fn table(figures: &[Figure]) -> String {
    let number = |value: Option<f64>| match value {
        Some(value) if value != 0.0 && value.abs() < 10.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.1}"),
        None => "-".to_owned(),
    };
    let mut text = format!(
        "{:<26} {:>9} {:>9} {:>7} {:>7} {:<4} {:<9} {:>8} {:>5}  {}\n",
        "figure", "ours", "peer", "ratio", "target", "", "unit", "p95", "n", "peer, notes"
    );
    for figure in figures {
        let target = match (figure.target, figure.better) {
            (Some(target), Better::Lower) => format!("<={}", number(Some(target))),
            (Some(target), Better::Higher) => format!(">={}", number(Some(target))),
            (None, _) => "-".to_owned(),
        };
        let met = match figure.met() {
            Some(true) => "met",
            Some(false) => "MISS",
            None => "",
        };
        let spread = figure.ours_spread;
        let words = [figure.peer_name.unwrap_or_default(), &figure.note];
        let words: Vec<&str> = words.into_iter().filter(|words| !words.is_empty()).collect();
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:<26} {:>9} {:>9} {:>7} {:>7} {:<4} {:<9} {:>8} {:>5}  {}",
            figure.name,
            number(Some(figure.ours)),
            number(figure.peer),
            number(figure.ratio),
            target,
            met,
            figure.unit,
            number(spread.map(|s| s.p95)),
            spread.map_or("-".to_owned(), |s| s.count.to_string()),
            words.join("; "),
        );
    }
    text
}
