import json
import os
import shutil
from dataclasses import replace

import pytest
import timm
import torch

from manifests.errors import UsageError
from tests.trainer.engine.small_runs import VIT
from trainer.finetune.origin import newest_run, open_origin
from trainer.nn.encoders import EncoderConfig, make_encoder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_run_gives_its_encoder_its_images_and_its_data(init):
    origin = open_origin(init, None)
    assert origin.size == 32
    assert origin.mean == (0.5, 0.5, 0.5)
    assert origin.data_url.endswith("pairs")
    encoder, note = origin.make()
    plain = timm.create_model(f"local-dir:{init}/encoder", pretrained=True).eval()
    assert torch.equal(encoder.eval()(IMAGES), plain(IMAGES))
    assert str(init) in note
    assert origin.results["state"] == "finished"


@pytest.mark.parametrize("how", ["encoder/", "timm:local-dir:"])
def test_an_exported_folder_is_as_good(init, how):
    spec = f"{init}/encoder" if how == "encoder/" else f"timm:local-dir:{init}/encoder"
    encoder, _ = open_origin(spec, None).make()
    expected, _ = open_origin(init, None).make()
    assert torch.equal(encoder.eval()(IMAGES), expected.eval()(IMAGES))


def test_another_size_is_resampled(init):
    encoder, _ = open_origin(init, None, size=64).make()
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 32)


def changed(init, **changes):
    return replace(open_origin(init, None), changes=changes)


def test_another_pooling_has_a_norm_of_its_own(tmp_path):
    config = EncoderConfig(name=VIT["name"], args=VIT["args"])
    file = tmp_path / "weights.pth"
    trained = make_encoder(config, 32)
    torch.nn.init.normal_(trained.norm.weight)
    torch.save(trained.state_dict(), file)
    origin = open_origin(str(file), config, size=32)
    encoder, note = replace(origin, changes={"global_pool": "avg", "drop_path_rate": 0.5}).make()
    assert note.endswith(", fc_norm new and untrained, norm left out")
    tokens = trained.eval()._modules["blocks"](trained._pos_embed(trained.patch_embed(IMAGES)))
    expected = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(encoder.eval()(IMAGES), expected)
    torch.manual_seed(0)
    assert not torch.allclose(encoder.train()(IMAGES), expected), "paths are dropped"


def test_dropping_paths_alone_changes_no_weight(init):
    trained, before = open_origin(init, None).make()
    encoder, note = changed(init, drop_path_rate=0.5).make()
    assert note == before
    assert torch.equal(encoder.eval()(IMAGES), trained.eval()(IMAGES))


@pytest.mark.parametrize("change", [{"depth": 1}, {"depth": 3}, {"reg_tokens": 2}, {"mlp_ratio": 2.0}])
def test_a_change_that_would_leave_weights_untrained_is_refused(init, change):
    with pytest.raises(UsageError, match="would leave trained weights without use, or others untrained: "):
        changed(init, **change).make()


def test_a_timm_name_brings_timms_statistics():
    origin = open_origin("timm:vit_tiny_patch16_224", None)
    assert (origin.size, origin.mean) == (224, (0.5, 0.5, 0.5))
    assert origin.data_url is None


def test_a_file_needs_to_be_told_its_network(tmp_path):
    config = EncoderConfig(name=VIT["name"], args=VIT["args"])
    file = tmp_path / "weights.pth"
    torch.save(make_encoder(config, 32).state_dict(), file)
    with pytest.raises(UsageError, match=r"--set encoder\.name=NAME"):
        open_origin(str(file), None)
    encoder, _ = open_origin(str(file), config, size=32).make()
    assert torch.equal(encoder.state_dict()["norm.weight"], torch.load(file)["norm.weight"])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nowhere", "there is no such file or folder"),
        ("resnet18", "did you mean timm:resnet18"),
        ("timm:resnet181", "did you mean"),
        ("timm:hf-hub:someone/something", r"add --set encoder\.name=NAME"),
    ],
)
def test_what_is_not_there_is_named(init, message):
    with pytest.raises(UsageError, match=message):
        open_origin(init, None)


def test_a_folder_without_encoder_and_a_damaged_one(init, tmp_path):
    with pytest.raises(UsageError, match="holds no encoder"):
        open_origin(str(tmp_path), None)
    copied = tmp_path / "run"
    shutil.copytree(init, copied)
    (copied / "encoder" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(UsageError, match="is damaged"):
        open_origin(str(copied), None)


def test_the_newest_finished_run_is_the_default(init, tmp_path):
    with pytest.raises(UsageError, match="no finished pre-training run"):
        newest_run(str(tmp_path))
    shutil.copytree(init, tmp_path / "older")
    shutil.copytree(init, tmp_path / "newer")
    shutil.copytree(init, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "results.json").unlink()
    shutil.copytree(init, tmp_path / "tuned")  # a comparison is no pre-training run, even if it is newer
    shutil.rmtree(tmp_path / "tuned" / "encoder")
    for age, name in enumerate(("tuned", "newer", "older")):
        results = tmp_path / name / "results.json"
        stamp = results.stat().st_mtime - 100 * age
        os.utime(results, (stamp, stamp))
    assert newest_run(str(tmp_path)) == str(tmp_path / "newer")
