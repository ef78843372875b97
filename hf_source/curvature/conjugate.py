# Copyright 2026 The hf_source team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`(H + lambda)^{-1} q` with the Gauss-Newton matrix of the rows themselves, by preconditioned conjugate gradient.

An inverse in closed form (`inverse.py`) is one of an approximate `H`: blocks, or the span of a sample. Here it only
preconditions; each iteration multiplies with the real `H = 1/N sum over rows of J^T (Hessian of the row's loss in its
outputs) J`, by differentiating backwards twice and once more, for many queries at once. So the error falls with every
iteration, in the norm of `H + lambda` (Hestenes & Stiefel 1952), from that of the closed form towards 0. That EK-FAC
preconditions well, and that the accuracy shows in attribution, is due to ASTRA (Wang et al. 2025, arXiv 2507.14740),
which sums a Neumann series over random batches instead.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ..budget import NotEnoughMemoryError, Parts, free_memory, is_out_of_memory, why_out_of_memory
from ..errors import UnsupportedError
from ..gradients.rows import RowGradients, as_rows
from ..gradients.task import Batch, RowLossTask, batch_rows, task_labels


Vectors = dict[str, torch.Tensor]


class GaussNewtonProducts:
    """`H v` for many vectors at once, with the generalised Gauss-Newton matrix of the mean loss per item.

    Args:
        gradients: engine at the weights in question. Fused attention has no second derivative: let it be eager.
        batches: the rows, as model inputs.
        memory_budget: bytes that the outputs' derivatives may take at once; decides how many vectors go together.
    """

    def __init__(self, gradients: RowGradients, batches: Sequence[Batch], memory_budget: int = 2**30) -> None:
        if isinstance(gradients.task, RowLossTask):  # smoothed cross-entropy has the curvature of the plain one
            gradients = gradients.with_task(gradients.task.unsmoothed())
        self.gradients = gradients
        self.batches = batches
        self.memory_budget = memory_budget
        self._parts = Parts()
        self.items = sum(int(gradients.task.num_items(task_labels(gradients.task, batch)).sum()) for batch in batches)

    def __call__(self, vectors: Vectors) -> Vectors:
        """Products.

        Args:
            vectors: name -> `[vectors, *parameter.shape]`; `H` is that of these parameters.

        Raises:
            UnsupportedError: if the model cannot be differentiated twice.
        """
        total = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        for batch in self.batches:
            add = partial(self._add, batch, vectors, total)
            for _ in self._parts(add, range(len(task_labels(self.gradients.task, batch)))):
                pass
        return {name: found / max(self.items, 1) for name, found in total.items()}

    def _add(self, batch: Batch, vectors: Vectors, total: Vectors, rows: range) -> None:
        """Add what some rows of a batch give; all of it, or nothing where memory runs out."""
        batch, gradients, task = batch_rows(batch, rows), self.gradients, self.gradients.task
        wanted, labels = [gradients.parameters[name] for name in vectors], task_labels(task, batch)
        with gradients._requiring_grad(wanted), torch.enable_grad(), _twice():
            outputs = task.forward(gradients.model, batch)
            # Linear in the probe: its derivative towards the probe is the Jacobian, forwards.
            probe = torch.zeros_like(outputs, requires_grad=True)
            found = torch.autograd.grad(outputs, wanted, probe, create_graph=True, allow_unused=True)
            used = {name: part for name, part in zip(vectors, found, strict=True) if part is not None}
            leaf = outputs.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(task.row_losses(leaf, labels).sum(), leaf, create_graph=True)
            if not used or not slope.requires_grad:  # a loss that is linear in the outputs has no curvature
                return
            step = max(1, self.memory_budget // (16 * outputs.numel() * outputs.element_size()))

            def moved(some: slice) -> tuple[torch.Tensor, ...]:
                batched = {"is_grads_batched": True, "retain_graph": True}
                given = [vectors[name][some] for name in used]
                (along,) = torch.autograd.grad(list(used.values()), probe, given, **batched)
                (pulled,) = torch.autograd.grad(slope, leaf, along, **batched)
                return torch.autograd.grad(outputs, [gradients.parameters[name] for name in used], pulled, **batched)

            start, count = 0, len(next(iter(vectors.values())))
            while start < count:
                some, why = slice(start, start + step), None
                try:
                    back = moved(some)
                except RuntimeError as error:
                    why = why_out_of_memory(error)
                    if why is None or (step == 1 and start == 0):  # fewer rows may do, and nothing was added
                        raise
                    if step == 1:
                        raise NotEnoughMemoryError(f"Out of memory ({why}): lower max_tokens_per_batch=.") from error
                if why is not None:
                    free_memory()
                    step = (step + 1) // 2
                    continue
                for name, part in zip(used, back, strict=True):
                    total[name][some] += part.detach()
                start = some.stop


@contextmanager
def _twice() -> Iterator[None]:
    """Say what to do where an operation has no second derivative."""
    try:
        yield
    except RuntimeError as error:  # torch's
        if is_out_of_memory(error):
            raise
        raise UnsupportedError(
            f"The model cannot be differentiated twice ({error}), which Gauss-Newton products need: use "
            "solver='direct'."
        ) from error


def conjugate_gradient(
    operator: Callable[[Vectors], Vectors],
    vectors: Vectors,
    precondition: Callable[[Vectors], Vectors],
    iterations: int,
    tolerance: float,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda items, description: items,
) -> tuple[Vectors, torch.Tensor]:
    """Solve `A x = q` for each query, `A` symmetric and positive definite; all queries go through `A` together.

    Args:
        operator: `A`.
        vectors: `q`, name -> `[queries, *parameter.shape]`.
        precondition: a symmetric, positive definite approximation of the inverse of `A`.
        iterations: products with `A` at most.
        tolerance: a query is done when `|q - A x| <= tolerance |q|`.
        progress: wraps the iterations with a description.

    Returns:
        `x`, and `|q - A x| / |q|` of each query, float64 `[queries]`.

    Raises:
        UnsupportedError: if `A` turns out to have a negative eigenvalue.
    """
    solution = {name: torch.zeros_like(q) for name, q in vectors.items()}
    residual = dict(vectors)
    size = _dots(vectors, vectors).sqrt()
    relative = (size > 0).double()
    direction = strength = None
    for _ in progress(range(iterations), "conjugate gradient"):
        active = (relative > tolerance).nonzero().flatten()
        if not len(active):
            break
        rest = {name: part[active.to(part.device)] for name, part in residual.items()}
        found = precondition(rest)
        now = torch.zeros_like(size).index_copy_(0, active, _dots(rest, found))
        if direction is None:
            direction = {name: torch.zeros_like(q) for name, q in vectors.items()}
            share = torch.zeros_like(size)
        else:
            share = now / strength.clamp_min(torch.finfo(size.dtype).tiny)
        strength = now
        for name, part in found.items():
            own = active.to(part.device)
            direction[name][own] = part + direction[name][own] * _wide(share[active], part)
        towards = {name: part[active.to(part.device)] for name, part in direction.items()}
        moved = operator(towards)
        curvature = _dots(towards, moved)
        if not bool((curvature > 0).all()):
            raise UnsupportedError(
                "The rows' loss is not convex in the model's outputs, so its curvature has negative directions that "
                "conjugate gradient cannot invert: use solver='direct', or a larger damping."
            )
        length = strength[active] / curvature
        for name, part in towards.items():
            own = active.to(part.device)
            solution[name][own] += part * _wide(length, part)
            residual[name] = residual[name].index_add(0, own, moved[name] * _wide(length, part), alpha=-1)
        relative = torch.where(size > 0, _dots(residual, residual).sqrt() / size, 0.0)
    return solution, relative


def _dots(first: Vectors, second: Vectors) -> torch.Tensor:
    """`<a_q, b_q>` of each query, float64 on the CPU."""
    return sum((as_rows(first[name]).double() * as_rows(second[name]).double()).sum(dim=1).cpu() for name in first)


def _wide(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per query, to multiply `[queries, *shape]` with."""
    return numbers.to(like).view(-1, *[1] * (like.dim() - 1))
