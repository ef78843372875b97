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
"""`identity` (no curvature) and `exact` (dense, for tests and tiny models)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UnsupportedError
from ..gradients.rows import as_rows
from ..gradients.task import CausalLMTask, task_labels
from .eigen import eigh
from .flow import Flow, decayed, forced, integral
from .sample import FisherSample


Vectors = dict[str, torch.Tensor]


class IdentityCurvature:
    """No curvature, `H = 0`: preconditioned gradient dot products summed along training, with weight decay.

    TracIn-like: Pruthi et al. 2020, arXiv 2002.08484.
    """

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample | None = None) -> tuple[Vectors, Vectors]:
        """`x = P (1 - exp(-s l)) / l q` and `q' = exp(-s l) q`; see `JointCurvature.propagate`."""
        scoring, carried = {}, {}
        for name, q in vectors.items():
            decay = flow.decay[name].to(q)
            carried[name] = q * decayed(decay, flow.length)
            if flow.trains(name):
                scoring[name] = flow.preconditioner[name].apply(q * integral(decay, flow.length))
        return scoring, carried


@dataclass
class ExactCurvature:
    """Dense curvature over all parameters at once, in float64. Cost: `p^2` memory, `p^3` time.

    Attributes:
        hessian: gives `H [p, p]` of the mean-over-items objective from the sample, parameters in the order of the
            vectors; by default the Gauss-Newton matrix of the sample's rows, with no label sampling.
        max_parameters: refuse larger models.
    """

    hessian: Callable[[FisherSample, list[str]], torch.Tensor] | None = None
    max_parameters: int = 8192

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment; see `JointCurvature.propagate`.

        On the trained parameters `z = P^{1/2} q` obeys `dz/dt = -A z` with the symmetric
        `A = P^{1/2} H P^{1/2} + Lambda`; the others are driven by them.

        Raises:
            UnsupportedError: if the model has more than `max_parameters` parameters.
        """
        names = list(vectors)
        total = sum(vectors[name][0].numel() for name in names)
        if total > self.max_parameters:
            raise UnsupportedError(
                f"curvature='exact' needs a dense {total} x {total} matrix; use curvature='joint', which scales."
            )
        hessian = (self.hessian or gauss_newton)(sample, names).double()
        q = flatten(vectors)
        decay = _flat_constants(flow.decay, vectors)
        on = torch.cat([_entries(flow.preconditioner[name].moves(v.shape[1:]), v) for name, v in vectors.items()])

        def whitened(rows: torch.Tensor, how: str = "root") -> torch.Tensor:
            parts = unflatten(rows, vectors, torch.float64).items()
            return flatten({name: getattr(flow.preconditioner[name], how)(part) for name, part in parts})

        def embedded(rows: torch.Tensor) -> torch.Tensor:
            return rows.new_zeros(len(rows), total).index_copy_(1, on.nonzero().flatten(), rows)

        generator = whitened(whitened(hessian).T)[on][:, on] + torch.diag(decay[on])
        rates, modes = eigh(generator)
        start = whitened(q)[:, on] @ modes
        carried = q * decayed(decay, flow.length)
        scoring = whitened(embedded((start * integral(rates, flow.length)) @ modes.T))
        back = whitened(embedded((start * decayed(rates, flow.length)) @ modes.T), "inverse_root")
        carried[:, on] = back[:, on]
        for rate in decay[~on].unique():  # not moved by the segment: driven by the moved ones, decaying on their own
            here = ~on & (decay == rate)
            moved = whitened(embedded((start * forced(rates, float(rate), flow.length)) @ modes.T))
            carried[:, here] -= moved @ hessian[:, here]
        trained = [name for name in names if flow.trains(name)]
        scored = unflatten(scoring, vectors)
        return {name: scored[name] for name in trained}, unflatten(carried, vectors)


