//! Checking a case of a large model's size in f64 on the parts that it names, and drawing its inputs.

use std::sync::Arc;

use super::measure::slot;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::op::{Array, Input};
use crate::ops::large::{Cut, Large};
use crate::report::bench::BenchRecord;
use crate::shape::{Meta, Shape};
use crate::verify::{self, Bounds, Verdict, draw};

/// Values that are drawn; longer inputs repeat them. A multiple of 4 for masks of fours, and otherwise odd, so that rows
/// of the usual lengths all begin elsewhere in it.
const DRAWN: usize = 4 * 262_139;

/// Inputs of a large case as bytes: fresh random values, repeated with a period that no row shares.
pub fn inputs(large: &Large, seed: u64) -> Vec<Vec<u8>> {
    large.case.inputs.iter().enumerate().map(|(index, input)| bytes(input, seed, index)).collect()
}

fn bytes(input: &Input, seed: u64, index: usize) -> Vec<u8> {
    let Meta { shape, dtype } = input.meta;
    let whole = matches!(input.fill, crate::op::Fill::Values(_)) || shape.count() <= DRAWN;
    let drawn = Shape::new(&[DRAWN]).ok().filter(|_| !whole).unwrap_or(shape);
    let period =
        dtype.encode(&draw(&Input { meta: Meta { shape: drawn, dtype }, fill: input.fill.clone() }, seed, index));
    let mut all = Vec::with_capacity(input.meta.bytes());
    while all.len() < input.meta.bytes() {
        let missing = input.meta.bytes() - all.len();
        all.extend_from_slice(&period[..period.len().min(missing)]);
    }
    all
}

/// The elements of a tensor that are left after the cuts.
fn keep(meta: Meta, bytes: &[u8], cuts: &[Cut]) -> Result<Array> {
    let dims = meta.dims();
    let kept: Vec<Option<Vec<usize>>> =
        (0..dims.len()).map(|axis| cuts.iter().find(|c| c.0 == axis).map(|c| c.1.indices(dims[axis]))).collect();
    // Behind the last cut axis everything is contiguous.
    let outer = kept.iter().rposition(Option::is_some).map_or(0, |axis| axis + 1);
    let run = dims[outer..].iter().product::<usize>() * meta.dtype.size();
    let mut starts = vec![0usize];
    for (axis, kept) in kept[..outer].iter().enumerate() {
        let all: Vec<usize> = kept.clone().unwrap_or_else(|| (0..dims[axis]).collect());
        starts = starts.iter().flat_map(|start| all.iter().map(move |i| start * dims[axis] + i)).collect();
    }
    let mut data = Vec::with_capacity(starts.len() * run / meta.dtype.size().max(1));
    for start in starts {
        data.extend(meta.dtype.decode(&bytes[start * run..][..run]));
    }
    let extents: Vec<usize> = kept.iter().zip(dims).map(|(k, &d)| k.as_ref().map_or(d, Vec::len)).collect();
    Ok(Array { shape: Shape::new(&extents)?, data })
}

/// Where the poison of a fresh output is left: something that was never written.
fn unwritten(meta: Meta, bytes: &[u8]) -> Option<usize> {
    let size = meta.dtype.size();
    let floats = meta.dtype.is_float();
    bytes.chunks_exact(size).position(|element| floats && element.iter().all(|&b| b == 0xFF))
}

