//! CPU kernels of `ops/moe.rs`.

use super::simd::{self, multiversion};
use super::{Args, float_kernel, grain};
use crate::dtype::Float;
use crate::error::Result;

/// Parameters: rows, k, experts.
pub fn moe_gate(args: &Args) -> Result<()> {
    float_kernel!(args, gate)
}

/// Experts up to which every score is held against every other: that has no branches. More are selected.
const COMPARED: usize = 128;

/// Larger for what comes first: the score's order in the upper half (NaN lowest, both zeros equal), then lower indices.
#[inline(always)]
fn key(score: f32, index: usize) -> u64 {
    let bits = if score == 0.0 { 0 } else { score.to_bits() };
    let ordered = if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits };
    let ordered = if score.is_nan() { 0 } else { ordered };
    u64::from(ordered) << 32 | u64::from(!(index as u32))
}

multiversion! {
    /// The keys of a row, padded with zeros: what comes last.
    fn make_keys(row: &[f32], keys: &mut [u64]) {
        for (i, (key_of, score)) in keys.iter_mut().zip(row).enumerate() {
            *key_of = key(*score, i);
        }
    }

    /// How many keys come before each; sixteen at a time.
    fn rank(keys: &[u64], ranks: &mut [u64]) {
        for (own, ranks) in keys.as_chunks::<16>().0.iter().zip(ranks.as_chunks_mut::<16>().0) {
            let mut before = [0u64; 16];
            for other in keys {
                for (before, own) in before.iter_mut().zip(own) {
                    *before += u64::from(other > own);
                }
            }
            *ranks = before;
        }
    }
}

fn gate<T: Float>(args: &Args) -> Result<()> {
    let [k, experts] = [1, 2].map(|i| args.u(i));
    let scores = args.read::<T>(0);
    let outputs = (args.write::<u32>(1), args.write::<f32>(2));
    args.rows2(outputs, (k, k), grain(experts), |first, indices, gates| {
        let padded = experts.next_multiple_of(16);
        let (mut wide, mut keys, mut ranks) = (vec![0.0; experts], vec![0; padded], vec![0; padded]);
        let rows = scores[first * experts..].chunks(experts);
        for ((row, indices), gates) in rows.zip(indices.chunks_mut(k)).zip(gates.chunks_mut(k)) {
            let row = simd::widened(row, &mut wide);
            make_keys(row, &mut keys);
            if experts <= COMPARED {
                rank(&keys, &mut ranks);
                for (i, (&rank, &score)) in ranks.iter().zip(row).enumerate() {
                    if rank < k as u64 {
                        (indices[rank as usize], gates[rank as usize]) = (i as u32, score);
                    }
                }
                continue;
            }
            keys[experts..].fill(0);
            keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            keys[..k].sort_unstable_by(|a, b| b.cmp(a));
            for ((index, gate), key) in indices.iter_mut().zip(gates).zip(&keys) {
                *index = !(*key as u32);
                *gate = row[*index as usize];
            }
        }
    });
    Ok(())
}

pub fn moe_gate_backward(args: &Args) -> Result<()> {
    float_kernel!(args, gate_backward)
}

fn gate_backward<T: Float>(args: &Args) -> Result<()> {
    let [k, experts] = [1, 2].map(|i| args.u(i));
    let (indices, dgate) = (args.read::<u32>(0), args.read::<f32>(1));
    args.rows(args.write::<T>(2), experts, grain(experts), |first, out| {
        let mut sums = vec![0.0; experts];
        for (row, out) in (first..).zip(out.chunks_mut(experts)) {
            sums.fill(0.0);
            for (&e, &d) in indices[row * k..][..k].iter().zip(&dgate[row * k..]) {
                if let Some(sum) = sums.get_mut(e as usize) {
                    *sum += d;
                }
            }
            simd::narrow(&sums, out);
        }
    });
    Ok(())
}

