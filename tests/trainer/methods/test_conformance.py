"""What holds of every method; a new one is covered by its line in METHODS."""

import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, START, noise_views, plain_method, small_method, tiny_vit
from trainer.choices import class_of
from trainer.methods import METHODS
from trainer.methods.base import Method

pytestmark = pytest.mark.parametrize("name", METHODS)


def _loss(method, views, progress=MIDWAY):
    torch.manual_seed(1)  # of dropped paths and masks, which the engine seeds for every step
    return method(views, progress)


def _step(method, views, progress=MIDWAY):
    output = _loss(method, views, progress)
    output.loss.backward()
    method.before_update(progress)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return output, method.after_step(progress)


def test_loss_is_a_finite_float32_scalar_with_detached_logs(name):
    method = small_method(name)
    output, logs = _step(method, noise_views(method))
    assert output.loss.dtype == torch.float32 and output.loss.shape == ()
    assert torch.isfinite(output.loss)
    assert output.logs
    for value in (output.logs | logs).values():
        assert value.shape == () and torch.isfinite(value) and not value.requires_grad


def test_gradients_reach_the_trained_encoder(name):
    method = small_method(name)
    _loss(method, noise_views(method)).loss.backward()
    trained = [parameter for parameter in method.trained_encoder.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        assert parameter.grad is not None and parameter.grad.any()


def test_loss_falls_when_trained_on_one_batch(name):
    method = small_method(name)
    views = noise_views(method)
    first = _loss(method, views).loss.item()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    for _ in range(10):
        optimiser.zero_grad()
        _loss(method, views).loss.backward()
        optimiser.step()
    assert _loss(method, views).loss.item() < first


def test_a_batch_of_one_image_is_refused_where_it_teaches_nothing(name):
    method = small_method(name)
    try:
        method.check_batch(1)
    except UsageError as error:
        assert "1 image" in str(error) and "--batch-size" in str(error)
        method.check_batch(4)
        return
    _loss(method, noise_views(method, images=1)).loss.backward()
    assert any(parameter.grad.any() for parameter in method.trained_encoder.parameters() if parameter.grad is not None)


def test_encoders_give_features(name):
    method = small_method(name)
    for encoder in (method.encoder, method.trained_encoder):
        assert encoder(noise_views(method).crops[0]).shape == (4, 32)
        assert any(encoder is module for module in method.modules())


def test_a_restored_method_goes_on_the_same(name):
    trained, restored = small_method(name), small_method(name, seed=5)
    views = noise_views(trained)
    _step(trained, views, START)
    restored.load_state_dict(trained.state_dict(), strict=True)
    for _ in range(2):
        first, second = _step(trained, views)[0].loss, _step(restored, views)[0].loss
        assert torch.equal(first, second)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key


def test_forward_is_deterministic_and_changes_no_state(name):
    method = plain_method(name)
    views = noise_views(method)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert torch.equal(_loss(method, views).loss, _loss(method, views).loss)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_initialised_from_another_encoder(name):
    method, other = small_method(name), tiny_vit()
    method.trained_encoder.load_state_dict(other.state_dict())
    method.initialised()
    images = noise_views(method).crops[0]
    method.eval()
    torch.testing.assert_close(method.encoder(images), other.eval()(images))


def test_what_is_not_finite_shows(name):
    method = small_method(name)
    views = noise_views(method)
    views.crops[-1, 2, 0, 3, 3] = float("nan")
    assert not torch.isfinite(_loss(method, views).loss)


def test_loss_stays_float32_under_autocast(name):
    method = small_method(name)
    views = noise_views(method)
    exact = _loss(method, views).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = _loss(method, views).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.1)


def test_config_is_frozen_and_complete(name):
    method = class_of(METHODS, name)
    assert issubclass(method, Method)
    config = method.Config()
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_numbers_without_end_are_refused(name):
    config = class_of(METHODS, name).Config
    for field in fields(config):
        if isinstance(field.default, float):
            with pytest.raises(UsageError, match=rf"method\.{field.name} is inf; it must be"):
                config(**{field.name: math.inf})


def test_widths_of_one_are_refused_where_only_directions_count(name):
    """Of length 1 and of one dimension all images are the same: nothing would be learnt, without a word."""
    for width in ("out_dim", "bottleneck_dim", "prototypes"):
        if width in [field.name for field in fields(class_of(METHODS, name).Config)]:
            with pytest.raises(UsageError, match=rf"method\.{width} is 1; it must be 2 or more"):
                class_of(METHODS, name).Config(**{width: 1})
