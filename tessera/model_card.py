"""The model card of a bundle, in Markdown."""

from tessera.codecs import StoredConfig
from tessera.model import Model
from tessera.models.network import parameter_count


def describe(model: Model) -> dict[str, str]:
    """The main facts about a model, for the card and for `tessera info`."""
    config = model.config
    network, codec = config.network, config.codec
    size = " x ".join(map(str, network.input_size))
    classes = f"{network.num_classes} classes" if network.num_classes else "unconditional"
    return {
        "network": network.summary(),
        "input": f"{network.in_channels} x {size}, {classes}",
        "codec": codec.kind + (f" ({codec.source})" if isinstance(codec, StoredConfig) else ""),
        "diffusion": config.diffusion.summary(),
        "parameters": f"{parameter_count(model.network):,}",
        "Gflops": f"{model.network.macs() / 1e9:.4g} (multiply-adds of one forward pass, as the DiT paper counts)",
        "sampling": config.sampling.summary(),
    }


def render(model: Model) -> str:
    """The card: what the model is, how it was trained, how to sample from it."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in describe(model).items())
    provenance = "\n".join(f"- **{name}**: {value}" for name, value in model.config.provenance.facts().items())
    classes = ", ".join(model.class_names[:50]) + (", …" if len(model.class_names) > 50 else "")
    network = model.config.network
    example = "classes=[0], " if network.num_classes else ""
    samples = "clips = tessera.generate" if network.is_temporal else "images = tessera.generate"
    shape = "[B, T, H, W, C]" if network.is_temporal else "[B, H, W, C]"
    return f"""---
library_name: tessera
tags: [diffusion, {network.kind}]
---
# {network.display_name}

| | |
|---|---|
{facts}

## Provenance
{provenance or "- not recorded"}

## Classes
{classes or "none: unconditional"}

## How to sample from it
```
tessera sample FOLDER {"--classes all --per-class" if network.num_classes else "--num-samples"} 4
```
```python
import tessera
model = tessera.load("FOLDER")
{samples}(model, {example}seeds=[0])  # uint8 {shape}
```
"""
