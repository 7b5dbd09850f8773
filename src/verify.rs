//! The table's passes: every kernel record against the f64 reference on poisoned, guarded memory; every gradient
//! against central differences, then every device's gradient against the reference device's.

mod chains;

use std::sync::Arc;

use crate::device::{Device, ReferenceDevice};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Problem};
use crate::op::{Array, Case, Fill, Gradient, Input, Tolerance};
use crate::rng::Stream;
use crate::shape::Meta;
use crate::tensor::Tensor;

/// Bytes of known pattern on both sides of every buffer: 1,024 words.
const GUARD: usize = 4096;
const GUARD_BYTE: u8 = 0xA5;
/// All ones is a NaN in every float type, u32::MAX and -1: never a plausible result.
const POISON: u8 = 0xFF;

/// What became of one check.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Passed,
    Failed(String),
    /// No record fits this device; named, never silent.
    Skipped(String),
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub op: &'static str,
    /// The kernel record with its constants, or "gradient".
    pub kernel: String,
    pub label: String,
    pub seed: u64,
    pub verdict: Verdict,
}

/// Values of one input, rounded to its storage type.
pub fn draw(input: &Input, seed: u64, index: usize) -> Vec<f64> {
    let n = input.meta.count();
    let mut stream = Stream::new(seed, index as u32 + 1);
    let values: Vec<f64> = match &input.fill {
        Fill::Normal { mean, deviation } => (0..n).map(|_| mean + deviation * stream.normal()).collect(),
        Fill::Uniform { low, high } => (0..n).map(|_| low + (high - low) * stream.uniform()).collect(),
        Fill::Integers { low, high } => {
            (0..n).map(|_| (low + stream.below((high - low + 1).max(1) as usize) as i64) as f64).collect()
        }
        Fill::Values(values) => values.clone(),
        Fill::Away { kinks, gap } => (0..n).map(|_| away(stream.normal(), kinks, *gap)).collect(),
        Fill::Custom(f) => f(seed.wrapping_add(index as u64), &input.meta.shape),
    };
    values.into_iter().map(|x| input.meta.dtype.round(x)).collect()
}

fn away(x: f64, kinks: &[f64], gap: f64) -> f64 {
    let near = kinks.iter().find(|&&k| (x - k).abs() < gap);
    near.map_or(x, |&k| if x < k { k - gap - (k - x) } else { k + gap + (x - k) })
}

/// Verifies every record that fits `case` on `device`.
pub fn forward(case: &Case, device: &Arc<dyn Device>, seed: u64) -> Vec<Outcome> {
    let outcome = |kernel, verdict| Outcome { op: case.op.name(), kernel, label: case.label(), seed, verdict };
    let metas = case.metas();
    let out_metas = match case.op.infer(&metas) {
        Ok(metas) => metas,
        Err(e) => return vec![outcome("infer".into(), Verdict::Failed(e.to_string()))],
    };
    let element = case.op.element(&metas, &out_metas);
    let problem = Problem { op: case.op.as_ref(), inputs: &metas, outputs: &out_metas, element, info: device.info() };
    let kernels = dispatch::candidates(&problem);
    if kernels.is_empty() {
        let reason = format!("no {element} kernel fits on {}", device.info().id);
        return vec![outcome("none".into(), Verdict::Skipped(reason))];
    }
    let values: Vec<Vec<f64>> = case.inputs.iter().enumerate().map(|(i, input)| draw(input, seed, i)).collect();
    let mut expected = reference(case, &values);
    if let Some(unrounded) = case.unrounded {
        expected[0] = unrounded(&arrays(case, &values));
    }
    let check = |kernel: &'static Kernel| match run_guarded(case, kernel, device, &values, &out_metas) {
        Ok(got) => compare(case, case.tolerance, &out_metas, &expected, &got),
        Err(e) => Verdict::Failed(e.to_string()),
    };
    kernels.into_iter().map(|k| outcome(k.label(), check(k))).collect()
}

/// The reference's outputs on these inputs.
pub fn reference(case: &Case, values: &[Vec<f64>]) -> Vec<Vec<f64>> {
    case.op.reference(&arrays(case, values))
}

fn arrays(case: &Case, values: &[Vec<f64>]) -> Vec<Array> {
    case.inputs.iter().zip(values).map(|(i, v)| Array { shape: i.meta.shape, data: v.clone() }).collect()
}

