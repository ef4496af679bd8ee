from __future__ import annotations

from types import ModuleType

import pytest
import tiny
import torch

from edgekit.errors import InputError


@pytest.fixture(scope="module")
def grow() -> ModuleType:
    return tiny.script("scripts/grow_student.py")


@pytest.mark.parametrize(("names"), [("nano", "small"), ("small", "base"), ("base", "large")], ids="-".join)
def test_a_grown_student_computes_what_the_small_one_does_and_learns_with_all_its_weights(grow, names):
    small, large = (tiny.network(name, seed=seed) for seed, name in enumerate(names))
    noisy, sigma = torch.rand(2, 1, 32, 40), torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)
    apart = (large(noisy, sigma) - small(noisy, sigma)).abs().max()
    large.load_state_dict(grow.grown(small, large))
    assert (large(noisy, sigma) - small(noisy, sigma)).abs().max() < 1e-5 < 1e-3 < apart
    # What adds nothing yet is reached by gradients, and what feeds it is once that has changed.
    optimizer = torch.optim.SGD(large.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in large.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        (large(noisy, sigma) - 0.5).square().mean().backward()
        optimizer.step()
    assert {name for name, value in large.named_parameters() if torch.equal(value, before[name])} == set()


def test_a_student_does_not_shrink(grow):
    with pytest.raises(InputError, match="of the small network has no place in the large one"):
        grow.grown(tiny.network("base"), tiny.network("small"))
