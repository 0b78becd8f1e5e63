"""Two processes: what comes back, and what goes wrong."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tersor.testing.processes import in_two_processes, why_not_two
from tersor.training.ranks import mean_over_processes, of_first_process, sum_over_processes

pytestmark = pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))


def test_they_are_joined():
    """Statistics are of both, and decisions are the first one's."""

    def work(rank):
        own = torch.tensor([1.0, 10.0]) * (rank + 1)
        return {
            "rank": torch.tensor(rank),
            "sum": sum_over_processes(own),
            "mean": mean_over_processes(own),
            "first": of_first_process(own),
            "own": own,
        }

    first, second = in_two_processes(work)
    assert (first["rank"].item(), second["rank"].item()) == (0, 1)
    for got in (first, second):
        assert got["sum"].tolist() == [3.0, 30.0]
        assert got["mean"].tolist() == [1.5, 15.0]
        assert got["first"].tolist() == [1.0, 10.0]
    assert second["own"].tolist() == [2.0, 20.0]
    assert not dist.is_initialized()


def test_an_error_comes_with_its_traceback():
    def work(rank):
        if rank == 1:
            raise ValueError("the second has no data")
        return {}

    with pytest.raises(AssertionError, match=r"process 1: Traceback[\s\S]*the second has no data"):
        in_two_processes(work)


def test_a_process_that_dies_is_noticed():
    with pytest.raises(AssertionError, match="process 0: died"):
        in_two_processes(lambda rank: os._exit(1) if rank == 0 else {})


def test_a_process_that_hangs_is_ended():
    def work(rank):
        time.sleep(30 * rank)
        return {}

    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"process 1: was not ready in time"):
        in_two_processes(work, limit=1)
    assert time.monotonic() - begun < 10


def test_a_reason_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert "accelerator" in why_not_two()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert why_not_two() == "torch.distributed is in use already"
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert why_not_two() == "this build of torch has no gloo"