/// A tensor with guards on both sides and the given bytes inside.
fn guarded(device: &Arc<dyn Device>, meta: Meta, body: &[u8]) -> Result<Tensor> {
    let inside = body.len().div_ceil(4) * 4;
    let mut bytes = vec![GUARD_BYTE; GUARD + inside + GUARD];
    bytes[GUARD..GUARD + body.len()].copy_from_slice(body);
    let buffer = device.alloc(bytes.len())?;
    device.upload(&buffer, 0, &bytes)?;
    Tensor::over(device, buffer, GUARD, meta)
}

/// The bytes between the guards, which must be intact.
fn unguarded(tensor: &Tensor, what: &str) -> Result<Vec<u8>, String> {
    let inside = tensor.meta().bytes().div_ceil(4) * 4;
    let mut bytes = vec![0; GUARD + inside + GUARD];
    tensor.device().download(tensor.buffer(), 0, &mut bytes).map_err(|e| e.to_string())?;
    let touched = |range: std::ops::Range<usize>| bytes[range].iter().position(|&b| b != GUARD_BYTE);
    if let Some(at) = touched(0..GUARD) {
        return Err(format!("{what}: wrote {} bytes before its start", GUARD - at));
    }
    if let Some(at) = touched(GUARD + inside..bytes.len()) {
        return Err(format!("{what}: wrote past its end, first at byte +{at}"));
    }
    Ok(bytes[GUARD..GUARD + tensor.meta().bytes()].to_vec())
}

type Outputs = std::result::Result<Vec<Vec<f64>>, String>;

fn run_guarded(
    case: &Case,
    kernel: &Kernel,
    device: &Arc<dyn Device>,
    values: &[Vec<f64>],
    out: &[Meta],
) -> Result<Vec<Vec<f64>>> {
    let fail =
        |reason: String| Error::Invariant { stage: kernel.name.into(), rule: "guarded run".into(), measured: reason };
    run_poisoned(case, kernel, device, values, out)?.map_err(fail)
}

fn run_poisoned(
    case: &Case,
    kernel: &Kernel,
    device: &Arc<dyn Device>,
    values: &[Vec<f64>],
    out: &[Meta],
) -> Result<Outputs> {
    let encoded: Vec<Vec<u8>> = case.inputs.iter().zip(values).map(|(i, v)| i.meta.dtype.encode(v)).collect();
    let inputs: Vec<Tensor> =
        case.inputs.iter().zip(&encoded).map(|(i, bytes)| guarded(device, i.meta, bytes)).collect::<Result<_>>()?;
    let aliases = case.op.aliases();
    let make = |(index, meta): (usize, &Meta)| match aliases.iter().find(|(output, _)| *output == index) {
        Some(&(_, input)) => Ok(inputs[input].clone()),
        None => guarded(device, *meta, &vec![POISON; meta.bytes()]),
    };
    let outputs: Vec<Tensor> = out.iter().enumerate().map(make).collect::<Result<_>>()?;
    dispatch::run_with(kernel, case.op.as_ref(), &inputs.iter().collect::<Vec<_>>(), &outputs)?;
    device.sync()?;
    let mut results = Vec::new();
    for (index, tensor) in outputs.iter().enumerate() {
        match unguarded(tensor, &format!("output {index}")) {
            Ok(bytes) => results.push(tensor.dtype().decode(&bytes)),
            Err(reason) => return Ok(Err(reason)),
        }
    }
    for (index, tensor) in inputs.iter().enumerate() {
        let in_place = aliases.iter().any(|(_, input)| *input == index);
        match unguarded(tensor, &format!("input {index}")) {
            Ok(bytes) if in_place || bytes == encoded[index] => {}
            Ok(_) => return Ok(Err(format!("input {index} was changed"))),
            Err(reason) => return Ok(Err(reason)),
        }
    }
    Ok(Ok(results))
}

/// Holds outputs against expected ones by the case's own bounds.
pub fn compare(case: &Case, tolerance: Tolerance, metas: &[Meta], expected: &[Vec<f64>], got: &[Vec<f64>]) -> Verdict {
    for (index, ((meta, want), have)) in metas.iter().zip(expected).zip(got).enumerate() {
        if let Err(reason) = judge(tolerance, Bounds::of(case, index, meta), meta.dtype, want, have) {
            return Verdict::Failed(format!("output {index} {meta}: {reason}"));
        }
    }
    Verdict::Passed
}

