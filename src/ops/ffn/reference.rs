//! f64 references of the feed-forward block, row by row from the formulas.

use super::FfnActivation;
use crate::op::Array;
use crate::ops::unary::Function;

fn gelu(x: f64) -> f64 {
    Function::GeluTanh.reference(x)
}

fn gelu_slope(x: f64) -> f64 {
    Function::GeluTanh.derivative(x)
}

/// h from one row of z.
fn activate(activation: FfnActivation, z: &[f64]) -> Vec<f64> {
    match activation {
        FfnActivation::Relu => z.iter().map(|z| z.max(0.0)).collect(),
        FfnActivation::Gelu => z.iter().map(|&z| gelu(z)).collect(),
        FfnActivation::Geglu => {
            let (gate, value) = z.split_at(z.len() / 2);
            gate.iter().zip(value).map(|(&g, v)| gelu(g) * v).collect()
        }
    }
}

/// dz from one row of z and of dh.
fn slope(activation: FfnActivation, z: &[f64], dh: &[f64]) -> Vec<f64> {
    match activation {
        FfnActivation::Relu => z.iter().zip(dh).map(|(&z, d)| if z > 0.0 { *d } else { 0.0 }).collect(),
        FfnActivation::Gelu => z.iter().zip(dh).map(|(&z, d)| gelu_slope(z) * d).collect(),
        FfnActivation::Geglu => {
            let (gate, value) = z.split_at(z.len() / 2);
            let gates = gate.iter().zip(value).zip(dh).map(|((&g, v), d)| d * v * gelu_slope(g));
            let values = gate.iter().zip(dh).map(|(&g, d)| d * gelu(g));
            gates.chain(values).collect()
        }
    }
}

/// Row times transposed matrix of `x.len()` columns, plus bias.
fn affine(x: &[f64], w: &[f64], bias: &[f64]) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    bias.iter().enumerate().map(|(i, b)| b + dot(&w[i * x.len()..][..x.len()])).collect()
}

pub(super) fn forward(activation: FfnActivation, inputs: &[Array]) -> Vec<Vec<f64>> {
    let [x, w1, b1, w2, b2] = [0, 1, 2, 3, 4].map(|i| &inputs[i]);
    let (rows, d) = (x.shape.rows(), x.shape.last());
    let (mut y, mut saved) = (Vec::new(), Vec::new());
    for t in 0..rows {
        let z = affine(&x.data[t * d..][..d], &w1.data, &b1.data);
        y.extend(affine(&activate(activation, &z), &w2.data, &b2.data));
        saved.extend(z);
    }
    vec![y, saved]
}

pub(super) fn backward(activation: FfnActivation, inputs: &[Array]) -> Vec<Vec<f64>> {
    let [x, w1, w2, z, dy] = [0, 1, 2, 3, 4].map(|i| &inputs[i]);
    let (rows, d, hidden) = (x.shape.rows(), x.shape.last(), w1.dims()[0]);
    let (d2, f) = (w2.dims()[0], w2.dims()[1]);
    let mut dx = vec![0.0; rows * d];
    let (mut dw1, mut db1) = (vec![0.0; hidden * d], vec![0.0; hidden]);
    let (mut dw2, mut db2) = (vec![0.0; d2 * f], vec![0.0; d2]);
    for t in 0..rows {
        let (x, z, dy) = (&x.data[t * d..][..d], &z.data[t * hidden..][..hidden], &dy.data[t * d2..][..d2]);
        let h = activate(activation, z);
        let mut dh = vec![0.0; f];
        for (o, &dy) in dy.iter().enumerate() {
            db2[o] += dy;
            for j in 0..f {
                dh[j] += dy * w2.data[o * f + j];
                dw2[o * f + j] += dy * h[j];
            }
        }
        for (j, dz) in slope(activation, z, &dh).into_iter().enumerate() {
            db1[j] += dz;
            for c in 0..d {
                dx[t * d + c] += dz * w1.data[j * d + c];
                dw1[j * d + c] += dz * x[c];
            }
        }
    }
    vec![dx, dw1, db1, dw2, db2]
}
