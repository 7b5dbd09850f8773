//! CPU kernels of `ops/distill.rs`.

use super::simd::{self, exp, largest, ln_1p, multiversion, sums, sums2, widened};
use super::softmax::BLOCK;
use super::{Args, float_kernel, grain};
use crate::dtype::{DType, Float};
use crate::error::Result;

pub fn hidden_mse(args: &Args) -> Result<()> {
    float_kernel!(args, mse)
}

pub fn hidden_mse_backward(args: &Args) -> Result<()> {
    float_kernel!(args, mse_backward)
}

pub fn cosine(args: &Args) -> Result<()> {
    float_kernel!(args, cosine_rows)
}

pub fn cosine_backward(args: &Args) -> Result<()> {
    float_kernel!(args, cosine_rows_backward)
}

pub fn kl(args: &Args) -> Result<()> {
    float_kernel!(args, kl_rows)
}

pub fn kl_backward(args: &Args) -> Result<()> {
    float_kernel!(args, kl_rows_backward)
}

multiversion! {
    fn norm_of(x: &[f32]) -> f32 {
        sums(x, |x| [x * x])[0].sqrt()
    }

    /// |u - v|^2 and u . (u - v) of scaled rows.
    fn mse_row(s: &[f32], t: &[f32], scale_s: f32, scale_t: f32) -> [f32; 2] {
        sums2(s, t, |s, t| {
            let u = scale_s * s;
            let e = u - scale_t * t;
            [e * e, u * e]
        })
    }

    /// ds = a s + b t.
    fn combine(s: &[f32], t: &[f32], a: f32, b: f32, ds: &mut [f32]) {
        for ((ds, s), t) in ds.iter_mut().zip(s).zip(t) {
            *ds = a * s + b * t;
        }
    }

    /// factor ((scale_s s - scale_t t) scale_s - through s).
    fn mse_row_backward(s: &[f32], t: &[f32], scale_s: f32, scale_t: f32, through: f32, factor: f32, ds: &mut [f32]) {
        for ((ds, s), t) in ds.iter_mut().zip(s).zip(t) {
            *ds = factor * ((scale_s * s - scale_t * t) * scale_s - through * s);
        }
    }

    /// a.a, b.b, a.b.
    fn products(a: &[f32], b: &[f32]) -> [f32; 3] {
        sums2(a, b, |a, b| [a * a, b * b, a * b])
    }
}

fn room<T: Float>(row: usize) -> Vec<f32> {
    vec![0.0; if T::DTYPE == DType::F32 { 0 } else { row }]
}

fn inverse(x: f32) -> f32 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

fn mse_factor(mean: bool, d: usize, total: f32) -> f32 {
    if mean { inverse(total) / d as f32 } else { 0.5 }
}

fn mse<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher, weight) = (args.read::<T>(0), args.read::<T>(1), args.read::<f32>(2));
    let (loss, statistics) = (args.write::<f32>(3), args.write::<f32>(4));
    let (n, d, mean, normalised) = (args.u(0), args.u(1), args.u(2) != 0, args.u(3) != 0);
    // Two numbers per row, added up in row order.
    let mut rows = vec![[0.0f32; 2]; n];
    let each = |rows: &mut [[f32; 2]], work: &(dyn Fn(&[f32], &[f32]) -> [f32; 2] + Sync)| {
        args.rows(rows, 1, grain(d), |first, rows| {
            let (mut ss, mut ts) = (room::<T>(d), room::<T>(d));
            let pairs = student[first * d..].chunks_exact(d).zip(teacher[first * d..].chunks_exact(d));
            for (row, (s, t)) in rows.iter_mut().zip(pairs) {
                *row = work(widened(s, &mut ss), widened(t, &mut ts));
            }
        });
    };
    let weighted = |rows: &[[f32; 2]], column: usize| -> f64 {
        rows.iter().zip(weight).map(|(r, w)| f64::from(*w) * f64::from(r[column])).sum()
    };
    let total: f64 = weight.iter().map(|w| f64::from(*w)).sum();
    let mut norms = [1.0f32; 2];
    if normalised {
        each(&mut rows, &|s, t| [norm_of(s), norm_of(t)]);
        norms = [0, 1].map(|c| if total > 0.0 { (weighted(&rows, c) / total) as f32 } else { 0.0 });
    }
    let [scale_s, scale_t] = norms.map(inverse);
    each(&mut rows, &|s, t| mse_row(s, t, scale_s, scale_t));
    loss[0] = mse_factor(mean, d, total as f32) * weighted(&rows, 0) as f32;
    statistics.copy_from_slice(&[total as f32, norms[0], norms[1], weighted(&rows, 1) as f32]);
    Ok(())
}

