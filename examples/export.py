"""A model as an exported program and as an ONNX file, both with a batch of any number of images."""

import torch
from torch.export import Dim

from revit_kernels import create_model

model = create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).eval()
images = torch.randn(2, 3, 64, 64)

program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: Dim("images", max=64)}})
torch.export.save(program, "model.pt2")
again = torch.export.load("model.pt2").module()
print(f"model.pt2: the largest difference is {(again(images) - model(images)).abs().max():.1e}")

program = torch.onnx.export(model, (images,), dynamic_shapes={"x": {0: Dim("images", max=64)}}, dynamo=True)
program.save("model.onnx")
print("model.onnx is written")
