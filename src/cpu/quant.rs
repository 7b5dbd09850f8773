//! CPU kernels of `ops/quant.rs` and `ops/quantize.rs`.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use super::simd::{self, multiversion, widened, write_row};
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;

/// Elements handled at once; bounds the stack buffer of 16-bit rows.
const BLOCK: usize = 1024;
/// Groups up to this long are ranged and mapped while they are in the cache.
const SHORT: usize = 16_384;
/// See `NARROWEST` and `WIDEST` in `ops/quant.rs`.
const NARROWEST: f32 = 7.888_609e-31;
const WIDEST: f32 = 1.329_228e36;

/// How grids are made (`mode` of `ops/quant/ranges.rs`); 0 and 1 are ranges.
const ASYMMETRIC: u32 = 1;
const STEPS: u32 = 2;
const ONE_STEP: u32 = 3;
const MEANS: u32 = 4;

/// Levels of a scheme, from the parameter block.
#[derive(Clone, Copy)]
pub(super) struct Scheme {
    mode: u32,
    low: f32,
    high: f32,
    unit: f32,
}

impl Scheme {
    /// Parameters 2..=5.
    pub(super) fn of(args: &Args) -> Self {
        Self { mode: args.word(2), low: args.f(3), high: args.f(4), unit: args.f(5) }
    }

    /// Levels from -high to high around 0, by the largest magnitude.
    pub(super) fn symmetric(high: f32, unit: f32) -> Self {
        Self { mode: 0, low: -high, high, unit }
    }

    fn asymmetric(&self) -> bool {
        self.mode == ASYMMETRIC
    }

    #[inline(always)]
    fn made(&self, scale: f32, inverse: f32, zero: f32) -> Grid {
        Grid { scale, inverse, zero, low: self.low, high: self.high }
    }

    /// The scale rule of every CPU kernel: from a range, or from (step to divide by, scale) where means decide.
    #[inline(always)]
    pub(super) fn grid(&self, [low, high]: [f32; 2]) -> Grid {
        if self.mode == MEANS {
            return match low {
                _ if low.is_nan() => self.made(f32::NAN, f32::NAN, 0.0),
                _ if low < NARROWEST => self.made(1.0, 0.0, 0.0),
                _ => self.made(high, 1.0 / low, 0.0),
            };
        }
        let bottom = if low < 0.0 { low } else { 0.0 };
        let width = if self.asymmetric() { high.max(0.0) - bottom } else { high.abs().max(low.abs()) };
        let finite = width <= WIDEST && !low.is_nan() && !high.is_nan();
        if !finite {
            return self.made(f32::NAN, f32::NAN, 0.0);
        }
        if width < NARROWEST {
            return self.made(1.0, 0.0, 0.0);
        }
        let scale = width * self.unit;
        let inverse = 1.0 / scale;
        let zero =
            if self.asymmetric() { (-bottom * inverse).round_ties_even().clamp(self.low, self.high) } else { 0.0 };
        self.made(scale, inverse, zero)
    }

    fn grid_of_step(&self, step: f32) -> Grid {
        if step.is_nan() || step > WIDEST {
            return self.made(f32::NAN, f32::NAN, 0.0);
        }
        let scale = step.max(NARROWEST);
        self.made(scale, 1.0 / scale, 0.0)
    }

    /// What the grid of a group follows from.
    fn own<T: Float>(&self, row: &[T]) -> [f32; 2] {
        if self.mode == MEANS { self.means(row) } else { extent_of(row) }
    }

    /// (step to divide by, scale) from the mean magnitude of what is not 0, summed in order.
    fn means<T: Float>(&self, row: &[T]) -> [f32; 2] {
        let magnitudes = || row.iter().map(|x| x.load().abs());
        let count = magnitudes().filter(|x| *x >= NARROWEST).count().max(1);
        let mean = magnitudes().fold(0.0, |sum, x| sum + x) * (1.0 / count as f32);
        if mean.is_nan() || mean > WIDEST {
            return [f32::NAN; 2];
        }
        if mean < NARROWEST {
            return [0.0, 1.0];
        }
        if self.unit == 0.0 {
            return [NARROWEST, mean];
        }
        let step = mean * self.unit;
        let inverse = 1.0 / step;
        let (mut sum, mut count) = (0.0f32, 0.0f32);
        for x in magnitudes().filter(|x| x * inverse > 0.5) {
            (sum, count) = (sum + x, count + 1.0);
        }
        [step, sum * (1.0 / count)]
    }

