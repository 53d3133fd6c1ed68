"""Which elements of a tile are asked for, and what is known of its masks there."""

from dataclasses import dataclass, replace
from enum import Enum

from .lanes import Lane, Use

Coordinates = tuple[Lane, ...]


class Masks(Enum):
    """What is known of prefix masks where code is being written: nothing, or that all lanes are inside, or none."""

    TEST = "test"
    INSIDE = "inside"
    OUTSIDE = "outside"
    TRUE = "true"  # whatever the mask: the elements are known to be inside


@dataclass(frozen=True, slots=True)
class Index:
    """Which elements, and what for: a coordinate for each dimension, uniform or (in one of them) affine in the lane."""

    coordinates: Coordinates
    width: int
    masks: Masks = Masks.TEST
    use: Use = Use.VALUE

    def moved(self, coordinates: Coordinates) -> "Index":
        return replace(self, coordinates=coordinates)

    def used(self, use: Use) -> "Index":
        return self if use is self.use else replace(self, use=use)
