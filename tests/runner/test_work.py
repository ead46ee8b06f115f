import pytest
import torch

from scopeatlas.runner.work import OpenedWork
from tests.runner.works import Squares


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", []), (None, [])])
def test_a_worker_chooses_its_gpu_if_it_is_told_which(monkeypatch, device, chosen):
    """Ray shows a worker one GPU and says "cuda"; there is none to choose, and torch takes no device without a number."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert OpenedWork(Squares(), device, None)(3) == 9 and asked == chosen
