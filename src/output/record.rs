//! From bytes to records of the CRI log format and back. Pure: no IO, no clock.
//!
//! ```text
//! 2026-11-24T10:00:00.123456789Z stdout F text of a whole line, or of the end of one
//! 2026-11-24T10:00:00.123456789Z stderr P text of a part; more of the line follows in this stream
//! ```
//!
//! As kubelet's log files: KEP "CRI log format", `kuberuntime/logs` in Kubernetes. The text is raw: bytes that are no UTF-8 stay
//! as they are. The header has a fixed length ([`HEADER`]), which makes dropped output countable by looking at records.

use std::io::BufRead as _;

/// The most bytes of a bot's text in one record; what containerd's CRI and kubelet use.
pub const MAX_TEXT: usize = 16 * 1024;

/// Bytes before the text: 30 of time, 6 of stream, 1 of tag, and 3 blanks.
pub const HEADER: usize = TIME + 1 + 6 + 1 + 1 + 1;

/// The most bytes of one record, its newline included.
pub const MAX_RECORD: usize = HEADER + MAX_TEXT + 1;

const TIME: usize = 30;

/// Which of the two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Stream {
    /// The word in the record and the FIFO's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Whether the line ends with this record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    /// It does.
    Full,
    /// More follows.
    Partial,
}

/// A time as all records have it: RFC 3339 in UTC with nine digits after the point, 30 bytes. Go's `RFC3339Nano` parses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp([u8; TIME]);

impl Stamp {
    /// The stamp of a time.
    pub fn of(time: jiff::Timestamp) -> Self {
        use std::io::Write as _;
        let mut bytes = *b"0000-00-00T00:00:00.000000000Z";
        // Years beyond 9999 and before 0 would be longer; a clock so wrong keeps the zeros rather than break the format.
        let _ = write!(bytes.as_mut_slice(), "{time:.9}");
        if bytes[TIME - 1] != b'Z' || bytes[4] != b'-' {
            bytes = *b"0000-00-00T00:00:00.000000000Z";
        }
        Self(bytes)
    }
}

