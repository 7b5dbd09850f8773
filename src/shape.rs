//! Shapes: runtime values, row-major, contiguous, with products checked once at construction.

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Highest rank a tensor may have.
pub const MAX_RANK: usize = 6;

/// Extents of a row-major tensor. The element count is known not to overflow.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    rank: u8,
    dims: [usize; MAX_RANK],
}

impl Shape {
    /// Errors when the rank is above [`MAX_RANK`] or the element count leaves 2^31 - 1: shaders index with 32 bits.
    pub fn new(dims: &[usize]) -> Result<Self> {
        let broken = |rule| Error::Shape { op: "shape", rule, got: format!("{dims:?}") };
        if dims.len() > MAX_RANK {
            return Err(broken("rank at most 6"));
        }
        // A zero extent must not hide an absurd one, so the product runs over max(d, 1).
        let product = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
        match product {
            Some(n) if n <= i32::MAX as usize => {}
            _ => return Err(broken("product of extents below 2^31")),
        }
        let mut all = [0; MAX_RANK];
        all[..dims.len()].copy_from_slice(dims);
        Ok(Self { rank: dims.len() as u8, dims: all })
    }

    pub fn scalar() -> Self {
        Self { rank: 0, dims: [0; MAX_RANK] }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Number of elements; 1 for a scalar.
    pub fn count(&self) -> usize {
        self.dims().iter().product()
    }

    /// Extent of the last axis; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Number of rows when the last axis is a row; 0 when the tensor is empty.
    pub fn rows(&self) -> usize {
        if self.rank == 0 { 1 } else { self.dims[..self.rank as usize - 1].iter().product() }
    }

    /// The same shape with another last extent.
    pub fn with_last(&self, last: usize) -> Result<Self> {
        let mut dims = self.dims().to_vec();
        match dims.last_mut() {
            Some(d) => *d = last,
            None => dims.push(last),
        }
        Self::new(&dims)
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// What is known of a tensor without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Meta {
    pub shape: Shape,
    pub dtype: DType,
}

impl Meta {
    pub fn new(dims: &[usize], dtype: DType) -> Result<Self> {
        Ok(Self { shape: Shape::new(dims)?, dtype })
    }

    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    pub fn count(&self) -> usize {
        self.shape.count()
    }

    pub fn bytes(&self) -> usize {
        self.count() * self.dtype.size()
    }
}

impl std::fmt::Display for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

/// "f32[2, 3] u32[2]": the way every error message lists its operands.
pub fn list(metas: &[Meta]) -> String {
    metas.iter().map(Meta::to_string).collect::<Vec<_>>().join(" ")
}
