//! Micro-kernels: one tile of C held in registers, C = (C +) A B over one block of k.
//!
//! A tile has up to `rows` rows and `vectors` registers of columns. A is packed as k groups of one word per row, B as k
//! groups of `columns` words; a word is what one lane multiplies at once: an f32, or two bf16 that follow each other along
//! k. Every element of C is one chain of multiply-adds in the order of k, whatever the tile's size and place, so results
//! do not depend on how a matrix was cut into tiles or among threads.

use crate::simd::{self, Level};

/// (k in words, packed A, packed B, two rows to ask for, C with the elements from row to row, add to C, columns in the last
/// register). What is asked for, word by word along k, comes into the first-level cache meanwhile; it need not exist.
///
/// # Safety
/// A holds k * R, B k * columns words; C may be written (and read, with add) on R rows of (V - 1) * lanes + tail
/// columns; the processor has the instructions of the table that the function is taken from.
pub(super) type Tile = unsafe fn(usize, *const f32, *const f32, [*const f32; 2], (*mut f32, usize), bool, usize);

/// The micro-kernels of one instruction set.
pub(super) struct Tiles {
    /// Most rows of a tile.
    pub rows: usize,
    /// Words per register.
    pub lanes: usize,
    /// Elements of a word: 2 where A and B stay bf16.
    pub word: usize,
    /// `table[rows - 1][registers - 1]`.
    table: &'static [[Tile; VECTORS]],
}

/// Registers of columns in a full tile.
const VECTORS: usize = 2;

impl Tiles {
    /// Columns of a full tile, and of every packed panel of B.
    pub fn columns(&self) -> usize {
        VECTORS * self.lanes
    }

    /// The kernel for a tile of `rows` x `columns` (both from 1), and the columns in its last register.
    pub fn pick(&self, rows: usize, columns: usize) -> (Tile, usize) {
        let vectors = columns.div_ceil(self.lanes);
        (self.table[rows - 1][vectors - 1], columns - (vectors - 1) * self.lanes)
    }
}

/// The tiles of the best instruction set of this processor for operands that are f32 once packed, or `pairs` of bf16.
pub(super) fn tiles(pairs: bool) -> &'static Tiles {
    #[cfg(target_arch = "x86_64")]
    if pairs && avx512_bf16::available() {
        return &avx512_bf16::TILES;
    }
    #[cfg(target_arch = "x86_64")]
    match simd::level() {
        Level::Avx512 => return &avx512::TILES,
        Level::Avx2 => return &avx2::TILES,
        Level::Portable => {}
    }
    &portable::TILES
}

/// Table of `tile::<R, V>` for the listed row counts.
macro_rules! table {
    ($rows:literal, $lanes:literal, $word:literal: $($r:literal)*) => {
        pub(in super::super) static TILES: super::Tiles = super::Tiles {
            rows: $rows,
            lanes: $lanes,
            word: $word,
            table: &[$([tile::<$r, 1>, tile::<$r, 2>]),*],
        };
    };
}

/// Words after which the next line is asked for: rows need not start with a line.
#[cfg(target_arch = "x86_64")]
const ASK: usize = 8;

