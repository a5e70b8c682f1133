"""How good the embedded checkpoint is, on digits that it never saw.

Class preservation asks an independent judge, a small CNN trained WITH the labels of the real train split, whether a
variation still shows the digit of its source. The distances say whether variations differ from each other, and
whether they are copies of training images. Labels are used here and nowhere in training.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImageVariationPipeline
from torch import Tensor, nn

from pipeline.embedded import digits, views

STEPS, GUIDANCE = 10, 2.0  # the generator's defaults for this checkpoint


def measure(
    pipeline: StableDiffusionImageVariationPipeline,
    *,
    num_sources: int = 360,
    variations: int = 2,
    judge_steps: int = 400,
    seed: int = 0,
) -> dict[str, float]:
    """Figures of two or more variations of the first `num_sources` test digits: see `preservation` and `distances`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train_images, train_labels = split("train")
        images, labels = split("test")
        judge = train_judge(train_images, train_labels, judge_steps)
        accuracy = (predict(judge, images) == labels).float().mean().item()
        images, labels = images[:num_sources], labels[:num_sources]
        drawn = torch.stack([vary(pipeline, images, seed=seed + number) for number in range(variations)])
        return {
            "sources": len(images),
            "variations_per_source": variations,
            "judge_accuracy": accuracy,
            **preservation(judge, drawn, labels),
            **distances(drawn, images, train_images),
        }


def preservation(judge: nn.Module, drawn: Tensor, labels: Tensor) -> dict[str, float]:
    """How often variations, grey float [V, N, 1, H, W], show their source's label, int64 [N], to the judge.

    The standard error counts sources, not variations: two variations of one digit fail together.
    """
    kept = torch.stack([predict(judge, batch) == labels for batch in drawn]).float().mean(dim=0)
    return {
        "preserved": kept.mean().item(),
        "preserved_standard_error": (kept.std() / len(kept) ** 0.5).item(),
    }


def distances(drawn: Tensor, images: Tensor, train_images: Tensor, num_views: int = 24) -> dict[str, float]:
    """RMS distances, black to white being 1, of variations [V, N, 1, H, W] of real images [N, 1, H, W].

    A memorised training image would lie as near to some view of the train split as `rms_train_views_to_train`; a new
    digit lies as far as `rms_real_test_to_train`.
    """
    views_of_train = torch.cat([views.mild(train_images) for _ in range(num_views)])
    fresh = views.mild(train_images[: len(images)])
    return {
        "rms_between_variations": rms(drawn[0], drawn[1]),
        "rms_to_source": rms(drawn[0], images),
        "rms_variations_to_train": rms_to_nearest(drawn[0], views_of_train),
        "rms_real_test_to_train": rms_to_nearest(images, views_of_train),
        "rms_test_views_to_train": rms_to_nearest(views.mild(images), views_of_train),
        "rms_train_views_to_train": rms_to_nearest(fresh, views_of_train),
    }


def load(folder: Path) -> StableDiffusionImageVariationPipeline:
    """The saved pipeline, in float32 on the CPU: `train.save` sees to it that no dtype need be named."""
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def vary(
    pipeline: StableDiffusionImageVariationPipeline,
    grey: Tensor,
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """One variation, grey float [N, 1, 32, 32] in 0-1, of each grey float [N, 1, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    parts = [pipeline(image=views.clip_input(part), generator=generator, **settings).images for part in grey.split(64)]
    return torch.cat(parts).mean(dim=1, keepdim=True)


def split(name: digits.Split) -> tuple[Tensor, Tensor]:
    """Grey float32 [N, 1, 32, 32] in 0-1 and labels int64 [N]."""
    images, labels, _ = digits.load(name)
    return views.as_grey(images), torch.from_numpy(labels)


def train_judge(images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """A classifier of grey [N, 1, 32, 32], trained on views of real labelled digits."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    judge = nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(1024, 10))
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        optimiser.zero_grad()
        F.cross_entropy(judge(views.mild(images[rows])), labels[rows]).backward()
        optimiser.step()
        decay.step()
    return judge.eval()


@torch.no_grad()
def predict(judge: nn.Module, images: Tensor) -> Tensor:
    """The judge's class, int64 [N]."""
    return judge(images).argmax(dim=1)


def rms(first: Tensor, second: Tensor) -> float:
    """Mean over images of the root mean square difference of pixels."""
    return (first - second).square().mean(dim=(1, 2, 3)).sqrt().mean().item()


def rms_to_nearest(images: Tensor, references: Tensor) -> float:
    """Mean over images of the RMS distance to the nearest reference."""
    flat, others = images.flatten(1), references.flatten(1)
    nearest = torch.cat([torch.cdist(part, others).amin(dim=1) for part in flat.split(128)])
    return (nearest / flat.shape[1] ** 0.5).mean().item()