    /// The grid of a group from an argument that gives steps or ranges.
    fn given(&self, given: &[f32], group: usize) -> Grid {
        match self.mode {
            STEPS => self.grid_of_step(given[group]),
            ONE_STEP => self.grid_of_step(given[0]),
            _ => self.grid([given[2 * group], given[2 * group + 1]]),
        }
    }
}

/// Scale and levels of one group.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub scale: f32,
    pub inverse: f32,
    pub zero: f32,
    low: f32,
    high: f32,
}

impl Grid {
    /// The level before clamping.
    #[inline(always)]
    fn raw(&self, x: f32) -> f32 {
        (x * self.inverse).round_ties_even() + self.zero
    }

    /// The rounding rule of every CPU kernel. NaN stays NaN.
    #[inline(always)]
    pub(super) fn level(&self, x: f32) -> f32 {
        let raw = self.raw(x);
        let raw = if raw < self.low { self.low } else { raw };
        if raw > self.high { self.high } else { raw }
    }
}

/// Minimum and maximum; NaN where an element is.
#[inline(always)]
fn extent_here(x: &[f32]) -> [f32; 2] {
    let pick = |a: f32, b: f32| if b < a { b } else { a };
    let mut low = [f32::INFINITY; simd::LANES];
    let mut high = [f32::INFINITY; simd::LANES];
    let mut nan = [0u32; simd::LANES];
    let (blocks, tail) = x.as_chunks::<{ simd::LANES }>();
    for x in blocks {
        for l in 0..simd::LANES {
            low[l] = pick(low[l], x[l]);
            high[l] = pick(high[l], -x[l]);
            nan[l] |= u32::from((x[l].to_bits() & 0x7fff_ffff) > 0x7f80_0000);
        }
    }
    for (l, x) in tail.iter().enumerate() {
        low[l] = pick(low[l], *x);
        high[l] = pick(high[l], -*x);
        nan[l] |= u32::from(x.is_nan());
    }
    if nan.iter().fold(0, |any, n| any | n) != 0 {
        return [f32::NAN; 2];
    }
    [simd::fold_lanes(low, pick), -simd::fold_lanes(high, pick)]
}

/// Largest magnitude, NaN where an element is: as integers, which order magnitudes as floats do and put NaN on top.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff)))
}

#[inline(always)]
fn store_level(x: f32, grid: &Grid, shift: f32) -> i8 {
    let level = grid.level(x) - shift;
    let level = if level.is_nan() { 0.0 } else { level };
    // SAFETY: levels of at most 8 bits, shifted, lie in -128 ..= 127; NaN was replaced. The checked cast of `as` does not vectorise.
    (unsafe { level.to_int_unchecked::<i32>() }) as i8
}

multiversion! {
    fn extent(x: &[f32]) -> [f32; 2] {
        extent_here(x)
    }

    fn store_rows_by_element(x: &[f32], q: &mut [i8], scales: &mut [f32], scheme: &Scheme, shift: f32) {
        let length = q.len() / scales.len().max(1);
        for ((x, q), scale) in x.chunks_exact(length).zip(q.chunks_exact_mut(length)).zip(scales) {
            let grid = scheme.grid(if scheme.asymmetric() { extent_here(x) } else { [largest(x); 2] });
            *scale = grid.scale;
            let ((xs, x_tail), (qs, q_tail)) = (x.as_chunks::<{ simd::LANES }>(), q.as_chunks_mut::<{ simd::LANES }>());
            for (x, q) in xs.iter().zip(qs) {
                for l in 0..simd::LANES {
                    q[l] = store_level(x[l], &grid, shift);
                }
            }
            q_tail.iter_mut().zip(x_tail).for_each(|(q, x)| *q = store_level(*x, &grid, shift));
        }
    }

    fn fake_row(x: &[f32], y: &mut [f32], grid: &Grid) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = (grid.level(*x) - grid.zero) * grid.scale;
        }
    }

    fn mask_row(x: &[f32], dy: &[f32], dx: &mut [f32], grid: &Grid) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            let raw = grid.raw(*x);
            *dx = if raw >= grid.low && raw <= grid.high { *dy } else { 0.0 };
        }
    }

    fn store_row_by_element(x: &[f32], q: &mut [i8], grid: &Grid, shift: f32) {
        q.iter_mut().zip(x).for_each(|(q, x)| *q = store_level(*x, grid, shift));
    }

    fn load_row(q: &[i8], y: &mut [f32], scale: f32, zero: f32) {
        for (y, q) in y.iter_mut().zip(q) {
            *y = (f32::from(*q) - zero) * scale;
        }
    }
}

