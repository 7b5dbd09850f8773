//! CPU kernels of `ops/sparse24.rs` and `ops/sparse24_pack.rs`, and the expansion of compressed rows.

use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Element, Float};
use crate::error::Result;

/// Column pairs of a row, in lexicographic order.
pub const PAIRS: [[usize; 2]; 6] = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];

/// The 90 patterns of two kept columns in each of four rows with two kept rows in each column, as four indices into the
/// pairs (0,1), (0,2), (0,3), (1,2), (1,3), (2,3); in lexicographic order.
pub const PATTERNS: [[u8; 4]; 90] = patterns();

const fn patterns() -> [[u8; 4]; 90] {
    let mut all = [[0; 4]; 90];
    let (mut found, mut code) = (0, 0);
    while code < 6 * 6 * 6 * 6 {
        let rows = [code / 216, code / 36 % 6, code / 6 % 6, code % 6];
        let mut columns = [0; 4];
        let mut r = 0;
        while r < 4 {
            columns[PAIRS[rows[r]][0]] += 1;
            columns[PAIRS[rows[r]][1]] += 1;
            r += 1;
        }
        if columns[0] == 2 && columns[1] == 2 && columns[2] == 2 && columns[3] == 2 {
            all[found] = [rows[0] as u8, rows[1] as u8, rows[2] as u8, rows[3] as u8];
            found += 1;
        }
        code += 1;
    }
    all
}

/// Parameters of every kernel here: n, k.
pub fn mask24_1d(args: &Args) -> Result<()> {
    float_kernel!(args, mask24_1d_of)
}

fn mask24_1d_of<T: Float>(args: &Args) -> Result<()> {
    let w = args.read::<T>(0);
    let (one, zero) = (T::store(1.0), T::store(0.0));
    args.rows(args.write::<T>(1), 4, grain(4), |first, mask| {
        for (w, mask) in w[4 * first..].as_chunks::<4>().0.iter().zip(mask.as_chunks_mut::<4>().0) {
            // As integers of the same order: NaN is largest, so that it is kept and seen.
            let a = w.map(|x| x.load().to_bits() & 0x7fff_ffff);
            let before = |j: usize, i: usize| u32::from(if j < i { a[j] >= a[i] } else { a[j] > a[i] });
            for (i, mask) in mask.iter_mut().enumerate() {
                let rank: u32 = (0..4).filter(|&j| j != i).map(|j| before(j, i)).sum();
                *mask = if rank < 2 { one } else { zero };
            }
        }
    });
    Ok(())
}

pub fn mask24_2d(args: &Args) -> Result<()> {
    float_kernel!(args, mask24_2d_of)
}

fn mask24_2d_of<T: Float>(args: &Args) -> Result<()> {
    const BITS: [u8; 6] = [3, 5, 9, 6, 10, 12];
    let (w, k) = (args.read::<T>(0), args.u(1));
    let (one, zero) = (T::store(1.0), T::store(0.0));
    // Four rows of blocks go to one thread.
    args.rows(args.write::<T>(1), 4 * k, grain(16 * k), |first, mask| {
        for (strip, mask) in (first..).zip(mask.chunks_mut(4 * k)) {
            let w = &w[strip * 4 * k..][..4 * k];
            for left in (0..k).step_by(4) {
                let sums: [[f32; 6]; 4] = std::array::from_fn(|r| {
                    let at = |c: usize| w[r * k + left + c].load().abs();
                    let [a, b, c, d] = [at(0), at(1), at(2), at(3)];
                    [a + b, a + c, a + d, b + c, b + d, c + d]
                });
                let row = |r: usize, pair: u8| sums[r][usize::from(pair)];
                let (mut best, mut chosen) = (-1.0, &PATTERNS[0]);
                for p in &PATTERNS {
                    let sum = (row(0, p[0]) + row(1, p[1])) + (row(2, p[2]) + row(3, p[3]));
                    if sum > best {
                        (best, chosen) = (sum, p);
                    }
                }
                for (r, &pair) in chosen.iter().enumerate() {
                    for c in 0..4 {
                        mask[r * k + left + c] = if BITS[usize::from(pair)] >> c & 1 == 1 { one } else { zero };
                    }
                }
            }
        }
    });
    Ok(())
}

/// Places of the kept pair for each of the 16 masks of a group, as first | second << 2: ones first, filled up with the
/// lowest zeros.
const NIBBLES: [u8; 16] = [4, 4, 4, 4, 8, 8, 9, 4, 12, 12, 13, 4, 14, 8, 9, 4];

