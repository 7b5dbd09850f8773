//! Which neurons make up an expert. Neurons move in groups of [`super::GROUP`], every expert gets equally many, and every split is a
//! function of its arguments alone.

use serde::{Deserialize, Serialize};

use super::GROUP;
use super::report::activations;
use crate::dispatch;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::matmul::Matmul;
use crate::rng::Stream;
use crate::tensor::Tensor;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Balanced k-means on the normalised rows of the in-projection: neurons that look for the same.
    #[default]
    Clusters,
    /// The baseline: a permutation, cut into equal parts.
    Random,
    /// Neurons that are active for the same tokens: a balanced partition of the graph of co-activations.
    CoActivation,
}

const CLUSTER_ROUNDS: usize = 20;

/// Balanced k-means on L2-normalised rows: `groups` rows into `clusters` of equal size. Centres start from evenly
/// spaced rows; each round assigns (row, cluster) pairs from the most similar on while a cluster has room, so the
/// result is deterministic. Returns each row's cluster.
pub fn balanced_clusters(rows: &[Vec<f64>], clusters: usize) -> Vec<usize> {
    let size = rows.len() / clusters.max(1);
    let unit: Vec<Vec<f64>> = rows.iter().map(|r| normalised(r)).collect();
    let mut centres: Vec<Vec<f64>> = (0..clusters).map(|c| unit[c * size].clone()).collect();
    let mut assigned = vec![usize::MAX; rows.len()];
    for _ in 0..CLUSTER_ROUNDS {
        let mut pairs: Vec<(f64, usize, usize)> = Vec::with_capacity(rows.len() * clusters);
        for (r, row) in unit.iter().enumerate() {
            pairs.extend(centres.iter().enumerate().map(|(c, centre)| (dot(row, centre), r, c)));
        }
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut next = vec![usize::MAX; rows.len()];
        let mut room = vec![size; clusters];
        for (_, row, cluster) in pairs {
            if next[row] == usize::MAX && room[cluster] > 0 {
                next[row] = cluster;
                room[cluster] -= 1;
            }
        }
        if next == assigned {
            break;
        }
        assigned = next;
        for (c, centre) in centres.iter_mut().enumerate() {
            let mut mean = vec![0.0; centre.len()];
            for (row, _) in unit.iter().zip(&assigned).filter(|(_, a)| **a == c) {
                mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
            }
            *centre = normalised(&mean);
        }
    }
    assigned
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub(super) fn normalised(row: &[f64]) -> Vec<f64> {
    let length = dot(row, row).sqrt();
    if length > 0.0 { row.iter().map(|x| x / length).collect() } else { row.to_vec() }
}

/// A permutation cut into equal parts: each item's part.
pub fn random_parts(items: usize, parts: usize, seed: u64, site: u32) -> Vec<usize> {
    let size = items / parts.max(1);
    let mut order: Vec<usize> = (0..items).collect();
    Stream::new(seed, site).shuffle(&mut order);
    let mut part = vec![0; items];
    order.iter().enumerate().for_each(|(place, &item)| part[item] = place / size.max(1));
    part
}

/// Balanced k-way partition of a graph: `weights [n, n]`, symmetric, into `parts` of equal size with much weight within.
/// Recursive bisection, each refined by Kernighan and Lin's passes (1970), then swaps between any two parts until none gains.
/// The lower index wins ties. Returns each vertex's part.
pub fn balanced_partition(weights: &[f64], n: usize, parts: usize) -> Vec<usize> {
    let mut part = vec![0; n];
    bisect((0..n).collect(), 0, parts, n / parts.max(1), weights, &mut part);
    swap_between(weights, n, parts, &mut part);
    part
}

/// Vertices that may be swapped next, per side.
const CANDIDATES: usize = 32;
const PASSES: usize = 8;
/// Gains below this are rounding.
const GAIN: f64 = 1e-9;

fn bisect(vertices: Vec<usize>, first: usize, parts: usize, size: usize, weights: &[f64], part: &mut [usize]) {
    if parts <= 1 {
        vertices.iter().for_each(|&v| part[v] = first);
        return;
    }
    let half = parts / 2;
    let (left, right) = halves(vertices, half * size, weights, part.len());
    bisect(left, first, half, size, weights, part);
    bisect(right, first + half, parts - half, size, weights, part);
}

/// The first half grows from the vertex with most weight by what is tied to it most, then both are refined.
fn halves(vertices: Vec<usize>, wanted: usize, weights: &[f64], n: usize) -> (Vec<usize>, Vec<usize>) {
    let count = vertices.len();
    let w = |a: usize, b: usize| weights[vertices[a] * n + vertices[b]];
    let mut left = vec![false; count];
    let mut tied: Vec<f64> = (0..count).map(|a| (0..count).filter(|&b| b != a).map(|b| w(a, b)).sum::<f64>()).collect();
    for step in 0..wanted {
        let free = (0..count).filter(|&a| !left[a]);
        let Some(best) = free.max_by(|&a, &b| tied[a].total_cmp(&tied[b]).then(b.cmp(&a))) else { break };
        if step == 0 {
            tied.fill(0.0);
        }
        left[best] = true;
        (0..count).for_each(|a| tied[a] += w(a, best));
    }
    for _ in 0..PASSES {
        if !pass(&mut left, &w) {
            break;
        }
    }
    let (a, b): (Vec<_>, Vec<_>) = vertices.iter().zip(&left).partition(|(_, left)| **left);
    (a.into_iter().map(|(v, _)| *v).collect(), b.into_iter().map(|(v, _)| *v).collect())
}

/// One pass of Kernighan and Lin: swaps of all vertices in turn, the best first, of which the best beginning is kept.
fn pass(left: &mut [bool], w: &impl Fn(usize, usize) -> f64) -> bool {
    let count = left.len();
    // What a vertex is tied to the other side minus what to its own.
    let side = |a: usize, b: usize, left: &[bool]| if left[a] == left[b] { -w(a, b) } else { w(a, b) };
    let mut pull: Vec<f64> =
        (0..count).map(|a| (0..count).filter(|&b| b != a).map(|b| side(a, b, left)).sum()).collect();
    let (mut now, mut free) = (left.to_vec(), vec![true; count]);
    let (mut swaps, mut total, mut best) = (Vec::new(), 0.0, (0.0, 0));
    loop {
        let most = |of: bool| {
            let mut side: Vec<usize> = (0..count).filter(|&a| free[a] && now[a] == of).collect();
            side.sort_by(|&a, &b| pull[b].total_cmp(&pull[a]).then(a.cmp(&b)));
            side.truncate(CANDIDATES);
            side
        };
        let (ours, theirs) = (most(true), most(false));
        let pairs = ours.iter().flat_map(|&a| theirs.iter().map(move |&b| (a, b)));
        let gain = |&(a, b): &(usize, usize)| pull[a] + pull[b] - 2.0 * w(a, b);
        let Some((a, b)) = pairs.max_by(|p, q| gain(p).total_cmp(&gain(q)).then(q.cmp(p))) else { break };
        total += gain(&(a, b));
        swaps.push((a, b));
        if total > best.0 + GAIN {
            best = (total, swaps.len());
        }
        for moved in [a, b] {
            for c in (0..count).filter(|&c| c != moved) {
                pull[c] += 2.0 * if now[c] == now[moved] { w(c, moved) } else { -w(c, moved) };
            }
            now[moved] = !now[moved];
            free[moved] = false;
        }
    }
    for &(a, b) in &swaps[..best.1] {
        (left[a], left[b]) = (false, true);
    }
    best.1 > 0
}

/// Swaps of two vertices of different parts while one gains.
fn swap_between(weights: &[f64], n: usize, parts: usize, part: &mut [usize]) {
    let mut ties = vec![0.0; n * parts];
    for a in 0..n {
        for b in (0..n).filter(|&b| b != a) {
            ties[a * parts + part[b]] += weights[a * n + b];
        }
    }
    for _ in 0..PASSES {
        let mut swapped = false;
        for a in 0..n {
            for b in a + 1..n {
                let (p, q) = (part[a], part[b]);
                let tie = |v: usize, to: usize| ties[v * parts + to];
                let gain = tie(a, q) + tie(b, p) - tie(a, p) - tie(b, q) - 2.0 * weights[a * n + b];
                if p == q || gain <= GAIN {
                    continue;
                }
                for c in 0..n {
                    let change = weights[c * n + a] * f64::from(u8::from(c != a))
                        - weights[c * n + b] * f64::from(u8::from(c != b));
                    ties[c * parts + p] -= change;
                    ties[c * parts + q] += change;
                }
                part.swap(a, b);
                swapped = true;
            }
        }
        if !swapped {
            break;
        }
    }
}

/// MoEfication's noise rule: edges below 0.99 times the first percentile of 10, 20, .. that is above 0 are dropped.
fn without_noise(weights: &mut [f64]) {
    let mut sorted = weights.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |p: usize| sorted.get(p * sorted.len().saturating_sub(1) / 100).copied().unwrap_or(0.0);
    let Some(floor) = (1..=10).map(|tenth| at(10 * tenth)).find(|x| *x > 0.0) else { return };
    weights.iter_mut().filter(|w| **w < 0.99 * floor).for_each(|w| *w = 0.0);
}

/// How often the neurons of two groups are active for one token, over all inputs `[rows, d]` of block `i`.
fn co_activations(model: &Model, i: usize, inputs: &[Tensor], groups: usize) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; groups * groups];
    for x in inputs {
        let (h, rows) = (activations(model, i, x)?, x.dims()[0]);
        // Active neurons of each group, tokens along rows: their products are whole numbers that f32 holds.
        let mut active = vec![0.0f32; groups * rows];
        for (token, h) in h.chunks(groups * GROUP).enumerate() {
            for (g, group) in h.chunks(GROUP).enumerate() {
                active[g * rows + token] = group.iter().filter(|&&a| a > 0.0).count() as f32;
            }
        }
        let active = Tensor::from_slice(model.device(), &[groups, rows], &active)?;
        let together = dispatch::run_one(&Matmul::linear(), &[&active, &active])?.to_vec::<f32>()?;
        sums.iter_mut().zip(together).for_each(|(sum, x)| *sum += f64::from(x));
    }
    (0..groups).for_each(|g| sums[g * groups + g] = 0.0);
    without_noise(&mut sums);
    Ok(sums)
}