/// What a case says of the bounds of one output.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Widens the bounds of the class.
    factor: f64,
    /// The least scale that a tensor is judged by.
    terms: f64,
    /// The length of a row where an intermediate may be rounded to the storage type.
    rounded: Option<usize>,
    /// Whole numbers whose reference may not be rounded yet.
    whole: bool,
}

impl Bounds {
    /// Those of output `index`; `meta` has the shape of the values that are judged, which may be a part of the output.
    pub fn of(case: &Case, index: usize, meta: &Meta) -> Self {
        let rounded = case.rounded.contains(&index).then(|| meta.shape.last());
        Self { rounded, whole: case.unrounded.is_some() && index == 0, ..Self::of_gradient(case) }
    }

    /// Those of a gradient: its op is another than the case's.
    fn of_gradient(case: &Case) -> Self {
        Self { factor: case.loosened.map_or(1.0, |(factor, _)| factor), terms: case.terms, rounded: None, whole: false }
    }
}

/// Unit roundoff of f32.
const U: f64 = 5.960_464_477_539_063e-8;

/// Bound of an element's error by an intermediate that is rounded once to a 16-bit type, in its epsilons times the output's scale.
///
/// Let y = sum of h w over k, and let h (1 + d) stand for h. The error of rounding is uniform within half an epsilon of the
/// binade, a mantissa m about log-uniform in 1..2: the mean of d squared is epsilon^2 / 12 times the mean of 1 / m^2, which
/// is 3 / (8 ln 2), so d deviates by 0.21 epsilon. The d are independent, so y deviates by 0.21 epsilon sqrt(sum (h w)^2), and
/// that root is the rms of y where terms have signs of their own, less than it where they agree: 0.21 epsilon of the
/// scale of y however long the sum. The worst of a million such errors is 4.9 deviations, one epsilon. Twice the worst error of the plain
/// op-by-op chain is the rule, and the chain, which stores every intermediate, has this error at least: hence 2. `chains`
/// holds the bound against real chains.
///
/// The scale is the rms of the tensor or of the element's row, whichever is larger: under a causal mask rows are sums of
/// different lengths, and a large row has large errors where its own elements cancel, too.
///
/// The aggregate needs no term: one rounding adds 0.045 epsilon^2 to the normalised error, of 1 (f16) and 1.6 (bf16) that
/// 16-bit storage has.
const ROUNDED: f64 = 2.0;

/// What `ROUNDED` allows the elements of each row.
fn allowances(dtype: DType, want: &[f64], row: usize, rms: f64) -> Vec<f64> {
    let unit = if dtype.size() == 2 { ROUNDED * dtype.epsilon() } else { 0.0 };
    let power = |row: &[f64]| row.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>();
    want.chunks(row.max(1)).map(|row| unit * (power(row) / row.len() as f64).sqrt().max(rms)).collect()
}

