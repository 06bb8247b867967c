"""A model to distil from, of any architecture, which gets a student's images as it expects them itself.

Distillation (Hinton et al., arXiv 1503.02531), with logits z of the student and t of the teacher:

    loss = (1 - alpha) * task + alpha * T^2 * KL(softmax(t / T) || softmax(z / T))     soft
    loss = (1 - alpha) * task + alpha * CE(z, argmax t)                                hard

A student with DeiT's distillation token has two heads: that of the class token learns the task, that of the
distillation token from the teacher (Touvron et al., arXiv 2012.12877). Evaluated, it averages both.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.model.images import for_channels, image_config, knows_normalisation, own_input_size
from vtp.training.data import Data

# Of red, green and blue in grey, as Pillow has it.
GREY = (0.299, 0.587, 0.114)


class Teacher(nn.Module):
    """A frozen copy of a model in eval mode, called with a student's images.

    Teacher and student see the same augmented view. Normalisations of it differ by an affine map, and sizes
    by a resize; grey is repeated for a teacher of colours, and colours become grey as in Pillow.

    Args:
        model: takes [B, C, H, W] and gives logits [B, classes]. Of a timm model `pretrained_cfg` says what it
            expects; where that says nothing, the student's images are taken to be what it expects.
        data: as the student sees them: with the mean and std of its images.
        shape: (channels, height, width) of these.
        num_classes: of the student.

    Raises:
        ValueError: the model has other classes than the student, or does not take such images.
    """

    def __init__(
        self, model: nn.Module, data: Data, *, shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        said, expected = getattr(model, "pretrained_cfg", None) or {}, image_config(model)
        channels = _channels(model) or shape[0]
        if channels != shape[0] and not {channels, shape[0]} <= {1, 3}:
            raise ValueError(f"teacher: input channels {channels}, expected the model's {shape[0]}")
        self.size = tuple((own_input_size(model) or said.get("input_size") or shape)[1:])
        self.mode = "bilinear" if expected["interpolation"] == "bilinear" else "bicubic"
        self.grey = channels == 1 < shape[0]
        device = next((parameter.device for parameter in model.parameters()), None)
        for name in ("mean", "std"):
            own = getattr(data, name)
            its = expected[name] if knows_normalisation(model) else own
            for buffer, values, count in ((f"student_{name}", own, shape[0]), (name, its, channels)):
                tensor = torch.tensor(for_channels(values, count), device=device).view(1, -1, 1, 1)
                self.register_buffer(buffer, tensor)
        # Values that are the same already would only be rounded.
        self.same_pixels = channels == shape[0] and all(
            torch.equal(getattr(self, name), getattr(self, f"student_{name}")) for name in ("mean", "std")
        )
        self._check(shape, num_classes)

    @torch.no_grad()
    def _check(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """One image tells whether the model can be asked, whatever it is made of."""
        try:
            logits = self(torch.zeros(1, *shape, device=self.mean.device))
        except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
            expects = "x".join(map(str, (self.mean.shape[1], *self.size)))
            raise ValueError(
                f"teacher: {type(self.model).__name__} does not take images of {expects} ({error})"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"teacher: got {got} for one image, expected logits [1, classes]")
        if not logits.isfinite().all():
            raise ValueError("teacher: got logits that are NaN or infinite, expected finite ones")
        if logits.shape[1] != num_classes:
            raise ValueError(f"teacher: classes {logits.shape[1]}, expected the model's {num_classes}")

    def images(self, images: Tensor) -> Tensor:
        """The student's images [B, C, H, W] as the teacher expects them."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True)
        if self.same_pixels:
            return images
        pixels = images * self.student_std + self.student_mean
        if self.grey:
            pixels = (pixels * pixels.new_tensor(GREY).view(1, -1, 1, 1)).sum(1, keepdim=True)
        return (pixels - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] for the student's images [B, C, H, W]."""
        return self.model(self.images(images))

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)


def _channels(model: nn.Module) -> int | None:
    """What the first convolution of a model takes, as its `pretrained_cfg` may be of another number."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return None if first is None else first.in_channels


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, kind: str = "soft", multi_label: bool = False
) -> Tensor:
    """Of one of the two kinds above, mean over the batch; logits [B, classes]. 0-dim.

    multi_label: each class is a question of its own, to be answered with yes or no.
    """
    if kind == "hard":
        if multi_label:
            return F.binary_cross_entropy_with_logits(logits, (teacher_logits > 0).to(logits))
        return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    logits, teacher_logits = logits / temperature, teacher_logits / temperature
    if multi_label:
        return temperature**2 * F.binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid())
    student, teacher = F.log_softmax(logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
