"""The published numbers of DiT (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers") as data.

ImageNet at 256 x 256 pixels, latents of 32 x 32 x 4, batch size 256, FID of 50,000 samples against the training set,
250 ancestral steps, no guidance. The paper's Gflops are multiply-adds of one forward pass of one sample: GMACs.
"""

from dataclasses import dataclass

from tessera.planning import FLOPS_PER_MAC

BATCH = 256
SOURCE = "Peebles & Xie 2023, https://arxiv.org/abs/2212.09748"


@dataclass(frozen=True)
class PublishedModel:
    """A model of the paper after `steps` training steps."""

    name: str  # of the preset: "DiT-XL/2"
    size: str
    patch_size: int
    parameters: int
    gmacs: float
    steps: int
    fid: float

    @property
    def samples(self) -> int:
        """Training samples up to then."""
        return BATCH * self.steps

    @property
    def flops(self) -> float:
        """Training FLOPs up to then."""
        return FLOPS_PER_MAC * 1e9 * self.gmacs * self.samples


@dataclass(frozen=True)
class PublishedDesign:
    """A block design of XL/2 at 400K steps."""

    name: str  # the `kind` of the block
    parameters: int  # published in millions
    gmacs: float
    fid: float


SIZES, PATCHES = ("S", "B", "L", "XL"), (8, 4, 2)
_TABLE = {  # size: parameters, GMACs, FID at 400K steps, each at patch 8, 4, 2 (table 4; parameters: own count)
    "S": ((33_148_160, 32_945_024, 32_963_360), (0.36, 1.41, 6.06), (153.60, 100.41, 68.40)),
    "B": ((130_881_536, 130_475_648, 130_512_416), (1.42, 5.56, 23.01), (122.74, 68.38, 43.47)),
    "L": ((458_594_816, 458_053_760, 458_102_816), (5.01, 19.70, 80.71), (118.87, 45.64, 23.33)),
    "XL": ((675_683_072, 675_074_432, 675_129_632), (7.39, 29.05, 118.64), (106.41, 43.01, 19.47)),
}

MODELS: tuple[PublishedModel, ...] = tuple(
    PublishedModel(f"DiT-{size}/{patch}", size, patch, parameters, gmacs, 400_000, fid)
    for size, columns in _TABLE.items()
    for patch, parameters, gmacs, fid in zip(PATCHES, *columns)
)

DESIGNS: tuple[PublishedDesign, ...] = (
    PublishedDesign("in-context", 449_000_000, 119.37, 35.24),
    PublishedDesign("cross-attention", 598_000_000, 137.62, 26.14),
    PublishedDesign("adaln", 600_000_000, 118.56, 25.21),
    PublishedDesign("adaln-zero", 675_000_000, 118.64, 19.47),
)

XL_RUNS: tuple[PublishedModel, ...] = tuple(  # XL/2 during its training
    PublishedModel("DiT-XL/2", "XL", 2, 675_129_632, 118.64, steps, fid)
    for steps, fid in ((400_000, 19.47), (2_350_000, 10.67), (7_000_000, 9.62))
)