/// New order of the neurons of block `i`: experts one after another, groups of [`GROUP`] in their old order within each.
pub(super) fn neuron_order(
    model: &Model,
    i: usize,
    experts: usize,
    (split, seed): (Split, u64),
    inputs: &[Tensor],
) -> Result<Vec<usize>> {
    let groups = model.config.blocks[i].ffn_width / GROUP;
    let parts = match split {
        Split::Clusters => {
            balanced_clusters(&group_rows(&model.values(&format!("blocks.{i}.ffn.in.weight"))?, groups), experts)
        }
        Split::Random => random_parts(groups, experts, seed, i as u32),
        Split::CoActivation => balanced_partition(&co_activations(model, i, inputs, groups)?, groups, experts),
    };
    Ok(ordered(&parts, experts))
}

/// Sums of the normalised rows of each group of neurons.
fn group_rows(w_in: &[f32], groups: usize) -> Vec<Vec<f64>> {
    let width = w_in.len() / (groups * GROUP).max(1);
    let group = |g: usize| -> Vec<f64> {
        let mut mean = vec![0.0; width];
        for n in g * GROUP..(g + 1) * GROUP {
            let row: Vec<f64> = w_in[n * width..(n + 1) * width].iter().map(|&x| f64::from(x)).collect();
            mean.iter_mut().zip(normalised(&row)).for_each(|(m, x)| *m += x);
        }
        mean
    };
    (0..groups).map(group).collect()
}

