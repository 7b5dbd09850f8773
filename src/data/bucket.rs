//! Which examples form which batch of an epoch: shuffled, then grouped by length so that little is padding, then shuffled
//! again as batches. A pure function of seed and epoch, so a resumed run needs only its step number.

use super::order;

/// Batches within this many are sorted by length together: wide enough for even lengths, narrow enough to stay random.
const WINDOW: usize = 32;

/// An epoch's batches, each a list of example numbers. `draws` may name an example more than once.
pub(super) fn epoch(seed: u64, mut draws: Vec<u32>, rows: usize, length: impl Fn(u32) -> usize) -> Vec<Vec<u32>> {
    order::shuffle(seed, &mut draws);
    let mut batches = Vec::with_capacity(draws.len().div_ceil(rows.max(1)));
    for window in draws.chunks_mut(rows.max(1) * WINDOW) {
        window.sort_by_key(|&example| length(example));
        batches.extend(window.chunks(rows.max(1)).map(<[u32]>::to_vec));
    }
    order::shuffle(order::hash(seed, 1), &mut batches);
    batches
}

/// The batches of the epoch last asked for. Steps mostly come in order, so one epoch is enough to keep.
#[derive(Clone, Debug, Default)]
pub(super) struct EpochCache {
    current: Option<(u64, Vec<Vec<u32>>)>,
}

impl EpochCache {
    /// Example numbers of the batch at `step`; empty when the epoch has fewer batches than `per_epoch` says.
    pub fn at(&mut self, step: u64, per_epoch: u64, make: impl FnOnce(u64) -> Vec<Vec<u32>>) -> &[u32] {
        let (epoch, index) = (step / per_epoch.max(1), (step % per_epoch.max(1)) as usize);
        let (_, batches) = match self.current.take() {
            Some(kept) if kept.0 == epoch => self.current.insert(kept),
            _ => self.current.insert((epoch, make(epoch))),
        };
        batches.get(index).map(Vec::as_slice).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_once_and_neighbours_of_like_length() {
        let length = |example: u32| (example as usize * 7919) % 97;
        let batches = epoch(3, (0..1000).collect(), 8, length);
        assert_eq!(batches.len(), 125);
        let mut seen: Vec<u32> = batches.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
        let padding: usize = batches
            .iter()
            .map(|b| {
                let longest = b.iter().map(|&e| length(e)).max().unwrap_or(0);
                b.iter().map(|&e| longest - length(e)).sum::<usize>()
            })
            .sum();
        assert!(padding < 5_000, "{padding}: random batches of 8 would pad about 40,000 places");
        assert_eq!(batches, epoch(3, (0..1000).collect(), 8, length));
        assert_ne!(batches, epoch(4, (0..1000).collect(), 8, length));
    }
}
