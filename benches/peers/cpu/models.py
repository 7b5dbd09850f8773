"""What whole models mean, in float64: layers as functions that also give their way back. No code is shared with a contestant."""

import numpy

# Of the relative error of each result, by what products are computed in. Of a training step, whose results are changes of
# weights: f32 rounds some ten products in a row, on the way there and on the way back; bf16 rounds to eight bits each time.
# Of int8: an activation next to a tie may go either way, and takes others behind it along. After the eight or so products in a
# row of an encoder two sound ways to round are as far apart as rounding itself takes either from f32, 2.5e-2; a sublayer that
# is left out takes it further.
BOUND = {
    "training_step": {"f32": 1e-4, "bf16": 5e-2},
    "encoder": {"f32": 2e-5, "i8": 2e-5},
    "encoder_int8": {"i8": 5e-2},
    "ffn_int8": {"i8": 1e-3},
    "ffn_one_range": {"i8": 1e-3},
}
ROOT = (2.0 / numpy.pi) ** 0.5


def flat(x):
    return x.reshape(-1, x.shape[-1])


def gelu(z):
    """The tanh form, and its slope."""
    t = numpy.tanh(ROOT * (z + 0.044715 * z**3))
    return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * ROOT * (1.0 + 3.0 * 0.044715 * z * z)


