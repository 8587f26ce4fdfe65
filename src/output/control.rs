//! The few words that agent and logger exchange over `RUN_DIR/logger.sock`: one line each way, in text.
//!
//! ```text
//! open ID      the bot's FIFOs are open and drained from now on      ok IDENTITY
//! flush ID     what was in the FIFOs is in the log, parts too        ok IDENTITY
//! close ID     the same, and the FIFOs are let go                    ok IDENTITY
//! hello        nothing                                               ok IDENTITY
//! quit         all is drained, the pair ends                         the end of the stream
//! ```
//!
//! Instead of `ok` there may be `error WORDS`. The identity says which build with which settings answers, so that an agent can tell that it has to replace the pair.

use crate::api::ids::ContainerId;

/// Longest line either way, its newline included.
pub const MAX_LINE: usize = 1024;

/// To be raised when the files on disk or these words change their meaning.
pub const PROTOCOL: u32 = 1;

/// What is asked of the logger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Drain this bot. Safe again.
    Open(ContainerId),
    /// Write what is there.
    Flush(ContainerId),
    /// Write what is there and drain no more. Safe again, and for a bot that is not known.
    Close(ContainerId),
    /// Who is there?
    Hello,
    /// End in good order.
    Quit,
}

impl Request {
    /// The line, its newline included.
    pub fn line(&self) -> String {
        match self {
            Self::Open(id) => format!("open {id}\n"),
            Self::Flush(id) => format!("flush {id}\n"),
            Self::Close(id) => format!("close {id}\n"),
            Self::Hello => "hello\n".to_owned(),
            Self::Quit => "quit\n".to_owned(),
        }
    }

    /// Reads a line without its newline; `None` for one that is not understood.
    pub fn parse(line: &str) -> Option<Self> {
        let id = |text: &str| Some(ContainerId::uid_of(text)?.container_id());
        match line.split_once(' ') {
            Some(("open", rest)) => Some(Self::Open(id(rest)?)),
            Some(("flush", rest)) => Some(Self::Flush(id(rest)?)),
            Some(("close", rest)) => Some(Self::Close(id(rest)?)),
            None if line == "hello" => Some(Self::Hello),
            None if line == "quit" => Some(Self::Quit),
            _ => None,
        }
    }
}

/// The line that answers: done, or why not in one line of text.
pub fn answer(identity: &str, done: &Result<(), String>) -> String {
    match done {
        Ok(()) => format!("ok {identity}\n"),
        Err(words) => format!("error {}\n", words.replace('\n', " ")),
    }
}

/// Reads an answer without its newline: the identity, or the words of the refusal. `None` for what is neither.
pub fn parse_answer(line: &str) -> Option<Result<&str, &str>> {
    match line.split_once(' ')? {
        ("ok", identity) => Some(Ok(identity)),
        ("error", words) => Some(Err(words)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ids::BotUid;

    #[test]
    fn what_is_asked_is_what_is_understood() {
        let id = BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap().container_id();
        for request in
            [Request::Open(id.clone()), Request::Flush(id.clone()), Request::Close(id), Request::Hello, Request::Quit]
        {
            let line = request.line();
            assert!(line.len() <= MAX_LINE);
            assert_eq!(Request::parse(line.trim_end()), Some(request));
        }
        for line in ["", "open", "open ../../etc", "open berth-x", "hello x", "quit x", "OPEN x"] {
            assert_eq!(Request::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn an_answer_stays_one_line() {
        assert_eq!(parse_answer(answer("1 0.1.0", &Ok(())).trim_end()), Some(Ok("1 0.1.0")));
        let refused = answer("", &Err("two\nlines".to_owned()));
        assert_eq!(parse_answer(refused.trim_end()), Some(Err("two lines")));
        assert_eq!(parse_answer("nonsense"), None);
    }
}
