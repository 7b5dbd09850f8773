"""What is wanted of each case against which peer: "must" holds back a release, "aim" is the ambition.

A ratio is the peer's time over ours in the same run: above 1, ours is faster. A goal whose case or peer was not measured
stays blank in the report.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    title: str
    # Names of cases, with * and ?.
    cases: str
    mode: str
    # Names of peers, with * and ?, several separated by |; the fastest of them counts. "copy" is this run's copy rate.
    peers: str
    must: float
    aim: float
    # Another case of ours in the place of a peer.
    ours: str = ""


MATMUL = "torch.matmul [[]*"
DENSE = "dense torch.matmul*"
SDPA_DEFAULT = "SDPA default*"
SDPA_CUDNN = "SDPA cuDNN*"
SDPA_ANY = "SDPA *"
EAGER = "torch eager [[]*|torch eager, f32 inside*"
COMPILED = "torch.compile*"
SPARSE = "cuSPARSELt*searched*"

GOALS = [
    Goal("8192 cubed, bf16", "NN 8192 x 8192 x 8192 bf16", "forward", MATMUL, 0.90, 1.00),
    Goal("4096 cubed, bf16", "NN 4096 x 4096 x 4096 bf16", "forward", MATMUL, 0.93, 1.05),
    Goal("GPT-2 up-projection", "NT 65536 x 3072 x 768 bf16", "forward", MATMUL, 0.90, 1.05),
    Goal("GPT-2 down-projection", "NT 65536 x 768 x 3072 bf16", "forward", MATMUL, 0.90, 1.05),
    Goal("forward layout (NT)", "NT 8192 x 14336 x 4096 bf16", "forward", MATMUL, 0.85, 0.97),
    Goal("input gradient layout (NN)", "NN 8192 x 4096 x 14336 bf16", "forward", MATMUL, 0.85, 0.97),
    Goal("weight gradient layout (TN)", "TN 14336 x 4096 x 8192 bf16", "forward", MATMUL, 0.85, 0.97),
    Goal("1 token", "NT 1 x 14336 x 4096 bf16", "forward", MATMUL, 0.90, 1.00),
    Goal("16 tokens", "NT 16 x 14336 x 4096 bf16", "forward", MATMUL, 0.90, 1.00),
    Goal("64 tokens", "NT 64 x 14336 x 4096 bf16", "forward", MATMUL, 0.90, 1.00),
    Goal("f32, 4096 cubed", "NN 4096 x 4096 x 4096 f32", "forward", MATMUL, 0.80, 0.95),
    Goal("GPT-2 block forward, against torch.compile", "gelu 65536 x 768 x 3072", "forward", COMPILED, 1.10, 1.25),
    Goal("GPT-2 block forward, against eager", "gelu 65536 x 768 x 3072", "forward", EAGER, 1.00, 1.40),
    Goal("block of width 4096 forward", "gelu 8192 x 4096 x 16384", "forward", COMPILED, 1.00, 1.05),
    Goal("attention d128, against SDPA's choice", "full d128 S=4096 B=*", "forward", SDPA_DEFAULT, 1.30, 1.60),
    Goal("attention d128 S=16k, against SDPA's choice", "full d128 S=16384 B=*", "forward", SDPA_DEFAULT, 1.30, 1.60),
    Goal("attention d128, against cuDNN", "full d128 S=4096 B=*", "forward", SDPA_CUDNN, 0.85, 1.00),
    Goal("attention d128 S=16k, against cuDNN", "full d128 S=16384 B=*", "forward", SDPA_CUDNN, 0.85, 1.00),
    Goal("attention d64 causal, against cuDNN", "causal d64 S=1024 *", "forward", SDPA_CUDNN, 0.85, 1.05),
    Goal("attention d64 causal S=4k, against cuDNN", "causal d64 S=4096 *", "forward", SDPA_CUDNN, 0.85, 1.05),
    Goal("backward d64, against SDPA's choice", "causal d64 S=1024 *", "backward", SDPA_DEFAULT, 1.20, 1.50),
    Goal("backward d128, against SDPA's choice", "full d128 S=4096 B=*", "backward", SDPA_DEFAULT, 1.20, 1.50),
    Goal("backward d128, against cuDNN", "full d128 S=4096 B=*", "backward", SDPA_CUDNN, 0.75, 0.95),
    Goal("padded, S=128, against the best SDPA", "padded d64 S=128 *", "forward", SDPA_ANY, 1.30, 2.00),
    Goal("padded, S=512, against the best SDPA", "padded d64 S=512 *", "forward", SDPA_ANY, 1.30, 2.00),
    Goal("one query, against the best SDPA", "full d128 S=4096 queries 1 *", "forward", SDPA_ANY, 0.90, 1.30),
    Goal("layer norm 4096 wide, share of the copy rate", "layernorm * x 4096", "forward", "copy", 0.85, 0.92),
    Goal("layer norm 16384 wide, share of the copy rate", "layernorm * x 16384", "forward", "copy", 0.85, 0.92),
    Goal("layer norm 4096 wide, against torch.compile", "layernorm * x 4096", "forward", COMPILED, 0.95, 1.05),
    Goal("layer norm 1024 wide, both ways, against eager", "layernorm * x 1024", "both", EAGER, 1.40, 2.00),
    Goal("RMS norm 1024 wide, both ways, against eager", "rmsnorm * x 1024", "both", EAGER, 1.40, 2.00),
    Goal("layer norm 4096 wide, both ways, against Liger", "layernorm * x 4096", "both", "Liger*", 1.20, 1.50),
    Goal("RMS norm 4096 wide, both ways, against Liger", "rmsnorm * x 4096", "both", "Liger*", 1.20, 1.50),
    Goal("add and RMS norm 4096 wide, against Liger", "add and rmsnorm * x 4096", "forward", "Liger*", 1.20, 1.50),
    Goal("softmax of 1,024", "softmax * x 1024", "forward", COMPILED, 1.00, 1.00),
    Goal("softmax of 65,536", "softmax * x 65536", "forward", COMPILED, 1.00, 1.30),
    Goal("softmax of 131,072", "softmax * x 131072", "forward", COMPILED, 1.00, 1.30),
    Goal("cross-entropy both ways, against Liger", "cross-entropy 8192 x 131072", "both", "Liger*", 1.30, 2.00),
    Goal("linear cross-entropy V=50k, against eager", "linear cross-entropy 4096 x 768 x *", "both", EAGER, 1.30, 2.00),
    Goal("linear cross-entropy V=128k, against eager", "linear cross-entropy 8192 x 4096 x *", "both", EAGER, 1.30, 2.00),
    Goal("linear cross-entropy, 1,024 tokens, against Liger", "linear cross-entropy 1024 x 4096 x *", "both", "Liger*", 1.50, 3.00),
    Goal("linear cross-entropy, 8,192 tokens, against Liger", "linear cross-entropy 8192 x 4096 x *", "both", "Liger*", 1.50, 1.50),
    Goal("squared error both ways, against eager", "mse 16384 x 4096", "both", EAGER, 1.50, 1.67),
    Goal("KL with T=2 both ways, against eager", "kl T=2 8192 x 131072", "both", EAGER, 3.00, 5.00),
    Goal("KL both ways, against Liger", "kl T=1 8192 x 131072", "both", "Liger*", 1.50, 3.00),
    Goal("JSD both ways, against Liger", "jsd T=1 8192 x 131072", "both", "Liger*", 1.50, 3.00),
    Goal("linear JSD, 1,024 tokens, against Liger", "linear jsd T=1 1024 x *", "both", "Liger*", 3.00, 5.00),
    Goal("linear JSD, 8,192 tokens, against Liger", "linear jsd T=1 8192 x *", "both", "Liger*", 1.50, 3.00),
    Goal("2:4, 4096 cubed, against cuSPARSELt", "2:4 4096 x 4096 x 4096 bf16", "forward", SPARSE, 0.90, 1.05),
    Goal("2:4, 8192 cubed, against cuSPARSELt", "2:4 8192 x 8192 x 8192 bf16", "forward", SPARSE, 0.90, 1.05),
    Goal("2:4, 4096 cubed, against dense cuBLAS", "2:4 4096 x 4096 x 4096 bf16", "forward", DENSE, 1.10, 1.35),
    Goal("2:4, 8192 cubed, against dense cuBLAS", "2:4 8192 x 8192 x 8192 bf16", "forward", DENSE, 1.10, 1.35),
    Goal("2:4, 1 token, against dense cuBLAS", "2:4 1 x 14336 x 4096 bf16", "forward", DENSE, 1.40, 1.65),
    Goal("2:4, 16 tokens, against dense cuBLAS", "2:4 16 x 14336 x 4096 bf16", "forward", DENSE, 1.40, 1.65),
    Goal("2:4, 32 tokens, against dense cuBLAS", "2:4 32 x 14336 x 4096 bf16", "forward", DENSE, 1.40, 1.65),
    Goal("2:4 int8, against our dense int8", "2:4 8192 x 8192 x 8192 int8", "forward", "", 1.10, 1.40, "int8 8192 x 8192 x 8192"),
    Goal("2:4, never slower than our dense", "2:4 8192 x 14336 x 4096 bf16", "forward", "", 1.00, 1.00, "NT 8192 x 14336 x 4096 bf16"),
    Goal("mask by rows", "mask by rows 8192 x 8192", "forward", "torch topk*", 3.00, 8.00),
    Goal("fake quantization per tensor", "fake-quant per tensor *", "forward", "torch.fake_quantize*", 1.30, 2.00),
    Goal("fake quantization per channel", "fake-quant per channel *", "forward", "torch.fake_quantize*", 1.30, 2.00),
    Goal("fake quantization per group", "fake-quant per group *", "forward", "torch.fake_quantize*", 1.30, 2.00),
    Goal("int8, against torch._int_mm alone", "int8 8192 x 8192 x 8192", "forward", "torch._int_mm, int32*", 0.95, 1.15),
    Goal("int8 with scales, against _int_mm and eager scales", "int8 8192 x 14336 x 4096", "forward", "torch._int_mm and*", 1.20, 1.50),
    Goal("int8, against our bf16", "int8 8192 x 8192 x 8192", "forward", "", 1.00, 1.60, "NN 8192 x 8192 x 8192 bf16"),
    Goal("int4 weights, 1 token, against cuBLAS bf16", "int4 1 x 14336 x 4096", "forward", DENSE, 2.00, 3.00),
    Goal("int4 weights, 16 tokens, against cuBLAS bf16", "int4 16 x 14336 x 4096", "forward", DENSE, 2.00, 3.00),
    Goal("int4 weights, 256 tokens, against cuBLAS bf16", "int4 256 x 14336 x 4096", "forward", DENSE, 0.75, 0.95),
    Goal("experts, 8,192 tokens, against grouped_mm", "experts 8192 x 2048 x 768, 8 of 128", "forward", "*grouped_mm*", 1.05, 1.30),
    Goal("experts, 32,768 tokens, against grouped_mm", "experts 32768 x 2048 x 768, 8 of 128", "forward", "*grouped_mm*", 1.05, 1.30),
    Goal("experts, 8,192 tokens, against a loop of cuBLAS", "experts 8192 x 2048 x 768, 8 of 128", "forward", "*loop*", 1.00, 2.00),
    Goal("128 experts for the time of 8, at most 1.25 times", "experts 8192 x 2048 x 768, 8 of 128", "forward", "", 0.80, 1.00, "experts 8192 x 2048 x 768, 8 of 8"),
    Goal("AdamW, 124M, share of the copy rate", "adamw 124000000", "forward", "copy", 0.85, 0.90),
    Goal("AdamW, 124M, against torch fused", "adamw 124000000", "forward", "torch AdamW fused [[]*", 1.00, 1.10),
    Goal("AdamW, many small tensors", "adamw 1000000", "forward", "*1,000 tensors*", 1.00, 1.50),
]
