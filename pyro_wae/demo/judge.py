"""A small classifier of digits, by which samples are judged: which digit it reads, and how far its features are."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class DigitClassifier(nn.Module):
    """A small classifier of digits (LeNet), whose last hidden layer is the feature space of the Frechet distance.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998,
    doi:10.1109/5.726791.
    """

    num_features = 84

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 5 * 5, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 1, 28, 28) to features (n, 84)."""
        return self.features(x)

    def learn(self, images: Tensor, labels: Tensor, *, epochs: int = 8, batch_size: int = 100) -> "DigitClassifier":
        """Trains features and head, then freezes them."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        steps = epochs * -(-len(images) // batch_size)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), device=images.device).split(batch_size):
                optimizer.zero_grad()
                cross_entropy(self.head(self(images[batch])), labels[batch]).backward()
                optimizer.step()
                scheduler.step()
        return self.requires_grad_(False).eval()

    def probabilities(self, images: Tensor) -> Tensor:
        """The probability of each class for each image, shape (n, 10)."""
        return self.head(self(images)).softmax(1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images whose most probable class is their label."""
        return (self.probabilities(images).argmax(1) == labels).double().mean().item()

    @torch.no_grad()
    def frechet_distance(self, images: Tensor, others: Tensor) -> float:
        """The Frechet distance of the features of two sets of images."""
        features = (torch.cat([self(part) for part in rows.split(500)]) for rows in (images, others))
        return frechet_distance(*features)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Frechet distance of two sets of rows, ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of means and covariances.

    Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule
    Converge to a Local Nash Equilibrium", 2017, arXiv:1706.08500.
    """
    (mean, root), (other_mean, other_root) = (_moments(rows.double()) for rows in (features, others))
    # tr (C C')^(1/2) is the sum of the singular values of C^(1/2) C'^(1/2).
    overlap = torch.linalg.matrix_norm(root @ other_root, "nuc")
    return ((mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * overlap).item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and the symmetric root of the covariance."""
    values, vectors = torch.linalg.eigh(features.T.cov())
    return features.mean(0), vectors * values.clamp(min=0).sqrt() @ vectors.T
