"""vtp.words, and messages whose numbers can be 1."""

import pytest

from vtp.training import progress
from vtp.training.config import TrainConfig
from vtp.training.loop import _Stage
from vtp.training.progress import loader_warning
from vtp.words import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1250, "1,250 images")]
)
def test_so_many_of_something(number, said):
    assert counted(number, "image") == said


def test_so_many_of_what_takes_no_s():
    assert (counted(1, "class", "classes"), counted(2, "class", "classes")) == ("1 class", "2 classes")


def test_settings_of_one_epoch_and_one_image_are_refused_in_grammar():
    with pytest.raises(ValueError, match=r"expected between 0 and 1 epoch$"):
        TrainConfig(epochs=1, warmup_epochs=5.0)
    with pytest.raises(ValueError, match="expected 6 or 8 for 2 processes and 1 image a pass at most"):
        TrainConfig(batch_size=1, effective_batch=7).split(2)


def test_an_update_of_one_image_is_said_in_grammar():
    class Stage:
        stage, steps, passes, images, pass_images = "sparse", 9, 1, 1, 1
        config = TrainConfig()

        class accelerator:
            num_processes = 1

    assert "for updates of 1 image, 9 an epoch" in _Stage._update_in_words(Stage)


def test_one_worker_and_one_core_are_said_in_grammar(monkeypatch):
    monkeypatch.setattr(progress.os, "sched_getaffinity", lambda _: range(1), raising=False)
    said = loader_warning(0.5, 60.0, 1, workers=1, processes=1)
    assert "at 1 worker, and the one core is in use" in said
