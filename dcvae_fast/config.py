"""All settings of a run: frozen dataclasses, filled by a recipe and by overrides. Imports no torch.

The defaults are the paper's CIFAR-10 run; settings that the paper leaves open follow the authors' code. `recipes.py`
lists how each experiment differs from the defaults. In docstrings, `official` means the authors' code.

The `Attributes:` texts are the help texts of `dcvae train --help`.
"""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

from dcvae_fast.errors import ConfigError

Layer = Literal["b1", "b2", "b3", "b4", "low", "final"]
LocalLayer = Literal["b1", "b2", "b3", "b4", "8x8", "16x16", "32x32"]
Variant = Literal["pggan", "port"]

_COMPARISONS: dict[str, Callable[[Any, float], bool]] = {
    "least": operator.ge,
    "above": operator.gt,
    "most": operator.le,
    "below": operator.lt,
}


def setting(default: Any, *, may_change: bool = False, **bounds: float) -> Any:
    """Return a dataclass field with a default and a range. The range applies to each entry of a tuple or dict.

    Args:
        default: value unless a recipe or the command line overrides it.
        may_change: whether a resumed run can change the setting, because it does not affect the computed result.
        bounds: `least` (inclusive) or `above` (exclusive); with `least` optionally `most` (inclusive) or `below`
            (exclusive).
    """
    metadata = {"bounds": bounds, "may_change": may_change}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _range(least: float = 0, above: float | None = None, most: float | None = None, below: float | None = None) -> str:
    """Describe the bounds in words."""
    if above is not None:
        return f"above {above}"
    if below is not None:
        return f"in [{least}, {below})"
    if most is not None:
        return f"in [{least}, {most}]"
    return "0 or more" if least == 0 else f"at least {least}"


