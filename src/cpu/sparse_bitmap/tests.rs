//! Vector and portable code against plain loops.

use super::*;

/// Vector and portable code against plain loops, both types, every width of a panel, and few tokens.
#[test]
fn every_path_gives_the_same_sums() {
    let mut stream = crate::rng::Stream::new(8, 0);
    let (n, words) = (19, 130);
    let mut dense = vec![0u32; n * words];
    // Any bytes; small whole floats, whose sums are exact.
    let mut word = |bytes: bool, kept: usize| match (stream.below(10) < kept, bytes) {
        (false, _) => 0,
        (true, true) => stream.word(),
        (true, false) => (stream.below(9) as f32 - 4.0).to_bits(),
    };
    for bytes in [false, true] {
        for kept in [1, 5, 10] {
            dense.fill_with(|| word(bytes, kept));
            let (mut values, mut lists) = (Vec::new(), Vec::new());
            for b in 0..words.div_ceil(BLOCK) {
                for row in dense.chunks(words) {
                    let (mut mask, start) = (0u64, values.len() as u32);
                    for (place, &w) in row[b * BLOCK..].iter().take(BLOCK).enumerate().filter(|(_, w)| **w != 0) {
                        mask |= 1 << place;
                        values.push(w);
                    }
                    lists.extend([mask as u32, (mask >> 32) as u32, start]);
                }
            }
            values.extend([u32::MAX; PADDING]);
            let weights = Weights { values: &values, lists: &lists, n };
            for m in [1, 2, 3, 5, 8, 9, 17, 40, 128, 140] {
                let x: Vec<f32> = (0..m * words).map(|_| f32::from_bits(word(bytes, 10))).collect();
                check(weights, &x, [m, n, words], bytes, &dense);
            }
        }
    }
}

fn check(weights: Weights, x: &[f32], [m, n, words]: [usize; 3], bytes: bool, dense: &[u32]) {
    let byte = |word: u32, i: u32| i32::from((word >> (8 * i)) as u8 as i8);
    let exact = |i: usize, j: usize| -> f32 {
        let pairs = x[i * words..][..words].iter().map(|x| x.to_bits()).zip(&dense[j * words..][..words]);
        if bytes {
            pairs.map(|(x, &w)| (0..4).map(|b| byte(x, b) * byte(w, b)).sum::<i32>()).sum::<i32>() as f32
        } else {
            pairs.map(|(x, &w)| f32::from_bits(x) * f32::from_bits(w)).sum()
        }
    };
    let (ones, bias) = (vec![1.0; m.max(n)], vec![0.5; n]);
    let scales = bytes.then_some([&ones[..m], &ones[..n]]);
    let product = Product { x, weights, scales, bias: Some(&bias), m, n, words };
    let mut y = vec![f32::NAN; m * n];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let args = Args::new(&[], crate::dtype::DType::F32, &pool);
    if bytes {
        product.run::<true>(&args, &mut y)
    } else {
        product.run::<false>(&args, &mut y)
    }
    for (id, &y) in y.iter().enumerate() {
        assert_eq!(y, exact(id / n, id % n) + 0.5, "bytes {bytes}, m {m}, at {id}");
    }
    // The portable loops on one panel of 16 tokens, whose bytes are as they came.
    let mut lines = vec![ZEROS; words.next_multiple_of(BLOCK)];
    for (id, word) in bytemuck::cast_slice_mut::<_, u32>(&mut lines).iter_mut().enumerate() {
        let (place, i) = (id / 16, id % 16);
        *word = if i < m && place < words { x[i * words + place].to_bits() } else { 0 };
    }
    let mut sums = vec![Line([u32::MAX; 16]); n];
    for (b, x) in lines.chunks(BLOCK).enumerate() {
        let strip = Strip { weights, b, rows: 0..n, x };
        if bytes { lists_bytes(&strip, 1, &mut sums) } else { lists(&strip, 1, &mut sums) }
    }
    for (i, j) in (0..m.min(16)).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let sum = sums[j].0[i];
        let y = if bytes { sum as i32 as f32 } else { f32::from_bits(sum) };
        assert_eq!(y, exact(i, j), "portable, bytes {bytes}, m {m}, at {i}, {j}");
    }
}
