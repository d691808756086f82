"""The twelve models of the DiT paper (Peebles & Xie 2023, table 1), and U-Nets of the same sizes."""

from typing import Any

# fmt: off
SIZES = {  # depth, width, heads
    "S":  (12,  384,  6),
    "B":  (12,  768, 12),
    "L":  (24, 1024, 16),
    "XL": (28, 1152, 16),
}
# U-Nets for 32 x 32 latents of 4 channels: model_channels and num_res_blocks with the DiT's multiply-adds, and with its
# parameters, to 3 %. Computed with `matching.match_unet`.
UNET_SIZES = {
    "S/8":  {"gmacs": ( 20, 3), "parameters": ( 86, 2)},
    "S/4":  {"gmacs": ( 46, 2), "parameters": ( 86, 2)},
    "S/2":  {"gmacs": ( 98, 2), "parameters": ( 86, 2)},
    "B/8":  {"gmacs": ( 46, 2), "parameters": (172, 2)},
    "B/4":  {"gmacs": ( 94, 2), "parameters": (172, 2)},
    "B/2":  {"gmacs": (192, 2), "parameters": (172, 2)},
    "L/8":  {"gmacs": ( 88, 2), "parameters": (324, 2)},
    "L/4":  {"gmacs": (176, 2), "parameters": (324, 2)},
    "L/2":  {"gmacs": (360, 2), "parameters": (324, 2)},
    "XL/8": {"gmacs": (108, 2), "parameters": (392, 2)},
    "XL/4": {"gmacs": (216, 2), "parameters": (392, 2)},
    "XL/2": {"gmacs": (436, 2), "parameters": (392, 2)},
}
# fmt: on

PRESETS = {
    f"DiT-{size}/{patch}": {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}
    for size, (depth, width, heads) in SIZES.items()
    for patch in (8, 4, 2)
}

UNET_PRESETS: dict[str, dict[str, Any]] = {
    f"UNet-{name}-{by}": {
        "model_channels": width,
        "channel_mult": (1, 2, 4),
        "num_res_blocks": depth,
        "attention_levels": (2, 4),
    }
    for name, sizes in UNET_SIZES.items()
    for by, (width, depth) in sizes.items()
}

NUM_HEADS_BY_WIDTH = {width: heads for _, width, heads in SIZES.values()}
