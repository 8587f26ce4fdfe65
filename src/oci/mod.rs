//! The OCI runtime spec of a bot.
