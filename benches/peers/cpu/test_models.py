"""References of whole models, and what they are judged by. `python3 -m unittest test_models`"""

import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]
sys.dont_write_bytecode = True

import numpy

import models
from case_list import parse_value
from references import bound_of, expected, judge

WIDTH, HEADS, VOCABULARY, ROWS, LENGTH = 8, 2, 11, 2, 5
LINEARS = {"attention.query": 1, "attention.key": 1, "attention.value": 1, "attention.output": 1, "ffn.in": 4, "ffn.out": -4}


def shapes():
    named = {"embedding.tokens": (VOCABULARY, WIDTH), "embedding.positions": (LENGTH, WIDTH)}
    for block in ("blocks.0", "blocks.1"):
        for norm in ("norm_attention", "norm_ffn"):
            named |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        for linear, factor in LINEARS.items():
            rows, columns = (WIDTH * factor, WIDTH) if factor > 0 else (WIDTH, -WIDTH * factor)
            named |= {f"{block}.{linear}.weight": (rows, columns), f"{block}.{linear}.bias": (rows,)}
    return named | {"norm_final.weight": (WIDTH,), "norm_final.bias": (WIDTH,)}


def draw():
    chance = numpy.random.default_rng(3)
    weights = {name: 0.3 * chance.standard_normal(shape) + ("norm" in name) for name, shape in shapes().items()}
    return weights, chance.integers(0, VOCABULARY, (ROWS, LENGTH)), chance.integers(0, VOCABULARY, ROWS * LENGTH)


def a_case():
    """A step as a contestant gets it, and its inputs."""
    weights, tokens, targets = draw()
    arrays = [*(w.astype(numpy.float32) for w in weights.values()), tokens.astype(numpy.uint32), targets.astype(numpy.uint32)]
    metas = [{"name": name, "dims": a.shape, "dtype": "f32"} for name, a in zip([*weights, "tokens", "targets"], arrays)]
    for meta in metas[-2:]:
        meta["dtype"] = "u32"
    params = f"Step{{heads:{HEADS},rate:0.01,epsilon:0.001,decay:0.1,compute:f32}} tiny"
    return {"op": "training_step", "params": params, "dtype": "f32", "inputs": metas}, arrays


