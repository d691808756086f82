"""The tiny autoencoders (Ollin Boer Bohan's TAESD and its kin): small networks that stand in for a large autoencoder.

Two layouts are read: folders of diffusers' AutoencoderTiny, and a pair of files, *_encoder and *_decoder (.pth or
.safetensors), as their author publishes them. Latents follow from pixels: there is no posterior.

Shapes: B batch, C latent channels, H W height and width of the pixels, h w those of the latents: H = 8 h, W = 8 w.
"""

import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.codecs.codec import StoredCodec, StoredConfig, digest, pretrained
from tessera.errors import TesseraError

WIDTH, INSIDE, GROUPS = 64, 256, 4  # channels of all layers, and of the middle blocks' branch; its groups
ENCODER_BLOCKS, DECODER_BLOCKS = (1, 3, 3, 3), (3, 3, 3, 1)  # at each resolution, in the order of the layers
FACTOR = 2 ** (len(ENCODER_BLOCKS) - 1)


class TinyConfig(StoredConfig):
    """A folder of diffusers' AutoencoderTiny or its hub id, or a folder with a pair of files, *_encoder and *_decoder.

    A pair of files has no scale and shift of its own: 1 and 0, if not said here.
    """

    kind: Literal["autoencoder-tiny"] = "autoencoder-tiny"

    def build(self) -> "Tiny":
        return Tiny(self)


class Tiny(StoredCodec):
    """The moments' deviation is 0, and noise changes nothing."""

    def __init__(self, config: TinyConfig) -> None:
        self.config = config
        files = _pair(config.folder) if config.folder else None
        network = _from_diffusers(config) if files is None else _from_files(*files)
        self.network = network.eval().requires_grad_(False)
        self.pixel_channels = 3
        self.latent_channels, self.factor = network.latent_channels, network.factor
        self._normalise(config, network.scale, network.shift)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 2C, h, w]: the latents as the network makes them, and deviations of 0"""
        raw = self.network.encode(pixels)
        return torch.cat((raw, torch.zeros_like(raw)), dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about -1 .. 1"""
        return self.network.decode(latents / self.scale + self.shift)

    def fingerprint(self) -> str:
        """A hash of the encoder."""
        return digest({"kind": self.config.kind}, self.network.encoder.state_dict().items())

    def save(self, folder: Path) -> None:
        """Write the weights in the layout they came in, as safetensors, which `TinyConfig(source=folder)` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.save(folder)


class Pair(nn.Module):
    """The network of a pair of files: 3 x 3 convolutions, 64 channels wide, for images in 0 .. 1."""

    factor, scale, shift = FACTOR, 1.0, 0.0

    def __init__(self, latent_channels: int, middle: bool) -> None:
        """middle: whether the blocks at the lowest resolution begin with a branch that sees the whole picture."""
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = _encoder(latent_channels, middle)
        self.decoder = _decoder(latent_channels, middle)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1 .. 1 -> [B, C, h, w]"""
        return self.encoder(pixels / 2 + 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W], about -1 .. 1"""
        return self.decoder(latents) * 2 - 1

    def save(self, folder: Path) -> None:
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            weights = {key: tensor.cpu().contiguous() for key, tensor in part.state_dict().items()}
            save_file(weights, folder / f"tiny_{name}.safetensors")


class Block(nn.Module):
    """Three convolutions beside a skip; in the middle, first a residual whose group norm sees the whole picture."""

    def __init__(self, middle: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool = None
        if middle:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, INSIDE, 1, bias=False),
                nn.GroupNorm(GROUPS, INSIDE),
                nn.ReLU(),
                nn.Conv2d(INSIDE, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64, H, W] -> the same shape"""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Clamp(nn.Module):
    """Into -3 .. 3, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def _encoder(latent_channels: int, middle: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage, blocks in enumerate(ENCODER_BLOCKS):
        layers.append(_conv(stride=2, bias=False) if stage else _conv(3))
        layers += [Block(middle and stage == len(ENCODER_BLOCKS) - 1) for _ in range(blocks)]
    return nn.Sequential(*layers, _conv(outputs=latent_channels))


def _decoder(latent_channels: int, middle: bool) -> nn.Sequential:
    layers = [Clamp(), _conv(latent_channels), nn.ReLU()]
    for stage, blocks in enumerate(DECODER_BLOCKS):
        if stage:
            layers += [nn.Upsample(scale_factor=2), _conv(bias=False)]
        layers += [Block(middle and stage == 0) for _ in range(blocks)]
    return nn.Sequential(*layers, _conv(outputs=3))


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The files of encoder and decoder; None if the folder is one of diffusers'. Raises TesseraError."""
    if (folder / "config.json").exists():
        return None
    found = []
    for name in ("encoder", "decoder"):
        files = sorted(path for path in folder.iterdir() if re.search(rf"_?{name}\.(pth|safetensors)$", path.name))
        stems = {path.stem for path in files}
        if len(stems) != 1:
            what = f"{len(stems)} {name}s: {', '.join(sorted(stems))}" if stems else f"no *_{name}.pth or .safetensors"
            raise TesseraError(
                f"cannot load a tiny autoencoder from {folder}: it holds {what}; expected one *_encoder and one "
                "*_decoder file, or a folder written by diffusers' AutoencoderTiny.save_pretrained"
            )
        found.append(next((path for path in files if path.suffix == ".safetensors"), files[0]))
    return found[0], found[1]


def _from_files(encoder: Path, decoder: Path) -> Pair:
    first, second = _read(encoder), _read(decoder)
    last = f"{max((int(key.split('.')[0]) for key in first if key[0].isdigit()), default=0)}.weight"
    if last not in first:
        raise TesseraError(f"{encoder} holds no encoder of a tiny autoencoder: its layers have no numbers")
    network = Pair(len(first[last]), middle=any(".pool." in key for key in first))
    for part, weights, path in ((network.encoder, first, encoder), (network.decoder, second, decoder)):
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:400]
            raise TesseraError(
                f"{path} holds another network than a tiny autoencoder of {network.latent_channels} latent channels: "
                f"{reason}"
            ) from None
    return network


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict, which cannot run a program as it is read. Raises TesseraError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TesseraError(f"{path} is damaged, or holds more than tensors: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise TesseraError(f"{path} holds {type(weights).__name__}; expected a state dict: names and tensors")
    return weights


class _Diffusers(nn.Module):
    """diffusers' AutoencoderTiny; it takes and gives images in -1 .. 1."""

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
