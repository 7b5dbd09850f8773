//! From log alphas to a model: CoFi's deterministic gates, the declared share, and what is removed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::cost::Costs;
use super::layout::{Layout, Level};
use crate::compress::structure::{Keep, KeepHeads, prune};
use crate::device::Device;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Config, Model};
use crate::ops::gates::ScaleGroups;
use crate::ops::hard_concrete::{BETA, open};
use crate::tensor::Tensor;

/// Values of gates that stay: 0 for what goes. Sublayers and channels are there or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub attentions: Vec<bool>,
    pub ffns: Vec<bool>,
    pub heads: Vec<f64>,
    pub neurons: Vec<f64>,
    pub channels: Vec<bool>,
}

/// CoFi's value of a gate that stays: sigmoid(0.8 log_alpha / beta).
pub fn soft(log_alpha: f64) -> f64 {
    1.0 / (1.0 + (-0.8 * log_alpha / BETA).exp())
}

/// Which stay of a group of gates that are compared with each other: as many go as are expected to be 0, the ones with the
/// smallest log alpha, the higher index first among equals.
fn stays(log_alphas: &[f64]) -> Vec<bool> {
    let zeros: f64 = log_alphas.iter().map(|x| 1.0 - open(*x)).sum();
    let zeros = (zeros.round() as usize).min(log_alphas.len());
    let mut stay = vec![true; log_alphas.len()];
    ascending(log_alphas).into_iter().take(zeros).for_each(|i| stay[i] = false);
    stay
}

/// Indices by rising log alpha, the higher index first among equals.
fn ascending(log_alphas: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..log_alphas.len()).collect();
    order.sort_by(|&a, &b| log_alphas[a].total_cmp(&log_alphas[b]).then(b.cmp(&a)));
    order
}

/// Decides from the log alphas of the gated levels; levels without gates stay. At most `1 - target` of the cost is left:
/// what CoFi's rule leaves above that goes by rising log alpha, heads one by one and neurons in groups. Neurons and channels
/// stay in multiples of `multiple` where there are as many.
pub fn decide(
    layout: &Layout,
    log_alphas: &BTreeMap<Level, Vec<f64>>,
    costs: &Costs,
    target: f64,
    multiple: usize,
) -> Decision {
    let of = |level: Level| log_alphas.get(&level).map(Vec::as_slice);
    let whole = |level: Level| of(level).map_or_else(|| vec![true; layout.count(level)], stays);
    let units = |level: Level, groups: Vec<(usize, usize)>| -> Vec<f64> {
        let Some(all) = of(level) else {
            return vec![1.0; layout.count(level)];
        };
        let of_group = |&(first, n): &(usize, usize)| {
            let group = &all[first..first + n];
            stays(group).into_iter().zip(group).map(|(stay, x)| if stay { soft(*x) } else { 0.0 }).collect::<Vec<_>>()
        };
        groups.iter().flat_map(of_group).collect()
    };
    let mut decision = Decision {
        attentions: whole(Level::Attention),
        ffns: whole(Level::Ffn),
        heads: units(Level::Heads, layout.attentions.iter().map(|a| (a.first, a.heads)).collect()),
        neurons: units(Level::Neurons, layout.ffns.iter().map(|f| (f.first, f.neurons)).collect()),
        channels: whole(Level::Hidden),
    };
    let multiple = multiple.max(1);
    if let Some(channels) = of(Level::Hidden) {
        round_channels(&mut decision.channels, channels, multiple);
    }
    if let Some(neurons) = of(Level::Neurons) {
        for ffn in &layout.ffns {
            let range = ffn.first..ffn.first + ffn.neurons;
            round_neurons(&mut decision.neurons[range.clone()], &neurons[range], multiple);
        }
    }
    decision.close(layout);
    for candidate in decision.candidates(layout, (of(Level::Heads), of(Level::Neurons)), multiple) {
        if decision.share(layout, costs) <= 1.0 - target + 1e-12 {
            break;
        }
        let values = if candidate.level == Level::Heads { &mut decision.heads } else { &mut decision.neurons };
        candidate.gates.iter().for_each(|&i| values[i] = 0.0);
        decision.close(layout);
    }
    // Units that cannot go (their levels have no gates) leave whole sublayers.
    for (level, i) in decision.sublayers(of(Level::Attention), of(Level::Ffn)) {
        if decision.share(layout, costs) <= 1.0 - target + 1e-12 {
            break;
        }
        let sublayers = if level == Level::Attention { &mut decision.attentions } else { &mut decision.ffns };
        sublayers[i] = false;
        decision.close(layout);
    }
    // Where there is nothing else to go: channels, all but one group.
    if let Some(log_alphas) = of(Level::Hidden) {
        let open: Vec<usize> = ascending(log_alphas).into_iter().filter(|i| decision.channels[*i]).collect();
        for group in open.chunks(multiple).take(open.len().div_ceil(multiple).saturating_sub(1)) {
            if decision.share(layout, costs) <= 1.0 - target + 1e-12 {
                break;
            }
            group.iter().for_each(|&i| decision.channels[i] = false);
        }
    }
    decision
}

