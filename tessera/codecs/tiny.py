"""Tiny autoencoders (Ollin Boer Bohan's TAESD and its relatives): small networks that approximate a large autoencoder.

Two layouts are read: folders of diffusers' AutoencoderTiny, and pairs of files, *_encoder and *_decoder (.pth or
.safetensors), as their author publishes them. Latents are deterministic: there is no posterior.

Shapes: B batch, C latent channels, H W height and width of the pixels, h w those of the latents: H = 8 h, W = 8 w.
"""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tessera.checkpoint_files import read_state_dict, write_tensors
from tessera.codecs.codec import StoredCodec, StoredConfig, by_frame, digest, pretrained
from tessera.errors import TesseraError

WIDTH, POOL_WIDTH, POOL_GROUPS = 64, 256, 4  # channels of all layers; channels and groups of the pool branch
ENCODER_BLOCKS, DECODER_BLOCKS = (1, 3, 3, 3), (3, 3, 3, 1)  # at each resolution, in the order of the layers
FACTOR = 2 ** (len(ENCODER_BLOCKS) - 1)


class TinyConfig(StoredConfig):
    """A folder of diffusers' AutoencoderTiny or its hub id, or a folder with a pair of files, *_encoder and *_decoder.

    A pair of files has no scale and shift of its own: 1 and 0 by default.
    """

    kind: Literal["autoencoder-tiny"] = "autoencoder-tiny"

    def build(self) -> "Tiny":
        return Tiny(self)


class Tiny(StoredCodec):
    """A deterministic codec: the moments' deviation is 0, and noise has no effect."""

    def __init__(self, config: TinyConfig) -> None:
        self.config = config
        files = _pair(config.folder) if config.folder else None
        network = _from_diffusers(config) if files is None else _from_files(*files)
        self.network = network.eval().requires_grad_(False)
        self.pixel_channels = 3
        self.latent_channels, self.factor = network.latent_channels, network.factor
        self._set_normalization(config, network.scale, network.shift)

    @torch.no_grad()
    @by_frame
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 2C, h, w]: the raw latents, and deviations of 0"""
        raw = self.network.encode(pixels)
        return torch.cat((raw, torch.zeros_like(raw)), dim=1)

    @torch.no_grad()
    @by_frame
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about -1 .. 1"""
        return self.network.decode(latents / self.scale + self.shift)

    def fingerprint(self) -> str:
        """A hash of the encoder."""
        return digest({"kind": self.config.kind}, self.network.encoder.state_dict().items())

    def save(self, folder: Path) -> None:
        """Write the weights in their own layout, as safetensors, for `TinyConfig(source=folder)`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.save(folder)


class Pair(nn.Module):
    """The network of a pair of files: 3 x 3 convolutions, 64 channels wide, for images in 0 .. 1."""

    factor, scale, shift = FACTOR, 1.0, 0.0

    def __init__(self, latent_channels: int, pool: bool) -> None:
        """pool: whether the blocks at the lowest resolution begin with a branch of global statistics."""
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = _encoder(latent_channels, pool)
        self.decoder = _decoder(latent_channels, pool)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1 .. 1 -> [B, C, h, w]"""
        return self.encoder(pixels / 2 + 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W], about -1 .. 1"""
        return self.decoder(latents) * 2 - 1

    def save(self, folder: Path) -> None:
        """Write both files, in float16 if the weights are: the published files are."""
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            weights = part.state_dict()
            halves = {key: tensor.half() for key, tensor in weights.items()}
            is_half = all(torch.equal(halves[key].float(), tensor) for key, tensor in weights.items())
            write_tensors(halves if is_half else weights, folder / f"tiny_{name}.safetensors")


class Block(nn.Module):
    """Three convolutions and a skip; with pool, first a residual whose group norm has global statistics."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, POOL_WIDTH, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, POOL_WIDTH),
                nn.ReLU(),
                nn.Conv2d(POOL_WIDTH, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64, H, W] -> the same shape"""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Clamp(nn.Module):
    """A smooth clamp to -3 .. 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _encoder(latent_channels: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage, blocks in enumerate(ENCODER_BLOCKS):
        layers.append(_conv(stride=2, bias=False) if stage else _conv(3))
        layers += [Block(pool and stage == len(ENCODER_BLOCKS) - 1) for _ in range(blocks)]
    return nn.Sequential(*layers, _conv(outputs=latent_channels))


def _decoder(latent_channels: int, pool: bool) -> nn.Sequential:
    layers = [Clamp(), _conv(latent_channels), nn.ReLU()]
    for stage, blocks in enumerate(DECODER_BLOCKS):
        if stage:
            layers += [nn.Upsample(scale_factor=2), _conv(bias=False)]
        layers += [Block(pool and stage == 0) for _ in range(blocks)]
    return nn.Sequential(*layers, _conv(outputs=3))


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The files of encoder and decoder; None for a folder of diffusers. Raises TesseraError."""
    if (folder / "config.json").exists():
        return None
    pair = []
    for name in ("encoder", "decoder"):
        files = sorted(path for path in folder.iterdir() if re.search(rf"_?{name}\.(pth|safetensors)$", path.name))
        stems = {path.stem for path in files}
        if len(stems) != 1:
            files_found = (
                f"{len(stems)} {name}s: {', '.join(sorted(stems))}" if stems else f"no *_{name}.pth or .safetensors"
            )
            raise TesseraError(
                f"cannot load a tiny autoencoder from {folder}: it holds {files_found}; expected one *_encoder and one "
                "*_decoder file, or a folder written by diffusers' AutoencoderTiny.save_pretrained"
            )
        pair.append(next((path for path in files if path.suffix == ".safetensors"), files[0]))
    return pair[0], pair[1]


def _from_files(encoder: Path, decoder: Path) -> Pair:
    first, second = read_state_dict(encoder), read_state_dict(decoder)
    last = f"{max((int(key.split('.')[0]) for key in first if key[0].isdigit()), default=0)}.weight"
    if last not in first:
        raise TesseraError(f"{encoder} is not the encoder of a tiny autoencoder: its layers are not numbered")
    network = Pair(len(first[last]), pool=any(".pool." in key for key in first))
    for part, weights, path in ((network.encoder, first, encoder), (network.decoder, second, decoder)):
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:400]
            raise TesseraError(
                f"{path} does not match a tiny autoencoder of {network.latent_channels} latent channels: {reason}"
            ) from None
    return network


class _Diffusers(nn.Module):
    """diffusers' AutoencoderTiny, whose images are in -1 .. 1."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.latent_channels = int(network.config.latent_channels)
        self.factor = 2 ** (len(network.config.num_encoder_blocks) - 1)
        self.scale = float(network.config.scaling_factor)
        self.shift = float(network.config.get("shift_factor") or 0.0)

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latents

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder, safe_serialization=True)


def _from_diffusers(config: TinyConfig) -> _Diffusers:
    try:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    except ImportError:
        raise TesseraError("this autoencoder needs diffusers: pip install 'tessera[diffusers]'") from None
    return _Diffusers(pretrained(AutoencoderTiny, config))
