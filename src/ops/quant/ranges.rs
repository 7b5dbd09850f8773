//! Launches of the observers.

use super::BLOCK;
use crate::kernel::{Launch, Params, Problem};

/// How kernels make grids; 0 and 1 are ranges of symmetric and asymmetric schemes.
pub(in crate::ops) mod mode {
    /// One step per group.
    pub const STEPS: u32 = 2;
    /// One step for all groups.
    pub const ONE_STEP: u32 = 3;
    /// (step that elements are divided by, scale) per group.
    pub const MEANS: u32 = 4;
}

/// Launches that write what the grid of every group of argument 0 follows from, two words a group, to argument `target`; as
/// [`range_launches`].
pub(in crate::ops) fn own_launches(p: &Problem, target: usize, parts: usize) -> (Vec<Launch>, usize) {
    let params = p.params();
    let [count, length, mode] = [0, 1, 2].map(|i| params.words()[i]);
    if mode == mode::MEANS {
        let means = Launch::linear((count / length) as usize, BLOCK, params).entry("observe_means");
        return (vec![means.slots(&[0, target]).trips(length as usize)], 4);
    }
    range_launches(count as usize, length as usize, false, target, parts)
}

/// Launches that write the range of every group of argument 0 to argument `target`, by way of argument `parts` where
/// groups are long; and the bytes `parts` needs.
pub(in crate::ops) fn range_launches(
    count: usize,
    length: usize,
    absolute: bool,
    target: usize,
    parts: usize,
) -> (Vec<Launch>, usize) {
    const PART: usize = 1024;
    const MAX_PARTS: usize = 50_000;
    let groups = count / length;
    // A multiple of eight, so that parts of aligned groups are aligned.
    let part = if length <= 4 * PART { length } else { PART.max(length.div_ceil(MAX_PARTS).next_multiple_of(8)) };
    let each = length.div_ceil(part);
    let words =
        |part: usize, each: usize, absolute: bool| Params::new().u(count).u(length).flag(absolute).u(part).u(each);
    let first = |target: usize, absolute: bool| {
        Launch::linear(groups * each, BLOCK, words(part, each, absolute))
            .entry("observe_fwd")
            .slots(&[0, target])
            .trips(part)
    };
    if each == 1 {
        return (vec![first(target, absolute)], 4);
    }
    let fold = Launch::linear(groups, BLOCK, words(part, each, absolute)).entry("observe_fold");
    (vec![first(parts, false), fold.slots(&[parts, target]).trips(each)], groups * each * 8)
}
