//! Training: rows of ids in, metrics, checkpoints and an adapter folder out.
//!
//! [`train`] is the whole run, [`step`] one optimizer step; both work on a [`Machine`], which a session is when its plan
//! has the entries `accumulate` and `update`. No text is known here.

mod adapter;
mod calibrate;
pub mod checkpoint;
mod data;
mod events;
mod initial;
mod machine;
mod metrics;
mod ranks;
mod run;
mod schedule;
mod step;

pub use adapter::{AdapterPlan, Init, Norms, Scores, TensorPlan, UnitWeight};
pub use calibrate::{Look, calibrate};
pub use data::{IGNORED, MicroBatch, Order, RowReport, Rows};
pub use events::{Events, Moment};
pub use initial::{Measured, initial_values};
pub use machine::Machine;
pub use metrics::{Lines, Metrics};
pub use ranks::{Kept, SiteRanks};
pub use run::{EVALS, Event, Job, METRICS, Resume, Summary, holds_results, remove_results, train};
pub use schedule::{Schedule, Warmup};
pub use step::{Settings, Stepped, evaluate, step, step_with};
