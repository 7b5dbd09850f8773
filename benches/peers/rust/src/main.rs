//! faer, `gemm`, rten-gemm and matrixmultiply on the cases of `benches/peers/cpu`.

mod int8;
mod product;
mod protocol;

use protocol::{Case, Peer, Work};

const PEERS: [Peer; 4] = [
    Peer::cpu("faer", "0.24.4"),
    Peer::cpu("gemm x86-v4", "0.19.0"),
    Peer::cpu("rten-gemm", "0.27.0"),
    Peer::cpu("matrixmultiply", "0.3.11"),
];

fn open(peer: &str, case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    match case.op.as_str() {
        "matmul" | "matmul_sparse24" | "matmul_bitmap" => product::open(peer, case, slots),
        "matmul_int8" if peer == "rten-gemm" => Some(Box::new(int8::Int8::new(case, slots))),
        _ => None,
    }
}

fn main() {
    protocol::serve(&PEERS, open);
}
