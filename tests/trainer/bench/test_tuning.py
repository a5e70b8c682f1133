"""The tuning benchmark compares networks that compute and train the same, and counts what a step keeps."""

import torch
from torch import nn

from trainer.bench import tuning
from trainer.bench.figures import Settings
from trainer.nn.encoders import EncoderConfig

TINY = EncoderConfig(name="vit_tiny_patch16_224", args={"patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2})


def test_the_model_by_hand_learns_exactly_what_the_tuner_does():
    tuner = tuning._tuner(TINY, "block-expansion:2")
    by_hand = tuning.deeper_by_hand(TINY, tuner)
    count = sum(value.numel() for value in by_hand.parameters() if value.requires_grad)
    assert count == tuner.num_trainable
    images = torch.randn(2, 3, tuning.SIZE, tuning.SIZE)
    assert torch.equal(by_hand(images), tuner.model(images))
    for model in (by_hand, tuner.model):
        tuning.step(model)()
    torch.testing.assert_close(by_hand(images), tuner.model(images))


def test_what_a_linear_layer_keeps():
    """Its input for the weight's gradient, its output for the square's, and three times its weights."""

    class Flat(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    inputs, outputs = 3 * tuning.SIZE**2, 7
    kept = tuning.kept_bytes(Flat(inputs, outputs))
    assert kept == 4 * (tuning.IMAGES * (inputs + outputs) + 3 * (inputs + 1) * outputs)


def test_figures():
    time, memory = tuning.measure(Settings(rounds=2), lambda text: None, TINY, new_blocks=1)
    assert time.ratio > 0 and time.goal.bound == 1 / 1.03
    assert memory.ratio > 1
