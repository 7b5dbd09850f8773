"""Peers of attention: scaled_dot_product_attention as it picks itself, and with each backend forced."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from products import bound_of, normal
from protocol import Peer, relative_error, spread

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def parameters(case):
    value = case.value
    return value.arguments[0] if value.arguments else value


def visible(value, batch, queries, keys, lengths, device):
    """Which keys each query sees, [B, 1, T, S] or smaller; None for all."""
    masks = []
    offset = value["query_offset"]
    if value["mask"].name == "Causal":
        positions = torch.arange(queries, device=device)[:, None] + offset
        masks.append((torch.arange(keys, device=device)[None, :] <= positions)[None, None])
    if lengths is not None:
        masks.append((torch.arange(keys, device=device)[None, :] < lengths[:, None])[:, None, None, :])
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def reference_rows(value, q, k, v, mask, b, h, rows):
    """Probabilities and results of some queries of one head in float64; operands are [B, H, N, D]."""
    scores = (q[b, h, rows].double() @ k[b, h].double().mT) * value["scale"]
    if mask is not None:
        whole = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
        scores = scores.masked_fill(~whole[b, 0, rows], float("-inf"))
    p = torch.softmax(scores, dim=-1)
    return p, p @ v[b, h].double()


def setup(case, context):
    value = parameters(case)
    if value["mask"].name == "Prefix" or value["bias"]:
        return None
    (batch, queries, heads, dim), keys = case.dims(0), case.dims(1)[1]
    square = value["mask"].name == "Causal" and queries == keys and not value["lengths"] and value["query_offset"] == 0

    def make(generator):
        # The same memory as the other side's, [B, N, H, D], seen as [B, H, N, D].
        q, k, v = (normal(generator, t["dims"], t["dtype"]).transpose(1, 2) for t in case.inputs[:3])
        lengths = None
        if value["lengths"]:
            lengths = torch.randint(max(keys // 2, 1), keys + 1, (batch,), generator=generator, device=generator.device)
        mask = None if square else visible(value, batch, queries, keys, lengths, generator.device)
        return q, k, v, mask

    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=value["scale"])

    def forced(backend):
        def call(q, k, v, mask):
            with sdpa_kernel(backend):
                return attend(q, k, v, mask)

        return call

    variants = {"SDPA default": attend}
    if context.bench.cuda:
        variants.update({f"SDPA {name}": forced(backend) for name, backend in BACKENDS.items()})

    def full_mask(q, k, mask):
        return visible(value, batch, queries, keys, None, q.device) if square else mask

    return value, make, variants, full_mask


def attention(case, context):
    prepared = setup(case, context)
    if prepared is None:
        return
    value, make, variants, full_mask = prepared

    def check(inputs, out):
        q, k, v, mask = inputs
        mask = full_mask(q, k, mask)
        got, want = [], []
        for b in {0, q.shape[0] - 1}:
            for h in {0, q.shape[1] - 1}:
                rows = spread(q.shape[2], 6)
                got.append(out[b, h, rows])
                want.append(reference_rows(value, q, k, v, mask, b, h, rows)[1])
        return relative_error(got, want)

    for name, call in variants.items():
        yield Peer(name, "forward", make, call, check, bound_of(case))


def attention_backward(case, context):
    prepared = setup(case, context)
    if prepared is None:
        return
    value, make, variants, full_mask = prepared

    def check(slot, grads):
        (q, k, v, mask), _, dy = slot
        mask, scale = full_mask(q, k, mask), value["scale"]
        b, h = q.shape[0] - 1, q.shape[1] - 1
        rows = spread(q.shape[2], 6)
        p, y = reference_rows(value, q, k, v, mask, b, h, rows)
        upstream = dy[b, h, rows].double()
        ds = p * (upstream @ v[b, h].double().mT - (upstream * y).sum(-1, keepdim=True))
        errors = [relative_error(grads[0][b, h, rows], scale * ds @ k[b, h].double())]
        # Keys' and values' gradients need every query: where one head's scores fit.
        if q.shape[2] * k.shape[2] <= 1 << 25:
            rows = list(range(q.shape[2]))
            p, y = reference_rows(value, q, k, v, mask, b, h, rows)
            upstream = dy[b, h].double()
            ds = p * (upstream @ v[b, h].double().mT - (upstream * y).sum(-1, keepdim=True))
            errors.append(relative_error(grads[1][b, h], scale * ds.mT @ q[b, h].double()))
            errors.append(relative_error(grads[2][b, h], p.mT @ upstream))
        return max(errors)

    for name, call in variants.items():

        def make_backward(generator, call=call):
            q, k, v, mask = make(generator)
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            with torch.enable_grad():
                out = call(q, k, v, mask)
            upstream = torch.randn(
                out.transpose(1, 2).shape, generator=generator, device=out.device, dtype=out.dtype
            ).transpose(1, 2)
            return (q, k, v, mask), out, upstream

        def backward(inputs, out, upstream):
            return torch.autograd.grad(out, inputs[:3], upstream, retain_graph=True)

        # P and dS are rounded to the storage type on the way.
        yield Peer(name, "backward", make_backward, backward, check, 2 * bound_of(case))


HANDLERS = {"attention": attention, "attention_bwd": attention_backward}
