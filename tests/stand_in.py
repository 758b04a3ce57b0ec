"""A stand-in for the model that `revit` loads; as a program, the command with it: `python -m stand_in infer ...`."""

import sys
from types import SimpleNamespace

import torch

from revit_kernels import cli
from revit_kernels.serving import prepare


class StandIn(torch.nn.Module):
    """Answers with the mean colour of each image, and remembers the batches it was given."""

    def __init__(self, classes=3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.patch_embed = SimpleNamespace(patch_size=(16, 16), grid_size=(14, 14), img_size=(224, 224))
        self.per_frame = None  # it is of images
        self.num_prefix_tokens, self.num_classes, self.num_features = 1, classes, 3
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.calls = []

    def engine(self, **options):
        return self

    def forward_features(self, images, grids, channels_last):
        assert channels_last and all(i.dtype == torch.uint8 and i.shape[2] == 3 for i in images)
        self.calls.append(list(grids))
        return torch.stack([image.float().mean((0, 1)) / 255 for image in images])

    def forward_head(self, x, pre_logits=False):
        return x

    def forward(self, images, grids, channels_last):
        return self.forward_features(images, grids, channels_last)


if __name__ == "__main__":
    prepare.load_model = lambda *args, **kwargs: StandIn()
    sys.exit(cli.main(sys.argv[1:]))
