//! Launches of the loop on warp groups (`cuda/gemm_wgmma.cuh`): how many blocks, how much shared memory, which tensor maps.

use crate::dtype::DType;
use crate::kernel::{Problem, TensorMap};

/// Multiprocessors of a data-centre GPU. Tiles that fill them are wanted.
pub(super) const MULTIPROCESSORS: usize = 132;

/// Rows of a tile, and columns of a wide one.
const ROWS: usize = 128;
const WIDE: usize = 256;

/// Tiles of `width` columns that cover a matrix.
pub(super) fn tiles(rows: usize, columns: usize, width: usize) -> usize {
    rows.div_ceil(ROWS) * columns.div_ceil(width)
}

/// Whether wide tiles fill every multiprocessor: pairs of blocks take two down a column, so few rows of tiles may not be odd.
/// Software adapters are never full.
pub(super) fn full(p: &Problem, rows: usize, columns: usize) -> bool {
    let down = rows.div_ceil(ROWS);
    let even = down.is_multiple_of(2) || down > 8;
    p.info.software || (even && tiles(rows, columns, WIDE) >= MULTIPROCESSORS)
}

/// Blocks that walk over all tiles: one per multiprocessor. On the host two, so that a block has several tiles.
pub(super) fn blocks(p: &Problem, tiles: usize) -> u32 {
    tiles.clamp(1, if p.info.software { 2 } else { MULTIPROCESSORS }) as u32
}

/// Clusters of two blocks that walk over all pairs of tiles.
pub(super) fn pairs(p: &Problem, pairs: usize) -> u32 {
    pairs.clamp(1, if p.info.software { 2 } else { MULTIPROCESSORS / 2 }) as u32
}

/// Bytes of shared memory: stages of `bytes`, two barriers of eight bytes each, and what the family has behind them.
pub(super) fn shared(stages: usize, bytes: usize, own: usize) -> usize {
    (stages * (bytes + 16) + own).next_multiple_of(128)
}

/// 64 of k in a box of a 16-bit matrix [rows, columns] with a step from row to row: `extent` rows contiguous along k, or 64
/// of k, each with 64 of m or n.
pub(super) fn matrix(
    slot: usize,
    element: DType,
    [rows, columns]: [usize; 2],
    step: usize,
    extent: usize,
) -> TensorMap {
    let step = if rows > 1 { step } else { columns.next_multiple_of(8) };
    TensorMap { slot, element, dims: [columns, rows, 1], strides: [step, rows * step], rows: extent }
}