/// The largest share of the cost that gates of these levels can take away, where that is less than the target.
pub fn out_of_reach(target: f64, layout: &Layout, levels: &[Level], costs: &Costs, multiple: usize) -> Option<f64> {
    let most = removable(layout, levels, costs, multiple);
    // A share that was written down in four digits is reached.
    (target > most + 1e-9).then(|| below(most))
}

/// Largest share of the cost that gates of these levels can take away.
fn removable(layout: &Layout, levels: &[Level], costs: &Costs, multiple: usize) -> f64 {
    let closed = levels.iter().map(|&level| (level, vec![-20.0; layout.count(level)])).collect();
    1.0 - decide(layout, &closed, costs, 1.0, multiple).share(layout, costs)
}

/// A share in four digits, never more than it is: who asks for that much gets it.
fn below(share: f64) -> f64 {
    (share * 1e4).floor() / 1e4
}

/// What may go at once.
struct Candidate {
    level: Level,
    gates: Vec<usize>,
    mean: f64,
}

fn nearest(count: usize, multiple: usize) -> usize {
    (count + multiple / 2) / multiple * multiple
}

/// The best ones are open, the nearest multiple of those that were, at least one.
fn round_channels(open: &mut [bool], log_alphas: &[f64], multiple: usize) {
    let most = (open.len() / multiple * multiple).max(multiple.min(open.len()));
    let wanted = nearest(open.iter().filter(|o| **o).count(), multiple).clamp(multiple.min(most), most);
    let order = ascending(log_alphas);
    open.fill(false);
    order.iter().rev().take(wanted).for_each(|&i| open[i] = true);
}

/// Keeps the nearest multiple, at least one, of neurons that stay; all go where none does.
fn round_neurons(values: &mut [f64], log_alphas: &[f64], multiple: usize) {
    let stay = values.iter().filter(|z| **z > 0.0).count();
    if stay == 0 {
        return;
    }
    let most = (values.len() / multiple * multiple).max(multiple.min(values.len()));
    let wanted = nearest(stay, multiple).clamp(multiple.min(most), most);
    let order = ascending(log_alphas);
    for (rank, &i) in order.iter().rev().enumerate() {
        values[i] = if rank < wanted { soft(log_alphas[i]) } else { 0.0 };
    }
}

impl Decision {
    /// Units of each sublayer that stay, 0 where it goes.
    fn counts(&self, layout: &Layout) -> (Vec<usize>, Vec<usize>) {
        let open =
            |values: &[f64], first: usize, n: usize| values[first..first + n].iter().filter(|z| **z > 0.0).count();
        let heads = layout.attentions.iter().zip(&self.attentions);
        let heads = heads.map(|(a, stays)| if *stays { open(&self.heads, a.first, a.heads) } else { 0 });
        let neurons = layout.ffns.iter().zip(&self.ffns);
        let neurons = neurons.map(|(f, stays)| if *stays { open(&self.neurons, f.first, f.neurons) } else { 0 });
        (heads.collect(), neurons.collect())
    }

    /// Share of the whole cost that stays.
    pub fn share(&self, layout: &Layout, costs: &Costs) -> f64 {
        let (heads, neurons) = self.counts(layout);
        let channels = self.channels.iter().filter(|c| **c).count() as f64 / self.channels.len().max(1) as f64;
        costs.share(&heads, &neurons, channels)
    }

    /// A sublayer without units goes, and the units of one that goes.
    fn close(&mut self, layout: &Layout) {
        let (heads, neurons) = self.counts(layout);
        for (i, a) in layout.attentions.iter().enumerate().filter(|(i, _)| heads[*i] == 0) {
            self.attentions[i] = false;
            self.heads[a.first..a.first + a.heads].fill(0.0);
        }
        for (i, f) in layout.ffns.iter().enumerate().filter(|(i, _)| neurons[*i] == 0) {
            self.ffns[i] = false;
            self.neurons[f.first..f.first + f.neurons].fill(0.0);
        }
    }

    /// Heads, and neurons in groups of `multiple`, that stay, by rising log alpha.
    fn candidates(
        &self,
        layout: &Layout,
        (heads, neurons): (Option<&[f64]>, Option<&[f64]>),
        multiple: usize,
    ) -> Vec<Candidate> {
        let mut all = Vec::new();
        let mut add = |level: Level, values: &[f64], log_alphas: &[f64], (first, n): (usize, usize), group: usize| {
            let own = &log_alphas[first..first + n];
            let open: Vec<usize> = ascending(own).into_iter().map(|i| first + i).filter(|i| values[*i] > 0.0).collect();
            for gates in open.chunks(group) {
                let mean = gates.iter().map(|i| log_alphas[*i]).sum::<f64>() / gates.len() as f64;
                all.push(Candidate { level, gates: gates.to_vec(), mean });
            }
        };
        if let Some(log_alphas) = heads {
            layout.attentions.iter().for_each(|a| add(Level::Heads, &self.heads, log_alphas, (a.first, a.heads), 1));
        }
        if let Some(log_alphas) = neurons {
            let of = |f: &super::layout::Ffn| (f.first, f.neurons);
            layout.ffns.iter().for_each(|f| add(Level::Neurons, &self.neurons, log_alphas, of(f), multiple));
        }
        // A stable sort: among equals the order of the blocks.
        all.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        all
    }

