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
"""DeepSpeed ZeRO 1 to 3: following weights and moments that lie, cut by entries, in memory of the engine's own.

DeepSpeed clips and updates inside the training step (`engine.step()`), and tells the gradient's norm only afterwards.
So each process keeps a copy of its part of the weights while the engine steps, and reports the step when it is made:
first the weights and the clip factor that it began with, then the moments and weights that it left.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnsupportedError
from .config import RecordingOptions
from .names import named_parameters
from .sharding import Fragment


_OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)

# What a config may say. Of the rest, much changes what a step does.
_KNOWN = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
_KNOWN |= {"zero_optimization", "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown"}
_KNOWN_OF_ZERO = {"stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"}
_KNOWN_OF_ZERO |= {"reduce_bucket_size", "allgather_bucket_size", "sub_group_size"}
_KNOWN_OF_ZERO |= {"stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"}
_KNOWN_OF_ZERO |= {"stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"}
_FIXES = {
    "optimizer": "Leave it out: the Trainer's own `optim` (AdamW, Adam or SGD of torch) is sharded as well",
    "scheduler": "Leave it out and set lr_scheduler_type",
    "bf16": "DeepSpeed keeps two copies of the weights then. Train in float32: leave out bf16=True and this entry",
    "fp16": "DeepSpeed scales the loss itself then. Train in float32: leave out fp16=True and this entry",
    "offload_optimizer": "Keep the optimizer on the GPU: set its device to 'none'",
    "offload_param": "Keep the parameters on the GPU: set its device to 'none'",
}


def refuse_deepspeed(trainer: Any) -> None:
    """Refuse what recording cannot follow, as far as DeepSpeed's config tells it.

    Raises:
        UnsupportedError: naming the entry of the config and what to do.
    """
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise UnsupportedError(
            f"DeepSpeed with ZeRO stage {zero.get('stage', 0)} cannot be recorded. Set `stage` of zero_optimization "
            "to 1, 2 or 3, or leave `deepspeed=` out and use plain data parallelism (`accelerate launch`)."
        )
    for entries, known, where in ((config, _KNOWN, ""), (zero, _KNOWN_OF_ZERO, "zero_optimization.")):
        for key, value in entries.items():
            if key not in known and not _is_off(value):
                fix = _FIXES.get(key, "Leave it out, or train with FSDP2 or plain data parallelism")
                raise UnsupportedError(
                    f"Recording does not follow `{where}{key}` of the DeepSpeed config, or has not been tested with "
                    f"it. {fix}."
                )
    if RecordingOptions.from_args(trainer.args).record_gradient_mean:
        raise UnsupportedError(
            "DeepSpeed takes gradients away before they can be summed up. Set record_gradient_mean=False."
        )
    if trainer.args.auto_find_batch_size:
        raise UnsupportedError("auto_find_batch_size does not work with DeepSpeed. Set auto_find_batch_size=False.")
    if getattr(trainer, "deepspeed", None) is not None:
        raise UnsupportedError(
            "The trainer has a DeepSpeed engine already, of an earlier train() or evaluation. Make a new trainer."
        )


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        switch = value.get("enabled", value.get("device", True))
        return str(switch).lower() in ("false", "none")
    return value in (None, False)


class FollowedEngine:
    """The engine of a trainer that is ready to train.

    Args:
        trainer: the trainer.

    Attributes:
        fragments: this process's part of every parameter that is cut, by name; frozen ones are cut by ZeRO 3 only.
        optimizer: looks like the torch optimizer inside, but of the `fragments`.

    Raises:
        UnsupportedError: if the engine does not do what the record would say.
    """

    def __init__(self, trainer: Any) -> None:
        self.engine, self.zero = trainer.deepspeed, trainer.deepspeed.optimizer
        self._inner = getattr(self.zero, "optimizer", None)
        self._refuse(trainer)
        self.fragments = {n: part for n, p in named_parameters(trainer.model) if (part := self._fragment(p))}
        part_of = {fragment.parameter: fragment for fragment in self.fragments.values()}
        self.groups = [[part_of[p] for p in group] for group in self._groups()]
        self.trained = {fragment for group in self.groups for fragment in group}
        self.names = {fragment: name for name, fragment in self.fragments.items()}
        self.optimizer = type(self._inner).__new__(type(self._inner))
        self.optimizer.defaults, self.optimizer.state = self._inner.defaults, {}
        self.optimizer.param_groups = [{"params": group} for group in self.groups]
        self.look()
        self._hooks = [fragment.watch() for fragment in self.trained]

    def _refuse(self, trainer: Any) -> None:
        if type(self._inner) not in _OPTIMIZERS:
            raise UnsupportedError(
                f"With DeepSpeed, updates of {type(self._inner).__name__} cannot be recorded. Leave `optimizer` out "
                "of the DeepSpeed config and set optim='adamw_torch' (or 'sgd')."
            )
        clips, limit = float(self.engine.gradient_clipping()), float(trainer.args.max_grad_norm or 0.0)
        if clips != limit:
            raise UnsupportedError(
                f"DeepSpeed clips gradients at {clips:g} (0: not at all), the Trainer says max_grad_norm={limit:g}. "
                "Set `gradient_clipping` of the DeepSpeed config to 'auto'."
            )
        other = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad} - {"torch.float32"}
        if other:
            raise UnsupportedError(
                f"DeepSpeed trains float32 copies of weights in {', '.join(sorted(other))}, which a record cannot "
                "tell apart. Load the model in float32."
            )

    # ---- Where things lie ----

    def _groups(self) -> Iterator[list[torch.nn.Parameter]]:
        """The model's parameters by group of the optimizer."""
        if hasattr(self.zero, "bit16_groups"):
            yield from self.zero.bit16_groups
            return
        for index in range(len(self._inner.param_groups)):
            pieces = enumerate(self.zero.fp16_groups)
            yield [p for i, piece in pieces if self.zero.sub_group_to_group_id[i] == index for p in piece]

    def _fragment(self, parameter: torch.nn.Parameter) -> Fragment | None:
        if hasattr(parameter, "ds_id"):  # ZeRO 3: equal parts, the last ones padded
            size, whole = parameter.partition_numel(), parameter.ds_numel
            start = min(dist.get_rank() * size, whole)
            stop = min(start + size, whole)
            return Fragment(
                parameter, parameter.ds_shape, start, functools.partial(_values_3, parameter, stop - start)
            )
        if not hasattr(parameter, "_hp_mapping"):
            return None
        mapping = parameter._hp_mapping  # ZeRO 1 and 2 cut all parameters in a row: a process may have none of it
        start = 0 if mapping is None else mapping.lp_fragment_address.start
        return Fragment(parameter, parameter.shape, start, functools.partial(_values_2, parameter))

    def _state(self, fragment: Fragment) -> dict[str, Any]:
        """The optimizer's state of this process's part."""
        parameter, length = fragment.parameter, fragment.values.numel()
        if hasattr(parameter, "ds_id"):
            index, start, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            flat = self.zero.fp32_partitioned_groups_flat[index]
        elif parameter._hp_mapping is None:  # of the moments nothing is here, but updates are counted
            index = next(i for i, group in enumerate(self.groups) if fragment in group)
            start, flat = 0, self.zero.single_partition_of_fp32_groups[index]
        else:
            index, start = parameter._hp_mapping.param_group_index, parameter._hp_mapping.hp_fragment_address.start
            flat = self.zero.single_partition_of_fp32_groups[index]
        state = self._inner.state.get(flat, {})
        cut = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
        return {key: value[start : start + length] if key in cut else value for key, value in state.items()}

    def look(self) -> None:
        """Bring constants, learning rates and moments of `optimizer` up to date."""
        for mine, group in zip(self.optimizer.param_groups, self._inner.param_groups, strict=True):
            mine.update({key: value for key, value in group.items() if key != "params"})
        self.optimizer.state.update({fragment: self._state(fragment) for fragment in self.trained})

    def parts(self, names: Mapping[torch.nn.Parameter, str | None]) -> dict[Any, str | None]:
        """Names of the model's parameters, with what trains replaced by this process's part."""
        part_of = {fragment.parameter: fragment for fragment in self.trained}
        return {part_of.get(parameter, parameter): name for parameter, name in names.items()}

    # ---- Steps ----

    def report(self, before: Callable[[Any], None], after: Callable[[], None]) -> None:
        """From now on, tell of every step that the engine makes.

        Args:
            before: called with the gradient's norm, when weights, moments and learning rates seem to be those that
                the step began with.
            after: called when they are those that it left.
        """
        inner = self.engine.step

        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> None:
            self._refuse_unreached()
            self.look()
            for fragment in self.trained:
                fragment.keep()
            inner(*args, **kwargs)
            before(self.engine.get_global_grad_norm())
            for fragment in self.trained:
                fragment.let_go()
            self.look()
            after()
            for fragment in self.trained:
                fragment.reached = False

        self.engine.step = step

    def leave(self) -> None:
        """Report no more."""
        for hook in self._hooks:
            hook.remove()
        self.engine.__dict__.pop("step", None)

    def _refuse_unreached(self) -> None:
        for fragment in self.trained:
            if not fragment.reached:
                raise UnsupportedError(
                    f"`{self.names[fragment]}` had no gradient in a step (frozen, or not used), but DeepSpeed moves "
                    "it all the same, by weight decay and old momentum. Freeze it before the trainer is made, or "
                    "train without DeepSpeed."
                )


def _values_3(parameter: torch.nn.Parameter, length: int) -> torch.Tensor:
    from deepspeed.utils import safe_get_local_fp32_param

    found = safe_get_local_fp32_param(parameter) if parameter.requires_grad else None
    return (parameter.ds_tensor.data if found is None else found).view(-1)[:length]


def _values_2(parameter: torch.nn.Parameter) -> torch.Tensor:
    mapping = parameter._hp_mapping
    return parameter.detach().view(-1)[:0] if mapping is None else mapping.get_hp_fragment()
