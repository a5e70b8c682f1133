"""Which settings a policy reads: all that change what it shows, and no others."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from manifests.errors import UsageError
from tests.trainer.data.builders import open_pairs, write_pairs
from trainer.data import mixing
from trainer.data.mixing import POLICIES, MixConfig, check_read
from trainer.data.mixing.unread import settings_of

ROWS, K = 40, 3
# A value of every setting that would show, if the policy read it: with `PLAIN`, where everything is random.
PLAIN = {
    "synthetic_view": "random",
    "probability": 0.5,
    "same_variation": False,
    "first_epochs": 2,
    "weight": "similarity",
}
OTHER = {
    "synthetic_view": "first",
    "probability": 1.0,
    "variation": 0,
    "augment_synthetic": False,
    "synthetic_crops": 2,
    "synthetic_local_crops": 3,
    "same_variation": True,
    "replicas": 2,
    "first": "real",
    "first_epochs": 3,
    "weight": None,
    "weight_power": 3.0,
}
EVERY = tuple(item.name for item in fields(MixConfig) if item.name != "policy")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A pair set, and where another one lies."""
    folder = tmp_path_factory.mktemp("sets")
    return open_pairs(folder / "pairs", ROWS, variations=K), write_pairs(folder / "generated", 9, variations=K)


def shown(rows, **settings):
    """All that is shown in four epochs."""
    policy = mixing.make(MixConfig(**settings), rows)
    items = np.arange(policy.num_items)
    found = [policy.assign(items, epoch, 3, 2, 4) for epoch in range(4)]
    return [np.concatenate([part.ravel() for part in one]).tolist() for one in found]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EVERY)
def test_a_policy_reads_what_changes_what_it_shows(sets, policy, name):
    rows, generated = sets
    other = {**OTHER, "generated": generated}[name]
    changes = shown(rows, **PLAIN, policy=policy) != shown(rows, **{**PLAIN, name: other}, policy=policy)
    assert changes == (name in settings_of(MixConfig(policy=policy, weight="similarity")))


def test_every_setting_is_read_by_a_policy():
    for name in EVERY:
        assert any(name in settings_of(MixConfig(policy=policy, weight="similarity")) for policy in POLICIES), name


def test_what_nothing_reads_is_refused():
    diffmix, inflate = MixConfig(), MixConfig(policy="inflate")
    for section in (None, {}, {"policy": "diffmix"}, {"probability": 0.5}):
        check_read(section, [diffmix])
    check_read({"replicas": 2, "probability": 0.5}, [diffmix, inflate])
    with pytest.raises(UsageError, match=r"mix.replicas has no effect with --mix diffmix: it is read by inflate"):
        check_read({"replicas": 2}, [diffmix])
    with pytest.raises(UsageError, match=r"mix.weight_power is read with mix.weight only"):
        check_read({"weight_power": 2}, [diffmix, inflate])
    check_read({"weight_power": 2}, [MixConfig(weight="similarity"), inflate])
