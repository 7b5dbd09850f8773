//! Tensors between stages that do not pass their hosts: a road for each way that the schedule sends them. What announces a
//! tensor goes as any other message, so losses, doubles and mix-ups show as they always do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::message::Purpose;
use super::route::Route;
use crate::device::Device;
use crate::device::road::{End, Road, Ticket};
use crate::error::Result;
use crate::tensor::Tensor;

/// Makes an end of a road.
pub type Lay = dyn Fn(&Arc<dyn Device>, &Ticket, End) -> Result<Box<dyn Road>> + Send + Sync;

/// From one worker to another.
pub type Way = (usize, usize);

/// Which ways have roads, and how their ends are made.
#[derive(Clone)]
pub struct Direct {
    pub tickets: BTreeMap<Way, Ticket>,
    pub lay: Arc<Lay>,
}

impl Direct {
    /// Roads of the devices' own.
    pub fn new(tickets: BTreeMap<Way, Ticket>) -> Self {
        Self { tickets, lay: Arc::new(|device, ticket, end| device.road(ticket, end)) }
    }

    /// A road with a ticket for each way of a route.
    ///
    /// # Errors
    /// Those of `ticket`.
    pub fn along(route: &Route, ticket: impl Fn() -> Result<Ticket>) -> Result<BTreeMap<Way, Ticket>> {
        ways(route).into_iter().map(|way| Ok((way, ticket()?))).collect()
    }
}

/// Between the workers of neighbouring chunks, there and back, and among those of a stage.
fn ways(route: &Route) -> BTreeSet<Way> {
    let homes = &route.schedule.homes;
    let neighbours = homes.windows(2).map(|pair| (pair[0], pair[1]));
    let own = (0..route.replicas.len()).map(|stage| (stage, stage));
    let both = |(a, b): (usize, usize)| {
        let pairs = route.of_stage(a).flat_map(move |x| route.of_stage(b).map(move |y| (x, y)));
        pairs.flat_map(|(x, y)| [(x, y), (y, x)]).collect::<Vec<_>>()
    };
    neighbours.chain(own).flat_map(both).filter(|(from, to)| from != to).collect()
}

/// A worker's ends of its roads.
#[derive(Default)]
pub struct Roads {
    to: BTreeMap<usize, Box<dyn Road>>,
    from: BTreeMap<usize, Box<dyn Road>>,
}

impl Roads {
    /// All workers lay theirs at the same time, in the order of the ways: so the earliest of those that are missing always
    /// has both of its ends.
    pub fn lay(direct: &Direct, worker: usize, device: &Arc<dyn Device>) -> Result<Self> {
        let mut roads = Self::default();
        for (&(from, to), ticket) in &direct.tickets {
            if from == worker {
                roads.to.insert(to, (direct.lay)(device, ticket, End::Sends)?);
            } else if to == worker {
                roads.from.insert(from, (direct.lay)(device, ticket, End::Receives)?);
            }
        }
        Ok(roads)
    }

    /// The road to a worker for messages of this purpose. Sums of a step are few bytes, and a host reads them anyway.
    pub fn to(&mut self, worker: usize, purpose: Purpose) -> Option<&mut Box<dyn Road>> {
        self.to.get_mut(&worker).filter(|_| purpose != Purpose::Totals)
    }

    /// Takes in what has been announced; `None` where no road comes from there.
    pub fn receive(&mut self, from: usize, target: &Tensor) -> Option<Result<()>> {
        let road = self.from.get_mut(&from)?;
        Some(road.receive(target.buffer(), target.offset(), target.meta().bytes()))
    }
}
