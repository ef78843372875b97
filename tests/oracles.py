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
"""Tiny models and dense references for the tests of the mathematics.

Everything here is written from the definitions, on purpose without looking at how the library does it: one row at a
time, one token at a time, dense float64 matrices, matrix exponentials, explicit enumeration of labels. Nothing of
`hf_source` is imported. `p` is the number of parameters asked for, in the order of `names`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


VOCAB = 12
MAX_TOKENS = 8
IGNORE = -100


# ------------------------------------------------------------------------------------------------------------ models


def gpt2(hidden: int = 8) -> nn.Module:
    """Conv1D, LayerNorm, biases, a head tied to the embedding, and position embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=MAX_TOKENS, n_embd=hidden, n_layer=1, n_head=2, n_inner=hidden + 2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return _excited(GPT2LMHeadModel(config))


def llama(hidden: int = 8, tied: bool = False) -> nn.Module:
    """Linear without bias, RMSNorm, rotary positions, grouped key-value heads."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=MAX_TOKENS, hidden_size=hidden, intermediate_size=hidden + 2,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _excited(LlamaForCausalLM(config))


def lora_gpt2(hidden: int = 8) -> nn.Module:
    """GPT-2 under PEFT: frozen base weights and low-rank adapters whose `B` is not zero."""
    return with_adapters(gpt2(hidden))


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA pairs on every projection of a GPT-2."""
    torch.manual_seed(2)
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        # PEFT still reads a property that transformers has deprecated; not ours to mend.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).double().eval()


class ExponentialRMSNorm(nn.Module):
    """Named like a norm, but not affine in its weight: the rule for norms is wrong for it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.exp() * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


class Odd(nn.Module):
    """A language model full of what per-module rules do not see. `ODD_FALLBACK` names the parameters concerned."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, hidden, padding_idx=0)
        self.scale = nn.Parameter(torch.ones(hidden))  # a bare parameter
        self.gain = nn.Parameter(torch.ones(()))  # a bare scalar
        self.twice = nn.Linear(hidden, hidden)  # called two times
        self.borrowed = nn.Linear(hidden, hidden)  # never called: its weight is used by itself
        self.both = nn.Linear(hidden, hidden)  # called, and its weight is used by itself as well
        self.sideways = nn.Linear(hidden, hidden)  # called on [tokens, rows, hidden]
        self.exponential_norm = ExponentialRMSNorm(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.convolution = nn.Conv1d(hidden, hidden, 2)  # channels first
        self.idle = nn.Linear(hidden, hidden)  # no part in the loss
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.tokens(input_ids) * self.scale
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        x = x + self.twice(torch.tanh(x.cumsum(dim=1) / count))  # (rows, tokens, hidden); causal mixing
        x = x + self.twice(torch.tanh(x)) + torch.tanh(F.linear(x, self.borrowed.weight))
        x = x + self.both(torch.tanh(x)) + F.linear(self.norm(x), self.both.weight)
        x = x + self.sideways(torch.tanh(x).transpose(0, 1)).transpose(0, 1)
        x = self.exponential_norm(x) * self.gain
        x = x + self.convolution(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
        return SimpleNamespace(logits=self.head(x))


ODD_FALLBACK = {"scale", "gain", "borrowed.weight", "both.weight", "sideways.weight", "sideways.bias"}


def odd(hidden: int = 6) -> nn.Module:
    torch.manual_seed(3)
    return _excited(Odd(hidden))


class Bigram(nn.Module):
    """`logits = table[token]`: convex, and its Gauss-Newton matrix is its Hessian."""

    def __init__(self, vocabulary: int = 5) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.table(input_ids))


def bigram() -> nn.Module:
    torch.manual_seed(4)
    return Bigram().double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "lora-gpt2": lora_gpt2,
    "odd": odd,
}

# Small enough for matrix exponentials of twice the number of parameters.
SMALL_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: gpt2(4),
    "llama": lambda: llama(4),
    "lora-gpt2": lambda: lora_gpt2(4),
    "odd": lambda: odd(3),
}


