//! CPU kernels of `ops/gates.rs`.

use super::simd::{self, multiversion};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

/// Elements widened at a time.
const BLOCK: usize = 1024;

/// Parameters: elements, 0, columns of a group, gates; element i has gate (i / columns) mod gates.
pub fn scale_groups(args: &Args) -> Result<()> {
    float_kernel!(args, scaled)
}

/// Parameters: sums, 0, columns of a group.
pub fn group_dots(args: &Args) -> Result<()> {
    float_kernel!(args, dots)
}

multiversion! {
    fn scale(x: &[f32], factor: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * factor;
        }
    }

    fn multiply(x: &[f32], factors: &[f32], y: &mut [f32]) {
        for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
            *y = x * factor;
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        simd::sums2(a, b, |a, b| [a * b])[0]
    }
}

/// y = work(x) over neighbouring elements, widened and narrowed in blocks.
fn through<T: Float>(x: &[T], y: &mut [T], work: impl Fn(usize, &[f32], &mut [f32])) {
    let (mut wide, mut out) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (block, (x, y)) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)).enumerate() {
        let x = simd::widened(x, &mut wide);
        simd::write_row(y, &mut out, |y| work(block * BLOCK, x, y));
    }
}

fn scaled<T: Float>(args: &Args) -> Result<()> {
    let (x, gates, y) = (args.read::<T>(0), args.read::<f32>(1), args.write::<T>(2));
    let (group, count) = (args.u(2).max(1), gates.len().max(1));
    args.rows(y, group, grain(group), |first, chunk| {
        let x = &x[first * group..][..chunk.len()];
        if group > 1 {
            for (i, (x, y)) in x.chunks(group).zip(chunk.chunks_mut(group)).enumerate() {
                let gate = gates[(first + i) % count];
                through(x, y, |_, x, y| scale(x, gate, y));
            }
            return;
        }
        // A gate of its own for each element: runs until the gates begin anew.
        let mut at = 0;
        while at < chunk.len() {
            let gate = (first + at) % count;
            let run = (count - gate).min(chunk.len() - at);
            let of = |from: usize, length: usize| &gates[gate + from..][..length];
            through(&x[at..][..run], &mut chunk[at..][..run], |from, x, y| multiply(x, of(from, y.len()), y));
            at += run;
        }
    });
    Ok(())
}

fn dots<T: Float>(args: &Args) -> Result<()> {
    let (a, b, sums) = (args.read::<T>(0), args.read::<T>(1), args.write::<f32>(2));
    let group = args.u(2).max(1);
    args.rows(sums, 1, grain(group), |first, chunk| {
        let range = first * group..(first + chunk.len()) * group;
        let (a, b) = (&a[range.clone()], &b[range]);
        let (mut left, mut right) = ([0.0; BLOCK], [0.0; BLOCK]);
        if group == 1 {
            for ((a, b), sums) in a.chunks(BLOCK).zip(b.chunks(BLOCK)).zip(chunk.chunks_mut(BLOCK)) {
                multiply(simd::widened(a, &mut left), simd::widened(b, &mut right), sums);
            }
            return;
        }
        for ((a, b), sum) in a.chunks(group).zip(b.chunks(group)).zip(chunk) {
            let blocks = a.chunks(BLOCK).zip(b.chunks(BLOCK));
            *sum = blocks.map(|(a, b)| dot(simd::widened(a, &mut left), simd::widened(b, &mut right))).sum();
        }
    });
    Ok(())
}
