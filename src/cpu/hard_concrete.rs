//! CPU kernels of `ops/hard_concrete.rs`.

use super::Args;
use crate::error::Result;
use crate::rng::philox;

const SAMPLE: usize = 0;
const OPEN: usize = 2;

const GAMMA: f32 = -0.1;
const SPAN: f32 = 1.2;
const BETA: f32 = 2.0 / 3.0;
const EPSILON: f32 = 1e-6;
/// -beta ln(-gamma / zeta)
const SHIFT: f32 = 1.598_596_8;
/// Elements of one parallel chunk; whole Philox blocks.
const GRAIN: usize = 1024;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// ln u - ln(1 - u) of u in (epsilon, 1 - epsilon) by the word's upper 24 bits; 1 - u from the bits too, or it would cancel.
fn noise(word: u32) -> f32 {
    let unit = |bits: u32| EPSILON + (1.0 - 2.0 * EPSILON) * (bits as f32 * (1.0 / 16_777_216.0));
    let bits = word >> 8;
    unit(bits).ln() - unit(16_777_216 - bits).ln()
}

/// Parameters: count, kind, seed (2), site. Arguments: log_alpha, (step,) z.
pub fn hard_concrete(args: &Args) -> Result<()> {
    let sampled = args.u(1) == SAMPLE;
    let z = args.write::<f32>(if sampled { 2 } else { 1 });
    let gates = Gates::of(args, if sampled { Some(1) } else { None });
    args.rows(z, 1, GRAIN, |first, chunk| gates.each(first, chunk, |_, gate| gate.value()));
    Ok(())
}

/// As [`hard_concrete`]. Arguments: log_alpha, dz, (step,) dx.
pub fn hard_concrete_backward(args: &Args) -> Result<()> {
    let sampled = args.u(1) == SAMPLE;
    let dz = args.read::<f32>(1);
    let dx = args.write::<f32>(if sampled { 3 } else { 2 });
    let gates = Gates::of(args, if sampled { Some(2) } else { None });
    args.rows(dx, 1, GRAIN, |first, chunk| gates.each(first, chunk, |i, gate| dz[i] * gate.slope()));
    Ok(())
}

/// Parameters: count, -, -, -, -, low, high.
pub fn clamp(args: &Args) -> Result<()> {
    let (x, low, high) = (args.write::<f32>(0), args.f(5), args.f(6));
    args.rows(x, 1, GRAIN, |_, chunk| {
        for x in chunk {
            *x = x.max(low).min(high);
        }
    });
    Ok(())
}

struct Gates<'a> {
    log_alpha: &'a [f32],
    kind: usize,
    key: [u32; 2],
    site: u32,
    step: u32,
}

/// s, whether it is stretched, and the temperature.
struct Gate {
    s: f32,
    stretched: bool,
    beta: f32,
}

impl<'a> Gates<'a> {
    fn of(args: &Args<'a>, step: Option<usize>) -> Self {
        let step = step.and_then(|argument| args.read::<u32>(argument).first().copied()).unwrap_or(0);
        let key = [args.word(2), args.word(3)];
        Self { log_alpha: args.read(0), kind: args.u(1), key, site: args.word(4), step }
    }

    /// `first` is a multiple of 4: four elements share a Philox block.
    fn each(&self, first: usize, out: &mut [f32], work: impl Fn(usize, Gate) -> f32) {
        for (block, out) in out.chunks_mut(4).enumerate() {
            let start = first + 4 * block;
            let words = match self.kind {
                SAMPLE => philox([(start / 4) as u32, 0, self.site, self.step], self.key),
                _ => [0; 4],
            };
            for (k, (out, word)) in out.iter_mut().zip(words).enumerate() {
                let x = self.log_alpha[start + k];
                let gate = match self.kind {
                    SAMPLE => Gate { s: sigmoid((noise(word) + x) / BETA), stretched: true, beta: BETA },
                    OPEN => Gate { s: sigmoid(x + SHIFT), stretched: false, beta: 1.0 },
                    _ => Gate { s: sigmoid(x), stretched: true, beta: 1.0 },
                };
                *out = work(start + k, gate);
            }
        }
    }
}

impl Gate {
    fn value(&self) -> f32 {
        if self.stretched { (self.s * SPAN + GAMMA).clamp(0.0, 1.0) } else { self.s }
    }

    fn slope(&self) -> f32 {
        let (s, stretched) = (self.s, self.s * SPAN + GAMMA);
        match self.stretched {
            false => s * (1.0 - s),
            true if stretched > 0.0 && stretched < 1.0 => SPAN * s * (1.0 - s) / self.beta,
            true => 0.0,
        }
    }
}
