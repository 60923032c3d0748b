"""One process that draws, for each part of a joined batch, what the rank that owns the part draws."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stochastic_layers import codebooks

# the Python code of the library's own operators, to run it with the mode on
OPERATORS = {op._name: op._init_fn for op in (codebooks._initialize, codebooks._update)}


class JoinedNoise(TorchDispatchMode):
    """Inside, every random operation on a joined batch is made part by part, each from its own rank's stream.

    It knows the operations by torch's own mark of them, the tag ``nondeterministic_seeded``, and the batch by its
    size, which no other dimension may have. What does not depend on the batch is drawn by all ranks and taken from
    rank 0.

    Args:
        rows: Rows of the joined batch that belong to each rank, in order.
        seeds: The seed of each rank.
    """

    def __init__(self, rows, seeds):
        super().__init__()
        self.rows, self.total = list(rows), sum(rows)
        self.states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        self.split, self.shared = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "stochastic_layers":  # an operator of the library: look at the operations inside
            with self:
                return OPERATORS[func.name().split("::")[1].partition(".")[0]](*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not self._has_batch((args, kwargs)):
            self.shared.add(func.name())
            drawn = [self._draw(rank, func, args, kwargs) for rank in range(len(self.rows))]
            return drawn[0]
        self.split.add(func.name())
        parts = []
        for rank in range(len(self.rows)):
            own_args, own_kwargs = self._part((args, kwargs), rank)
            parts.append(self._draw(rank, func, own_args, own_kwargs))
        joined = torch.cat(parts, self._dim_of_parts(parts))
        return args[0].copy_(joined) if func.name().partition(".")[0].endswith("_") else joined

    def _draw(self, rank, func, args, kwargs):
        before = torch.get_rng_state()
        torch.set_rng_state(self.states[rank])
        result = func(*args, **kwargs)
        self.states[rank] = torch.get_rng_state()
        torch.set_rng_state(before)
        return result

    def _has_batch(self, value):
        if isinstance(value, torch.Tensor):
            return self.total in value.shape
        if isinstance(value, dict):
            return self._has_batch(list(value.values()))
        if isinstance(value, (list, tuple)):
            return any(v == self.total if isinstance(v, int) else self._has_batch(v) for v in value)
        return False

    def _part(self, value, rank):
        if isinstance(value, torch.Tensor) and self.total in value.shape:
            assert list(value.shape).count(self.total) == 1, value.shape
            # a tensor of its own, laid out as on the rank: draws depend on the order in memory
            return value.split(self.rows, list(value.shape).index(self.total))[rank].clone(
                memory_format=torch.contiguous_format
            )
        if isinstance(value, dict):
            return {k: self._part(v, rank) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            mapped = [
                self.rows[rank]
                if isinstance(v, int) and not isinstance(v, bool) and v == self.total
                else self._part(v, rank)
                for v in value
            ]
            return type(value)(mapped)
        return value

    def _dim_of_parts(self, parts):
        # equal parts differ in no dimension: then it is the one of their size
        differing = [d for d in range(parts[0].dim()) if [p.shape[d] for p in parts] == self.rows]
        assert len(differing) == 1, ([p.shape for p in parts], self.rows)
        return differing[0]
