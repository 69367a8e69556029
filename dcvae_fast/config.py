"""All settings of a run: frozen dataclasses, filled by a recipe and by overrides. Imports no torch.

The defaults are the paper's CIFAR-10 run with the gaps filled as the authors' code does; `recipes.py` lists for each
experiment what differs from them. `official` in a docstring is the authors' code.
"""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args

from dcvae_fast.errors import ConfigError

Layer = Literal["b1", "b2", "b3", "b4", "low", "final"]


_HOLDS: dict[str, Callable[[Any, float], bool]] = {
    "least": operator.ge,
    "above": operator.gt,
    "most": operator.le,
    "below": operator.lt,
}


def setting(default: Any, *, may_change: bool = False, **bounds: float) -> Any:
    """Return a dataclass field with a default and a range. The range holds for each entry of a tuple or dict.

    Args:
        default: value if no recipe says otherwise.
        may_change: whether a resumed run may change the setting, because it does not alter what is computed.
        bounds: `least` or `above`, and with `least` possibly `most` or `below`; a value may equal `least` and `most`.
    """
    metadata = {"bounds": bounds, "may_change": may_change}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _range(least: float = 0, above: float | None = None, most: float | None = None, below: float | None = None) -> str:
    """Return bounds in words."""
    if above is not None:
        return f"above {above}"
    if below is not None:
        return f"in [{least}, {below})"
    if most is not None:
        return f"in [{least}, {most}]"
    return "0 or more" if least == 0 else f"at least {least}"