fn mse_backward<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher, weight) = (args.read::<T>(0), args.read::<T>(1), args.read::<f32>(2));
    let (statistics, dloss, ds) = (args.read::<f32>(3), args.read::<f32>(4), args.write::<T>(5));
    let (d, mean, normalised) = (args.u(1), args.u(2) != 0, args.u(3) != 0);
    let (total, along) = (statistics[0], statistics[3]);
    let (scale_s, scale_t) = (inverse(statistics[1]), inverse(statistics[2]));
    let factor = 2.0 * mse_factor(mean, d, total) * dloss[0];
    args.rows(ds, d, grain(d), |first, ds| {
        let (mut ss, mut ts, mut dss) = (room::<T>(d), room::<T>(d), room::<T>(d));
        let pairs = student[first * d..].chunks_exact(d).zip(teacher[first * d..].chunks_exact(d));
        for ((ds, (s, t)), w) in ds.chunks_exact_mut(d).zip(pairs).zip(&weight[first..]) {
            let (s, t) = (widened(s, &mut ss), widened(t, &mut ts));
            let through = if normalised { along * scale_s * inverse(norm_of(s)) * inverse(total) } else { 0.0 };
            simd::write_row(ds, &mut dss, |ds| mse_row_backward(s, t, scale_s, scale_t, through, factor * w, ds));
        }
    });
    Ok(())
}

fn cosine_rows<T: Float>(args: &Args) -> Result<()> {
    let (a, b, weight, loss) = (args.read::<T>(0), args.read::<T>(1), args.read::<f32>(2), args.write::<f32>(3));
    let d = args.u(1);
    args.rows(loss, 1, grain(d), |first, loss| {
        let (mut xs, mut ys) = (room::<T>(d), room::<T>(d));
        let pairs = a[first * d..].chunks_exact(d).zip(b[first * d..].chunks_exact(d));
        for ((loss, (a, b)), w) in loss.iter_mut().zip(pairs).zip(&weight[first..]) {
            let [aa, bb, ab] = products(widened(a, &mut xs), widened(b, &mut ys));
            *loss = w * (1.0 - ab * inverse(aa.sqrt() * bb.sqrt()));
        }
    });
    Ok(())
}

fn cosine_rows_backward<T: Float>(args: &Args) -> Result<()> {
    let (a, b, weight, dloss) = (args.read::<T>(0), args.read::<T>(1), args.read::<f32>(2), args.read::<f32>(3));
    let (da, db, d) = (args.write::<T>(4), args.write::<T>(5), args.u(1));
    args.rows2((da, db), (d, d), grain(d), |first, da, db| {
        let (mut xs, mut ys, mut out) = (room::<T>(d), room::<T>(d), room::<T>(d));
        let pairs = a[first * d..].chunks_exact(d).zip(b[first * d..].chunks_exact(d));
        let outs = da.chunks_exact_mut(d).zip(db.chunks_exact_mut(d));
        for (offset, ((da, db), (a, b))) in outs.zip(pairs).enumerate() {
            let (a, b) = (widened(a, &mut xs), widened(b, &mut ys));
            let [aa, bb, ab] = products(a, b);
            let lengths = inverse(aa.sqrt() * bb.sqrt());
            let factor = -weight[first + offset] * dloss[first + offset];
            let along = |xx: f32| -factor * ab * lengths * inverse(xx);
            simd::write_row(da, &mut out, |da| combine(a, b, along(aa), factor * lengths, da));
            simd::write_row(db, &mut out, |db| combine(b, a, along(bb), factor * lengths, db));
        }
    });
    Ok(())
}

/// The divergence's parameters from words 2 to 5 of a parameter block.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub direction: usize,
    pub beta: f32,
    /// 1 / temperature.
    pub inverse: f32,
    /// Temperature squared, or 1.
    pub factor: f32,
}

impl Form {
    pub fn at(args: &Args, word: usize) -> Self {
        Self { direction: args.u(word), beta: args.f(word + 1), inverse: args.f(word + 2), factor: args.f(word + 3) }
    }

