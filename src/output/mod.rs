//! Output of bots.
