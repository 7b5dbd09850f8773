//! CPU kernels of `ops/reduce.rs`. The reduced axis lies in the middle of (outer, n, inner).

use super::scratch::scratch;
use super::simd::{self, LANES, multiversion};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

/// Elements of one partial result along a contiguous axis.
const BLOCK: usize = 1024;
/// Elements of one parallel chunk.
const CHUNK: usize = 32 * BLOCK;
/// Most row groups a reduction over rows is cut into: each keeps one partial row.
const GROUPS: usize = 64;

const MAXIMUM: usize = 2;
const SQUARES: usize = 3;

/// Parameters: function, outer, n, inner, factor.
pub fn reduce(args: &Args) -> Result<()> {
    float_kernel!(args, forward)
}

/// Parameters: function, outer, n, inner, factor. Arguments: (x or index,)? dy, dx.
pub fn reduce_backward(args: &Args) -> Result<()> {
    float_kernel!(args, backward)
}

/// Parameters: rows, n.
pub fn argmax(args: &Args) -> Result<()> {
    float_kernel!(args, first_maxima)
}

/// Parameters: n.
pub fn count_non_finite(args: &Args) -> Result<()> {
    float_kernel!(args, non_finite)
}

/// The larger one; a NaN is not seen.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

multiversion! {
    fn sum_block(x: &[f32]) -> f32 {
        simd::sums(x, |x| [x])[0]
    }

    fn squares_block(x: &[f32]) -> f32 {
        simd::sums(x, |x| [x * x])[0]
    }

    fn max_block(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (blocks, tail) = x.as_chunks::<LANES>();
        for x in blocks {
            for l in 0..LANES {
                lanes[l] = larger(lanes[l], x[l]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(tail) {
            *lane = larger(*lane, *x);
        }
        simd::fold_lanes(lanes, larger)
    }

    fn add_row(x: &[f32], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }

    fn add_four_rows(x: &[f32], sums: &mut [f32]) {
        let (n, mut rows) = (sums.len(), x.chunks_exact(sums.len().max(1)));
        if let (Some(a), Some(b), Some(c), Some(d)) = (rows.next(), rows.next(), rows.next(), rows.next()) {
            for i in 0..n {
                sums[i] += (a[i] + b[i]) + (c[i] + d[i]);
            }
        }
    }

    fn add_squares_row(x: &[f32], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x * x;
        }
    }

    fn max_row(x: &[f32], largest: &mut [f32]) {
        for (m, x) in largest.iter_mut().zip(x) {
            *m = larger(*m, *x);
        }
    }

    fn times_row(factor: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    }

    /// (value, lane position) of the first largest; values of -infinity and NaN leave position 0.
    fn first_max(x: &[f32]) -> (f32, u32) {
        let mut best = [f32::NEG_INFINITY; LANES];
        let mut at = [u32::MAX; LANES];
        let (blocks, tail) = x.as_chunks::<LANES>();
        for (b, x) in blocks.iter().enumerate() {
            for l in 0..LANES {
                let more = x[l] > best[l];
                best[l] = if more { x[l] } else { best[l] };
                at[l] = if more { (b * LANES + l) as u32 } else { at[l] };
            }
        }
        for (l, x) in tail.iter().enumerate() {
            if *x > best[l] {
                (best[l], at[l]) = (*x, (blocks.len() * LANES + l) as u32);
            }
        }
        let mut found = (best[0], at[0]);
        for l in 1..LANES {
            if best[l] > found.0 || (best[l] == found.0 && at[l] < found.1) {
                found = (best[l], at[l]);
            }
        }
        if found.1 == u32::MAX { (found.0, 0) } else { found }
    }

    fn count_block(x: &[f32]) -> u32 {
        x.iter().map(|x| u32::from(x.to_bits() & 0x7f80_0000 == 0x7f80_0000)).sum()
    }
}

/// Reduction of contiguous elements, block by block in order.
fn contiguous<T: Float>(kind: usize, x: &[T]) -> f32 {
    let mut wide = [0.0; BLOCK];
    let mut total = if kind == MAXIMUM { f32::NEG_INFINITY } else { 0.0 };
    for block in x.chunks(BLOCK) {
        let block = simd::widened(block, &mut wide);
        match kind {
            MAXIMUM => total = larger(total, max_block(block)),
            SQUARES => total += squares_block(block),
            _ => total += sum_block(block),
        }
    }
    total
}

fn merge(kind: usize, partials: &[f32]) -> f32 {
    let x = partials.iter().copied();
    if kind == MAXIMUM { x.fold(f32::NEG_INFINITY, larger) } else { x.fold(0.0, |a, b| a + b) }
}

fn forward<T: Float>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    let (kind, outer, n, inner, factor) = (args.u(0), args.u(1), args.u(2), args.u(3), args.f(4));
    if inner > 1 {
        over_rows(args, x, y, (kind, outer, n, inner), factor);
    } else if n <= CHUNK {
        args.rows(y, 1, grain(n), |first, chunk| {
            for (y, row) in chunk.iter_mut().zip(x[first * n..].chunks_exact(n)) {
                *y = T::store(contiguous(kind, row) * factor);
            }
        });
    } else {
        let parts = n.div_ceil(CHUNK);
        let mut partials = vec![0.0f32; outer * parts];
        args.rows(&mut partials, 1, 1, |first, chunk| {
            for (p, partial) in (first..).zip(chunk) {
                let row = &x[p / parts * n..][..n];
                let start = p % parts * CHUNK;
                *partial = contiguous(kind, &row[start..n.min(start + CHUNK)]);
            }
        });
        for (y, partials) in y.iter_mut().zip(partials.chunks_exact(parts)) {
            *y = T::store(merge(kind, partials) * factor);
        }
    }
    Ok(())
}

/// Each group of rows gives one partial row; the partial rows are joined in order.
fn over_rows<T: Float>(
    args: &Args,
    x: &[T],
    y: &mut [T],
    (kind, outer, n, inner): (usize, usize, usize, usize),
    factor: f32,
) {
    let rows = n.div_ceil(GROUPS).max(CHUNK.div_ceil(inner));
    let groups = n.div_ceil(rows);
    let start = if kind == MAXIMUM { f32::NEG_INFINITY } else { 0.0 };
    let mut partials = scratch::<f32>(outer * groups * inner);
    partials.fill(start);
    args.rows(&mut partials, inner, 1, |first, chunk| {
        let mut wide = vec![0.0; if T::DTYPE == crate::DType::F32 { 0 } else { 4 * inner }];
        for (p, sums) in (first..).zip(chunk.chunks_exact_mut(inner)) {
            let (o, from) = (p / groups, p % groups * rows);
            let group = &x[(o * n + from) * inner..(o * n + n.min(from + rows)) * inner];
            for block in group.chunks(4 * inner) {
                let block = simd::widened(block, &mut wide);
                match kind {
                    MAXIMUM => block.chunks_exact(inner).for_each(|row| max_row(row, sums)),
                    SQUARES => block.chunks_exact(inner).for_each(|row| add_squares_row(row, sums)),
                    _ if block.len() == 4 * inner => add_four_rows(block, sums),
                    _ => block.chunks_exact(inner).for_each(|row| add_row(row, sums)),
                }
            }
        }
    });
    for (y, partials) in y.chunks_exact_mut(inner).zip(partials.chunks_exact_mut(groups * inner)) {
        let (total, rest) = partials.split_at_mut(inner);
        for row in rest.chunks_exact(inner) {
            if kind == MAXIMUM { max_row(row, total) } else { add_row(row, total) }
        }
        for (y, t) in y.iter_mut().zip(total) {
            *y = T::store(*t * factor);
        }
    }
}

fn backward<T: Float>(args: &Args) -> Result<()> {
    let (kind, n, inner, factor) = (args.u(0), args.u(2), args.u(3), args.f(4));
    let last = args.len() - 1;
    let (dy, dx) = (args.read::<T>(last - 1), args.write::<T>(last));
    let (x, index) = match kind {
        SQUARES => (args.read::<T>(0), &[][..]),
        MAXIMUM => (&[][..], args.read::<u32>(0)),
        _ => (&[][..], &[][..]),
    };
    // One row is `inner` neighbours of dx: they read neighbours of dy.
    args.rows(dx, inner, grain(inner), |first, chunk| {
        let (mut wide_x, mut wide_dy, mut out) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        // With one element a row, whole runs along n share one dy.
        let run = if inner == 1 { n } else { inner };
        let mut at = first * inner;
        let mut rest = chunk;
        while !rest.is_empty() {
            let length = (run - at % run).min(BLOCK).min(rest.len());
            let (part, after) = rest.split_at_mut(length);
            let (row, column) = (at / inner, at % inner);
            let from = row / n * inner + column;
            if kind == MAXIMUM {
                for (i, dx) in part.iter_mut().enumerate() {
                    let (place, from) = if inner == 1 { (row + i, from) } else { (row, from + i) };
                    *dx = if index[from] as usize == place % n { dy[from] } else { T::store(0.0) };
                }
            } else if inner == 1 {
                let dy = dy[from].load();
                if kind == SQUARES {
                    let x = simd::widened(&x[at..at + length], &mut wide_x);
                    simd::write_row(part, &mut out, |out| times_row(2.0 * dy, x, out));
                } else {
                    part.fill(T::store(dy * factor));
                }
            } else {
                let dy = simd::widened(&dy[from..from + length], &mut wide_dy);
                if kind == SQUARES {
                    let x = simd::widened(&x[at..at + length], &mut wide_x);
                    simd::write_row(part, &mut out, |out| {
                        out.iter_mut().zip(x).zip(dy).for_each(|((out, x), dy)| *out = 2.0 * x * dy);
                    });
                } else {
                    simd::write_row(part, &mut out, |out| times_row(factor, dy, out));
                }
            }
            at += length;
            rest = after;
        }
    });
    Ok(())
}

fn first_maxima<T: Float>(args: &Args) -> Result<()> {
    let (x, y, n) = (args.read::<T>(0), args.write::<u32>(1), args.u(1));
    args.rows(y, 1, grain(n), |first, chunk| {
        let mut wide = [0.0; BLOCK];
        for (y, row) in chunk.iter_mut().zip(x[first * n..].chunks_exact(n)) {
            let mut best = f32::NEG_INFINITY;
            *y = 0;
            for (b, block) in row.chunks(BLOCK).enumerate() {
                let (value, at) = first_max(simd::widened(block, &mut wide));
                if value > best {
                    (best, *y) = (value, (b * BLOCK) as u32 + at);
                }
            }
        }
    });
    Ok(())
}

fn non_finite<T: Float>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<u32>(1));
    let mut partials = vec![0u32; x.len().div_ceil(CHUNK)];
    args.rows(&mut partials, 1, 1, |first, chunk| {
        let mut wide = [0.0; BLOCK];
        for (partial, x) in chunk.iter_mut().zip(x[first * CHUNK..].chunks(CHUNK)) {
            *partial = x.chunks(BLOCK).map(|block| count_block(simd::widened(block, &mut wide))).sum();
        }
    });
    let first = partials.iter().position(|&count| count > 0).and_then(|chunk| {
        let start = chunk * CHUNK;
        x[start..].iter().position(|x| !x.load().is_finite()).map(|at| start + at)
    });
    y[0] = partials.iter().sum();
    y[1] = first.map_or(u32::MAX, |at| at as u32);
    Ok(())
}
