//! CPU kernels of `ops/random.rs`: the same operations in the same order as `shaders/random.wgsl`, so the same bits.

use super::simd::{self, multiversion};
use super::{Args, float_kernel};
use crate::dtype::Float;
use crate::error::Result;

/// Words drawn at a time.
const BLOCK: usize = 1024;
/// Elements of one parallel chunk; whole blocks, so that chunks start at a Philox block.
const GRAIN: usize = 16 * BLOCK;
/// Philox blocks computed side by side.
const SIDE: usize = 16;

/// Parameters: count, base, seed (2), site, step (dropout reads its own from memory), threshold, 0, a, b.
struct Draw {
    key: [u32; 2],
    site: u32,
    step: u32,
}

impl Draw {
    fn of(args: &Args) -> Self {
        Self { key: [args.word(2), args.word(3)], site: args.word(4), step: args.word(5) }
    }

    /// Words of the elements from `first`, a multiple of 4.
    fn words(&self, first: usize, out: &mut [u32]) {
        philox_words(self.key, self.site, self.step, (first / 4) as u32, out);
    }
}

/// Scale a of the kept, threshold on 24 bits.
pub fn dropout(args: &Args) -> Result<()> {
    float_kernel!(args, dropped)
}

/// a + b u.
pub fn uniform(args: &Args) -> Result<()> {
    float_kernel!(args, uniforms)
}

/// a + b z.
pub fn normal(args: &Args) -> Result<()> {
    float_kernel!(args, normals)
}

multiversion! {
    /// Philox4x32-10 of consecutive blocks, their words one after the other.
    fn philox_words(key: [u32; 2], site: u32, step: u32, first: u32, out: &mut [u32]) {
        for (group, out) in out.chunks_mut(4 * SIDE).enumerate() {
            let start = first.wrapping_add((group * SIDE) as u32);
            let (mut c0, mut c1, mut c2, mut c3) = ([0u32; SIDE], [0u32; SIDE], [site; SIDE], [step; SIDE]);
            for (lane, c) in c0.iter_mut().enumerate() {
                *c = start.wrapping_add(lane as u32);
            }
            let [mut k0, mut k1] = key;
            for _ in 0..10 {
                for l in 0..SIDE {
                    let p0 = u64::from(c0[l]) * 0xD251_1F53;
                    let p1 = u64::from(c2[l]) * 0xCD9E_8D57;
                    let (n0, n2) = ((p1 >> 32) as u32 ^ c1[l] ^ k0, (p0 >> 32) as u32 ^ c3[l] ^ k1);
                    (c0[l], c1[l], c2[l], c3[l]) = (n0, p1 as u32, n2, p0 as u32);
                }
                k0 = k0.wrapping_add(0x9E37_79B9);
                k1 = k1.wrapping_add(0xBB67_AE85);
            }
            for (l, block) in out.chunks_mut(4).enumerate() {
                for (word, value) in block.iter_mut().zip([c0[l], c1[l], c2[l], c3[l]]) {
                    *word = value;
                }
            }
        }
    }

    fn keep(words: &[u32], threshold: u32, scale: f32, x: &[f32], y: &mut [f32]) {
        for ((y, x), word) in y.iter_mut().zip(x).zip(words) {
            *y = if word >> 8 >= threshold { x * scale } else { 0.0 };
        }
    }

    fn to_uniform(words: &[u32], low: f32, span: f32, y: &mut [f32]) {
        for (y, word) in y.iter_mut().zip(words) {
            *y = low + span * ((word >> 8) as i32 as f32 * (1.0 / 16_777_216.0));
        }
    }

    fn to_normal(words: &[u32], mean: f32, deviation: f32, y: &mut [f32]) {
        for (y, word) in y.iter_mut().zip(words) {
            *y = mean + deviation * standard_normal(*word);
        }
    }
}

