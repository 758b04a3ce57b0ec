"""What comes back where lengths are chosen: answers, and what they cost."""

from typing import NamedTuple

from torch import Tensor


class Answers(NamedTuple):
    """Answers to the images of a batch, and what they cost.

    logits: (images, classes); zeros for an image that found no room in a packing made on the device
    choice: (images,) int64, the menu row of the length that answered; -1 where an assigner did (policy "scout+cascade")
    tokens: (images,) int64, of all passes of the model that the image went through, prefix tokens counted, an
            assigner's own not; 0 for one that found no room
    rows:   computed for them, rows of no image among them; a graph's are shared out evenly among its images
    """

    logits: Tensor
    choice: Tensor
    tokens: Tensor
    rows: float

    @property
    def fits(self) -> Tensor:
        """(images,) bool, on the device: whether the image found room, and so has an answer."""
        return (self.tokens > 0) | (self.choice < 0)

    @property
    def waste(self) -> Tensor:
        """Scalar, on the device: the share of the computed rows that were no image's."""
        return 1 - self.tokens.sum() / self.rows if self.rows else self.tokens.sum().float()
