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
"""The methods behind `method=`: `source` is the library's own; the others are what it is compared with."""

from .auto import AutoOptions, auto
from .base import Method, in_chunks
from .datainf import DataInfOptions, datainf
from .diffusion import DiffusionOptions, diffusion_retrac, diffusion_tracin
from .final import grad_cos, grad_dot
from .influence import InfluenceOptions, influence
from .logra import LograOptions, logra
from .source import FastSourceOptions, SourceOptions, StepwiseOptions, fast_source, source, stepwise, unrolled
from .text import EmbeddingOptions, bm25, embedding
from .tracin import tracin
from .trackstar import TrackStarOptions, trackstar
from .trak import TrakOptions, trak


METHODS: dict[str, Method] = {
    "source": Method(source, SourceOptions, nats=True),
    "auto": Method(auto, AutoOptions, nats=True, together=True),
    "fast-source": Method(fast_source, FastSourceOptions, nats=True),
    "stepwise": Method(stepwise, StepwiseOptions, nats=True),
    "unrolled": Method(unrolled, nats=True),
    "influence": Method(influence, InfluenceOptions, nats=True),
    "tracin": Method(tracin),
    "diffusion-tracin": Method(diffusion_tracin, DiffusionOptions),
    "diffusion-retrac": Method(diffusion_retrac, DiffusionOptions),
    "grad-dot": Method(grad_dot),
    "grad-cos": Method(grad_cos),
    "trak": Method(trak, TrakOptions, together=True),
    "trackstar": Method(trackstar, TrackStarOptions, together=True),
    "logra": Method(logra, LograOptions, together=True),
    "datainf": Method(datainf, DataInfOptions, together=True),
    "bm25": Method(bm25, reads_text=True, together=True),
    "embedding": Method(embedding, EmbeddingOptions, reads_text=True, together=True),
}
"""`method=` of `SourceAttributor`."""

__all__ = ["METHODS", "Method", "in_chunks"]
