"""SwAV (Caron et al. 2020, arXiv:2006.09882): from any crop, predict to which prototypes another crop was assigned.

The assignments come from Sinkhorn-Knopp over a micro-batch of all ranks and a queue of earlier embeddings. As in the
authors' code, prototypes are scaled to norm 1 in place, here after every optimiser step. Unlike there, scores are
float32, the queue advances once per optimiser step, and it is one of all ranks, so that their number may change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Method, Progress, StepOutput, encode_all, require
from trainer.methods.dino_loss import dino_loss
from trainer.nn import collectives
from trainer.nn.heads import HEAD_NORMS, HeadNorm, projection_head
from trainer.nn.precision import full_precision
from trainer.nn.sinkhorn import sinkhorn
from trainer.nn.statistics import feature_std
from trainer.schedules import shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class SwAVConfig:
    """SwAV's settings; the defaults are those of the paper's run of 800 epochs at batch 4096.

    Freeze and wait for the queue take at most a tenth of a run each.
    """

    local_crops: int = 6  # small crops of each image, which predict only
    prototypes: int = 3000
    hidden_dim: int = 2048
    out_dim: int = 128
    head_norm: HeadNorm = "batch"  # after the head's hidden layer
    temperature: float = 0.1  # of the predictions
    epsilon: float = 0.05  # of the assignments: their entropy rises with it
    sinkhorn_iterations: int = 3
    queue_length: int = 0  # earlier images that are assigned too; a multiple of the batch
    queue_start_epochs: float = 15  # after which the queue fills; it counts once it is full
    freeze_steps: int = 313  # at the start, in which the prototypes do not train

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "sinkhorn_iterations"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        for name in ("prototypes", "out_dim"):
            require(getattr(self, name) > 1, name, getattr(self, name), "2 or more, or nothing differs")
        for name in ("local_crops", "queue_length", "queue_start_epochs", "freeze_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("temperature", "epsilon"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


_EMPTY = 0.003  # of the largest entropy: so close to it that nothing is left to learn
_CROWDED = 2  # prototypes for each image that is assigned with others: beyond, most are nobody's


class SwappedPrediction(NamedTuple):
    """The loss, and the assignments' mean entropy in nats, from 0 to log K."""

    loss: Tensor
    assignment_entropy: Tensor


def swapped_prediction(scores: Tensor, queued: Tensor, config: SwAVConfig) -> SwappedPrediction:
    """The mean cross-entropy over images and over pairs of a full crop's assignment and another crop's prediction.

    `scores` is float [V + W, B, K], cosines with the prototypes, the V full crops first and the same B on every rank;
    `queued` is float [V, Q, K], those of this rank's part of the queue. Computed in float32. The mean of the ranks'
    losses is that of the global batch; no gradient reaches `queued` or passes through the assignments.
    """
    with full_precision(scores):
        views, images = len(queued), scores.shape[1]
        assigned = torch.cat([queued.detach(), scores[:views].detach()], dim=1)
        targets = sinkhorn(assigned, config.epsilon, config.sinkhorn_iterations, bound=1.0)[:, -images:]
        loss = dino_loss(scores, targets, config.temperature)  # the same sum over pairs, of other targets
        return SwappedPrediction(loss, torch.special.entr(targets).sum(-1).mean())


