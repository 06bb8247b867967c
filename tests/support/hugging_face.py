"""Small models of transformers, with weights that make every part matter."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "attn_implementation": "sdpa",  # the eager one has its softmax in float32
}
VIT, DINO2 = {**SMALL, "intermediate_size": 48}, {**SMALL, "mlp_ratio": 2}
DINO3 = {**VIT, "num_register_tokens": 3}


def made(family, head, settings, seed=0, **more):
    """A model of transformers in float64 and eval mode with weights that make every part matter."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}{head}")(config, **more).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model