/// Holds values against the reference: the worst element and the normalised mean squared error must both be in bounds.
/// Bounds by class (element: relative to the value + relative to the tensor's scale; aggregate), after Table 5 of the
/// project's numerics notes: arithmetic 1 ulp; transcendental 4e-6 or 1e-6; contraction 2 K u; 16-bit storage adds 2 ulp, a rounded
/// intermediate `ROUNDED`. Where kernels round to `whole` numbers, the bound is how far beyond a tie a value may lie.
pub fn judge(
    tolerance: Tolerance,
    Bounds { factor, terms, rounded: row, whole }: Bounds,
    dtype: DType,
    want: &[f64],
    have: &[f64],
) -> Result<(), String> {
    if want.len() != have.len() {
        return Err(format!("{} values where {} were expected", have.len(), want.len()));
    }
    let rounded: Vec<f64> = want.iter().map(|&x| dtype.round(x)).collect();
    let finite = |v: &&f64| v.is_finite();
    let power = want.iter().filter(finite).map(|x| x * x).sum::<f64>().max(terms * terms * want.len() as f64);
    let rms = (power / want.len().max(1) as f64).sqrt();
    let exact = tolerance == Tolerance::Exact || !(dtype.is_float() || whole);
    let (relative, absolute, aggregate) = match tolerance {
        _ if exact => (0.0, 0.0, 0.0),
        Tolerance::Arithmetic => (2.0 * U, 1e-38, 1e-13),
        Tolerance::Transcendental => (4e-6, 1e-6 * terms.max(1.0), 1e-11),
        Tolerance::Contraction { k } => {
            let bound = 2.0 * (k.max(8) as f64) * U;
            (bound, bound * rms + 1e-30, 1e-10)
        }
        Tolerance::Exact => (0.0, 0.0, 0.0),
    };
    let (storage, tiny, storage_aggregate) = match dtype {
        _ if exact => (0.0, 0.0, 0.0),
        DType::F16 => (2.0 * DType::F16.epsilon(), 1.2e-7, 1e-6),
        DType::Bf16 => (2.0 * DType::Bf16.epsilon(), 1e-38, 1e-4),
        _ => (0.0, 0.0, 0.0),
    };
    let allowed = row.map_or_else(Vec::new, |row| allowances(dtype, want, row, rms));
    let row = row.unwrap_or_default().max(1);
    let mut error_power = 0.0;
    for (index, ((&w, &r), &h)) in want.iter().zip(&rounded).zip(have).enumerate() {
        // The class must match: a NaN is never a wildcard, an overflow of the storage type is the oracle's too.
        if !r.is_finite() || !h.is_finite() {
            if r.is_nan() == h.is_nan() && (r.is_nan() || r == h) {
                continue;
            }
            return Err(format!("element {index}: {h} where the reference has {w}"));
        }
        let (target, error) = match (exact, whole) {
            (true, _) => (r, (h - r).abs()),
            (false, true) => (w, if h == r { 0.0 } else { (h - w).abs() - 0.5 }),
            (false, false) => (w, (h - w).abs()),
        };
        let between = allowed.get(index / row).copied().unwrap_or(0.0);
        let bound = factor * (relative * w.abs() + absolute) + storage * w.abs() + tiny + between;
        if error > bound {
            return Err(format!(
                "element {index}: {h} where the reference has {target}, error {error:.3e} above {bound:.3e}"
            ));
        }
        error_power += error * error;
    }
    let nmse = error_power / power.max(1e-300);
    let bound = factor * factor * aggregate + storage_aggregate;
    if error_power > 1e-60 && nmse > bound {
        return Err(format!("normalised mean squared error {nmse:.3e} above {bound:.3e}"));
    }
    Ok(())
}

/// Directions along which each input is differenced, beside single elements.
const DIRECTIONS: usize = 3;
const ELEMENTS: usize = 6;
/// Relative error that differences with one Richardson step must reach.
const DIFFERENCE_BOUND: f64 = 1e-6;

/// Differences the reference against the gradient rule in f64, then holds the device's gradient against it.
pub fn gradient(case: &Case, device: &Arc<dyn Device>, seed: u64) -> Outcome {
    let verdict = match check_gradient(case, device, seed) {
        Ok(verdict) => verdict,
        Err(e) => Verdict::Failed(e.to_string()),
    };
    Outcome { op: case.op.name(), kernel: "gradient".into(), label: case.label(), seed, verdict }
}

fn check_gradient(case: &Case, device: &Arc<dyn Device>, seed: u64) -> Result<Verdict> {
    let metas = case.metas();
    let out_metas = case.op.infer(&metas)?;
    let values: Vec<Vec<f64>> = case.inputs.iter().enumerate().map(|(i, input)| draw(input, seed, i)).collect();
    let seeds = output_gradients(case, &out_metas, seed);
    let oracle: Arc<dyn Device> = Arc::new(ReferenceDevice::new());
    let truth = device_gradient(case, &oracle, &values, &seeds)?;
    if truth.iter().all(Option::is_none) {
        return Ok(Verdict::Failed("the gradient rule gives no gradient at all".into()));
    }
    for (index, grad) in truth.iter().enumerate() {
        if let Some(grad) = grad
            && let Some(reason) = difference(case, &values, &seeds, index, grad, seed)
        {
            return Ok(Verdict::Failed(format!("input {index}: {reason}")));
        }
    }
    let got = device_gradient(case, device, &values, &seeds)?;
    // A gradient adds the forward's own rounding to its own.
    let tolerance = match case.tolerance {
        Tolerance::Contraction { k } => Tolerance::Contraction { k: 4 * k.max(16) },
        _ => Tolerance::Contraction { k: 64 },
    };
    for (index, (want, have)) in truth.iter().zip(&got).enumerate() {
        match (want, have) {
            (Some(want), Some(have)) => {
                if let Err(reason) = judge(tolerance, Bounds::of_gradient(case), metas[index].dtype, want, have) {
                    return Ok(Verdict::Failed(format!("gradient of input {index} on {}: {reason}", device.info().id)));
                }
            }
            (None, None) => {}
            _ => return Ok(Verdict::Failed(format!("input {index} has a gradient on one device only"))),
        }
    }
    Ok(Verdict::Passed)
}