class SwAV(Method):
    """An encoder, a head of two layers, the prototypes, and for each full crop a queue of embeddings, newest first."""

    Config: ClassVar[type] = SwAVConfig
    least_images = 2
    backbone: nn.Module
    queue: Tensor | None

    def __init__(self, make_encoder: MakeEncoder, config: SwAVConfig) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.num_local_crops = config.local_crops
        self.backbone = make_encoder()
        features: Any = self.backbone.num_features
        dims = (features, config.hidden_dim, config.out_dim)
        self.head = projection_head(dims, config.head_norm, last_bias=True)
        self.prototypes = nn.Linear(config.out_dim, config.prototypes, bias=False)
        queue = torch.zeros(self.num_crops, config.queue_length, config.out_dim) if config.queue_length else None
        self.register_buffer("queue", queue)
        self._seen: list[Tensor] = []  # embeddings [V, B, D] of the micro-batches since the last step
        self._queue_is_full = False  # once seen to be: looking makes the host wait for the device
        self._normalise_prototypes()

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=-1))

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        features, embeddings = self._embed(views)
        full, images = views.crops.shape[:2]
        with full_precision(embeddings):
            scores = self.prototypes(embeddings)
            result = swapped_prediction(scores, self._queued_scores(progress), self.config)
        if self.training and self._fills(progress):
            self._seen.append(embeddings[:full].detach())
        logs = {
            "assignment_entropy": result.assignment_entropy,
            "kl_divergence": result.loss.detach() - result.assignment_entropy,  # of predictions from assignments
            "prototypes_used": _share_used(scores[:full].detach()),
            "feature_std": feature_std(features[: full * images]),
        }
        return StepOutput(result.loss, logs)

    def _embed(self, views: Views) -> tuple[Tensor, Tensor]:
        """Features [(V + W) * B, F] and, of norm 1, embeddings float32 [V + W, B, D], full crops first.

        One pass through the encoder for each size, one of the head.
        """
        features = encode_all(self.backbone, views)
        embeddings = F.normalize(self.head(features).float(), dim=-1)
        return features, embeddings.unflatten(0, (-1, views.crops.shape[1]))

    @classmethod
    def costlier_from(cls, config: SwAVConfig, progress: Progress) -> int:
        rows = _rows(config, progress)
        return _queue_start(config, progress) + rows // max(progress.batch_size, 1) if rows else 0

    @torch.no_grad()
    def make_costlier(self) -> None:
        if self.queue is not None:
            self.queue.copy_(F.normalize(torch.randn_like(self.queue), dim=-1))

    def _fills(self, progress: Progress) -> bool:
        """Whether the queue takes the embeddings of a step."""
        return _rows(self.config, progress) > 0 and progress.step >= _queue_start(self.config, progress)

    @torch.no_grad()
    def _queued_scores(self, progress: Progress) -> Tensor:
        """Scores [V, Q, K] of this rank's part of the queue; Q is 0 until the queue is full."""
        weight, rows = self.prototypes.weight, _rows(self.config, progress)
        if self.queue is None or not self._fills(progress) or not self._is_full(self.queue[:, :rows]):
            return weight.new_zeros(self.num_crops, 0, len(weight))
        part = self.queue[:, :rows].tensor_split(collectives.world_size(), dim=1)[collectives.rank()]
        return F.linear(part, weight)

    def _is_full(self, queue: Tensor) -> bool:
        if not self._queue_is_full:
            self._queue_is_full = bool(queue[:, -1].any())  # embeddings have norm 1
        return self._queue_is_full

    def notes(self, progress: Progress) -> list[str]:
        config = self.config
        notes = [*self._notes_of_phases(progress), *self._notes_of_queue(progress), *self._notes_of_filling(progress)]
        assigned = progress.batch_size + _rows(config, progress)
        if progress.batch_size and config.prototypes > _CROWDED * assigned:
            notes.append(
                f"{config.prototypes} prototypes for {assigned} images (batch and queue) that are assigned at once: "
                "assignments may collapse; lower method.prototypes, or raise the batch or method.queue_length"
            )
        return notes

    def _notes_of_phases(self, progress: Progress) -> list[str]:
        config = self.config
        phases = {"freeze of the prototypes": (config.freeze_steps, _freeze(config, progress))}
        if config.queue_length:
            asked = round(config.queue_start_epochs * progress.steps_per_epoch)
            phases["wait for the queue"] = (asked, _queue_start(config, progress))
        return [
            f"{name} of {asked} steps shortened to a tenth of the run, {steps} steps"
            for name, (asked, steps) in phases.items()
            if steps < asked
        ]

    def _notes_of_queue(self, progress: Progress) -> list[str]:
        asked, rows = self.config.queue_length, _rows(self.config, progress)
        if rows == asked:
            return []
        if rows == 0:
            return [f"no queue: its {asked} images are less than a batch of {progress.batch_size}"]
        return [f"queue of {asked} images shortened to {rows}, whole batches of {progress.batch_size}"]

    def _notes_of_filling(self, progress: Progress) -> list[str]:
        rows, filled = _rows(self.config, progress), self.costlier_from(self.config, progress)
        if rows == 0:
            return []
        if filled < progress.total_steps:
            return [f"queue of {rows} images is full after {filled} steps: later ones assign them too and take longer"]
        return [f"queue of {rows} images is full after {filled} steps at the earliest: this run never uses it"]

    def collapse(self, logs: dict[str, float], progress: Progress) -> str | None:
        """Also once every image is assigned to all prototypes alike, and so predicted: embeddings are the same.

        A run that has just begun looks so too, hence not before a fifth of it.
        """
        entropy, most = logs.get("assignment_entropy", 0.0), math.log(self.config.prototypes)
        agreed = abs(logs.get("kl_divergence", most)) < _EMPTY * most
        if entropy > (1 - _EMPTY) * most and agreed and progress.step * 5 >= progress.total_steps:
            return (
                f"the assignments' entropy is {entropy:.3f} of at most {most:.3f} and so predicted (collapse; a lower "
                "method.epsilon or optim.lr, method.head_norm=none or weaker views may keep it away)"
            )
        return super().collapse(logs, progress)

    def before_update(self, progress: Progress) -> None:
        """While the prototypes are frozen they have no gradient at all: neither momentum nor decay moves them."""
        if progress.step < _freeze(self.config, progress):
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> dict[str, Tensor]:
        self._normalise_prototypes()
        if self.queue is not None and self._seen:
            rows = _rows(self.config, progress)
            fresh = [collectives.gather(seen.transpose(0, 1)).transpose(0, 1) for seen in self._seen]
            self.queue[:, :rows] = torch.cat([*fresh, self.queue[:, :rows]], dim=1)[:, :rows]
        self._seen = []
        return {}


def _share_used(scores: Tensor) -> Tensor:
    """How many prototypes are the nearest of some crop, of as many as could be, for scores [V, B, K]."""
    nearest = scores.argmax(-1).flatten()
    used = torch.zeros(scores.shape[-1], device=scores.device).index_fill_(0, nearest, 1.0)
    return used.sum() / min(nearest.numel(), scores.shape[-1])


def _freeze(config: SwAVConfig, progress: Progress) -> int:
    """Steps in which the prototypes are frozen."""
    return shortened(config.freeze_steps, progress.total_steps)


def _rows(config: SwAVConfig, progress: Progress) -> int:
    """Of the queue that are in use: whole batches."""
    batch = progress.batch_size or 1
    return config.queue_length // batch * batch


def _queue_start(config: SwAVConfig, progress: Progress) -> int:
    """The step from which the queue fills."""
    return shortened(round(config.queue_start_epochs * progress.steps_per_epoch), progress.total_steps)