/// Rows that are each their own group, and their scales: short rows (an expert's activations) must not pay for calls.
fn store_rows(x: &[f32], q: &mut [i8], scales: &mut [f32], scheme: &Scheme, shift: f32) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        // SAFETY: `level` found every feature that the function is compiled for.
        return unsafe { avx512::store_rows(x, q, scales, scheme, shift) };
    }
    store_rows_by_element(x, q, scales, scheme, shift);
}

/// The levels of a part of a group.
pub(super) fn store_row(x: &[f32], q: &mut [i8], grid: &Grid, shift: f32) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        // SAFETY: as above.
        return unsafe { avx512::store_row(x, q, grid, shift) };
    }
    store_row_by_element(x, q, grid, shift);
}

/// Minimum and maximum of a row of any float storage.
pub(super) fn extent_of<T: Float>(row: &[T]) -> [f32; 2] {
    // Short rows must not pay for a buffer that they do not use.
    if T::DTYPE == DType::F32 {
        return extent(bytemuck::cast_slice(row));
    }
    let mut buffer = [0.0; BLOCK];
    let mut range = [f32::INFINITY, f32::NEG_INFINITY];
    for part in row.chunks(BLOCK) {
        range = join(range, extent(widened(part, &mut buffer)));
    }
    range
}

/// Union of two ranges; NaN wins.
fn join(a: [f32; 2], b: [f32; 2]) -> [f32; 2] {
    if a[0].is_nan() || b[0].is_nan() {
        return [f32::NAN; 2];
    }
    [a[0].min(b[0]), a[1].max(b[1])]
}

/// What every group's grid follows from.
fn own<T: Float>(args: &Args, scheme: &Scheme, x: &[T], length: usize) -> Vec<f32> {
    let mut given = vec![[0.0; 2]; x.len() / length];
    if scheme.mode == MEANS {
        args.rows(&mut given, 1, grain(length), |first, chunk| {
            for (pair, row) in chunk.iter_mut().zip(x[first * length..].chunks(length)) {
                *pair = scheme.means(row);
            }
        });
    } else {
        ranges(args, x, length, &mut given);
    }
    given.into_iter().flatten().collect()
}

/// The range of every group. Minimum and maximum do not depend on the order of folding.
fn ranges<T: Float>(args: &Args, x: &[T], length: usize, out: &mut [[f32; 2]]) {
    if length <= SHORT {
        return args.rows(out, 1, grain(length), |first, chunk| {
            for (range, row) in chunk.iter_mut().zip(x[first * length..].chunks(length)) {
                *range = extent_of(row);
            }
        });
    }
    let parts_of = length.div_ceil(SHORT);
    let mut parts = vec![[0.0; 2]; out.len() * parts_of];
    args.rows(&mut parts, 1, 1, |first, chunk| {
        for (id, part) in chunk.iter_mut().enumerate().map(|(i, part)| (first + i, part)) {
            let row = &x[id / parts_of * length..][..length];
            let start = id % parts_of * SHORT;
            *part = extent_of(&row[start..length.min(start + SHORT)]);
        }
    });
    for (range, parts) in out.iter_mut().zip(parts.chunks(parts_of)) {
        *range = parts.iter().copied().reduce(join).unwrap_or([0.0; 2]);
    }
}

/// Parameters: count, group length, whether to store (-amax, amax).
pub fn observe(args: &Args) -> Result<()> {
    float_kernel!(args, observe_of)
}

