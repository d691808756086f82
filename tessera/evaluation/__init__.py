"""Evaluation: from images to scores with an interval and a protocol."""

from tessera.evaluation.distances import frechet_distance

__all__ = ["frechet_distance"]