/// Random gradients of the differentiable outputs; `None` for statistics and indices.
fn output_gradients(case: &Case, out_metas: &[Meta], seed: u64) -> Vec<Option<Vec<f64>>> {
    let mut stream = Stream::new(seed, 0x6ead);
    let draw = |(index, meta): (usize, &Meta)| {
        let wanted = index < case.op.differentiable() && meta.dtype.is_float();
        wanted.then(|| (0..meta.count()).map(|_| meta.dtype.round(stream.normal())).collect())
    };
    out_metas.iter().enumerate().map(draw).collect()
}

fn device_gradient(
    case: &Case,
    device: &Arc<dyn Device>,
    values: &[Vec<f64>],
    seeds: &[Option<Vec<f64>>],
) -> Result<Vec<Option<Vec<f64>>>> {
    let upload = |meta: Meta, v: &[f64]| Tensor::from_f64(device, meta.dims(), meta.dtype, v);
    let inputs: Vec<Tensor> = case.inputs.iter().zip(values).map(|(i, v)| upload(i.meta, v)).collect::<Result<_>>()?;
    let outputs = dispatch::run_on(device, case.op.as_ref(), &inputs.iter().collect::<Vec<_>>())?;
    let grads: Vec<Option<Tensor>> = outputs
        .iter()
        .zip(seeds)
        .map(|(t, seed)| seed.as_ref().map(|v| upload(t.meta(), v)).transpose())
        .collect::<Result<_>>()?;
    // Only what `saves` declares is handed over, as on the tape.
    let saves = case.op.saves();
    let keep = |list: &[Tensor], which: &[usize]| -> Vec<Option<Tensor>> {
        list.iter().enumerate().map(|(i, t)| which.contains(&i).then(|| t.clone())).collect()
    };
    let context = Gradient {
        op: case.op.name(),
        device,
        input_metas: &case.metas(),
        inputs: &keep(&inputs, saves.inputs),
        outputs: &keep(&outputs, saves.outputs),
        grads: &grads,
        needs: &vec![true; inputs.len()],
    };
    case.op.gradient(&context)?.iter().map(|g| g.as_ref().map(Tensor::to_f64).transpose()).collect()
}

/// The scalar that is differenced: sum over outputs of <output gradient, output>.
fn loss(case: &Case, values: &[Vec<f64>], seeds: &[Option<Vec<f64>>]) -> f64 {
    let outputs = reference(case, values);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    outputs.iter().zip(seeds).filter_map(|(o, s)| s.as_ref().map(|s| dot(o, s))).sum()
}

fn difference(
    case: &Case,
    values: &[Vec<f64>],
    seeds: &[Option<Vec<f64>>],
    input: usize,
    grad: &[f64],
    seed: u64,
) -> Option<String> {
    let n = grad.len();
    let mut stream = Stream::new(seed, 0xd1ff + input as u32);
    let norm = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
    let along = |direction: &[f64], step: f64| {
        let mut moved = values.to_vec();
        let mut at = |h: f64| {
            for ((m, v), d) in moved[input].iter_mut().zip(&values[input]).zip(direction) {
                *m = v + h * d;
            }
            loss(case, &moved, seeds)
        };
        let mut slope = |h: f64| (at(h) - at(-h)) / (2.0 * h);
        let (coarse, fine) = (slope(step), slope(step / 2.0));
        (4.0 * fine - coarse) / 3.0
    };
    for probe in 0..DIRECTIONS + ELEMENTS.min(n) {
        let direction: Vec<f64> = if probe < DIRECTIONS {
            (0..n).map(|_| stream.normal()).collect()
        } else {
            let hot = stream.below(n);
            (0..n).map(|i| f64::from(i == hot)).collect()
        };
        let length = direction.iter().map(|d| d * d).sum::<f64>().sqrt().max(1e-300);
        let want = along(&direction, 1e-3 / length.max(1.0));
        let have: f64 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let scale = want.abs().max(norm * length / (n as f64).sqrt()).max(1e-6);
        // Not `error > bound`: a NaN must fail.
        if !((want - have).abs() <= DIFFERENCE_BOUND * scale) {
            return Some(format!("differences give {want:.9e}, the gradient rule {have:.9e} (probe {probe})"));
        }
    }
    None
}