/// Runs `kernel` once and holds its outputs against the reference on every part; the verdict, and in the record the
/// largest relative error (of the Frobenius norm) of an output.
pub fn check(
    record: &mut BenchRecord,
    large: &Large,
    encoded: &[Vec<u8>],
    kernel: &Kernel,
    device: &Arc<dyn Device>,
) -> Result<Verdict> {
    let case = &large.case;
    let ran = slot(case, device, encoded)?;
    ran.run(kernel, case)?;
    let outputs: Vec<Vec<u8>> = ran.outputs.iter().map(crate::tensor::Tensor::to_bytes).collect::<Result<_>>()?;
    drop(ran);
    let (metas, out_metas) = (case.metas(), case.op.infer(&case.metas())?);
    for (index, (meta, bytes)) in out_metas.iter().zip(&outputs).enumerate() {
        if let Some(element) = unwritten(*meta, bytes) {
            return Ok(Verdict::Failed(format!("output {index}: element {element} was not written")));
        }
    }
    let mut worst = 0.0f64;
    for (number, part) in large.parts.iter().enumerate() {
        let small = metas.iter().zip(encoded).zip(&part.inputs);
        let arrays: Vec<Array> = small.map(|((meta, bytes), cuts)| keep(*meta, bytes, cuts)).collect::<Result<_>>()?;
        let expected = part.op.as_ref().unwrap_or(&case.op).reference(&arrays);
        drop(arrays);
        for (index, cuts) in part.outputs.iter().enumerate() {
            let Some(cuts) = cuts else { continue };
            let meta = out_metas[index];
            let (want, Array { shape, data: got }) = (&expected[index], keep(meta, &outputs[index], cuts)?);
            worst = worst.max(relative_error(meta.dtype, want, &got));
            let bounds = Bounds::of(case, index, &Meta { shape, ..meta });
            if let Err(reason) = verify::judge(case.tolerance, bounds, meta.dtype, want, &got) {
                return Ok(Verdict::Failed(format!("part {number}, output {index}: {reason}")));
            }
        }
    }
    record.error_metric = "relative Frobenius error against f64 on sampled parts".into();
    record.error_value = Some(worst);
    Ok(Verdict::Passed)
}

/// |got - want| / |want| over finite elements.
fn relative_error(dtype: DType, want: &[f64], got: &[f64]) -> f64 {
    let pairs = || want.iter().map(|&w| if dtype.is_float() { w } else { dtype.round(w) }).zip(got);
    let finite = || pairs().filter(|(w, g)| w.is_finite() && g.is_finite());
    let error: f64 = finite().map(|(w, g)| (g - w) * (g - w)).sum();
    let power: f64 = finite().map(|(w, _)| w * w).sum();
    if power > 0.0 { (error / power).sqrt() } else { error.sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Fill;
    use crate::ops::large::Pick;

    #[test]
    fn cuts_keep_the_named_elements() {
        let meta = Meta::new(&[3, 4, 2], DType::F32).unwrap();
        let bytes = DType::F32.encode(&(0..24).map(f64::from).collect::<Vec<_>>());
        let all = keep(meta, &bytes, &[]).unwrap();
        assert_eq!((all.dims(), all.data.len(), all.data[23]), (&[3usize, 4, 2][..], 24, 23.0));
        let cut = keep(meta, &bytes, &[(0, Pick::Last(1)), (1, Pick::Spread(2))]).unwrap();
        assert_eq!((cut.dims(), &cut.data[..]), (&[1usize, 2, 2][..], &[16.0, 17.0, 22.0, 23.0][..]));
        let columns = keep(meta, &bytes, &[(2, Pick::First(1))]).unwrap();
        assert_eq!(columns.data[..3], [0.0, 2.0, 4.0]);
        let scalar = keep(Meta::new(&[], DType::F32).unwrap(), &bytes[4..8], &[]).unwrap();
        assert_eq!(scalar.data, [1.0]);
    }

    #[test]
    fn long_inputs_repeat_with_a_period_of_their_own() {
        let input = |n: usize| Input { meta: Meta::new(&[n], DType::Bf16).unwrap(), fill: Fill::NORMAL };
        let long = bytes(&input(DRAWN + 1000), 3, 0);
        assert_eq!(long.len(), 2 * (DRAWN + 1000));
        assert_eq!(long[..2000], long[2 * DRAWN..]);
        assert_ne!(long[..2000], long[2 * 1_048_576..][..2000.min(long.len() - 2 * 1_048_576)]);
    }

    #[test]
    fn poison_that_is_left_is_found() {
        let meta = Meta::new(&[2], DType::F32).unwrap();
        let mut bytes = DType::F32.encode(&[1.0, 2.0]);
        assert_eq!(unwritten(meta, &bytes), None);
        bytes[4..].fill(0xFF);
        assert_eq!(unwritten(meta, &bytes), Some(1));
    }
}
