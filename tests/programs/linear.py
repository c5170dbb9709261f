"""The two parameters of a linear layer: what they are, and their shapes and flags."""

from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x):
        return self.fc(x)


model = Net()
for parameter in model.parameters():
    print(type(parameter).__name__, tuple(parameter.shape), parameter.dtype, parameter.requires_grad, parameter.is_leaf)
print(len(list(model.parameters())), "parameters,", sum(p.numel() for p in model.parameters()), "elements")
