"""Peers of losses: cross-entropy, squared error, divergences; from logits and from a head.

A library's loss is compared as forward alone and as forward with gradient ("both"); some compute the gradient in the
forward pass and have no other form.
"""

import torch
import torch.nn.functional as F

from products import bound_of, normal
from protocol import Peer, Skipped, relative_error, spread


def targets(generator, count, words):
    return torch.randint(0, words, (count,), generator=generator, device=generator.device)


def forward_and_both(case, context, functions, make, wanted, rows, bound):
    """Forward peers by name, and the same with gradients; the first function is compiled as well."""
    plain = next(iter(functions.values()))

    def check(inputs, out):
        some = spread(inputs[rows[0]].shape[0], 4)
        cut = [(t[some] if i in rows else t) for i, t in enumerate(inputs)]
        want = plain(*(t.double() if t.is_floating_point() else t for t in cut))
        return relative_error(out[some], want)

    for name, function in functions.items():
        yield Peer(name, "forward", make, function, check, bound)
    yield from context.compiled("torch.compile", "forward", make, plain, check, bound)
    yield from context.gradients(case, functions, make, wanted, rows, bound, modes=("both",))


def cross_entropy(case, context):
    rows, words = case.dims(0)
    smoothing = case.value["smoothing"]

    def make(generator):
        return normal(generator, [rows, words], case.dtype, 3.0), targets(generator, rows, words)

    def eager(logits, ids):
        return F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)

    bound = bound_of(case)
    yield from forward_and_both(case, context, {"torch eager": eager}, make, (0,), (0, 1), bound)
    liger = context.liger("cross_entropy", "LigerCrossEntropyFunction")
    if liger:

        def call(logits, ids):
            # Overwrites the logits with their gradient: later runs find that in their place, as large and as random.
            return liger.apply(logits, ids, None, -100, 0.0, smoothing, "sum")[0]

        def make_kept(generator):
            logits, ids = make(generator)
            return logits.requires_grad_(), ids, [logits.detach()[spread(rows, 4)].clone()]

        def both(logits, ids, kept):
            with torch.enable_grad():
                call(logits.detach().requires_grad_(), ids)
            return logits.detach()

        def check(inputs, out):
            logits, ids, kept = inputs
            some = spread(rows, 4)
            leaf = kept[0].double().requires_grad_()
            with torch.enable_grad():
                total = F.cross_entropy(leaf, ids[some], reduction="sum", label_smoothing=smoothing)
            return relative_error(out[some], torch.autograd.grad(total, leaf)[0])

        yield Peer("Liger, in place", "both", make_kept, both, check, bound, in_place=True)


def cross_entropy_backward(case, context):
    rows, words = case.dims(0)
    smoothing = case.value["smoothing"]

    def make(generator):
        return normal(generator, [rows, words], case.dtype, 3.0), targets(generator, rows, words)

    def eager(logits, ids):
        return F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)

    yield from context.gradients(case, {"torch eager": eager}, make, (0,), (0, 1), bound_of(case), compiled=False)


def hidden_mse(case, context):
    count, width = case.dims(0)
    if case.value["normalised"]:
        return

    def make(generator):
        return normal(generator, [count, width], case.dtype), normal(generator, [count, width], case.dtype)

    def eager(student, teacher):
        return F.mse_loss(student, teacher)

    def make_leaf(generator):
        student, teacher = make(generator)
        return student.requires_grad_(), teacher

    def both_of(function):
        def both(student, teacher):
            with torch.enable_grad():
                loss = function(student, teacher)
            return torch.autograd.grad(loss, student)[0]

        return both

    def check(inputs, out):
        # All of it, as every element counts, but not in float64 at once.
        parts = zip(inputs[0].detach().split(1 << 14), inputs[1].split(1 << 14))
        total = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in parts)
        want = torch.tensor(total / (count * width), dtype=torch.float64, device=out.device)
        return relative_error(out, want)

    def check_gradient(inputs, out):
        some = spread(count, 8)
        difference = inputs[0].detach()[some].double() - inputs[1][some].double()
        return relative_error(out[some], 2 * difference / (count * width))

    bound = bound_of(case)
    yield Peer("torch eager", "forward", make, eager, check, bound)
    yield from context.compiled("torch.compile", "forward", make, eager, check, bound)
    yield Peer("torch eager", "both", make_leaf, both_of(eager), check_gradient, bound)
    try:
        compiled = context.compiler(eager)
    except Skipped:
        return
    yield Peer("torch.compile", "both", make_leaf, both_of(compiled), check_gradient, bound)


def divergence(value):
    """Loss per row from two matrices of logits, temperature squared where the case says so."""
    direction, temperature = value["direction"], value["temperature"]
    factor = temperature**2 if value["squared"] else 1.0

    def loss(student, teacher):
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        if direction.name == "Forward":
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * factor
        if direction.name == "Reverse":
            return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * factor
        beta = direction["beta"]
        q, p = log_q.exp(), log_p.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        return (beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)) * factor

    return loss


def wide(loss):
    """The loss in f32 from 16-bit operands; wider ones stay as they are."""
    return lambda *tensors: loss(*(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors))


