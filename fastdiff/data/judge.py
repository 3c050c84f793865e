"""Judging generated digits: a small classifier, and the Fréchet distance between sets of images in its features.

The two say different things. Accuracy asks whether each picture can be read, and blurry class means can be read best;
the Fréchet distance compares the *distribution* of generated and real pictures, blur and lack of variety included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.digits import Digits

__all__ = ["DigitJudge", "frechet_distance", "train_digit_judge"]


class DigitJudge(nn.Module):
    """A convolutional classifier of 8x8 digits; its last hidden layer (32 values) is the feature space.

    32 features because a covariance estimated from some 450 pictures is still reliable there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 32),
        )
        self.head = nn.Linear(32, 10)

    def features(self, images: Tensor) -> Tensor:
        """[B,1,8,8] in [-1, 1] -> [B,32]."""
        features: Tensor = self.trunk(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """[B,1,8,8] in [-1, 1] -> logits [B,10]."""
        logits: Tensor = self.head(F.gelu(self.features(images)))
        return logits

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that are read as their label, in [0, 1]."""
        return float((self(images).argmax(-1) == labels).float().mean())


def train_digit_judge(train: Digits, *, epochs: int = 15, batch_size: int = 64, seed: int = 0) -> DigitJudge:
    """Trains the classifier on real digits, with a little noise on the pixels; about two seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = DigitJudge()
        steps = epochs * ((len(train.labels) + batch_size - 1) // batch_size)
        optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(train.labels)), batch_size):
                images = train.images[index]
                logits = judge(images + 0.2 * torch.randn_like(images))
                loss = F.cross_entropy(logits, train.labels[index], label_smoothing=0.05)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    return judge.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of feature vectors (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), computed in float64.

    Args:
        a: [N,D], N > 1.
        b: [M,D], M > 1.

    Returns:
        The (squared) distance, 0 or more. It is biased upwards for small sets, so compare sets of equal size.

    Raises:
        ValueError: the shapes do not fit.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"[frechet_distance] a, b: expected [N,D] and [M,D], N, M > 1, got {[*a.shape]}, {[*b.shape]}")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    # tr (C_a C_b)^(1/2) through the symmetric C_a^(1/2) C_b C_a^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, float(distance))
