"""D of eq. 8, a patch discriminator a modality, and the two forms of the adversarial term."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.models.layers import group_norm

Adversarial = Literal["log", "hinge"]


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): one logit for each overlapping patch, 46 pixels wide with three stages.

    GroupNorm instead of BatchNorm: real and rebuilt images are judged apart, and nothing is remembered between steps.
    """

    def __init__(self, channels: int, width: int = 32, stages: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(stages - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
                group_norm(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        """Image (B,C,H,W) in [0,1] -> logits (B,1,H/8-1,W/8-1) with three stages; sigmoid of them is D(I)."""
        return self.layers(2 * image - 1)


def discriminator_loss(real: Tensor, rebuilt: Tensor, form: Adversarial) -> Tensor:
    """What D descends, from logits of any shape.

    log: -(mean log D(I) + mean log(1 - D(I^))), eq. 8 negated. hinge: mean max(0, 1 - D(I)) + mean max(0, 1 + D(I^))
    on the bare logits (arXiv 1705.02894).
    """
    if form == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + rebuilt).mean()
    # log sigmoid(x) and log(1 - sigmoid(x)) = log sigmoid(-x) never overflow
    return -(F.logsigmoid(real).mean() + F.logsigmoid(-rebuilt).mean())


def generator_loss(rebuilt: Tensor, form: Adversarial) -> Tensor:
    """What G descends, from the logits of rebuilt images.

    log: mean log(1 - D(I^)), the part of eq. 8 that depends on G, exactly as printed (so it saturates where D is
    sure; the adaptive weight makes up for that). hinge: -mean D(I^).
    """
    return -rebuilt.mean() if form == "hinge" else F.logsigmoid(-rebuilt).mean()


def adaptive_weight(reconstruction: Float[Tensor, "*shape"], adversarial: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """lambda of VQ-GAN (arXiv 2012.09841, eq. 7): |grad L_rec| / (|grad L_adv| + 1e-6), at most 1e4, no gradient.

    Both gradients are taken with respect to the last layer of G; any one shape.
    """
    ratio = torch.linalg.vector_norm(reconstruction) / (torch.linalg.vector_norm(adversarial) + 1e-6)
    return ratio.clamp(max=1e4).detach()