fn observe_of<T: Float>(args: &Args) -> Result<()> {
    let (x, out) = (args.read::<T>(0), args.write::<f32>(1));
    let out: &mut [[f32; 2]] = bytemuck::cast_slice_mut(out);
    ranges(args, x, args.u(1), out);
    if args.u(2) == 1 {
        for range in out.iter_mut().filter(|r| !r[0].is_nan()) {
            let amax = range[0].abs().max(range[1].abs());
            *range = [-amax, amax];
        }
    }
    Ok(())
}

/// Calls `work(group, start, part of out)` for parts of at most [`BLOCK`] elements that lie in one group.
fn blocks<U: Send>(args: &Args, out: &mut [U], length: usize, work: impl Fn(usize, usize, &mut [U]) + Sync + Send) {
    args.rows(out, 1, grain(1), |first, mut chunk| {
        let mut at = first;
        while !chunk.is_empty() {
            let group = at / length;
            let size = ((group + 1) * length - at).min(BLOCK).min(chunk.len());
            let (block, rest) = chunk.split_at_mut(size);
            work(group, at, block);
            (at, chunk) = (at + size, rest);
        }
    });
}

/// Parameters: count, group length, scheme words, shift of stored levels, dynamic.
pub fn fake_quant(args: &Args) -> Result<()> {
    float_kernel!(args, fake_quant_of)
}

fn fake_quant_of<T: Float>(args: &Args) -> Result<()> {
    let (length, scheme, dynamic) = (args.u(1), Scheme::of(args), args.u(7) == 1);
    let (x, y) = (args.read::<T>(0), args.write::<T>(if dynamic { 1 } else { 2 }));
    let map = |start: usize, y: &mut [T], grid: &Grid| {
        if T::DTYPE == DType::F32 {
            let x = &x[start..start + y.len()];
            return fake_row(bytemuck::cast_slice(x), bytemuck::cast_slice_mut(y), grid);
        }
        let (mut wide, mut made) = ([0.0; BLOCK], [0.0; BLOCK]);
        let x = widened(&x[start..start + y.len()], &mut wide);
        write_row(y, &mut made, |y| fake_row(x, y, grid));
    };
    if dynamic && length <= SHORT {
        args.rows(y, length, grain(length), |first, chunk| {
            for (row, y) in (first..).zip(chunk.chunks_mut(length)) {
                let grid = scheme.grid(scheme.own(&x[row * length..][..length]));
                for (part, y) in y.chunks_mut(BLOCK).enumerate() {
                    map(row * length + part * BLOCK, y, &grid);
                }
            }
        });
        return Ok(());
    }
    let made = if dynamic { own(args, &scheme, x, length) } else { Vec::new() };
    let given = if dynamic { &made } else { args.read::<f32>(1) };
    blocks(args, y, length, |group, start, y| map(start, y, &scheme.given(given, group)));
    Ok(())
}

pub fn fake_quant_backward(args: &Args) -> Result<()> {
    float_kernel!(args, fake_quant_backward_of)
}

fn fake_quant_backward_of<T: Float>(args: &Args) -> Result<()> {
    let (length, scheme) = (args.u(1), Scheme::of(args));
    let (x, dy, dx) = (args.read::<T>(0), args.read::<T>(2), args.write::<T>(3));
    let given = args.read::<f32>(1);
    blocks(args, dx, length, |group, start, dx| {
        let (mut wide_x, mut wide_dy, mut made) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        let x = widened(&x[start..start + dx.len()], &mut wide_x);
        let dy = widened(&dy[start..start + dx.len()], &mut wide_dy);
        write_row(dx, &mut made, |dx| mask_row(x, dy, dx, &scheme.given(given, group)));
    });
    Ok(())
}

/// Parameters: count, group length, scheme words, shift of stored levels, dynamic.
pub fn quantize(args: &Args) -> Result<()> {
    float_kernel!(args, quantize_of)
}

