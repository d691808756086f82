"""The model card of a bundle, in Markdown."""

from tessera.adapters import adapter_state, attached
from tessera.codecs import StoredConfig
from tessera.encoders.text import WordsConfig
from tessera.model import Model
from tessera.models.network import parameter_count


def describe(model: Model) -> dict[str, str]:
    """The main facts about a model, for the card and for `tessera info`."""
    config = model.config
    network, codec = config.network, config.codec
    size = " x ".join(map(str, network.input_size))
    conditions = [
        *([f"{network.num_classes} classes"] if network.num_classes else []),
        *(["text"] if network.uses_text else []),
    ]
    return {
        "network": network.summary(),
        "input": f"{network.in_channels} x {size}, {' and '.join(conditions) or 'unconditional'}",
        "codec": codec.kind + (f" ({codec.source})" if isinstance(codec, StoredConfig) else ""),
        **({"text encoder": _text_encoder(model)} if network.uses_text else {}),
        "diffusion": config.diffusion.summary(),
        "parameters": f"{parameter_count(model.network):,}",
        **({"adapters": _adapters(model)} if attached(model.network) else {}),
        "GMACs": f"{model.network.macs() / 1e9:.4g} per forward pass (the DiT paper's Gflops)",
        "sampling": config.sampling.summary(),
    }


def _adapters(model: Model) -> str:
    parts = []
    for name, strength in attached(model.network).items():
        summary = model.adapters[name].summary if name in model.adapters else "adapter"
        count = sum(tensor.numel() for tensor in adapter_state(model.network, name).values())
        parts.append(f"{name} ({summary}, {count:,} parameters, strength {strength:g})")
    return "; ".join(parts)


def _text_encoder(model: Model) -> str:
    text = model.config.text
    match text:
        case None:
            return "not known"
        case WordsConfig():
            return f"{text.kind}, {len(text.vocabulary):,} words"
    return text.kind if text.name == text.kind else f"{text.kind} ({text.name})"


def render(model: Model) -> str:
    """The card: what the model is, how it was trained, how to sample from it."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in describe(model).items())
    provenance = "\n".join(f"- **{name}**: {value}" for name, value in model.config.provenance.facts().items())
    classes = ", ".join(model.class_names[:50]) + (", …" if len(model.class_names) > 50 else "")
    network = model.config.network
    words = [*(["--classes all"] if network.num_classes else []), *(['--prompt "a cat"'] if network.uses_text else [])]
    command = f"{' '.join(words)} --per-class 4" if words else "--num-samples 4"
    example = "classes=[0], " if network.num_classes else ""
    example += 'prompts=["a cat"], ' if network.uses_text else ""
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
{classes or ("none" if network.num_classes or network.uses_text else "none: unconditional")}

## How to sample from it
```
tessera sample FOLDER {command}
```
```python
import tessera
model = tessera.load("FOLDER")
{samples}(model, {example}seeds=[0])  # uint8 {shape}
```
"""