def kl(case, context):
    rows, words = case.dims(0)
    loss = divergence(case.value)

    def make(generator):
        return normal(generator, [rows, words], case.dtype, 4.0), normal(generator, [rows, words], case.dtype, 4.0)

    functions = {"torch eager": loss}
    if case.dtype != "f32":
        # The usual remedy where 16-bit logarithms are too coarse.
        functions = {"torch eager, f32 inside": wide(loss), **functions}
    yield from forward_and_both(case, context, functions, make, (0,), (0, 1), bound_of(case))
    yield from liger_divergence(case, context, make)


def liger_divergence(case, context, make):
    value = case.value
    kind = value["direction"].name
    names = {"Forward": ("kl_div", "LigerKLDivLossFunction"), "Jsd": ("jsd", "LigerJSDFunction")}
    liger = context.liger(*names[kind]) if kind in names else None
    if not liger:
        return
    temperature = value["temperature"]
    factor = temperature**2 if value["squared"] else 1.0
    loss = divergence(value)

    def make_leaf(generator):
        student, teacher = make(generator)
        return student.requires_grad_(), teacher

    def both(student, teacher):
        with torch.enable_grad():
            log_q = F.log_softmax(student.float() / temperature, dim=-1)
            log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
            if kind == "Forward":
                total = liger.apply(log_q, log_p, "sum", True, 1e-10)
            else:
                # Normalised by the rows inside.
                total = liger.apply(log_q, log_p, None, value["direction"]["beta"], -100) * student.shape[0]
            total = total * factor
        return torch.autograd.grad(total, student)[0]

    def check(inputs, out):
        some = spread(inputs[0].shape[0], 4)
        leaf = inputs[0].detach()[some].double().requires_grad_()
        with torch.enable_grad():
            total = loss(leaf, inputs[1][some].double()).sum()
        return relative_error(out[some], torch.autograd.grad(total, leaf)[0])

    yield Peer("Liger", "both", make_leaf, both, check, bound_of(case))


def head(generator, case, hidden, weight):
    (_, width), dtype = case.dims(hidden), case.dtype
    return (
        normal(generator, case.dims(hidden), dtype, 2.0),
        normal(generator, case.dims(weight), dtype, width**-0.5),
    )


def linear_cross_entropy(case, context):
    (rows, _), (words, _) = case.dims(0), case.dims(1)

    def make(generator):
        hidden, weight = head(generator, case, 0, 1)
        return hidden, targets(generator, rows, words), weight

    def eager(hidden, ids, weight):
        return F.cross_entropy(F.linear(hidden, weight), ids, reduction="none")

    bound = bound_of(case)
    yield from forward_and_both(case, context, {"torch eager": eager}, make, (0, 2), (0, 1), bound)
    liger = context.liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if liger:

        def make_leaves(generator):
            hidden, ids, weight = make(generator)
            return hidden.requires_grad_(), ids, weight.requires_grad_()

        def both(hidden, ids, weight):
            with torch.enable_grad():
                total = liger.apply(hidden, weight, ids, None, None, -100, 0.0, 0.0, "sum")[0]
            return torch.autograd.grad(total, (hidden, weight))

        def check(inputs, out):
            hidden, ids, weight = inputs
            some = spread(rows, 2)
            leaf = hidden.detach()[some].double().requires_grad_()
            with torch.enable_grad():
                total = F.cross_entropy(F.linear(leaf, weight.detach().double()), ids[some], reduction="sum")
            return relative_error(out[0][some], torch.autograd.grad(total, leaf)[0])

        yield Peer("Liger fused", "both", make_leaves, both, check, bound)


def linear_kl(case, context):
    rows = case.dims(0)[0]
    loss = divergence(case.value)

    def make(generator):
        student, student_head = head(generator, case, 0, 1)
        teacher, teacher_head = head(generator, case, 2, 3)
        return student, teacher, student_head, teacher_head

    def of(loss):
        def call(student, teacher, student_head, teacher_head):
            return loss(F.linear(student, student_head), F.linear(teacher, teacher_head))

        return call

    functions = {"torch eager": of(loss)}
    if case.dtype != "f32":
        functions = {"torch eager, f32 inside": of(wide(loss)), **functions}
    bound = bound_of(case)
    yield from forward_and_both(case, context, functions, make, (0, 2), (0, 1), bound)
    value = case.value
    liger = context.liger("fused_linear_jsd", "LigerFusedLinearJSDFunction")
    if liger and value["direction"].name == "Jsd":

        def make_leaves(generator):
            student, teacher, student_head, teacher_head = make(generator)
            return student.requires_grad_(), teacher, student_head.requires_grad_(), teacher_head

        def both(student, teacher, student_head, teacher_head):
            beta, temperature = value["direction"]["beta"], value["temperature"]
            with torch.enable_grad():
                total = liger.apply(
                    student, student_head, teacher, teacher_head, None, beta, -100, temperature
                )
            return torch.autograd.grad(total, (student, student_head))

        def check(inputs, out):
            student, teacher, student_head, teacher_head = (t.detach() for t in inputs)
            some = spread(rows, 2)
            leaf = student[some].double().requires_grad_()
            with torch.enable_grad():
                total = of(loss)(leaf, teacher[some].double(), student_head.double(), teacher_head.double()).sum()
            # The library's is the mean over rows.
            return relative_error(out[0][some] * rows, torch.autograd.grad(total, leaf)[0])

        yield Peer("Liger fused", "both", make_leaves, both, check, bound)


HANDLERS = {
    "cross_entropy": cross_entropy,
    "cross_entropy_bwd": cross_entropy_backward,
    "hidden_mse": hidden_mse,
    "kl": kl,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_kl": linear_kl,
}
