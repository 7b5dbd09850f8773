//! CPU kernels of `ops/optim.rs`: memory-bound, one pass over every buffer.

use rayon::prelude::*;

use super::Args;
use super::simd::multiversion;
use crate::error::Result;

/// Elements per chunk: fixed, so that results do not depend on the number of threads (they are elementwise anyway).
const CHUNK: usize = 16_384;

/// Parameters of an update, in the order of the op's block after count and flag.
#[derive(Clone, Copy)]
struct Rates {
    rate: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    decay: f32,
    correction1: f32,
    correction2: f32,
    factor: f32,
}

pub fn adamw(args: &Args) -> Result<()> {
    let masked = args.u(1) == 1;
    let (grad, factor) = (args.read::<f32>(1), args.read::<f32>(4));
    let mask = if masked { args.read::<f32>(5) } else { &[] };
    let (param, m, v) = (args.write::<f32>(0), args.write::<f32>(2), args.write::<f32>(3));
    let rates = rates(args, factor);
    let work = |(index, ((p, m), v)): (usize, ((&mut [f32], &mut [f32]), &mut [f32]))| {
        let start = index * CHUNK;
        adamw_chunk(p, m, v, &grad[start..start + p.len()], rates);
        keep(mask, start, [p, m, v]);
    };
    if param.len() <= CHUNK || args.threads() == 1 {
        let chunks = param.chunks_mut(CHUNK).zip(m.chunks_mut(CHUNK)).zip(v.chunks_mut(CHUNK));
        chunks.enumerate().for_each(work);
    } else {
        args.install(|| {
            let chunks = param.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
            chunks.enumerate().for_each(work);
        });
    }
    Ok(())
}

fn rates(args: &Args, factor: &[f32]) -> Rates {
    Rates {
        rate: args.f(2),
        beta1: args.f(3),
        beta2: args.f(4),
        epsilon: args.f(5),
        decay: args.f(6),
        correction1: args.f(7),
        correction2: args.f(8),
        factor: factor.first().copied().unwrap_or(1.0),
    }
}

/// Zeroes everything where the mask is 0; no mask keeps all.
fn keep<const N: usize>(mask: &[f32], start: usize, parts: [&mut [f32]; N]) {
    if mask.is_empty() {
        return;
    }
    for part in parts {
        for (x, &keep) in part.iter_mut().zip(&mask[start..]) {
            *x = if keep == 0.0 { 0.0 } else { *x };
        }
    }
}

multiversion! {
    fn adamw_chunk(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], r: Rates) {
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * r.factor;
            *m = r.beta1 * *m + (1.0 - r.beta1) * g;
            *v = r.beta2 * *v + (1.0 - r.beta2) * g * g;
            let direction = *m * r.correction1 / ((*v * r.correction2).sqrt() + r.epsilon);
            *p -= r.rate * (direction + r.decay * *p);
        }
    }

    fn sgd_chunk(p: &mut [f32], velocity: &mut [f32], g: &[f32], r: Rates) {
        for ((p, velocity), &g) in p.iter_mut().zip(velocity).zip(g) {
            *velocity = r.beta1 * *velocity + g * r.factor;
            *p -= r.rate * (*velocity + r.decay * *p);
        }
    }
}

/// SGD's momentum stands where AdamW's first beta does.
pub fn sgd(args: &Args) -> Result<()> {
    let masked = args.u(1) == 1;
    let (grad, factor) = (args.read::<f32>(1), args.read::<f32>(3));
    let mask = if masked { args.read::<f32>(4) } else { &[] };
    let (param, velocity) = (args.write::<f32>(0), args.write::<f32>(2));
    let rates = rates(args, factor);
    args.rows2((param, velocity), (1, 1), CHUNK, |start, p, velocity| {
        sgd_chunk(p, velocity, &grad[start..start + p.len()], rates);
        keep(mask, start, [p, velocity]);
    });
    Ok(())
}

pub fn clip_factor(args: &Args) -> Result<()> {
    let (squares, factor) = (args.read::<f32>(0), args.write::<f32>(1));
    let (max_norm, scale) = (args.f(2), args.f(3));
    for (factor, s) in factor.iter_mut().zip(squares) {
        let clip = if max_norm > 0.0 { (max_norm / (scale * s.sqrt() + 1e-6)).min(1.0) } else { 1.0 };
        *factor = scale * clip;
    }
    Ok(())
}
