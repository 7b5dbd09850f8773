//! CPU kernels of `ops/sparse_bitmap.rs`.
//!
//! Many tokens: activations are packed with tokens side by side, 128 to a panel, so that 64 words of k are 32 KB and stay in
//! the first-level cache while rows of weights pass over them. A kept word is broadcast and meets eight registers of tokens; the
//! sums of a strip of rows wait in the second-level cache between blocks of k. What bounds this is loads: nine for eight
//! multiply-adds. Few tokens: weights are expanded in registers (`vpexpandd`), or for a single one x is gathered from registers
//! (`vpermi2d`); either reads them once and needs no packing.
//!
//! A word is one f32 or four int8 along k; `vpdpbusd` multiplies unsigned by signed bytes, so x gets 128 added there, and 128
//! times the sum of the weights is taken off again.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

use super::Args;
use super::gemm::{View, pack_columns};
use super::simd::multiversion;
use crate::error::Result;

/// Words of k that a list covers.
pub const BLOCK: usize = 64;
/// Words after the last value, so that whole registers can be read from anywhere among them.
pub const PADDING: usize = 16;
/// Rows whose sums wait at a time: 128 KB for 128 tokens, beside 384 KB of activations at k = 768.
const STRIP: usize = 256;
/// Tokens of a panel.
const PANEL: usize = 128;
/// Tokens up to which weights are expanded.
const FEW: usize = 8;

/// Sixteen words: one register, one cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

const ZEROS: Line = Line([0; 16]);

thread_local! {
    // Taken while in use, so that a product started by a stolen task just allocates its own.
    static TOKENS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static SUMS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// The first `lines` of a buffer that grows to them; what they hold is left over.
fn grown(buffer: &mut Vec<Line>, lines: usize) -> &mut [Line] {
    buffer.resize(lines.max(buffer.len()), ZEROS);
    &mut buffer[..lines]
}

/// Compressed weights as words.
#[derive(Clone, Copy)]
struct Weights<'a> {
    values: &'a [u32],
    lists: &'a [u32],
    n: usize,
}

impl<'a> Weights<'a> {
    /// Which words of block `b` row `j` keeps, and these with the padding behind them.
    #[inline(always)]
    fn list(&self, b: usize, j: usize) -> (u64, &'a [u32]) {
        let list = &self.lists[3 * (b * self.n + j)..][..3];
        let mask = u64::from(list[0]) | u64::from(list[1]) << 32;
        // The one check that the vector code needs: lists are data, and may be wrong.
        (mask, &self.values[list[2] as usize..][..mask.count_ones() as usize + PADDING])
    }
}

/// Parameters of every kernel here: m (0 without x), n, words of a row, bias.
pub fn decompress_bitmap(args: &Args) -> Result<()> {
    let (n, words) = (args.u(1), args.u(2));
    let weights = Weights { values: args.read(0), lists: args.read(1), n };
    args.rows(args.write::<u32>(2), words, super::grain(words), |first, out| {
        out.fill(0);
        for (j, row) in (first..).zip(out.chunks_mut(words)) {
            for (b, block) in row.chunks_mut(BLOCK).enumerate() {
                let (mask, values) = weights.list(b, j);
                each(mask, values, |place, value| block[place] = value);
            }
        }
    });
    Ok(())
}

/// Calls `f(place, value)` for the words of a list.
#[inline(always)]
fn each(mut mask: u64, values: &[u32], mut f: impl FnMut(usize, u32)) {
    for &value in values {
        if mask == 0 {
            break;
        }
        f(mask.trailing_zeros() as usize, value);
        mask &= mask - 1;
    }
}

pub fn matmul_bitmap(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read(3));
    product(args, args.read(1), args.read(2), None, bias);
    Ok(())
}

pub fn matmul_bitmap_int8(args: &Args) -> Result<()> {
    let bias = (args.u(3) == 1).then(|| args.read(5));
    product(args, args.read(2), args.read(3), Some([args.read(1), args.read(4)]), bias);
    Ok(())
}

fn product<'a>(
    args: &Args<'a>,
    values: &'a [u32],
    lists: &'a [u32],
    scales: Option<[&'a [f32]; 2]>,
    bias: Option<&'a [f32]>,
) {
    let [m, n, words] = [0, 1, 2].map(|i| args.u(i));
    let product = Product { x: args.read(0), weights: Weights { values, lists, n }, scales, bias, m, n, words };
    let y = args.write::<f32>(args.len() - 1);
    if scales.is_some() { product.run::<true>(args, y) } else { product.run::<false>(args, y) }
}

