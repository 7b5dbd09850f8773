//! Attention on adapters, where a relation says more than a reference.

use espalier::ops::attention::{Attention, AttentionBackward, Mask};
use espalier::rng::Stream;
use espalier::{Tensor, dispatch};

/// The rungs on lanes take keys in tiles, of which a row may see a part: NaN behind a sequence's length changes no bit.
#[test]
fn hidden_keys_do_not_matter_on_lanes() {
    const TEST: &str = "hidden_keys_do_not_matter_on_lanes";
    let Some(device) = crate::device::wgpu(TEST) else { return };
    let [queries, keys, seen, row] = [35, 64, 37, 2 * 8];
    let normal = |rows: usize, seed: u64| -> Vec<f32> {
        let mut stream = Stream::new(seed, 0);
        (0..rows * row).map(|_| stream.normal() as f32).collect()
    };
    let op = Attention { mask: Mask::None, lengths: true, bias: false, scale: 0.4, query_offset: 0 };
    let run = |hidden: f32| -> Vec<Vec<f32>> {
        let tensor = |rows: usize, mut values: Vec<f32>, from: usize| {
            values[from * row..].fill(hidden);
            Tensor::from_slice(&device, &[1, rows, 2, 8], &values).unwrap()
        };
        let [q, dy] = [1, 2].map(|seed| tensor(queries, normal(queries, seed), queries));
        let [k, v] = [3, 4].map(|seed| tensor(keys, normal(keys, seed), seen));
        let length = Tensor::from_slice(&device, &[1], &[seen as u32]).unwrap();
        let outputs = dispatch::run(&op, &[&q, &k, &v, &length]).unwrap();
        let inputs = [&q, &k, &v, &length, &outputs[0], &outputs[1], &dy];
        let gradients = dispatch::run(&AttentionBackward(op), &inputs).unwrap();
        outputs.iter().chain(&gradients).map(|t| t.to_vec().unwrap()).collect()
    };
    let (zeros, poisoned) = (run(0.0), run(f32::NAN));
    assert_eq!(zeros, poisoned);
    for gradient in &poisoned[3..] {
        assert!(gradient[seen * row..].iter().all(|x| *x == 0.0));
    }
}
