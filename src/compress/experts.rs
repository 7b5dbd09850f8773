//! MoEfication (Zhang et al. 2022): the neurons of a ReLU FFN are split into experts of equal size, a small router learns which
//! experts a token activates, and only those are executed. No gate factor: with all experts selected the result is the
//! dense FFN's.

pub mod convert;
pub mod drop;
pub mod relu;
pub mod report;
pub mod router;
pub mod split;

pub use convert::{convert, difference_with_all_experts, groups};
pub use drop::{Drop, Saliency};
pub use report::{BlockReport, Captured};
pub use router::{Loss, Router};
pub use split::{Split, balanced_clusters};

/// Neurons that move together, so that 2:4 groups of the out-projection stay whole.
pub const GROUP: usize = 4;
/// Expert sizes are multiples of this: 2:4 groups, int8 lanes and tiles stay whole.
pub const SIZE_MULTIPLE: usize = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Settings {
    /// Neurons per expert, a multiple of [`SIZE_MULTIPLE`].
    pub expert_size: usize,
    /// Share of the experts executed per token, at most.
    pub share: f64,
    pub split: Split,
    pub router: Router,
    pub loss: Loss,
    pub router_steps: usize,
    pub router_rate: f32,
    /// Of the selected experts only those are executed that the router expects to have more than this share of the most
    /// active one's activation; of the oracle, whose scores are sums of activations, more than this sum.
    pub threshold: Option<f32>,
    /// Of the random split.
    pub seed: u64,
}
