//! Statistics of the draws, accuracy of the inversion, and the same bits everywhere.

use std::sync::Arc;

use super::*;
use crate::device::{self, Device};
use crate::dispatch;

fn open(name: &str) -> Option<Arc<dyn Device>> {
    match device::open(name) {
        Ok(device) => Some(device),
        Err(e) => {
            let required = std::env::var("ESPALIER_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == name), "{name} is required: {e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

const COUNT: usize = 1 << 20;

fn normals(device: &Arc<dyn Device>) -> Vec<f32> {
    let dims = Shape::new(&[COUNT]).unwrap();
    let site = Site { seed: 20_240_229, site: 5, step: 1 };
    let op = Normal { mean: 0.0, deviation: 1.0, dims, site, dtype: DType::F32 };
    dispatch::one(dispatch::run_on(device, &op, &[]).unwrap(), "normal").unwrap().to_vec().unwrap()
}

#[test]
fn quantiles_are_those_of_the_tables() {
    // Abramowitz and Stegun, tables 26.1 and 26.2.
    for (z, q) in [(0.5, 0.308_537_538_7), (1.0, 0.158_655_253_9), (2.0, 0.022_750_131_9), (3.0, 1.349_898_032e-3)] {
        approx::assert_relative_eq!(upper_tail(z), q, max_relative = 1e-8);
        approx::assert_relative_eq!(tail_quantile(q), z, max_relative = 1e-8);
    }
    approx::assert_relative_eq!(upper_tail(6.0), 9.865_876_450e-10, max_relative = 1e-8);
    approx::assert_relative_eq!(upper_tail(2.4999999), upper_tail(2.5000001), max_relative = 1e-5);
}

#[test]
fn normals_are_the_same_bits_on_every_device_and_thread_count() {
    let cpu = normals(&open("cpu:1").unwrap());
    for name in ["cpu:2", "wgpu"] {
        let Some(device) = open(name) else { continue };
        let other = normals(&device);
        let differs = cpu.iter().zip(&other).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}: {:?}", differs.map(|i| (cpu[i], other[i])));
    }
}

/// The bits themselves: a change of the generator changes every run that was ever recorded.
#[test]
fn normals_are_pinned() {
    let values = normals(&open("cpu:1").unwrap());
    let hash = blake3::hash(bytemuck::cast_slice(&values)).to_hex();
    assert_eq!(&hash[..16], "950b13fb96d0d2d5", "first values {:?}", &values[..4]);
}

#[test]
fn normals_are_normal() {
    let mut values: Vec<f64> = normals(&open("cpu").unwrap()).into_iter().map(f64::from).collect();
    let n = COUNT as f64;
    let moment = |k: i32| values.iter().map(|x| x.powi(k)).sum::<f64>() / n;
    // Standard errors: 1/sqrt n, sqrt(2/n), sqrt(15/n), sqrt(96/n); four of each are allowed.
    for (k, truth, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
        let bound = 4.0 * (variance / n).sqrt();
        assert!((moment(k) - truth).abs() < bound, "moment {k} = {}", moment(k));
    }
    for z in [2.0, 3.0, 4.0] {
        let expected = n * upper_tail(z);
        let seen = [values.iter().filter(|x| **x > z).count(), values.iter().filter(|x| **x < -z).count()];
        for count in seen {
            assert!((count as f64 - expected).abs() < 4.5 * expected.sqrt(), "{count} beyond {z}, expected {expected}");
        }
    }
    // Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 with probability 0.1 %.
    values.sort_by(f64::total_cmp);
    let below = |x: f64| if x < 0.0 { upper_tail(-x) } else { 1.0 - upper_tail(x) };
    let distance = values.iter().enumerate().map(|(i, x)| (below(*x) - (i as f64 + 0.5) / n).abs()).fold(0.0, f64::max);
    assert!(distance * n.sqrt() < 1.95, "{}", distance * n.sqrt());
}

#[test]
fn dropout_keeps_the_share_it_should() {
    let device = open("cpu").unwrap();
    let x = Tensor::from_slice(&device, &[COUNT], &vec![1.0f32; COUNT]).unwrap();
    let run = |step: u32| {
        let step = Tensor::from_slice(&device, &[1], &[step]).unwrap();
        let op = Dropout { probability: 0.3, seed: 1, site: 2 };
        dispatch::run_one(&op, &[&x, &step]).unwrap().to_vec::<f32>().unwrap()
    };
    let (first, second) = (run(0), run(1));
    let kept = first.iter().filter(|y| **y != 0.0).count() as f64 / COUNT as f64;
    assert!((kept - 0.7).abs() < 4.0 * (0.21 / COUNT as f64).sqrt(), "{kept}");
    // Steps are independent: both keep an element with probability 0.49.
    let both = first.iter().zip(&second).filter(|(a, b)| **a != 0.0 && **b != 0.0).count() as f64 / COUNT as f64;
    assert!((both - 0.49).abs() < 4.0 * (0.25 / COUNT as f64).sqrt(), "{both}");
    let step = Tensor::from_slice(&device, &[1], &[0u32]).unwrap();
    assert!(dispatch::run_one(&Dropout { probability: 1.0, seed: 1, site: 2 }, &[&x, &step]).is_err());
}
