"""Peers of elementwise work, normalisation, softmax, fake quantization and the optimizer."""

import torch
import torch.nn.functional as F

from products import bound_of, normal
from protocol import DTYPES, Peer, relative_error, spread


def uniform(generator, dims, low, high, dtype="f32"):
    values = torch.rand(dims, generator=generator, device=generator.device) * (high - low) + low
    return values.to(DTYPES[dtype])


def some_rows(tensor, count=12):
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
    return flat, spread(flat.shape[0], count)


def scale(case, context):
    factor = case.value.arguments[0].arguments[0]

    def make(generator):
        x = normal(generator, case.dims(0), case.dtype)
        return x, torch.empty_like(x)

    def check_of(factor):
        def check(inputs, out):
            index = spread(inputs[0].numel(), 5000)
            return relative_error(out.flatten()[index], inputs[0].flatten()[index].double() * factor)

        return check

    # The plain copy is the ceiling that everything bound by memory is held against.
    yield Peer("torch copy_", "forward", make, lambda x, y: y.copy_(x), check_of(1.0), bound_of(case))
    yield Peer(
        "torch.mul", "forward", make, lambda x, y: torch.mul(x, factor, out=y), check_of(factor), bound_of(case)
    )


def layernorm(case, context):
    eps = case.value["epsilon"]

    def make(generator):
        d = case.dims(0)[-1]
        return (
            normal(generator, case.dims(0), case.dtype),
            1 + normal(generator, [d], case.dtype, 0.3),
            normal(generator, [d], case.dtype),
        )

    def eager(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    yield from norm_peers(case, context, make, eager, "layer_norm", "LigerLayerNormFunction", lambda i: (*i, eps))


def rmsnorm(case, context):
    eps = case.value["epsilon"]

    def make(generator):
        d = case.dims(0)[-1]
        return normal(generator, case.dims(0), case.dtype), 1 + normal(generator, [d], case.dtype, 0.3)

    def eager(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)

    arguments = lambda i: (*i, eps, 0.0, "llama", False)
    yield from norm_peers(case, context, make, eager, "rms_norm", "LigerRMSNormFunction", arguments)


def norm_peers(case, context, make, eager, module, name, liger_arguments):
    def check(inputs, out):
        x, rows = some_rows(inputs[0])
        want = eager(x[rows].double(), *(w.double() for w in inputs[1:]))
        return relative_error(out.flatten(0, -2)[rows], want)

    bound = bound_of(case)
    yield Peer("torch eager", "forward", make, eager, check, bound)
    yield from context.compiled("torch.compile", "forward", make, eager, check, bound)
    liger = context.liger(module, name)
    if liger:
        yield Peer("Liger", "forward", make, lambda *i: liger.apply(*liger_arguments(i)), check, bound)


def norm_backward(case, context):
    d = case.dims(0)[-1]
    rms = case.value["rms"]

    def make(generator):
        x = normal(generator, case.dims(0), case.dtype)
        weight = 1 + normal(generator, [d], case.dtype, 0.3)
        return (x, weight) if rms else (x, weight, normal(generator, [d], case.dtype))

    def layer(x, weight, bias):
        return F.layer_norm(x, (d,), weight, bias, 1e-5)

    def root(x, weight):
        return F.rms_norm(x, (d,), weight, 1e-5)

    functions = {"torch eager": root if rms else layer}
    liger = context.liger(*(("rms_norm", "LigerRMSNormFunction") if rms else ("layer_norm", "LigerLayerNormFunction")))
    if liger:
        extra = (1e-5, 0.0, "llama", False) if rms else (1e-5,)
        functions["Liger"] = lambda *i: liger.apply(*i, *extra)
    wanted = (0, 1) if rms else (0, 1, 2)
    # "both" is what a comparison of forward and backward together is made from.
    yield from context.gradients(
        case, functions, make, wanted, (0,), 2 * bound_of(case), modes=("backward", "both")
    )


def add_rmsnorm(case, context):
    eps, factor = case.value["epsilon"], case.value["scale"]

    def make(generator):
        dims, dtype = case.dims(0), case.dtype
        x, r = normal(generator, dims, dtype), normal(generator, dims, dtype)
        return x, r, 1 + normal(generator, [dims[-1]], dtype, 0.3)

    def eager(x, r, weight):
        h = torch.add(x, r, alpha=factor)
        return F.rms_norm(h, weight.shape, weight, eps), h

    def check(inputs, out):
        x, rows = some_rows(inputs[0])
        want = eager(x[rows].double(), inputs[1].flatten(0, -2)[rows].double(), inputs[2].double())
        return relative_error([o.flatten(0, -2)[rows] for o in out[:2]], want)

    bound = bound_of(case)
    yield Peer("torch eager", "forward", make, eager, check, bound)
    yield from context.compiled("torch.compile", "forward", make, eager, check, bound)
    liger = context.liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    if liger and factor == 1.0:
        call = lambda x, r, w: liger.apply(x, r, w, eps, 0.0, "llama", False)
        yield Peer("Liger", "forward", make, call, check, bound)


def softmax(case, context):
    function = torch.log_softmax if case.op == "log_softmax" else torch.softmax

    def make(generator):
        return (normal(generator, case.dims(0), case.dtype, 3.0),)

    def eager(x):
        return function(x, dim=-1)

    def check(inputs, out):
        x, rows = some_rows(inputs[0])
        return relative_error(out.flatten(0, -2)[rows], eager(x[rows].double()))

    yield Peer("torch eager", "forward", make, eager, check, bound_of(case))
    yield from context.compiled("torch.compile", "forward", make, eager, check, bound_of(case))
    liger = context.liger("softmax", "LigerSoftmaxFunction")
    if liger and case.op == "softmax":
        yield Peer("Liger", "forward", make, lambda x: liger.apply(x), check, bound_of(case))


def levels(value):
    bits, scheme = value["bits"], value["scheme"].name
    half = 1 << (bits - 1)
    return {"SymmetricNarrow": (1 - half, half - 1), "SymmetricFull": (-half, half - 1), "Asymmetric": (0, 2 * half - 1)}[
        scheme
    ]


def fake_quant(case, context):
    value = case.value
    granularity = value["granularity"]
    low, high = levels(value)
    if low == 0:
        return
    dims = case.dims(0)
    if granularity.name == "Group":
        dims = [case.dims(0)[0] * case.dims(0)[1] // granularity.arguments[0], granularity.arguments[0]]
    per_row = granularity.name != "Tensor"
    rows = dims[0] if per_row else 1

    def make(generator):
        x = normal(generator, dims, case.dtype)
        ranges = uniform(generator, [rows], 1.5, 2.5)
        return x, ranges / high, torch.zeros(rows, dtype=torch.int32, device=generator.device)

    def eager(x, scales, zeros):
        # A scale that is its tensor's own must be found first; a given one is not.
        if value["dynamic"]:
            scales = x.abs().amax(dim=-1) / high if per_row else (x.abs().max() / high).reshape(1)
            scales = scales.float()
        if per_row:
            return torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, low, high)
        return torch.fake_quantize_per_tensor_affine(x, scales[0], zeros[0], low, high)

    def check(inputs, out):
        x, index = some_rows(inputs[0], 40)
        scales = inputs[1]
        if value["dynamic"]:
            scales = x.abs().amax(dim=-1) / high if per_row else (x.abs().max() / high).reshape(1)
        step = (scales[index][:, None] if per_row else scales[:1]).double()
        want = torch.clamp(torch.round(x[index].double() / step), low, high) * step
        return relative_error(out[index], want)

    # A quotient next to a tie may round either way: one element in thousands is a level away.
    bound = max(bound_of(case), 1e-3)
    yield Peer("torch.fake_quantize", "forward", make, eager, check, bound)
    plain = lambda x, scales, zeros: torch.clamp(torch.round(x / _column(scales, per_row)), low, high) * _column(
        scales, per_row
    )
    if not value["dynamic"]:
        yield from context.compiled("torch.compile", "forward", make, plain, check, bound)


def _column(scales, per_row):
    return scales[:, None] if per_row else scales


def adamw(case, context):
    value = case.value
    if value["masked"]:
        return
    (count,) = case.dims(0)
    # Step counts change in place: each set of inputs has its own.
    step = value["step"]

    def make_of(parts):
        def make(generator):
            def split(tensor):
                return list(torch.tensor_split(tensor, parts))

            whole = [normal(generator, [count], "f32") for _ in range(3)] + [uniform(generator, [count], 0.25, 1.25)]
            steps = [torch.tensor(float(step - 1), device=generator.device) for _ in range(parts)]
            kept = [[t[index_of(count)].clone() for t in whole]]
            return (*(split(t) for t in whole), steps, kept)

        return make

    def index_of(count):
        return spread(count, 5000)

    def call(parameters, gradients, first, second, steps, kept):
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters,
            gradients,
            first,
            second,
            [],
            steps,
            lr=value["learning_rate"],
            beta1=value["beta1"],
            beta2=value["beta2"],
            weight_decay=value["weight_decay"],
            eps=value["epsilon"],
            amsgrad=False,
            maximize=False,
        )
        return parameters

    def check(inputs, out):
        p, g, m, v = (t.double() for t in inputs[5][0])
        m = value["beta1"] * m + (1 - value["beta1"]) * g
        v = value["beta2"] * v + (1 - value["beta2"]) * g * g
        direction = (m / (1 - value["beta1"] ** step)) / ((v / (1 - value["beta2"] ** step)).sqrt() + value["epsilon"])
        want = p - value["learning_rate"] * (direction + value["weight_decay"] * p)
        return relative_error(torch.cat(list(out))[index_of(count)], want)

    yield Peer("torch AdamW fused", "forward", make_of(1), call, check, 1e-5, in_place=True)
    if count <= 16_000_000:
        yield Peer("torch AdamW fused, 1,000 tensors", "forward", make_of(1000), call, check, 1e-5, in_place=True)


HANDLERS = {
    "scale": scale,
    "layernorm": layernorm,
    "layernorm_bwd": norm_backward,
    "rmsnorm": rmsnorm,
    "rmsnorm_bwd": norm_backward,
    "add_rmsnorm": add_rmsnorm,
    "softmax": softmax,
    "log_softmax": softmax,
    "fake_quant": fake_quant,
    "adamw": adamw,
}