    /// Sublayers that stay, by rising log alpha.
    fn sublayers(&self, attentions: Option<&[f64]>, ffns: Option<&[f64]>) -> Vec<(Level, usize)> {
        let of = |level: Level, open: &[bool], log_alphas: Option<&[f64]>| {
            let log_alphas = log_alphas.unwrap_or_default().to_vec();
            let open: Vec<usize> = (0..log_alphas.len()).filter(|i| open[*i]).collect();
            open.into_iter().map(move |i| (log_alphas[i], level, i)).collect::<Vec<_>>()
        };
        let mut all = of(Level::Attention, &self.attentions, attentions);
        all.extend(of(Level::Ffn, &self.ffns, ffns));
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all.into_iter().map(|(_, level, i)| (level, i)).collect()
    }

    /// Values of every level's gates, for [`super::Phase::Decided`].
    pub fn values(&self, device: &Arc<dyn Device>) -> Result<BTreeMap<Level, Tensor>> {
        let whole = |open: &[bool]| open.iter().map(|o| f32::from(u8::from(*o))).collect::<Vec<_>>();
        let units = |values: &[f64]| values.iter().map(|z| *z as f32).collect::<Vec<_>>();
        let all = [
            (Level::Attention, whole(&self.attentions)),
            (Level::Ffn, whole(&self.ffns)),
            (Level::Heads, units(&self.heads)),
            (Level::Neurons, units(&self.neurons)),
            (Level::Hidden, whole(&self.channels)),
        ];
        let some = all.into_iter().filter(|(_, values)| !values.is_empty());
        some.map(|(level, values)| Ok((level, Tensor::from_slice(device, &[values.len()], &values)?))).collect()
    }

    /// What stays of a model of this layout.
    pub fn keep(&self, config: &Config, layout: &Layout) -> Keep {
        let mut keep = Keep::all(config);
        let open = |values: &[f64]| (0..values.len()).filter(|i| values[*i] > 0.0).collect::<Vec<_>>();
        for (a, stays) in layout.attentions.iter().zip(&self.attentions) {
            let heads = open(&self.heads[a.first..a.first + a.heads]);
            let kept = stays.then(|| KeepHeads::whole(&heads, a.head_size));
            let block = &mut keep.blocks[a.block];
            *(if a.cross { &mut block.cross } else { &mut block.attention }) = kept;
        }
        for (f, stays) in layout.ffns.iter().zip(&self.ffns) {
            keep.blocks[f.block].neurons = stays.then(|| open(&self.neurons[f.first..f.first + f.neurons]));
        }
        keep.channels = (0..self.channels.len()).filter(|i| self.channels[*i]).collect();
        keep
    }
}

/// The model that a decision leaves: values of gates go into the projections behind them, and what is closed is removed.
///
/// # Errors
/// Those of [`prune`].
pub fn shrink(model: &Model, layout: &Layout, decision: &Decision) -> Result<(Model, Keep)> {
    let keep = decision.keep(&model.config, layout);
    let mut scaled = model.clone();
    let mut scale = |name: String, values: &[f64]| -> Result<()> {
        let values: Vec<f32> = values.iter().map(|z| *z as f32).collect();
        let gates = Tensor::from_slice(model.device(), &[values.len()], &values)?;
        let weight = dispatch::run_one(&ScaleGroups, &[model.get(&name)?, &gates])?;
        scaled.tensors.insert(name, weight);
        Ok(())
    };
    for (a, _) in layout.attentions.iter().zip(&decision.attentions).filter(|(_, stays)| **stays) {
        let part = if a.cross { "cross" } else { "attention" };
        scale(format!("blocks.{}.{part}.output.weight", a.block), &decision.heads[a.first..a.first + a.heads])?;
    }
    for (f, _) in layout.ffns.iter().zip(&decision.ffns).filter(|(_, stays)| **stays) {
        scale(format!("blocks.{}.ffn.out.weight", f.block), &decision.neurons[f.first..f.first + f.neurons])?;
    }
    if keep.channels.is_empty() {
        return Err(Error::Parameter {
            op: "structure gates",
            parameter: "channels",
            value: "none".into(),
            allowed: "at least one that stays",
        });
    }
    Ok((prune(&scaled, &keep)?, keep))
}