/// Neurons by the part of their group.
fn ordered(parts: &[usize], experts: usize) -> Vec<usize> {
    let members = |e: usize| parts.iter().enumerate().filter(move |(_, c)| **c == e).map(|(g, _)| g);
    (0..experts).flat_map(|e| members(e).collect::<Vec<_>>()).flat_map(|g| g * GROUP..(g + 1) * GROUP).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_balanced_and_find_directions() {
        // Two directions, interleaved.
        let rows: Vec<Vec<f64>> =
            (0..16).map(|i| if i % 2 == 0 { vec![1.0, 0.01 * i as f64] } else { vec![0.01 * i as f64, 1.0] }).collect();
        let clusters = balanced_clusters(&rows, 2);
        assert_eq!(clusters.iter().filter(|&&c| c == 0).count(), 8);
        assert!((0..16).all(|i| clusters[i] == clusters[i % 2]), "{clusters:?}");
    }

    #[test]
    fn neuron_order_is_a_permutation_of_whole_groups() {
        let w: Vec<f32> = (0..64 * 8).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        for parts in [balanced_clusters(&group_rows(&w, 16), 4), random_parts(16, 4, 3, 0)] {
            let order = ordered(&parts, 4);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..64).collect::<Vec<_>>());
            assert!(order.chunks(GROUP).all(|g| g[0] % GROUP == 0 && g.windows(2).all(|w| w[1] == w[0] + 1)));
        }
    }

    #[test]
    fn a_partition_finds_what_belongs_together() {
        // Vertices i and j belong together where i = j modulo 5; the rest is weak noise.
        let (n, parts) = (40, 5);
        let mut weights = vec![0.0; n * n];
        for a in 0..n {
            for b in (0..n).filter(|&b| b != a) {
                let noise = ((a * 7 + b * 7) % 11) as f64 / 11.0;
                weights[a * n + b] = if a % parts == b % parts { 10.0 } else { noise };
            }
        }
        let part = balanced_partition(&weights, n, parts);
        assert!((0..n).all(|a| part[a] == part[a % parts]), "{part:?}");
        assert!((0..parts).all(|p| part.iter().filter(|q| **q == p).count() == n / parts));
    }

    #[test]
    fn noise_is_what_lies_below_the_first_percentile_above_zero() {
        let mut weights = [vec![0.0; 45], vec![1.0; 10], (0..45).map(|i| 2.0 + i as f64).collect()].concat();
        without_noise(&mut weights);
        // The 50th of 100 is the first tenth above 0, and it is 1.
        assert_eq!(weights.iter().filter(|w| **w > 0.0).count(), 55);
        let mut nothing = [0.0; 7];
        without_noise(&mut nothing);
        assert_eq!(nothing, [0.0; 7]);
    }
}