    pub fn is_jsd(&self) -> bool {
        self.direction == 2
    }
}

/// What one pass over the logits of a row keeps: maxima and sums of exponentials of both sides, and the sum of the
/// difference of logits under the side that the divergence averages over.
#[derive(Clone, Copy)]
pub(super) struct Online {
    student: (f32, f32),
    teacher: (f32, f32),
    difference: f32,
}

impl Online {
    pub const START: Self = Self { student: (f32::MIN, 0.0), teacher: (f32::MIN, 0.0), difference: 0.0 };

    pub fn lse(&self) -> (f32, f32) {
        (self.student.0 + self.student.1.ln(), self.teacher.0 + self.teacher.1.ln())
    }

    /// KL(p || q) or KL(q || p). A small divergence is the difference of large terms: they meet in f64, and the logarithm
    /// is taken of the sums' quotient, not of each sum.
    pub fn divergence(&self, form: &Form) -> f32 {
        let [(ms, ss), (mt, st)] = [self.student, self.teacher].map(|(most, sum)| (f64::from(most), f64::from(sum)));
        let apart = (ms - mt) + (ss / st).ln();
        let difference = f64::from(self.difference);
        (if form.direction == 1 { difference / ss - apart } else { difference / st + apart }) as f32
    }
}

multiversion! {
    /// Continues a row's pass over further logits.
    pub(super) fn kl_online(zs: &[f32], zt: &[f32], form: Form, state: Online) -> Online {
        let mut state = state;
        let reverse = form.direction == 1;
        for (zs, zt) in zs.chunks(BLOCK).zip(zt.chunks(BLOCK)) {
            let (most_s, most_t) = (form.inverse * largest(zs), form.inverse * largest(zt));
            if most_s > state.student.0 {
                let shrink = exp(state.student.0 - most_s);
                state.student = (most_s, state.student.1 * shrink);
                state.difference *= if reverse { shrink } else { 1.0 };
            }
            if most_t > state.teacher.0 {
                let shrink = exp(state.teacher.0 - most_t);
                state.teacher = (most_t, state.teacher.1 * shrink);
                state.difference *= if reverse { 1.0 } else { shrink };
            }
            let (ms, mt) = (state.student.0, state.teacher.0);
            let [s, t, difference] = sums2(zs, zt, |zs, zt| {
                let (a, b) = (form.inverse * zs, form.inverse * zt);
                let (ea, eb) = (exp(a - ms), exp(b - mt));
                [ea, eb, if reverse { ea * (a - b) } else { eb * (b - a) }]
            });
            state.student.1 += s;
            state.teacher.1 += t;
            state.difference += difference;
        }
        state
    }

    /// Sums of p log(p/m) and q log(q/m) over some logits of a row.
    pub(super) fn jsd_sums(zs: &[f32], zt: &[f32], form: Form, lse_s: f32, lse_t: f32) -> [f32; 2] {
        let (log_beta, log_rest) = (form.beta.ln(), (1.0 - form.beta).ln());
        let mut total = [0.0; 2];
        for (zs, zt) in zs.chunks(BLOCK).zip(zt.chunks(BLOCK)) {
            let [p, q] = sums2(zs, zt, |zs, zt| {
                let (log_q, log_p) = (form.inverse * zs - lse_s, form.inverse * zt - lse_t);
                let [over_p, over_q] = log_mixture(log_p - log_q, log_beta, log_rest);
                [-exp(log_p) * over_p, -exp(log_q) * over_q]
            });
            total = [total[0] + p, total[1] + q];
        }
        total
    }

    /// Gradient of the student's logits.
    pub(super) fn kl_slopes(zs: &[f32], zt: &[f32], form: Form, saved: [f32; 3], factor: f32, dz: &mut [f32]) {
        let [lse_s, lse_t, expectation] = saved;
        let factor = factor * form.factor * form.inverse;
        let logits = dz.iter_mut().zip(zs).zip(zt);
        match form.direction {
            0 => {
                for ((dz, zs), zt) in logits {
                    *dz = factor * (exp(form.inverse * zs - lse_s) - exp(form.inverse * zt - lse_t));
                }
            }
            1 => {
                for ((dz, zs), zt) in logits {
                    let (log_q, log_p) = (form.inverse * zs - lse_s, form.inverse * zt - lse_t);
                    *dz = factor * exp(log_q) * (log_q - log_p - expectation);
                }
            }
            _ => {
                let (log_beta, log_rest, rest) = (form.beta.ln(), (1.0 - form.beta).ln(), 1.0 - form.beta);
                for ((dz, zs), zt) in logits {
                    let (log_q, log_p) = (form.inverse * zs - lse_s, form.inverse * zt - lse_t);
                    let [_, over_q] = log_mixture(log_p - log_q, log_beta, log_rest);
                    *dz = factor * exp(log_q) * (-rest * over_q - expectation);
                }
            }
        }
    }
}

