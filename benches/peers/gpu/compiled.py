"""torch.compile under a budget: each compilation takes from seconds to a minute of a machine that is lent by the minute."""

import time

import torch

from protocol import Skipped


class Compiler:
    def __init__(self, mode, budget_seconds):
        self.mode, self.left = mode, budget_seconds

    def __call__(self, function):
        """A compiled function whose first calls, which compile, are charged to the budget."""
        if self.mode == "none":
            raise Skipped("torch.compile is switched off")
        if self.left <= 0:
            raise Skipped("the time for torch.compile is spent")
        # One compilation per function and shape: a failed or recompiled one must not pass for another's result.
        torch._dynamo.reset()
        options = {} if self.mode == "default" else {"mode": self.mode}
        inner = torch.compile(function, dynamic=False, **options)
        calls = 0

        def charged(*arguments):
            nonlocal calls
            calls += 1
            if calls > 2:
                return inner(*arguments)
            begin = time.perf_counter()
            result = inner(*arguments)
            self.left -= time.perf_counter() - begin
            return result

        return charged
