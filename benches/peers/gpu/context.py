"""What every peer needs: compiled variants, optional libraries, gradients through autograd."""

import importlib

import torch

from protocol import Peer, Skipped, relative_error, spread, tensors


class Context:
    def __init__(self, bench, compiler):
        self.bench, self.compiler = bench, compiler

    def liger(self, module, name):
        """A function of Liger, where it is installed and has it."""
        if not self.bench.cuda:
            return None
        try:
            return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
        except (ImportError, AttributeError):
            return None

    def compiled(self, kernel, mode, make, call, check, bound, in_place=False):
        try:
            call = self.compiler(call)
        except Skipped as reason:
            yield Peer(kernel, mode, make, _raise(reason), check, bound)
            return
        yield Peer(kernel, mode, make, call, check, bound, in_place)

    def gradients(self, case, functions, make, wanted, rows, bound, modes=("backward",), compiled=True):
        """Peers of a backward pass: of the pass alone, or ("both") of forward and backward in one go.

        `functions` are forward functions by name, all of the same inputs; `wanted` are the inputs that get gradients;
        `rows` those of which each row of the result depends on the same rows of `rows` alone, so that some rows' gradients
        can be computed again in float64.
        """
        names = [(name, function, False) for name, function in functions.items()]
        if compiled:
            first = next(iter(functions.values()))
            names.append(("torch.compile", first, True))
        for name, function, compile_it in names:
            if compile_it:
                try:
                    function = self.compiler(function)
                except Skipped as reason:
                    for mode in modes:
                        yield Peer(name, mode, make, _raise(reason), lambda *_: 1.0, bound)
                    continue
            for mode in modes:
                yield self._gradient(next(iter(functions.values())), name, function, mode, make, wanted, rows, bound)

    def _gradient(self, plain, name, function, mode, make, wanted, rows, bound):
        def leaves(inputs):
            return tuple(
                t.detach().requires_grad_(i in wanted) if t.is_floating_point() else t for i, t in enumerate(inputs)
            )

        def make_backward(generator):
            inputs = leaves(make(generator))
            with torch.enable_grad():
                out = function(*inputs)
            upstream = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
            return inputs, out, upstream

        def make_both(generator):
            inputs = leaves(make(generator))
            with torch.no_grad():
                shape = function(*inputs)
            upstream = torch.randn(shape.shape, generator=generator, device=shape.device, dtype=shape.dtype)
            return inputs, upstream

        def backward(inputs, out, upstream):
            return torch.autograd.grad(out, [inputs[i] for i in wanted], upstream, retain_graph=True)

        def both(inputs, upstream):
            with torch.enable_grad():
                out = function(*inputs)
            return torch.autograd.grad(out, [inputs[i] for i in wanted], upstream)

        def check(slot, grads):
            """The gradient of the first of `rows`, on some rows; of everything where everything is small."""
            inputs, upstream = slot[0], slot[-1]
            extent = inputs[rows[0]].shape[0]
            small = sum(t.numel() for t in tensors(inputs)) < 1 << 22
            some = spread(extent, extent if small else 4)
            cut = tuple(
                (t[some] if i in rows else t).detach().to(torch.float64 if t.is_floating_point() else t.dtype)
                for i, t in enumerate(inputs)
            )
            cut = tuple(t.requires_grad_(i in wanted) if t.is_floating_point() else t for i, t in enumerate(cut))
            seed = upstream[some] if upstream.dim() and upstream.shape[0] == extent else upstream
            with torch.enable_grad():
                out = plain(*cut)
            targets = [i for i in wanted if small or i in rows]
            want = torch.autograd.grad(out, [cut[i] for i in targets], seed.double())
            got = [grads[wanted.index(i)] for i in targets]
            got = [g[some] if i in rows else g for g, i in zip(got, targets)]
            return max(relative_error(g, w) for g, w in zip(got, want))

        if mode == "backward":
            return Peer(name, mode, make_backward, backward, check, bound)
        return Peer(name, mode, make_both, both, check, bound)


def _raise(reason):
    def call(*_):
        raise reason

    return call
