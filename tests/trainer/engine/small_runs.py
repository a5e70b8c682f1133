"""Runs of a ViT of 30,000 parameters on a few dozen small images: a second each."""

import json

import torch

from trainer.engine import checkpoint
from trainer.pretrain import pretrain
from trainer.settle import Request

VIT = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}}
HEADS = {
    "simclr": {"hidden_dim": 32, "out_dim": 16},
    "barlow-twins": {"projector": [32, 32]},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 32, "local_crops": 2, "drop_path": 0.1},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "mixed-ae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "swav": {"hidden_dim": 32, "out_dim": 16, "prototypes": 24, "local_crops": 2, "queue_length": 16},
    "byol": {"hidden_dim": 32, "out_dim": 16},
    "moco-v3": {"hidden_dim": 32, "out_dim": 16},
}
SETTINGS = ["evaluation.final=false", "evaluation.every=0", "run.log_every=1", "data.workers=1", "optim.lr=1e-3"]
TIMING = ("images_per_second", "data_wait")


def request(data, out, method="simclr", *, steps=4, batch=8, resume="auto", recipe=None, **settings):
    """A call of `trainer pretrain`; `settings` are --set by their names with __ for the dot."""
    flags = {"data": {"url": str(data)}, "encoder": VIT, "run": {"max_steps": steps}}
    if batch is not None:
        flags["run"]["batch_size"] = batch
    return Request(
        method=method,
        recipe=recipe or f"{method}-digits",
        flags=flags,
        assignments=assignments(method, **settings),
        out=None if out is None else str(out),
        resume=resume,
    )


def assignments(method, **settings):
    """KEY=VALUE of a tiny run; `settings` win."""
    heads = [f"method.{name}={json.dumps(value)}" for name, value in HEADS[method].items()]
    chosen = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in settings.items()]
    return [*SETTINGS, *heads, *chosen]


def arguments(data, out, method="simclr", *, steps=4, batch=8, **settings):
    """The same call for the command line."""
    given = ["pretrain", "--method", method, "--recipe", f"{method}-digits", "--data", data, "--out", out]
    given += ["--encoder", VIT["name"], "--max-steps", steps, "--batch-size", batch]
    args = {f"encoder__args__{name}": value for name, value in VIT["args"].items()}
    for assignment in assignments(method, **args, **settings):
        given += ["--set", assignment]
    return [str(one) for one in given]


def train(data, out, method="simclr", **how):
    """Run in this process; the outcome."""
    return pretrain(request(data, out, method, **how))


def final(out):
    """The newest checkpoint of a run."""
    saved, damaged = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert not damaged
    return saved


def metrics(out):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def results(out):
    return json.loads((out / "results.json").read_text())


def assert_same_state(ours, theirs, **tolerance):
    """Weights, buffers, optimiser and all else of two checkpoints, bit for bit unless a tolerance is given."""
    assert (ours.step, ours.cursor) == (theirs.step, theirs.cursor)
    if not tolerance:
        assert (ours.data, ours.first, ours.suspicions) == (theirs.data, theirs.first, theirs.suspicions)
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours.method, theirs.method, **tolerance)
    torch.testing.assert_close(ours.optimiser["state"], theirs.optimiser["state"], **tolerance)


def assert_same_run(ours, theirs):
    """Final checkpoint and metrics of two run folders are equal."""
    assert_same_state(final(ours), final(theirs))
    assert metrics(ours) == metrics(theirs)
