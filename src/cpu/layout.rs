//! CPU kernels of `ops/layout.rs`. Copies move 16- and 32-bit words, whatever they mean.

use half::f16;

use super::scratch::scratch;
use super::simd::{self, multiversion};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Element, Float};
use crate::error::Result;

/// Calls a function generic over the word that stands for the element type of `args`.
macro_rules! word_kernel {
    ($args:expr, $f:ident) => {
        if $args.element.size() == 2 { $f::<f16>($args) } else { $f::<u32>($args) }
    };
}

/// Parameters: six output extents, six input strides, outermost first.
pub fn permute(args: &Args) -> Result<()> {
    word_kernel!(args, permuted)
}

/// Parameters: width, stride, offset.
pub fn slice(args: &Args) -> Result<()> {
    word_kernel!(args, sliced)
}

/// Parameters: width, stride, offset.
pub fn pad(args: &Args) -> Result<()> {
    word_kernel!(args, padded)
}

/// Parameters: the width of each input.
pub fn concat(args: &Args) -> Result<()> {
    word_kernel!(args, concatenated)
}

/// Parameters: row width, rows of the table.
pub fn gather_rows(args: &Args) -> Result<()> {
    word_kernel!(args, gathered)
}

/// Parameters: row width, rows of the result.
pub fn scatter_add_rows(args: &Args) -> Result<()> {
    float_kernel!(args, scattered)
}

/// Parameters: bits of one element.
pub fn fill(args: &Args) -> Result<()> {
    if args.element.size() == 2 {
        let value = f16::from_bits(args.word(0) as u16);
        args.rows(args.write::<f16>(0), 1, grain(1), |_, chunk| chunk.fill(value));
    } else {
        let value = args.word(0);
        args.rows(args.write::<u32>(0), 1, grain(1), |_, chunk| chunk.fill(value));
    }
    Ok(())
}

/// Where output rows start in the input: counts up like an odometer, without divisions.
struct Odometer {
    dims: [usize; 5],
    strides: [usize; 5],
    index: [usize; 5],
    at: usize,
}

impl Odometer {
    fn new(dims: [usize; 5], strides: [usize; 5], row: usize) -> Self {
        let (mut index, mut at, mut rest) = ([0; 5], 0, row);
        for axis in (0..5).rev() {
            index[axis] = rest % dims[axis];
            at += index[axis] * strides[axis];
            rest /= dims[axis];
        }
        Self { dims, strides, index, at }
    }

    fn next(&mut self) -> usize {
        let now = self.at;
        for axis in (0..5).rev() {
            self.index[axis] += 1;
            self.at += self.strides[axis];
            if self.index[axis] < self.dims[axis] {
                break;
            }
            self.at -= self.dims[axis] * self.strides[axis];
            self.index[axis] = 0;
        }
        now
    }
}

/// Rows and columns of one transposed tile: 16 cache lines in, 16 out.
const TILE: usize = 16;

fn permuted<T: Element>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    let (dims, strides) = (std::array::from_fn(|i| args.u(i)), std::array::from_fn(|i| args.u(6 + i)));
    let (length, step) = (args.u(5), args.u(11));
    args.rows(y, length, grain(length), |first, chunk| {
        let mut rows = Odometer::new(dims, strides, first);
        if step == 1 {
            for row in chunk.chunks_exact_mut(length) {
                let at = rows.next();
                row.copy_from_slice(&x[at..at + length]);
            }
            return;
        }
        // Neighbouring rows often read neighbouring columns: a tile of them shares cache lines.
        for tile in chunk.chunks_mut(TILE * length) {
            let mut starts = [0; TILE];
            let count = tile.len() / length;
            starts[..count].fill_with(|| rows.next());
            for left in (0..length).step_by(TILE) {
                let right = length.min(left + TILE);
                for (row, start) in tile.chunks_exact_mut(length).zip(starts) {
                    for (c, y) in (left..right).zip(&mut row[left..right]) {
                        *y = x[start + c * step];
                    }
                }
            }
        }
    });
    Ok(())
}