def _excited(model: nn.Module) -> nn.Module:
    """Far from initialisation, whose zero biases, unit scales and uniform predictions would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def all_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def make_batch(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCAB, masked: bool = True) -> dict:
    """Rows of the given lengths, padded on the right; with `masked`, some labels in the middle are not asked."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "labels": torch.full((len(lengths), width), IGNORE),
    }
    for row, length in enumerate(lengths):
        # Token 0 is the padding id; it also appears inside rows, where it is a token like any other.
        tokens = torch.randint(0, vocabulary, (length,), generator=generator)
        batch["input_ids"][row, :length] = tokens
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = tokens
        if masked:
            batch["labels"][row, 1 : row % 3] = IGNORE
    return batch


LENGTHS = (5, 8, 3, 6, 4, 8, 7, 2)


def row_of(batch: Mapping[str, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of one row, `[tokens]`, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return batch["input_ids"][row, :length], batch["labels"][row, :length]


# --------------------------------------------------------------------------------------------- losses and gradients


def items_of(labels: torch.Tensor) -> list[int]:
    """Positions whose label is a loss item: the first token has no prediction."""
    return [t for t in range(1, len(labels)) if int(labels[t]) != IGNORE]


def row_loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of a row's label tokens, each given the tokens before it."""
    logits = model(input_ids=tokens[None]).logits[0]
    loss = logits.sum() * 0
    for t in items_of(labels):
        loss = loss - logits[t - 1].log_softmax(dim=0)[labels[t]]
    return loss


def gradient(scalar: torch.Tensor, model: nn.Module, names: Sequence[str], keep: bool = False) -> np.ndarray:
    """Gradient of a scalar, `[p]`; parameters that have no part in it get zeros."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(
        scalar, [parameters[name] for name in names], retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in grads]).double().numpy()


def trainable(model: nn.Module) -> nn.Module:
    """All parameters require a gradient, frozen base weights of PEFT too: for the references only."""
    return model.requires_grad_(True)


def row_gradients(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, torch.Tensor], labels: torch.Tensor | None = None
) -> np.ndarray:
    """Gradient of every row's summed loss, `[rows, p]`, one row and no padding at a time."""
    result = []
    for row in range(len(batch["input_ids"])):
        tokens, own = row_of(batch, row)
        asked = own if labels is None else labels[row, : len(tokens)]
        result.append(gradient(row_loss(model, tokens, asked), model, names))
    return np.stack(result)


def num_items(batch: Mapping[str, torch.Tensor]) -> int:
    return sum(len(items_of(row_of(batch, row)[1])) for row in range(len(batch["labels"])))


def row_gauss_newton(model: nn.Module, names: Sequence[str], tokens: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Gauss-Newton matrix of one row's summed loss: every label of every item, weighted by its probability."""
    result = 0.0
    logits = model(input_ids=tokens[None]).logits[0]
    for t in items_of(labels):
        log_probabilities = logits[t - 1].log_softmax(dim=0)
        grads = np.stack([gradient(-log_p, model, names, keep=True) for log_p in log_probabilities])
        result = result + grads.T @ (log_probabilities.detach().exp().double().numpy()[:, None] * grads)
    return result


def gauss_newton(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, torch.Tensor], weights: Sequence[float] | None = None
) -> np.ndarray:
    """`H [p, p]` of the mean-over-items loss, a row's items counting `weights[row]` times."""
    rows = [row_of(batch, row) for row in range(len(batch["input_ids"]))]
    weights = [1.0] * len(rows) if weights is None else list(weights)
    items = sum(weight * len(items_of(labels)) for weight, (_, labels) in zip(weights, rows, strict=True))
    total = sum(
        weight * row_gauss_newton(model, names, *row) for weight, row in zip(weights, rows, strict=True) if weight
    )
    return total / items


# ------------------------------------------------------------------------------------------------------- dense Source


def dense_flow(
    hessian: np.ndarray, preconditioner: np.ndarray, decay: np.ndarray, length: float
) -> tuple[np.ndarray, np.ndarray]:
    """`F_r = integral_0^s exp(-t (P H + Lambda)) dt P` and `exp(-s (P H + Lambda))`, both `[p, p]`.

    `P` is a diagonal `[p]` or a matrix `[p, p]`.

    The integral is the upper right block of the exponential of `[[-M, I], [0, 0]] s` (Van Loan 1978).
    """
    size = len(hessian)
    preconditioner = np.diag(preconditioner) if preconditioner.ndim == 1 else preconditioner
    generator = preconditioner @ hessian + np.diag(decay)
    augmented = np.zeros((2 * size, 2 * size))
    augmented[:size, :size] = -length * generator
    augmented[:size, size:] = length * np.eye(size)
    exponential = scipy.linalg.expm(augmented)
    return exponential[:size, size:] @ preconditioner, exponential[:size, :size]


def dense_source(
    hessian: np.ndarray, preconditioner: np.ndarray, decay: np.ndarray, length: float, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`F_r^T q` and `exp(-s (P H + Lambda))^T q` for every row of `q [queries, p]`."""
    response, exponential = dense_flow(hessian, preconditioner, decay, length)
    return q @ response, q @ exponential


def block_flow(
    left: np.ndarray, right: np.ndarray, eigenvalues: np.ndarray, length: float
) -> tuple[np.ndarray, np.ndarray]:
    """`integral_0^s exp(-t A) dt` and `exp(-s A)` of `A = (L x R) diag(mu) (L x R)^T`, built densely."""
    basis = np.kron(left, right)
    curvature = basis @ np.diag(eigenvalues.ravel()) @ basis.T
    ones = np.ones(len(curvature))
    return dense_flow(curvature, ones, 0 * ones, length)


# ------------------------------------------------------------------------------------- segments: constants and vectors


def flat(vectors: Mapping[str, torch.Tensor], names: Sequence[str]) -> np.ndarray:
    """`[count, *shape]` per name as one `[count, p]`."""
    return torch.cat([vectors[name].reshape(len(vectors[name]), -1) for name in names], dim=1).double().numpy()


def flat_constant(constants: Mapping[str, torch.Tensor], model: nn.Module, names: Sequence[str]) -> np.ndarray:
    """Constants per parameter, scalar or elementwise, as one `[p]`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return torch.cat([constants[name].double().expand(shapes[name]).flatten() for name in names]).numpy()


def split(matrix: np.ndarray, model: nn.Module, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a `[count, p]` matrix, by parameter: name -> `[count, size]`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    edges = np.cumsum([sizes[name] for name in names])[:-1]
    return dict(zip(names, np.split(matrix, edges, axis=1), strict=True))


def queries_for(model: nn.Module, names: Sequence[str], count: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random query vectors."""
    torch.manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randn(count, *shapes[name], dtype=torch.float64) for name in names}


def sgd_like(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """One constant for everything, as SGD with momentum has."""
    return {name: torch.tensor(3.0, dtype=torch.float64) for name in names}


def adam_like(model: nn.Module, names: Sequence[str], seed: int = 6) -> dict[str, torch.Tensor]:
    """Elementwise over two decades, a tenth of the entries 0 (never had a gradient)."""
    torch.manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    result = {}
    for name in names:
        spread = 10 ** (2 * torch.rand(shapes[name], dtype=torch.float64) - 0.5)
        result[name] = torch.where(torch.rand(shapes[name]) < 0.1, torch.zeros_like(spread), spread)
    return result


def equal_decay(model: nn.Module, names: Sequence[str], rate: float = 0.3) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rate, dtype=torch.float64) for name in names}


def decay_by_parameter(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Matrices decay, vectors do not, as Trainer's parameter groups have it; and a third rate."""
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    rates = {name: (0.5, 0.2)[index % 2] if name in matrices else 0.0 for index, name in enumerate(names)}
    return {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}


def freeze(constants: Mapping[str, torch.Tensor], frozen: Sequence[str]) -> dict[str, torch.Tensor]:
    """The same constants with those of the named parameters put to 0."""
    zero = torch.zeros((), dtype=torch.float64)
    return {name: zero if name in frozen else value for name, value in constants.items()}


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Of the whole array, in norm."""
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


def worst_error(
    got: Mapping[str, torch.Tensor], expected: np.ndarray, model: nn.Module, names: Sequence[str]
) -> float:
    """Largest relative error over parameters.

    A tiny parameter is measured against a thousandth of the whole, so that a small block counts as sharply as a large
    one without its rounding being blown up.
    """
    floor = 1e-3 * np.linalg.norm(expected)
    errors = []
    for name, reference in split(expected, model, names).items():
        difference = got[name].reshape(len(reference), -1).double().numpy() - reference
        errors.append(np.linalg.norm(difference) / max(np.linalg.norm(reference), floor))
    return max(errors)


# ------------------------------------------------------------------------------------------- Kronecker-factored blocks


def embedding_names(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Parameters whose first axis is a vocabulary (or positions): they keep that axis diagonal."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in model.named_parameters() if name in names and id(parameter) in tables}


def layer_traffic(
    model: nn.Module, module: nn.Module, batch: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """What goes into a layer and the loss gradients that come back to it, `[positions, in]`, `[positions, out]`.

    Over every call of the layer in every row, without padding.
    """
    inputs, grads = [], []
    for row in range(len(labels)):
        calls = []
        hook = module.register_forward_hook(lambda _, args, output, calls=calls: calls.append((args[0], output)))
        tokens, _ = row_of(batch, row)
        loss = row_loss(model, tokens, labels[row, : len(tokens)])
        hook.remove()
        for x, y in calls:
            grad = torch.autograd.grad(loss, y, retain_graph=True, materialize_grads=True)[0]
            if isinstance(module, nn.modules.conv._ConvNd):
                x, grad = patches(module, x.detach()), grad.movedim(1, -1)
            inputs.append(x.detach().flatten(0, -2).numpy())
            grads.append(grad.flatten(0, -2).numpy())
    return np.concatenate(inputs), np.concatenate(grads)


def patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a convolution of one group multiplies with its weight, `[rows, *places, in x kernel]`.

    A kernel that is 1 at one element and 0 elsewhere picks that element of every patch.
    """
    kernels = torch.eye(module.weight[0].numel(), dtype=x.dtype).reshape(-1, *module.weight.shape[1:])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return convolve(x, kernels, None, module.stride, module.padding, module.dilation).movedim(1, -1)


def eigenbasis(moment: np.ndarray) -> np.ndarray:
    return scipy.linalg.eigh(moment)[1]


def gradient_bases(whitened: np.ndarray, diagonal_left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of `sum G G^T` (identity if that side is diagonal) and `sum G^T G`, of `G [n, m, k]`."""
    left = np.eye(whitened.shape[1])
    if not diagonal_left:
        left = eigenbasis(sum(g @ g.T for g in whitened))
    return left, eigenbasis(sum(g.T @ g for g in whitened))


def corrected_eigenvalues(whitened: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`mu [m, k]`: second moment of every coordinate of the gradients `[n, m, k]` in the basis."""
    return sum(np.square(left.T @ g @ right) for g in whitened)


def as_matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter seen as a matrix: first axis by the rest; a vector is one column."""
    rows = shape[0] if len(shape) else 1
    return rows, int(np.prod(shape)) // rows


def through_block(
    integral: np.ndarray, exponential: np.ndarray, preconditioner: np.ndarray, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A whitened block's flow on raw vectors, `P^{-1/2} f(A) P^{1/2} q`; entries with `P = 0` pass as they are."""
    root = np.sqrt(preconditioner)
    on = root > 0
    result = []
    for function in (integral, exponential):
        moved = q.copy()
        moved[:, on] = ((q * root) @ function.T)[:, on] / root[on]
        result.append(moved)
    return result[0], result[1]
