//! CUDA: the NVIDIA driver where there is one, NVRTC, and the host harness that runs the same kernel files without either.

pub mod compile;
mod device;
mod driver;
mod graph;
#[cfg(unix)]
mod host;
mod nccl;

pub use device::CudaDevice;
pub use driver::{CudaDriver, cuda_driver};
#[cfg(unix)]
pub use host::CudaHostDevice;
pub use nccl::ticket;