def _check(setting: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{setting} is {value!r}; it must be {expected}.")


def group_size(batch: int, stddev_group: int) -> int:
    """Return the images per minibatch standard deviation: `stddev_group` if it divides the batch, else the batch."""
    return stddev_group if batch % stddev_group == 0 else batch


class Widths(NamedTuple):
    """Number of channels at each resolution R: min(base / R, maximum)."""

    base: int = 16384
    maximum: int = 512

    def at(self, resolution: int) -> int:
        return max(1, min(self.base // resolution, self.maximum))


@dataclass(frozen=True)
class _Section:
    """Base class of the sections of a configuration; checks the range of each setting."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Config").lower()
        for option in dataclasses.fields(self):
            name, value = f"{section}.{option.name}", getattr(self, option.name)
            bounds, optional = option.metadata.get("bounds"), NoneType in get_args(option.type)
            if not bounds or (value is None and optional):
                continue
            expected = _range(**bounds)
            if optional:
                expected = f"null, or {expected}" if " or " in expected else f"null or {expected}"
            entries = {name: value}
            if isinstance(value, dict):
                entries = {f"{name}[{key}]": entry for key, entry in value.items()}
            elif isinstance(value, tuple | list):
                entries = {f"{name}[{index}]": entry for index, entry in enumerate(value)}
            for entry_name, entry in entries.items():
                _check(
                    entry_name, entry, all(_COMPARISONS[kind](entry, bound) for kind, bound in bounds.items()), expected
                )


@dataclass(frozen=True)
class DataConfig(_Section):
    """Training and test images.

    Attributes:
        name: data set; folder is any folder of images, shards is the output of `dcvae prepare`
        root: folder of the data set, in torchvision's layout if torchvision has the data set; digits needs none
        download: download a missing data set into data.root, if torchvision can
        mirror: flip each image horizontally with probability 1/2
        drop_last: drop the incomplete last batch of each epoch (official); otherwise batches continue across epochs
        on_corrupt: for an image that cannot be decoded, stop, or skip it with a warning
        resident: decode all images at the start and keep them in the device's memory, which is faster; they must fit,
            and all must be decodable. Always true for digits, mnist, cifar10 and stl10
        threads: CPU threads per process that read and decode images; null for all cores, shared by the processes of a
            machine
        prefetch: number of batches decoded in advance
    """

    name: Literal["digits", "mnist", "cifar10", "stl10", "celeba", "celebahq", "lsun_bedroom", "folder", "shards"] = (
        "cifar10"
    )
    root: str | None = setting(None, may_change=True)
    download: bool = setting(False, may_change=True)
    mirror: bool = False
    drop_last: bool = False
    on_corrupt: Literal["stop", "skip"] = setting("stop", may_change=True)
    resident: bool = setting(False, may_change=True)
    threads: int | None = setting(None, least=1, may_change=True)
    prefetch: int = setting(2, least=1, may_change=True)


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Networks.

    Attributes:
        architecture: autogan (Figure 15; 32×32 only), or progressive (grows from growth.start to model.resolution)
        resolution: final height and width of the images, in pixels; 32 for autogan, a power of two from 4 to 1024 for
            progressive
        image_channels: 3 for colour, 1 for greyscale
        latent_dim: latent dimension Z
        decoder_width: number of channels of the decoder's feature maps; autogan only
        encoder_width: number of channels of the encoder's feature maps; autogan only
        discriminator_width: number of channels of the discriminator's feature maps; autogan only
        base_channels: an R×R feature map has min(base_channels / R, max_channels) channels; progressive only
        max_channels: maximum number of channels of a feature map; progressive only
        variant: pggan (Progressive GAN), or port (the PyTorch port of it that the authors credit, which differs in
            normalisation, initialisation and minibatch standard deviation); progressive only
        contrast_dim: dimension D of queries and keys (paper: 16)
        sample_clamp: clamp latents drawn from the prior to [-sample_clamp, sample_clamp] when sampling from a trained
            model (official for FID: 1); null for no clamping
        reconstruct_from: decode the posterior mean, or a sample of the posterior (official for FID)
        alpha: blending weight of the layers of the final resolution, in [0, 1]; below 1 only in a model saved during a
            fade; progressive only
    """

    architecture: Literal["autogan", "progressive"] = "autogan"
    resolution: int = 32
    image_channels: int = setting(3, least=1)
    latent_dim: int = setting(128, least=1)
    decoder_width: int = setting(256, least=1)
    encoder_width: int = setting(128, least=1)
    discriminator_width: int = setting(128, least=1)
    base_channels: int = setting(16384, least=1)
    max_channels: int = setting(512, least=1)
    variant: Variant = "pggan"
    contrast_dim: int = setting(16, least=1)
    sample_clamp: float | None = setting(None, above=0)
    reconstruct_from: Literal["mean", "sample"] = "mean"
    alpha: float = setting(1.0, least=0, most=1)

    def __post_init__(self):
        super().__post_init__()
        if self.grows:
            known = [4 * 2**i for i in range(9)]
            _check("model.resolution", self.resolution, self.resolution in known, f"one of {known} for progressive")
        else:
            _check("model.resolution", self.resolution, self.resolution == 32, "32 for autogan")
            _check("model.variant", self.variant, self.variant == "pggan", "pggan for autogan")

    @property
    def grows(self) -> bool:
        return self.architecture == "progressive"

    @property
    def widths(self) -> Widths:
        return Widths(self.base_channels, self.max_channels)

    def local_width(self, layer: LocalLayer) -> int:
        """Return the number of channels of a discriminator feature map for local patch contrast."""
        if not self.grows:
            return self.discriminator_width
        return self.widths.at(int(layer.split("x")[0]))


@dataclass(frozen=True)
class GrowthConfig(_Section):
    """Growth of progressive networks: the first resolution is trained; each doubled one is faded in, then trained.

    Attributes:
        start: first resolution in pixels, a power of two from 4 to model.resolution
        fade_images: images shown while the layers of a resolution are faded in (Progressive GAN: 800,000 with its
            preset v1, 600,000 with v2)
        stable_images: images shown at each resolution, after its fade if it has one
        first_images: images shown at the first resolution; null for stable_images
        blend_real: whether real images fade in too: blend each with its half-resolution version
        reset_adam: whether to restart Adam at each new resolution and at the end of each fade (Progressive GAN), or
            never
        batch: real images per iteration, by resolution
        stddev_group: images per group of the discriminator's minibatch standard deviation; the whole batch if the
            batch is not a multiple of it, and always for model.variant port
        lr: learning rate by resolution; optim.lr for resolutions not listed
    """

    start: int = 4
    fade_images: int = setting(800_000, least=0)
    stable_images: int = setting(800_000, least=1)
    first_images: int | None = setting(None, least=1)
    blend_real: bool = True
    reset_adam: bool = True
    batch: dict[int, int] = setting(  # noqa: RUF009
        {4: 16, 8: 16, 16: 16, 32: 16, 64: 16, 128: 16, 256: 14, 512: 6, 1024: 3}, least=1
    )
    stddev_group: int = setting(16, least=1)
    lr: dict[int, float] = setting({}, above=0)  # noqa: RUF009


@dataclass(frozen=True)
class LossConfig(_Section):
    """Training objective (Eq. 9 and the rows of Table 1).

    Attributes:
        objective: dc_vae (InfoNCE + GAN + KL), or an ablation: vae (pixel L2 + KL), vae_gan (L2 between discriminator
            features + GAN + KL), vae_contrastive (InfoNCE + KL)
        adversarial: hinge (official); log (Eq. 4, with the non-saturating loss for the generator); wgan_gp (with
            gradient penalty and drift, as in Progressive GAN); or logistic_r1 (log with weight 1/2 for samples and for
            reconstructions, plus R1 penalty)
        penalty: weight of the gradient penalty of wgan_gp and logistic_r1
        penalty_every: compute the R1 penalty of logistic_r1 every this many iterations, with its weight multiplied by
            the same number
        drift: weight of the squared score of real images in wgan_gp
        kl_weight: weight of the KL divergence, which is summed over the latent and averaged over the batch (official:
            1e-6 times the sum over 64 images)
        order: sequential (official) updates the autoencoder first for the adversarial loss, then for the instance loss;
            joint makes one update for both (Eq. 9)
        passes: merged scores all images of a step in one pass through the discriminator, and the discriminator and
            adversarial losses share one reconstruction, which is faster; separate (official) scores real, sampled and
            reconstructed images in one pass each, each of which updates spectral norm, and reconstructs with new noise
            for each loss
    """

    objective: Literal["dc_vae", "vae", "vae_gan", "vae_contrastive"] = "dc_vae"
    adversarial: Literal["hinge", "log", "wgan_gp", "logistic_r1"] = "hinge"
    penalty: float = setting(10.0, least=0)
    penalty_every: int = setting(16, least=1)
    drift: float = setting(1e-3, least=0)
    kl_weight: float = setting(6.4e-5, least=0)
    order: Literal["sequential", "joint"] = "sequential"
    passes: Literal["merged", "separate"] = "merged"

    @property
    def has_gan(self) -> bool:
        return self.objective in ("dc_vae", "vae_gan")

    @property
    def instance(self) -> Literal["contrast", "feature", "pixel"]:
        """Reconstruction term: InfoNCE (Eq. 6), L2 between features (Eq. 3), or L2 between pixels (Eq. 1)."""
        if self.objective in ("dc_vae", "vae_contrastive"):
            return "contrast"
        return "feature" if self.objective == "vae_gan" else "pixel"


@dataclass(frozen=True)
class ContrastConfig(_Section):
    """Multi-scale instance contrast (Eq. 6, §4.2).

    Attributes:
        negatives: number K of keys in the queue (paper: 8096)
        temperature: divisor of the cosine similarities
        layers: discriminator layers whose features are contrasted. autogan: b1 to b4 (after that residual block) and
            final (last linear layer); progressive: low (at 16×16) and final. The paper uses b2 and final, official b1
            and final. vae_gan compares features at the same layers
        momentum: EMA decay of the momentum discriminator, which computes the keys; in [0, 1)
        queue_start: initial queue: empty (only filled slots count), or noise (official; normalised Gaussian keys)
        exclude_same_image: do not count older keys of the same image as negatives (Eq. 6); official counts them
        local_layers: discriminator feature maps for local patch contrast (§4.2). autogan: b1 to b4; progressive: 8x8,
            16x16 and 32x32, each from twice its resolution on
        local_start_images: images shown before local patch contrast starts; null disables it (official)
    """

    negatives: int = setting(8096, least=1)
    temperature: float = setting(0.07, above=0)
    layers: tuple[Layer, ...] = ("b2", "final")
    momentum: float = setting(0.999, least=0, below=1)
    queue_start: Literal["empty", "noise"] = "empty"
    exclude_same_image: bool = True
    local_layers: tuple[LocalLayer, ...] = ("b2",)
    local_start_images: int | None = setting(None, least=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("layers", "local_layers"):
            layers = getattr(self, name)
            _check(f"contrast.{name}", layers, 0 < len(set(layers)) == len(layers), "one or more different layers")


@dataclass(frozen=True)
class OptimConfig(_Section):
    """Adam, with the same settings for every network.

    Attributes:
        lr: learning rate; growth.lr overrides it by resolution
        betas: decay rates of the two moments, each in [0, 1)
        eps: added to the square root of the second moment
        implementation: apex (NVIDIA's, for GPUs), deepspeed (compiled when first used), torch, or auto (apex on a GPU
            if it is installed, otherwise torch)
        loss_scale: initial loss scale for train.precision float16, at least 1; halved whenever a gradient overflows
        loss_scale_window: the loss scale doubles after this many steps without overflow
    """

    lr: float = setting(2e-4, above=0)
    betas: tuple[float, float] = setting((0.0, 0.9), least=0, below=1)
    eps: float = setting(1e-8, above=0)
    implementation: Literal["auto", "apex", "deepspeed", "torch"] = setting("auto", may_change=True)
    loss_scale: float = setting(65536.0, least=1)
    loss_scale_window: int = setting(2000, least=1)


@dataclass(frozen=True)
class TrainConfig(_Section):
    """Training length, batches, precision and engine.

    Attributes:
        images: stop after this many images shown
        batch: real images per iteration, at least 2; autogan only (progressive: growth.batch)
        sampled_batch: prior samples per autoencoder step; null for as many as real images (always for progressive)
        batch_per_rank: whether train.batch, train.sampled_batch and growth.batch count the images of each process; if
            false, they count the images of all processes together
        n_critic: discriminator steps per autoencoder and contrastive step
        ema_decay: decay of the exponential moving average (EMA) of the decoder's weights, with which a trained model
            samples and reconstructs; in [0, 1)
        seed: seed of all random numbers
        initialization: initial weights, and u and v of spectral norm, of encoder and discriminator; autogan only.
            xavier draws all convolutions from Xavier's uniform distribution, and starts u and v with power iterations.
            official has the effect of the authors' code: convolutions with spectral norm keep torch's default
            distribution, and u and v start as random unit vectors, drawn separately for the momentum discriminator
        device: cpu, cuda, cuda:N, or auto (cuda if available); with several processes, each uses the GPU of its local
            rank
        micro_batch: real images per forward and backward pass, to save memory; null for the whole batch; progressive
            only. Gradients do not change. If smaller than the batch, it must be a multiple of the group of the
            minibatch standard deviation: with growth.stddev_group 4, both must be multiples of 4
        checkpoint_activations: save memory by recomputing activations in the backward pass; progressive only
        precision: autocast precision of the networks; weights and losses stay float32. float16 adds loss scaling, for
            GPUs without bfloat16
        compile: use torch.compile, which takes a minute or two at each resolution; null for true on GPUs if a C
            compiler and Python's headers are installed
        graphs: run whole iterations as CUDA graphs, which saves CPU time; null for true on a single GPU, unless
            DeepSpeed, float16, or optim.implementation apex or deepspeed is set
        engine: engine that averages gradients and steps the optimizer; auto is deepspeed if DeepSpeed's launcher
            started the run or train.zero or train.deepspeed_config is set, otherwise torch
        zero: DeepSpeed's ZeRO stage: 0 partitions nothing, 1 optimizer states, 2 gradients too
        deepspeed_config: JSON file with further DeepSpeed settings
    """

    images: int = setting(40_000_000, least=0, may_change=True)
    batch: int = setting(64, least=2)  # batch normalisation needs two
    sampled_batch: int | None = setting(128, least=1)
    batch_per_rank: bool = False
    n_critic: int = setting(5, least=1)
    ema_decay: float = setting(0.999, least=0, below=1)
    seed: int = 0
    initialization: Literal["xavier", "official"] = "xavier"
    device: str = setting("auto", may_change=True)
    micro_batch: int | None = setting(None, least=1)
    checkpoint_activations: bool = setting(False, may_change=True)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool | None = setting(None, may_change=True)
    graphs: bool | None = setting(None, may_change=True)
    engine: Literal["auto", "torch", "deepspeed"] = setting("auto", may_change=True)
    zero: Literal[0, 1, 2] | None = setting(None, may_change=True)
    deepspeed_config: str | None = setting(None, may_change=True)

    def __post_init__(self):
        super().__post_init__()
        needs_deepspeed = self.zero is not None or self.deepspeed_config is not None
        valid = not (needs_deepspeed and self.engine == "torch")
        _check("train.engine", self.engine, valid, "auto or deepspeed if train.zero or train.deepspeed_config is set")

    @property
    def uses_deepspeed(self) -> bool:
        return self.engine == "deepspeed" or self.zero is not None or self.deepspeed_config is not None


@dataclass(frozen=True)
class LogConfig(_Section):
    """Output of a run; intervals are counted in images shown.

    Attributes:
        every: interval between log lines: means of all training metrics, to the terminal, metrics.jsonl and TensorBoard
        grids_every: interval between PNG grids of reconstructions, samples and interpolations
        checkpoint_every: interval between checkpoints
        keep: number of newest checkpoints to keep, at least 2
        metrics_every: interval between held-out metrics, to metrics.jsonl and TensorBoard; null for log.grids_every
        held_out: number of held-out images for these metrics (pixel error and, if there are labels, accuracy of a
            linear probe); null for 1,000 at 32×32 and fewer at higher resolutions, 0 for no held-out metrics
        fid_images: number of samples, and of training images, for FID as a held-out metric; 0 for no FID. FID of a few
            thousand images is biased upwards: compare only values with the same log.fid_images
        weights: folder with Inception's weights for FID; null to download them
    """

    every: int = setting(64_000, least=1, may_change=True)
    grids_every: int = setting(640_000, least=1, may_change=True)
    checkpoint_every: int = setting(640_000, least=1, may_change=True)
    keep: int = setting(2, least=2, may_change=True)
    metrics_every: int | None = setting(None, least=1, may_change=True)
    held_out: int | None = setting(None, least=0, may_change=True)
    fid_images: int = setting(0, may_change=True)
    weights: str | None = setting(None, may_change=True)

    def __post_init__(self):
        super().__post_init__()
        fid_images = self.fid_images
        _check("log.fid_images", fid_images, fid_images == 0 or fid_images >= 2, "0 or at least 2")
        _check("log.fid_images", fid_images, fid_images == 0 or self.held_out != 0, "0 if log.held_out is 0")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        model, growth, contrast = self.model, self.growth, self.contrast
        layers = ("low", "final") if model.grows else ("b1", "b2", "b3", "b4", "final")
        if model.resolution < 16:
            layers = ("final",)
        expected = f"a subset of {', '.join(layers)} for {model.architecture} at {model.resolution}×{model.resolution}"
        _check("contrast.layers", contrast.layers, set(contrast.layers) <= set(layers), expected)
        if contrast.local_start_images is not None:
            self._check_local_layers()
        train = self.train
        if not model.grows:  # batch normalisation needs the whole batch
            _check("train.micro_batch", train.micro_batch, train.micro_batch is None, "null for autogan")
            enabled = train.checkpoint_activations
            _check("train.checkpoint_activations", enabled, not enabled, "false for autogan")
            return
        initialization = train.initialization
        _check("train.initialization", initialization, initialization == "xavier", "xavier for progressive")
        # Samples and reconstructions are scored in one batch, which minibatch statistics cut into equal parts.
        _check("train.sampled_batch", train.sampled_batch, train.sampled_batch is None, "null for progressive")
        starts = [4 * 2**i for i in range(9) if 4 * 2**i <= model.resolution]
        _check("growth.start", growth.start, growth.start in starts, f"one of {starts}")
        if growth.start < 16 and self.loss.instance != "pixel":
            expected = "a list with final if growth.start is below 16: low exists only from 16×16 on"
            _check("contrast.layers", contrast.layers, "final" in contrast.layers, expected)
        reached = [resolution for resolution in starts if growth.start <= resolution]
        missing = [resolution for resolution in reached if resolution not in growth.batch]
        _check("growth.batch", growth.batch, not missing, f"set for {', '.join(map(str, missing))} too")
        _check("growth.lr", growth.lr, set(growth.lr) <= set(reached), f"set for resolutions among {reached} only")
        if model.variant == "port":  # its minibatch standard deviation is undefined for one image
            batches = [growth.batch[resolution] for resolution in reached]
            _check("growth.batch", growth.batch, min(batches) >= 2, "at least 2 at each resolution for port")
        if train.micro_batch is not None:
            for resolution in reached:
                self._check_micro_batch(train.micro_batch, growth.batch[resolution], f"growth.batch[{resolution}]")

    def images_per_stddev(self, batch: int) -> int:
        """Return the number of images over which the minibatch standard deviation of a batch is computed."""
        return batch if self.model.variant == "port" else group_size(batch, self.growth.stddev_group)

    def _check_micro_batch(self, micro: int, batch: int, setting: str) -> None:
        """Check that micro-batches do not cut the groups of the minibatch standard deviation."""
        group = self.images_per_stddev(batch)
        expected = f"at least {setting}, {batch}"
        if group < batch:
            expected += f", or a multiple of {group}, the images of a minibatch standard deviation"
        else:
            expected += f", because the minibatch standard deviation covers {group} images"
            if self.model.variant != "port":
                expected += "; for smaller ones use --growth.stddev_group 4 and batches that are multiples of 4"
        _check("train.micro_batch", micro, batch <= micro or micro % group == 0, expected)

    def _check_local_layers(self) -> None:
        """Check that the feature maps for local patch contrast exist and have one width, because they share a queue."""
        model, chosen = self.model, self.contrast.local_layers
        layers = ["b1", "b2", "b3", "b4"]
        if model.grows:
            layers = [f"{size}x{size}" for size in (8, 16, 32) if size < model.resolution]
        at = f"{model.architecture} at {model.resolution}×{model.resolution}"
        start = self.contrast.local_start_images
        _check("contrast.local_start_images", start, bool(layers), f"null for {at}")
        _check("contrast.local_layers", chosen, set(chosen) <= set(layers), f"a subset of {', '.join(layers)} for {at}")
        widths = {model.local_width(layer) for layer in chosen}
        _check(
            "contrast.local_layers", chosen, len(widths) == 1, "a list of feature maps with the same number of channels"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration, or a section of one, to plain values for JSON and YAML."""
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }


def changes(old: dict[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """Return the settings that differ between the stored `old` and `new`: `section.name`, old value, new value.

    Settings declared with `may_change` are ignored: they affect only the length, place and output of a run. `growth` is
    ignored unless the networks grow.
    """
    differences = []
    for section in dataclasses.fields(new):
        if section.name == "growth" and not new.model.grows:
            continue
        values, stored = getattr(new, section.name), old.get(section.name)
        stored, current = stored if isinstance(stored, dict) else {}, to_dict(values)
        for setting in dataclasses.fields(values):
            old_value, new_value = stored.get(setting.name, "not set"), current[setting.name]
            if old_value != new_value and not setting.metadata.get("may_change"):
                differences.append((f"{section.name}.{setting.name}", old_value, new_value))
    return differences
