//! The built `pleach` binary, driven as a user drives it. One test program, so that one link is paid.
#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

mod blocks;
mod browser;
mod cases;
mod commands;
mod cuda;
mod damaged;
mod docs;
mod kit;
mod page;
mod page_code;
mod page_scale;
mod real;
mod solvers;
mod train;
mod tune;
