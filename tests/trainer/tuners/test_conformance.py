"""What holds of every tuner; a new one is covered by its line in TUNERS."""

import json

import pytest
import torch

from manifests.errors import DiffmixError, UsageError
from tests.trainer.tuners.small import RESNET, VIT, encoder, features, images, state, train, tuner
from trainer.nn.encoders import make_encoder
from trainer.tuners import TUNERS
from trainer.tuners.base import Tuner

OWN = {"last-blocks": "last-blocks:2", "lora": "lora:4", "block-expansion": "block-expansion:2"}
BY_PEFTS_NAME = ("dora:2", "ia3", "loha:2", "lokr:2", "ln-tuning", "delora:2", "fourierft")
ROWS = [OWN.get(name, name) for name in TUNERS] + list(BY_PEFTS_NAME)
WITH_ADAPTERS = [text for text in ROWS if text not in ("full", "linear", "last-blocks:2")]

every = pytest.mark.parametrize("text", ROWS)
adapters = pytest.mark.parametrize("text", WITH_ADAPTERS)


def same(first, second):
    """Whether two state dicts are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@every
def test_identity_at_the_start(text):
    adapted = tuner(text)
    assert isinstance(adapted, Tuner)
    difference = (features(adapted.model) - features(encoder())).abs().max()
    assert difference <= (2e-6 if text.startswith("dora") else 0)  # DoRA divides by a norm and multiplies by it again


@every
def test_trained_parameters_move_and_all_others_stay(text):
    adapted = tuner(text)
    trained, before = {name for name, _ in adapted.trainable()}, state(adapted.model)
    assert sum(before[name].numel() for name in trained) == adapted.num_trainable
    train(adapted)
    for name, value in adapted.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert torch.equal(features(adapted.model), features(encoder())) == (text == "linear")


@adapters
def test_the_encoders_own_parameters_are_frozen(text):
    adapted = tuner(text)
    own = {id(value) for name, value in adapted.encoder.named_parameters() if name in encoder().state_dict()}
    assert not own & {id(value) for _, value in adapted.trainable()}
    assert 0 < adapted.num_trainable < sum(value.numel() for value in encoder().parameters())


@adapters
def test_disabled_is_exactly_the_original(text):
    adapted = train(tuner(text))
    trained = features(adapted.model)
    names = [name for name, _ in adapted.trainable()]
    with adapted.disabled():
        assert torch.equal(features(adapted.model), features(encoder()))
    assert torch.equal(features(adapted.model), trained)
    assert [name for name, _ in adapted.trainable()] == names


@every
def test_saved_and_loaded_into_a_fresh_encoder(text, tmp_path):
    adapted = train(tuner(text))
    adapted.save(tmp_path / "saved")
    fresh = tuner(text, seed=1)
    fresh.load(tmp_path / "saved", "another" if fresh.has_adapters else "default")
    assert torch.equal(features(fresh.model), features(adapted.model))
    assert {name.replace(".another", "") for name, _ in fresh.trainable()} == {
        name.replace(".default", "") for name, _ in adapted.trainable()
    }
    fresh = tuner(text, seed=2)
    fresh.load(tmp_path / "saved")
    assert torch.equal(features(fresh.model), features(adapted.model))


@every
def test_a_save_holds_what_was_trained_and_replaces_an_older_one(text, tmp_path):
    adapted = train(tuner(text))
    adapted.save(tmp_path)
    first = sorted(path.name for path in tmp_path.iterdir())
    train(adapted).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == first
    weights = next(tmp_path.glob("*.safetensors")).stat().st_size
    assert weights < 8 * (4 * adapted.num_trainable + 10_000)
    fresh = tuner(text)
    fresh.load(tmp_path)
    assert torch.equal(features(fresh.model), features(adapted.model))


@every
def test_a_folder_without_its_last_file_does_not_load(text, tmp_path):
    adapted = tuner(text)
    adapted.save(tmp_path)
    description = next(tmp_path.glob("*.json"))
    kept = description.read_text()
    description.unlink()
    with pytest.raises(DiffmixError, match="cut off"):
        adapted.load(tmp_path)
    description.write_text(kept[: len(kept) // 2])
    with pytest.raises(DiffmixError, match="damaged"):
        adapted.load(tmp_path)


@every
def test_another_tuners_folder_is_refused(text, tmp_path):
    other = "lora:3" if text != "lora:3" else "lora:2"
    tuner(other).save(tmp_path / "lora")
    tuner("last-blocks:1").save(tmp_path / "last")
    adapted = tuner(text)
    before = features(adapted.model)
    for name in ("lora", "last"):
        with pytest.raises(DiffmixError):
            adapted.load(tmp_path / name)
    assert torch.equal(features(adapted.model), before)


@every
def test_merged_is_a_plain_model_of_equal_features(text):
    adapted = train(tuner(text))
    wanted = features(adapted.model)
    made = adapted.merged()
    assert made is not None
    plain, changed = made
    assert not any("peft" in type(module).__module__ for module in plain.modules())
    rebuilt = make_encoder(VIT, 32, **changed).eval()
    rebuilt.load_state_dict(plain.state_dict(), strict=True)
    tolerance = 0 if not adapted.has_adapters or text.startswith("block") else 1e-4
    for model in (plain, rebuilt):
        assert (features(model) - wanted).abs().max() <= tolerance
    assert torch.equal(features(adapted.model), wanted)


@adapters
def test_unloading_restores_names_and_weights(text):
    adapted = train(tuner(text))
    plain = adapted.model.unload()
    assert same(plain.state_dict(), encoder().state_dict())
    assert torch.equal(features(plain), features(encoder()))


@adapters
def test_several_adapters(text, tmp_path):
    adapted = train(tuner(text))
    first = features(adapted.model)
    adapted.add("second")
    assert (features(adapted.model) - features(encoder())).abs().max() <= 2e-6
    assert all(".second" in name for name, _ in adapted.trainable())
    before = state(adapted.model)
    train(adapted, steps=2)
    assert all(
        torch.equal(value, before[key]) for key, value in adapted.model.state_dict().items() if ".second" not in key
    )
    second = features(adapted.model)
    adapted.activate("default")
    assert torch.equal(features(adapted.model), first) and not torch.equal(first, second)
    adapted.activate("second")
    assert torch.equal(features(adapted.model), second)
    adapted.save(tmp_path)
    fresh = tuner(text)
    fresh.load(tmp_path)
    assert torch.equal(features(fresh.model), second)


@adapters
def test_adapters_by_wrong_names(text):
    adapted = tuner(text)
    with pytest.raises(UsageError, match="already"):
        adapted.add("default")
    with pytest.raises(UsageError, match="letters"):
        adapted.add("a.b")
    with pytest.raises(UsageError, match="default"):
        adapted.activate("missing")


@pytest.mark.parametrize("text", ["full", "linear", "last-blocks:2"])
def test_tuners_without_adapters_say_so(text):
    adapted = tuner(text)
    for call in (lambda: adapted.add("more"), lambda: adapted.activate("default"), adapted.disabled):
        with pytest.raises(UsageError, match="no adapters"):
            call()


@every
def test_bfloat16(text):
    from trainer.tuners.base import TunerConfig, make_tuner
    from trainer.tuners.spec import parse

    adapted = make_tuner(encoder().bfloat16(), parse(text), TunerConfig())
    pixels = images().bfloat16()
    out = adapted.model(pixels)
    assert out.dtype == torch.bfloat16
    assert (out - encoder().bfloat16()(pixels)).abs().max() <= (0.1 if text.startswith("dora") else 0)
    if adapted.num_trainable:
        out.float().square().mean().backward()
        assert any(value.grad is not None and value.grad.any() for _, value in adapted.trainable())


@every
def test_gradients_under_autocast(text):
    adapted = tuner(text)
    if adapted.num_trainable:
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted.model(images()).float().square().mean()
        loss.backward()
        assert all(value.grad is not None for _, value in adapted.trainable())


@every
def test_frozen_modules_stay_in_evaluation_mode(text):
    adapted = tuner(text, config=VIT)
    adapted.train()
    for module in adapted.encoder.modules():
        parameters = list(module.parameters())
        if parameters and module is not adapted.encoder:
            assert module.training == any(value.requires_grad for value in parameters)


@pytest.mark.parametrize("text", ["full", "linear", "last-blocks:1", "lokr:2", "ia3"])
def test_frozen_batchnorm_keeps_its_statistics(text, tmp_path):
    adapted = tuner(text, RESNET)
    before = state(adapted.model)
    train(adapted, steps=2, lr=1e-3)
    after = adapted.model.state_dict()
    moved = {key for key in before if "running_" in key and not torch.equal(before[key], after[key])}
    wanted = {"full": "", "last-blocks:1": "layer4.1."}.get(text)
    assert moved == {key for key in before if "running_" in key and wanted is not None and key.startswith(wanted)}
    adapted.save(tmp_path)
    fresh = tuner(text, RESNET)
    fresh.load(tmp_path)
    assert torch.equal(features(fresh.model), features(adapted.model))


def test_the_description_is_json(tmp_path):
    tuner("lora:4").save(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    tuner("last-blocks:2").save(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "tuner.json").read_text()) == {"tuner": "last-blocks", "size": 2}
