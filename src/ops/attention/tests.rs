//! Metamorphic relations: they need no oracle, and catch what the reference and a kernel could both have wrong.

use std::sync::Arc;

use super::{Attention, AttentionBackward, Mask};
use crate::device::{Class, CpuDevice, Device, Kind, Limits, NullDevice};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Error;
use crate::rng::Stream;
use crate::tensor::Tensor;

const DIM: usize = 6;
const HEADS: usize = 2;

fn cpu() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(Some(2)).unwrap())
}

fn op(mask: Mask) -> Attention {
    Attention { mask, lengths: false, bias: false, scale: 0.4, query_offset: 0 }
}

fn normal(device: &Arc<dyn Device>, batch: usize, rows: usize, seed: u64) -> Tensor {
    let mut stream = Stream::new(seed, 0);
    let values: Vec<f64> = (0..batch * rows * HEADS * DIM).map(|_| stream.normal()).collect();
    Tensor::from_f64(device, &[batch, rows, HEADS, DIM], DType::F32, &values).unwrap()
}

fn counts(device: &Arc<dyn Device>, values: &[u32]) -> Tensor {
    Tensor::from_slice(device, &[values.len()], values).unwrap()
}

/// Rows `range` of batch element 0.
fn rows(x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let values = &x.to_vec::<f32>().unwrap()[range.start * HEADS * DIM..range.end * HEADS * DIM];
    Tensor::from_slice(x.device(), &[1, range.len(), HEADS, DIM], values).unwrap()
}

fn run(op: Attention, inputs: &[&Tensor]) -> Vec<f32> {
    dispatch::run(&op, inputs).unwrap()[0].to_vec().unwrap()
}

#[test]
fn a_prefix_of_every_key_is_no_mask_and_an_empty_one_is_causal() {
    let device = cpu();
    let [q, k, v] = [1, 2, 3].map(|seed| normal(&device, 2, 9, seed));
    let prefix = |context: u32| run(op(Mask::Prefix), &[&q, &k, &v, &counts(&device, &[context; 2])]);
    assert_eq!(prefix(9), run(op(Mask::None), &[&q, &k, &v]));
    assert_eq!(prefix(0), run(op(Mask::Causal), &[&q, &k, &v]));
    assert_ne!(prefix(4), prefix(0));
}

#[test]
fn hidden_keys_do_not_matter() {
    let device = cpu();
    let [q, k, v] = [1, 2, 3].map(|seed| normal(&device, 1, 9, seed));
    let padded = Attention { lengths: true, ..op(Mask::None) };
    let length = counts(&device, &[5]);
    let short = run(op(Mask::None), &[&q, &rows(&k, 0..5), &rows(&v, 0..5)]);
    assert_eq!(run(padded, &[&q, &k, &v, &length]), short);
    // Not even when they hold NaN, forward or backward.
    let poison = |x: &Tensor| {
        let mut values = x.to_vec::<f32>().unwrap();
        values[5 * HEADS * DIM..].fill(f32::NAN);
        Tensor::from_slice(&device, &[1, 9, HEADS, DIM], &values).unwrap()
    };
    let (k, v) = (poison(&k), poison(&v));
    let outputs = dispatch::run(&padded, &[&q, &k, &v, &length]).unwrap();
    assert_eq!(outputs[0].to_vec::<f32>().unwrap(), short);
    let dy = normal(&device, 1, 9, 4);
    let inputs = [&q, &k, &v, &length, &outputs[0], &outputs[1], &dy];
    let grads = dispatch::run(&AttentionBackward(padded), &inputs).unwrap();
    for grad in &grads {
        assert!(grad.to_vec::<f32>().unwrap().iter().all(|x| x.is_finite()));
    }
    assert!(grads[1].to_vec::<f32>().unwrap()[5 * HEADS * DIM..].iter().all(|x| *x == 0.0));
}

#[test]
fn a_query_that_sees_nothing_gives_zeros() {
    let device = cpu();
    let [q, k, v] = [1, 2, 3].map(|seed| normal(&device, 1, 3, seed));
    let padded = Attention { lengths: true, ..op(Mask::None) };
    let outputs = dispatch::run(&padded, &[&q, &k, &v, &counts(&device, &[0])]).unwrap();
    assert!(outputs[0].to_vec::<f32>().unwrap().iter().all(|x| *x == 0.0));
    assert!(outputs[1].to_vec::<f32>().unwrap().iter().all(|x| *x == super::MASKED));
}

#[test]
fn decoding_from_a_cache_gives_the_last_row_of_the_whole() {
    let device = cpu();
    let [q, k, v] = [1, 2, 3].map(|seed| normal(&device, 1, 12, seed));
    let whole = run(op(Mask::Causal), &[&rows(&q, 0..10), &rows(&k, 0..10), &rows(&v, 0..10)]);
    // The cache has room for 12 keys, 10 are valid.
    let step = Attention { lengths: true, query_offset: 9, ..op(Mask::Causal) };
    let last = run(step, &[&rows(&q, 9..10), &k, &v, &counts(&device, &[10])]);
    for (x, y) in last.iter().zip(&whole[9 * HEADS * DIM..]) {
        approx::assert_relative_eq!(x, y, max_relative = 1e-5, epsilon = 1e-6);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let bits = |threads: usize| -> Vec<Vec<u8>> {
        let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(threads)).unwrap());
        let [q, k, v, dy] = [1, 2, 3, 4].map(|seed| normal(&device, 3, 150, seed));
        let mut outputs = dispatch::run(&op(Mask::Causal), &[&q, &k, &v]).unwrap();
        let inputs = [&q, &k, &v, &outputs[0], &outputs[1], &dy];
        let grads = dispatch::run(&AttentionBackward(op(Mask::Causal)), &inputs).unwrap();
        outputs.extend(grads);
        outputs.iter().map(|t| t.to_bytes().unwrap()).collect()
    };
    assert_eq!(bits(1), bits(3));
}

#[test]
fn wrong_shapes_are_named() {
    let device = cpu();
    let (q, k) = (normal(&device, 1, 3, 1), normal(&device, 2, 3, 2));
    let refused = dispatch::run(&op(Mask::None), &[&q, &k, &k]);
    assert!(matches!(refused, Err(Error::Shape { op: "attention", .. })));
    let missing = dispatch::run(&op(Mask::Prefix), &[&q, &q, &q]);
    assert!(matches!(missing, Err(Error::Shape { .. })));
    let scale = Attention { scale: f32::NAN, ..op(Mask::None) };
    assert!(matches!(dispatch::run(&scale, &[&q, &q, &q]), Err(Error::Parameter { .. })));
}

#[test]
fn long_loops_are_split_within_the_budget_of_the_device() {
    let null = Arc::new(NullDevice::new(Kind::Wgpu, Class::Cpu, Limits::webgpu()));
    let device: Arc<dyn Device> = null.clone();
    let keys = normal(&device, 1, 100_000, 1);
    let q = normal(&device, 1, 2, 2);
    dispatch::run(&op(Mask::None), &[&q, &keys, &keys]).unwrap();
    let launches = null.take();
    assert!(launches.len() > 2, "{} launches", launches.len());
    assert!(launches.iter().all(|(_, l)| l.trips <= 60_000));
    // The ranges cover the keys without a gap: words 8 and 9 of the parameters.
    let mut next = 0;
    for (_, launch) in &launches[..launches.len() - 1] {
        assert_eq!(launch.params.words()[8], next);
        next = launch.params.words()[9];
    }
    assert_eq!(next, 100_000);
}
