"""One seed for everything, and no trace of it."""

import pytest
import torch

from dcvit.seeding import derive_seed, seeded


def test_the_callers_random_state_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that has not been used yet, too: torch would keep a seed for it."""
    kept: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", kept.append)
    before = torch.random.get_rng_state()
    with seeded(3, "views") as generator:
        drawn = torch.rand(4)
        assert torch.equal(drawn, torch.rand(4, generator=generator))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not kept
    torch.manual_seed(derive_seed(3, "views"))
    assert len(kept) == 1  # what `seeded` must not do
    assert torch.equal(torch.rand(4), drawn)