fn group_mask<M: Float>(mask: &[M]) -> usize {
    mask[..4].iter().enumerate().map(|(i, m)| usize::from(m.load() != 0.0) << i).sum()
}

pub fn compress24(args: &Args) -> Result<()> {
    // Bytes are compressed with a float mask; a float matrix has a mask of its own type.
    let (n, k) = (args.u(0), args.u(1));
    let bytes = args.read::<i8>(0).len() == n * k;
    match (bytes, args.element) {
        (true, DType::F16) => compress::<i8, half::f16>(args),
        (true, DType::Bf16) => compress::<i8, half::bf16>(args),
        (true, _) => compress::<i8, f32>(args),
        (false, DType::F16) => compress::<half::f16, half::f16>(args),
        (false, DType::Bf16) => compress::<half::bf16, half::bf16>(args),
        (false, _) => compress::<f32, f32>(args),
    }
}

fn compress<W: Element, M: Float>(args: &Args) -> Result<()> {
    let k = args.u(1);
    let (w, mask) = (args.read::<W>(0), args.read::<M>(1));
    let (values, meta) = (args.write::<W>(2), args.write::<u32>(3));
    let words = k.div_ceil(32);
    args.rows2((values, meta), (k / 2, words), grain(k), |first, values, meta| {
        meta.fill(0);
        for ((row, values), meta) in (first..).zip(values.chunks_mut((k / 2).max(1))).zip(meta.chunks_mut(words.max(1)))
        {
            let (w, mask) = (&w[row * k..][..k], &mask[row * k..][..k]);
            for (group, (w, mask)) in w.chunks_exact(4).zip(mask.chunks_exact(4)).enumerate() {
                let bits = group_mask(mask);
                let nibble = NIBBLES[bits];
                for slot in 0..2 {
                    let place = usize::from(nibble >> (2 * slot) & 3);
                    values[2 * group + slot] = if bits >> place & 1 == 1 { w[place] } else { W::zeroed() };
                }
                meta[group / 8] |= u32::from(nibble) << (4 * (group % 8));
            }
        }
    });
    Ok(())
}

/// Places of the two kept weights of group `group` of a row of meta.
#[inline(always)]
pub(super) fn places(meta: &[u32], group: usize) -> [usize; 2] {
    let nibble = meta[group / 8] >> (4 * (group % 8));
    [(nibble & 3) as usize, (nibble >> 2 & 3) as usize]
}

pub fn decompress24(args: &Args) -> Result<()> {
    let (n, k) = (args.u(0), args.u(1));
    let bytes = args.read::<i8>(0).len() == n * k / 2;
    match (bytes, args.element) {
        (true, _) => decompress::<i8>(args),
        (_, DType::F16) => decompress::<half::f16>(args),
        (_, DType::Bf16) => decompress::<half::bf16>(args),
        _ => decompress::<f32>(args),
    }
}

fn decompress<W: Element>(args: &Args) -> Result<()> {
    let (k, words) = (args.u(1), args.u(1).div_ceil(32));
    let (values, meta) = (args.read::<W>(0), args.read::<u32>(1));
    args.rows(args.write::<W>(2), k, grain(k), |first, w| {
        for (row, w) in (first..).zip(w.chunks_mut(k.max(1))) {
            expand_row(&values[row * k / 2..][..k / 2], &meta[row * words..][..words], w);
        }
    });
    Ok(())
}

/// One bit per column from two-bit places: the nibbles of `meta` hold (first, second) with first < second.
pub(super) fn column_bits(meta: u64) -> u64 {
    const ONES: u64 = 0x1111_1111_1111_1111;
    let (a0, a1, b0, b1) = (meta & ONES, meta >> 1 & ONES, meta >> 2 & ONES, meta >> 3 & ONES);
    let zero = !a1 & !a0 & ONES;
    let one = (!a1 & a0) | (!b1 & b0);
    let two = (a1 & !a0) | (b1 & !b0);
    zero | one << 1 | two << 2 | (b1 & b0) << 3
}

/// One compressed row as a dense one.
pub(super) fn expand_row<W: Element>(values: &[W], meta: &[u32], w: &mut [W]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if expand::available() && values.len() * 2 >= w.len() && meta.len() >= w.len().div_ceil(32) {
        // SAFETY: the features were found and the rows have the lengths that are read.
        done = unsafe { expand::whole_runs(values, meta, w) };
    }
    let rest = &mut w[done..];
    rest.fill(W::zeroed());
    for (group, (w, pair)) in rest.chunks_exact_mut(4).zip(values[done / 2..].chunks_exact(2)).enumerate() {
        let [first, second] = places(&meta[done / 32..], group);
        w[first] = pair[0];
        w[second] = pair[1];
    }
}

