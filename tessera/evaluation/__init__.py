"""Pictures to numbers that say how they were made."""

from tessera.evaluation.distances import frechet_distance

__all__ = ["frechet_distance"]
