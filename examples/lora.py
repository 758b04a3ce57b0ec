"""LoRA on a batch of images of different sizes: only the adapters and the head learn."""

import torch
from peft import LoraConfig, get_peft_model

from revit_kernels import create_model

torch.manual_seed(0)
model = create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=3)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
model = get_peft_model(model, config)
model.print_trainable_parameters()

images = [torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((40, 60), (64, 64), (120, 50), (16, 16))]
labels = torch.tensor([0, 1, 2, 1])
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(1, 21):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step in (1, 10, 20):
        print(f"step {step}: loss {loss.item():.3f}")

merged = model.merge_and_unload().eval()  # plain linear layers again
engine = merged.engine()
print(f"merged: the blocks run {'in one call' if engine.refusal is None else engine.refusal}")