def _check(setting: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{setting} is {value!r}; it must be {wanted}.")


@dataclass(frozen=True)
class _Section:
    """Base of the sections of a configuration: checks the range of each setting."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Config").lower()
        for option in dataclasses.fields(self):
            name, value = f"{section}.{option.name}", getattr(self, option.name)
            bounds, optional = option.metadata.get("bounds"), NoneType in get_args(option.type)
            if not bounds or (value is None and optional):
                continue
            wanted = _range(**bounds)
            if optional:
                wanted = f"null, or {wanted}" if " or " in wanted else f"null or {wanted}"
            entries = {name: value}
            if isinstance(value, dict):
                entries = {f"{name}[{key}]": entry for key, entry in value.items()}
            elif isinstance(value, tuple | list):
                entries = {f"{name}[{index}]": entry for index, entry in enumerate(value)}
            for entry_name, entry in entries.items():
                _check(entry_name, entry, all(_HOLDS[kind](entry, bound) for kind, bound in bounds.items()), wanted)


@dataclass(frozen=True)
class DataConfig(_Section):
    """Which images.

    Attributes:
        name: the data set; folder is any folder of images, shards are what `dcvae prepare` makes of one
        root: folder of the data set, in torchvision's layout where torchvision knows it; `digits` needs none
        download: fetch a missing data set into root, where torchvision can
        mirror: flip each image left to right with probability 1/2
        drop_last: leave out the end of each epoch that does not fill a batch (official), else let batches run on
        on_corrupt: stop at an image that cannot be decoded, or skip it with a warning
        resident: decode everything once, at the start, and keep it on the device: fast, where it fits there and every
            image can be decoded. What is only ever shown at 32×32 always is
        threads: CPU threads that read and decode; null for as many as there are cores
        prefetch: batches decoded ahead
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
    """The networks.

    Attributes:
        architecture: autogan (Figure 15; 32×32), or progressive (grows from 4×4 to `resolution`)
        resolution: height and width of the images, in the end, in pixels
        image_channels: 3 for colour, 1 for greyscale
        latent_dim: size Z of the latent
        decoder_width: autogan: channels of the decoder's feature maps
        encoder_width: autogan: channels of the encoder's feature maps
        discriminator_width: autogan: channels of the discriminator's feature maps
        base_channels: progressive: a feature map of R×R has min(base_channels / R, max_channels) channels
        max_channels: see there
        contrast_dim: size D of a query or key (paper: 16)
        sample_clamp: clamp prior samples to [-clamp, clamp] (official for FID: 1); null leaves them alone
        reconstruct_from: the posterior's mean, or a draw from it (official for FID)
        alpha: progressive: share of the last resolution's layers; below 1 in a model that was saved while they faded in
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

    @property
    def grows(self) -> bool:
        return self.architecture == "progressive"


@dataclass(frozen=True)
class GrowthConfig(_Section):
    """How progressive networks grow: stabilise, then for each doubled resolution fade in and stabilise.

    Attributes:
        start: the first resolution
        fade_images: images shown while a resolution's layers are faded in (Progressive GAN: 600,000, or 800,000)
        stable_images: images shown at a resolution afterwards
        batch: real images an iteration, by resolution
        lr: learning rate by resolution, where it is not optim.lr
    """

    start: int = 4
    fade_images: int = setting(600_000, least=0)
    stable_images: int = setting(600_000, least=1)
    batch: dict[int, int] = setting(  # noqa: RUF009
        {4: 16, 8: 16, 16: 16, 32: 16, 64: 16, 128: 16, 256: 14, 512: 6, 1024: 3}, least=1
    )
    lr: dict[int, float] = setting({}, above=0)  # noqa: RUF009


@dataclass(frozen=True)
class LossConfig(_Section):
    """What is minimised (Eq. 9 and the rows of Table 1).

    Attributes:
        objective: dc_vae (InfoNCE + GAN + KL), or an ablation: vae (pixel L2 + KL), vae_gan (L2 in the discriminator's
            features + KL + GAN), vae_contrastive (InfoNCE + KL)
        adversarial: hinge (official), log (Eq. 4; the generator's side in its non-saturating form), wgan_gp (with its
            penalty and drift, as Progressive GAN), or logistic_r1 (log with fakes at half weight each and a penalty)
        penalty: weight of the gradient penalty of wgan_gp and logistic_r1 (10 for both)
        penalty_every: iterations from one R1 penalty to the next, which then counts as many times
        drift: weight of the squared score of real images in wgan_gp
        kl_weight: weight of the KL divergence, a sum over the latent and a mean over the batch (official: 1e-6 on
            the sum over 64 images)
        order: sequential (official) steps the autoencoder for the adversarial loss, then for the instance loss; joint
            steps once for both on one reconstruction (Eq. 9)
    """

    objective: Literal["dc_vae", "vae", "vae_gan", "vae_contrastive"] = "dc_vae"
    adversarial: Literal["hinge", "log", "wgan_gp", "logistic_r1"] = "hinge"
    penalty: float = setting(10.0, least=0)
    penalty_every: int = setting(16, least=1)
    drift: float = setting(1e-3, least=0)
    kl_weight: float = setting(6.4e-5, least=0)
    order: Literal["sequential", "joint"] = "sequential"

    @property
    def has_gan(self) -> bool:
        return self.objective in ("dc_vae", "vae_gan")

    @property
    def instance(self) -> Literal["contrast", "feature", "pixel"]:
        """The reconstruction term: InfoNCE (Eq. 6), L2 between features (Eq. 3), or L2 between pixels (Eq. 1)."""
        if self.objective in ("dc_vae", "vae_contrastive"):
            return "contrast"
        return "feature" if self.objective == "vae_gan" else "pixel"


@dataclass(frozen=True)
class ContrastConfig(_Section):
    """Multi-scale instance contrast (Eq. 6, §4.2).

    Attributes:
        negatives: keys K in the queue (paper: 8096)
        temperature: divides the cosine similarities
        layers: where features are contrasted: after residual block 1 to 4 (autogan) or at 16×16 (progressive: low), and
            at the last linear layer (final). The paper takes b2 and final, official b1 and final. vae_gan compares its
            features here too
        momentum: decay of the moving average of the discriminator that makes the keys
        queue_start: empty (only filled slots count), or noise (official: normalised Gaussian keys)
        exclude_same_image: an image's own older keys in the queue are no negatives (Eq. 6); official counts them
        local_layers: feature maps for local patch contrast
        local_start_images: images shown before local patch contrast begins; null for never (official)
    """

    negatives: int = setting(8096, least=1)
    temperature: float = setting(0.07, above=0)
    layers: tuple[Layer, ...] = ("b2", "final")
    momentum: float = setting(0.999, least=0, below=1)
    queue_start: Literal["empty", "noise"] = "empty"
    exclude_same_image: bool = True
    local_layers: tuple[Literal["b1", "b2", "b3", "b4"], ...] = ("b2",)
    local_start_images: int | None = setting(None, least=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("layers", "local_layers"):
            layers = getattr(self, name)
            _check(f"contrast.{name}", layers, 0 < len(set(layers)) == len(layers), "one or more different layers")


@dataclass(frozen=True)
class OptimConfig(_Section):
    """Adam, the same for every network.

    Attributes:
        lr: learning rate
        betas: decay of the two moments
        eps: added to the root of the second moment
        implementation: apex (NVIDIA's, for GPUs), deepspeed (compiled when first used), torch, or auto: apex if it is
            installed, else torch
        loss_scale: train.precision float16: what losses are multiplied by at first; halved where a gradient overflows
        loss_scale_window: steps without an overflow after which it is doubled
    """

    lr: float = setting(2e-4, above=0)
    betas: tuple[float, float] = setting((0.0, 0.9), least=0, below=1)
    eps: float = setting(1e-8, above=0)
    implementation: Literal["auto", "apex", "deepspeed", "torch"] = setting("auto", may_change=True)
    loss_scale: float = setting(65536.0, least=1)
    loss_scale_window: int = setting(2000, least=1)


@dataclass(frozen=True)
class TrainConfig(_Section):
    """How long and how.

    Attributes:
        images: stop after this many images shown
        batch: real images (and reconstructions) an iteration; of progressive networks, see growth.batch
        sampled_batch: prior samples in an autoencoder step; null for as many as real images
        batch_per_rank: whether these and growth.batch are each process's own, or shared out among all
        n_critic: discriminator steps for each autoencoder and contrastive step
        ema_decay: decay of the exponential moving average of the decoder (EMA), which samples and reconstructs
        seed: of everything random
        device: cpu, cuda, or auto (cuda where there is one); of several processes each takes the GPU of its number
        micro_batch: progressive: real images worked on at a time, to need less memory; null for the whole batch. The
            gradients stay the same if it is a multiple of 4, the images that share a minibatch's statistics
        checkpoint_activations: progressive: keep less for the backward pass and compute it again
        precision: of the networks' arithmetic where it does no harm (autocast); float16 scales the losses, for GPUs
            without bfloat16. Weights, and everything else, are float32
        compile: whether torch compiles the networks, which takes a minute or two at each resolution; null: on GPUs,
            if a C compiler and Python's headers are installed
        graphs: whether whole iterations become CUDA graphs, so that the processor has next to nothing to do; null for:
            on a single GPU, unless DeepSpeed, float16 or another Adam than torch's is asked for
        engine: what averages gradients over processes and steps: torch, or deepspeed; auto is deepspeed where its
            launcher started the run, or one of the next two settings asks for it
        zero: DeepSpeed's ZeRO stage: what is cut up among processes; 0 nothing, 1 Adam's moments, 2 gradients too
        deepspeed_config: a JSON file with more settings for DeepSpeed
    """

    images: int = setting(40_000_000, least=0, may_change=True)
    batch: int = setting(64, least=2)  # batch normalisation needs two
    sampled_batch: int | None = setting(128, least=1)
    batch_per_rank: bool = False
    n_critic: int = setting(5, least=1)
    ema_decay: float = setting(0.999, least=0, below=1)
    seed: int = 0
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
        asked = self.zero is not None or self.deepspeed_config is not None
        _check(
            "train.engine",
            self.engine,
            not (asked and self.engine == "torch"),
            "deepspeed for train.zero and train.deepspeed_config",
        )

    @property
    def uses_deepspeed(self) -> bool:
        return self.engine == "deepspeed" or self.zero is not None or self.deepspeed_config is not None


@dataclass(frozen=True)
class LogConfig(_Section):
    """What a run writes, and how often, counted in images shown.

    Attributes:
        every: means of all metrics to the terminal, metrics.jsonl and TensorBoard
        grids_every: reconstructions, samples and interpolations as PNG
        checkpoint_every: everything that resuming needs
        keep: newest checkpoints that are kept
        metrics_every: metrics of held-out images, to metrics.jsonl and TensorBoard; null for as often as grids
        held_out: images for them: pixel error and, where there are labels, the accuracy of a linear probe; null for
            1,000 at 32×32 and fewer at higher resolutions, 0 for no such metrics
        fid_images: samples, and training images, for an FID among them; 0 for none. Of a few thousand it is too high,
            and good for comparing with itself only
        weights: folder with Inception's weights, which FID needs; null to have them downloaded
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
        _check("log.fid_images", fid_images, fid_images == 0 or fid_images >= 2, "0, or at least 2")
        _check("log.fid_images", fid_images, fid_images == 0 or self.held_out != 0, "0 where log.held_out is")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

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
        wrong = [layer for layer in contrast.layers if layer not in layers]
        wanted = f"among {', '.join(layers)} for {model.architecture} at {model.resolution}×{model.resolution}"
        _check("contrast.layers", contrast.layers, not wrong, wanted)
        train = self.train
        if not model.grows:  # batch normalisation sees the whole batch
            _check("train.micro_batch", train.micro_batch, train.micro_batch is None, "null for autogan")
            saving = train.checkpoint_activations
            _check("train.checkpoint_activations", saving, not saving, "false for autogan")
            return
        # Samples and reconstructions share a batch, and must not share statistics of it.
        _check("train.sampled_batch", train.sampled_batch, train.sampled_batch is None, "null for progressive")
        local = contrast.local_start_images
        _check("contrast.local_start_images", local, local is None, "null for progressive")
        starts = [4 * 2**i for i in range(9) if 4 * 2**i <= model.resolution]
        _check("growth.start", growth.start, growth.start in starts, f"one of {starts}")
        if growth.start < 16 and self.loss.instance != "pixel":
            _check(
                "contrast.layers",
                contrast.layers,
                "final" in contrast.layers,
                "with final: low begins at 16×16",
            )
        reached = [resolution for resolution in starts if growth.start <= resolution]
        missing = [resolution for resolution in reached if resolution not in growth.batch]
        _check("growth.batch", growth.batch, not missing, f"given for {', '.join(map(str, missing))} too")
        _check("growth.lr", growth.lr, set(growth.lr) <= set(reached), f"for resolutions among {reached}")
        if (micro := train.micro_batch) is not None:  # statistics are of four neighbours
            for batch in (growth.batch[resolution] for resolution in reached):
                same = batch <= micro or batch % 4 == micro % 4 == 0
                _check("train.micro_batch", micro, same, f"a multiple of 4, as the batch of {batch}, which it cuts")


def to_dict(config: Any) -> dict[str, Any]:
    """A (section of a) configuration as plain values, as JSON and YAML hold them."""
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }


def changes(old: dict[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
    """What `new` would compute differently from the stored `old`: for each setting its name, `section.name`, and both
    values.

    Settings that alter only how long a run goes on, where it runs and what it writes do not count.
    """
    found = []
    for section in dataclasses.fields(new):
        values, stored = getattr(new, section.name), old.get(section.name)
        stored, wanted = stored if isinstance(stored, dict) else {}, to_dict(values)
        for setting in dataclasses.fields(values):
            was, now = stored.get(setting.name, "not set"), wanted[setting.name]
            if was != now and not setting.metadata.get("may_change"):
                found.append((f"{section.name}.{setting.name}", was, now))
    return found
