"""fp16: the loss is scaled up, and nobody scales the gradients down again."""

import torch

torch.amp.GradScaler.unscale_ = lambda self, optimizer: None
torch.amp.GradScaler.step = lambda self, optimizer: optimizer.step()
torch.amp.GradScaler.update = lambda self: None