/// log(m / p) and log(m / q) of m = beta p + (1 - beta) q from log(p / q): where p and q are close these are small, and
/// log m would have lost their digits.
#[inline(always)]
fn log_mixture(ratio: f32, log_beta: f32, log_rest: f32) -> [f32; 2] {
    let apart = ratio + log_beta - log_rest;
    let rest = ln_1p(exp(-apart.abs()));
    if apart > 0.0 { [log_beta + rest, ratio + log_beta + rest] } else { [log_rest - ratio + rest, log_rest + rest] }
}

/// Loss without its weight, and expectation, from the sums of a row.
pub(super) fn kl_value(form: &Form, state: &Online, jsd: [f32; 2]) -> (f32, f32) {
    match form.direction {
        0 => (form.factor * state.divergence(form), 0.0),
        1 => {
            let value = state.divergence(form);
            (form.factor * value, value)
        }
        _ => {
            let expectation = (1.0 - form.beta) * jsd[1];
            (form.factor * (form.beta * jsd[0] + expectation), expectation)
        }
    }
}

fn kl_rows<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher, weight) = (args.read::<T>(0), args.read::<T>(1), args.read::<f32>(2));
    let (v, form, rows) = (args.u(1), Form::at(args, 2), grain(args.u(1)));
    let outputs = [3, 4, 5, 6].map(|i| args.write::<f32>(i).chunks_mut(rows));
    let [loss, lse_s, lse_t, expectation] = outputs;
    args.parts(loss.zip(lse_s).zip(lse_t.zip(expectation)), |index, ((loss, lse_s), (lse_t, expectation))| {
        let (mut ss, mut ts) = (room::<T>(v), room::<T>(v));
        let first = index * rows;
        let pairs = student[first * v..].chunks_exact(v).zip(teacher[first * v..].chunks_exact(v));
        for (row, (s, t)) in pairs.take(loss.len()).enumerate() {
            let (s, t) = (widened(s, &mut ss), widened(t, &mut ts));
            let state = kl_online(s, t, form, Online::START);
            (lse_s[row], lse_t[row]) = state.lse();
            let jsd = if form.is_jsd() { jsd_sums(s, t, form, lse_s[row], lse_t[row]) } else { [0.0; 2] };
            let (value, e) = kl_value(&form, &state, jsd);
            (loss[row], expectation[row]) = (weight[first + row] * value, e);
        }
    });
    Ok(())
}

fn kl_rows_backward<T: Float>(args: &Args) -> Result<()> {
    let (student, teacher) = (args.read::<T>(0), args.read::<T>(1));
    let [weight, lse_s, lse_t, expectation, dloss] = [2, 3, 4, 5, 6].map(|i| args.read::<f32>(i));
    let (dz, v, form) = (args.write::<T>(7), args.u(1), Form::at(args, 2));
    args.rows(dz, v, grain(v), |first, dz| {
        let (mut ss, mut ts, mut dzs) = (room::<T>(BLOCK), room::<T>(BLOCK), room::<T>(BLOCK));
        for (offset, dz) in dz.chunks_exact_mut(v).enumerate() {
            let row = first + offset;
            let (at, saved) = (row * v..(row + 1) * v, [lse_s[row], lse_t[row], expectation[row]]);
            let pairs = student[at.clone()].chunks(BLOCK).zip(teacher[at].chunks(BLOCK));
            for (dz, (s, t)) in dz.chunks_mut(BLOCK).zip(pairs) {
                let (s, t) = (widened(s, &mut ss), widened(t, &mut ts));
                simd::write_row(dz, &mut dzs, |dz| kl_slopes(s, t, form, saved, weight[row] * dloss[row], dz));
            }
        }
    });
    Ok(())
}