/// y[i, j] = x[i] . w[j] (+ bias[j]); bytes: times both scales.
struct Product<'a> {
    /// Rows of words.
    x: &'a [f32],
    weights: Weights<'a>,
    /// Of bytes: of the rows of x and of the rows of w.
    scales: Option<[&'a [f32]; 2]>,
    bias: Option<&'a [f32]>,
    m: usize,
    n: usize,
    words: usize,
}

/// Where parallel tasks write; each writes columns of its own.
struct Out(*mut f32);
// SAFETY: tasks write disjoint elements (see `Product::run`), and the slice outlives them.
unsafe impl Sync for Out {}

impl Product<'_> {
    fn run<const BYTES: bool>(&self, args: &Args, y: &mut [f32]) {
        assert!(y.len() >= self.m * self.n, "room for the product");
        let out = &Out(y.as_mut_ptr());
        let (strips, few) = (self.n.div_ceil(STRIP), self.m <= FEW && vector());
        let mut buffer = TOKENS.take();
        let blocks = self.words.div_ceil(BLOCK);
        // Lines of a panel; few tokens are one, each with its words in a row.
        let panel = if few { self.m * blocks * BLOCK / 16 } else { blocks * BLOCK * PANEL / 16 };
        let lines = if few { panel } else { self.m.div_ceil(16) * blocks * BLOCK };
        let packed = grown(&mut buffer, lines.next_multiple_of(panel.max(1)));
        args.rows(
            packed,
            panel,
            1,
            |p, lines| if few { self.copy::<BYTES>(lines) } else { self.pack::<BYTES>(p, lines) },
        );
        let (panels, packed) = (packed.len() / panel.max(1), &*packed);
        args.ranges(panels * strips, 1, |tasks| {
            let mut sums = SUMS.take();
            for task in tasks {
                let (p, s) = (task / strips, task % strips * STRIP);
                let rows = s..(s + STRIP).min(self.n);
                let x = &packed[p * panel..(p + 1) * panel];
                // SAFETY: y has m x n elements; each pair of a panel and a strip is visited by one task.
                unsafe {
                    if few {
                        self.expand::<BYTES>(rows, x, &mut sums, out);
                    } else {
                        self.strip::<BYTES>(p * PANEL, rows, x, &mut sums, out);
                    }
                }
            }
            SUMS.set(sums);
        });
        TOKENS.set(buffer);
    }

    /// Registers of tokens that the panel from token `first` on takes: a power of two.
    fn width(&self, first: usize) -> usize {
        (self.m - first).min(PANEL).div_ceil(16).next_power_of_two()
    }

    /// Panel `p`: word after word, all tokens of each.
    fn pack<const BYTES: bool>(&self, p: usize, lines: &mut [Line]) {
        let (first, width) = (p * PANEL, self.width(p * PANEL));
        let (whole, rest) = lines.split_at_mut(self.words * width);
        rest.fill(ZEROS);
        let x = View::transposed(self.x, self.words);
        let tokens = (self.m - first).min(PANEL);
        pack_columns(x, (first, tokens), self.words, 16 * width, bytemuck::cast_slice_mut(whole));
        self.flip::<BYTES>(lines);
    }

    /// Rows as they are, with zeros up to a whole block.
    fn copy<const BYTES: bool>(&self, lines: &mut [Line]) {
        let row = self.words.next_multiple_of(BLOCK);
        for (x, out) in self.x.chunks(self.words).zip(bytemuck::cast_slice_mut::<_, f32>(lines).chunks_mut(row)) {
            out[..self.words].copy_from_slice(x);
            out[self.words..].fill(0.0);
        }
        self.flip::<BYTES>(lines);
    }

    /// Signed bytes to unsigned ones that are 128 larger, for the vector code.
    fn flip<const BYTES: bool>(&self, lines: &mut [Line]) {
        if BYTES && vector() {
            lines.iter_mut().flat_map(|line| &mut line.0).for_each(|word| *word ^= 0x8080_8080);
        }
    }

    /// The panel from token `first` on against `rows` of the weights.
    ///
    /// # Safety
    /// `out` starts m x n elements; nobody else touches those of these tokens and rows meanwhile.
    unsafe fn strip<const BYTES: bool>(
        &self,
        first: usize,
        rows: Range<usize>,
        x: &[Line],
        sums: &mut Vec<Line>,
        out: &Out,
    ) {
        let width = self.width(first);
        let sums = grown(sums, rows.len().next_multiple_of(16) * width);
        for b in 0..self.words.div_ceil(BLOCK) {
            let x = &x[b * BLOCK * width..][..BLOCK * width];
            let strip = Strip { weights: self.weights, b, rows: rows.clone(), x };
            #[cfg(target_arch = "x86_64")]
            if vector() {
                // SAFETY: `vector` found the instructions.
                unsafe {
                    match width {
                        1 => avx512::lists::<1, BYTES>(&strip, sums),
                        2 => avx512::lists::<2, BYTES>(&strip, sums),
                        4 => avx512::lists::<4, BYTES>(&strip, sums),
                        _ => avx512::lists::<8, BYTES>(&strip, sums),
                    }
                }
                continue;
            }
            if BYTES { lists_bytes(&strip, width, sums) } else { lists(&strip, width, sums) }
        }
        // SAFETY: as promised by the caller.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if vector() {
                return avx512::store::<BYTES>(self, first, rows, width, sums, out);
            }
            let sums: &[u32] = bytemuck::cast_slice(sums);
            for i in 0..(self.m - first).min(16 * width) {
                for j in rows.clone() {
                    let y = self.finish::<BYTES>(sums[(j - rows.start) * 16 * width + i], first + i, j);
                    out.0.add((first + i) * self.n + j).write(y);
                }
            }
        }
    }

    /// All tokens, which are few, against `rows` of the weights.
    ///
    /// # Safety
    /// As [`Product::strip`]; the instructions were found.
    unsafe fn expand<const BYTES: bool>(&self, rows: Range<usize>, x: &[Line], sums: &mut Vec<Line>, out: &Out) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as promised by the caller.
        unsafe {
            let mut first = 0;
            while first < self.m {
                let x = &x[first * self.words.div_ceil(BLOCK) * BLOCK / 16..];
                first += match self.m - first {
                    1 => avx512::gather::<BYTES>(self, first, rows.clone(), x, grown(sums, rows.len()), out),
                    2 | 3 => avx512::expand::<2, BYTES>(self, first, rows.clone(), x, grown(sums, 2 * rows.len()), out),
                    4..8 => avx512::expand::<4, BYTES>(self, first, rows.clone(), x, grown(sums, 4 * rows.len()), out),
                    _ => avx512::expand::<8, BYTES>(self, first, rows.clone(), x, grown(sums, 8 * rows.len()), out),
                };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, x, sums, out);
    }

    /// What becomes of a sum: of bytes three roundings, as on every path and device.
    #[inline(always)]
    fn finish<const BYTES: bool>(&self, sum: u32, i: usize, j: usize) -> f32 {
        let y = match self.scales {
            Some([x, w]) if BYTES => sum as i32 as f32 * x[i] * w[j],
            _ => f32::from_bits(sum),
        };
        self.bias.map_or(y, |bias| y + bias[j])
    }
}

