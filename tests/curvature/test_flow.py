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
"""The scalar functions of a flow against numerical integration of their definitions."""

import mpmath
import pytest
import torch

from hf_source.curvature.flow import Flow, decayed, forced, forced_integral, integral


# The functions divide differences by differences. `forced_integral` is the worst: with rates a relative 1e-5 apart it
# loses 5 of 16 digits, and switches to a limit that is as good there.
TOLERANCE = 1e-9
LENGTH = 0.7
RATES = [0.0, 1e-14, 1e-9, 1e-5, 1e-3, 0.2, 3.0, 80.0, -1e-9, -0.5]


def close(got: torch.Tensor, expected) -> bool:
    return abs(float(got) - float(expected)) <= TOLERANCE * abs(float(expected))


@pytest.mark.parametrize("rate", RATES)
def test_decay_and_its_integral(rate):
    assert close(decayed(torch.tensor(rate, dtype=torch.float64), LENGTH), mpmath.exp(-LENGTH * rate))
    expected = mpmath.quad(lambda t: mpmath.exp(-t * rate), [0, 0.05, LENGTH])
    assert close(integral(torch.tensor(rate, dtype=torch.float64), LENGTH), expected)


@pytest.mark.parametrize("own", [0.0, 1e-3, 0.2, 5.0])
@pytest.mark.parametrize("rate", [*RATES, 0.2 + 1e-9, 0.2 + 1e-4, 5.0 - 1e-6])
def test_a_driven_mode_and_its_integral(rate, own):
    with mpmath.workdps(40):  # the reference subtracts nearly equal numbers as well: give it digits to lose

        def driven(length):
            gap = mpmath.mpf(rate) - own
            rest = length if gap == 0 else (1 - mpmath.exp(-length * gap)) / gap
            return mpmath.exp(-length * mpmath.mpf(own)) * rest

        mode = torch.tensor(rate, dtype=torch.float64)
        assert close(forced(mode, own, LENGTH), driven(mpmath.mpf(LENGTH)))
        assert close(forced_integral(mode, own, LENGTH), mpmath.quad(driven, [0, 0.05, LENGTH]))


def test_a_flow_trains_what_has_a_preconditioner():
    zero, some = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
    flow = Flow(1.0, {"off": zero, "on": some, "scalar": torch.tensor(2.0)}, {})
    assert [flow.trains(name) for name in ("off", "on", "scalar")] == [False, True, True]