class Models(unittest.TestCase):
    def test_gradients_are_slopes_of_the_loss(self):
        weights, tokens, targets = draw()
        _, gradients = models.loss_and_gradients(weights, tokens, targets, HEADS)
        chance, step = numpy.random.default_rng(5), 1e-5
        for name, weight in weights.items():
            along = chance.standard_normal(weight.shape)
            at = lambda t: models.loss_and_gradients({**weights, name: weight + t * along}, tokens, targets, HEADS)[0]
            slope = (at(step) - at(-step)) / (2 * step)
            self.assertAlmostEqual((gradients[name] * along).sum(), slope, delta=1e-7, msg=name)

    def judged(self, change):
        """What the judge says of weights that were changed by `change(name, wanted)`."""
        case, arrays = a_case()
        faults = []
        for index, want in enumerate(expected(case, arrays)[1:], start=1):
            if want is None:
                continue
            before = arrays[index - 1]
            got = (before + change(case["inputs"][index - 1]["name"], want)).astype(numpy.float32).reshape(-1)
            got = models.handed_in(case, index, got, lambda i: arrays[i])
            faults.append(judge(want, got, "f32", bound_of(case, "f32"), want.shape)[1])
        return faults

    def test_an_update_is_judged_by_what_it_changed(self):
        self.assertFalse(any(self.judged(lambda name, want: want)))
        self.assertTrue(all(self.judged(lambda name, want: 0.0 * want)))
        # What AdamW with a tiny epsilon would do: the gradient's size is lost.
        self.assertTrue(all(self.judged(lambda name, want: 0.01 * numpy.sign(want))))
        self.assertTrue(all(self.judged(lambda name, want: 1.001 * want)))

    def test_one_wrong_weight_is_found(self):
        wrong = lambda name, want: want * (0.99 if name == "blocks.1.ffn.in.bias" else 1.0)
        self.assertEqual(sum(fault is not None for fault in self.judged(wrong)), 1)

    def test_what_the_reference_does_not_know_has_to_be_there(self):
        reason = lambda got: judge(None, numpy.array(got, dtype=numpy.float32), "f32", 1e-4, [2, 2])[1]
        self.assertIsNone(reason([1.0, 2.0, 3.0, 4.0]))
        self.assertIn("not written", reason([1.0, 2.0, numpy.nan, 4.0]))
        self.assertIn("not written", reason([1.0, 2.0, numpy.inf, 4.0]))
        self.assertIn("3 elements where 4", reason([1.0, 2.0, 3.0]))
        # A training step's gradient of a key's bias is such an output.
        case, arrays = a_case()
        self.assertTrue(any(want is None for want in expected(case, arrays)))

    def test_integers_leave_what_rounding_leaves(self):
        weights, tokens, _ = draw()
        chance = numpy.random.default_rng(7)
        weights |= {"head.weight": chance.standard_normal((3, WIDTH)), "head.bias": chance.standard_normal(3)}
        inputs = {**weights, "tokens": tokens.astype(numpy.float64)}
        value = parse_value(f"Encoder{{heads:{HEADS}}}")
        by = lambda name, inputs: models.REFERENCES[name](value, dict(inputs))[0]
        away = lambda a, b: numpy.linalg.norm(a - b) / numpy.linalg.norm(b)
        exact, rounded = by("encoder", inputs), by("encoder_int8", inputs)
        self.assertTrue(1e-4 < away(rounded, exact) < 5e-2, away(rounded, exact))
        # A bound that rounding needs still tells whether all of the model ran.
        for sublayer in ("attention.output", "ffn.out"):
            less = {**inputs, f"blocks.1.{sublayer}.weight": 1e-9 * weights[f"blocks.1.{sublayer}.weight"]}
            self.assertGreater(away(by("encoder_int8", less), rounded), models.BOUND["encoder_int8"]["i8"])

    def test_both_ways_to_quantize_an_ffn_are_near_it(self):
        chance = numpy.random.default_rng(9)
        shapes = {"ffn.in.weight": (64, 16), "ffn.in.bias": 64, "ffn.out.weight": (16, 64), "ffn.out.bias": 16}
        weights = {f"blocks.0.{name}": chance.standard_normal(shape) for name, shape in shapes.items()}
        x, value = chance.standard_normal((8, 16)), parse_value("Ffn{activation:relu}")
        z = x @ weights["blocks.0.ffn.in.weight"].T + weights["blocks.0.ffn.in.bias"]
        want = numpy.maximum(z, 0.0) @ weights["blocks.0.ffn.out.weight"].T + weights["blocks.0.ffn.out.bias"]
        for name in ("ffn_int8", "ffn_one_range"):
            got = models.REFERENCES[name](value, {**weights, "x": x})[0]
            away = numpy.linalg.norm(got - want) / numpy.linalg.norm(want)
            self.assertTrue(1e-3 < away < 3e-2, f"{name}: {away}")


class Elements(unittest.TestCase):
    def test_a_large_one_among_many_small_is_rounded_as_what_it_is(self):
        """What a loss over a vocabulary sends back: next to nothing, but for the target."""
        want = numpy.zeros((2, 32000))
        want[:, 7] = -4.0
        said = lambda row, column, off: self.judged(want, row, column, off)
        self.assertIsNone(said(1, 7, 2e-5))
        self.assertIsNotNone(said(1, 7, 4e-3))
        self.assertIn("off by", said(1, 8, 2e-5))

    def judged(self, want, row, column, off):
        got = want.astype(numpy.float32)
        got[row, column] += off
        return judge(want, got, "f32", 1e-5, want.shape)[1]


if __name__ == "__main__":
    unittest.main()
