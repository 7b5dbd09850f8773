//! Roads: how bytes get from the memory of one device to that of another without passing their hosts.

use serde::{Deserialize, Serialize};

use super::Buffer;
use crate::error::Result;

/// What the two ends of a road know each other by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket(pub Vec<u8>);

/// Which end of a road.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Sends,
    Receives,
}

/// One end of a one-way road between two devices. Both ends queue the same sizes in the same order; each is ordered with what
/// is queued on its device, so nobody waits on a host.
pub trait Road: Send {
    /// Queues bytes of this device's memory to go. They must not be written before they have gone.
    ///
    /// # Errors
    /// Those of the device, and of an end that receives.
    fn send(&mut self, source: &Buffer, offset: usize, bytes: usize) -> Result<()>;

    /// Queues that the next bytes come here.
    ///
    /// # Errors
    /// Those of the device, and of an end that sends.
    fn receive(&mut self, target: &Buffer, offset: usize, bytes: usize) -> Result<()>;
}
