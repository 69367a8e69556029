"""The linear probe, compared with scikit-learn."""

import pytest
import scipy.stats
import torch

from dcvae_fast import UserError
from dcvae_fast.evaluation import Splits, evaluate
from dcvae_fast.evaluation.probe import half_width, linear_probe
from dcvae_pipelines import ImageSet, load_dataset

CPU = torch.device("cpu")


def test_probe_is_as_accurate_as_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    latents, weight = torch.randn(6000, 8, generator=generator), torch.randn(8, 4, generator=generator)
    labels = (latents @ weight + torch.randn(6000, 4, generator=generator)).argmax(1)
    train, test = (latents[:4000] * 50 + 7, labels[:4000]), (latents[4000:] * 50 + 7, labels[4000:])
    errors = linear_probe(train, test, device=CPU)
    fitted = LogisticRegression(C=1e4, max_iter=1000).fit(latents[:4000].numpy(), labels[:4000].numpy())
    expected = 1 - fitted.score(latents[4000:].numpy(), labels[4000:].numpy())
    assert errors.shape == (5,)
    assert errors.mean().item() == pytest.approx(expected, abs=0.006)
    assert len(set(errors.tolist())) > 1  # trials differ
    assert torch.equal(linear_probe(train, test, device=CPU), errors)
    interval = scipy.stats.t.interval(0.95, 4, loc=0, scale=scipy.stats.sem(errors.numpy()))
    assert half_width(errors) == pytest.approx(interval[1])


def test_probe_error_is_in_percent_of_the_images_with_labels(model):
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    assert train.labels is not None
    labels = train.labels.clone()
    labels[::3] = -1
    colour = [ImageSet(split.name, split.images.repeat(1, 3, 1, 1), split.labels) for split in (train, test)]
    partly_labelled = Splits(ImageSet("digits", colour[0].images, labels), colour[1], published=colour[0])
    (error,) = evaluate(model, partly_labelled, ["probe"], protocol="once")
    assert 0 < error.value < 80 and error.spread is not None and error.spread_kind is not None
    assert (error.metric, error.subject, error.count) == ("probe_error", "latents", 360)
    assert (error.protocol, error.data) == ("paper", "digits: 360 test images, 1,437 training images")
    with pytest.raises(UserError, match="a probe needs labels, which digits does not have"):
        evaluate(model, Splits(ImageSet("digits", colour[0].images, None), colour[1]), ["probe"])
