"""Short runs of narrow VAEs on MNIST and CIFAR-10: the pixel error falls well below that of the mean image."""

import pytest

from dcvae_fast.cli import main
from dcvae_fast.run_folder import read_metrics
from dcvae_pipelines import ImageSet, load_dataset

NARROW = (
    "--loss.objective vae --model.latent_dim 32 --model.decoder_width 32 --model.encoder_width 32"
    " --loss.kl_weight 3e-4 --optim.lr 1e-3 --train.batch 16 --train.ema_decay 0.99 --log.every 3200 --train.device cpu"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "images", "share", "accuracy"), [("mnist", 19_200, 0.7, 0.85), ("cifar10", 19_200, 0.7, 0.2)]
)
def test_learns_to_reconstruct(recipe, images, share, accuracy, torchvision_root, tmp_path):
    folder = tmp_path / "run"
    data = ["--data.root", str(torchvision_root), "--train.images", str(images), "--run", str(folder)]
    assert main(["train", "--recipe", recipe, *NARROW, *data]) == 0
    lines = read_metrics(folder)
    metrics = [line for line in lines if "held_out/pixel_mse" in line][-1]
    train_set, test_set = (load_dataset(recipe, torchvision_root, split) for split in ("train", "test"))
    assert isinstance(train_set, ImageSet) and isinstance(test_set, ImageSet)
    mean = train_set.images.float().mean(0)
    mean_error = (test_set.images[:1000].float() - mean).square().mean().item() / 127.5**2
    assert metrics["held_out/pixel_mse"] < share * mean_error
    assert metrics["held_out/probe_accuracy"] > accuracy
    errors = [line["pixel_mse"] for line in lines if "pixel_mse" in line]
    assert len(errors) == images // 3200 and errors == sorted(errors, reverse=True)
