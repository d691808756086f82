"""The twelve models of the DiT paper (Peebles & Xie 2023, table 1)."""

# fmt: off
SIZES = {  # depth, width, heads
    "S":  (12,  384,  6),
    "B":  (12,  768, 12),
    "L":  (24, 1024, 16),
    "XL": (28, 1152, 16),
}
# fmt: on

PRESETS = {
    f"DiT-{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
    for size, (depth, width, heads) in SIZES.items()
    for patch in (8, 4, 2)
}

HEADS_OF_WIDTH = {width: heads for _, width, heads in SIZES.values()}
