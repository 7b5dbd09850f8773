//! What lives and dies together: single weights, blocks, rows, columns, or two of every four.

use serde::{Deserialize, Serialize};

use crate::compress::written;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::binary::ADD;
use crate::ops::layout::{Fill, Permute};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Function, Unary};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Units of a weight `[n, k]` (experts `[E, n, k]` as `[E n, k]`) that are kept or pruned as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Pattern {
    Unstructured,
    /// Blocks of this many rows and columns; they divide n and k.
    Block {
        rows: usize,
        columns: usize,
    },
    /// Whole output rows.
    Row,
    /// Whole input columns.
    Column,
    /// The two best of every four neighbours of a row: exact, lower index first on ties.
    #[default]
    #[serde(alias = "one_dimensional")]
    TwoFour,
    /// Two in each row and column of every 4 x 4 block: the best of the 90 patterns.
    #[serde(rename = "two_four_2d", alias = "two_dimensional")]
    TwoFour2d,
    /// As `TwoFour2d` by the greedy search of earlier systems, which may keep 7 of 8.
    #[serde(rename = "two_four_2d_greedy")]
    TwoFour2dGreedy,
    /// As `TwoFour2dGreedy`, with the best pattern where greedy stopped at 7.
    #[serde(rename = "two_four_2d_filled")]
    TwoFour2dFilled,
}

impl Pattern {
    /// Whether two of every four are kept, so that the weight fits the 2:4 kernels.
    pub fn is_24(self) -> bool {
        matches!(self, Pattern::TwoFour | Pattern::TwoFour2d | Pattern::TwoFour2dGreedy | Pattern::TwoFour2dFilled)
    }

    /// Whether the transpose is 2:4 too.
    pub fn is_two_dimensional(self) -> bool {
        self.is_24() && self != Pattern::TwoFour
    }

    /// Rows and columns of one unit of a weight `[n, k]`.
    pub fn unit(self, [n, k]: [usize; 2]) -> [usize; 2] {
        match self {
            Pattern::Block { rows, columns } => [rows, columns],
            Pattern::Row => [1, k],
            Pattern::Column => [n, 1],
            _ => [1, 1],
        }
    }

    /// Whether a weight `[n, k]` consists of whole units.
    pub fn divides(self, dims: [usize; 2]) -> bool {
        let unit = if self.is_two_dimensional() { [4, 4] } else { self.unit(dims) };
        let unit = if self == Pattern::TwoFour { [1, 4] } else { unit };
        dims.iter().zip(unit).all(|(&extent, unit)| unit > 0 && extent > 0 && extent.is_multiple_of(unit))
    }

    /// The grid of units of a weight `[n, k]`.
    ///
    /// # Errors
    /// `Error::Shape` where the weight is not made of whole units.
    pub fn grid(self, dims: [usize; 2]) -> Result<[usize; 2]> {
        if !self.divides(dims) {
            let got = format!("{dims:?} for {}", written(&self));
            return Err(Error::Shape { op: "pruning pattern", rule: "a weight [n, k] of whole units", got });
        }
        let [rows, columns] = self.unit(dims);
        Ok([dims[0] / rows, dims[1] / columns])
    }

    /// Scores of units, f32 of the grid's shape: the mean over each unit of scores f32 `[n, k]`.
    pub fn pool(self, scores: &Tensor) -> Result<Tensor> {
        let dims = matrix_dims(scores);
        let [r, c] = self.grid(dims)?;
        let [rows, columns] = self.unit(dims);
        if [rows, columns] == [1, 1] {
            return scores.reshape(&dims);
        }
        let blocks = scores.reshape(&[r, rows, c, columns])?;
        let blocks = dispatch::run_one(&Permute { order: vec![0, 2, 1, 3] }, &[&blocks])?;
        let mean = Reduce { function: ReduceFunction::Mean, axis: Axis::Last };
        dispatch::run_one(&mean, &[&blocks.reshape(&[r * c, rows * columns])?])?.reshape(&[r, c])
    }

    /// The mask f32 `[n, k]` of a grid of zeros and ones.
    pub fn expand(self, units: &Tensor, dims: [usize; 2]) -> Result<Tensor> {
        let [r, c] = self.grid(dims)?;
        let [rows, columns] = self.unit(dims);
        if [rows, columns] == [1, 1] {
            return units.reshape(&dims);
        }
        let ones = ones(units, &[rows * columns, 1])?;
        // Products of zeros and ones: exact.
        let blocks = dispatch::run_one(&Matmul::linear(), &[&units.reshape(&[r * c, 1])?, &ones])?;
        let blocks = blocks.reshape(&[r, c, rows, columns])?;
        dispatch::run_one(&Permute { order: vec![0, 2, 1, 3] }, &[&blocks])?.reshape(&dims)
    }
}

/// Any weight as rows: `[.., k]` as `[rows, k]`.
pub fn matrix_dims(tensor: &Tensor) -> [usize; 2] {
    [tensor.shape().rows(), tensor.shape().last()]
}

fn ones(beside: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let fill = Fill { value: 1.0, dims: Shape::new(dims)?, dtype: DType::F32 };
    dispatch::one(dispatch::run_on(beside.device(), &fill, &[])?, "ones")
}

/// |x| as relu(x) + relu(-x).
pub fn absolute(x: &Tensor) -> Result<Tensor> {
    let relu = |x: &Tensor| dispatch::run_one(&Unary(Function::Relu), &[x]);
    let negative = dispatch::run_one(&Unary(Function::Scale(-1.0)), &[x])?;
    dispatch::run_one(&ADD, &[&relu(x)?, &relu(&negative)?])
}