fn sliced<T: Element>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    let (width, stride, offset) = (args.u(0), args.u(1), args.u(2));
    args.rows(y, width, grain(width), |first, chunk| {
        for (r, row) in (first..).zip(chunk.chunks_exact_mut(width)) {
            row.copy_from_slice(&x[r * stride + offset..][..width]);
        }
    });
    Ok(())
}

fn padded<T: Element>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(1));
    let (width, stride, offset) = (args.u(0), args.u(1), args.u(2));
    args.rows(y, stride, grain(stride), |first, chunk| {
        for (r, row) in (first..).zip(chunk.chunks_exact_mut(stride)) {
            row[..offset].fill(T::zeroed());
            row[offset..offset + width].copy_from_slice(&x[r * width..][..width]);
            row[offset + width..].fill(T::zeroed());
        }
    });
    Ok(())
}

fn concatenated<T: Element>(args: &Args) -> Result<()> {
    let inputs = args.len() - 1;
    let parts: Vec<(&[T], usize)> = (0..inputs).map(|i| (args.read::<T>(i), args.u(i))).collect();
    let stride: usize = parts.iter().map(|(_, width)| width).sum();
    args.rows(args.write::<T>(inputs), stride, grain(stride), |first, chunk| {
        for (r, row) in (first..).zip(chunk.chunks_exact_mut(stride)) {
            let mut rest = row;
            for &(x, width) in &parts {
                let (part, after) = rest.split_at_mut(width);
                part.copy_from_slice(&x[r * width..][..width]);
                rest = after;
            }
        }
    });
    Ok(())
}

fn gathered<T: Element>(args: &Args) -> Result<()> {
    let (table, ids, y) = (args.read::<T>(0), args.read::<u32>(1), args.write::<T>(2));
    let width = args.u(0);
    args.rows(y, width, grain(width), |first, chunk| {
        for (row, &id) in chunk.chunks_exact_mut(width).zip(&ids[first..]) {
            let at = id as usize * width;
            match table.get(at..at + width) {
                Some(source) => row.copy_from_slice(source),
                None => row.fill(T::zeroed()),
            }
        }
    });
    Ok(())
}

multiversion! {
    fn add_row(x: &[f32], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }
}

/// Sources are sorted by row with a counting sort, which keeps their order within a row.
fn scattered<T: Float>(args: &Args) -> Result<()> {
    let (x, ids, y) = (args.read::<T>(0), args.read::<u32>(1), args.write::<T>(2));
    let (width, rows) = (args.u(0), args.u(1));
    let mut ends = vec![0u32; rows + 1];
    for &id in ids.iter().filter(|id| (**id as usize) < rows) {
        ends[id as usize + 1] += 1;
    }
    for row in 0..rows {
        ends[row + 1] += ends[row];
    }
    // After placement `ends[row]` is the end of the row's sources: the next row's start.
    let mut order = scratch::<u32>(ends[rows] as usize);
    for (source, &id) in ids.iter().enumerate() {
        if (id as usize) < rows {
            let place = &mut ends[id as usize];
            order[*place as usize] = source as u32;
            *place += 1;
        }
    }
    let start = |row: usize| if row == 0 { 0 } else { ends[row - 1] as usize };
    args.rows(y, width, grain(width), |first, chunk| {
        let short = T::DTYPE == DType::F32;
        let (mut sums, mut wide) = (vec![0.0; if short { 0 } else { width }], vec![0.0; if short { 0 } else { width }]);
        for (r, row) in (first..).zip(chunk.chunks_exact_mut(width)) {
            let sources = &order[start(r)..ends[r] as usize];
            simd::write_row(row, &mut sums, |sums| {
                sums.fill(0.0);
                for &source in sources {
                    add_row(simd::widened(&x[source as usize * width..][..width], &mut wide), sums);
                }
            });
        }
    });
    Ok(())
}
