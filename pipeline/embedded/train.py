"""Trains the embedded checkpoint: `python -m pipeline.embedded.train --out DIR`, about twenty minutes on one core.

Four stages, none of which sees a label or a test digit: an autoencoder (the latent space), a CLIP vision encoder by
SimCLR (the condition), cached views of every training digit, and a UNet that denoises one view's latents given the
embedding of ANOTHER view of the same digit, so that copying its source is not the best it can do.

The encoder is frozen while the UNet trains: trained jointly from scratch at this budget, the UNet learns to ignore it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from pipeline.embedded import digits, models, views


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long each stage trains; the defaults take about twenty minutes on one core."""

    vae_steps: int = 700
    encoder_steps: int = 800
    cached_views: int = 24  # per digit
    unet_steps: int = 2400

    def scaled(self, factor: float) -> Budget:
        """Every count times `factor`, at least 2."""
        values = {name: max(2, round(factor * getattr(self, name))) for name in self.__slots__}
        return Budget(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What the UNet trains on: V mild views of N digits."""

    latents: Tensor  # float32 [N, V, 4, 8, 8], unit variance
    embeddings: Tensor  # float32 [N, V, 64]


def train(budget: Budget, seed: int = 0) -> StableDiffusionImageVariationPipeline:
    """The trained pipeline, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = views.as_grey(digits.load("train")[0])
        vae = train_vae(images, budget.vae_steps)
        encoder = train_encoder(images, budget.encoder_steps)
        centre_embeddings(encoder, images)
        cache = cache_views(vae, encoder, images, budget.cached_views)
        unet = train_unet(cache, budget.unet_steps)
    return models.assemble(vae, encoder, unet)


def train_vae(images: Tensor, steps: int) -> AutoencoderKL:
    """An autoencoder of mild views, its `scaling_factor` set so that latents have unit variance."""
    vae = models.autoencoder().to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        batch = views.vae_input(views.mild(_pick(images, 32)))
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        return F.mse_loss(restored, batch) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    _descend("autoencoder", vae.parameters(), loss, steps=steps, peak=2e-3)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        means = vae.encode(views.vae_input(views.mild(images[:512]))).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / means.std().item())
    return vae


def train_encoder(images: Tensor, steps: int) -> CLIPVisionModelWithProjection:
    """A CLIP vision encoder that tells digits apart but not their views: SimCLR (Chen et al., 2020), no labels."""
    encoder = models.image_encoder()
    head = nn.Sequential(nn.Linear(models.EMBEDDING, 128), nn.ReLU(), nn.Linear(128, 64))

    def loss() -> Tensor:
        batch = _pick(images, 128)
        pair = torch.cat([views.strong(batch), views.strong(batch)])
        return contrast(head(encoder(views.clip_input(pair)).image_embeds), temperature=0.1)

    _descend("encoder", [*encoder.parameters(), *head.parameters()], loss, steps=steps, peak=3e-3)
    return encoder.eval().requires_grad_(False)


