"""The benchmark of MixedAE trains all of its parts against MAE."""

from trainer.bench import masked
from trainer.bench.figures import Settings
from trainer.nn.encoders import EncoderConfig

TINY = EncoderConfig(name="vit_tiny_patch16_224", args={"patch_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2})


def test_figures():
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    figures = masked.measure(Settings(rounds=2), lambda text: None, TINY, **decoder)
    assert [figure.baseline_name for figure in figures] == ["MAE"] * len(masked.PARTS)
    assert all(figure.ratio > 0 for figure in figures)
    assert [figure.goal is not None for figure in figures] == [False] * 4 + [True]
