//! Packing: panels of A and B copied to f32 in the order in which a micro-kernel reads them. This is where strides,
//! transposes and 16-bit storage end.

use super::View;
use crate::dtype::Float;

/// Lines of a panel along k that are transposed at a time when the other axis is strided: keeps the written part in L1.
const DEPTH: usize = 16;

/// Packs `depth` x `width` values (k from `k0`, the other axis from `x0`) as k groups of `padded` values, zeros behind
/// `width`. `x` and `k` are the steps of `view` along the two axes.
fn panel<T: Float>(
    data: &[T],
    first: usize,
    width: usize,
    padded: usize,
    depth: usize,
    x: usize,
    k: usize,
    out: &mut [f32],
) {
    if x == 1 {
        for (p, group) in out.chunks_exact_mut(padded).take(depth).enumerate() {
            let row = &data[first + p * k..first + p * k + width];
            for (o, v) in group.iter_mut().zip(row) {
                *o = v.load();
            }
            group[width..].fill(0.0);
        }
        return;
    }
    for p0 in (0..depth).step_by(DEPTH) {
        let groups = &mut out[p0 * padded..(p0 + DEPTH).min(depth) * padded];
        for i in 0..width {
            let at = first + i * x + p0 * k;
            if k == 1 {
                let row = &data[at..at + groups.len() / padded];
                for (group, v) in groups.chunks_exact_mut(padded).zip(row) {
                    group[i] = v.load();
                }
            } else {
                for (p, group) in groups.chunks_exact_mut(padded).enumerate() {
                    group[i] = data[at + p * k].load();
                }
            }
        }
        for group in groups.chunks_exact_mut(padded) {
            group[width..].fill(0.0);
        }
    }
}

/// Rows `i0..i0 + m` of A over `k0..k0 + k`, in panels of `rows` rows; the last panel is as narrow as its rows.
pub(super) fn pack_a<T: Float>(
    a: View<T>,
    (i0, m): (usize, usize),
    (k0, k): (usize, usize),
    rows: usize,
    out: &mut Vec<f32>,
) {
    out.resize((m * k).max(out.len()), 0.0);
    for (start, part) in (0..m).step_by(rows).zip(out[..m * k].chunks_mut((rows * k).max(1))) {
        let width = rows.min(m - start);
        panel(a.data, (i0 + start) * a.row + k0 * a.column, width, width, k, a.row, a.column, part);
    }
}

/// Columns `j0..j0 + n` of B over `k0..k0 + k`, in panels of `columns` columns, the last one padded with zeros.
pub(super) fn pack_b<T: Float>(
    b: View<T>,
    (j0, n): (usize, usize),
    (k0, k): (usize, usize),
    columns: usize,
    out: &mut [f32],
) {
    for (start, part) in (0..n).step_by(columns).zip(out.chunks_mut((columns * k).max(1))) {
        let width = columns.min(n - start);
        panel(b.data, (j0 + start) * b.column + k0 * b.row, width, columns, k, b.column, b.row, part);
    }
}