#[cfg(target_arch = "x86_64")]
mod expand {
    use std::arch::x86_64::*;
    use std::sync::LazyLock;

    use crate::dtype::Element;

    pub(super) fn available() -> bool {
        static FOUND: LazyLock<bool> = LazyLock::new(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vbmi2")
        });
        *FOUND
    }

    /// Expands whole runs of 64 columns; returns how many columns are done.
    ///
    /// # Safety
    /// AVX-512 F, BW and VBMI2 are present; `values` has at least half as many elements as `w`, `meta` its words.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx2")]
    pub(super) unsafe fn whole_runs<W: Element>(values: &[W], meta: &[u32], w: &mut [W]) -> usize {
        let whole = w.len() / 64 * 64;
        // Half a register of values fills a whole one of columns.
        let lanes = 64 / size_of::<W>();
        for at in (0..whole).step_by(64) {
            // SAFETY: 64 columns are two words of meta, 32 values and 64 elements of w, in range for at + 64 <= len.
            unsafe {
                let bits = super::column_bits(meta.as_ptr().add(at / 32).cast::<u64>().read_unaligned());
                for part in 0..64 / lanes {
                    let column = at + part * lanes;
                    let pairs = _mm512_zextsi256_si512(_mm256_loadu_si256(values.as_ptr().add(column / 2).cast()));
                    let mask = bits >> (part * lanes);
                    let dense = match size_of::<W>() {
                        1 => _mm512_maskz_expand_epi8(mask, pairs),
                        2 => _mm512_maskz_expand_epi16(mask as u32, pairs),
                        _ => _mm512_maskz_expand_epi32(mask as u16, pairs),
                    };
                    _mm512_storeu_si512(w.as_mut_ptr().add(column).cast(), dense);
                }
            }
        }
        whole
    }
}

pub fn gather24(args: &Args) -> Result<()> {
    float_kernel!(args, gather24_of)
}

fn gather24_of<T: Float>(args: &Args) -> Result<()> {
    let (k, words) = (args.u(1), args.u(1).div_ceil(32));
    let (w, meta) = (args.read::<T>(0), args.read::<u32>(1));
    args.rows(args.write::<T>(2), k / 2, grain(k), |first, values| {
        for (row, values) in (first..).zip(values.chunks_mut((k / 2).max(1))) {
            let (w, meta) = (&w[row * k..][..k], &meta[row * words..][..words]);
            for (group, pair) in values.chunks_exact_mut(2).enumerate() {
                let [first, second] = places(meta, group);
                pair[0] = w[4 * group + first];
                pair[1] = w[4 * group + second];
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_bits_of_every_pair() {
        for (a, b) in [(0u64, 1u64), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] {
            for group in 0..16 {
                let filler = 0x4444_4444_4444_4444 & !(15 << (4 * group));
                let bits = column_bits(filler | (a | b << 2) << (4 * group));
                assert_eq!(bits >> (4 * group) & 15, 1 << a | 1 << b);
            }
        }
    }

    fn expanded_as_gathered<W: Element + PartialEq + std::fmt::Debug>(value: impl Fn(usize) -> W) {
        let k = 64 * 3 + 20;
        let mut stream = crate::rng::Stream::new(4, 0);
        let nibbles = [0x4u32, 0x8, 0xc, 0x9, 0xd, 0xe];
        let mut word = || (0..8).fold(0, |w, i| w | nibbles[stream.below(6)] << (4 * i));
        let meta: Vec<u32> = (0..k / 32 + 1).map(|_| word()).collect();
        let values: Vec<W> = (0..k / 2).map(value).collect();
        let mut fast = vec![W::zeroed(); k];
        expand_row(&values, &meta, &mut fast);
        for group in 0..k / 4 {
            let [a, b] = places(&meta, group);
            for i in 0..4 {
                let zero = W::zeroed();
                let want = if i == a {
                    values[2 * group]
                } else if i == b {
                    values[2 * group + 1]
                } else {
                    zero
                };
                assert_eq!(fast[4 * group + i], want, "group {group}");
            }
        }
    }

    #[test]
    fn expansion_puts_every_value_in_its_place() {
        expanded_as_gathered(|i| (i % 100) as i8 + 1);
        expanded_as_gathered(|i| half::f16::from_f32(i as f32 + 1.0));
        expanded_as_gathered(|i| i as f32 + 1.0);
    }
}