class Layers:
    """Layers over named weights; each call gives its result and the function from that one's gradient to its input's."""

    def __init__(self, weights, epsilon):
        self.weights, self.epsilon, self.gradients = weights, epsilon, {}

    def add(self, name, gradient):
        self.gradients[name] = self.gradients.get(name, 0.0) + gradient

    def linear(self, name, x):
        weight = self.weights[f"{name}.weight"]

        def back(dy):
            self.add(f"{name}.weight", flat(dy).T @ flat(x))
            self.add(f"{name}.bias", flat(dy).sum(axis=0))
            return dy @ weight

        return x @ weight.T + self.weights[f"{name}.bias"], back

    def norm(self, name, x):
        scale = 1.0 / numpy.sqrt(x.var(axis=-1, keepdims=True) + self.epsilon)
        normed = (x - x.mean(axis=-1, keepdims=True)) * scale
        weight = self.weights[f"{name}.weight"]

        def back(dy):
            self.add(f"{name}.weight", flat(dy * normed).sum(axis=0))
            self.add(f"{name}.bias", flat(dy).sum(axis=0))
            d = dy * weight
            d = d - d.mean(axis=-1, keepdims=True) - normed * (d * normed).mean(axis=-1, keepdims=True)
            return d * scale

        return normed * weight + self.weights[f"{name}.bias"], back

    def lookup(self, name, ids):
        def back(dy):
            gradient = numpy.zeros_like(self.weights[name])
            numpy.add.at(gradient, ids, dy)
            self.add(name, gradient)

        return self.weights[name][ids], back

    def attention(self, name, x, heads, causal):
        def split(y):
            return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        def joined(y):
            y = y.transpose(0, 2, 1, 3)
            return y.reshape(*y.shape[:2], -1)

        (q, back_q), (k, back_k), (v, back_v) = (self.linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        q, k, v = split(q), split(k), split(v)
        scale = q.shape[-1] ** -0.5
        scores = q @ k.swapaxes(-1, -2) * scale
        if causal:
            scores = numpy.where(numpy.tri(x.shape[1], dtype=bool), scores, -numpy.inf)
        p = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        y, back_output = self.linear(f"{name}.output", joined(p @ v))

        def back(dy):
            dy = split(back_output(dy))
            dp = dy @ v.swapaxes(-1, -2)
            ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
            dx = back_v(joined(p.swapaxes(-1, -2) @ dy))
            return dx + back_q(joined(ds @ k)) + back_k(joined(ds.swapaxes(-1, -2) @ q))

        return y, back

    def ffn(self, name, x):
        z, back_in = self.linear(f"{name}.in", x)
        h, slope = gelu(z)
        y, back_out = self.linear(f"{name}.out", h)

        def back(dy):
            return back_in(back_out(dy) * slope)

        return y, back


def loss_and_gradients(weights, tokens, targets, heads):
    """Mean cross-entropy of a GPT (learned positions, pre-norm, the embedding as its head) and its gradients by name."""
    layers = Layers(weights, 1e-5)
    x, back_tokens = layers.lookup("embedding.tokens", tokens)
    positions, back_positions = layers.lookup("embedding.positions", numpy.arange(tokens.shape[1]))
    x = x + positions
    backs, count = [], sum(name.endswith("ffn.in.weight") for name in weights)
    for i in range(count):
        for norm, part in (("norm_attention", "attention"), ("norm_ffn", "ffn")):
            normed, back_norm = layers.norm(f"blocks.{i}.{norm}", x)
            part = f"blocks.{i}.{part}"
            added, back = layers.ffn(part, normed) if part.endswith("ffn") else layers.attention(part, normed, heads, True)
            x = x + added
            backs.append((back_norm, back))
    normed, back_final = layers.norm("norm_final", x)
    head = weights["embedding.tokens"]
    logits = flat(normed) @ head.T
    most = logits.max(axis=-1, keepdims=True)
    shares = numpy.exp(logits - most)
    sums = shares.sum(axis=-1, keepdims=True)
    rows = numpy.arange(len(targets))
    loss = (numpy.log(sums[:, 0]) + most[:, 0] - logits[rows, targets]).mean()
    shares /= sums
    shares[rows, targets] -= 1.0
    shares /= len(targets)
    layers.add("embedding.tokens", shares.T @ flat(normed))
    dx = back_final((shares @ head).reshape(x.shape))
    for back_norm, back in reversed(backs):
        dx = dx + back_norm(back(dx))
    back_tokens(dx)
    back_positions(dx.sum(axis=0))
    return loss, layers.gradients


def training_step(value, inputs):
    """The loss, and by how much AdamW's first step changes each weight; matrices alone decay."""
    tokens, targets = (inputs.pop(name).astype(numpy.int64) for name in ("tokens", "targets"))
    loss, gradients = loss_and_gradients(inputs, tokens, targets, value["heads"])
    results = [numpy.array([loss])]
    for name, weight in inputs.items():
        # A bias of all keys alike moves no softmax: its gradient is nothing but rounding.
        if name.endswith("attention.key.bias"):
            results.append(None)
            continue
        direction = gradients[name] / (numpy.abs(gradients[name]) + value["epsilon"])
        decay = value["decay"] if weight.ndim > 1 else 0.0
        results.append(-value["rate"] * (direction + decay * weight))
    return results


class Integers(Layers):
    """Linears of blocks on integers of -127 to 127, with a step for each output channel and for each row of the input."""

    def on_grid(self, x):
        step = numpy.abs(x).max(axis=-1, keepdims=True) / 127.0
        return numpy.rint(x / step) * step

    def linear(self, name, x):
        if name == "head":
            return super().linear(name, x)
        weight = self.weights[f"{name}.weight"]
        step = numpy.abs(weight).max(axis=-1, keepdims=True) / 127.0
        weight = numpy.rint(weight / step) * step
        return self.on_grid(x) @ weight.T + self.weights[f"{name}.bias"], None


class OneRange(Integers):
    """Inputs on integers of 0 to 255 over the range of all of them, which has 0 (ONNX's DynamicQuantizeLinear)."""

    def on_grid(self, x):
        low, high = min(x.min(), 0.0), max(x.max(), 0.0)
        step = (high - low) / 255.0
        zero = numpy.clip(numpy.rint(-low / step), 0, 255)
        return (numpy.clip(numpy.rint(x / step) + zero, 0, 255) - zero) * step


def logits(layers, tokens, heads):
    """Of a post-norm encoder with learned positions."""
    x = layers.lookup("embedding.tokens", tokens)[0] + layers.lookup("embedding.positions", numpy.arange(tokens.shape[1]))[0]
    x, _ = layers.norm("blocks.0.norm_attention", x)
    count = sum(name.endswith("ffn.in.weight") for name in layers.weights)
    for i in range(count):
        following = f"blocks.{i + 1}.norm_attention" if i + 1 < count else "norm_final"
        x, _ = layers.norm(f"blocks.{i}.norm_ffn", x + layers.attention(f"blocks.{i}.attention", x, heads, False)[0])
        x, _ = layers.norm(following, x + layers.ffn(f"blocks.{i}.ffn", x)[0])
    return layers.linear("head", x)[0]


def encoder_by(kind):
    return lambda value, inputs: [logits(kind(inputs, 1e-12), inputs.pop("tokens").astype(numpy.int64), value["heads"])]


def ffn_by(kind):
    def reference(value, inputs):
        layers, x = kind(inputs, None), inputs.pop("x")
        z, _ = layers.linear("blocks.0.ffn.in", x)
        h = numpy.maximum(z, 0.0) if value["activation"].name == "relu" else gelu(z)[0]
        return [layers.linear("blocks.0.ffn.out", h)[0]]

    return reference


REFERENCES = {
    "training_step": training_step,
    "encoder": encoder_by(Layers),
    "encoder_int8": encoder_by(Integers),
    "ffn_int8": ffn_by(Integers),
    "ffn_one_range": ffn_by(OneRange),
}


def handed_in(case, index, got, before):
    """What is judged of an output: of a trained weight, its change; `before` reads an input as it was."""
    if case["op"] != "training_step" or index == 0:
        return got
    return got.astype(numpy.float64) - before(index - 1).reshape(-1)
