//! Deterministic choices: a pure function of a seed and a counter, so results do not depend on thread count, hash-map order or
//! how often a function was called. The generator is the project's Philox ([`crate::rng`]).

use crate::rng::{Stream, philox};

/// 64 random bits addressed by (seed, counter).
pub fn hash(seed: u64, counter: u64) -> u64 {
    let word = philox([counter as u32, (counter >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(word[0]) << 32 | u64::from(word[1])
}

/// As [`hash`], with a text in place of the counter.
pub fn hash_text(seed: u64, text: &str) -> u64 {
    let digest = blake3::hash(text.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    hash(seed, u64::from_le_bytes(first))
}

/// A number in `0..bound`; 0 when `bound` is 0. The bias of the multiply-shift is below bound / 2^64.
pub fn below(seed: u64, counter: u64, bound: usize) -> usize {
    ((u128::from(hash(seed, counter)) * bound as u128) >> 64) as usize
}

/// A number in [0, 1).
pub fn unit(seed: u64, counter: u64) -> f64 {
    (hash(seed, counter) >> 11) as f64 / (1u64 << 53) as f64
}

/// Fisher-Yates shuffle in place.
pub fn shuffle<T>(seed: u64, items: &mut [T]) {
    Stream::new(seed, 0).shuffle(items);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffle_is_a_permutation_fixed_by_its_seed() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..1000).collect();
            shuffle(seed, &mut items);
            items
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        let mut sorted = order(1);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn unit_and_below_stay_inside_and_are_even() {
        let mut counts = [0u32; 10];
        for i in 0..20_000 {
            counts[below(7, i, 10)] += 1;
            assert!((0.0..1.0).contains(&unit(7, i)));
        }
        // Standard deviation of each count is 42; six of them.
        assert!(counts.iter().all(|&c| (1_746..=2_254).contains(&c)), "{counts:?}");
        assert_eq!(below(7, 0, 0), 0);
    }
}
