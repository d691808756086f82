"""Generation: from a model and a request (classes, seeds, size, settings) to images."""

from tessera.generation.pipeline import decode, generate, generate_steps
from tessera.generation.request import check_guidance_model, class_labels, sampling_config

__all__ = ["check_guidance_model", "class_labels", "decode", "generate", "generate_steps", "sampling_config"]
