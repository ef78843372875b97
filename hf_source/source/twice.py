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
"""Operations whose gradient is cheap to differentiate again, along many directions at once.

A Hessian-vector product differentiates the gradient of a batch's loss. Of that, autograd's general formulas take most
of the time outside of matrix products: an activation made of eight operations has dozens in its second derivative, and
matrix products of many directions are copied into the layout of one. Inside `cheap_twice(model)` the common operations
are replaced by ones that know both of their derivatives:

* affine maps `x W + b` (`torch.addmm`, `linear`) and `torch.matmul`: each direction's products are made in place,
  without copies,
* elementwise activations: `f'` and `f''` are computed once, for all directions,
* `layer_norm`, `softmax` and the cross-entropy of single items: in closed form, one direction after the other, so that
  what is worked on stays in a processor's cache.

Every other operation stays autograd's. Values and derivatives are the same up to rounding, so nothing else changes.
Only the first two derivatives exist. With `x` an operation's input, `g` the gradient of its output and `k, C, c`
directions of the gradients of `x`, weight and bias, the second pass gives the gradient of
`<k, dx> + <C, dW> + <c, db>` with respect to `g`, `x` and `W`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS


class CheapTwice(TorchFunctionMode):
    """Replaces operations while it is entered.

    Attributes:
        num_bytes: of the results of all operations that were made, the measure of what a direction takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See `torch.overrides`."""
        made = _REPLACED[func](*args, **(kwargs or {})) if func in _REPLACED else None
        made = func(*args, **(kwargs or {})) if made is None else made
        if isinstance(made, torch.Tensor) and made.requires_grad and made._base is None:
            self.num_bytes += made.numel() * made.element_size()
        return made


@contextmanager
def cheap_twice(model: nn.Module) -> Iterator[CheapTwice]:
    """Forward passes of the model inside have gradients that are cheap to differentiate again."""
    with ExitStack() as stack:
        for module in model.modules():
            if _is_activation(module):
                module.forward = functools.partial(_elementwise, module.forward)
                stack.callback(module.__delattr__, "forward")
        yield stack.enter_context(CheapTwice())


# ---- affine maps ----


class _Affine(Function):
    """`x W + b` with `x [n, in]`, `W [in, out]`; `b` may be missing."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        first = _AffineFirst if torch.is_grad_enabled() else _AffineOfMany
        dx, dweight, dbias = first.apply(g, x, weight, *ctx.needs_input_grad[:2])
        return dx, dweight, dbias if ctx.biased else None


class _AffineFirst(Function):
    """The gradients of an affine map, to be differentiated."""

    @staticmethod
    def forward(ctx, g, x, weight, want_x, want_weight):
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        return g @ weight.T if want_x else None, x.T @ g if want_weight else None, g.sum(dim=0)

    @staticmethod
    def backward(ctx, k, big, small):
        dg, dx, dweight = _AffineSecond.apply(k, big, small, *ctx.saved_tensors)
        wanted = ctx.needs_input_grad
        return dg, dx if wanted[1] else None, dweight if wanted[2] else None, None, None


class _OfMany(Function):
    """A function of tensors of which the first `copied` come in many copies, written for the copies as `many`."""

    copied = 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Never differentiated."""

    @classmethod
    def forward(cls, *args):
        """`many` for a single copy."""
        found = cls.many(*(None if part is None else part[None] for part in args[: cls.copied]), *args[cls.copied :])
        return tuple(None if part is None else part[0] for part in found)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        """`many`, with copies where they are missing."""
        parts = list(args)
        for number, (part, dim) in enumerate(zip(args[: cls.copied], in_dims[: cls.copied], strict=True)):
            if part is not None:
                parts[number] = part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
        found = cls.many(*parts)
        return found, tuple(None if part is None else 0 for part in found)


class _OneByOne(_OfMany):
    """A function of which `one` does a copy at a time, so that what it works on stays in a processor's cache."""

    @classmethod
    def forward(cls, *args):
        """The only copy."""
        return cls.one(*args)

    @classmethod
    def many(cls, *args):
        """All copies; the first `cls.copied` arguments come in copies."""
        copies = len(next(part for part in args[: cls.copied] if part is not None))
        results: tuple[torch.Tensor | None, ...] = ()
        for number in range(copies):
            own = (None if part is None else part[number] for part in args[: cls.copied])
            found = cls.one(*own, *args[cls.copied :])
            if not results:
                results = tuple(None if part is None else part.new_empty((copies, *part.shape)) for part in found)
            for result, part in zip(results, found, strict=True):
                if part is not None:
                    result[number] = part
        return results


