//! Networks of bots.
