"""A timm model, packed: the same logits for a dense batch, and one batch of images of different sizes."""

import timm
import torch

from revit_kernels import from_timm

theirs = timm.create_model("vit_tiny_patch16_224", depth=4).eval()  # pretrained=True for timm's weights
ours = from_timm(theirs)  # shares the parameters, copies nothing

with torch.inference_mode():
    images = torch.randn(2, 3, 224, 224)
    difference = (ours(images) - theirs(images)).abs().max()
    print(f"a dense batch: the largest difference from timm is {difference:.1e}")

    mixed = [torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((480, 640), (60, 40), (224, 224))]
    tokens = ours.forward_features(mixed)  # uint8 images are resized and normalised on the way
    for image, (rows, columns) in zip(mixed, tokens.packing.grids):
        print(f"an image of {image.shape[2]} x {image.shape[1]} is read as {rows} x {columns} patches")
    print(f"{len(tokens.tokens)} tokens in one packed batch; padded they would be {3 * tokens.packing.max_seqlen}")
    logits = ours(mixed)
    print(f"logits: {tuple(logits.shape)}")
