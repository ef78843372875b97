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
"""The questions people ask of scores, each a function of an attributor (or of shared scores) that gives an `Answer`.

Example:
    >>> from hf_source import questions
    >>> print(questions.why(attributor, "The capital of Fiji is", right=" Suva."))
    >>> print(questions.groups(attributor, queries, by="source"))
"""

from .actions import actions
from .answer import Answer
from .check import Check
from .credit import credit
from .duplicates import duplicates
from .groups import groups
from .keep import keep
from .mislabelled import mislabelled
from .missing import missing
from .trust import trust
from .why import contrast_queries, why


__all__ = [
    "Answer",
    "Check",
    "actions",
    "contrast_queries",
    "credit",
    "duplicates",
    "groups",
    "keep",
    "mislabelled",
    "missing",
    "trust",
    "why",
]
