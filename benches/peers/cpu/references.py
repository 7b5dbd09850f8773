"""What each op means, in float64, from the same inputs that every contestant got: the judge shares no code with any of them."""

import math

import numpy

import models
from case_list import parse_value

# Of the relative error over a whole output (Frobenius norm): well above what sums in f32 round to, well below what a narrower
# type would give. An op on integers, or one that selects, has to be right.
BOUND = {"f32": 1e-5, "bf16": 5e-3, "f16": 1e-3}
# No single element may be further off than this many bounds, in units of the output's root mean square and its own size: of a
# gradient that is nearly all zeros (of a loss over a vocabulary) the few others are hundreds of times the root mean square, and
# are rounded as what they are.
WORST = 64


def double(array, dtype):
    """Elements of the storage type as float64."""
    if dtype == "bf16":
        return (array.astype(numpy.uint32) << 16).view(numpy.float32).astype(numpy.float64)
    return array.astype(numpy.float64)


def matmul(value, a, b):
    return [(a.T if value["transpose_a"] else a) @ (b.T if value["transpose_b"] else b)]


def matmul_int8(value, a, a_scales, b, b_scales):
    return [(a @ b.T) * a_scales[:, None] * b_scales[None]]


def integer_product(value, a, a_scales, b, b_scales):
    return [a @ b.T]


