//! Charts as inline SVG. Colours, fonts and weights are CSS classes of the page, so that one picture serves light and
//! dark, which a plotting crate, fixing its colours, cannot do. Everything written comes through [`svg::Svg`], which
//! escapes text.

mod curves;
mod gantt;
mod heatmap;
mod latency;
mod scale;
mod svg;
mod waterfall;

pub(super) use curves::loss_curve;
pub use gantt::gantt;
pub(super) use heatmap::sparsity;
pub(super) use latency::latency;
pub(super) use waterfall::waterfall;

/// Width of a full-width chart and of a half-width one, in CSS pixels.
const FULL: f64 = 1080.0;
const HALF: f64 = 508.0;
/// Height of a row of horizontal bars.
const ROW: f64 = 34.0;
/// Width of the column of stage names.
const NAMES: f64 = 228.0;
