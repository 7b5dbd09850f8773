"""What is wanted of each case against which peers: "must" and "aim" are ratios of their time to ours."""

from fnmatch import fnmatchcase

# What is held against our own dense form of the same size: a sparse int8 product against the int8 one without zeros, a sparse
# int8 encoder against the f32 one of the same weights.
DENSE = {"matmul_bitmap_int8": "matmul_int8", "encoder_int8": "encoder"}


class Goal:
    """Against the fastest of the named peers, in every case that fits: patterns with `|` between them."""

    def __init__(self, title, cases, mode, peers, must, aim):
        self.title, self.cases, self.mode, self.peers, self.must, self.aim = title, cases, mode, peers, must, aim

    def covers(self, name, mode):
        return mode == self.mode and any(fnmatchcase(name, pattern) for pattern in self.cases.split("|"))


# Where no memory is new, both forms are the same kernel.
KEPT = "PyTorch, memory kept"
TORCH = ("PyTorch", KEPT)
BURN = ("burn flex", "burn ndarray")
# Our own last kernel of an op on the same adapter: one output, one invocation.
NAIVE = "espalier, naive rung"

GOALS = [
    Goal("f32 products", "NN * f32", "forward", ("faer", "gemm x86-v4"), 0.95, 1.05),
    Goal("f32 products", "NN * f32", "forward", TORCH, 1.8, 2.2),
    Goal("f32 products", "NN * f32", "forward", ("candle",), 1.7, 2.1),
    Goal("f32 products", "NN * f32", "forward", BURN, 1.7, 2.1),
    Goal("bf16 products", "NN * bf16", "forward", TORCH, 0.85, 1.0),
    Goal("int8 products", "int8 *", "forward", ("rten-gemm",), 1.0, 1.2),
    Goal("int8 products", "int8 *", "forward", ("ONNX Runtime",), 1.0, 1.2),
    Goal("2:4 product", "2:4 *", "forward", ("faer",), 1.25, 1.6),
    Goal("80 % zeros", "80 % zeros * f32", "forward", ("faer",), 2.4, 3.2),
    Goal("90 % zeros", "90 % zeros * f32", "forward", ("faer",), 4.2, 6),
    Goal("80 to 90 % zeros, int8", "* zeros * int8", "forward", ("espalier, dense",), 1.8, 3),
    Goal("attention", "full d64 *", "forward", ("PyTorch",), 1.6, 2.2),
    Goal("attention, forward and backward", "full d64 *", "both", ("PyTorch",), 1.6, 2.2),
    Goal("softmax", "softmax *", "forward", ("PyTorch",), 1.5, 2.2),
    Goal("RMSNorm", "rmsnorm *", "forward", ("PyTorch",), 1.5, 2.2),
    Goal("GELU", "gelu *", "forward", ("PyTorch",), 1.5, 2.2),
    Goal("LayerNorm", "layernorm *", "forward", ("PyTorch",), 1.0, 1.3),
    Goal("cross-entropy with its gradient", "cross-entropy *", "both", ("PyTorch",), 5, 12),
    Goal("KL with its gradient", "kl *", "both", ("PyTorch",), 8, 20),
    Goal("fake quantization", "fake-quant *", "forward", ("PyTorch",), 8, 15),
    Goal("top-k", "top *", "forward", ("PyTorch",), 2, 5),
    Goal("AdamW", "adamw *", "forward", TORCH, 0.95, 1.1),
    Goal("training step", "GPT step * f32", "forward", TORCH, 1.3, 1.9),
    Goal("training step", "GPT step * f32", "forward", ("candle",), 1.8, 3),
    Goal("training step", "GPT step * f32", "forward", BURN, 1.8, 3),
    Goal("training step, bf16 products", "GPT step * bf16", "forward", TORCH, 0.8, 1.1),
    Goal("encoder, 90 % zeros, int8", "encoder * int8", "forward", ("espalier, dense",), 5, 7.9),
    Goal("encoder, 90 % zeros, int8", "encoder * int8", "forward", ("ONNX Runtime",), 8, 11.5),
    Goal("int8 FFN", "int8 FFN *", "forward", ("ONNX Runtime",), 1.0, 1.3),
]

CUBES = "NN 512 x * f32|NN 1024 x * f32"

# What is not named here is not timed on an adapter.
ADAPTER_GOALS = [
    Goal("f32 products", CUBES, "forward", ("burn wgpu",), 1.5, 2),
    Goal("f32 products", CUBES, "forward", (NAIVE,), 10, 10),
    Goal("softmax, LayerNorm", "softmax *|layernorm *", "forward", ("burn wgpu",), 4, 7),
    Goal("add, GELU", "add *|gelu *", "forward", ("burn wgpu",), 1.5, 2),
    Goal("attention", "full d64 S=512 *", "forward", ("burn wgpu",), 1.5, 3),
    # Of both sizes the one that takes a few seconds where the adapter is a program.
    Goal("training step", "GPT step d256 * f32", "forward", ("burn wgpu",), 1.5, 3),
]


def goals_on(backend):
    return GOALS if backend == "cpu" else ADAPTER_GOALS