/// Appends one record. `head` and `tail` together are its text.
pub fn write(out: &mut Vec<u8>, stamp: &Stamp, stream: Stream, tag: Tag, head: &[u8], tail: &[u8]) {
    let mut header = [b' '; HEADER];
    header[..TIME].copy_from_slice(&stamp.0);
    header[TIME + 1..TIME + 7].copy_from_slice(stream.as_str().as_bytes());
    header[TIME + 8] = match tag {
        Tag::Full => b'F',
        Tag::Partial => b'P',
    };
    out.extend_from_slice(&header);
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

/// Cuts one stream into the texts of records. Holds the bytes of the unfinished line, at most [`MAX_TEXT`].
#[derive(Debug, Default)]
pub struct Splitter {
    held: Vec<u8>,
}

impl Splitter {
    /// Takes the next bytes and gives each text that they complete, as two slices that belong together. How the bytes are
    /// cut into calls makes no difference.
    pub fn push(&mut self, mut bytes: &[u8], mut record: impl FnMut(Tag, &[u8], &[u8])) {
        while !bytes.is_empty() {
            let room = MAX_TEXT - self.held.len();
            // One byte beyond: a line of exactly MAX_TEXT bytes is whole, only a byte more makes it two records.
            let window = &bytes[..bytes.len().min(room + 1)];
            let (tag, used) = match line_length(window) {
                Some(at) => (Tag::Full, at),
                None if window.len() > room => (Tag::Partial, room),
                None => {
                    self.held.extend_from_slice(window);
                    return;
                }
            };
            record(tag, &self.held, &bytes[..used]);
            // Frees it: at rest a bot holds no memory here.
            self.held = Vec::new();
            bytes = &bytes[used + usize::from(tag == Tag::Full)..];
        }
    }

    /// Gives what is held as a part of a line: its rest waited too long, or none will come.
    pub fn flush(&mut self, mut record: impl FnMut(Tag, &[u8], &[u8])) {
        if !self.held.is_empty() {
            record(Tag::Partial, &self.held, &[]);
            self.held = Vec::new();
        }
    }

    /// Whether an unfinished line is held.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
}

/// Bytes before the first newline.
fn line_length(bytes: &[u8]) -> Option<usize> {
    // `skip_until` is the standard library's way to its memchr.
    let used = (&mut &*bytes).skip_until(b'\n').unwrap_or(0);
    (used > 0 && bytes[used - 1] == b'\n').then(|| used - 1)
}

/// How many bytes of a bot's output whole records hold. The newline of a whole line is the bot's, that of a part is ours.
pub fn payload(records: &[u8]) -> u64 {
    records
        .split_inclusive(|&b| b == b'\n')
        .map(|r| r.len().saturating_sub(HEADER + usize::from(is_partial(r))))
        .sum::<usize>() as u64
}

fn is_whole(record: &[u8]) -> bool {
    record.len() > HEADER
        && record.ends_with(b"\n")
        && matches!(&record[TIME..HEADER - 2], b" stdout " | b" stderr ")
        && matches!(&record[HEADER - 2..HEADER], b"F " | b"P ")
}

fn is_partial(record: &[u8]) -> bool {
    record.get(HEADER - 2) == Some(&b'P')
}

/// The text of records, both streams in order, headers stripped: at most the last `max` bytes, cut at a character's boundary, bytes
/// that are no UTF-8 replaced. Records older than `since` and those that are no records are left out.
pub fn text(records: &[u8], since: Option<&Stamp>, max: usize) -> String {
    let mut bytes = Vec::new();
    let mut unfinished: Option<&[u8]> = None;
    for record in records.split_inclusive(|&b| b == b'\n') {
        if !is_whole(record) || since.is_some_and(|since| record[..TIME] < since.0[..]) {
            continue;
        }
        let stream = &record[TIME + 1..TIME + 7];
        // The other stream breaks in upon an unfinished line.
        if unfinished.is_some_and(|other| other != stream) {
            bytes.push(b'\n');
        }
        unfinished = is_partial(record).then_some(stream);
        bytes.extend_from_slice(&record[HEADER..record.len() - usize::from(unfinished.is_some())]);
    }
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_end_matches('\n');
    let start = text.len().saturating_sub(max);
    let start = (start..=text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Texts = Vec<(Tag, Vec<u8>)>;

    fn split(chunks: &[&[u8]]) -> (Texts, bool) {
        let mut texts = Texts::new();
        let mut splitter = Splitter::default();
        for chunk in chunks {
            splitter.push(chunk, |tag, head, tail| texts.push((tag, [head, tail].concat())));
        }
        (texts, splitter.is_holding())
    }

    fn stamp() -> Stamp {
        Stamp::of("2026-11-24T10:00:00.5Z".parse().unwrap())
    }

    #[test]
    fn a_stamp_has_nine_digits_and_a_broken_clock_does_not_break_the_format() {
        assert_eq!(&stamp().0, b"2026-11-24T10:00:00.500000000Z");
        for time in [jiff::Timestamp::MIN, jiff::Timestamp::MAX, jiff::Timestamp::UNIX_EPOCH] {
            let stamp = Stamp::of(time);
            let text = std::str::from_utf8(&stamp.0).unwrap();
            assert!(text.len() == 30 && text.ends_with('Z'), "{time}: {text}");
        }
    }

    #[test]
    fn lines_of_the_limit_are_whole_and_longer_ones_are_cut() {
        for (length, wanted) in [
            (0, vec![(Tag::Full, 0)]),
            (MAX_TEXT - 1, vec![(Tag::Full, MAX_TEXT - 1)]),
            (MAX_TEXT, vec![(Tag::Full, MAX_TEXT)]),
            (MAX_TEXT + 1, vec![(Tag::Partial, MAX_TEXT), (Tag::Full, 1)]),
            (3 * MAX_TEXT, vec![(Tag::Partial, MAX_TEXT), (Tag::Partial, MAX_TEXT), (Tag::Full, MAX_TEXT)]),
        ] {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            let (texts, holding) = split(&[&line]);
            let lengths: Vec<_> = texts.iter().map(|(tag, text)| (*tag, text.len())).collect();
            assert_eq!(lengths, wanted, "a line of {length} bytes");
            assert!(!holding);
        }
    }

    #[test]
    fn text_strips_joins_and_cuts() {
        let mut out = Vec::new();
        write(&mut out, &stamp(), Stream::Stdout, Tag::Partial, b"a long ", b"");
        write(&mut out, &stamp(), Stream::Stdout, Tag::Full, b"", b"line");
        write(&mut out, &stamp(), Stream::Stdout, Tag::Partial, b"cut in", b"");
        write(&mut out, &stamp(), Stream::Stderr, Tag::Full, b"\xff is no UTF-8, \xc3\xa4 is", b"");
        assert_eq!(text(&out, None, 100), "a long line\ncut in\n\u{fffd} is no UTF-8, ä is");
        assert_eq!(text(&out, None, 4), " is", "ä has two bytes, half of it is not taken");
        assert_eq!(text(&out, None, 5), "ä is");
        assert_eq!(text(&out[7..], None, 100), "line\ncut in\n\u{fffd} is no UTF-8, ä is", "a cut record is skipped");
        let later = Stamp::of("2026-11-24T10:00:01Z".parse().unwrap());
        assert_eq!(text(&out, Some(&later), 100), "");
        assert_eq!(payload(&out), 7 + 5 + 6 + 21);
    }

    proptest! {
        #[test]
        fn how_bytes_are_cut_into_reads_makes_no_difference(
            lines in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), 0usize..3 * MAX_TEXT), 0..6),
            cuts in proptest::collection::vec(0usize..100_000, 0..12),
            ended in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            for (odd, length) in &lines {
                bytes.extend_from_slice(odd);
                bytes.extend(std::iter::repeat_n(b'x', *length));
                bytes.push(b'\n');
            }
            if !ended { bytes.pop(); }
            let mut cuts: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
            cuts.sort_unstable();
            let mut chunks: Vec<&[u8]> = Vec::new();
            let mut from = 0;
            for cut in cuts {
                chunks.push(&bytes[from..cut]);
                from = cut;
            }
            chunks.push(&bytes[from..]);
            let (whole, whole_holds) = split(&[&bytes]);
            prop_assert_eq!(split(&chunks), (whole.clone(), whole_holds));

            // And nothing is lost or added: the texts, newlines put back, are the bytes.
            let mut splitter = Splitter::default();
            let (mut back, mut out) = (Vec::new(), Vec::new());
            let mut record = |tag, head: &[u8], tail: &[u8]| {
                write(&mut out, &stamp(), Stream::Stdout, tag, head, tail);
                back.extend_from_slice(head);
                back.extend_from_slice(tail);
                if tag == Tag::Full { back.push(b'\n'); }
            };
            splitter.push(&bytes, &mut record);
            splitter.flush(&mut record);
            prop_assert_eq!(payload(&out), bytes.len() as u64);
            prop_assert_eq!(back, bytes);
        }
    }
}
