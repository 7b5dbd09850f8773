//! Pruning of weights on the training's life-cycle: a criterion ranks units of a pattern, a scope says what they are
//! compared with, a curve says how many go when. Masks live in the optimizer.

pub mod calibration;
pub mod curve;
pub mod fisher;
pub mod gates;
pub mod held;
pub mod learned;
pub mod movement;
pub mod pattern;
pub mod pruner;
pub mod score;
pub mod selection;
pub mod sparsegpt;
pub mod wanda;

pub use curve::{Curve, Timing};
pub use held::Held;
pub use learned::Learned24;
pub use movement::{Binariser, Movement};
pub use pattern::Pattern;
pub use pruner::{Criterion, Pruner, Settings, Work, prunable};
pub use selection::Scope;
