"""Whole models in PyTorch, as its users write them. Their weights have the cases' names."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from server import Work


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        rows, length, width = x.shape
        by_heads = lambda layer: layer(x).view(rows, length, self.heads, -1).transpose(1, 2)
        q, k, v = by_heads(self.query), by_heads(self.key), by_heads(self.value)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(y.transpose(1, 2).reshape(rows, length, width))


class Ffn(nn.ModuleDict):
    def __init__(self, width, inner):
        super().__init__({"in": nn.Linear(width, inner), "out": nn.Linear(inner, width)})

    def forward(self, x):
        return self["out"](F.gelu(self["in"](x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads, causal=True), Ffn(width, inner)

    def forward(self, x):
        x = x + self.attention(self.norm_attention(x))
        return x + self.ffn(self.norm_ffn(x))


class Gpt(nn.Module):
    """A decoder with learned positions, whose head is its embedding."""

    def __init__(self, dims, heads):
        super().__init__()
        (vocabulary, width), (positions, _) = dims["embedding.tokens"], dims["embedding.positions"]
        inner = dims["blocks.0.ffn.in.weight"][0]
        tables = {"tokens": nn.Embedding(vocabulary, width), "positions": nn.Embedding(positions, width)}
        self.embedding = nn.ModuleDict(tables)
        count = sum(name.endswith("ffn.in.weight") for name in dims)
        self.blocks = nn.ModuleList(Block(width, inner, heads) for _ in range(count))
        self.norm_final = nn.LayerNorm(width)

    def forward(self, tokens, targets):
        x = self.embedding["tokens"](tokens) + self.embedding["positions"](torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm_final(x), self.embedding["tokens"].weight)
        return F.cross_entropy(logits.flatten(0, 1), targets)


class Training:
    """A model with its optimizer and a batch, before its first step."""

    def __init__(self, model, value, weights, batch):
        plain = lambda name: name.removesuffix(".weight")
        own = {plain(name): parameter for name, parameter in model.named_parameters()}
        self.model, self.parameters = model, [own[plain(name)] for name in weights]
        by_decay = [[p for p in self.parameters if (p.ndim > 1) == decays] for decays in (True, False)]
        groups = [{"params": by_decay[0], "weight_decay": value["decay"]}, {"params": by_decay[1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=value["rate"], eps=value["epsilon"], fused=True)
        for parameter in self.parameters:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter].update(step=torch.tensor(0.0), **moments)
        self.load(weights.values(), batch)

    def load(self, weights, batch):
        """Other weights in the same memory, fresh moments, another batch."""
        self.batch = batch
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
                for tensor in self.optimizer.state[parameter].values():
                    tensor.zero_()


class TrainingStep(Work):
    def __init__(self, case, value, tensor):
        self.case, self.value, self.tensor = case, value, tensor
        self.outputs = tuple(range(len(case["outputs"])))
        self.narrow = value["compute"].name == "bf16"
        self.kernel = "nn.Module, autograd, fused AdamW" + (", bf16 autocast" if self.narrow else "")

    def prepare(self, arrays):
        metas = self.case["inputs"]
        named = {meta["name"]: self.tensor(a, meta["dtype"]) for a, meta in zip(arrays, metas, strict=True)}
        batch = named.pop("tokens"), named.pop("targets")
        model = Gpt({meta["name"]: meta["dims"] for meta in metas}, self.value["heads"])
        return (Training(model, self.value, named, batch),)

    def overwrite(self, old, new):
        old.load(new.parameters, new.batch)

    def call(self, training):
        training.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.narrow):
            loss = training.model(*training.batch)
        loss.backward()
        training.optimizer.step()
        return loss.detach(), training.parameters

    def poison(self, results):
        loss, parameters = results
        with torch.no_grad():
            for tensor in (loss, *parameters):
                tensor.fill_(float("nan"))

    def arrays(self, results):
        loss, parameters = results
        return [tensor.detach().numpy() for tensor in (loss.reshape(1), *parameters)]