class _AffineOfMany(_OfMany):
    """The gradients of an affine map for many `g [copies, n, out]`."""

    @staticmethod
    def many(g, x, weight, want_x, want_weight):
        """Gradients of `x`, weight and bias."""
        dx = dweight = None
        if want_x:
            dx = torch.mm(g.reshape(-1, g.shape[-1]), weight.T).view(*g.shape[:2], -1)
        if want_weight:
            dweight = g.new_empty((len(g), *weight.shape))
            for own, out in zip(g, dweight, strict=True):
                torch.mm(x.T, own, out=out)
        return dx, dweight, g.sum(dim=1)


class _AffineSecond(_OfMany):
    """The second pass of an affine map for many directions `k [copies, n, in]`, `C [copies, in, out]`, `c`."""

    copied = 3

    @staticmethod
    def many(k, big, small, g, x, weight):
        """`k W + x C + c`, `g C^T` and `k^T g`."""
        copies = len(next(part for part in (k, big, small) if part is not None))
        dg = g.new_zeros((copies, *g.shape)) if k is None else (k.reshape(-1, k.shape[-1]) @ weight)
        dg, dx, dweight = dg.view(copies, *g.shape), None, None
        if k is not None:
            dweight = g.new_empty((copies, *weight.shape))
            for own, out in zip(k, dweight, strict=True):
                torch.mm(own.T, g, out=out)
        if big is not None:
            dx = g.new_empty((copies, *x.shape))
            for own, out, total in zip(big, dx, dg, strict=True):
                torch.mm(g, own.T, out=out)
                total.addmm_(x, own)
        if small is not None:
            dg += small[:, None]
        return dg, dx, dweight


def _addmm(bias, x, weight, **settings):
    if settings or not _plain(bias, x, weight) or bias.dim() != 1:
        return None
    return _Affine.apply(x, weight, bias)


def _linear(x, weight, bias=None):
    if x.dim() < 2 or weight.dim() != 2 or not _plain(x, weight, *([] if bias is None else [bias])):
        return None
    made = _Affine.apply(x.reshape(-1, x.shape[-1]), weight.T, bias)
    return made.view(*x.shape[:-1], len(weight))


# ---- products of batches of matrices ----


