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
"""Errors of the library. Every message says what is wrong and what to change."""


class HFSourceError(Exception):
    """Base of every error that `hf_source` raises on purpose."""


class ConfigError(HFSourceError, ValueError):
    """A setting is impossible or contradicts another."""


class RecordError(HFSourceError):
    """A training record is missing, torn, or does not fit what is asked of it."""


class DataError(HFSourceError, ValueError):
    """A dataset, a row or a query cannot be used as given."""


class UnsupportedError(HFSourceError):
    """Something cannot be attributed correctly, so it is refused rather than scored silently."""


class RetrainingError(HFSourceError):
    """A training that an evaluation needs came to nothing; the message says which, and how to go on."""
