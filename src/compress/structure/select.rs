//! Exactly so many units, the best ones; the lowest index wins among equals.

use super::shrink::Progress;

/// Indices of the `n` largest scores, ascending; among equals the lowest index wins. Exactly `n` of them.
pub fn largest(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order = ranked(scores);
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Indices from the best on.
fn ranked(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Adding 0 makes the two zeros equal.
    order.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)).then(a.cmp(&b)));
    order
}

/// Groups of units over all sites: how many there are, and how many stay in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    pub total: usize,
    pub target: usize,
    pub sites: usize,
    /// Every site loses as many.
    pub even: bool,
}

impl Count {
    /// Groups that stay after round `round` of `rounds`, from 1; `most` units at most go in each.
    pub fn after(&self, round: usize, rounds: usize, progress: Progress, most: Option<usize>) -> usize {
        // Sites of one width lose as many each where they are even.
        let parts = if self.even && self.total.is_multiple_of(self.sites.max(1)) { self.sites.max(1) } else { 1 };
        let removed = (self.total - self.target) / parts;
        let gone = match progress {
            Progress::Linear => round * (removed / rounds) + round.min(removed % rounds),
            Progress::Cubic => {
                let rest = 1.0 - round as f64 / rounds as f64;
                (removed as f64 * (1.0 - rest.powi(3))).round() as usize
            }
        };
        let gone = (gone * parts).min(most.map_or(usize::MAX, |most| most * round));
        if round == rounds { self.target } else { self.total - gone }
    }
}

/// The units of each site that stay, ascending: `groups` groups of `group` units, taken from each site in the order of their
/// scores. Even: as many groups of each site; else the best of all, a group's score the sum of its units', and at least
/// `floor` groups of each.
pub fn choose(scores: &[Vec<f64>], groups: usize, even: bool, floor: usize, group: usize) -> Vec<Vec<usize>> {
    let orders: Vec<Vec<usize>> = scores.iter().map(|scores| ranked(scores)).collect();
    let most = |site: usize| scores[site].len() / group.max(1);
    let mut counts: Vec<usize> = if even {
        (0..scores.len()).map(|site| (groups / scores.len()).min(most(site))).collect()
    } else {
        (0..scores.len()).map(|site| floor.min(most(site))).collect()
    };
    if !even {
        let sum =
            |site: usize, g: usize| orders[site][g * group..(g + 1) * group].iter().map(|&u| scores[site][u]).sum();
        let mut rest: Vec<(f64, usize, usize)> = (0..scores.len())
            .flat_map(|site| (counts[site]..most(site)).map(move |g| (site, g)))
            .map(|(site, g)| (sum(site, g), site, g))
            .collect();
        rest.sort_by(|a, b| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)).then((a.1, a.2).cmp(&(b.1, b.2))));
        let open = groups.saturating_sub(counts.iter().sum());
        rest.iter().take(open).for_each(|(_, site, _)| counts[*site] += 1);
    }
    let stays = |(site, order): (usize, &Vec<usize>)| {
        let mut stay = order[..counts[site] * group].to_vec();
        stay.sort_unstable();
        stay
    };
    orders.iter().enumerate().map(stays).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_keeps_exactly_n_and_the_lowest_index_wins_ties() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, 2.0], 2), [1, 2]);
        assert_eq!(largest(&[1.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(largest(&[f64::NAN, 1.0], 1).len(), 1);
    }

    #[test]
    fn linear_rounds_put_the_remainder_first_and_cubic_ones_most() {
        let count = Count { total: 12, target: 5, sites: 1, even: false };
        let after = |progress, most| (1..=4).map(|r| count.after(r, 4, progress, most)).collect::<Vec<_>>();
        assert_eq!(after(Progress::Linear, None), [10, 8, 6, 5]);
        assert_eq!(after(Progress::Cubic, None), [8, 6, 5, 5]);
        assert_eq!(after(Progress::Cubic, Some(2)), [10, 8, 6, 5]);
        let even = Count { total: 12, target: 6, sites: 3, even: true };
        assert_eq!((1..=2).map(|r| even.after(r, 2, Progress::Linear, None)).collect::<Vec<_>>(), [9, 6]);
    }

    #[test]
    fn uneven_choices_hold_the_floor_and_even_ones_are_even() {
        let scores = [vec![9.0, 8.0, 7.0, 6.0], vec![1.0, 0.0, 0.0, 0.5]];
        assert_eq!(choose(&scores, 4, false, 1, 1), [vec![0, 1, 2], vec![0]]);
        assert_eq!(choose(&scores, 4, true, 1, 1), [vec![0, 1], vec![0, 3]]);
        assert_eq!(choose(&scores, 3, false, 1, 2), [vec![0, 1, 2, 3], vec![0, 3]]);
    }
}