class _Matmul(Function):
    """`A B` with `A [batch, n, m]`, `B [batch, m, k]`: an affine map of each matrix, whose weight is the other one."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b)

    @staticmethod
    def backward(ctx, g):
        return (_MatmulFirst if torch.is_grad_enabled() else _MatmulOfMany).apply(g, *ctx.saved_tensors)


class _MatmulFirst(Function):
    """`g B^T` and `A^T g`, to be differentiated."""

    @staticmethod
    def forward(ctx, g, a, b):
        ctx.save_for_backward(g, a, b)
        ctx.set_materialize_grads(False)
        return torch.bmm(g, b.mT), torch.bmm(a.mT, g)

    @staticmethod
    def backward(ctx, along_a, along_b):
        return _MatmulSecond.apply(along_a, along_b, *ctx.saved_tensors)


class _MatmulOfMany(_OfMany):
    """`g B^T` and `A^T g` for many `g [copies, batch, n, k]`."""

    @staticmethod
    def many(g, a, b):
        """Gradients of `A` and `B`."""
        da, db = g.new_empty((len(g), *a.shape)), g.new_empty((len(g), *b.shape))
        for own, out_a, out_b in zip(g, da, db, strict=True):
            torch.bmm(own, b.mT, out=out_a)
            torch.bmm(a.mT, own, out=out_b)
        return da, db


class _MatmulSecond(_OfMany):
    """The second pass for many directions of the gradients of `A` and `B`."""

    copied = 2

    @staticmethod
    def many(along_a, along_b, g, a, b):
        """`along_a B + A along_b`, `g along_b^T` and `along_a^T g`."""
        copies = len(along_b if along_a is None else along_a)
        dg, da, db = g.new_zeros((copies, *g.shape)), None, None
        if along_a is not None:
            db = g.new_empty((copies, *b.shape))
            for own, out, total in zip(along_a, db, dg, strict=True):
                torch.bmm(own.mT, g, out=out)
                torch.bmm(own, b, out=total)
        if along_b is not None:
            da = g.new_empty((copies, *a.shape))
            for own, out, total in zip(along_b, da, dg, strict=True):
                torch.bmm(g, own.mT, out=out)
                total.baddbmm_(a, own)
        return dg, da, db


def _matmul(a, b, **settings):
    if settings or a.dim() < 3 or a.shape[:-2] != b.shape[:-2] or not _plain(a, b):
        return None
    return _Matmul.apply(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


# ---- elementwise activations ----


class _Elementwise(Function):
    """`f(x)` of known `f`, `f'` and `f''` at `x`."""

    @staticmethod
    def forward(ctx, x, value, first, second):
        ctx.save_for_backward(x, first, second)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, g):
        x, first, second = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return g * first, None, None, None
        return _ElementwiseFirst.apply(g, x, first, second), None, None, None


class _ElementwiseFirst(Function):
    """`g f'(x)`, to be differentiated."""

    @staticmethod
    def forward(ctx, g, x, first, second):
        ctx.save_for_backward(first, g * second)
        return g * first

    @staticmethod
    def backward(ctx, k):
        first, second = ctx.saved_tensors
        return k * first, k * second, None, None


def _elementwise(function: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any):
    if not _plain(x) or kwargs.get("inplace"):
        return function(x, *args, **kwargs)
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        at = x.detach().requires_grad_()
        value = function(at, *args, **kwargs)
        first = torch.autograd.grad(value.sum(), at, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), at)[0] if first.requires_grad else torch.zeros_like(first)
    return _Elementwise.apply(x, value.detach(), first.detach(), second)


@functools.cache
def _activations() -> frozenset[type]:
    """Modules that are one function of every entry."""
    named = [entry[0] if isinstance(entry, tuple) else entry for entry in dict.values(ACT2CLS)]
    return frozenset([*named, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.Mish, nn.LogSigmoid])


def _is_activation(module: nn.Module) -> bool:
    """Whether it is one, with nothing to train, that leaves its input as it is."""
    known = type(module) in _activations() and not getattr(module, "inplace", False)
    return known and next(module.parameters(), None) is None and "forward" not in vars(module)


# ---- layer norm ----


class _LayerNorm(Function):
    """`(x - mean) / deviation * weight + bias` of rows `x [n, features]`."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        centred = x - x.mean(dim=-1, keepdim=True)
        rate = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normal = centred * rate
        ctx.save_for_backward(x, weight, normal, rate)
        return torch.addcmul(bias, normal, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight, normal, rate = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_LayerNormFirst.apply(g, x, weight, normal, rate), None
        return *_LayerNormOfMany.apply(g, weight, normal, rate), None


class _LayerNormFirst(Function):
    """The gradients of a layer norm, to be differentiated: `rate P(g weight)`, `sum g normal` and `sum g`.

    `P(v) = v - mean(v) - normal mean(v normal)`.
    """

    @staticmethod
    def forward(ctx, g, x, weight, normal, rate):
        scaled = g * weight
        tangent = _tangent(scaled, normal)
        ctx.save_for_backward(g, weight, normal, rate, scaled, tangent)
        ctx.set_materialize_grads(False)
        return rate * tangent, (g * normal).sum(dim=0), g.sum(dim=0)

    @staticmethod
    def backward(ctx, k, big, small):
        return *_LayerNormSecond.apply(k, big, small, *ctx.saved_tensors), None, None


class _LayerNormOfMany(_OneByOne):
    """The gradients of a layer norm for many `g [copies, n, features]`."""

    @staticmethod
    def one(g, weight, normal, rate):
        """Gradients of `x`, weight and bias."""
        return _tangent(g * weight, normal).mul_(rate), (g * normal).sum(dim=0), g.sum(dim=0)


class _LayerNormSecond(_OneByOne):
    """The second pass of a layer norm for many directions."""

    copied = 3

    @staticmethod
    def one(k, big, small, g, weight, normal, rate, scaled, tangent):
        """With `w = rate P(k)`: `dg = w weight + C normal + c`, and `x` enters by `normal` and by `rate`."""
        dg, dnormal, dweight = torch.zeros_like(g), torch.zeros_like(g), None
        if k is not None:
            along = _mean_product(k, normal)
            w = (k - k.mean(dim=-1, keepdim=True)).addcmul_(normal, along, value=-1).mul_(rate)
            dg.addcmul_(w, weight)
            dweight = w.mul_(g).sum(dim=0)
            dnormal.addcmul_(k, rate * _mean_product(scaled, normal), value=-1)
            dnormal.addcmul_(scaled, rate * along, value=-1)
        if big is not None:
            dg.addcmul_(normal, big)
            dnormal.addcmul_(g, big)
        if small is not None:
            dg += small
        dx = _tangent(dnormal, normal).mul_(rate)
        if k is not None:
            dx.addcmul_(normal, rate.square() * _mean_product(k, tangent), value=-1)
        return dg, dx, dweight


def _tangent(v: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    return (v - v.mean(dim=-1, keepdim=True)).addcmul_(normal, _mean_product(v, normal), value=-1)


def _mean_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).mean(dim=-1, keepdim=True)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if weight is None or bias is None or len(normalized_shape) != 1 or not _plain(x, weight, bias):
        return None
    return _LayerNorm.apply(x.reshape(-1, x.shape[-1]), weight, bias, eps).view(x.shape)


# ---- softmax ----


class _Softmax(Function):
    """Softmax over the last axis."""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(dim=-1)
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return _SoftmaxFirst.apply(g, x, y) if torch.is_grad_enabled() else _SoftmaxOfMany.apply(g, y)[0]


class _SoftmaxFirst(Function):
    """`y (g - <g, y>)`, to be differentiated."""

    @staticmethod
    def forward(ctx, g, x, y):
        centred = g - torch.linalg.vecdot(g, y)[..., None]
        ctx.save_for_backward(g, y, centred)
        return y * centred

    @staticmethod
    def backward(ctx, k):
        return *_SoftmaxSecond.apply(k, *ctx.saved_tensors), None


class _SoftmaxOfMany(_OneByOne):
    """The gradient of a softmax for many `g`."""

    @staticmethod
    def one(g, y):
        """`y (g - <g, y>)`."""
        return ((g - torch.linalg.vecdot(g, y)[..., None]).mul_(y),)


class _SoftmaxSecond(_OneByOne):
    """The second pass of a softmax for many directions."""

    @staticmethod
    def one(k, g, y, centred):
        """`y (k - <k, y>)`, and `v = k (g - <g, y>) - g <k, y>` on its way through `y`."""
        along = torch.linalg.vecdot(k, y)[..., None]
        v = (k * centred).addcmul_(g, along, value=-1)
        return (k - along).mul_(y), v.sub_(torch.linalg.vecdot(v, y)[..., None]).mul_(y)


def _softmax(x, dim=None, _stacklevel=3, dtype=None):
    if dim not in (-1, x.dim() - 1) or dtype not in (None, x.dtype) or not _plain(x):
        return None
    return _Softmax.apply(x)


# ---- cross-entropy ----


class _CrossEntropy(Function):
    """Cross-entropy of every item and its target distribution `q [n, classes]`, which is 0 where nothing is asked."""

    @staticmethod
    def forward(ctx, logits, target):
        logarithm = logits.log_softmax(dim=-1)
        probability = logarithm.exp().mul_(target.sum(dim=-1, keepdim=True))
        ctx.save_for_backward(logits, probability, target)
        return -(logarithm * target).sum(dim=-1)

    @staticmethod
    def backward(ctx, g):
        logits, probability, target = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return g[:, None] * (probability - target), None
        return _CrossEntropyFirst.apply(g, logits, probability, target), None


class _CrossEntropyFirst(Function):
    """`g (p - q)`, to be differentiated."""

    @staticmethod
    def forward(ctx, g, logits, probability, target):
        difference = probability - target
        ctx.save_for_backward(g, probability, difference)
        return g[:, None] * difference

    @staticmethod
    def backward(ctx, k):
        return *_CrossEntropySecond.apply(k, *ctx.saved_tensors), None, None


class _CrossEntropySecond(_OneByOne):
    """The second pass of a cross-entropy for many directions."""

    @staticmethod
    def one(k, g, probability, difference):
        """`<k, p - q>` and `g (p k - p <p, k>)`."""
        along = k * probability
        dlogits = along.addcmul_(probability, along.sum(dim=-1, keepdim=True), value=-1).mul_(g[:, None])
        return torch.linalg.vecdot(k, difference), dlogits


def _cross_entropy(logits, target, *args, reduction="mean", ignore_index=-100, label_smoothing=0.0, **settings):
    whole = target.dim() == 1 and not target.is_floating_point()
    usual = not args and all(value is None for value in settings.values()) and reduction == "none"
    if not usual or logits.dim() != 2 or not whole or not _plain(logits):
        return None
    asked = target != ignore_index
    q = torch.full_like(logits, label_smoothing / logits.shape[-1], requires_grad=False)
    q.scatter_add_(1, target.where(asked, 0)[:, None], q.new_full((len(q), 1), 1 - label_smoothing))
    return _CrossEntropy.apply(logits, q * asked[:, None])


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether the tensors are of one floating type in which they are computed, and something is differentiated."""
    kinds = {tensor.dtype for tensor in tensors}
    whole = kinds <= {torch.float32} or kinds <= {torch.float64}
    autocast = torch.is_autocast_enabled(tensors[0].device.type)
    return whole and not autocast and any(tensor.requires_grad for tensor in tensors)


_REPLACED = {
    torch.addmm: _addmm,
    F.linear: _linear,
    torch.matmul: _matmul,
    F.layer_norm: _layer_norm,
    F.softmax: _softmax,
    F.cross_entropy: _cross_entropy,
    F.gelu: functools.partial(_elementwise, F.gelu),
    F.silu: functools.partial(_elementwise, F.silu),
}
"""Function -> what is done in its place; it may decline with `None`."""
