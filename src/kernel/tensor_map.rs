//! Tensors as the copy engine of compute capability 9.0 sees them: what a plan gives a kernel for boxes of an argument.

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Bytes of a row of a box: the turn of 16-byte chunks that `cuda/wgmma.cuh` relies on goes over so many.
pub const ROW_BYTES: usize = 128;

/// Boxes of a tensor of planes, rows and elements, innermost first. Rows of a box lie in shared memory one after another, 128
/// bytes each, their chunks turned; what lies outside of the tensor reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// The slot of the launch whose memory it describes.
    pub slot: usize,
    pub element: DType,
    /// Elements of a row, rows of a plane, planes.
    pub dims: [usize; 3],
    /// Elements from row to row and from plane to plane.
    pub strides: [usize; 2],
    /// Rows of a box; it is 128 bytes wide and lies in one plane.
    pub rows: usize,
}

impl TensorMap {
    /// Bytes from row to row and from plane to plane.
    pub fn byte_strides(&self) -> [u64; 2] {
        self.strides.map(|s| s as u64 * self.element.size() as u64)
    }

    /// The box, innermost first.
    pub fn tile(&self) -> [u32; 3] {
        [(ROW_BYTES / self.element.size()) as u32, self.rows as u32, 1]
    }

    /// Holds the map against the copy engine's rules and the `bytes` of its argument, which starts at `address`.
    ///
    /// # Errors
    /// `Launch` with the first rule that is broken.
    pub fn check(&self, kernel: &str, address: u64, bytes: usize) -> Result<()> {
        let refuse = |what, got: u64, limit: u64| {
            Err(Error::Launch { kernel: format!("{kernel}, tensor map"), what, got, limit })
        };
        for &extent in &self.dims {
            if extent == 0 || extent > u32::MAX as usize {
                return refuse("extent, which is above 0 as well", extent as u64, u64::from(u32::MAX));
            }
        }
        if self.rows == 0 || self.rows > 256 {
            return refuse("rows of a box, which are above 0 as well", self.rows as u64, 256);
        }
        for value in [address, self.byte_strides()[0], self.byte_strides()[1]] {
            if value % 16 != 0 {
                return refuse("bytes past a multiple of 16 of the address or a stride", value % 16, 0);
            }
        }
        for &stride in &self.byte_strides() {
            if stride >= 1 << 40 {
                return refuse("bytes of a stride", stride, (1 << 40) - 1);
            }
        }
        let last =
            (self.dims[1] - 1) as u64 * self.byte_strides()[0] + (self.dims[2] - 1) as u64 * self.byte_strides()[1];
        let end = last + (self.dims[0] * self.element.size()) as u64;
        if end > bytes as u64 {
            return refuse("end", end, bytes as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_copy_engine_refuses_is_refused_here() {
        let map = TensorMap { slot: 0, element: DType::Bf16, dims: [40, 3, 2], strides: [40, 120], rows: 64 };
        assert_eq!((map.byte_strides(), map.tile()), ([80, 240], [64, 64, 1]));
        let refused = |map: TensorMap, address, bytes| map.check("k", address, bytes).is_err();
        assert!(!refused(map, 256, 480));
        assert!(refused(map, 256, 478));
        assert!(refused(map, 8, 480));
        assert!(refused(TensorMap { strides: [44, 120], ..map }, 256, 4096));
        assert!(refused(TensorMap { dims: [40, 0, 2], ..map }, 256, 480));
        assert!(refused(TensorMap { rows: 257, ..map }, 256, 480));
    }
}