fn quantize_of<T: Float>(args: &Args) -> Result<()> {
    let (length, scheme, shift, dynamic) = (args.u(1), Scheme::of(args), args.f(6), args.u(7) == 1);
    let first_output = if dynamic { 1 } else { 2 };
    let (x, q) = (args.read::<T>(0), args.write::<i8>(first_output));
    let (scales, zeros) = (args.write::<f32>(first_output + 1), args.write::<f32>(first_output + 2));
    let store = |start: usize, q: &mut [i8], grid: &Grid| {
        if T::DTYPE == DType::F32 {
            return store_row(bytemuck::cast_slice(&x[start..start + q.len()]), q, grid, shift);
        }
        let mut wide = [0.0; BLOCK];
        store_row(widened(&x[start..start + q.len()], &mut wide), q, grid, shift);
    };
    if dynamic && length <= SHORT {
        // Rows of q and their scales go to the same thread while x is in its cache.
        args.rows2((q, scales), (length, 1), grain(length), |first, q, scales| {
            if T::DTYPE == DType::F32 && scheme.mode != MEANS {
                let x = bytemuck::cast_slice(&x[first * length..][..q.len()]);
                return store_rows(x, q, scales, &scheme, shift);
            }
            for ((row, q), scale) in (first..).zip(q.chunks_mut(length)).zip(scales) {
                let grid = scheme.grid(scheme.own(&x[row * length..][..length]));
                *scale = grid.scale;
                for (part, q) in q.chunks_mut(BLOCK).enumerate() {
                    store(row * length + part * BLOCK, q, &grid);
                }
            }
        });
        if !scheme.asymmetric() {
            zeros.fill(0.0);
            return Ok(());
        }
        args.rows(zeros, 1, grain(length), |first, zeros| {
            for (row, zero) in (first..).zip(zeros) {
                *zero = scheme.grid(extent_of(&x[row * length..][..length])).zero - shift;
            }
        });
        return Ok(());
    }
    let made = if dynamic { own(args, &scheme, x, length) } else { Vec::new() };
    let given = if dynamic { &made } else { args.read::<f32>(1) };
    for (group, (scale, zero)) in scales.iter_mut().zip(zeros).enumerate() {
        let grid = scheme.given(given, group);
        (*scale, *zero) = (grid.scale, grid.zero - shift);
    }
    blocks(args, q, length, |group, start, q| store(start, q, &scheme.given(given, group)));
    Ok(())
}

/// Parameters: as [`quantize`], then the factor.
pub fn step_slope(args: &Args) -> Result<()> {
    float_kernel!(args, step_slope_of)
}

fn step_slope_of<T: Float>(args: &Args) -> Result<()> {
    let (length, scheme, factor) = (args.u(1), Scheme::of(args), args.f(8));
    let (x, given, dy) = (args.read::<T>(0), args.read::<f32>(1), args.read::<T>(2));
    blocks(args, args.write::<f32>(3), length, |group, start, slopes| {
        let grid = scheme.given(given, group);
        for ((slope, x), dy) in slopes.iter_mut().zip(&x[start..]).zip(&dy[start..]) {
            let (raw, level) = (grid.raw(x.load()), grid.level(x.load()));
            let rounding = if raw == level { x.load() * grid.inverse } else { 0.0 };
            *slope = dy.load() * factor * (level - rounding);
        }
    });
    Ok(())
}

/// Parameters: groups, then as [`quantize`], then the rate.
pub fn track_step(args: &Args) -> Result<()> {
    let (scheme, rate) = (Scheme::of(args), args.f(8));
    let (steps, range) = (args.write::<f32>(0), args.read::<f32>(1));
    for (group, step) in steps.iter_mut().enumerate() {
        let grid = scheme.given(range, group);
        // A zero or non-finite range says nothing.
        if grid.inverse > 0.0 {
            *step = if *step == 0.0 { grid.scale } else { *step + rate * (grid.scale - *step) };
        }
    }
    Ok(())
}

pub fn dequantize(args: &Args) -> Result<()> {
    let (q, scales, zeros) = (args.read::<i8>(0), args.read::<f32>(1), args.read::<f32>(2));
    blocks(args, args.write::<f32>(3), args.u(1), |group, start, y| {
        load_row(&q[start..start + y.len()], y, scales[group], zeros[group]);
    });
    Ok(())
}
