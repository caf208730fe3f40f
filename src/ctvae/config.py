"""One frozen, typed tree that says everything about a run. Defaults are the recommended recipe.

    Config
    ├── model         which autoencoder: Slice2D | Stack2D | Conv3D | Wavelet3D, told apart by `kind` (networks.py)
    ├── data          intensity window, grid, patch
    ├── autoencoder   how the autoencoder is trained
    ├── polish        how its decoder is sharpened; finish and calibration likewise
    └── prior         how the flow prior is built and trained

A recipe is a YAML file of overrides in `ctvae/recipes/`; its name is the method's name on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ctvae import files
from ctvae.errors import ConfigError
from ctvae.networks import KINDS, MODELS, Model, Section, Size3, Wavelet3D, Widths

RECIPES = Path(__file__).parent / "recipes"
WINDOW_PRESETS_HU = {
    "full": (-1000.0, 1000.0),
    "abdomen": (-50.0, 200.0),  # the research group's window
    "soft": (-160.0, 240.0),
}
Perceptual = Literal[  # networks that MONAI's PerceptualLoss knows: of 3D scans, then of slices
    "none", "medicalnet_resnet10_23datasets", "medicalnet_resnet50_23datasets",
    "radimagenet_resnet50", "resnet50", "squeeze", "alex", "vgg",
]  # fmt: skip
Steps = Annotated[int, Field(ge=1)]
Sides = tuple[Steps, Steps, Steps]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
MOST_KEPT = 0.5  # of the noise that the flow finds


class Data(Section):
    window_hu: tuple[float, float] = Field((-1000.0, 1000.0), description="HU mapped to -1..1; values beyond are clipped")
    shape: Size3 | None = Field(None, description="D H W of a training group; none: the dataset's largest, on the model's grid")
    patch: Size3 | None = Field(None, description="random crop per training step; none: whole groups (wavelet3d only)")
    tile: Sides = Field((96, 256, 256), description="D H W of the largest tile of encoding and decoding, without its halo")
    max_shift_voxels: Size3 = Field((0, 4, 4), description="random shift of each training group along D H W")
    noise_hu: float = Field(0.0, ge=0, description="standard deviation of the noise added to training groups")

    @model_validator(mode="before")
    @classmethod
    def _window_by_name(cls, values: Any) -> Any:
        window = values.get("window_hu") if isinstance(values, dict) else None
        if isinstance(window, str):
            if window not in WINDOW_PRESETS_HU:
                raise ValueError(f"window_hu: {window!r} is not one of {', '.join(WINDOW_PRESETS_HU)}")
            return {**values, "window_hu": WINDOW_PRESETS_HU[window]}
        return values

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Data:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu: {self.window_hu[0]:g} is not below {self.window_hu[1]:g}")
        return self


class Training(Section):
    """What both training stages have in common."""

    steps: Steps = Field(6000, description="optimisation steps; the learning rate decays to zero over them")
    minutes: float | None = Field(None, gt=0, description="stop here if steps are not done; the decay follows the clock")
    batch: Steps = Field(1, description="groups (or patches) at a time, of all processes together")
    accumulate: Steps = Field(1, description="batches per step, one after the other: as one large batch, in less memory")
    optimizer: Literal["muon", "adam"] = "muon"
    lr: Positive = Field(6e-4, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; muon only")
    warmup: int = Field(20, ge=1, description="steps of linear warm-up")
    decay: Literal["cosine", "none"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: Share = 0.995
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = Field(20, ge=1)
    save_every: int = Field(200, ge=1, description="a multiple of log_every, so that no unseen loss is saved")
    max_skipped: Steps = Field(10, description="training stops when this many steps in a row are not finite")

    @model_validator(mode="after")
    def _saved_only_after_the_finite_check(self) -> Training:
        if self.save_every % self.log_every:
            raise ValueError(f"save_every {self.save_every} is not a multiple of log_every {self.log_every}")
        return self


class AutoencoderTraining(Training):
    reconstruction: Literal["l1", "mse_sum"] = Field("l1", description="mean over voxels, or summed as in the cited nets")
    reconstruction_weight: float = Field(1.0, gt=0)
    kl_weight: float = Field(1e-6, ge=0, description="on the KL, averaged (l1) or summed (mse_sum) like the reconstruction")
    kl_warmup: float = Field(0.0, ge=0, le=1, description="share of the training over which the KL's weight rises from 0")
    gradient_weight: float = Field(0.5, ge=0, description="L1 on finite differences along D, H, W")
    soft_tissue_weight: float = Field(1.0, ge=0, description="L1 again inside -160..240 HU")
    compile: bool = Field(False, description="torch.compile encoder and decoder: minutes at the start; no plan knows its memory")


class Sharpening(Training):
    """What `polish` and `finish` have in common: a decoder against a patch discriminator (spatial latents only)."""

    enabled: bool = False
    steps: Steps = 2000
    optimizer: Literal["muon", "adam"] = "adam"
    lr: Positive = 5e-5
    warmup: int = Field(150, ge=1, description="steps of linear warm-up; Adam's first ones go each way with full force")
    patch: Sides | Literal["whole"] | None = Field(None, description="random crop per step, or `whole` groups; none: data.patch")
    margin: int = Field(2, ge=0, description="latent voxels at a patch's sides that losses leave out: they lack what is beyond")
    adversarial: Literal["hinge", "lsgan", "relativistic"] = Field("relativistic", description="loss on logits")
    adversarial_weight: float = Field(0.1, ge=0)
    feature_weight: float = Field(0.05, ge=0, description="on the discriminator's features of what is reconstructed")
    perceptual: Perceptual = Field("none", description="MONAI's pretrained loss besides; its network is downloaded")
    perceptual_weight: float = Field(0.3, ge=0)
    latent_noise: float = Field(0.1, ge=0, description="noise on the encoded latents, in standard deviations")
    discriminator_width: int = Field(32, ge=1, le=1024)
    discriminator_lr: Positive = 2e-4
    momentum: Share = Field(0.0, description="of the discriminator, and of the decoder where its optimizer is adam")
    slope_penalty: float = Field(1.0, ge=0, description="on the discriminator's squared slopes; 0: none")

    @field_validator("patch", mode="before")
    @classmethod
    def _a_size_or_whole(cls, value: Any) -> Any:
        if not (value is None or value == "whole" or isinstance(value, list | tuple)):
            raise ValueError(f"{value!r} is neither a size, e.g. [32, 96, 96], nor whole")
        return value


class Polish(Sharpening):
    """Sharpening the decoder once the autoencoder is trained (`training/polish.py`)."""

    save_every: int = Field(40, ge=1, description="steps from one held-out score to the next; the best weights are kept")


class Finish(Sharpening):
    """Training the decoder on what the flow draws, once there is a prior (`training/finish.py`)."""

    save_every: int = Field(200, ge=1)
    drawn: Steps = Field(64, description="samples of the flow that are drawn to train on")
    anchor_weight: float = Field(1.0, ge=0, description="on what patches were before the stage, means of 4x4x4 voxels")
    moments_weight: float = Field(0.1, ge=0, description="on the means of simple statistics of texture")
    kept: Share = Field(0.0, description="share of the decoder's weights before the stage in those that it ends with")


class Calibrating(Section):
    """Outlines, lungs and fine detail put right in closed form, once the decoder is trained (`calibration.py`)."""

    enabled: bool = False


class Prior(Training):
    """A rectified flow over latents: a U-Net for spatial ones, an MLP for vectors (`models/velocity.py`)."""

    steps: Steps = 20000
    batch: Steps = 8
    lr: Positive = 1e-3
    ema_decay: Share = 0.998
    widths: Widths = Field((96, 160, 192), description="channels of the U-Net per resolution, fine to coarse")
    blocks: int = Field(2, ge=1, le=64, description="residual blocks per resolution, down and up")
    fold: bool = Field(False, description="2x2x2 latent voxels are one of the U-Net's: an eighth of the work on fine latents")
    detail_width: int = Field(0, ge=0, le=4096, description="channels of a local network on the latents' own grid; 0: none")
    detail_blocks: int = Field(3, ge=1, le=64, description="residual blocks of that network")
    rank: int = Field(64, ge=0, le=4096, description="principal directions of the Gaussian that the flow starts from")
    mlp_width: int = Field(512, ge=8, le=8192, description="width of the MLP for vector latents")
    encodings: int = Field(2, ge=1, le=1024, description="stored per training group: the first as it is, others augmented")
    max_rotation_degrees: float = Field(6.0, ge=0, le=180, description="about the body's axis, of the augmented encodings")
    max_zoom: float = Field(0.08, ge=0, lt=0.5, description="in plane, of the augmented encodings; their told spacing follows")
    mirror: float = Field(0.0, ge=0, le=1, description="share of the augmented encodings that are left for right, and told so")
    looks: int = Field(4, ge=0, description="times that samples are drawn while the flow trains, and judged by held-out groups")
    patience: int = Field(2, ge=1, description="the flow stops after this many looks in a row that were worse than the best")
    choose_average: bool = Field(True, description="after training, average the weights for as long as lowers the held-out loss")
    shard: bool = Field(False, description="cut the network up over the processes of torchrun: each trains and holds its share")
    sampling_steps: int = Field(20, ge=1, le=10_000, description="steps of the solver at generation, whichever solver it is")
    guidance: float = Field(1.5, ge=0, allow_inf_nan=False, description="classifier-free guidance by the conditions; 1: none")
    autoguidance: float = Field(1.0, ge=0, allow_inf_nan=False, description="guidance away from the Gaussian; 1: none")
    rescale: float = Field(0.5, ge=0, le=1, description="how far guided samples get the spread of unguided ones; 0: not at all")
    kept_noise: float = Field(0.0, ge=0, le=MOST_KEPT, description="share of the noise found midway that is kept as detail")
    time_shift: float = Field(-0.8, ge=-10, le=10, description="of the logit of training times: lower is nearer to the noise")
    time_spread: Positive = Field(1.4, description="of the logit of training times")
    null_probability: float = Field(0.1, ge=0, le=1, description="share of steps that hide the conditions")
    columns: tuple[str, ...] | None = Field(None, description="of the table given with --conditions; none: all of them")
    told: dict[str, float | str] = Field({}, description="conditions of new volumes unless others are asked for")

    @model_validator(mode="after")
    def _coarse_widths_split_into_heads(self) -> Prior:
        if any(width % 32 for width in self.widths[1:]):
            raise ValueError("widths: those below the finest are multiples of 32, the size of an attention head")
        return self


class Config(Section):
    method: str = "wavelet3d"
    seed: int = Field(0, ge=0)
    deterministic: bool = Field(False, description="only algorithms that give the same bits each time; slower on a card")
    model: Model = Wavelet3D()
    data: Data = Data()
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    polish: Polish = Polish()
    finish: Finish = Finish()
    calibration: Calibrating = Calibrating()
    prior: Prior = Prior()

    def patch_of(self, stage: str) -> Size3 | None:
        """D H W of the crop that a step of autoencoder, polish or finish trains on; none: whole groups."""
        own = getattr(getattr(self, stage), "patch", None)
        return self.data.patch if own is None else None if own == "whole" else own

    def margin_of(self, stage: str) -> Size3:
        """Voxels at either side of a patch of polish or finish that its losses leave out, along D H W.

        None along an axis where the patch is the whole group, and nowhere more than a quarter of the patch.
        """
        patch, whole, most = self.patch_of(stage), self.data.shape, getattr(self, stage).margin
        if patch is None or whole is None:
            return 0, 0, 0
        sizes = zip(patch, whole, self.model.grid, strict=True)
        d, h, w = (min(most, size // 4 // step) * step if size < all_of_it else 0 for size, all_of_it, step in sizes)
        return d, h, w

    @model_validator(mode="after")
    def _only_spatial_decoders_are_sharpened(self) -> Config:
        for name, section in (("polish", self.polish), ("finish", self.finish), ("calibration", self.calibration)):
            if section.enabled and self.model.kind != "wavelet3d":
                raise ValueError(f"{name}.enabled: {self.model.kind} has no spatial latents; leave it false")
        return self


def recipe_names() -> list[str]:
    """Every method the command line knows, the default first."""
    return sorted((path.stem for path in RECIPES.glob("*.yaml")), key=lambda name: (name != "wavelet3d", name))


def nearest(name: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def load_recipe(method: str, overrides: Sequence[str] = (), source: str | None = None) -> Config:
    """The recipe called `method` with `key=value` overrides applied, e.g. `model.latent_channels=16`.

    Raises ConfigError for an unknown method or key (naming the nearest one) and for values out of range; `source`, a file
    that the overrides come from, is then named.
    """
    path = RECIPES / f"{method}.yaml"
    if method not in recipe_names():
        known = f"{nearest(method, recipe_names())} (known: {', '.join(recipe_names())})"
        raise ConfigError(f"{f'{source}: ' if source else ''}unknown method '{method}'{known}")
    tree = {"method": method, **(yaml.safe_load(path.read_text()) or {})}
    for override in overrides:
        _set(tree, override)
    return validated(tree, source or (f"--set with method {method}" if overrides else path.name))


def with_overrides(cfg: Config, overrides: Sequence[str]) -> Config:
    """`cfg` with `key=value` overrides applied. Raises ConfigError."""
    tree = cfg.model_dump(mode="json")
    for override in overrides:
        _set(tree, override)
    return validated(tree, source="settings")


def load_config(path: Path) -> Config:
    """A saved `config.yaml`. Raises ConfigError."""
    try:
        tree = files.read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    return validated(tree, source=str(path))


def dump_config(cfg: Config) -> str:
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def validated(tree: Any, source: str) -> Config:
    """`Config` from a plain tree; pydantic's report becomes one line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error, tree)}") from error


