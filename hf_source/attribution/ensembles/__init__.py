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
"""`ensemble=` of `SourceAttributor`: scores averaged over members, and how far members differ (Deng et al. 2024).

Junwei Deng, Ting-Wei Li, Shichang Zhang, Jiaqi Ma: *Efficient Ensembles Improve Training Data Attribution*, arXiv
2405.17293. A member is an attributor of one model; what makes the models differ is the kind of ensemble.
"""

from .base import Ensemble, EnsembleKind, make_ensemble, split_settings
from .dropout import DropoutOptions, dropout_members
from .independent import NoEnsembleOptions, check_agreement, independent_members
from .lora import LoraOptions, lora_members


ENSEMBLES: dict[str, EnsembleKind] = {
    "independent": EnsembleKind(independent_members, NoEnsembleOptions),
    "dropout": EnsembleKind(dropout_members, DropoutOptions, usual_size=10),
    "lora": EnsembleKind(lora_members, LoraOptions, usual_size=3),
}
"""Kinds of ensembles."""

__all__ = ["ENSEMBLES", "Ensemble", "check_agreement", "make_ensemble", "split_settings"]
