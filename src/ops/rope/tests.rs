use std::sync::Arc;

use super::{Rope, RopeKind, inverse_frequencies, tables};
use crate::device::{CpuDevice, Device};
use crate::dispatch;
use crate::dtype::DType;
use crate::rng::Stream;
use crate::tensor::Tensor;

const DIM: usize = 8;

fn rotated(
    device: &Arc<dyn Device>,
    kind: RopeKind,
    inverse: bool,
    x: &[f64],
    positions: &[u32],
    blocks: &[u32],
) -> Vec<f64> {
    let n = positions.len();
    let half = inverse_frequencies(DIM / 2, 100.0);
    let frequencies = match kind {
        RopeKind::Half => inverse_frequencies(DIM, 100.0),
        RopeKind::Glm2d => [half.clone(), half].concat(),
    };
    let (cos, sin) = tables(&frequencies, 50);
    let table = |values: &[f32]| Tensor::from_slice(device, &[50, DIM / 2], values).unwrap();
    let x = Tensor::from_f64(device, &[1, n, 1, DIM], DType::F32, x).unwrap();
    let (cos, sin) = (table(&cos), table(&sin));
    let (positions, blocks) =
        (Tensor::from_slice(device, &[1, n], positions).unwrap(), Tensor::from_slice(device, &[1, n], blocks).unwrap());
    let mut inputs = vec![&x, &cos, &sin, &positions];
    if kind == RopeKind::Glm2d {
        inputs.push(&blocks);
    }
    dispatch::run_one(&Rope { kind, inverse }, &inputs).unwrap().to_f64().unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[test]
fn scores_depend_on_distances_alone_and_turning_back_restores() {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).unwrap());
    let mut stream = Stream::new(3, 0);
    let x: Vec<f64> = (0..2 * DIM).map(|_| f64::from(stream.normal() as f32)).collect();
    for kind in [RopeKind::Half, RopeKind::Glm2d] {
        let at = |p: [u32; 2], b: [u32; 2]| {
            let y = rotated(&device, kind, false, &x, &p, &b);
            dot(&y[..DIM], &y[DIM..])
        };
        approx::assert_abs_diff_eq!(at([3, 7], [1, 2]), at([20, 24], [11, 12]), epsilon = 1e-5);
        assert!((at([3, 7], [1, 2]) - at([3, 8], [1, 2])).abs() > 1e-3, "a distance that does not matter");
        let there = rotated(&device, kind, false, &x, &[5, 9], &[2, 0]);
        let back = rotated(&device, kind, true, &there, &[5, 9], &[2, 0]);
        for (x, y) in x.iter().zip(&back) {
            approx::assert_abs_diff_eq!(x, y, epsilon = 1e-5);
        }
    }
}

#[test]
fn position_zero_turns_nothing() {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).unwrap());
    let x: Vec<f64> = (0..DIM).map(|i| i as f64).collect();
    assert_eq!(rotated(&device, RopeKind::Half, false, &x, &[0], &[0]), x);
}

#[test]
fn tables_hold_the_angles_of_the_frequencies() {
    let (cos, sin) = tables(&[1.0, 0.5], 4);
    assert_eq!((cos.len(), sin.len()), (8, 8));
    assert_eq!(cos[3 * 2], 3f64.cos() as f32);
    assert_eq!(sin[3 * 2 + 1], 1.5f64.sin() as f32);
}
