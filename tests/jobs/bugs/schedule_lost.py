"""The scheduler's state is not restored at resume."""

from torch.optim.lr_scheduler import LambdaLR

LambdaLR.load_state_dict = lambda self, state: [
    group.update(lr=group["initial_lr"]) for group in self.optimizer.param_groups
]
