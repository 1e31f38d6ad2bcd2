"""When PyTorch's allocator is told how to hold memory, and when it is left alone."""

import pytest
import torch

from stdit_fast.parallel import allocator


@pytest.fixture
def told(monkeypatch):
    """What the allocator was told; a GPU that nothing has used yet."""
    settings = []
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    return settings


def test_segments_grow_where_nothing_says_otherwise(told):
    assert "expandable" in allocator.expand_segments()
    assert told == ["expandable_segments:True"]


@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_what_the_user_set_stays(name, told, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:256")
    assert f"{name}=max_split_size_mb:256" in allocator.expand_segments()
    assert told == []


def test_what_has_begun_stays(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "as this process began" in allocator.expand_segments()
    assert told == []


@pytest.mark.parametrize("wanted", [True, False])
def test_training_asks_for_them_before_anything_is_there(wanted, monkeypatch):
    from stdit_fast.train import trainer
    from stdit_fast.train.config import TrainConfig

    class Started(Exception):
        pass

    def launch(seed):
        raise Started

    asked = []
    monkeypatch.setattr(trainer, "expand_segments", lambda: asked.append("") or "as the test has it")
    monkeypatch.setattr(trainer, "launch", launch)
    with pytest.raises(Started):
        trainer.Trainer(TrainConfig(expandable_segments=wanted))
    assert len(asked) == wanted