/// Every case of the table whose op name fits `glob` (`*` and `?`).
pub fn select(glob: &str) -> Vec<Case> {
    let cases = crate::ops::FAMILIES.iter().flat_map(|f| (f.cases)());
    cases.filter(|c| glob_match(glob, c.op.name())).collect()
}

/// Shell-style match with `*` and `?`.
pub fn glob_match(glob: &str, text: &str) -> bool {
    match (glob.chars().next(), text.chars().next()) {
        (None, None) => true,
        (Some('*'), _) => {
            glob_match(&glob[1..], text) || text.chars().next().is_some_and(|c| glob_match(glob, &text[c.len_utf8()..]))
        }
        (Some(g), Some(t)) if g == '?' || g == t => glob_match(&glob[g.len_utf8()..], &text[t.len_utf8()..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judge_refuses_what_it_must() {
        let class = Tolerance::Transcendental;
        let plain = Bounds { factor: 1.0, terms: 0.0, rounded: None, whole: false };
        assert!(judge(class, plain, DType::F32, &[1.0, 2.0], &[1.0, 2.000_001]).is_ok());
        assert!(judge(class, plain, DType::F32, &[1.0, 2.0], &[1.0, 2.1]).is_err());
        assert!(judge(class, plain, DType::F32, &[1.0], &[f64::NAN]).is_err());
        assert!(judge(class, plain, DType::F32, &[f64::NAN], &[1.0]).is_err());
        assert!(judge(Tolerance::Exact, plain, DType::F32, &[1.0], &[1.0 + 1e-7]).is_err());
        // Many small errors that each pass must not pass together.
        let want = vec![1e-3; 1000];
        let have = vec![1e-3 + 9e-7; 1000];
        assert!(judge(class, plain, DType::F32, &want, &have).is_err());
    }

    #[test]
    fn whole_numbers_may_be_the_other_neighbour_at_a_tie_alone() {
        let bounds = Bounds { factor: 1.0, terms: 0.0, rounded: None, whole: true };
        let judged = |want, have| judge(Tolerance::Transcendental, bounds, DType::I8, &[want], &[have]).is_ok();
        assert!(judged(63.500_01, 64.0) && judged(63.500_01, 63.0) && judged(-63.499_99, -64.0));
        assert!(!judged(63.49, 64.0) && !judged(63.0, 64.0) && !judged(63.500_01, 62.0) && !judged(127.5, 0.0));
        let exact = judge(Tolerance::Exact, bounds, DType::I8, &[63.500_01], &[63.0]);
        assert!(exact.is_err() && judge(Tolerance::Exact, bounds, DType::I8, &[63.5], &[64.0]).is_ok());
    }

    #[test]
    fn a_rounded_intermediate_is_allowed_on_16_bits_by_the_scale_of_the_row() {
        let class = Tolerance::Contraction { k: 8 };
        let plain = Bounds { factor: 1.0, terms: 0.0, rounded: None, whole: false };
        let rounded = Bounds { rounded: Some(2), ..plain };
        // Ten rows of ones, then a row of rms 2.8, the tensor's being 1.3.
        let off = |epsilons: f64, dtype: DType| {
            let mut values = [1.0; 22];
            (values[20], values[21]) = (4.0, epsilons * dtype.epsilon());
            values
        };
        for dtype in [DType::F16, DType::Bf16] {
            let want = off(0.0, dtype);
            assert!(judge(class, rounded, dtype, &want, &off(5.0, dtype)).is_ok());
            assert!(judge(class, rounded, dtype, &want, &off(6.0, dtype)).is_err());
            assert!(judge(class, plain, dtype, &want, &off(0.1, dtype)).is_err());
        }
        assert!(judge(class, rounded, DType::F32, &[1.0, 1.0], &[1.0, 1.001]).is_err());
    }

    #[test]
    fn globs() {
        assert!(glob_match("gelu*", "gelu_erf_bwd") && glob_match("*", "") && glob_match("?elu", "relu"));
        assert!(!glob_match("gelu", "gelu_erf") && !glob_match("?", ""));
    }
}
