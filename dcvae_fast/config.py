"""All settings of a run: frozen dataclasses, filled by a recipe and by overrides. Imports no torch.

A recipe is a YAML file in `dcvae_fast/recipes`, one for each experiment; it lists only what differs from the defaults
here, which are the paper's CIFAR-10 run with the gaps filled as the authors' code does. `official` in a docstring is
that code.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcvae_fast.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"

Layer = Literal["b1", "b2", "b3", "b4", "low", "final"]

# Settings that a run may change when it is resumed: they do not alter what is computed.
_MAY_CHANGE = {"may_change": True}


def _check(setting: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{setting} is {value!r}; it must be {wanted}.")


@dataclass(frozen=True)
class DataConfig:
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
    root: str | None = field(default=None, metadata=_MAY_CHANGE)
    download: bool = field(default=False, metadata=_MAY_CHANGE)
    mirror: bool = False
    drop_last: bool = False
    on_corrupt: Literal["stop", "skip"] = field(default="stop", metadata=_MAY_CHANGE)
    resident: bool = field(default=False, metadata=_MAY_CHANGE)
    threads: int | None = field(default=None, metadata=_MAY_CHANGE)
    prefetch: int = field(default=2, metadata=_MAY_CHANGE)

    def __post_init__(self):
        _check("data.threads", self.threads, self.threads is None or self.threads >= 1, "null or at least 1")
        _check("data.prefetch", self.prefetch, self.prefetch >= 1, "at least 1")


@dataclass(frozen=True)
class ModelConfig:
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
    image_channels: int = 3
    latent_dim: int = 128
    decoder_width: int = 256
    encoder_width: int = 128
    discriminator_width: int = 128
    base_channels: int = 16384
    max_channels: int = 512
    contrast_dim: int = 16
    sample_clamp: float | None = None
    reconstruct_from: Literal["mean", "sample"] = "mean"
    alpha: float = 1.0

    def __post_init__(self):
        sizes = (
            "image_channels",
            "latent_dim",
            "decoder_width",
            "encoder_width",
            "discriminator_width",
            "base_channels",
            "max_channels",
            "contrast_dim",
        )
        for name in sizes:
            _check(f"model.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        clamp = self.sample_clamp
        _check("model.sample_clamp", clamp, clamp is None or clamp > 0, "null or above 0")
        _check("model.alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        if self.grows:
            known = [4 * 2**i for i in range(9)]
            _check("model.resolution", self.resolution, self.resolution in known, f"one of {known} for progressive")
        else:
            _check("model.resolution", self.resolution, self.resolution == 32, "32 for autogan")

    @property
    def grows(self) -> bool:
        return self.architecture == "progressive"


@dataclass(frozen=True)
class GrowthConfig:
    """How progressive networks grow: stabilise, then for each doubled resolution fade in and stabilise.

    Attributes:
        start: the first resolution
        fade_images: images shown while a resolution's layers are faded in (Progressive GAN: 600,000, or 800,000)
        stable_images: images shown at a resolution afterwards
        batch: real images an iteration, by resolution
        lr: learning rate by resolution, where it is not optim.lr
    """

    start: int = 4
    fade_images: int = 600_000
    stable_images: int = 600_000
    batch: dict[int, int] = field(
        default_factory=lambda: {4: 16, 8: 16, 16: 16, 32: 16, 64: 16, 128: 16, 256: 14, 512: 6, 1024: 3}
    )
    lr: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        _check("growth.fade_images", self.fade_images, self.fade_images >= 0, "0 or more")
        _check("growth.stable_images", self.stable_images, self.stable_images >= 1, "at least 1")
        for resolution, batch in self.batch.items():
            _check(f"growth.batch[{resolution}]", batch, batch >= 1, "at least 1")
        for resolution, lr in self.lr.items():
            _check(f"growth.lr[{resolution}]", lr, lr > 0, "above 0")


@dataclass(frozen=True)
class LossConfig:
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
    penalty: float = 10.0
    penalty_every: int = 16
    drift: float = 1e-3
    kl_weight: float = 6.4e-5
    order: Literal["sequential", "joint"] = "sequential"

    def __post_init__(self):
        for name in ("kl_weight", "penalty", "drift"):
            _check(f"loss.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("loss.penalty_every", self.penalty_every, self.penalty_every >= 1, "at least 1")

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
class ContrastConfig:
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

    negatives: int = 8096
    temperature: float = 0.07
    layers: tuple[Layer, ...] = ("b2", "final")
    momentum: float = 0.999
    queue_start: Literal["empty", "noise"] = "empty"
    exclude_same_image: bool = True
    local_layers: tuple[Literal["b1", "b2", "b3", "b4"], ...] = ("b2",)
    local_start_images: int | None = None

    def __post_init__(self):
        _check("contrast.negatives", self.negatives, self.negatives >= 1, "at least 1")
        _check("contrast.temperature", self.temperature, self.temperature > 0, "above 0")
        _check("contrast.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        for name in ("layers", "local_layers"):
            layers = getattr(self, name)
            _check(f"contrast.{name}", layers, 0 < len(set(layers)) == len(layers), "one or more different layers")
        start = self.local_start_images
        _check("contrast.local_start_images", start, start is None or start >= 0, "null, or 0 or more")


@dataclass(frozen=True)
class OptimConfig:
    """Adam, the same for every network.

    Attributes:
        lr: learning rate
        betas: decay of the two moments
        eps: added to the root of the second moment
        fused: whose: apex (NVIDIA's, for GPUs), deepspeed (compiled when first used), torch, or auto: apex where it is
            installed, else torch
        loss_scale: train.precision float16: what losses are multiplied by at first; halved where a gradient overflows
        loss_scale_window: steps without an overflow after which it is doubled
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    eps: float = 1e-8
    fused: Literal["auto", "apex", "deepspeed", "torch"] = field(default="auto", metadata=_MAY_CHANGE)
    loss_scale: float = 65536.0
    loss_scale_window: int = 2000

    def __post_init__(self):
        _check("optim.lr", self.lr, self.lr > 0, "above 0")
        _check("optim.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _check("optim.eps", self.eps, self.eps > 0, "above 0")
        _check("optim.loss_scale", self.loss_scale, self.loss_scale >= 1, "at least 1")
        _check("optim.loss_scale_window", self.loss_scale_window, self.loss_scale_window >= 1, "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how.

    Attributes:
        images: stop after this many images shown
        batch: real images (and reconstructions) an iteration; of progressive networks, see growth.batch
        sampled_batch: prior samples in an autoencoder step; null for as many as real images
        batch_per_rank: whether these and growth.batch are each process's own, or shared out among all
        n_critic: discriminator steps for each autoencoder and contrastive step
        average: decay of the decoder's moving average, which makes samples and reconstructions
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

    images: int = field(default=40_000_000, metadata=_MAY_CHANGE)
    batch: int = 64
    sampled_batch: int | None = 128
    batch_per_rank: bool = False
    n_critic: int = 5
    average: float = 0.999
    seed: int = 0
    device: str = field(default="auto", metadata=_MAY_CHANGE)
    micro_batch: int | None = None
    checkpoint_activations: bool = field(default=False, metadata=_MAY_CHANGE)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool | None = field(default=None, metadata=_MAY_CHANGE)
    graphs: bool | None = field(default=None, metadata=_MAY_CHANGE)
    engine: Literal["auto", "torch", "deepspeed"] = field(default="auto", metadata=_MAY_CHANGE)
    zero: Literal[0, 1, 2] | None = field(default=None, metadata=_MAY_CHANGE)
    deepspeed_config: str | None = field(default=None, metadata=_MAY_CHANGE)

    def __post_init__(self):
        _check("train.images", self.images, self.images >= 0, "0 or more")
        _check("train.n_critic", self.n_critic, self.n_critic >= 1, "at least 1")
        micro = self.micro_batch
        _check("train.micro_batch", micro, micro is None or micro >= 1, "null or at least 1")
        sampled = self.sampled_batch
        _check("train.sampled_batch", sampled, sampled is None or sampled >= 1, "null or at least 1")
        _check("train.batch", self.batch, self.batch >= 2, "at least 2, for batch normalisation")
        _check("train.average", self.average, 0 <= self.average < 1, "in [0, 1)")
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
class LogConfig:
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

    every: int = field(default=64_000, metadata=_MAY_CHANGE)
    grids_every: int = field(default=640_000, metadata=_MAY_CHANGE)
    checkpoint_every: int = field(default=640_000, metadata=_MAY_CHANGE)
    keep: int = field(default=2, metadata=_MAY_CHANGE)
    metrics_every: int | None = field(default=None, metadata=_MAY_CHANGE)
    held_out: int | None = field(default=None, metadata=_MAY_CHANGE)
    fid_images: int = field(default=0, metadata=_MAY_CHANGE)
    weights: str | None = field(default=None, metadata=_MAY_CHANGE)

    def __post_init__(self):
        for name, least in (("every", 1), ("grids_every", 1), ("checkpoint_every", 1), ("keep", 2)):
            value = getattr(self, name)
            _check(f"log.{name}", value, value >= least, f"at least {least}")
        every, held_out, fid_images = self.metrics_every, self.held_out, self.fid_images
        _check("log.metrics_every", every, every is None or every >= 1, "null or at least 1")
        _check("log.held_out", held_out, held_out is None or held_out >= 0, "null, or 0 or more")
        _check("log.fid_images", fid_images, fid_images == 0 or fid_images >= 2, "0, or at least 2")
        _check("log.fid_images", fid_images, fid_images == 0 or held_out != 0, "0 where log.held_out is")


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
                "contrast.layers", contrast.layers, "final" in contrast.layers, "with final, for low begins at 16×16"
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


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """The same as lines `section.name: old → new`."""
    return [f"{setting}: {was} → {now}" for setting, was, now in changes(old, new)]


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe, by its name or as a path of the user's own.

    Raises:
        ConfigError: there is no such recipe; the message lists those there are.
    """
    if name.endswith((".yaml", ".yml")):
        path, known = Path(name), ""
    else:
        path, known = RECIPES / f"{name}.yaml", f"; the recipes are {', '.join(recipes())}, or a path to a .yaml file"
    if not path.is_file():
        raise ConfigError(f"--recipe {name}: no such recipe{known}.")
    return path


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
