"""vtp.training.teacher: what a teacher is shown, what a student learns from it, and which are refused."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.vtp.training.test_loop import CONFIG, make_data, make_model, one_thread, run  # noqa: F401
from vtp.model.architecture import describe
from vtp.training.loaders import test_loader as evaluation_loader
from vtp.training.teacher import Teacher
from vtp.training.transforms import Augment

DATA = make_data()
ONE_STEP = replace(
    CONFIG, epochs=1, batch_size=96, label_smoothing=0.0, distill_temperature=2.0, warmup_epochs=0.0
)
MEANS = {1: ((0.485,), (0.229,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


class Looking(nn.Module):
    """A teacher of four classes that keeps what it is shown."""

    num_classes = 4

    def __init__(self, channels: int, **pretrained_cfg) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 4)
        self.seen = []
        if pretrained_cfg:
            self.pretrained_cfg = pretrained_cfg

    def forward(self, images):
        self.seen.append(images)
        return self.stem(images).mean((-2, -1))


def batch(channels: int, data=DATA) -> torch.Tensor:
    loader = evaluation_loader(data, image_size=16, in_chans=channels, batch_size=8)
    return next(iter(loader))[0]


def shown(teacher: Looking, channels: int, data=DATA) -> torch.Tensor:
    """What the teacher sees of the first images of a student of so many channels."""
    wrapped = Teacher(teacher, data, shape=(channels, 16, 16), num_classes=4)
    wrapped(batch(channels, data))
    return wrapped.model.seen[-1]


@pytest.mark.parametrize("student", [1, 3])
@pytest.mark.parametrize("own", [1, 3])
def test_a_teacher_sees_the_images_that_its_own_loader_would_give_it(student, own):
    mean, std = MEANS[own]
    expected = batch(own, replace(DATA, mean=mean, std=std))
    got = shown(Looking(own, mean=mean, std=std, input_size=(own, 16, 16)), student)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_colours_become_grey_as_in_pillow():
    rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = Looking(1, mean=(0.5,), std=(0.5,), input_size=(1, 16, 16))
    data = replace(DATA, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    wrapped = Teacher(teacher, data, shape=(3, 16, 16), num_classes=4)
    grey = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    torch.testing.assert_close(wrapped.images(rgb)[:, 0], (grey - 0.5) / 0.5)


def test_a_teacher_that_says_nothing_or_the_same_sees_the_students_images_bit_for_bit():
    for teacher in (Looking(1), Looking(1, mean=DATA.mean, std=DATA.std, input_size=(1, 16, 16))):
        assert torch.equal(shown(teacher, 1), batch(1))


def test_a_teacher_sees_images_of_its_own_size():
    assert shown(Looking(1, mean=DATA.mean, std=DATA.std, input_size=(1, 32, 24)), 1).shape == (8, 1, 32, 24)
    vit = make_model()  # whose pretrained_cfg says 224 and which was made for 16
    assert Teacher(vit, DATA, shape=(1, 28, 28), num_classes=4)(torch.zeros(2, 1, 28, 28)).shape == (2, 4)


@pytest.mark.parametrize("name", ["regnety_002", "resnet10t"])
def test_a_student_learns_from_a_convolutional_teacher(tmp_path, name):
    teacher = timm.create_model(name, num_classes=4, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    result = run(tmp_path, replace(ONE_STEP, distill_alpha=0.5), teacher=teacher)
    assert result.history[-1]["train_loss"] < 5
    # Not even the running statistics of its norms, nor its mode.
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert teacher.training


def test_teachers_that_cannot_be_asked_are_refused_by_name(tmp_path):
    config = replace(CONFIG, distill_alpha=0.5)
    features = timm.create_model("regnety_002", features_only=True)
    two_channels = Looking(2)
    small = Looking(1, input_size=(1, 2, 2))
    for teacher, message in (
        (features, "teacher: got list for one image, expected logits"),
        (two_channels, "teacher: input channels 2, expected the model's 1"),
        (small, "teacher: Looking does not take images of 1x2x2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", config, teacher=teacher)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------
# A distillation token


def distilled_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=4, embed_dim=32,
        depth=2, num_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_each_head_of_a_distilled_student_learns_its_own(tmp_path, kind):
    model, teacher = distilled_model(), make_model()
    with torch.no_grad():
        for head in (model.head, model.head_dist, teacher.head):
            head.weight.normal_(std=1.0)
    config = replace(ONE_STEP, distill_alpha=0.25, distill_type=kind)
    loss = run(tmp_path, config, model=model, teacher=teacher, augment=Augment.preset("none", 16)).history[0]
    whole = replace(DATA, test=DATA.train)
    images, labels = next(iter(evaluation_loader(whole, image_size=16, in_chans=1, batch_size=96)))
    model.train().set_distilled_training(True)
    with torch.no_grad():
        ours, theirs = model(images)
        taught = teacher.eval()(images)
    task = F.cross_entropy(ours, labels)
    if kind == "hard":
        distilled = F.cross_entropy(theirs, taught.argmax(-1))
    else:
        p, q = (taught / 2).softmax(-1), (theirs / 2).softmax(-1)
        distilled = 4 * (p * (p / q).log()).sum(-1).mean()
    assert loss["train_loss"] == pytest.approx((0.75 * task + 0.25 * distilled).item(), rel=1e-5)


def test_without_a_teacher_both_heads_learn_the_labels_and_with_one_its_average_is_evaluated(tmp_path):
    model = distilled_model()
    model.set_distilled_training(True)  # as in a training loop of one's own
    alone = run(tmp_path / "alone", replace(ONE_STEP, ema_decay=0.9), model=model).model
    config = replace(ONE_STEP, distill_alpha=1.0, weight_decay=0.0, opt="sgd")
    taught = run(tmp_path / "taught", config, model=model, teacher=make_model()).model
    assert not torch.equal(alone.head.weight, model.head.weight)
    assert not torch.equal(alone.head_dist.weight, model.head_dist.weight)
    assert torch.equal(taught.head.weight, model.head.weight)  # alpha is 1: no label has a part in it
    assert not torch.equal(taught.head_dist.weight, model.head_dist.weight)
    for trained in (alone, taught):
        assert trained.train()(torch.zeros(2, 1, 16, 16)).shape == (2, 4)
        describe(trained)
