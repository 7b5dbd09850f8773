"""Peers of compressed layers: 2:4 weights, int8 and int4 weights, experts."""

import torch
import torch.nn.functional as F

from products import bound_of, normal, sampled_product
from protocol import DTYPES, Peer, relative_error, spread
from rows import uniform


def masked(generator, dims, dtype):
    """Random weights of which two in every four along a row are kept."""
    weight = normal(generator, dims, dtype) if dtype != "i8" else integers(generator, dims)
    scores = torch.rand([dims[0], dims[1] // 4, 4], generator=generator, device=generator.device)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2, dim=-1).indices, True)
    return weight * kept.view(dims)


def integers(generator, dims):
    return torch.randint(-127, 128, dims, generator=generator, device=generator.device, dtype=torch.int8)


def search(compressed, dense, **options):
    """cuSPARSELt's own search for its fastest algorithm; once per shape, as a program would."""
    return torch._cslt_sparse_mm_search(compressed, dense, **options)


def sparse_matmul(case, context):
    (tokens, k), (rows, _) = case.dims(0), case.dims(1)

    def make_dense(generator):
        return normal(generator, [tokens, k], case.dtype), masked(generator, [rows, k], case.dtype)

    def check_dense(inputs, out):
        return sampled_product(inputs[0], inputs[1].mT, out)

    bound = bound_of(case)
    # What 2:4 must beat: the same product with its zeros.
    yield Peer("dense torch.matmul", "forward", make_dense, lambda x, w: torch.matmul(x, w.mT), check_dense, bound)
    if not context.bench.cuda:
        return
    found = {}

    def make(generator):
        x, weight = make_dense(generator)
        compressed = torch._cslt_compress(weight)
        if "algorithm" not in found:
            found["algorithm"] = search(compressed, x.mT)
        return x, weight, compressed

    def call_of(searched):
        def call(x, weight, compressed):
            # The weight is the left operand; its library gives [rows, tokens].
            return torch._cslt_sparse_mm(compressed, x.mT, alg_id=found["algorithm"] if searched else 0)

        return call

    def check(inputs, out):
        return sampled_product(inputs[1], inputs[0].mT, out)

    yield Peer("cuSPARSELt, searched", "forward", make, call_of(True), check, bound)
    yield Peer("cuSPARSELt", "forward", make, call_of(False), check, bound)


def sparse_int8(case, context):
    (tokens, k), (rows, _) = case.dims(0), case.dims(2)
    yield from int8_peers(case, context, tokens, rows, k, sparse=True)


def matmul_int8(case, context):
    (tokens, k), (rows, _) = case.dims(0), case.dims(2)
    yield from int8_peers(case, context, tokens, rows, k, sparse=False)


def int8_peers(case, context, tokens, rows, k, sparse):
    def make(generator):
        weight = masked(generator, [rows, k], "i8") if sparse else integers(generator, [rows, k])
        return (
            integers(generator, [tokens, k]),
            uniform(generator, [tokens], 1e-3, 2e-2),
            weight,
            uniform(generator, [rows], 1e-3, 2e-2),
        )

    def check_sums(inputs, out):
        return sampled_product(inputs[0], inputs[2].mT, out)

    def check(inputs, out):
        x, x_scales, weight, weight_scales = inputs[:4]
        some, others = spread(tokens, 48), spread(rows, 48)
        want = x[some].double() @ weight[others].double().mT
        want = want * x_scales[some].double()[:, None] * weight_scales[others].double()[None]
        return relative_error(out[some][:, others], want)

    def product(x, x_scales, weight, weight_scales):
        return torch._int_mm(x, weight.mT)

    def scaled(x, x_scales, weight, weight_scales):
        sums = torch._int_mm(x, weight.mT)
        return sums.float() * x_scales[:, None] * weight_scales[None]

    prefix = "dense " if sparse else ""
    yield Peer(f"{prefix}torch._int_mm, int32 sums only", "forward", make, product, check_sums, 0.0)
    yield Peer(f"{prefix}torch._int_mm and scales", "forward", make, scaled, check, 1e-6)
    yield from context.compiled(f"{prefix}torch.compile _int_mm and scales", "forward", make, scaled, check, 1e-6)
    if not sparse or not context.bench.cuda:
        return
    found = {}

    def make_compressed(generator):
        x, x_scales, weight, weight_scales = make(generator)
        compressed = torch._cslt_compress(weight)
        if "algorithm" not in found:
            found["algorithm"] = search(compressed, x.mT, out_dtype=torch.int32)
        return x, x_scales, weight, weight_scales, compressed

    def call(x, x_scales, weight, weight_scales, compressed):
        return torch._cslt_sparse_mm(compressed, x.mT, out_dtype=torch.int32, alg_id=found["algorithm"])

    def check_transposed(inputs, out):
        return sampled_product(inputs[2], inputs[0].mT, out)

    yield Peer("cuSPARSELt int8, searched, int32 sums only", "forward", make_compressed, call, check_transposed, 0.0)


def mask_rows(case, context):
    dims = case.dims(0)

    def make(generator):
        return (normal(generator, dims, case.dtype),)

    def eager(weight):
        groups = weight.view(dims[0], -1, 4)
        return torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, dim=-1).indices, 1.0).view(dims)

    def check(inputs, out):
        # Ties may fall either way: what is kept must weigh the same, and be two in four.
        some = spread(dims[0], 40)
        kept = (inputs[0][some].double().abs() * out[some].double()).view(len(some), -1, 4).sum(-1)
        largest = inputs[0][some].double().abs().view(len(some), -1, 4).topk(2, dim=-1).values.sum(-1)
        return relative_error([kept, out[some].view(len(some), -1, 4).sum(-1)], [largest, torch.full_like(largest, 2.0)])

    yield Peer("torch topk and scatter", "forward", make, eager, check, 0.0)