def matmul_sparse24(value, x, values, places):
    n, k = values.shape[0], x.shape[1]
    words = places.astype(numpy.uint32)
    kept = numpy.arange(k // 2)
    within = words[:, kept // 16] >> (2 * (kept % 16)).astype(numpy.uint32) & 3
    dense = numpy.zeros((n, k))
    numpy.put_along_axis(dense, (kept // 2 * 4)[None] + within.astype(numpy.int64), values, axis=1)
    return [x @ dense.T]


def bitmap(values, lists, k, per):
    """A weight `[n, k]` of kept words of `per` elements and the bitmaps of each block of 64 words of each row."""
    words = lists.astype(numpy.uint64)
    masks = words[:, :, 0] | words[:, :, 1] << numpy.uint64(32)
    kept = (masks[:, :, None] >> numpy.arange(64, dtype=numpy.uint64) & numpy.uint64(1)).astype(bool)
    dense = numpy.zeros((*kept.shape, per))
    dense[kept] = values[: kept.sum() * per].reshape(-1, per)
    return dense.transpose(1, 0, 2, 3).reshape(len(lists[0]), -1)[:, :k]


def matmul_bitmap(value, x, values, lists):
    return [x @ bitmap(values, lists, x.shape[1], 1).T]


def matmul_bitmap_int8(value, x, x_scales, values, lists, scales):
    return [(x @ bitmap(values, lists, x.shape[1], 4).T) * x_scales[:, None] * scales[None]]


def fake_quant(value, x, steps):
    step = steps if value["granularity"].name == "Tensor" else steps[:, None]
    level = x / step
    # Next to a tie either neighbour is right: some divide, some multiply by the reciprocal.
    tie = numpy.abs(level - numpy.floor(level) - 0.5) < 1e-3
    return [numpy.where(tie, numpy.nan, numpy.clip(numpy.rint(level), -128, 127) * step)]


def heads(x):
    """[1, S, H, D] as [H, S, D]."""
    return x[0].transpose(1, 0, 2)


def tokens(x):
    return x.transpose(1, 0, 2)[None]


def log_sum_exp(x):
    most = x.max(axis=-1, keepdims=True)
    return most + numpy.log(numpy.exp(x - most).sum(axis=-1, keepdims=True))


def attention(value, q, k, v):
    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ k.transpose(0, 2, 1) * value["scale"]
    lse = log_sum_exp(scores)
    return [tokens(numpy.exp(scores - lse) @ v), lse[None, :, :, 0]]


def attention_gradients(scale, q, k, v, y, lse, dy):
    q, k, v, y, dy = heads(q), heads(k), heads(v), heads(y), heads(dy)
    p = numpy.exp(q @ k.transpose(0, 2, 1) * scale - lse[0][:, :, None])
    dv = p.transpose(0, 2, 1) @ dy
    ds = p * (dy @ v.transpose(0, 2, 1) - (dy * y).sum(axis=-1, keepdims=True))
    return [tokens(scale * ds @ k), tokens(scale * ds.transpose(0, 2, 1) @ q), tokens(dv)]


def attention_bwd(value, q, k, v, y, lse, dy):
    return attention_gradients(value.arguments[0]["scale"], q, k, v, y, lse, dy)


def attention_both(value, q, k, v, _y, _lse, dy):
    y, lse = attention(value.arguments[0], q, k, v)
    return [y, *attention_gradients(value.arguments[0]["scale"], q, k, v, y, lse, dy)]


def softmax(value, x):
    return [numpy.exp(x - log_sum_exp(x))]


def layernorm(value, x, weight, bias):
    mean, rstd = x.mean(axis=-1, keepdims=True), 1.0 / numpy.sqrt(x.var(axis=-1, keepdims=True) + value["epsilon"])
    return [(x - mean) * rstd * weight + bias, mean[:, 0], rstd[:, 0]]


def rmsnorm(value, x, weight):
    rstd = 1.0 / numpy.sqrt((x**2).mean(axis=-1, keepdims=True) + value["epsilon"])
    return [x * rstd * weight, rstd[:, 0]]


def add(value, a, b):
    return [a + b]


def gelu_tanh(value, x):
    return [0.5 * x * (1.0 + numpy.tanh((2.0 / numpy.pi) ** 0.5 * (x + 0.044715 * x**3)))]


def gelu_erf(value, x):
    erf = numpy.fromiter(map(math.erf, (x / 2.0**0.5).ravel()), dtype=numpy.float64, count=x.size)
    return [0.5 * x * (1.0 + erf.reshape(x.shape))]


def moe_gate(value, scores):
    order = numpy.argsort(-scores, axis=-1, kind="stable")[:, : value["k"]]
    return [order.astype(numpy.float64), numpy.take_along_axis(scores, order, axis=-1)]


def cross_entropy(value, logits, targets):
    lse = log_sum_exp(logits)[:, 0]
    return [lse - logits[numpy.arange(len(targets)), targets.astype(numpy.int64)], lse]


def cross_entropy_bwd(value, logits, targets, lse, upstream):
    gradient = numpy.exp(logits - lse[:, None])
    gradient[numpy.arange(len(targets)), targets.astype(numpy.int64)] -= 1.0
    return [gradient * upstream[:, None]]


def cross_entropy_both(value, logits, targets, _lse, upstream):
    loss, lse = cross_entropy(value, logits, targets)
    return [loss, *cross_entropy_bwd(value, logits, targets, lse, upstream)]


def kl(value, student, teacher, weights):
    t = value["temperature"]
    lse_s, lse_t = log_sum_exp(student / t), log_sum_exp(teacher / t)
    log_p = teacher / t - lse_t
    divergence = (numpy.exp(log_p) * (log_p - (student / t - lse_s))).sum(axis=-1)
    return [weights * t**2 * divergence, lse_s[:, 0], lse_t[:, 0], numpy.zeros(len(weights))]


def kl_bwd(value, student, teacher, weights, lse_s, lse_t, _expectation, upstream):
    t = value["temperature"]
    slopes = numpy.exp(student / t - lse_s[:, None]) - numpy.exp(teacher / t - lse_t[:, None])
    return [slopes * t * (weights * upstream)[:, None]]


def kl_both(value, student, teacher, weights, _s, _t, _expectation, upstream):
    loss, lse_s, lse_t, _ = kl(value, student, teacher, weights)
    return [loss, *kl_bwd(value, student, teacher, weights, lse_s, lse_t, None, upstream)]


def adamw(value, p, g, m, v, factor, rates):
    g = g * factor[0]
    m = value["beta1"] * m + (1 - value["beta1"]) * g
    v = value["beta2"] * v + (1 - value["beta2"]) * g * g
    direction = m * rates[1] / (numpy.sqrt(v * rates[2]) + value["epsilon"])
    return [p - rates[0] * (direction + value["weight_decay"] * p), m, v]


def sgd(value, p, g, velocity, factor, rates):
    velocity = value["momentum"] * velocity + g * factor[0]
    return [p - rates[0] * (velocity + value["weight_decay"] * p), velocity]


def scale(value, x):
    return [x * value.arguments[0].arguments[0]]


def accumulate_scaled(value, x, y):
    return [x + value["factor"] * y]


def multiply_add_chain(value, x):
    # Its own program's table checks it; here it only has to have been written.
    return [None]


REFERENCES = {
    name: function
    for name, function in globals().items()
    if callable(function) and name not in ("double", "heads", "tokens", "log_sum_exp", "parse_value", "attention_gradients", "bitmap")
}


def expected(case, arrays, computes=None):
    """The float64 results of a case, or of what a peer says it computes of it."""
    name = (computes or case["op"]).replace(" ", "_")
    value = parse_value(case["params"].split(" ", 1)[0])
    inputs = [double(a, meta["dtype"]) for a, meta in zip(arrays, case["inputs"], strict=True)]
    if name in models.REFERENCES:
        return models.REFERENCES[name](value, {meta["name"]: x for meta, x in zip(case["inputs"], inputs)})
    return REFERENCES[name](value, *inputs)


def bound_of(case, dtype, computes=None):
    """Of the relative error of a result that is handed in as `dtype`."""
    model = models.BOUND.get((computes or case["op"]).replace(" ", "_"))
    if model:
        return model[case["dtype"]]
    return BOUND.get("bf16" if "bf16" in str(case["inputs"]) else dtype, 0.0)


def judge(want, got, dtype, bound, dims):
    """The relative error of an output of these dimensions, and why it is wrong; None where it is right."""
    count = math.prod(dims)
    if got.size != count:
        return numpy.inf, f"{got.size} elements where {count} were expected"
    got = double(got.reshape(dims), dtype)
    if not numpy.isfinite(got).all():
        return numpy.inf, f"{int((~numpy.isfinite(got)).sum())} elements were not written, or are no numbers"
    if want is None:
        return 0.0, None
    difference = numpy.abs(got - want)
    judged = numpy.isfinite(want)
    if not judged.all():
        # Where nothing is expected, everything is right.
        want, difference = want[judged], difference[judged]
    power = float(numpy.sqrt(numpy.square(want).mean())) or 1.0
    worst, error = float((difference / (power + numpy.abs(want))).max()), float(numpy.sqrt(numpy.square(difference).mean())) / power
    if error > bound:
        return error, f"relative error {error:.2e} above {bound:.0e}"
    if worst > WORST * bound:
        return error, f"an element is off by {worst:.2e} of the output's size and its own"
    return error, None
