//! `berth diff`: all that changed between two versions of this node, for people on it.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

use super::changes::{Below, compare};
use super::manifest::{Item, Manifest, escape};

/// Writes a line a path, `Added`, `Modified` or `Removed` before it. Names that are no printable ASCII are escaped as in a manifest.
///
/// # Errors
/// A manifest can't be read, or nobody reads what is written.
pub fn diff(before: &Path, now: &Path, out: &mut impl Write) -> io::Result<()> {
    let (before, now) = (Manifest::load(before)?, Manifest::load(now)?);
    // The layers below are not looked at: what a whiteout says is gone was there, or the bot could not have removed it.
    let hidden: HashSet<Vec<u8>> =
        before.items.iter().chain(&now.items).filter(|item| item.is_whiteout()).map(Item::bytes).collect();
    let below = |path: &[u8]| hidden.contains(path).then_some(Below { mode: 0, owner: (0, 0) });
    for (path, change, _) in compare(Some(&before), &now, below) {
        writeln!(out, "{:<8} /{}", format!("{change:?}"), escape(&path))?;
    }
    Ok(())
}
