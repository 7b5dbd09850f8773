//! Sizes of large models, for GPUs: what `kernels bench --sizes gpu` times.
//!
//! The f64 reference would take hours on them. It does not need to see all of a case: every case names parts, smaller
//! problems of the same op whose results are known elements of the large one's. A product is checked on some rows and
//! columns over the whole reduction, attention on some queries against all keys, and so on.

use std::sync::Arc;

use crate::dtype::DType;
use crate::op::{Case, Fill, Op};

mod dense;
mod desk;
pub mod growth;
mod losses;
mod reduced;
mod rows;

/// Sizes at which libraries for CPUs are compared: what `kernels bench --sizes cpu` times.
pub use desk::cases as cpu_cases;

/// Which indices of an axis a part keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// This many, spread over the axis with its first and last.
    Spread(usize),
    /// This many, spread over the first half of the axis, and those half the axis behind them: gates and values.
    Halves(usize),
    First(usize),
    /// Neighbours around the middle.
    Middle(usize),
    Last(usize),
}

impl Pick {
    pub fn indices(self, extent: usize) -> Vec<usize> {
        match self {
            Pick::Spread(count) if count >= extent => (0..extent).collect(),
            Pick::Spread(count) => (0..count).map(|i| i * (extent - 1) / (count - 1).max(1)).collect(),
            Pick::Halves(count) => {
                let first = Pick::Spread(count).indices(extent / 2);
                first.iter().copied().chain(first.iter().map(|i| i + extent / 2)).collect()
            }
            Pick::First(count) => (0..count.min(extent)).collect(),
            Pick::Middle(count) => (extent / 2..extent.min(extent / 2 + count)).collect(),
            Pick::Last(count) => (extent.saturating_sub(count)..extent).collect(),
        }
    }
}

/// An axis and what is kept of it; axes that are not named are kept whole.
pub type Cut = (usize, Pick);

/// A smaller problem whose outputs are elements of the large one's.
#[derive(Clone, Debug)]
pub struct Part {
    /// The op of the smaller problem where it differs: positions may have moved.
    pub op: Option<Arc<dyn Op>>,
    /// By input.
    pub inputs: Vec<Vec<Cut>>,
    /// By output; `None` where the smaller problem's output is no part of the large one's.
    pub outputs: Vec<Option<Vec<Cut>>>,
}

impl Part {
    fn new(inputs: &[&[Cut]], outputs: &[Option<&[Cut]>]) -> Self {
        let inputs = inputs.iter().map(|cuts| cuts.to_vec()).collect();
        Self { op: None, inputs, outputs: outputs.iter().map(|cuts| cuts.map(<[Cut]>::to_vec)).collect() }
    }

    fn of(self, op: impl Op) -> Self {
        Self { op: Some(Arc::new(op)), ..self }
    }
}

/// A case of a large model's size.
#[derive(Clone, Debug)]
pub struct Large {
    /// What belongs on one page of a report.
    pub group: &'static str,
    /// For people; a forward case and its backward have the same.
    pub name: String,
    pub case: Case,
    pub parts: Vec<Part>,
}

impl Large {
    fn new(group: &'static str, name: String, case: Case, parts: Vec<Part>) -> Self {
        Self { group, name, case, parts }
    }
}

const BF16: DType = DType::Bf16;
const F32: DType = DType::F32;

/// Row weights and positive scales of order one, none of them zero: a masked row would be work not done.
const POSITIVE: Fill = Fill::Uniform { low: 0.25, high: 1.25 };

/// Any index below `extent`.
fn below(extent: usize) -> Fill {
    Fill::Integers { low: 0, high: extent as i64 - 1 }
}

/// Every case, bandwidth first, in the order in which a run that is cut short is worth most.
pub fn cases() -> Vec<Large> {
    [
        rows::ceilings(),
        rows::norms(),
        rows::softmax(),
        losses::entropies(),
        losses::distillation(),
        rows::optimizer(),
        dense::products(),
        dense::blocks(),
        dense::attention(),
        losses::linear(),
        reduced::sparse(),
        reduced::narrow(),
        reduced::experts(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Meta, Shape};

    #[test]
    fn picks_stay_on_the_axis() {
        assert_eq!(Pick::Spread(3).indices(11), [0, 5, 10]);
        assert_eq!(Pick::Spread(1).indices(11), [0]);
        assert_eq!(Pick::Spread(4).indices(2), [0, 1]);
        assert_eq!(Pick::Halves(2).indices(8), [0, 3, 4, 7]);
        assert_eq!(Pick::First(4).indices(2), [0, 1]);
        assert_eq!(Pick::Middle(2).indices(8), [4, 5]);
        assert_eq!(Pick::Last(2).indices(8), [6, 7]);
    }

    /// Every part is a problem its op accepts, with outputs of the shape of the cut ones, and every output of every
    /// case is covered by some part.
    #[test]
    fn parts_are_problems_of_their_op() {
        let cut = |meta: &Meta, cuts: &[Cut]| {
            let mut dims = meta.dims().to_vec();
            for (axis, pick) in cuts {
                dims[*axis] = pick.indices(dims[*axis]).len();
            }
            Meta { shape: Shape::new(&dims).unwrap(), dtype: meta.dtype }
        };
        let mut labels = std::collections::BTreeSet::new();
        let of = |list: &'static str, cases: Vec<Large>| cases.into_iter().map(move |case| (list, case));
        for (list, Large { case, parts, .. }) in of("gpu", cases()).chain(of("cpu", cpu_cases())) {
            // A case without parts is checked whole.
            if parts.is_empty() {
                continue;
            }
            let label = case.label();
            assert!(labels.insert((list, case.op.name(), label.clone())), "{label} stands twice");
            let inputs = case.metas();
            let outputs = case.op.infer(&inputs).unwrap_or_else(|e| panic!("{label}: {e}"));
            let mut covered = vec![false; outputs.len()];
            for part in &parts {
                assert_eq!((part.inputs.len(), part.outputs.len()), (inputs.len(), outputs.len()), "{label}");
                let small: Vec<Meta> = inputs.iter().zip(&part.inputs).map(|(m, cuts)| cut(m, cuts)).collect();
                let op = part.op.as_ref().unwrap_or(&case.op);
                let results = op.infer(&small).unwrap_or_else(|e| panic!("part of {label}: {e}"));
                for (i, cuts) in part.outputs.iter().enumerate() {
                    if let Some(cuts) = cuts {
                        assert_eq!(results[i], cut(&outputs[i], cuts), "output {i} of a part of {label}");
                        covered[i] = true;
                    }
                }
            }
            assert!(covered.iter().all(|c| *c), "{label}: outputs {covered:?}");
        }
    }
}
