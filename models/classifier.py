"""Digit classifier. The metrics use its features and its predictions."""

from torch import nn

from models.common import IMAGE_SHAPE, NUM_CLASSES, checked


class Classifier(nn.Module):
    """Small convolutional network of two stages for (N, 1, 28, 28) images in [0, 1], grey or binary."""

    def __init__(self, channels=(32, 64), num_features=64):
        super().__init__()
        stages, inputs = [], 1
        for width in channels:
            for _ in range(2):
                stages.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                stages += [nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            stages.append(nn.MaxPool2d(2))  # halves the image
        self.stages = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.3))
        self.to_features = nn.Sequential(nn.Linear(inputs * 7 * 7, num_features), nn.ReLU())
        self.to_logits = nn.Linear(num_features, NUM_CLASSES)

    def features(self, x):
        """Return the features (N, num_features) of images x (N, 1, 28, 28)."""
        return self.to_features(self.stages(checked("x", x, ("N", *IMAGE_SHAPE), self.to_logits.weight)))

    def forward(self, x):
        """Return the logits (N, 10) of images x (N, 1, 28, 28)."""
        return self.to_logits(self.features(x))