def _set(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as key=value, e.g. autoencoder.lr=0.001")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: '{parent}' is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: cannot read the value {text!r}") from error
    if isinstance(node[leaf], str):
        with suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            node[leaf] = float(text)


def _first_problem(error: ValidationError, tree: Any) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"] if part not in KINDS and "[" not in str(part)]  # which of a union
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(location[-1], _fields_beside(location, tree)) or _elsewhere(location[-1])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _elsewhere(leaf: str) -> str:
    """`, did you mean 'data.patch'?` where a section has a setting of that name, or nothing."""
    sections = {name: field.annotation for name, field in Config.model_fields.items() if name != "model"}
    found = [f"{name}.{leaf}" for name, section in sections.items() if leaf in getattr(section, "model_fields", {})]
    found += [f"model.{leaf}"] if any(leaf in kind.model_fields for kind in MODELS) else []
    return f", did you mean '{found[0]}'?" if found else ""


def _fields_beside(location: list[str], tree: Any) -> list[str]:
    """Names that would have been right where the last part of `location` was wrong."""
    if location[:-1] == ["model"]:
        kind = tree["model"].get("kind")
        return next((list(m.model_fields) for m in MODELS if m.model_fields["kind"].default == kind), [])
    section: Any = Config
    for part in location[:-1]:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)
