//! CPU kernels of `ops/optim.rs`: memory-bound, one pass over every buffer.

use rayon::prelude::*;

use super::Args;
use super::simd::multiversion;
use crate::error::Result;

/// Elements per chunk: fixed, so that results do not depend on the number of threads (they are elementwise anyway).
const CHUNK: usize = 16_384;

/// Parameters of an update: the op's block after count and flag, the step's rates, the factor.
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
    let (grad, mask) = (args.read::<f32>(1), if masked { args.read::<f32>(6) } else { &[] });
    let (param, m, v) = (args.write::<f32>(0), args.write::<f32>(2), args.write::<f32>(3));
    let Some(rates) = rates(args, args.read::<f32>(4), args.read::<f32>(5)) else {
        return Ok(());
    };
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

/// None where the factor is 0: the step changes nothing.
fn rates(args: &Args, factor: &[f32], rates: &[f32]) -> Option<Rates> {
    let (&[factor], &[rate, correction1, correction2, ..]) = (factor, rates) else {
        return None;
    };
    let (beta1, beta2, epsilon, decay) = (args.f(2), args.f(3), args.f(4), args.f(5));
    (factor != 0.0).then_some(Rates { rate, beta1, beta2, epsilon, decay, correction1, correction2, factor })
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
    let (grad, mask) = (args.read::<f32>(1), if masked { args.read::<f32>(5) } else { &[] });
    let (param, velocity) = (args.write::<f32>(0), args.write::<f32>(2));
    let Some(rates) = rates(args, args.read::<f32>(3), args.read::<f32>(4)) else {
        return Ok(());
    };
    args.rows2((param, velocity), (1, 1), CHUNK, |start, p, velocity| {
        sgd_chunk(p, velocity, &grad[start..start + p.len()], rates);
        keep(mask, start, [p, velocity]);
    });
    Ok(())
}

/// Block: growth > 0, largest norm, growth, least and most scale.
pub fn update_factor(args: &Args) -> Result<()> {
    let scaled = args.u(1) == 1;
    let (max_norm, growth, least, most) = (args.f(2), args.f(3), args.f(4), args.f(5));
    let (state, factor) = (args.write::<f32>(3), args.write::<f32>(4));
    let (&[squares], &[losses], &[_, _, _, inverse, step], [scale, good, failed, loss, norm], [factor]) =
        (args.read::<f32>(0), args.read::<f32>(1), args.read::<f32>(2), state, factor)
    else {
        return Ok(());
    };
    *factor = 0.0;
    if *failed != 0.0 {
        return Ok(());
    }
    let all = inverse / *scale;
    let length = all * squares.sqrt();
    if losses.is_finite() && length.is_finite() {
        *factor = all * if max_norm > 0.0 { (max_norm / (length + 1e-6)).min(1.0) } else { 1.0 };
        if scaled {
            *good += 1.0;
            if *good >= growth {
                (*scale, *good) = ((2.0 * *scale).min(most), 0.0);
            }
        }
        (*loss, *norm) = (losses * inverse, length);
    } else if scaled && losses.is_finite() && *scale > least {
        (*scale, *good, *loss, *norm) = ((0.5 * *scale).max(least), 0.0, losses * inverse, 0.0);
    } else {
        (*failed, *loss, *norm) = (step, 0.0, 0.0);
    }
    Ok(())
}
