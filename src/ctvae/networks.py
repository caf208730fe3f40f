"""What an autoencoder may be: the settings of each method's network.

Each network of `models/` is built from one of these; `config.py` has the rest of a run's settings.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size3 = tuple[int, int, int]
Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(min_length=1, max_length=12)]
Blocks = Annotated[tuple[Annotated[int, Field(ge=0, le=64)], ...], Field(max_length=12)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice2D(Section):
    """A VAE on single axial slices; a volume is its slices side by side (`models/slice2d.py`)."""

    kind: Literal["slice2d"] = "slice2d"
    widths: Widths = Field((32, 64, 128, 256), description="channels after each stride-2 convolution")
    latent_size: int = Field(128, ge=1, le=2**20, description="numbers per slice")

    @property
    def grid(self) -> Size3:
        """A volume's D, H, W are multiples of these."""
        step = 2 ** len(self.widths)
        return 1, step, step


class Stack2D(Section):
    """2D convolutions with the slices of a group as input channels (`models/stack2d.py`)."""

    kind: Literal["stack2d"] = "stack2d"
    base: int = Field(2, ge=1, le=8192, description="channels of the first convolution; each stage doubles them")
    stages: int = Field(4, ge=1, le=8, description="stride-2 convolutions")
    slices_per_stack: int = Field(64, ge=1, le=4096, description="slices taken as input channels at a time")
    latent_size: int = Field(128, ge=1, le=2**20, description="numbers per stack")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base * 2**stage for stage in range(self.stages))

    @property
    def grid(self) -> Size3:
        """A volume's D, H, W are multiples of these."""
        return self.slices_per_stack, 2**self.stages, 2**self.stages


class Conv3D(Section):
    """Six 3D convolutions to one dense latent vector (`models/conv3d.py`)."""

    kind: Literal["conv3d"] = "conv3d"
    widths: Widths = Field((16, 32, 64, 128, 256, 512), description="channels after each convolution")
    stride: int = Field(2, ge=1, le=2, description="stride of each convolution; 1 is the cited net, which fits nowhere")
    latent_size: int = Field(64, ge=1, le=2**20, description="numbers per volume")

    @property
    def grid(self) -> Size3:
        """A volume's D, H, W are multiples of these."""
        step = self.stride ** len(self.widths)
        return step, step, step


class Wavelet3D(Section):
    """A Haar stem, then a residual 3D KL autoencoder with spatial latents (`models/wavelet3d.py`)."""

    kind: Literal["wavelet3d"] = "wavelet3d"
    strides: tuple[Size3, ...] = Field(((2, 2, 2),) * 3, description="per-axis (D H W) Haar steps, fine to coarse")
    widths: Widths = Field((32, 128, 160), description="channels after each Haar step")
    blocks: Blocks = Field((1, 2, 2), description="residual blocks after each Haar step")
    decoder_blocks: Blocks | None = Field(None, description="the decoder's, fine to coarse; none: as many as `blocks`")
    latent_channels: int = Field(32, ge=1, le=1024, description="channels of the latent volume")
    strided: bool = Field(False, description="below the first level strided convolutions in place of Haar steps")
    tone: bool = Field(False, description="a curve on decoded values, fitted before polish: HU as frequent as in scans")
    checkpointing: bool = Field(False, description="recompute each block in the backward pass: less memory, more time")

    @property
    def grid(self) -> Size3:
        """Image voxels per latent voxel along D, H, W; a volume's D, H, W are multiples of these."""
        d, h, w = 1, 1, 1
        for stride in self.strides:
            d, h, w = d * stride[0], h * stride[1], w * stride[2]
        return d, h, w

    @property
    def decoding_blocks(self) -> tuple[int, ...]:
        """Residual blocks of the decoder's levels, fine to coarse."""
        return self.blocks if self.decoder_blocks is None else self.decoder_blocks

    @model_validator(mode="after")
    def _one_entry_per_level(self) -> Wavelet3D:
        if not len(self.strides) == len(self.widths) == len(self.blocks) == len(self.decoding_blocks):
            raise ValueError("strides, widths, blocks and decoder_blocks need one entry per level each")
        if any(step not in (1, 2) for stride in self.strides for step in stride):
            raise ValueError("a Haar step is 1 or 2 along each axis")
        return self


Model = Annotated[Slice2D | Stack2D | Conv3D | Wavelet3D, Field(discriminator="kind")]
MODELS: tuple[type[Slice2D | Stack2D | Conv3D | Wavelet3D], ...] = get_args(get_args(Model)[0])
KINDS = {model.model_fields["kind"].default for model in MODELS}
