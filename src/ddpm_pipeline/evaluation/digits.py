"""A small classifier of scikit-learn's handwritten digits: the feature extractor that `--features digits` names.

Images are [B, 1, 8, 8] in [-1, 1]. Imports torch and scikit-learn.
"""

from functools import lru_cache

import torch
from torch import nn

NUM_CLASSES = 10
MAX_GREY = 16  # the digits have 17 grey levels, 0 to 16
HELD_OUT_FRACTION = 0.25
TRAINING_STEPS = 400
BATCH_SIZE = 128


class DigitsClassifier(nn.Module):
    """A convolutional classifier of 8x8 digits, with `num_features` penultimate features."""

    num_features = 64
    held_out_accuracy = held_out_top_probability = float("nan")  # in [0, 1], of real digits that it was not fitted on

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),  # [B, 32, 8, 8] -> [B, 64, 4, 4]
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, self.num_features),
            nn.SiLU(),  # a ReLU leaves features dead, and their covariance singular
        )
        self.head = nn.Linear(self.num_features, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, 64] of images [B, 1, 8, 8] in [-1, 1]."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8] in [-1, 1]."""
        return self.head(self.features(images))


@lru_cache(maxsize=1)
def load_digits_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 real digits: images [N, 1, 8, 8] float32 in [-1, 1], labels [N] int64 in 0..9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (2 / MAX_GREY) - 1
    return images, torch.from_numpy(digits.target).long()


@lru_cache(maxsize=4)
def fit_digits_classifier(seed: int = 0) -> DigitsClassifier:
    """The classifier, fitted in seconds on three quarters of the real digits; in eval mode, with frozen weights.

    The same seed gives the same classifier; the global generator is left as it was.
    """
    images, labels = load_digits_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    num_held_out, num_threads = int(HELD_OUT_FRACTION * len(images)), torch.get_num_threads()
    fitted, held_out = order[num_held_out:], order[:num_held_out]
    # initial weights, batches and dropout draw from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # sums in one order whatever the core count; work this small loses little
        classifier = DigitsClassifier()
        try:
            _fit(classifier, images[fitted], labels[fitted])
        finally:
            torch.set_num_threads(num_threads)
    classifier.eval().requires_grad_(False)
    top_probability, predicted = classifier(images[held_out]).softmax(dim=1).max(dim=1)
    classifier.held_out_accuracy = (predicted == labels[held_out]).double().mean().item()
    classifier.held_out_top_probability = top_probability.double().mean().item()
    return classifier


def _fit(classifier: DigitsClassifier, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Train in place with AdamW and a one-cycle learning rate, on images blurred by a little noise."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        noisy = images[batch] + 0.1 * torch.randn_like(images[batch])
        loss = nn.functional.cross_entropy(classifier(noisy), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
