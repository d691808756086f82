"""The identity codec."""

import pytest
import torch

from tessera.codecs import PixelsConfig
from tessera.errors import TesseraError
from tessera.settings import validate


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_the_pixels(channels):
    codec = PixelsConfig(channels=channels).build().to("cpu")
    pixels = torch.rand(2, channels, 4, 6) * 2 - 1
    assert torch.equal(codec.encode(pixels), pixels)
    assert torch.equal(codec.encode(pixels, torch.randn_like(pixels)), pixels)  # there is no posterior
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)
    moments = codec.moments(pixels)
    assert torch.equal(moments, torch.cat((pixels, torch.zeros_like(pixels)), dim=1))
    assert torch.equal(codec.latents(moments, torch.randn_like(pixels)), pixels)
    assert (codec.scale, codec.shift, codec.stochastic) == (1.0, 0.0, False)
    assert (codec.factor, codec.pixel_channels, codec.latent_channels) == (1, channels, channels)


def test_pixels_have_one_channel_or_three():
    with pytest.raises(TesseraError, match="channels"):
        validate(PixelsConfig, {"channels": 4}, "the codec")


def test_the_fingerprint_depends_on_the_number_of_channels():
    one, two = (PixelsConfig(channels=channels).build().fingerprint() for channels in (1, 3))
    assert one != two
    assert two == PixelsConfig().build().fingerprint()
