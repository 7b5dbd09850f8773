//! Machines with devices, what a message between them costs, and where DAPPLE's policies put a stage.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::pipeline::simulate::Link;

/// Devices of one kind, in machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cluster {
    /// Devices of each machine.
    pub machines: Vec<usize>,
    /// Between two devices of a machine. `handling` is the devices' own time for every message, wherever it goes.
    pub inside: Link,
    /// Between two machines.
    pub between: Link,
    /// Bytes of each device; `None` sets no limit.
    pub memory: Option<f64>,
}

/// Devices of each machine that a stage has.
pub type Placement = Vec<usize>;

/// Machines that a stage takes first (DAPPLE, section 4.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Unused ones: replicas stay together, on a fast link.
    FreshFirst,
    /// Used ones: no device of a half-filled machine is left over.
    AppendFirst,
    /// Evenly over used ones, over all where none is: neighbouring stages meet on every machine.
    ScatterFirst,
}

impl Policy {
    pub const ALL: [Policy; 3] = [Policy::FreshFirst, Policy::AppendFirst, Policy::ScatterFirst];
}

/// Devices in all at most: the planner's states grow faster than they do.
pub const MAX_DEVICES: usize = 64;

fn check_link(link: &Link, parameter: &'static str) -> Result<()> {
    if [link.latency, link.bytes_per_second, link.handling].iter().all(|v| v.is_finite() && *v >= 0.0) {
        return Ok(());
    }
    let allowed = "finite numbers of at least 0";
    Err(Error::Parameter { op: "cluster", parameter, value: format!("{link:?}"), allowed })
}

impl Cluster {
    /// One machine.
    pub fn single(devices: usize, link: Link) -> Self {
        Self { machines: vec![devices], inside: link, between: link, memory: None }
    }

    pub fn devices(&self) -> usize {
        self.machines.iter().sum()
    }

    /// # Errors
    /// `Parameter` for machines without devices, more than 64 devices, links or memory that are no sizes.
    pub fn check(&self) -> Result<()> {
        let devices = self.machines.iter().fold(0usize, |sum, n| sum.saturating_add(*n));
        if self.machines.contains(&0) || !(1..=MAX_DEVICES).contains(&devices) {
            let (value, allowed) =
                (format!("{:?}", self.machines), "machines of at least one device, 64 devices in all");
            return Err(Error::Parameter { op: "cluster", parameter: "machines", value, allowed });
        }
        check_link(&self.inside, "inside")?;
        check_link(&self.between, "between")?;
        match self.memory {
            Some(bytes) if !(bytes > 0.0) => {
                let (value, allowed) = (bytes.to_string(), "more than 0 bytes");
                Err(Error::Parameter { op: "cluster", parameter: "memory", value, allowed })
            }
            _ => Ok(()),
        }
    }

    /// Seconds of a micro-batch's `bytes` from one stage to the next. Replicas hold equal shares of it; what sender and
    /// receiver have on the same machine stays there, the rest goes over the link between machines, both at once.
    pub fn transfer(&self, from: &[usize], to: &[usize], bytes: f64) -> f64 {
        let share = |devices: &[usize], machine: usize| devices[machine] as f64 / total(devices) as f64;
        let stays: f64 = (0..self.machines.len()).map(|m| share(from, m).min(share(to, m))).sum();
        let crosses = 1.0 - stays;
        // Shares are sums of fractions with small denominators: below this they are equal.
        const NOTHING: f64 = 1e-9;
        let local = if stays > NOTHING { self.inside.seconds(bytes * stays) } else { 0.0 };
        let far = if crosses > NOTHING { self.between.seconds(bytes * crosses) } else { 0.0 };
        local.max(far)
    }

    /// Seconds of the ring AllReduce of `bytes` over a stage's n replicas: 2 (n - 1) / n x bytes / bandwidth, and a latency
    /// for each of its 2 (n - 1) rounds. A ring is as fast as its slowest link.
    pub fn all_reduce(&self, devices: &[usize], bytes: f64) -> f64 {
        let replicas = total(devices) as f64;
        if replicas < 2.0 {
            return 0.0;
        }
        let link = if devices.iter().filter(|n| **n > 0).count() > 1 { &self.between } else { &self.inside };
        let rounds = 2.0 * (replicas - 1.0);
        rounds * link.seconds(bytes / replicas)
    }

