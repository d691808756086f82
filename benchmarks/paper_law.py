"""A scaling law fitted to the paper's table: GMACs against FID-50K after 400K steps, the twelve models of DiT.

    python benchmarks/paper_law.py

Prints the tables of paper_law.md and plots docs/figures/paper-law.png and .svg.
"""

import argparse
from pathlib import Path

import numpy as np

from tessera.planning import published, scaling_law
from tessera.reporting.estimates import Estimate, kendall, spearman
from tessera.studies import figures

FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def text(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the figure")
    options = parser.parse_args()
    models = published.MODELS
    gmacs, fid = [model.gmacs for model in models], [model.fid for model in models]
    print("| over the twelve models | value (95 % interval) |\n|---|---|")
    print(f"| Spearman's rank correlation | {text(spearman(gmacs, fid))} |")
    print(f"| Kendall's rank correlation | {text(kendall(gmacs, fid))} |")
    print(f"| Pearson's of log GMACs and FID | {np.corrcoef(np.log(gmacs), fid)[0, 1]:.3f} |")
    print(f"| Pearson's of log GMACs and log FID | {np.corrcoef(np.log(gmacs), np.log(fid))[0, 1]:.3f} |")

    floor = scaling_law.fit(gmacs, fid, floor="fitted").floor
    print(f"| floor of FID, if the law has one | {floor:.1f} |")

    print("\n| law of | models | exponent (95 % interval) | FID at 1 GMAC | residual |\n|---|---|---|---|---|")
    groups = {"all": models}
    groups |= {f"patch {patch}": tuple(m for m in models if m.patch_size == patch) for patch in published.PATCHES}
    groups |= {f"size {size}": tuple(m for m in models if m.size == size) for size in published.SIZES}
    for name, members in groups.items():
        line = scaling_law.fit([m.gmacs for m in members], [m.fid for m in members])
        exponent, error = text(line.exponent), np.expm1(line.error)
        print(f"| {name} | {len(members)} | {exponent} | {line.scale:.1f} | {error:.0%} |")

    out = [model.size == "XL" for model in models]
    held_out = {
        "S, B, L of all patches": scaling_law.predict_held_out(gmacs, fid, out),
        "S, B, L of patch 2": scaling_law.predict_held_out(gmacs[2::3], fid[2::3], out[2::3]),
        "all but XL/2": scaling_law.predict_held_out(gmacs, fid, scaling_law.largest_mask(gmacs, 1)),
    }
    print("\n| fitted on | predicted | FID predicted (95 % interval) | published | error | inside the interval |")
    print("|---|---|---|---|---|---|")
    for fitted, predictions in held_out.items():
        for each in predictions:
            name = next(model.name for model in models if model.gmacs == each.x)
            inside = "yes" if each.inside else "no"
            print(f"| {fitted} | {name} | {text(each.predicted, 1)} | {each.measured} | {each.error:+.0%} | {inside} |")

    print("\n| XL/2 trained for | training FLOPs | FID-50K |\n|---|---|---|")
    for model in published.XL_RUNS:
        print(f"| {model.steps:,} steps | {model.flops:.3g} | {model.fid} |")
    figure = figures.paper_law(out)
    figure.save(options.out)


if __name__ == "__main__":
    main()
