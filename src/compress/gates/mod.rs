//! Structures whose gates are learned (CoFi, Xia et al. 2022): hard concrete gates (Louizos et al. 2018) on sublayers, heads,
//! neurons and channels at once, an expected size that a Lagrangian holds to a target, and at the end a decision for each
//! gate and a model that is as small.

mod cofi;
mod cost;
mod decision;
mod hook;
mod latency;
mod layout;

pub use cofi::{Cofi, MULTIPLIERS, Settings, Small};
pub use cost::{Costs, Curve};
pub use decision::{Decision, decide, out_of_reach, shrink, soft};
pub use hook::{Gates, Phase};
pub use latency::LatencyTable;
pub use layout::{Attention, Ffn, Layout, Level};