    /// Where `policy` puts `count` replicas when `used` devices are taken; `None` when they are not there. Of machines that
    /// the policy holds equal it takes `first`, then those of its size, then the one that the stage just fits into.
    pub(super) fn place(&self, policy: Policy, first: usize, used: &[usize], count: usize) -> Option<Placement> {
        let free = |machine: usize| self.machines[machine] - used[machine];
        if count == 0 || count > (0..used.len()).map(free).sum() {
            return None;
        }
        let mut order: Vec<usize> = (0..used.len()).filter(|m| free(*m) > 0).collect();
        let room = |machine: usize| {
            let free = free(machine);
            if free >= count { (false, free) } else { (true, MAX_DEVICES - free) }
        };
        let fresh = |machine: usize| used[machine] == 0;
        let other = |m: usize| (m != first, self.machines[m] != self.machines[first]);
        order.sort_by_key(|&m| (fresh(m) == (policy != Policy::FreshFirst), other(m), room(m), m));
        let mut placement = vec![0; used.len()];
        let mut left = count;
        if policy != Policy::ScatterFirst {
            for machine in order {
                placement[machine] = free(machine).min(left);
                left -= placement[machine];
            }
            return Some(placement);
        }
        let begun = used.iter().any(|n| *n > 0);
        let (first, rest): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|m| !begun || !fresh(*m));
        for machines in [first, rest] {
            while left > 0 && machines.iter().any(|m| placement[*m] < free(*m)) {
                for &machine in &machines {
                    if left > 0 && placement[machine] < free(machine) {
                        placement[machine] += 1;
                        left -= 1;
                    }
                }
            }
        }
        Some(placement)
    }
}

fn total(devices: &[usize]) -> usize {
    devices.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(machines: &[usize]) -> Cluster {
        let link = |bytes_per_second| Link { latency: 0.0, bytes_per_second, handling: 0.0 };
        Cluster { machines: machines.to_vec(), inside: link(25e9), between: link(1e9), memory: None }
    }

    #[test]
    fn a_ring_of_four_reduces_a_gigabyte_in_60_milliseconds() {
        let seconds = cluster(&[4]).all_reduce(&[4], 1e9);
        assert!((seconds - 0.060).abs() < 1e-15, "{seconds}");
        assert_eq!(cluster(&[4]).all_reduce(&[1], 1e9), 0.0);
        // Over two machines at the speed of the link between them.
        assert!((cluster(&[2, 2]).all_reduce(&[2, 2], 1e9) - 1.5).abs() < 1e-12);
    }

    #[test]
    fn only_what_changes_machines_takes_the_slow_link() {
        let c = cluster(&[2, 2]);
        assert_eq!(c.transfer(&[1, 0], &[1, 0], 1e9), 0.04);
        assert_eq!(c.transfer(&[1, 0], &[0, 1], 1e9), 1.0);
        assert_eq!(c.transfer(&[1, 1], &[1, 1], 1e9), 0.04);
        assert_eq!(c.transfer(&[2, 0], &[1, 1], 1e9), 0.5);
        let free = Cluster::single(3, Link::FREE);
        assert_eq!(free.transfer(&[1], &[2], 1e9), 0.0);
    }

    #[test]
    fn policies_place_as_published() {
        let c = cluster(&[4, 4, 4]);
        let place = |policy, used: &[usize], count| c.place(policy, 0, used, count);
        use Policy::{AppendFirst, FreshFirst, ScatterFirst};
        assert_eq!(place(FreshFirst, &[2, 0, 0], 2), Some(vec![0, 2, 0]));
        assert_eq!(place(FreshFirst, &[2, 0, 0], 9), Some(vec![1, 4, 4]));
        assert_eq!(place(AppendFirst, &[2, 0, 0], 2), Some(vec![2, 0, 0]));
        assert_eq!(c.place(AppendFirst, 2, &[3, 2, 0], 2), Some(vec![0, 2, 0]));
        assert_eq!(place(AppendFirst, &[2, 0, 0], 3), Some(vec![2, 1, 0]));
        assert_eq!(place(ScatterFirst, &[2, 1, 0], 4), Some(vec![2, 2, 0]));
        assert_eq!(place(ScatterFirst, &[0, 0, 0], 4), Some(vec![2, 1, 1]));
        assert_eq!(place(ScatterFirst, &[3, 3, 0], 4), Some(vec![1, 1, 2]));
        let uneven = cluster(&[2, 1, 1]);
        assert_eq!(uneven.place(FreshFirst, 1, &[0, 0, 0], 2), Some(vec![0, 1, 1]));
        assert_eq!(uneven.place(FreshFirst, 2, &[0, 0, 0], 1), Some(vec![0, 0, 1]));
        for policy in Policy::ALL {
            assert_eq!(place(policy, &[4, 4, 3], 2), None);
            assert_eq!(place(policy, &[4, 4, 3], 1), Some(vec![0, 0, 1]));
            assert_eq!(place(policy, &[0, 0, 0], 0), None);
        }
    }

    #[test]
    fn sizes_without_sense_are_refused() {
        let wrong = |change: &dyn Fn(&mut Cluster)| {
            let mut c = cluster(&[2]);
            change(&mut c);
            assert!(matches!(c.check(), Err(Error::Parameter { .. })), "{c:?}");
        };
        wrong(&|c| c.machines.clear());
        wrong(&|c| c.machines = vec![2, 0]);
        wrong(&|c| c.machines = vec![usize::MAX, 2]);
        wrong(&|c| c.inside.latency = -1.0);
        wrong(&|c| c.between.bytes_per_second = f64::NAN);
        wrong(&|c| c.memory = Some(f64::NAN));
        assert!(cluster(&[2, 3]).check().is_ok());
    }
}
