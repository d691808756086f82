"""Autoencoders of diffusers beside AutoencoderKL: the deep compression autoencoder of SANA, and those of clips.

Shapes: B batch, C latent channels, T frames of the pixels, t those of the latents, H W height and width, h w those of
the latents.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.codecs.codec import Numbers, StoredCodec, StoredConfig, by_frame, digest, match_axes, pretrained
from tessera.errors import TesseraError

IMAGES = ("AutoencoderDC",)
CLIPS = (
    "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", "AutoencoderKLMochi",
    "AutoencoderKLQwenImage", "AutoencoderKLWan",
)  # fmt: skip
AutoencoderClass = Literal[
    "AutoencoderDC", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi", "AutoencoderKLQwenImage", "AutoencoderKLWan",
]  # fmt: skip
STATISTICS = {"scaling_factor", "latents_mean", "latents_std"}  # settings that raw moments do not depend on


class DiffusersAutoencoderConfig(StoredConfig):
    """A folder that diffusers saved, or a hub id. Scale and shift default to those of the source."""

    kind: Literal["autoencoder"] = "autoencoder"
    class_name: AutoencoderClass = Field(description="its class in diffusers")

    def build(self) -> "DiffusersAutoencoder":
        return DiffusersAutoencoder(self)


class DiffusersAutoencoder(StoredCodec):
    """An autoencoder of images or of clips. One of clips takes images, too: as clips of one frame.

    The first frame of a clip is one frame of latents, and each frame_factor frames after it are another one.
    """

    def __init__(self, config: DiffusersAutoencoderConfig) -> None:
        self.config = config
        self.network = self.vae = pretrained(_class(config.class_name), config).eval().requires_grad_(False)
        settings = self.vae.config
        # Whether x may be a clip as a whole; otherwise each frame is encoded by itself.
        self.takes_clips = self.stochastic = config.class_name in CLIPS
        self.pixel_channels = int(settings.get("in_channels") or 3)
        self.latent_channels = int(settings.get("latent_channels") or settings.get("z_dim"))
        self.factor, self.frame_factor = _factors(self.vae)
        self._set_normalization(config, *_statistics(self.vae))

    def _clip(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if self.takes_clips and x.ndim == 4 else x

    def _like(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Without the axis of frames, if the inputs have none."""
        return x.squeeze(2) if self.takes_clips and inputs.ndim == 4 else x

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] or [B, 3, T, H, W] -> [B, 2C, h, w] or [B, 2C, t, h, w]: mean and standard deviation"""
        if not self.takes_clips:
            return self._image_moments(pixels)
        posterior = self.vae.encode(self._clip(pixels)).latent_dist
        return self._like(torch.cat((posterior.mean, posterior.std), dim=1), pixels)

    @by_frame
    def _image_moments(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels).latent
        return torch.cat((latents, torch.zeros_like(latents)), dim=1)

    @by_frame
    def _decode_images(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] or [B, C, t, h, w] -> pixels [B, 3, H, W] or [B, 3, T, H, W], about -1 .. 1"""
        if not self.takes_clips:
            return self._decode_images(latents)
        latents, inputs = self._clip(latents), latents
        raw, arguments = latents / match_axes(self.scale, latents) + match_axes(self.shift, latents), {}
        if self.vae.config.get("timestep_conditioning"):  # the pipeline's default: no noise is added
            arguments["temb"] = raw.new_zeros(len(raw))
        return self._like(self.vae.decode(raw, **arguments, return_dict=False)[0], inputs)

    def fingerprint(self) -> str:
        """A hash of the autoencoder and its configuration, without the statistics of its latents."""
        facts = {name: value for name, value in self.vae.config.items() if name not in STATISTICS and name[0] != "_"}
        tensors = [pair for pair in self.vae.state_dict().items() if pair[0] not in STATISTICS]
        return digest(facts | {"kind": self.config.kind, "class_name": self.config.class_name}, tensors)

    def save(self, folder: Path) -> None:
        """Write the autoencoder as a diffusers folder. Raises TesseraError if scale or shift are given."""
        if (self.config.scale, self.config.shift) != (None, None):
            raise TesseraError(
                f"a folder of {self.config.class_name} has the scale and shift of its source: leave out codec.scale "
                "and codec.shift"
            )
        self.vae.save_pretrained(folder, safe_serialization=True)


def _class(name: str) -> Any:
    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, AttributeError):
        raise TesseraError(f"{name} needs diffusers: pip install -U 'tessera[diffusers]'") from None


def _factors(vae: Any) -> tuple[int, int]:
    """Pixels per latent along height and width, and frames."""
    settings = vae.config
    space = settings.get("scale_factor_spatial") or getattr(vae, "spatial_compression_ratio", None)
    time = settings.get("scale_factor_temporal") or settings.get("temporal_compression_ratio")
    time = time or getattr(vae, "temporal_compression_ratio", None)
    if time is None:
        time = 2 ** sum(settings.get("temperal_downsample") or ())
    return int(space or 2 ** (len(settings["block_out_channels"]) - 1)), int(time)


def _statistics(vae: Any) -> tuple[Numbers, Numbers]:
    """Scale and shift: latents = (raw - shift) * scale."""
    settings = vae.config
    scale = float(settings.get("scaling_factor") or 1.0)
    names = ("latents_mean", "latents_std")
    of_ltx = dict(vae.named_buffers())
    mean, std = (of_ltx[name] if name in of_ltx else settings.get(name) for name in names)
    if mean is None or std is None:
        return scale, 0.0
    return tuple(scale / float(number) for number in std), tuple(float(number) for number in mean)
