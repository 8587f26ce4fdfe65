//! What the documents name exists: commands, paths, the bot of the README.

// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use berth::agent::cost::{Cost, FIELDS};
use berth::agent::floor;
use berth::api::condition::Reason;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// README.md and all Markdown under docs/.
fn documents() -> Vec<(PathBuf, String)> {
    let mut found = vec![PathBuf::from("README.md")];
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(repository().join(&folder)).into_iter().flatten().flatten() {
            let path = folder.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                found.push(path);
            }
        }
    }
    found.into_iter().map(|path| (path.clone(), read(path.to_str().unwrap()))).collect()
}

/// All that stands between back-ticks, in a fenced block or in an indented one.
fn code(text: &str) -> Vec<&str> {
    let mut code: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    for (i, part) in text.split("```").enumerate() {
        if i % 2 == 1 {
            code.push(part);
        } else {
            code.extend(part.split('`').skip(1).step_by(2));
        }
    }
    code
}

fn targets() -> BTreeSet<String> {
    let makefile = read("Makefile");
    let target = |line: &str| Some(line.split_once(':')?.0.to_owned());
    let documented = makefile.lines().filter(|line| line.contains(": ## "));
    documented.filter_map(target).collect()
}

#[test]
fn every_make_target_in_the_documents_exists() {
    let targets = targets();
    let mut named = 0;
    for (path, text) in documents() {
        for line in code(&text).into_iter().flat_map(str::lines) {
            for command in line.split("make ").skip(1) {
                let name: String = command.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
                assert!(targets.contains(&name), "{}: there is no `make {name}`", path.display());
                named += 1;
            }
        }
    }
    assert!(named >= 3, "found {named} commands only: the reading of the documents is broken");
}

#[test]
fn every_path_in_the_documents_exists() {
    let top: BTreeSet<String> =
        std::fs::read_dir(repository()).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    let mut named = 0;
    for (path, text) in documents() {
        for word in code(&text).into_iter().flat_map(str::split_whitespace) {
            let word = word.trim_end_matches(['.', ',', ':', ';', ')']).trim_start_matches("./");
            let Some((first, _)) = word.split_once('/') else { continue };
            // What is made, not kept, is in target/.
            if !top.contains(first) || first == "target" {
                continue;
            }
            assert!(repository().join(word).exists(), "{}: there is no {word}", path.display());
            named += 1;
        }
    }
    assert!(named >= 3, "found {named} paths only: the reading of the documents is broken");
}

#[test]
fn the_bot_of_the_readme_is_the_one_that_the_demo_applies() {
    let file = read("deploy/examples/web.yaml");
    let readme = read("README.md");
    let block = format!("```yaml\n{file}```");
    assert!(readme.contains(&block), "README.md must show deploy/examples/web.yaml as it is");
    assert!(read("hack/demo").contains("deploy/examples/web.yaml"));
}

#[test]
fn make_help_lists_every_target_that_is_a_promise() {
    let output = std::process::Command::new("make").arg("help").current_dir(repository()).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for name in ["help", "demo", "demo-down", "test", "fmt", "lint", "crds", "bench", "leaks"] {
        let listed = help.lines().any(|line| line.trim_start().starts_with(&format!("make {name} ")));
        assert!(listed, "make help does not list {name}:\n{help}");
    }
}

/// A page that is made from the source; `make docs` writes it.
fn assert_made(path: &str, text: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(repository().join(path), text).unwrap();
    }
    assert!(read(path) == text, "{path} is not what the source says: run `make docs` and commit");
}

#[test]
fn the_page_of_reasons_is_current() {
    let mut page = "# Reasons\n\nEvery reason of a condition or an Event, and what to do about it. Made from `src/api/condition.rs` by \
                    `make docs`; `kubectl berth reasons` prints the same, `kubectl berth explain NAME` those of one bot.\n\n\
                    | reason | what to do |\n| --- | --- |\n"
        .to_owned();
    for reason in Reason::ALL {
        writeln!(page, "| `{}` | {} |", reason.as_str(), reason.advice()).unwrap();
    }
    assert_made("docs/reasons.md", &page);
}

#[test]
fn the_page_of_costs_is_current() {
    let mut page = "# What a change of a field costs\n\nEvery field of a BotContainer's `spec`. Made by `make docs` from the table in \
                    `src/agent/cost.rs`, which the agent's plan reads too.\n\n| field | cost of a change |\n| --- | --- |\n"
        .to_owned();
    for (field, cost) in FIELDS {
        let cost = match cost {
            Cost::Nothing => "nothing: the process goes on",
            Cost::Live => "applied to the running process",
            Cost::Restart => "the process starts again on the same layer, with the same IP",
            Cost::NewLayer => "a new layer, with the data carried over",
            Cost::Refused => "refused, always or once the bot is placed",
        };
        writeln!(page, "| `{field}` | {cost} |").unwrap();
    }
    assert_made("docs/costs.md", &page);
}

#[test]
fn the_page_of_requirements_names_each_floor_and_each_escape() {
    let page = read("docs/requirements.md");
    let text = |version: floor::Version| version.map(|number| number.to_string()).join(".");
    for (what, version) in [("containerd", floor::CONTAINERD), ("runc", floor::RUNC)] {
        assert!(page.contains(&format!("| {what} | {} |", text(version))), "{what}");
    }
    for escape in floor::ESCAPES {
        let fixed: Vec<String> = escape.fixed_in.iter().copied().map(text).collect();
        let row = page.lines().find(|line| line.contains(escape.cve)).unwrap_or_else(|| panic!("{}", escape.cve));
        assert!(row.ends_with(&format!("| {} |", fixed.join(", "))), "{row}");
    }
}
