//! Second moments of a linear's inputs, inverted and factored: what SparseGPT and GPTQ spread a column's error by.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

use crate::error::{Error, Result};

/// U, upper triangular `[k, k]`, with H^-1 = U^T U, of H = X^T X `gram` with `damping` times the mean of its diagonal added to
/// it. Inputs that never came, whose diagonal is 0, are as if they were 1. A factor before H is left out: both methods take
/// quotients of U alone.
///
/// # Errors
/// `Parameter` where the damped H is not positive definite or not finite.
pub fn inverse_factor(op: &'static str, gram: &[f64], k: usize, damping: f64) -> Result<Vec<f64>> {
    let refuse = |parameter, value: String, allowed| Err(Error::Parameter { op, parameter, value, allowed });
    if !(damping.is_finite() && damping >= 0.0) {
        return refuse("damping", damping.to_string(), "a finite number, not negative");
    }
    let diagonal = |j: usize| if gram[j * k + j] == 0.0 { 1.0 } else { gram[j * k + j] };
    let damp = damping * (0..k).map(diagonal).sum::<f64>() / k.max(1) as f64;
    let h = Mat::from_fn(k, k, |i, j| if i == j { diagonal(i) + damp } else { gram[i * k + j] });
    let factored = h.llt(Side::Lower).ok().and_then(|llt| llt.inverse().llt(Side::Lower).ok());
    let upper = factored.map(|llt| {
        let lower = llt.L();
        (0..k * k).map(|i| if i % k >= i / k { lower[(i % k, i / k)] } else { 0.0 }).collect::<Vec<f64>>()
    });
    match upper.filter(|upper| upper.iter().all(|u| u.is_finite())) {
        Some(upper) => Ok(upper),
        None => {
            let value = format!("{damping}: the second moments of {k} inputs are not positive definite");
            refuse("damping", value, "larger, such as 0.05, and inputs that are finite")
        }
    }
}
