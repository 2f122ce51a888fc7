//! The built `pleach` binary, driven as a user drives it. One test program, so that one link is paid.

mod cases;
mod commands;
mod damaged;
mod kit;