def gauss_newton(sample: FisherSample, names: list[str]) -> torch.Tensor:
    """Generalised Gauss-Newton matrix of the mean-over-items loss on the sample's rows, float64 `[p, p]`.

    `H = 1/N sum over items of J^T (diag(p) - p p^T) J`, with `J` the Jacobian of the item's logits.
    """
    gradients = sample.gradients
    parameters = [gradients.parameters[name] for name in names]
    if not isinstance(gradients.task, CausalLMTask):
        return _gauss_newton_by_rows(sample, parameters)
    total = sum(parameter.numel() for parameter in parameters)
    result, items = torch.zeros(total, total, dtype=torch.float64), 0
    for batch in sample.visit():
        with gradients._requiring_grad(parameters), torch.enable_grad():
            outputs = gradients.task.forward(gradients.model, batch)
            logits, targets = gradients.task.predictions(outputs, batch["labels"])
            logits = logits[targets != -100]  # (items, vocabulary)
            for item in logits:
                basis = torch.eye(len(item), dtype=item.dtype)
                columns = torch.autograd.grad(
                    item, parameters, basis, is_grads_batched=True, retain_graph=True, allow_unused=True
                )
                # `None` is a parameter with no part in the logits (`materialize_grads` would give it one row only).
                jacobian = torch.cat(
                    [
                        item.new_zeros(len(item), parameter.numel()) if column is None else as_rows(column)
                        for parameter, column in zip(parameters, columns, strict=True)
                    ],
                    dim=1,
                ).double()
                p = item.detach().double().softmax(dim=0)
                result += jacobian.T @ ((torch.diag(p) - p[:, None] * p) @ jacobian)
        items += len(logits)
    return result * (sample.objective_scale / items)


def _gauss_newton_by_rows(sample: FisherSample, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """`H = 1/N sum over rows of J^T (Hessian of the row's loss in its predictions) J`, for any task."""
    gradients = sample.gradients
    total = sum(parameter.numel() for parameter in parameters)
    result, items = torch.zeros(total, total, dtype=torch.float64), 0
    for batch in sample.visit():
        labels = task_labels(gradients.task, batch)
        items += int(gradients.task.num_items(labels).sum())
        for row in range(len(labels)):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            with gradients._requiring_grad(parameters), torch.enable_grad():
                outputs = gradients.task.forward(gradients.model, one)
                columns = torch.autograd.grad(
                    outputs,
                    parameters,
                    torch.eye(outputs.numel(), dtype=outputs.dtype).view(-1, *outputs.shape),
                    is_grads_batched=True,
                    allow_unused=True,
                )
            jacobian = torch.cat(
                [
                    outputs.new_zeros(outputs.numel(), parameter.numel()) if column is None else as_rows(column)
                    for parameter, column in zip(parameters, columns, strict=True)
                ],
                dim=1,
            ).double()
            own = labels[row : row + 1]
            curvature = torch.func.hessian(
                lambda given, own=own, shape=outputs.shape: gradients.task.row_losses(given.view(shape), own).sum()
            )(outputs.detach().double().flatten())
            result += jacobian.T @ curvature @ jacobian
    return result * (sample.objective_scale / items)


def flatten(vectors: Vectors) -> torch.Tensor:
    """Vectors as one float64 matrix `[vectors, p]`."""
    return torch.cat([as_rows(vector).double() for vector in vectors.values()], dim=1)


def unflatten(matrix: torch.Tensor, like: Vectors, dtype: torch.dtype | None = None) -> Vectors:
    """Inverse of `flatten`, with shapes of `like`, and its dtypes unless one is given."""
    parts = matrix.split([vector[0].numel() for vector in like.values()], dim=1)
    return {
        name: part.reshape(-1, *vector.shape[1:]).to(vector.device, dtype or vector.dtype)
        for (name, vector), part in zip(like.items(), parts, strict=True)
    }


def _flat_constants(constants, vectors: Vectors) -> torch.Tensor:
    return torch.cat([_entries(constants[name].double(), vector) for name, vector in vectors.items()])


def _entries(constant: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """A constant of a parameter by entry, flat."""
    return constant.expand(vector.shape[1:]).flatten()
