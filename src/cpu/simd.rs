//! Vector code without intrinsics: plain loops over fixed lanes, compiled once per instruction set and chosen at run
//! time. Lanes are of a fixed number and multiply-adds are fused where they are written so, nowhere else: every
//! instruction set gives the same bits. (x86 without AVX2 has no fused ones and takes its time to emulate them.)

use std::sync::LazyLock;

use half::slice::HalfFloatSliceExt;

use crate::dtype::{DType, Float};

/// Instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
}

/// The best instruction set of this processor.
#[inline]
pub fn level() -> Level {
    static LEVEL: LazyLock<Level> = LazyLock::new(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("bmi2") {
                let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                let wide = wide && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl");
                return if wide { Level::Avx512 } else { Level::Avx2 };
            }
        }
        Level::Portable
    });
    *LEVEL
}

/// Defines a function whose body is compiled for AVX-512, AVX2 and the baseline, and picked per call by [`level`].
/// Whatever the body calls must be `#[inline(always)]` to be compiled with it.
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $(<$t:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$t: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$t: $bound>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
                fn avx512 $(<$t: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$t>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,bmi2")]
                fn avx2 $(<$t: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$t>)? ($($arg),*)
                }
                match $crate::simd::level() {
                    // SAFETY: `level` found every feature that the function is compiled for.
                    $crate::simd::Level::Avx512 => return unsafe { avx512 $(::<$t>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 => return unsafe { avx2 $(::<$t>)? ($($arg),*) },
                    $crate::simd::Level::Portable => {}
                }
            }
            body $(::<$t>)? ($($arg),*)
        }
    )*};
}
pub(crate) use multiversion;

/// Independent accumulators of every reduction: two AVX-512 registers.
pub const LANES: usize = 32;