/// Parameters: slots, 1, experts.
pub fn moe_dispatch(args: &Args) -> Result<()> {
    let (indices, experts) = (args.read::<u32>(0), args.u(2));
    let (order, offsets) = (args.write::<u32>(1), args.write::<u32>(2));
    let expert = |index: u32| (index as usize).min(experts - 1);
    offsets.fill(0);
    for &index in indices {
        offsets[expert(index) + 1] += 1;
    }
    for e in 0..experts {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets.to_vec();
    for (slot, &index) in indices.iter().enumerate() {
        let at = &mut next[expert(index)];
        order[*at as usize] = slot as u32;
        *at += 1;
    }
    Ok(())
}

/// Parameters: rows, k, d, weighted.
pub fn moe_combine(args: &Args) -> Result<()> {
    float_kernel!(args, combine)
}

multiversion! {
    /// sum += factor y.
    fn add_scaled(sum: &mut [f32], y: &[f32], factor: f32) {
        for (sum, y) in sum.iter_mut().zip(y) {
            *sum += factor * y;
        }
    }

    fn scaled(out: &mut [f32], x: &[f32], factor: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = factor * x;
        }
    }

    fn dot(x: &[f32], y: &[f32]) -> f32 {
        simd::sums2(x, y, |a, b| [a * b])[0]
    }
}

fn combine<T: Float>(args: &Args) -> Result<()> {
    let [rows, k, d] = [0, 1, 2].map(|i| args.u(i));
    let weighted = args.u(3) == 1;
    let (y, order) = (args.read::<T>(0), args.read::<u32>(1));
    let gate = weighted.then(|| args.read::<f32>(2));
    let mut inverse = vec![0u32; rows];
    for (r, &slot) in order.iter().enumerate() {
        inverse[(slot as usize).min(rows - 1)] = r as u32;
    }
    args.rows(args.write::<T>(args.len() - 1), d, grain(k * d), |first, out| {
        let (mut sum, mut wide) = (vec![0.0; d], vec![0.0; d]);
        for (token, out) in (first..).zip(out.chunks_mut(d.max(1))) {
            sum.fill(0.0);
            for slot in token * k..(token + 1) * k {
                let row = simd::widened(&y[inverse[slot] as usize * d..][..d], &mut wide);
                add_scaled(&mut sum, row, gate.map_or(1.0, |g| g[slot]));
            }
            simd::narrow(&sum, out);
        }
    });
    Ok(())
}

pub fn moe_combine_backward(args: &Args) -> Result<()> {
    float_kernel!(args, combine_backward)
}

fn combine_backward<T: Float>(args: &Args) -> Result<()> {
    let [rows, k, d] = [0, 1, 2].map(|i| args.u(i));
    let weighted = args.u(3) == 1;
    let (dout, order) = (args.read::<T>(0), args.read::<u32>(1));
    let gate = weighted.then(|| args.read::<f32>(2));
    let slot_of = |r: usize| (order[r] as usize).min(rows - 1);
    let dy = args.write::<T>(if weighted { 4 } else { 2 });
    args.rows(dy, d, grain(d), |first, dy| {
        let (mut wide, mut made) = (vec![0.0; d], vec![0.0; d]);
        for (r, dy) in (first..).zip(dy.chunks_mut(d.max(1))) {
            let slot = slot_of(r);
            let row = simd::widened(&dout[slot / k * d..][..d], &mut wide);
            simd::write_row(dy, &mut made, |dy| scaled(dy, row, gate.map_or(1.0, |g| g[slot])));
        }
    });
    if weighted {
        let (y, dgate) = (args.read::<T>(3), args.write::<f32>(5));
        let mut sorted = vec![0.0f32; rows];
        args.rows(&mut sorted, 1, grain(d), |first, sorted| {
            let (mut wide, mut other) = (vec![0.0; d], vec![0.0; d]);
            for (r, sum) in (first..).zip(sorted) {
                let row = simd::widened(&dout[slot_of(r) / k * d..][..d], &mut wide);
                *sum = dot(row, simd::widened(&y[r * d..][..d], &mut other));
            }
        });
        for (r, &sum) in sorted.iter().enumerate() {
            dgate[slot_of(r)] = sum;
        }
    }
    Ok(())
}
