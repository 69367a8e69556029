"""The public model: encode, decode, reconstruct, sample, save, load."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dcvae_fast import DCVAE, Posterior, UserError
from dcvae_fast.config import ModelConfig

SMALL = ModelConfig(image_channels=1, latent_dim=6, decoder_width=8, encoder_width=8)


@pytest.fixture
def model() -> DCVAE:
    torch.manual_seed(0)
    return DCVAE(SMALL).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_posterior_sample_has_its_mean_and_variance():
    posterior = Posterior(torch.full((20_000, 1), 2.0), torch.full((20_000, 1), 2 * math.log(3)))
    draws = posterior.sample(torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(2, abs=0.1)
    assert draws.std().item() == pytest.approx(3, rel=0.02)
    assert torch.equal(draws, posterior.sample(torch.Generator().manual_seed(0)))


def test_reconstruct_decodes_the_posterior_mean(model, images):
    posterior = model.encode(images)
    torch.testing.assert_close(model.reconstruct(images), model.decode(posterior.mean))
    drawn = model.reconstruct(images, sample_posterior=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, model.decode(posterior.sample(torch.Generator().manual_seed(5))))
    assert not torch.allclose(drawn, model.reconstruct(images))
    model.config = replace(SMALL, reconstruct_from="sample")
    torch.testing.assert_close(model.reconstruct(images, generator=torch.Generator().manual_seed(5)), drawn)


def test_encode_and_decode_are_differentiable(model, images):
    images.requires_grad_(True)
    model.decode(model.encode(images).mean).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_sample_decodes_the_prior_optionally_clamped(model):
    def seed():
        return torch.Generator().manual_seed(3)

    latents = torch.randn(4, 6, generator=seed())
    torch.testing.assert_close(model.sample(4, generator=seed()), model.decode(latents))
    clamped = DCVAE(replace(SMALL, sample_clamp=0.5)).eval()
    clamped.load_state_dict(model.state_dict())
    torch.testing.assert_close(clamped.sample(4, generator=seed()), model.decode(latents.clamp(-0.5, 0.5)))


def test_a_saved_model_loads_unchanged(model, images, tmp_path):
    with torch.no_grad():
        model.decoder.norm.running_mean.add_(1)  # buffers too
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = DCVAE.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == SMALL
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "latent dimension 6" in card and "AutoencoderDC" in card


def test_errors_for_wrong_inputs_state_the_expected_shape(model, images):
    with pytest.raises(ValueError, match=r"images have shape \[3, 1, 28, 28\]; this model expects \[B, 1, 32, 32\]"):
        model.encode(images[..., :28, :28])
    with pytest.raises(ValueError, match=r"\[3, 3, 32, 32\]"):
        model.encode(images.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        model.encode(images.to(torch.uint8))
    with pytest.raises(ValueError, match=r"latents have shape \[2, 5\]; this model expects \[B, 6\]"):
        model.decode(torch.zeros(2, 5))


def test_errors_for_models_that_cannot_be_loaded(model, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        DCVAE.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        DCVAE.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": {**config["model"], "latent_dim": 7}}))
    with pytest.raises(UserError, match="do not fit"):
        DCVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {**config["model"], "depth": 7}}))
    with pytest.raises(UserError, match="unknown: depth"):
        DCVAE.from_pretrained(tmp_path)
    for text, message in (
        ('{"architectures": ["Other"]}', "is not the configuration of a dcvae_fast model"),
        ('{"model": {"latent_dim": "4"}}', "wrong type"),
        ("{", "damaged"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            DCVAE.from_pretrained(tmp_path)


def test_error_for_a_model_missing_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="nobody/nothing: no such folder, and it could not be downloaded from the Hugging Face hub"
    ):
        DCVAE.from_pretrained("nobody/nothing")
    with pytest.raises(UserError, match="runs/nothing/here: no such folder"):
        DCVAE.from_pretrained("runs/nothing/here")