/// One block of k: its words of a panel of x, and rows of weights.
struct Strip<'a> {
    weights: Weights<'a>,
    b: usize,
    rows: Range<usize>,
    x: &'a [Line],
}

multiversion! {
    /// Adds the block to the sums `[row, token]` of `16 width` tokens, or starts them.
    fn lists(strip: &Strip, width: usize, sums: &mut [Line]) {
        let x: &[f32] = bytemuck::cast_slice(strip.x);
        for (j, sums) in strip.rows.clone().zip(sums.chunks_exact_mut(width)) {
            let (mask, values) = strip.weights.list(strip.b, j);
            let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
            if strip.b == 0 {
                sums.fill(0.0);
            }
            each(mask, values, |place, value| {
                let (w, x) = (f32::from_bits(value), &x[place * sums.len()..][..sums.len()]);
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += w * x);
            });
        }
    }

    /// [`lists`] of bytes, which are signed here.
    fn lists_bytes(strip: &Strip, width: usize, sums: &mut [Line]) {
        let x: &[u32] = bytemuck::cast_slice(strip.x);
        for (j, sums) in strip.rows.clone().zip(sums.chunks_exact_mut(width)) {
            let (mask, values) = strip.weights.list(strip.b, j);
            let sums: &mut [i32] = bytemuck::cast_slice_mut(sums);
            if strip.b == 0 {
                sums.fill(0);
            }
            each(mask, values, |place, value| {
                let byte = |word: u32, i: u32| i32::from((word >> (8 * i)) as u8 as i8);
                let w: [i32; 4] = [byte(value, 0), byte(value, 1), byte(value, 2), byte(value, 3)];
                let x = &x[place * sums.len()..][..sums.len()];
                for (sum, &x) in sums.iter_mut().zip(x) {
                    let dot = w[0] * byte(x, 0) + w[1] * byte(x, 1) + w[2] * byte(x, 2) + w[3] * byte(x, 3);
                    *sum = sum.wrapping_add(dot);
                }
            });
        }
    }
}

/// Whether the vector code runs on this processor.
#[cfg(target_arch = "x86_64")]
fn vector() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| is_x86_feature_detected!("avx512vbmi2") && super::int8::vnni());
    *FOUND && super::simd::level() == super::simd::Level::Avx512
}

#[cfg(not(target_arch = "x86_64"))]
fn vector() -> bool {
    false
}