def contrast(embeddings: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of float [2N, D] whose row i and row i + N (modulo 2N) are views of one image."""
    unit = F.normalize(embeddings, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(unit)).roll(len(unit) // 2)
    return F.cross_entropy(logits, positives)


@torch.no_grad()
def centre_embeddings(encoder: CLIPVisionModelWithProjection, images: Tensor) -> None:
    """Give the embeddings mean 0 and standard deviation 1 per dimension over mild views, by changing weights only.

    A contrastive encoder's embeddings share one large common part; without it the condition is easy to read, and the
    all-zero unconditional embedding of classifier-free guidance is the mean digit. The projection has no bias, so the
    mean is taken off in the layer norm before it.
    """
    pooled = torch.cat(
        [encoder.vision_model(views.clip_input(part)).pooler_output for part in views.mild(images).split(256)]
    )
    encoder.vision_model.post_layernorm.bias -= pooled.mean(dim=0)
    projected = encoder.visual_projection(pooled - pooled.mean(dim=0))
    encoder.visual_projection.weight /= projected.std(dim=0).unsqueeze(1)


@torch.no_grad()
def cache_views(vae: AutoencoderKL, encoder: CLIPVisionModelWithProjection, images: Tensor, count: int) -> Cache:
    """Latents and embeddings of `count` mild views of each digit."""
    latents, embeddings = [], []
    for _ in _reported("views", count):
        batch = views.mild(images)
        latents.append(torch.cat([vae.encode(views.vae_input(part)).latent_dist.mean for part in batch.split(128)]))
        embeddings.append(torch.cat([encoder(views.clip_input(part)).image_embeds for part in batch.split(128)]))
    return Cache(
        latents=torch.stack(latents, dim=1) * vae.config.scaling_factor, embeddings=torch.stack(embeddings, dim=1)
    )


def train_unet(cache: Cache, steps: int) -> UNet2DConditionModel:
    """The noise predictor: the moving average of its weights over training."""
    unet = models.unet().to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    noising = DDPMScheduler.from_config(models.scheduler().config)

    def loss() -> Tensor:
        latents, condition = _other_views(cache, 64)
        condition = condition * (torch.rand(len(condition), 1, 1) >= 0.1)  # dropped: for classifier-free guidance
        noise = torch.randn_like(latents)
        times = torch.randint(noising.config.num_train_timesteps, (len(latents),))
        return F.mse_loss(unet(noising.add_noise(latents, noise, times), times, condition).sample, noise)

    def follow(step: int) -> None:
        decay = min(0.998, (1 + step) / (10 + step))
        for slow, fast in zip(average.parameters(), unet.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    _descend("unet", unet.parameters(), loss, steps=steps, peak=1.5e-3, after=follow)
    return average


def _other_views(cache: Cache, size: int) -> tuple[Tensor, Tensor]:
    """Latents [size, 4, 8, 8] of random views, and the embeddings [size, 1, 64] of other views of the same digits."""
    count, num_views = cache.latents.shape[:2]
    rows, view = torch.randint(count, (size,)), torch.randint(num_views, (size,))
    other = (view + torch.randint(1, num_views, (size,))) % num_views
    return cache.latents[rows, view], cache.embeddings[rows, other].unsqueeze(1)


def _pick(images: Tensor, size: int) -> Tensor:
    """A random batch without repeats."""
    return images[torch.randperm(len(images))[:size]]


def _descend(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    peak: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW on fresh losses; the rate rises to `peak` over the first tenth, then falls to zero on a half cosine."""
    weights = list(parameters)
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01)
    for step in _reported(name, steps):
        progress = (step + 1) / (steps + 1)
        rate = peak * min(10 * progress, 0.5 + 0.5 * float(np.cos(np.pi * max(0.0, (progress - 0.1) / 0.9))))
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            after(step)
        if (step + 1) % 100 == 0:
            click.echo(f"{name}: step {step + 1}, loss {value.item():.4f}", err=True)


def _reported(name: str, count: int) -> Iterable[int]:
    """`range(count)`, saying afterwards how long it took."""
    start = time.perf_counter()
    yield from range(count)
    click.echo(f"{name}: {count} steps in {time.perf_counter() - start:.0f} s", err=True)


# What `pipeline generate` runs the checkpoint with, unless told otherwise.
DEFAULTS = {"steps": 10, "guidance_scale": 2.0, "scheduler": "dpm++"}


def save(pipeline: StableDiffusionImageVariationPipeline, folder: Path) -> None:
    """Write float16 weights in diffusers format, readable by everyone and free of this machine's paths."""
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for path in sorted(folder.rglob("*.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if "dtype" in settings:
            # transformers loads in the dtype named here, diffusers always in float32: a plain `from_pretrained` works
            # only when they agree.
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    defaults = json.dumps(DEFAULTS, indent=2, sort_keys=True) + "\n"
    (folder / "diffmix.json").write_text(defaults, encoding="utf-8")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to write it.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scale", default=1.0, show_default=True, help="Multiplies every stage's length.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(out: Path, seed: int, scale: float, threads: int) -> None:
    """Train the embedded checkpoint, save it, and measure what was saved on digits that it never saw."""
    from pipeline.embedded import measure

    torch.set_num_threads(threads)
    save(train(Budget().scaled(scale), seed), out)
    sources = max(10, min(360, round(360 * scale)))
    report = measure.measure(measure.load(out), num_sources=sources, judge_steps=max(2, min(400, round(400 * scale))))
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