/// 14 x 32: 28 accumulators, two registers of B and one broadcast of A out of 32 registers; 16 loads for 28
/// multiply-adds. The same for both kinds of word; `$multiply` is (sum, word of A in every lane, words of B).
#[cfg(target_arch = "x86_64")]
macro_rules! wide_tile {
    ($features:literal, $multiply:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn tile<const R: usize, const V: usize>(
            k: usize,
            mut a: *const f32,
            mut b: *const f32,
            ask: [*const f32; 2],
            (c, stride): (*mut f32, usize),
            add: bool,
            tail: usize,
        ) {
            let mask: __mmask16 = u16::MAX >> (16 - tail.clamp(1, 16));
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            // SAFETY: the caller promises the extents of A, B and C; masked lanes are not touched.
            unsafe {
                // C is next used after the loop: ask for its lines now.
                for i in 0..R {
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * stride).cast());
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * stride + 16).cast());
                }
                for q in (0..k).step_by(ASK) {
                    for row in ask {
                        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(q).cast());
                    }
                    for _ in q..k.min(q + ASK) {
                        let mut row = [_mm512_setzero_ps(); V];
                        for (v, r) in row.iter_mut().enumerate() {
                            *r = _mm512_loadu_ps(b.add(v * 16));
                        }
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let x = _mm512_set1_ps(*a.add(i));
                            for v in 0..V {
                                sum[v] = $multiply(sum[v], x, row[v]);
                            }
                        }
                        a = a.add(R);
                        b = b.add(32);
                    }
                }
                for (i, sum) in sums.iter().enumerate() {
                    for (v, &value) in sum.iter().enumerate() {
                        let m = if v + 1 == V { mask } else { u16::MAX };
                        let at = c.add(i * stride + v * 16);
                        let value = if add { _mm512_add_ps(_mm512_maskz_loadu_ps(m, at), value) } else { value };
                        _mm512_mask_storeu_ps(at, m, value);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::ASK;

    table!(14, 16, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    wide_tile!("avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
}

/// Twice the multiply-adds per instruction. Both products of a pair are added to the sum in f32, rounded to nearest; values
/// below 1.2e-38 count as zero and sums below it become zero, which widened operands would keep: the storage type's bound
/// covers as much.
#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::ASK;
    use crate::simd;

    pub(in super::super) fn available() -> bool {
        simd::level() == simd::Level::Avx512 && is_x86_feature_detected!("avx512bf16")
    }

    table!(14, 16, 2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    // A register is a register: transmute only renames its type.
    wide_tile!("avx512f,avx512bf16", |sum, a, b| _mm512_dpbf16_ps(
        sum,
        transmute::<__m512, __m512bh>(a),
        transmute::<__m512, __m512bh>(b)
    ));
}

/// 6 x 16: 12 accumulators, two registers of B and one broadcast of A out of 16 registers.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    table!(6, 8, 1: 1 2 3 4 5 6);

    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize, const V: usize>(
        k: usize,
        mut a: *const f32,
        mut b: *const f32,
        _ask: [*const f32; 2],
        (c, stride): (*mut f32, usize),
        add: bool,
        tail: usize,
    ) {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        // SAFETY: the caller promises the extents of A, B and C; masked lanes are not touched.
        unsafe {
            for _ in 0..k {
                let mut row = [_mm256_setzero_ps(); V];
                for (v, r) in row.iter_mut().enumerate() {
                    *r = _mm256_loadu_ps(b.add(v * 8));
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(i));
                    for v in 0..V {
                        sum[v] = _mm256_fmadd_ps(x, row[v], sum[v]);
                    }
                }
                a = a.add(R);
                b = b.add(16);
            }
            for (i, sum) in sums.iter().enumerate() {
                for (v, &value) in sum.iter().enumerate() {
                    let valid = if v + 1 == V { tail as i32 } else { 8 };
                    let m = _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), lanes);
                    let at = c.add(i * stride + v * 8);
                    let value = if add { _mm256_add_ps(_mm256_maskload_ps(at, m), value) } else { value };
                    _mm256_maskstore_ps(at, m, value);
                }
            }
        }
    }
}

/// 4 x 8 in plain Rust, for every other processor.
mod portable {
    table!(4, 4, 1: 1 2 3 4);

    unsafe fn tile<const R: usize, const V: usize>(
        k: usize,
        mut a: *const f32,
        mut b: *const f32,
        _ask: [*const f32; 2],
        (c, stride): (*mut f32, usize),
        add: bool,
        tail: usize,
    ) {
        let mut sums = [[[0.0f32; 4]; V]; R];
        // SAFETY: the caller promises the extents of A, B and C.
        unsafe {
            for _ in 0..k {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = *a.add(i);
                    for (v, sum) in sum.iter_mut().enumerate() {
                        for (l, s) in sum.iter_mut().enumerate() {
                            *s += x * *b.add(v * 4 + l);
                        }
                    }
                }
                a = a.add(R);
                b = b.add(8);
            }
            for (i, sum) in sums.iter().enumerate() {
                for (v, sum) in sum.iter().enumerate() {
                    let valid = if v + 1 == V { tail.min(4) } else { 4 };
                    for (l, &value) in sum.iter().enumerate().take(valid) {
                        let at = c.add(i * stride + v * 4 + l);
                        *at = if add { *at + value } else { value };
                    }
                }
            }
        }
    }
}

/// Every set for operands that are f32 once packed.
#[cfg(test)]
pub(super) fn every_set() -> Vec<&'static Tiles> {
    let mut sets = vec![&portable::TILES];
    #[cfg(target_arch = "x86_64")]
    {
        if simd::level() >= Level::Avx2 {
            sets.push(&avx2::TILES);
        }
        if simd::level() == Level::Avx512 {
            sets.push(&avx512::TILES);
        }
    }
    sets
}
