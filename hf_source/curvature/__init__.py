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
"""Curvature of a segment: how training forgets, as a linear flow on parameters."""

from ..errors import ConfigError
from .block import Block, fit_block
from .columns import column_bytes
from .conjugate import GaussNewtonProducts, conjugate_gradient
from .diagonal import DiagonalCurvature
from .ekfac import EKFACCurvature
from .flow import Flow
from .hybrid import EKFACHybridCurvature
from .inverse import EKFACInverse, JointInverse, ekfac_inverse, joint_inverse
from .joint import JointCurvature, SampleSpace
from .preconditioner import Diagonal, OneSided, Preconditioner, as_preconditioners
from .response import Response, make_response
from .sample import FisherSample, systematic_sample
from .simple import ExactCurvature, IdentityCurvature, gauss_newton


CURVATURES = {
    "joint": JointCurvature,
    "ekfac": EKFACCurvature,
    "ekfac-hybrid": EKFACHybridCurvature,
    "diagonal": DiagonalCurvature,
    "identity": IdentityCurvature,
    "exact": ExactCurvature,
}
"""`curvature=` of `SourceAttributor`."""


def make_curvature(name: str, **options: object) -> object:
    """The curvature called `name`, with those of `options` that it has.

    Raises:
        ConfigError: if there is no such curvature.
    """
    if name not in CURVATURES:
        raise ConfigError(f"curvature={name!r} is unknown; choose one of {', '.join(sorted(CURVATURES))}.")
    kind = CURVATURES[name]
    fields = getattr(kind, "__dataclass_fields__", {})
    return kind(**{key: value for key, value in options.items() if key in fields})


__all__ = [
    "CURVATURES",
    "Block",
    "Diagonal",
    "DiagonalCurvature",
    "EKFACCurvature",
    "EKFACHybridCurvature",
    "EKFACInverse",
    "ExactCurvature",
    "FisherSample",
    "Flow",
    "GaussNewtonProducts",
    "IdentityCurvature",
    "JointCurvature",
    "JointInverse",
    "OneSided",
    "Preconditioner",
    "Response",
    "SampleSpace",
    "as_preconditioners",
    "column_bytes",
    "conjugate_gradient",
    "ekfac_inverse",
    "fit_block",
    "gauss_newton",
    "joint_inverse",
    "make_curvature",
    "make_response",
    "systematic_sample",
]
