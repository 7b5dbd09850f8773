//! Whether an NVIDIA driver is there, and what it sees.

use cudarc::driver::{result, sys};

#[derive(Clone, Debug)]
pub struct CudaDriver {
    /// 12040 is version 12.4.
    pub version: i32,
    pub devices: Vec<String>,
}

/// `None` without a driver; `Err` with the reason where one is installed and does not answer.
pub fn cuda_driver() -> Option<Result<CudaDriver, String>> {
    // SAFETY: opens and closes the driver library; its loader code runs as in any program that links it.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    // A library too old for a symbol makes the loader panic: a diagnosis must survive that.
    let asked = std::panic::catch_unwind(|| {
        result::init().map_err(|e| e.to_string())?;
        let mut version = 0;
        // SAFETY: writes one integer to a live variable.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| e.to_string())?;
        let count = result::device::get_count().map_err(|e| e.to_string())?;
        let name = |ordinal| result::device::get(ordinal).and_then(result::device::get_name).map_err(|e| e.to_string());
        Ok(CudaDriver { version, devices: (0..count).map(name).collect::<Result<_, _>>()? })
    });
    Some(asked.unwrap_or_else(|_| Err("the driver library lacks a function this program needs".into())))
}
