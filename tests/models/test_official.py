"""Import of checkpoints with the names and shapes of the authors' code, compared with plain functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_fast import DCVAE, UserError
from dcvae_fast.cli import main
from dcvae_fast.models.official import load_official

Z, WIDTH, TRUNK, D = 6, 8, 4, 5
Weights = dict[str, Tensor]


def convolution(name: str, out: int, into: int, size: int, spectral: bool) -> Weights:
    weights = linear(name, out, into * size * size, spectral)
    kernel = "weight_orig" if spectral else "weight"
    weights[f"{name}.{kernel}"] = weights[f"{name}.{kernel}"].view(out, into, size, size)
    return weights


def linear(name: str, out: int, into: int, spectral: bool, bias: bool = True) -> Weights:
    weights = {f"{name}.bias": torch.randn(out)} if bias else {}
    weight = torch.randn(out, into) / into**0.5
    if not spectral:
        return weights | {f"{name}.weight": weight}
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return weights | {f"{name}.weight_orig": weight, f"{name}.weight_u": left[:, 0], f"{name}.weight_v": right[0]}


def trunk_weights() -> Weights:
    weights = {}
    for block in range(1, 5):
        into = 3 if block == 1 else TRUNK
        weights |= convolution(f"block{block}.c1", TRUNK, into, 3, True)
        weights |= convolution(f"block{block}.c2", TRUNK, TRUNK, 3, True)
        if block < 3:
            weights |= convolution(f"block{block}.c_sc", TRUNK, into, 1, True)
    return weights


def dual_encoder_weights() -> Weights:
    weights = trunk_weights() | linear("l5", D, TRUNK, True, bias=False) | linear("head_disc", 1, D, True)
    for block, positions in ((1, 256), (2, 64), (3, 64), (4, 64)):
        weights |= convolution(f"head_b{block}.0", 1, TRUNK, 1, False)
        weights |= linear(f"head_b{block}.2", D, positions, False, bias=False)
    return weights


def decoder_weights() -> Weights:
    weights = linear("l1", 16 * WIDTH, Z, False)
    for cell in (1, 2, 3):
        weights |= convolution(f"cell{cell}.c1", WIDTH, WIDTH, 3, False)
        weights |= convolution(f"cell{cell}.c2", WIDTH, WIDTH, 3, False)
        if cell < 3:
            weights |= convolution(f"cell{cell}.c_sc", WIDTH, WIDTH, 1, False)
        for skip in range(cell - 1):
            weights |= convolution(f"cell{cell}.skip_in_ops.{skip}", WIDTH, WIDTH, 1, False)
    weights |= {
        f"to_rgb.0.{name}": torch.rand(WIDTH) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")
    }
    return weights | {"to_rgb.0.num_batches_tracked": torch.tensor(3)} | convolution("to_rgb.2", 3, WIDTH, 3, False)


def weight_of(weights: Weights, name: str) -> Tensor:
    if f"{name}.weight" in weights:
        return weights[f"{name}.weight"]
    weight = weights[f"{name}.weight_orig"]
    return weight / (weights[f"{name}.weight_u"] @ weight.flatten(1) @ weights[f"{name}.weight_v"])


def conv(weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weight_of(weights, name)
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def trunk(weights: Weights, x: Tensor) -> dict[str, Tensor]:
    h = F.avg_pool2d(conv(weights, "block1.c2", F.relu(conv(weights, "block1.c1", x))), 2)
    h = h + conv(weights, "block1.c_sc", F.avg_pool2d(x, 2))
    features = {"b1": h}
    for block in (2, 3, 4):
        x = h
        h = conv(weights, f"block{block}.c2", F.relu(conv(weights, f"block{block}.c1", F.relu(x))))
        h = F.avg_pool2d(conv(weights, "block2.c_sc", x), 2) + F.avg_pool2d(h, 2) if block == 2 else x + h
        features[f"b{block}"] = h
    return features | {"final": F.relu(h).sum((2, 3)) @ weight_of(weights, "l5").T}


def decode(weights: Weights, z: Tensor) -> Tensor:
    h = F.linear(z, weights["l1.weight"], weights["l1.bias"]).view(-1, WIDTH, 4, 4)
    skips = []
    for cell, mode in ((1, "nearest"), (2, "bilinear"), (3, "nearest")):
        x = h
        h = conv(weights, f"cell{cell}.c1", F.interpolate(F.relu(x), scale_factor=2, mode=mode))
        for n, skip in enumerate(skips):
            h = h + conv(weights, f"cell{cell}.skip_in_ops.{n}", F.interpolate(skip, size=h.shape[2:], mode=mode))
        skips.append(h)
        h = conv(weights, f"cell{cell}.c2", F.relu(h))
        if cell < 3:
            h = h + conv(weights, f"cell{cell}.c_sc", F.interpolate(x, scale_factor=2, mode=mode))
    mean, var, scale, bias = (weights[f"to_rgb.0.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return torch.tanh(conv(weights, "to_rgb.2", F.relu(F.batch_norm(h, mean, var, scale, bias))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written as by the authors' training, and its weights."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    networks = {
        "encoder": trunk_weights() | linear("l5", 2 * Z, TRUNK, True, bias=False),
        "decoder": decoder_weights(),
        "decoder_avg": decoder_weights(),
        "dual_encoder": dual_encoder_weights(),
    }
    for name, weights in networks.items():
        torch.save({f"module.{key}": value for key, value in weights.items()}, folder / f"40_{name}.sd")
    torch.save(torch.arange(D * 12.0).view(D, 12), folder / "40_b1_queue.sd")
    torch.save(torch.zeros(1, dtype=torch.long), folder / "40_b1_queueptr.sd")
    return folder, networks


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_networks_give_the_same_outputs(saved):
    folder, networks = saved
    ours = load_official(folder, 40)
    x, z = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, Z)

    mean, logvar = trunk(networks["encoder"], x)["final"].chunk(2, dim=1)
    posterior = ours.model.encode(x)
    close(posterior.mean, mean)
    close(posterior.logvar, logvar)
    close(ours.model.decode(z), decode(networks["decoder_avg"], z))
    close(ours.decoder(z), decode(networks["decoder"], z))

    dual = networks["dual_encoder"]
    features = trunk(dual, x)
    critique = ours.discriminator(x)
    close(critique.score, (features["final"] @ weight_of(dual, "head_disc").T + dual["head_disc.bias"])[:, 0])
    for name, feature in features.items():
        close(critique.features[name], feature)
        head = (
            feature
            if name == "final"
            else conv(dual, f"head_{name}.0", feature).flatten(1) @ dual[f"head_{name}.2.weight"].T
        )
        close(ours.discriminator.embed(critique, [name])[0], head)
    assert list(ours.queues) == ["b1"]
    assert torch.equal(ours.queues["b1"], torch.arange(D * 12.0).view(D, 12).T)


@torch.no_grad()
def test_import_writes_a_model_that_loads(saved, tmp_path):
    folder, networks = saved
    assert main(["import-official", str(folder), "--epoch", "40", "--out", str(tmp_path / "model")]) == 0
    model = DCVAE.from_pretrained(tmp_path / "model")
    assert model.config.sample_clamp == 1.0  # as in the authors' sampling for FID
    z = torch.randn(2, Z)
    close(model.decode(z), decode(networks["decoder_avg"], z))


def test_errors_name_the_file(saved, tmp_path):
    folder, networks = saved
    with pytest.raises(UserError, match=r"41_encoder\.sd is missing; the folder has epochs 40\."):
        load_official(folder, 41)
    with pytest.raises(UserError, match=r"the folder has no .* files"):
        load_official(tmp_path, 40)
    for name, weights in networks.items():
        torch.save(weights, tmp_path / f"7_{name}.sd")
    (tmp_path / "7_decoder.sd").write_bytes((tmp_path / "7_decoder.sd").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"7_decoder\.sd cannot be read"):
        load_official(tmp_path, 7)
    (tmp_path / "7_decoder.sd").write_bytes(b"")
    with pytest.raises(UserError, match=r"7_decoder\.sd cannot be read"):
        load_official(tmp_path, 7)
    torch.save([1.0], tmp_path / "7_decoder.sd")
    with pytest.raises(UserError, match=r"7_decoder\.sd holds a list"):
        load_official(tmp_path, 7)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "7_decoder.sd")
    with pytest.raises(UserError, match="do not fit Decoder"):
        load_official(tmp_path, 7)