/// Sum of the lanes, halves folded onto each other.
#[inline(always)]
pub fn fold_lanes(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    // By way of memory: seen as one, the compiler carries the last fold's pairs back into the loop that filled the lanes,
    // two to a register.
    let mut lanes = std::hint::black_box(lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = f(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Asks for the cache line at `x`, which may lie anywhere, outside every allocation too.
#[inline(always)]
pub(crate) fn prefetch<T>(x: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch(x.cast(), std::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// The last block of a row: it reaches back over elements before its tail, or ends a `room` filled with the row's first.
#[inline(always)]
pub fn last_block<'a>(x: &'a [f32], room: &'a mut [f32; LANES]) -> &'a [f32; LANES] {
    x.last_chunk().unwrap_or_else(|| {
        room.fill(x.first().copied().unwrap_or(0.0));
        room[LANES - x.len()..].copy_from_slice(x);
        room
    })
}

/// Terms of the elements of a block from `first` on added to the lanes' sums.
#[inline(always)]
pub fn add_terms<const N: usize>(lanes: &mut [[f32; LANES]; N], first: usize, mut term: impl FnMut(usize) -> [f32; N]) {
    for l in 0..LANES {
        let terms = term(l);
        for (lane, term) in lanes.iter_mut().zip(terms) {
            lane[l] += if l >= first { term } else { 0.0 };
        }
    }
}

/// `N` sums over one row of what `f` makes of each element.
#[inline(always)]
pub fn sums<const N: usize>(x: &[f32], f: impl Fn(f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for x in blocks {
        add_terms(&mut lanes, 0, |l| f(x[l]));
    }
    if !tail.is_empty() {
        let mut room = [0.0; LANES];
        let x = last_block(x, &mut room);
        add_terms(&mut lanes, LANES - tail.len(), |l| f(x[l]));
    }
    lanes.map(|l| fold_lanes(l, |a, b| a + b))
}

/// [`sums`] over two rows of one length.
#[inline(always)]
pub fn sums2<const N: usize>(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let ((xs, tail), ys) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>().0);
    for (x, y) in xs.iter().zip(ys) {
        add_terms(&mut lanes, 0, |l| f(x[l], y[l]));
    }
    if !tail.is_empty() {
        let mut room = [[0.0; LANES]; 2];
        let [room_x, room_y] = &mut room;
        let (x, y) = (last_block(x, room_x), last_block(y, room_y));
        add_terms(&mut lanes, LANES - tail.len(), |l| f(x[l], y[l]));
    }
    lanes.map(|l| fold_lanes(l, |a, b| a + b))
}

/// [`sums`] over three rows of one length.
#[inline(always)]
pub fn sums3<const N: usize>(x: &[f32], y: &[f32], z: &[f32], f: impl Fn(f32, f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let ((xs, tail), ys, zs) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>().0, z.as_chunks::<LANES>().0);
    for ((x, y), z) in xs.iter().zip(ys).zip(zs) {
        add_terms(&mut lanes, 0, |l| f(x[l], y[l], z[l]));
    }
    if !tail.is_empty() {
        let mut room = [[0.0; LANES]; 3];
        let [room_x, room_y, room_z] = &mut room;
        let (x, y, z) = (last_block(x, room_x), last_block(y, room_y), last_block(z, room_z));
        add_terms(&mut lanes, LANES - tail.len(), |l| f(x[l], y[l], z[l]));
    }
    lanes.map(|l| fold_lanes(l, |a, b| a + b))
}

/// y = f(x) over one row; gives the sum of y. What lies a row behind x is fetched meanwhile: the next row, most likely.
#[inline(always)]
pub fn map_sum(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [[0.0f32; LANES]];
    let (xs, tail) = x.as_chunks::<LANES>();
    for (block, out) in xs.iter().zip(y.as_chunks_mut::<LANES>().0) {
        for line in block.as_chunks::<16>().0 {
            prefetch(line.as_ptr().wrapping_add(x.len()));
        }
        add_terms(&mut lanes, 0, |l| {
            out[l] = f(block[l]);
            [out[l]]
        });
    }
    if !tail.is_empty() {
        let (mut room, mut made) = ([0.0; LANES], [0.0; LANES]);
        let block = last_block(x, &mut room);
        add_terms(&mut lanes, LANES - tail.len(), |l| {
            made[l] = f(block[l]);
            [made[l]]
        });
        match y.last_chunk_mut() {
            Some(y) => *y = made,
            None => y.copy_from_slice(&made[LANES - tail.len()..]),
        }
    }
    fold_lanes(lanes[0], |a, b| a + b)
}

/// Largest element; the largest finite negative for an empty row. NaN is not seen: sums after it carry it on.
#[inline(always)]
pub fn largest(x: &[f32]) -> f32 {
    let pick = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::MIN; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for x in blocks {
        for l in 0..LANES {
            lanes[l] = pick(lanes[l], x[l]);
        }
    }
    if !tail.is_empty() {
        let mut room = [0.0; LANES];
        let x = last_block(x, &mut room);
        for l in 0..LANES {
            lanes[l] = pick(lanes[l], x[l]);
        }
    }
    fold_lanes(lanes, pick)
}

/// e^r of x = n ln 2 + r within a unit in the last place, and the bits of a float that end in those of n. For |n| < 2^22.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, u32) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    // ln 2 in two parts (Cody and Waite); the product with the first is exact within the multiply-add.
    let r = n.mul_add(-std::f32::consts::LN_2, x);
    let r = n.mul_add(1.904_654_3e-9, r);
    // Minimax of relative error 4e-9 with both lowest coefficients 1, in pairs: one chain through all of them would take as
    // long as everything else.
    let z = r * r;
    let low = r.mul_add(0.166_665_21, 0.499_999_94);
    let high = z.mul_add(1.381_454e-3, r.mul_add(8.368_745e-3, 4.166_839e-2));
    (z.mul_add(z.mul_add(high, low), r + 1.0), shifted.to_bits())
}

/// e^x within 2 units in the last place, without branches or calls. 0 below -87.7, which spares what only denormal
/// results need, infinity above 88.37, NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons, not min and max: those would drop a NaN.
    let x = if x < -88.0 { -88.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let (y, n) = exp_parts(x);
    // 2^n by its exponent bits: all of them 0 at n = -127, which is 0, and all set at 128, which is infinity.
    y * f32::from_bits((n << 23).wrapping_add(0x3f80_0000))
}

/// [`exp`] over all that f32 holds: 0 below -104, infinity above 88.73.
#[inline(always)]
pub fn exp_whole(x: f32) -> f32 {
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let (y, n) = exp_parts(x);
    // 2^n in two factors, so that neither end of the range leaves the exponent.
    let n = (n as i32).wrapping_sub(0x4B40_0000);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    y * power(half) * power(n.wrapping_sub(half))
}

/// log(1 + x) for 0 <= x <= 1 within 1e-7, without branches or calls: the polynomial of Moshier's Cephes `logf`.
#[inline(always)]
pub fn ln_1p(x: f32) -> f32 {
    let y = 1.0 + x;
    // sqrt(1/2) <= m <= sqrt 2 and 1 + x = m or 2 m.
    let halved = y > std::f32::consts::SQRT_2;
    // Without halving x itself is the exact argument; 1 + x has lost bits of it.
    let r = if halved { 0.5 * y - 1.0 } else { x };
    let z = r * r;
    let p = 7.037_683_6e-2;
    let p = r.mul_add(p, -1.151_461e-1);
    let p = r.mul_add(p, 1.167_699_9e-1);
    let p = r.mul_add(p, -1.242_014_1e-1);
    let p = r.mul_add(p, 1.424_932_3e-1);
    let p = r.mul_add(p, -1.666_805_8e-1);
    let p = r.mul_add(p, 2.000_071_4e-1);
    let p = r.mul_add(p, -2.499_999_4e-1);
    let p = r.mul_add(p, 3.333_333e-1);
    let log = r + (r * z).mul_add(p, -0.5 * z);
    if halved { log + std::f32::consts::LN_2 } else { log }
}

/// tanh within 2 units in the last place: Moshier's Cephes `tanhf`. NaN stays NaN.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    let p = z.mul_add(-5.704_989e-3, 2.063_908_9e-2);
    let p = z.mul_add(p, -5.373_971_6e-2);
    let p = z.mul_add(p, 0.133_314_42);
    let p = z.mul_add(p, -0.333_332_82);
    let a = x.abs();
    let far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    // The sign last: a sum of zeros would lose it.
    (if a >= 0.625 { far } else { (p * z).mul_add(a, a) }).copysign(x)
}

/// A row as f32: the memory itself where it is stored so, else widened into `buffer` (of the row's length or longer).
#[inline]
pub fn widened<'a, T: Float>(row: &'a [T], buffer: &'a mut [f32]) -> &'a [f32] {
    if T::DTYPE == DType::F32 {
        return bytemuck::cast_slice(row);
    }
    let out = &mut buffer[..row.len()];
    widen(row, out);
    out
}

/// `values` in storage: themselves, or their copies in `buffer`.
#[inline]
pub fn narrowed<'a, T: Float>(values: &'a [f32], buffer: &'a mut [T]) -> &'a [T] {
    if T::DTYPE == DType::F32 {
        return bytemuck::cast_slice(values);
    }
    let out = &mut buffer[..values.len()];
    narrow(values, out);
    out
}

/// Every element of `row` as f32.
#[inline]
pub fn widen<T: Float>(row: &[T], out: &mut [f32]) {
    match T::DTYPE {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(row)),
        DType::F16 => bytemuck::cast_slice::<T, half::f16>(row).convert_to_f32_slice(out),
        _ => widen_bf16(bytemuck::cast_slice(row), out),
    }
}

/// Rounds `values` to nearest even into storage.
#[inline]
pub fn narrow<T: Float>(values: &[f32], out: &mut [T]) {
    match T::DTYPE {
        DType::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(values),
        DType::F16 => bytemuck::cast_slice_mut::<T, half::f16>(out).convert_from_f32_slice(values),
        _ => narrow_bf16(values, bytemuck::cast_slice_mut(out)),
    }
}

multiversion! {
    fn widen_bf16(row: &[u16], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(row) {
            *o = f32::from_bits(u32::from(*x) << 16);
        }
    }

    fn narrow_bf16(values: &[f32], out: &mut [u16]) {
        for (o, x) in out.iter_mut().zip(values) {
            let b = x.to_bits();
            let rounded = (b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16) as u16;
            // NaN keeps sign and payload and gains a quiet bit: rounding could carry it into infinity.
            *o = if b & 0x7fff_ffff > 0x7f80_0000 { (b >> 16) as u16 | 0x40 } else { rounded };
        }
    }
}

/// Writes a row through `work`, which fills f32 values: in place where storage is f32, else by way of `buffer`.
#[inline]
pub fn write_row<T: Float>(out: &mut [T], buffer: &mut [f32], work: impl FnOnce(&mut [f32])) {
    if T::DTYPE == DType::F32 {
        return work(bytemuck::cast_slice_mut(out));
    }
    let values = &mut buffer[..out.len()];
    work(values);
    narrow(values, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_over_its_whole_range() {
        for i in -1_040_000..=887_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            let (got, bound) = (f64::from(exp_whole(x)), (truth * 2.4e-7).max(2e-45));
            assert!((got - truth).abs() <= bound, "exp({x}) = {got:e}, truth {truth:e}");
            if (-87.3..88.3).contains(&x) {
                assert_eq!(exp(x), exp_whole(x));
            }
        }
    }

    #[test]
    fn ln_1p_over_its_whole_range() {
        for i in 0..=1_000_000 {
            let x = i as f32 * 1e-6;
            let truth = f64::from(x).ln_1p();
            assert!((f64::from(ln_1p(x)) - truth).abs() <= 1e-7f64.min(3e-7 * truth) + 1e-12, "ln_1p({x})");
        }
    }

    #[test]
    fn tanh_over_its_whole_range() {
        for i in -1_000_000..=1_000_000 {
            let x = i as f32 * 1e-5;
            let truth = f64::from(x).tanh();
            assert!(
                (f64::from(tanh(x)) - truth).abs() <= 3e-7 * truth.abs(),
                "tanh({x}) = {:e}, truth {truth:e}",
                tanh(x)
            );
        }
        assert_eq!([tanh(f32::INFINITY), tanh(-1e30), tanh(1e-30)], [1.0, -1.0, 1e-30]);
        assert!(tanh(f32::NAN).is_nan() && tanh(-0.0).is_sign_negative());
    }

    #[test]
    fn exp_ends() {
        for exp in [exp, exp_whole] {
            assert_eq!(exp(0.0), 1.0);
            assert_eq!(exp(-1e30), 0.0);
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            assert_eq!([exp(89.5), exp(1e30)], [f32::INFINITY; 2]);
            assert!(exp(f32::NAN).is_nan());
        }
        assert!(exp(-87.6) < 1e-38 && exp(-87.7) == 0.0 && exp(88.3) > 2e38 && exp(88.4) == f32::INFINITY);
    }

    #[test]
    fn storage_conversions_match_the_scalar_ones() {
        let values: Vec<f32> =
            (0..1000).map(|i| (i as f32 - 500.0) * 1.2345e-2).chain([f32::NAN, f32::MAX, 1e-40]).collect();
        let mut bf16 = vec![half::bf16::ZERO; values.len()];
        narrow(&values, &mut bf16);
        let mut f16 = vec![half::f16::ZERO; values.len()];
        narrow(&values, &mut f16);
        for ((x, b), h) in values.iter().zip(&bf16).zip(&f16) {
            assert_eq!(b.to_bits(), <half::bf16 as Float>::store(*x).to_bits());
            assert_eq!(h.to_bits(), <half::f16 as Float>::store(*x).to_bits());
        }
        let mut back = vec![0.0; values.len()];
        widen(&bf16, &mut back);
        assert!(back.iter().zip(&bf16).all(|(x, b)| x.to_bits() == b.load().to_bits()));
    }

    #[test]
    fn reductions_take_every_length() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected = (0..n).sum::<usize>() as f32;
            assert_eq!(sums(&x, |v| [v, 2.0 * v]), [expected, 2.0 * expected]);
            assert_eq!(sums2(&x, &x, |a, b| [a + b]), [2.0 * expected]);
            assert_eq!(sums3(&x, &x, &x, |a, b, c| [a + b + c]), [3.0 * expected]);
            assert_eq!(largest(&x), if n == 0 { f32::MIN } else { n as f32 - 1.0 });
        }
    }
}