fn dropped<T: Float>(args: &Args) -> Result<()> {
    let (x, y) = (args.read::<T>(0), args.write::<T>(2));
    let step = args.read::<u32>(1).first().copied().unwrap_or(0);
    let draw = Draw { step, ..Draw::of(args) };
    let (threshold, scale) = (args.word(6), args.f(8));
    args.rows(y, 1, GRAIN, |first, chunk| {
        let (mut words, mut wide, mut out) = ([0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        for (c, y) in chunk.chunks_mut(BLOCK).enumerate() {
            let at = first + c * BLOCK;
            let words = &mut words[..y.len()];
            draw.words(at, words);
            let x = simd::widened(&x[at..at + y.len()], &mut wide);
            simd::write_row(y, &mut out, |y| keep(words, threshold, scale, x, y));
        }
    });
    Ok(())
}

fn uniforms<T: Float>(args: &Args) -> Result<()> {
    filled::<T>(args, to_uniform)
}

fn normals<T: Float>(args: &Args) -> Result<()> {
    filled::<T>(args, to_normal)
}

fn filled<T: Float>(args: &Args, map: fn(&[u32], f32, f32, &mut [f32])) -> Result<()> {
    let (y, draw) = (args.write::<T>(0), Draw::of(args));
    let (a, b) = (args.f(8), args.f(9));
    args.rows(y, 1, GRAIN, |first, chunk| {
        let (mut words, mut out) = ([0; BLOCK], [0.0; BLOCK]);
        for (c, y) in chunk.chunks_mut(BLOCK).enumerate() {
            let words = &mut words[..y.len()];
            draw.words(first + c * BLOCK, words);
            simd::write_row(y, &mut out, |y| map(words, a, b, y));
        }
    });
    Ok(())
}

/// Natural logarithm of t in [2^-31, 1], after Moshier's Cephes `logf`.
#[inline(always)]
fn log_of(t: f32) -> f32 {
    let bits = t.to_bits();
    let exponent = (bits.wrapping_sub(0x3f35_04f3) as i32) >> 23;
    let s = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32)) - 1.0;
    let z = s * s;
    let p = 7.037_683_6e-2 * s + -1.151_461e-1;
    let p = p * s + 1.167_699_87e-1;
    let p = p * s + -1.242_014_1e-1;
    let p = p * s + 1.424_932_3e-1;
    let p = p * s + -1.666_805_8e-1;
    let p = p * s + 2.000_071_48e-1;
    let p = p * s + -2.499_999_4e-1;
    let p = p * s + 3.333_333e-1;
    let low = p * s * z - 0.5 * z + s;
    exponent as f32 * std::f32::consts::LN_2 + low
}

/// Square root by three Newton steps for its inverse.
#[inline(always)]
fn sqrt_of(w: f32) -> f32 {
    let h = 0.5 * w;
    let y = f32::from_bits(0x5f37_5a86u32.wrapping_sub(w.to_bits() >> 1));
    let y = y * (1.5 - h * y * y);
    let y = y * (1.5 - h * y * y);
    let y = y * (1.5 - h * y * y);
    w * y
}

/// Standard normal of a uniform word: its lower 31 bits give the distance from the median as a probability q of
/// (2 m + 1) / 2^33, its top bit the side. |z| is at most 6.34.
#[inline(always)]
fn standard_normal(word: u32) -> f32 {
    let odd = 2 * (word & 0x7fff_ffff) + 1;
    let n = (odd >> 16) as i32 as f32 * 65_536.0 + (odd & 0xffff) as i32 as f32;
    let x = 1.0 - n * (1.0 / 4_294_967_296.0);
    let t = n * (1.0 / 2_147_483_648.0) * (1.0 - n * (1.0 / 8_589_934_592.0));
    let w = -log_of(t);
    // -log(4 q (1 - q)) below 5: z = x P(w); above: z = Q(sqrt w).
    let c = w - 2.5;
    let near = 4.035_315_7e-8 * c + 4.861_019_5e-7;
    let near = near * c + -4.990_547_5e-6;
    let near = near * c + -6.217_971e-6;
    let near = near * c + 3.091_501_4e-4;
    let near = near * c + -1.773_010_2e-3;
    let near = near * c + -5.908_170_7e-3;
    let near = near * c + 3.488_026_6e-1;
    let near = near * c + 2.123_313_7;
    let near = near * x;
    let s = sqrt_of(if w > 5.0 { w } else { 5.0 }) - 3.484_465_8;
    let far = 1.870_755_7e-5 * s + 2.228_059_2e-5;
    let far = far * s + -2.772_716_4e-4;
    let far = far * s + 9.068_221e-4;
    let far = far * s + -2.469_832_5e-3;
    let far = far * s + 4.498_603_8e-3;
    let far = far * s + 1.424_569_5;
    let far = far * s + 4.694_947_7;
    let z = if w < 5.0 { near } else { far };
    if word >= 0x8000_0000 { -z } else { z }
}
