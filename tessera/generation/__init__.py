"""Generation: from a model and a request (conditions, seeds, size, settings) to images or clips."""

from tessera.generation.control import ControlInput
from tessera.generation.pipeline import (
    ContinuousSampler,
    decode,
    generate,
    generate_request,
    generate_steps,
    make_request,
    sample_steps,
)
from tessera.generation.request import SampleRequest, check_guidance_model, image_size, sampling_config

__all__ = [
    "ContinuousSampler", "ControlInput", "SampleRequest", "check_guidance_model", "decode", "generate",
    "generate_request", "generate_steps", "image_size", "make_request", "sample_steps", "sampling_config",
]  # fmt: skip