def compress(case, context):
    dims = case.dims(0)
    if case.dtype not in ("bf16", "f16") or not context.bench.cuda:
        return

    def make(generator):
        return masked(generator, dims, case.dtype), torch.eye(16, dims[1], device=generator.device).to(DTYPES[case.dtype])

    def check(inputs, out):
        # Opaque: it is right when it multiplies as the matrix does.
        weight, probe = inputs
        return sampled_product(weight, probe.mT, torch._cslt_sparse_mm(out, probe.mT.contiguous()))

    call = lambda weight, probe: torch._cslt_compress(weight)
    yield Peer("torch._cslt_compress", "forward", make, call, check, 1e-2)


def matmul_int4(case, context):
    (tokens, k), (rows, words) = case.dims(0), case.dims(1)
    group = case.value["group"]

    def make(generator):
        levels = torch.randint(0, 16, (rows, k), generator=generator, device=generator.device, dtype=torch.int32)
        scales = uniform(generator, [rows, k // group], 1e-3, 2e-2, case.dtype)
        dense = (levels - 8).view(rows, -1, group) * scales[..., None]
        return normal(generator, [tokens, k], case.dtype), levels, scales, dense.view(rows, k).to(DTYPES[case.dtype])

    def check(inputs, out):
        x, levels, scales = inputs[:3]
        some, others = spread(tokens, 48), spread(rows, 48)
        dense = ((levels[others] - 8).view(len(others), -1, group) * scales[others][..., None].double()).view(-1, k)
        return relative_error(out[some][:, others], x[some].double() @ dense.mT)

    bound = bound_of(case)
    call = lambda x, levels, scales, dense: torch.matmul(x, dense.mT)
    yield Peer("dense torch.matmul", "forward", make, call, check, bound)
    if not context.bench.cuda or case.dtype != "bf16" or group not in (32, 64, 128, 256):
        return

    def make_packed(generator):
        x, levels, scales, _ = make(generator)
        # Two levels to a byte, the even column in the high half.
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(pairs, 8)
        both = torch.stack([scales.mT, torch.zeros_like(scales.mT)], dim=-1).contiguous()
        return x, levels, scales, packed, both

    call = lambda x, levels, scales, packed, both: torch._weight_int4pack_mm(x, packed, group, both)
    yield Peer("torch._weight_int4pack_mm", "forward", make_packed, call, check, bound)


def route(generator, tokens, chosen, experts):
    """Slots sorted by expert and where each expert's end: some experts for each token, none of them twice."""
    scores = torch.rand([tokens, experts], generator=generator, device=generator.device)
    picked = scores.topk(chosen, dim=-1).indices.flatten()
    order = torch.sort(picked, stable=True).indices
    ends = torch.bincount(picked, minlength=experts).cumsum(0)
    return order, ends


def grouped(case, context):
    value = case.value
    if value["bias"] or value["relu"] or not value["gather"]:
        return
    (tokens, width), (experts, rows, _) = case.dims(0), case.dims(1)
    chosen = value["k"]

    def make(generator):
        order, ends = route(generator, tokens, chosen, experts)
        weight = normal(generator, [experts, rows, width], case.dtype)
        # The host knows the ends only in the loop, which is how such loops cheat; they are given to it.
        return normal(generator, [tokens, width], case.dtype), weight, order // chosen, ends.int(), ends.tolist()

    def call(x, weight, token, ends, _):
        return F.grouped_mm(x[token], weight.mT, offs=ends)

    def loop(x, weight, token, _, ends):
        sorted_rows, start, parts = x[token], 0, []
        for expert, end in enumerate(ends):
            if end > start:
                parts.append(sorted_rows[start:end] @ weight[expert].mT)
            start = end
        return torch.cat(parts)

    def check(inputs, out):
        x, weight, token, _, ends = inputs
        some = spread(len(token), 64)
        expert = torch.bucketize(torch.tensor(some), torch.tensor(ends), right=True).to(x.device)
        columns = spread(rows, 32)
        want = torch.einsum("rd,rnd->rn", x[token[some]].double(), weight[:, columns][expert].double())
        return relative_error(out[some][:, columns], want)

    bound = bound_of(case)
    yield Peer("gather and grouped_mm", "forward", make, call, check, bound)
    yield Peer("gather and a loop of torch.matmul", "forward", make, loop, check, bound)


def grouped_backward_input(case, context):
    (rows, inner), (experts, _, width) = case.dims(0), case.dims(1)

    def make(generator):
        ends = random_ends(generator, rows, experts)
        return normal(generator, [rows, inner], case.dtype), normal(generator, case.dims(1), case.dtype), ends

    def call(dz, weight, ends):
        return F.grouped_mm(dz, weight, offs=ends)

    def check(inputs, out):
        dz, weight, ends = inputs
        some, columns = spread(rows, 64), spread(width, 32)
        expert = torch.bucketize(torch.tensor(some, device=dz.device), ends, right=True)
        want = torch.einsum("rn,rnd->rd", dz[some].double(), weight[:, :, columns][expert].double())
        return relative_error(out[some][:, columns], want)

    yield Peer("grouped_mm", "backward", make, call, check, bound_of(case))


def grouped_backward_weight(case, context):
    (rows, inner), (tokens, width) = case.dims(0), case.dims(1)
    value = case.value
    experts, chosen = value["experts"], value["k"]
    if not value["gather"]:
        return

    def make(generator):
        order, ends = route(generator, tokens, chosen, experts)
        dz, x = normal(generator, [rows, inner], case.dtype), normal(generator, [tokens, width], case.dtype)
        return dz, x, order // chosen, ends.int()

    def call(dz, x, token, ends):
        return F.grouped_mm(dz.mT, x[token], offs=ends)

    def check(inputs, out):
        dz, x, token, ends = inputs
        expert = experts // 2
        first, last = int(ends[expert - 1]) if expert else 0, int(ends[expert])
        want = dz[first:last].double().mT @ x[token[first:last]].double()
        return relative_error(out[expert], want)

    yield Peer("gather and grouped_mm", "backward", make, call, check, bound_of(case))


def random_ends(generator, rows, experts):
    picked = torch.randint(0, experts, (rows,), generator=generator, device=generator.device)
    return torch.bincount(picked, minlength=experts).cumsum(0).int()


def gate(case, context):
    chosen = case.value["k"]

    def make(generator):
        return (normal(generator, case.dims(0), case.dtype),)

    def call(scores):
        return torch.topk(scores, chosen, dim=-1)

    def check(inputs, out):
        some = spread(inputs[0].shape[0], 40)
        want = inputs[0][some].double().sort(dim=-1, descending=True).values[:, :chosen]
        return relative_error([out[0][some], inputs[0][some].gather(1, out[1][some])], [want, want])

    yield Peer("torch.topk", "forward", make, call, check, 0.0)


def dispatch(case, context):
    experts = case.value["experts"]

    def make(generator):
        return (torch.randint(0, experts, case.dims(0), generator=generator, device=generator.device),)

    def call(indices):
        flat = indices.flatten()
        order = torch.sort(flat, stable=True).indices
        return order, F.pad(torch.bincount(flat, minlength=experts).cumsum(0), (1, 0))

    def search(indices):
        ordered, order = torch.sort(indices.flatten(), stable=True)
        return order, torch.searchsorted(ordered, torch.arange(experts + 1, device=ordered.device))

    def check(inputs, out):
        flat = inputs[0].flatten().cpu()
        order = torch.sort(flat, stable=True).indices
        ends = F.pad(torch.bincount(flat, minlength=experts).cumsum(0), (1, 0))
        return relative_error([out[0].cpu(), out[1].cpu()], [order, ends])

    yield Peer("torch sort and bincount", "forward", make, call, check, 0.0)
    # Bincount waits for the device to learn its length; this does not.
    yield Peer("torch sort and searchsorted", "forward", make, search, check, 0.0)


def combine(case, context):
    value = case.value
    if not value["weighted"]:
        return
    rows, width = case.dims(0)
    chosen = value["k"]

    def make(generator):
        order = torch.randperm(rows, generator=generator, device=generator.device)
        weights = uniform(generator, [rows // chosen, chosen], 0.25, 1.25)
        return normal(generator, [rows, width], case.dtype), order, weights

    def call(y, order, weights):
        unsorted = torch.empty_like(y).index_copy_(0, order, y).view(-1, chosen, width)
        return (unsorted * weights.to(y.dtype)[..., None]).sum(1)

    def matrix(y, order, weights):
        unsorted = torch.empty_like(y).index_copy_(0, order, y).view(-1, chosen, width)
        return torch.bmm(weights.to(y.dtype)[:, None], unsorted)[:, 0]

    def check(inputs, out):
        y, order, weights = inputs
        some = spread(rows // chosen, 40)
        inverse = torch.argsort(order).view(-1, chosen)[some]
        want = (y[inverse].double() * weights[some].double()[..., None]).sum(1)
        return relative_error(out[some], want)

    bound = bound_of(case)
    yield Peer("torch index_copy and sum", "forward", make, call, check, bound)
    yield Peer("torch index_copy and bmm", "forward", make, matrix, check, bound)
    yield from context.compiled("torch.compile", "forward", make, call, check, bound)


HANDLERS = {
    "matmul_sparse24": sparse_matmul,
    "matmul_sparse24_int8": sparse_int8,
    "mask24_1d": mask_rows,
    "compress24": compress,
    "matmul_int8": matmul_int8,
    "matmul_int4": matmul_int4,
    "grouped_matmul": grouped,
    "grouped_matmul_bwd_input": grouped_backward_input,
    "grouped_matmul_bwd_weight": grouped_backward_weight,
    "moe_gate": gate,
    "moe_dispatch": dispatch,
    "moe_combine": combine,
}
